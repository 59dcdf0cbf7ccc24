//! S3 mode with the real worker, a real S3 server, and a network between them that fails on demand.

mod crash;
mod loss;
mod posix;
mod power;
mod tree;
mod trust;
