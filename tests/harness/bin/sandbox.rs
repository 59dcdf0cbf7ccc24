//! `cvm-sandbox`: runs a command as process 1 of a throw-away machine. See `sandbox.rs`.

use cvm_harness::sandbox::{self, Bind, Plan};
use nix::sys::signal::{SigSet, Signal, kill};
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
cvm-sandbox [OPTIONS] -- CMD ARG...
    --net host|private|FILE   this machine's network, one with a loopback only (default), or one that a
                              file of /proc stands for
    --bind SOURCE:TARGET[:ro] a directory or file of this machine
    --copy SOURCE:TARGET      a copy of a file, with its mode
    --symlink TARGET:LINK
    --env NAME=VALUE          the command gets exactly these
    --info FILE               gets the pid of process 1 when it executes the command
";

fn main() -> ExitCode {
    // A test that is killed takes its machines with it.
    let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    // Whatever comes in is passed on below, by sigwait; nothing may end this process before.
    let mut wanted = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
        Signal::SIGQUIT,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
        Signal::SIGCHLD,
    ] {
        wanted.add(signal);
    }
    let _ = wanted.thread_block();
    let plan = match parse(std::env::args().skip(1)) {
        Ok(plan) => plan,
        Err(why) => {
            eprint!("cvm-sandbox: {why}\n{USAGE}");
            return ExitCode::from(64);
        }
    };
    let pid = match sandbox::start(&plan) {
        Ok(pid) => pid,
        Err(error) => {
            eprintln!("cvm-sandbox: {error}");
            return ExitCode::from(125);
        }
    };
    loop {
        match wanted.wait() {
            Ok(Signal::SIGCHLD) => {
                // Only process 1 is our child, and stops are not asked for.
                if let Some(status) = sandbox::try_wait(pid) {
                    return ExitCode::from(u8::try_from(status).unwrap_or(125));
                }
            }
            Ok(signal) => drop(kill(pid, signal)),
            Err(_) => {}
        }
    }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Plan, String> {
    let mut plan = Plan { private_network: true, ..Plan::default() };
    let mut arguments = arguments;
    while let Some(option) = arguments.next() {
        if option == "--" {
            plan.command = arguments.collect();
            break;
        }
        let value = arguments.next().ok_or_else(|| format!("{option} needs a value"))?;
        let pair = |sep: char| {
            value.split_once(sep).ok_or_else(|| format!("{option} needs two parts with `{sep}` between them"))
        };
        match option.as_str() {
            "--net" if value.starts_with('/') => plan.network = Some(PathBuf::from(value)),
            "--net" => plan.private_network = value != "host",
            "--env" => {
                let (name, value) = pair('=')?;
                plan.environment.push((name.into(), value.into()));
            }
            "--copy" => {
                let (from, to) = pair(':')?;
                plan.copies.push((from.into(), to.into()));
            }
            "--symlink" => {
                let (target, link) = pair(':')?;
                plan.symlinks.push((target.into(), link.into()));
            }
            "--bind" => {
                let (source, target) = pair(':')?;
                let (target, read_only) = match target.strip_suffix(":ro") {
                    Some(target) => (target, true),
                    None => (target, false),
                };
                plan.binds.push(Bind { source: source.into(), target: target.into(), read_only });
            }
            "--info" => plan.info = Some(PathBuf::from(value)),
            // A file of this machine with a plan of files, as the library writes it.
            "--files" => plan.files = sandbox::read_files(&value).map_err(|e| format!("{value}: {e}"))?,
            _ => return Err(format!("unknown option {option}")),
        }
    }
    if plan.command.is_empty() {
        return Err("a command is missing after `--`".into());
    }
    Ok(plan)
}
