//! `cvm storage`: what the storage worker knows and does, for operators.
//!
//! ```text
//! status, flush, verify, drill, ls, get            ── one question, many lines ──> cvm-storage's socket
//! forget, keep, accept-older, adopt, takeover      ── the same, after the operator has confirmed it
//! restore                                          ── becomes ──> cvm-storage restore, anywhere
//! ```
//!
//! Refuses to open the bucket itself: whoever holds its keys is one program, and not this one.
//! May import: `args`, `input`, `json`, `look`, `out`, `sink`, `socket`, `table`,
//! `trouble`, `watch`, `words`, and its own rooms.

mod client;
mod confirm;
mod follow;
mod get;
mod glance;
mod ls;
mod page;
mod progress;
mod restore;
#[cfg(test)]
pub(crate) mod samples;

pub(crate) use client::{Client, Patience};
pub(crate) use follow::{print_to_the_end, to_the_end};
pub(crate) use get::decoded;
pub(crate) use glance::{Glance, InBucket, MODE, in_bucket, lead, lead_away, mode_words};
pub(crate) use page::OLD_MS;

use crate::args::StorageCommand;
use crate::trouble::{Exit, Trouble};
use cvm_protocol::storage::Ask;

pub(crate) fn run(command: &StorageCommand) -> Result<Exit, Trouble> {
    match command {
        StorageCommand::Status(args) => page::run(args),
        StorageCommand::Flush { timeout } => follow::run("flush", Ask::Flush, *timeout),
        StorageCommand::Verify { deep } => follow::run("verify", Ask::Verify { deep: *deep }, None),
        StorageCommand::Drill => follow::run("drill", Ask::Drill, None),
        StorageCommand::Forget(args) => confirm::forget(args),
        StorageCommand::Keep(args) => confirm::keep(args),
        StorageCommand::AcceptOlder { yes } => confirm::accept_older(*yes),
        StorageCommand::Adopt { yes } => confirm::adopt(*yes),
        StorageCommand::Accept { .. } => Err(confirm::no_accept_any_more()),
        StorageCommand::Takeover { yes } => confirm::takeover(*yes),
        StorageCommand::Ls(args) => ls::run(args),
        StorageCommand::Get(args) => get::run(args),
        StorageCommand::Restore { to, accept } => restore::run(to, *accept),
    }
}
