//! The messages between the supervisor and the mux client.
//!
//! * PID 1 to `cvm-mux`: [`MuxSpec`], in a sealed memfd on standard input. The only place where the
//!   register key and the gateway's token travel.
//! * operator to `cvm-mux pair`: [`PairSpec`] the same way; the answer is JSON on standard output.
//!
//! A secret is wiped when it is dropped, and stands in nothing but a specification.

use cvm_secrets::base64_bytes::PackedBytes;
use serde::{Deserialize, Serialize};

/// The name of the service.
pub const MUX_CLIENT: &str = "mux";

/// Where the mux client listens for the mux-server.
pub const MUX_INBOUND_PORT: u16 = 18790;

/// Labels of facts that `cvm pair` reads.
pub const SERVER: &str = "mux-server";
pub const INBOUND: &str = "is reached at";
pub const DEVICE: &str = "device";

/// All that the mux client needs to know.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MuxSpec {
    /// Without a slash at its end.
    pub base_url: String,
    pub register_key: PackedBytes,
    pub inbound_url: String,
    /// `openclawId` on the wire.
    pub device_id: String,
    /// Where it listens, on all addresses.
    pub port: u16,
    pub gateway_port: u16,
    pub gateway_token: PackedBytes,
    /// The directory of the queue.
    pub directory: String,
    /// The socket that says what is in the bucket; none in local mode.
    pub replication: Option<String>,
    /// How long an acknowledgement waits for the bucket at most; 0 is not at all.
    pub ack_wait_s: u32,
    /// How long a stop may wait for answers that the gateway is about to give.
    pub drain_s: u32,
    /// Who it becomes, if it is root.
    pub uid: u32,
}

/// What `cvm-mux pair` needs to know.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PairSpec {
    pub base_url: String,
    pub admin_token: PackedBytes,
    pub device_id: String,
    pub inbound_url: Option<String>,
    pub channel: String,
    pub session_key: Option<String>,
    pub ttl_s: Option<u32>,
}
