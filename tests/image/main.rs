//! The image as users have it: built from this commit, started by the compose file on a machine with a container
//! engine, looked at, broken, and started anew.
//!
//! The binaries in it are those beside the tests, so that they are compiled once; the stage that compiles them
//! otherwise is built with `CVM_SOAK`. Tests take turns: there is one engine.

mod contents;
mod fixtures;
mod lives;
mod reproducible;
mod rights;
mod warm;
