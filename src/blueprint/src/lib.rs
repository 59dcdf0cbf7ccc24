//! Every decision of the supervisor, as pure functions and data.
//!
//! ```text
//! environment -> config -> keys -> boot plan -> services -> supervision -> status
//! ```
//!
//! Data flows one way along that line: a module may import what stands left of it, never
//! what stands right. Nothing here does I/O, reads a clock or spawns anything; time comes in
//! as an argument, and what should happen goes out as data. The processes around this crate
//! (`cvm-init`, `cvm-keeper`, `cvm-step`, `cvm`) are its hands.

pub mod accounts;
pub mod backoff;
pub mod bootstrap;
pub mod conduct;
pub mod config;
pub mod doors;
pub mod ending;
pub mod env;
pub mod keys;
pub mod mux;
pub mod owner;
pub mod packed;
pub mod paths;
pub mod plan;
pub mod secret;
pub mod service;
pub mod ssh;
pub mod status;
pub mod storage;
pub mod supervise;
pub mod time;
pub mod volume;
pub mod wire;
