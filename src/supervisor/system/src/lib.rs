//! What runs: from the variables of the environment to the configuration, the steps of the boot and the services.
//!
//! ```text
//! environment -> config -> boot plan, services, specifications
//! ```
//!
//! Data flows one way along that line. Pure functions and data: no I/O, no clock.

pub mod boot_plan;
pub mod config;
pub mod env;
pub mod owner;
pub mod services;
pub mod specifications;

#[cfg(test)]
mod tests;
