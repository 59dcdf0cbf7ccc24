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

use cvm_channel::Channel;
use cvm_protocol::storage::StorageSpec;
use desk::Desk;
use ending::Ending;
use std::process::ExitCode;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use worker::{Order, Worker};

const PROGRAM: &str = "cvm-storage";
/// `EX_TEMPFAIL`: what the bucket does not have stays on the volume for the next boot.
const UNDRAINED: u8 = 75;
const USAGE: u8 = 64;

fn main() -> ExitCode {
    cvm_channel::begin();
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

fn spec() -> Result<StorageSpec, String> {
    cvm_channel::specification(PROGRAM)
}

fn work() -> ExitCode {
    let Channel { reports, lifeline } = match Channel::take(PROGRAM) {
        Ok(channel) => channel,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(USAGE);
        }
    };
    let spec = match spec() {
        Ok(spec) => spec,
        Err(why) => {
            tracing::error!("{why}");
            return ExitCode::FAILURE;
        }
    };
    let desk = Arc::new(Desk::new(&spec, reports));
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
        lifeline.wait();
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
