//! `cvm-keeper` runs one service or one boot step for PID 1.
//!
//! PID 1 starts one keeper for each thing it runs. The keeper starts the program, adopts every
//! orphan below it, reads its output into a rotating log, asks its probes, and ends only when
//! nothing of the whole process tree is left. So to PID 1 a service is one child, whose death
//! means that all of it is gone.
//!
//! ```text
//! PID 1 ── spec (memfd, fd 0) ──> keeper ── fork, exec ──> the program
//!       <── reports (fd 3) ─────         <── output (pipe) ──
//!       ── SIGTERM: end the program;  SIGQUIT: end its whole tree, now ──>
//! ```
//!
//! A keeper may block on a slow disk, which PID 1 must never do. PID 1 decides whether an end was good and whether
//! the service starts again; the keeper drops its specification, secrets included, as soon as the program has it.

mod keep;
mod lines;
mod logbook;
mod probe;
mod progress;
mod report;

use cvm_protocol::keeper::KeeperSpec;
use cvm_sys::{descriptor, memfd, private, signals};
use std::process::ExitCode;

/// A specification holds one environment, which the kernel limits to a few megabytes.
const SPEC_MAX: usize = 32 * 1024 * 1024;

const USAGE: &str = "cvm-keeper is started by cvm-init:\n    \
    cvm-keeper NAME             keep the program whose description is on standard input\n    \
    cvm-keeper --log FILE       write standard input, line by line, into a rotating file";

fn main() -> ExitCode {
    signals::block_all();
    private::keep_private();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--log", file] => keep::log_only(file),
        [_name] => read_spec().and_then(keep::keep),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("cvm-keeper: {why}");
            ExitCode::FAILURE
        }
    }
}

fn read_spec() -> Result<KeeperSpec, String> {
    let input = descriptor::inherited(0).map_err(|e| format!("standard input: {e}"))?;
    let bytes = memfd::read_all(input, SPEC_MAX).map_err(|e| format!("reading its description: {e}"))?;
    // The text of the error may quote the input, which holds secrets; its column does not.
    serde_json::from_slice(&bytes).map_err(|e| format!("its description is broken at column {}", e.column()))
}
