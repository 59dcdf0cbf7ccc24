//! `cvm-mux`: the mux client. It stands between the mux-server, which holds the bots, and the stock
//! gateway, which knows nothing of it, and loses no message between the two.
//!
//! ```text
//! cvm-mux          the client: PID 1 starts it, with a channel (`base/channel`)
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

use cvm_channel::Channel;
use cvm_protocol::mux::MuxSpec;
use std::path::Path;
use std::process::ExitCode;

const PROGRAM: &str = "cvm-mux";
const EXIT_USAGE: u8 = 64;

fn main() -> ExitCode {
    cvm_channel::begin();
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
    let channel = match Channel::take(PROGRAM) {
        Ok(channel) => channel,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let outcome = cvm_channel::specification::<MuxSpec>(PROGRAM).and_then(|spec| {
        privileges::give_up(Path::new(&spec.directory), spec.uid)?;
        runtime()?.block_on(client::run(spec, channel))
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
    let outcome = cvm_channel::specification(PROGRAM).and_then(|spec| runtime()?.block_on(pair::pair(spec)));
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

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Only names of hosts are looked up on these threads.
        .max_blocking_threads(2)
        .thread_stack_size(256 * 1024)
        .build()
        .map_err(|e| format!("no runtime: {e}"))
}
