//! Decides what runs: makes the configuration, the boot steps and the services from the environment.
//!
//! ```text
//! environment -> config -> role -> plan of tasks and services, and the services' specifications
//! ```
//!
//! The crate has data and pure functions only: no I/O, no clock.

pub mod config;
pub mod entry;
pub mod env;
pub mod gates;
pub mod owner;
pub mod roles;
mod services;
mod tasks;

pub use services::storage::specification as storage_specification;

#[cfg(test)]
mod tests;
