//! One task of the supervisor, done once: `cvm-task` reads it from standard input, does it, and
//! reports one line on file descriptor 3.
//!
//! Everything that may block on a disk, a mount or a foreign program happens here and not in
//! PID 1, which holds the deadline and kills this process with all it started. So every task
//! may be killed at any line, and begins from whatever an earlier try has left behind.
//!
//! Exit status: 0 the task is done, 1 it failed and the report says why, 2 there was nobody to
//! report to.
//!
//! A secret is written only into the file that it is for: standard output and standard error are a log that operators
//! read.

mod docker;
mod files;
mod home;
mod orphans;
mod port;
mod processes;
mod programs;
mod report;
mod root_dir;
mod ssh;
mod sshd_config;
mod state;
mod volume;

use cvm_protocol::json_lines;
use cvm_protocol::task::Task;
use cvm_sys::{descriptor, memfd};
use report::{Failure, Outcome, Report};
use root_dir::RootDir;
use ssh::Keys;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// A task carries at most what an environment can hold, twice encoded, and files of the user's.
const TASK_MAX: usize = 32 * 1024 * 1024;
const REPORT_FD: i32 = 3;

fn main() -> ExitCode {
    // Before anything else is opened, so that no other file gets this number.
    let Ok(fd) = descriptor::inherited(REPORT_FD) else {
        eprintln!(
            "cvm-task is started by cvm-init: a task on standard input, a pipe for the report on descriptor 3"
        );
        return ExitCode::from(2);
    };
    cvm_sys::private::keep_private();
    // The text of a panic may quote anything, so only its place is said.
    std::panic::set_hook(Box::new(|panic| eprintln!("cvm-task: a bug, at {}", place_of(panic.location()))));
    let mut report = Report::default();
    let outcome =
        catch_unwind(AssertUnwindSafe(|| read_task().and_then(|task| carry_out(task, &mut report))))
            .unwrap_or_else(|_| Err(Failure::again("cvm-task has a bug and stopped; its log says where")));
    let done = outcome.is_ok();
    let mut pipe = File::from(fd);
    // One write: the keeper writes into the same pipe.
    if pipe.write_all(&json_lines::line(&report.finish(outcome))).is_err() {
        return ExitCode::from(2);
    }
    if done { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn place_of(location: Option<&std::panic::Location<'_>>) -> String {
    location.map_or_else(|| "an unknown place".to_owned(), ToString::to_string)
}

fn read_task() -> Outcome<Task> {
    let broken = |why: String| {
        Failure::for_good(format!("the task for cvm-task {why}: all binaries must come from one image"))
    };
    let input = task_input().map_err(|e| broken(format!("cannot be read ({e})")))?;
    let bytes = memfd::read_all(input, TASK_MAX).map_err(|e| broken(format!("cannot be read ({e})")))?;
    // The text of the error may quote the input, which holds secrets: only its place is said.
    serde_json::from_slice(&bytes).map_err(|e| broken(format!("is not understood (column {})", e.column())))
}

/// Takes standard input, which holds secrets, and puts /dev/null in its place. Number 0 must not stay free: a pipe
/// that got it would be closed in the program that the pipe is made for.
fn task_input() -> std::io::Result<OwnedFd> {
    let input = std::io::stdin().as_fd().try_clone_to_owned()?;
    nix::unistd::dup2_stdin(File::open("/dev/null")?)?;
    Ok(input)
}

fn carry_out(task: Task, report: &mut Report) -> Outcome<()> {
    let root_dir = RootDir::default();
    match task {
        Task::Ssh { port, seed, trust_host_keys } => {
            ssh::prepare(&root_dir, port, seed.as_ref(), trust_host_keys, report)
        }
        Task::Volume { claim, extra_keys, trust_host_keys } => {
            let keys = Keys { given: &extra_keys, trust_host_keys };
            volume::open(&root_dir, &claim, keys, report)
        }
        Task::Home { user, docker } => home::prepare(&root_dir, &user, docker, report),
        Task::State(task) => state::prepare(&root_dir, &task, report),
        Task::DockerPrepare => docker::prepare(&root_dir, report),
        Task::FreePort { port, service } => port::free(&root_dir, port, &service, report),
        Task::Sweep { run, listens_on } => orphans::end(&root_dir, &run, listens_on, report),
    }
}
