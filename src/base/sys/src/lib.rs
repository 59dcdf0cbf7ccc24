//! The system calls of all our programs: forking and reaping, signals, descriptors, the process table, namespaces,
//! and using files as another user. Each file has one subject.
//!
//! Nearly all `unsafe` code is here, and each use says why it is sound.
//! std's `Command` is not used: its `spawn` waits until the child has exec'd, which on a dead mount never happens,
//! and its `Child` needs an exit status that a wait for any child has taken already.
//!
//! The crate decides nothing, starts no threads and reads no configuration.

pub mod as_user;
pub mod clock;
pub mod descriptor;
#[cfg(feature = "fake")]
pub mod fake;
pub mod file_handle;
pub mod fuse_dcache;
pub mod kernel;
pub mod memfd;
pub mod namespace;
pub mod port;
pub mod private;
pub mod process_stat;
pub mod process_tree;
pub mod process_work;
pub mod reap;
pub mod scm_rights;
pub mod signals;
pub mod spawn;
pub mod terminal;
pub mod xattr;
