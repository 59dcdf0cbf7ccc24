//! `cvm storage`: questions and orders to the storage worker.
//!
//! ```text
//! status, flush, verify, drill, ls, get            ── one question, many lines ──> cvm-storage's socket
//! forget, keep, accept-older, adopt, takeover      ── the same, after the operator has confirmed it
//! restore                                          ── becomes ──> cvm-storage restore, anywhere
//! ```
//!
//! The bucket's keys are held by one program, cvm-storage, so this one never opens the bucket.

mod client;
mod decisions;
mod follow;
mod get;
mod ls;
mod progress;
mod restore;
#[cfg(test)]
pub(crate) mod samples;
mod status;
mod summary;

pub(crate) use client::{Client, Patience};
pub(crate) use follow::{print_to_the_end, to_the_end};
pub(crate) use get::decoded;
pub(crate) use status::OLD_MS;
pub(crate) use summary::{
    InBucket, WorkerAnswer, described_mode, first_lines, first_lines_without, in_bucket,
};

use crate::args::StorageCommand;
use crate::failure::{Exit, Failure};
use cvm_protocol::storage::Ask;

pub(crate) fn run(command: &StorageCommand) -> Result<Exit, Failure> {
    match command {
        StorageCommand::Status(args) => status::run(args),
        StorageCommand::Flush { timeout } => follow::run("flush", Ask::Flush, *timeout),
        StorageCommand::Verify { deep } => follow::run("verify", Ask::Verify { deep: *deep }, None),
        StorageCommand::Drill => follow::run("drill", Ask::Drill, None),
        StorageCommand::Forget(args) => decisions::forget(args),
        StorageCommand::Keep(args) => decisions::keep(args),
        StorageCommand::AcceptOlder { yes } => decisions::accept_older(*yes),
        StorageCommand::Adopt { yes } => decisions::adopt(*yes),
        StorageCommand::Accept { .. } => Err(decisions::accept_is_gone()),
        StorageCommand::Takeover { yes } => decisions::takeover(*yes),
        StorageCommand::Ls(args) => ls::run(args),
        StorageCommand::Get(args) => get::run(args),
        StorageCommand::Restore { to, accept } => restore::run(to, *accept),
    }
}
