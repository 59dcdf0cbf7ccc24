//! The mux client, between a mux-server and the gateway.

mod client;
mod queue;
