//! The mux client between a mux-server and the gateway.

mod admission;
mod attachments;
mod fixtures;
mod gateway;
mod messages;
mod outbound;
mod pairing;
mod queue;
mod real_gateway;
mod registration;
mod secrets;
mod taken;
