//! What runs: from the variables of the environment to the configuration, the steps of the boot and the services.
//!
//! ```text
//! environment -> config -> role -> plan of tasks and services, and what the services are told
//! ```
//!
//! Data flows one way along that line. Pure functions and data: no I/O, no clock.

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
