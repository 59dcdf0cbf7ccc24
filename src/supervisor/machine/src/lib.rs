//! What happens when: the life of each service, the boot, the orders of operators and the way down, as pure state
//! machines.
//!
//! Nothing here does I/O, reads a clock or spawns anything: time comes in as an argument, and what should happen
//! goes out as data. `cvm-init` does it.

pub mod awake_clock;
pub mod backoff;
pub mod description;
pub mod gate;
pub mod machine;
pub mod moment;
pub mod plan;
pub mod service;
pub mod snapshot;
