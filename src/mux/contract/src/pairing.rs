//! How an operator gets a pairing token, with which a chat becomes a session of an instance.

use serde::{Deserialize, Serialize};
use std::borrow::Cow;

pub const PATH: &str = "/v1/admin/pairings/token";

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pair<'a> {
    pub openclaw_id: Cow<'a, str>,
    pub channel: Cow<'a, str>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inbound_url: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_key: Option<Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_sec: Option<u32>,
}
