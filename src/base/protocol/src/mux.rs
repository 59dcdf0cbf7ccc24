//! The messages between the supervisor and the mux client.
//!
//! * PID 1 to `cvm-mux`: [`MuxSpec`], in a sealed memfd on standard input. The only place where the
//!   register key and the gateway's token travel.
//! * `cvm-mux` to PID 1: [`MuxReport`] lines on descriptor 3.
//! * operator to `cvm-mux pair`: [`PairSpec`] the same way; the answer is JSON on standard output.
//!
//! Times are milliseconds since 1970 on the machine's clock, so that a state which does not change
//! needs no second report; whoever shows them makes ages of them.
//!
//! A secret is wiped when it is dropped, and stands in nothing but a specification.

use crate::report::Level;
use cvm_secrets::base64_bytes::PackedBytes;
use serde::{Deserialize, Serialize};

/// The name of the service.
pub const MUX_CLIENT: &str = "mux";

/// Where the mux client listens for the mux-server.
pub const MUX_INBOUND_PORT: u16 = 18790;

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

/// What the client tells PID 1. Public: nothing of a message is in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "mux", rename_all = "kebab-case")]
pub enum MuxReport {
    /// A line for the boot log.
    Note { level: Level, text: String },
    /// How it stands, whenever that has changed.
    State(Box<MuxStatus>),
}

/// How the mux client stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MuxStatus {
    pub base_url: String,
    pub inbound_url: String,
    pub device_id: String,
    /// Until when the mux-server's token lives; none when there is no good one.
    pub registered_until_ms: Option<u64>,
    /// Why it is not registered, with the remedy.
    pub register_error: Option<String>,
    /// Whether the gateway answered the last question.
    pub gateway_error: Option<String>,
    pub last_error: Option<String>,
    pub last_error_at_ms: Option<u64>,
    /// Events that the agent has not answered yet.
    pub waiting: u64,
    /// Answers that the mux-server has not taken yet.
    pub to_send: u64,
    /// When the oldest of both was accepted.
    pub oldest_at_ms: Option<u64>,
    /// Since the start of this process.
    pub accepted: u64,
    pub duplicates: u64,
    pub answered: u64,
    /// Ended without an answer, as they should.
    pub ignored: u64,
    /// Ended without an answer that somebody expected: see the log.
    pub refused: u64,
    /// Deliveries answered 503 because the bucket did not have them in time: the server asks again.
    pub unreplicated_acks: u64,
    pub last_unreplicated_ack_at_ms: Option<u64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_one_line_that_says_what_it_is() {
        let text = r#"{"mux":"note","level":"info","text":"registered"}"#;
        let note = MuxReport::Note { level: Level::Info, text: "registered".into() };
        assert_eq!(serde_json::from_str::<MuxReport>(text).unwrap(), note);
        assert_eq!(serde_json::to_string(&note).unwrap(), text);
    }
}
