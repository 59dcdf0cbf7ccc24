//! What PID 1, the keepers and plain mode have in common: forking, reaping, signals, and
//! descriptors that cannot block.
//!
//! Nearly all that is `unsafe` is here; each use says why it is sound.
//! `std::process` is not used: `Command::spawn` waits until the child has exec'd, which on a
//! dead mount is for ever, and its `Child` does not live beside a wait for any child.
//!
//! Refuses to decide anything, to allocate threads, and to read configuration.

pub mod acting;
pub mod cached;
pub mod descriptor;
#[cfg(feature = "fake")]
pub mod fake;
pub mod handle;
pub mod kernel;
pub mod namespace;
pub mod passing;
pub mod port;
pub mod private;
pub mod reap;
pub mod signals;
pub mod spawn;
pub mod terminal;
pub mod tree;
pub mod work;
pub mod xattr;
