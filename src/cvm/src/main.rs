//! `cvm`, the operator's hand: inside the VM over SSH, and on a laptop.
//!
//! ```text
//! status, health, start, stop, restart, openclaw  ── one line each way ──>  PID 1's control socket
//! logs                                            ── reads ──>    /var/log/openclaw-cvm
//! doctor                                          ── looks at ──> kernel, disks, services
//! storage                                         ── asks ──>     the storage worker's socket
//! storage restore                                 ── becomes ──>  cvm-storage, on any machine
//! pair                                            ── asks, through cvm-mux ──>  the mux-server
//! volume                                          ── writes ──>   what the volume remembers of its key
//! derive                                          ── needs ──>    MASTER_KEY; for rclone.conf the bucket too
//! ```
//!
//! Linked as `openclaw` it is the gateway's own command line, run as the gateway's user.
//!
//! Refuses: to change anything but through the supervisor (who leaves volumes alone, so `volume` does it), to print a secret other than the
//! one that was asked for by name, and to panic because nobody reads its output.

mod args;
mod beside;
mod completions;
mod derive;
mod doctor;
mod health;
mod http;
mod input;
mod json;
mod logs;
mod look;
mod openclaw;
mod out;
mod pair;
mod prompt;
mod service;
mod sink;
mod socket;
mod status;
mod storage;
mod table;
mod trouble;
mod version;
mod volume;
mod watch;
mod words;

use args::Command;
use clap::Parser as _;
use std::process::ExitCode;
use trouble::{Exit, Trouble};

fn main() -> ExitCode {
    // It may have been given the container's whole environment.
    cvm_sys::private::keep_private();
    let mut arguments: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if openclaw::is_meant_by(arguments.first().map(std::ffi::OsString::as_os_str)) {
        return end(openclaw::run(arguments.drain(1..).collect()));
    }
    match args::Cli::try_parse_from(arguments) {
        Ok(cli) => end(run(cli.command)),
        Err(error) => end(args::explain(&error)),
    }
}

fn run(command: Command) -> Result<Exit, Trouble> {
    match command {
        Command::Status(args) => status::run(&args),
        Command::Logs(args) => logs::run(&args),
        Command::Start(args) => service::run(service::Order::Start, &args.into()),
        Command::Stop(args) => service::run(service::Order::Stop, &args.into()),
        Command::Restart(args) => service::run(service::Order::Restart, &args.into()),
        Command::Storage { what } => storage::run(&what),
        Command::Volume { what } => volume::run(&what),
        Command::Pair(args) => pair::run(&args),
        Command::Health(args) => health::run(&args),
        Command::Derive(args) => derive::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::DoctorRoom { room } => doctor::run_room(&room),
        Command::Openclaw { arguments } => openclaw::run(arguments),
        Command::Completions { shell } => completions::run(shell),
        Command::Version => version::run(),
    }
}

fn end(outcome: Result<Exit, Trouble>) -> ExitCode {
    match outcome {
        Ok(exit) => exit.into(),
        Err(trouble) => {
            trouble.tell();
            trouble.exit.into()
        }
    }
}
