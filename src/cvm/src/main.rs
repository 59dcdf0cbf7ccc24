//! `cvm`, the operator's program: inside the VM over SSH, and on a laptop.
//!
//! ```text
//! status, health, start, stop, restart, openclaw  ── ask ──>               PID 1's control socket
//! logs                                            ── reads ──>             /var/log/openclaw-cvm
//! doctor                                          ── looks at ──>          kernel, disks, services
//! storage                                         ── asks ──>              the storage worker's socket
//! storage restore                                 ── becomes ──>           cvm-storage, on any machine
//! pair                                            ── asks, by cvm-mux ──>  the mux-server
//! volume                                          ── writes ──>            the key's fingerprint on the volume
//! derive                                          ── needs ──>             MASTER_KEY; for rclone.conf the bucket too
//! ```
//!
//! Linked as `openclaw` it is the gateway's own command line, run as the gateway's user.
//!
//! It prints no secret but the one that was asked for by name, and never panics because its reader went away.

mod args;
mod completions;
mod connection;
mod control_socket;
mod derive;
mod doctor;
mod facts;
mod failure;
mod gateway_access;
mod health;
mod http;
mod input;
mod json;
mod logs;
mod openclaw;
mod order;
mod pair;
mod prompt;
mod safe_output;
mod sibling;
mod status;
mod stdout;
mod storage;
mod style;
mod table;
mod text;
mod units;
mod version;
mod volume;
mod watch;

use args::Command;
use clap::Parser as _;
use failure::{Exit, Failure};
use std::process::ExitCode;

fn main() -> ExitCode {
    // The container's environment, secrets included, may be this program's own.
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

fn run(command: Command) -> Result<Exit, Failure> {
    match command {
        Command::Status(args) => status::run(&args),
        Command::Logs(args) => logs::run(&args),
        Command::Start(args) => order::run(order::Order::Start, &args.into()),
        Command::Stop(args) => order::run(order::Order::Stop, &args.into()),
        Command::Restart(args) => order::run(order::Order::Restart, &args.into()),
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

fn end(outcome: Result<Exit, Failure>) -> ExitCode {
    match outcome {
        Ok(exit) => exit.into(),
        Err(failure) => {
            failure.print();
            failure.exit.into()
        }
    }
}
