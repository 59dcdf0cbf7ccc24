//! S3 mode with the real worker, a real S3 server, and a network between them that fails on demand.

// A disk that fails under a test fails the test, and the system says why.
#![allow(clippy::unwrap_used)]

mod accepting;
mod adoption;
mod astray;
mod busy;
mod closed;
mod commands;
mod conversation;
mod databases;
mod equal;
mod fetching;
mod first_boots;
mod fixtures;
mod killed_workers;
mod loss;
mod lost_machines;
mod manifest;
mod moving;
mod objects;
mod outages;
mod owners;
mod posix;
mod power;
mod replacing;
mod same_volume;
mod secrets;
mod stock_rclone;
mod stopping;
