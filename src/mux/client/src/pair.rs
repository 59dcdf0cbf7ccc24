//! `cvm-mux pair`: asks the mux-server's operator interface for a pairing token, for `cvm pair`.
//!
//! Refuses to print the server's words when they are no answer. May import: `http`.

use crate::http::{Ask, Http};
use cvm_protocol::mux::PairSpec;
use hyper::Method;
use serde_json::{Value, json};
use std::time::Duration;
use zeroize::Zeroizing;

const TIME: Duration = Duration::from_secs(20);
const ANSWER_MAX: usize = 64 * 1024;

/// The server's answer, as it is; or what is wrong, with the remedy.
pub(crate) async fn pair(spec: PairSpec) -> Result<Value, String> {
    let token =
        spec.admin_token.unpack().and_then(|b| String::from_utf8(b.to_vec()).ok().map(Zeroizing::new));
    let token = token.ok_or("the admin token is not text")?;
    let mut body = json!({"openclawId": spec.device_id, "channel": spec.channel});
    let optional = [
        ("inboundUrl", spec.inbound_url.map(Value::from)),
        ("sessionKey", spec.session_key.map(Value::from)),
        ("ttlSec", spec.ttl_s.map(Value::from)),
    ];
    for (name, value) in optional {
        if let (Some(value), Some(body)) = (value, body.as_object_mut()) {
            body.insert(name.to_owned(), value);
        }
    }
    let http = Http::new(spec.base_url.starts_with("https:"), false)?;
    let uri = format!("{}/v1/admin/pairings/token", spec.base_url);
    let uri = uri.parse().map_err(|_| "the address of the mux-server is none that can be asked")?;
    let ask = Ask {
        method: Method::POST,
        uri,
        bearer: Some(&token),
        headers: &[],
        body: Some(body.to_string().into()),
        room: None,
        answer_max: ANSWER_MAX,
        time: TIME,
    };
    let answer = http.ask(ask).await.map_err(|why| format!("the mux-server does not answer: {why}"))?;
    let words = answer.words();
    match answer.status {
        200..=299 => {
            let body = answer.json();
            if body.get("token").is_some_and(Value::is_string) {
                Ok(body)
            } else {
                Err(format!("the mux-server answers {words} without a token; is this its address?"))
            }
        }
        401 | 403 => Err(format!("the mux-server answers {words}: MUX_ADMIN_TOKEN is not its admin token")),
        404 => Err(format!(
            "the mux-server answers {words}: it does not know this device or this address; the device registers when its mux client runs"
        )),
        400 | 409 | 422 => {
            Err(format!("the mux-server answers {words}: it does not take this channel or session"))
        }
        _ => Err(format!("the mux-server answers {words}; try again")),
    }
}
