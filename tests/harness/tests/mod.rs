//! What the tests stand on does what it says.

mod digest;
mod fixtures;
mod judges;
mod mux_server;
mod proxy;
mod store;
