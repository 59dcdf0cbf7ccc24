//! The HTTP contract between a mux client and a mux-server, for both sides.
//!
//! ```text
//! client ──> server   registration   POST /v1/instances/register       register key
//!                     outbound       POST /v1/mux/outbound/send        runtime token
//!                                    POST /v1/mux/outbound/typing      runtime token
//!                                    GET  /v1/mux/files/..             runtime token
//!                     pairing        POST /v1/admin/pairings/token     admin token
//! server ──> client   event          POST {inboundUrl}                 delivery token
//!                     token          GET  /.well-known/jwks.json       (asked by the client)
//! ```
//!
//! The crate does no I/O, reads no clock and starts no thread.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![deny(clippy::unreachable, clippy::todo, clippy::unimplemented)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing))]

pub mod event;
pub mod outbound;
pub mod pairing;
pub mod registration;
pub mod token;

/// Names the instance in requests of both directions.
pub const INSTANCE_HEADER: &str = "x-openclaw-id";
