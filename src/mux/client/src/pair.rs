//! `cvm-mux pair`: asks the mux-server's operator interface for a pairing token, for `cvm pair`.

use crate::address::ServerAddress;
use crate::http_client::{HttpClient, Request, json};
use cvm_mux_contract::pairing::{PATH, Pair};
use cvm_protocol::mux::PairSpec;
use serde_json::Value;
use std::time::Duration;
use zeroize::Zeroizing;

const REQUEST_TIME: Duration = Duration::from_secs(20);

/// The server's answer, as it is; or what is wrong, with the remedy.
pub(crate) async fn pair(spec: PairSpec) -> Result<Value, String> {
    let token =
        spec.admin_token.unpack().and_then(|b| String::from_utf8(b.to_vec()).ok().map(Zeroizing::new));
    let token = token.ok_or("the admin token is not text")?;
    let body = json(&Pair {
        openclaw_id: spec.device_id.into(),
        channel: spec.channel.into(),
        inbound_url: spec.inbound_url.map(Into::into),
        session_key: spec.session_key.map(Into::into),
        ttl_sec: spec.ttl_s,
    });
    let server = ServerAddress::parse(&spec.base_url)?;
    let request = Request::post(server.at(PATH), body, REQUEST_TIME).bearer(&token);
    let http = HttpClient::new(server.is_https(), false)?;
    let answer = http.send(request).await.map_err(|why| format!("the mux-server does not answer: {why}"))?;
    let why = match answer.status {
        200..=299 => {
            let body = answer.json();
            if body.get("token").is_some_and(Value::is_string) {
                return Ok(body);
            }
            " without a token; is this its address?"
        }
        401 | 403 => ": MUX_ADMIN_TOKEN is not its admin token",
        404 => {
            ": it does not know this device or this address; the device registers when its mux client runs"
        }
        400 | 409 | 422 => ": it does not take this channel or session",
        _ => "; try again",
    };
    // Of what the server says only the error code is shown.
    Err(format!("the mux-server answers {}{why}", answer.summary()))
}
