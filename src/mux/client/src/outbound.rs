//! Messages to the mux-server's chats, and the sign that somebody is typing.
//!
//! Each part of an answer has one idempotency key for ever, made of the event's id and the part's
//! number, so that a part which is sent twice arrives once. Only the server says whether it has arrived.

use crate::http_client::{HttpClient, Request, RequestError, Response, json};
use crate::message::Message;
use crate::registration::{Registration, RuntimeToken};
use cvm_mux_contract::INSTANCE_HEADER;
use cvm_mux_contract::outbound::{
    ChannelCall, IDEMPOTENCY_HEADER, Operation, SEND_PATH, SendMessage, ShowTyping, TYPING_PATH,
};
use sha2::{Digest as _, Sha256};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

const SEND_TIME: Duration = Duration::from_secs(30);
const TYPING_TIME: Duration = Duration::from_secs(5);
/// Telegram shows it for 5 s.
const TYPING_EVERY: Duration = Duration::from_secs(4);
/// An agent that answers at once does not type, nor does a gateway that is away.
const TYPING_AFTER: Duration = Duration::from_millis(250);

pub(crate) struct Outbound {
    pub(crate) http: Arc<HttpClient>,
    pub(crate) registration: Arc<Registration>,
}

/// One part of an answer.
pub(crate) struct Part<'a> {
    pub(crate) event: &'a str,
    pub(crate) number: i64,
    pub(crate) channel: &'a str,
    pub(crate) session: &'a str,
    pub(crate) text: &'a str,
    pub(crate) message: &'a Message<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SendOutcome {
    Sent,
    /// Another answer to the same event has arrived before.
    AnsweredBefore,
    /// The server will never take it.
    Refused(String),
    /// The part may have arrived. It is sent again, after this time at least.
    Unknown(String, Option<Duration>),
    /// The server fails at it, and perhaps always will. It is sent again, but not for ever.
    Failed(String, Option<Duration>),
}

/// Never changed: a part with another key arrives twice.
fn idempotency_key(event: &str, part: i64) -> String {
    let digest = Sha256::new().chain_update(b"openclaw-mux-part-v1\0").chain_update(event).finalize();
    let first = digest.first_chunk().copied().unwrap_or_default();
    format!("oc-{:032x}-{part}", u128::from_be_bytes(first))
}

impl Part<'_> {
    fn request<'a>(&'a self, key: &'a str, device_id: &'a str) -> SendMessage<'a> {
        let (message, channel) = (self.message, self.channel);
        let call = ChannelCall::message(channel, self.text, message.chat.as_ref(), message.thread.as_ref());
        SendMessage {
            account_id: message.account.as_deref().unwrap_or("default").into(),
            channel: channel.into(),
            op: Operation::Send,
            openclaw_id: device_id.into(),
            raw: [(channel.into(), call)].into(),
            request_id: key.into(),
            session_key: self.session.into(),
            text: self.text.into(),
            thread_id: message.thread.clone(),
            to: message.to.as_deref().unwrap_or_default().into(),
        }
    }
}

impl Outbound {
    pub(crate) async fn send(&self, part: &Part<'_>, mut token: Arc<RuntimeToken>) -> SendOutcome {
        let identity = self.registration.identity();
        let key = idempotency_key(part.event, part.number);
        let body = json(&part.request(&key, &identity.device_id));
        let mut is_renewed = false;
        loop {
            let request = Request::post(identity.server.at(SEND_PATH), body.clone(), SEND_TIME)
                .bearer(token.expose())
                .header(INSTANCE_HEADER, &identity.device_id)
                .header(IDEMPOTENCY_HEADER, &key);
            let answer = self.http.send(request).await;
            if !is_renewed
                && answer.as_ref().is_ok_and(|answer| answer.status == 401)
                && let Some(new) = self.registration.renew(&token).await
            {
                (token, is_renewed) = (new, true);
                continue;
            }
            return judge(answer);
        }
    }

    /// Shows "typing" until it is dropped. One that fails is not missed.
    pub(crate) async fn show_typing(&self, channel: &str, session: &str) -> Infallible {
        let identity = self.registration.identity();
        let body = json(&ShowTyping {
            channel: channel.into(),
            openclaw_id: (&identity.device_id).into(),
            session_key: session.into(),
        });
        tokio::time::sleep(TYPING_AFTER).await;
        loop {
            if let Some(token) = self.registration.last_token() {
                let request = Request::post(identity.server.at(TYPING_PATH), body.clone(), TYPING_TIME)
                    .bearer(token.expose())
                    .header(INSTANCE_HEADER, &identity.device_id);
                let _ = self.http.send(request).await;
            }
            tokio::time::sleep(TYPING_EVERY).await;
        }
    }
}

fn judge(answer: Result<Response, RequestError>) -> SendOutcome {
    let answer = match answer {
        Ok(answer) => answer,
        Err(why) => return SendOutcome::Unknown(format!("the mux-server does not answer: {why}"), None),
    };
    let why = format!("the mux-server answers {}", answer.summary());
    match answer.status {
        200..=299 => SendOutcome::Sent,
        409 => SendOutcome::AnsweredBefore,
        // A server that is being replaced knows no path, nor does a proxy whose server is away.
        404 if answer.error_code().is_none() => SendOutcome::Unknown(why, None),
        401 | 408 | 425 | 429 => SendOutcome::Unknown(why, answer.retry_after()),
        400..=499 => SendOutcome::Refused(answer.summary()),
        500 | 501 | 505..=599 => SendOutcome::Failed(why, answer.retry_after()),
        _ => SendOutcome::Unknown(why, answer.retry_after()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    #[test]
    fn a_part_has_the_same_key_for_ever() {
        assert_eq!(idempotency_key("event-1", 0), "oc-786981315d6c0b80f10a34b0b307f51a-0");
        assert_ne!(idempotency_key("event-1", 0), idempotency_key("event-1", 1));
        assert_ne!(idempotency_key("event-1", 0), idempotency_key("event-2", 0));
    }

    #[test]
    fn what_is_final_is_told_apart_from_what_is_unknown() {
        let answer = |status, body: &'static str| {
            let body = Bytes::from_static(body.as_bytes());
            judge(Ok(Response { status, headers: hyper::HeaderMap::new(), body }))
        };
        assert_eq!(answer(200, "{}"), SendOutcome::Sent);
        assert_eq!(answer(409, "{}"), SendOutcome::AnsweredBefore);
        let refused = answer(403, r#"{"ok":false,"code":"ROUTE_NOT_BOUND"}"#);
        assert_eq!(refused, SendOutcome::Refused("403 ROUTE_NOT_BOUND".into()));
        for status in [401, 404, 408, 429, 502, 503, 504] {
            assert!(matches!(answer(status, ""), SendOutcome::Unknown(..)), "{status}");
        }
        assert!(matches!(answer(500, ""), SendOutcome::Failed(..)));
    }
}
