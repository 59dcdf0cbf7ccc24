//! Secrets: types that are wiped when they are dropped, and every key that is derived from `MASTER_KEY`.
//!
//! Imports no other crate of ours.

pub mod base64_bytes;
pub mod keys;
pub mod obscured;
pub mod owner;
pub mod secret;
