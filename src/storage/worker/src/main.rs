//! `cvm-storage`: keeps the tree at /data and the encrypted bucket equal.
//!
//! ```text
//! cvm-storage                 the worker: PID 1 starts it, with a specification on standard input,
//!                             reports on descriptor 3, and a lifeline on descriptor 4
//! cvm-storage restore DIR [accept]   the whole state into a directory; the specification comes the same way
//! ```
//!
//! ```text
//! opening ──> worker ──> push ──> chain ──> bucket ──> s3, rclone
//!    │           │         └────> stage ──> database
//!    └> mount    ├> scan, watch, hydrate           index, entry, manifest: what is known
//!       fetch    └> serve, desk: who asks and what is said
//! ```
//!
//! The only program of the product that links Go. It may be killed at any moment: what counts is
//! in the bucket and on the volume, and never half in either.
//!
//! Refuses: arguments with secrets, an environment with secrets, and to end on a signal: Go takes
//! those for itself, so the lifeline is the message.

mod below;
mod boots;
mod bucket;
mod chain;
mod copying;
mod crypt;
mod database;
mod desk;
mod disk;
mod ending;
mod entry;
mod fault;
mod fetch;
mod hydrate;
mod index;
mod lifting;
mod lineage;
mod manifest;
mod moment;
mod mount;
mod moved;
mod opened;
mod opening;
mod order;
mod owner;
mod parallel;
mod push;
mod rclone;
mod rescue;
mod review;
mod rules;
mod s3;
mod scan;
mod serve;
mod stage;
mod steps;
mod volume;
mod watch;
mod way;
mod worker;

use cvm_protocol::storage::StorageSpec;
use cvm_sys::{descriptor, memfd};
use desk::Desk;
use ending::Ending;
use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use worker::{Order, Worker};

/// Everything but the keys is short.
const SPEC_MAX: usize = 1024 * 1024;
/// `EX_TEMPFAIL`: what the bucket does not have stays on the volume for the next boot.
const UNDRAINED: u8 = 75;
const USAGE: u8 = 64;

fn main() -> ExitCode {
    cvm_sys::private::keep_private();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .init();
    // The text of a panic may quote anything, so only its place is said.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!("a bug, at {place}");
    }));
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => work(),
        [verb, to, how @ ..] if verb == "restore" && (how.is_empty() || how == ["accept"]) => match spec()
            .and_then(|spec| {
                rescue::restore(&spec, to.as_ref(), !how.is_empty()).map_err(|f| rescue::say(&f))
            }) {
            Ok(0) => ExitCode::SUCCESS,
            Ok(lost) => {
                eprintln!("{lost} files did not come back as the manifest says");
                ExitCode::FAILURE
            }
            Err(why) => {
                eprintln!("cvm-storage: {why}");
                ExitCode::FAILURE
            }
        },
        _ => {
            eprintln!("cvm-storage is started by cvm-init and by `cvm storage restore`");
            ExitCode::from(USAGE)
        }
    }
}

/// Standard input, from its beginning: a worker before us may have read the same file.
fn spec() -> Result<StorageSpec, String> {
    let broken = "the specification for cvm-storage is not understood: all binaries must come from one image";
    let mut input = File::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?);
    let _ = input.seek(SeekFrom::Start(0));
    let bytes = memfd::read_all(input.into(), SPEC_MAX).map_err(|e| e.to_string())?;
    // Whatever this process starts must not read it again.
    let nothing = File::open("/dev/null").map_err(|e| e.to_string())?;
    nix::unistd::dup2_stdin(nothing).map_err(|e| e.to_string())?;
    // The text of the error may quote the input: not said.
    serde_json::from_slice(bytes.trim_ascii_end()).map_err(|_| broken.to_owned())
}

fn work() -> ExitCode {
    let (Ok(reports), Ok(lifeline)) = (descriptor::inherited(3), descriptor::inherited(4)) else {
        eprintln!("cvm-storage is started by cvm-init: reports on descriptor 3, a lifeline on descriptor 4");
        return ExitCode::from(USAGE);
    };
    let spec = match spec() {
        Ok(spec) => spec,
        Err(why) => {
            tracing::error!("{why}");
            return ExitCode::FAILURE;
        }
    };
    let desk = Arc::new(Desk::new(&spec, Some(File::from(reports))));
    let (sender, orders) = mpsc::channel();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(4)
        .enable_all()
        .build();
    let Ok(runtime) = runtime else {
        tracing::error!("no runtime: the machine has no threads or descriptors left");
        return ExitCode::FAILURE;
    };
    runtime.spawn(serve::serve(Arc::clone(&desk), sender.clone()));
    let ending = Arc::new(Ending::new(Duration::from_secs(u64::from(spec.drain_s))));
    let (stopper, ends, watched) = (sender.clone(), Arc::clone(&ending), Arc::clone(&desk));
    std::thread::spawn(move || {
        // Nothing is ever written to it; its end is the message.
        let mut byte = [0u8; 1];
        while matches!(nix::unistd::read(&lifeline, &mut byte), Err(nix::errno::Errno::EINTR) | Ok(1..)) {}
        ends.until();
        let _ = stopper.send(Order::Stop);
        // Whatever the worker is doing just now.
        ends.enforce(&watched);
    });
    let boots = boots::Boots::new(Arc::clone(&desk.boot));
    let worker = Worker {
        spec: Arc::new(spec),
        desk,
        orders,
        sender,
        takeover: false,
        refusal: None,
        accepted: fault::Accepted::default(),
        adopt: false,
        stopping: false,
        ending,
        boots,
    };
    let clean = worker.run();
    runtime.shutdown_background();
    if clean { ExitCode::SUCCESS } else { ExitCode::from(UNDRAINED) }
}
