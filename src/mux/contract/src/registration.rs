//! How an instance registers with the server, and gets its runtime token.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;
use zeroize::Zeroizing;

pub const PATH: &str = "/v1/instances/register";
/// The server gives a delivery up after this time.
pub const INBOUND_TIMEOUT_MS: u64 = 15_000;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Register<'a> {
    pub openclaw_id: Cow<'a, str>,
    pub inbound_url: Cow<'a, str>,
    pub inbound_timeout_ms: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Registered {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ok: Option<bool>,
    pub runtime_token: Zeroizing<String>,
    pub expires_at_ms: u64,
}
