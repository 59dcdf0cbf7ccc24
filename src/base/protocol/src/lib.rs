//! Every message between our processes, and everything else that several of them must agree on: paths, accounts, how
//! a process ended, what a volume remembers.
//!
//! The crate has types and pure functions only: no I/O, no clock.

pub mod accounts;
pub mod authorized_keys;
pub mod control;
pub mod doors;
pub mod exit_status;
pub mod fact;
pub mod json_lines;
pub mod keeper;
pub mod mux;
pub mod paths;
pub mod report;
pub mod status;
pub mod storage;
pub mod task;
pub mod text;
pub mod time;
pub mod volume;
mod word_enum;
