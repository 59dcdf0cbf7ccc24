//! What the tests stand on: throw-away machines with a real PID 1, and waiting for conditions.
//!
//! * [`sandbox`]: the namespaces and the root file system, as a library and as `cvm-sandbox`.
//! * [`machine`]: a machine with the product installed, to be started, watched and broken.
//! * [`wait`]: waiting for something to become true, with words for when it does not.

pub mod machine;
pub mod sandbox;
pub mod wait;

pub use machine::{Builder, Machine, Process};
pub use wait::until;
