//! The messages between the supervisor and the mux client.
//!
//! * PID 1 to `cvm-mux`: [`MuxSpec`], in a sealed memfd on standard input. It is the only message with the register key
//!   and the gateway's token.
//! * `cvm pair` to `cvm-mux pair`: [`PairSpec`] in the same way; the answer is JSON on standard output.
//!
//! Only a specification holds secrets, and they are wiped when it is dropped.

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

/// Everything that the mux client has to know.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MuxSpec {
    /// The URL of the mux-server, without a slash at its end.
    pub base_url: String,
    pub register_key: PackedBytes,
    pub inbound_url: String,
    /// The identity of this gateway, `openclawId` on the wire.
    pub device_id: String,
    /// The port on which the mux client listens, on all addresses.
    pub port: u16,
    pub gateway_port: u16,
    pub gateway_token: PackedBytes,
    /// The directory of the queue.
    pub directory: String,
    /// The socket on which the storage worker tells what is in the bucket; none in local mode.
    pub replication: Option<String>,
    /// The longest time that an acknowledgement waits for the bucket; with 0 it does not wait.
    pub ack_wait_s: u32,
    /// How long a stop may wait for answers that the gateway is about to give.
    pub drain_s: u32,
    /// The user that the mux client becomes, if it starts as root.
    pub uid: u32,
}

/// Everything that `cvm-mux pair` has to know.
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
