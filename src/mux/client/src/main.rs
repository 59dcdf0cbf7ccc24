//! `cvm-mux`: the mux client. It stands between the mux-server, which holds the bots, and the stock
//! gateway, which knows nothing of it, and loses no message between the two.
//!
//! ```text
//! cvm-mux          the client: PID 1 starts it, with a specification on standard input and a pipe for
//!                  reports on descriptor 3
//! cvm-mux pair     one question to the mux-server's operator interface, for `cvm pair`
//! ```
//!
//! ```text
//! mux-server ──> inbound ──> queue ──> dispatch ──> agent ──> gateway
//!     ^             │ delivery_auth       │           └─> attachments
//!     │             └ replication         └──> replies ──> outbound ──> mux-server
//!     └── registration                    status: what is reported of it all
//! ```
//!
//! It may be killed at any moment. What it has acknowledged is in the queue, on the volume, and with
//! a bucket in that too. When a task of it ends that others depend on, it ends with a reason, and the
//! supervisor starts it again.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![deny(clippy::unreachable, clippy::todo, clippy::unimplemented)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing))]

mod address;
mod agent;
mod attachments;
mod attempts;
mod backoff;
mod client;
mod clock;
mod connections;
mod delivery_auth;
mod dispatch;
mod event_body;
mod gateway;
mod http_client;
mod inbound;
mod key_cache;
mod mention;
mod message;
mod outbound;
mod pair;
mod privileges;
mod queue;
mod registration;
mod replication;
mod replies;
mod sessions;
mod split_answer;
mod status;
mod tasks;
mod upkeep;
mod work_context;

use cvm_protocol::mux::MuxSpec;
use cvm_sys::memfd;
use serde::de::DeserializeOwned;
use status::StatusReporter;
use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::ExitCode;

const SPEC_MAX: usize = 64 * 1024;
const EXIT_USAGE: u8 = 64;

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
        [] => serve(),
        [verb] if verb == "pair" => ask_for_pairing(),
        _ => {
            eprintln!("cvm-mux is started by cvm-init and by `cvm pair`");
            ExitCode::from(EXIT_USAGE)
        }
    }
}

fn serve() -> ExitCode {
    let Some(status) = StatusReporter::inherited() else {
        eprintln!("cvm-mux is started by cvm-init: reports on descriptor 3");
        return ExitCode::from(EXIT_USAGE);
    };
    let outcome = spec::<MuxSpec>().and_then(|spec| {
        privileges::give_up(Path::new(&spec.directory), spec.uid)?;
        runtime()?.block_on(client::run(spec, status))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            tracing::error!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn ask_for_pairing() -> ExitCode {
    let outcome = spec().and_then(|spec| runtime()?.block_on(pair::pair(spec)));
    match outcome {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// Standard input, from its beginning: an earlier run may have read the same file.
fn spec<T: DeserializeOwned>() -> Result<T, String> {
    let mut input = File::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?);
    let _ = input.seek(SeekFrom::Start(0));
    let bytes = memfd::read_all(input.into(), SPEC_MAX).map_err(|e| e.to_string())?;
    let nothing = File::open("/dev/null").map_err(|e| e.to_string())?;
    nix::unistd::dup2_stdin(nothing).map_err(|e| e.to_string())?;
    // The error is not shown: its text may quote the input, which has secrets.
    serde_json::from_slice(bytes.trim_ascii_end()).map_err(|_| {
        "the specification for cvm-mux is not understood: all binaries must come from one image".to_owned()
    })
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Only names of hosts are looked up on these threads.
        .max_blocking_threads(2)
        .thread_stack_size(256 * 1024)
        .build()
        .map_err(|e| format!("no runtime: {e}"))
}
