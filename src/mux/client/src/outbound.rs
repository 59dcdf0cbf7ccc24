//! What goes back to the mux-server: answers, and that somebody is typing.
//!
//! Every part of an answer has one key for ever, made of the event's id and the part's number, so that
//! a part which was sent twice arrives once.
//!
//! Refuses to decide by itself that something has arrived. May import: `event`, `http`, `register`.

use crate::event::Message;
use crate::http::{Answer, Ask, Http, Unanswered};
use crate::register::{Pass, Registration};
use hyper::Method;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use std::time::Duration;

const TIME: Duration = Duration::from_secs(30);
const TYPING_TIME: Duration = Duration::from_secs(5);
/// Telegram shows it for 5 s.
const TYPING_EVERY: Duration = Duration::from_secs(4);
/// Who answers at once was not typing, and one that is away does not.
const TYPING_FIRST: Duration = Duration::from_millis(250);
const ANSWER_MAX: usize = 64 * 1024;

pub(crate) struct Outbound {
    pub(crate) http: Arc<Http>,
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
pub(crate) enum Outcome {
    Sent,
    /// Another answer to the same event has arrived before.
    AnsweredBefore,
    /// It never will be.
    Refused(String),
    /// Nobody knows; the same again, after this time at least.
    Unknown(String, Option<Duration>),
    /// The server itself fails at it, and perhaps always will; the same again, but not for ever.
    Failed(String, Option<Duration>),
}

/// Stable for ever: a changed key is an answer that arrives twice.
fn key(event: &str, part: i64) -> String {
    let digest = Sha256::new().chain_update(b"openclaw-mux-part-v1\0").chain_update(event).finalize();
    format!("oc-{}-{part}", crate::hex(digest.iter().take(16)))
}

fn body(part: &Part<'_>, key: &str, device: &str) -> Value {
    let message = part.message;
    let mut body = json!({
        "requestId": key,
        "op": "send",
        "channel": part.channel,
        "sessionKey": part.session,
        "accountId": message.account.as_deref().unwrap_or("default"),
        "to": message.to.as_deref().unwrap_or_default(),
        "text": part.text,
        "raw": raw(part),
        "openclawId": device,
    });
    if let (Some(thread), Some(body)) = (&message.thread, body.as_object_mut()) {
        body.insert("threadId".to_owned(), thread.clone());
    }
    body
}

/// As the channel's own API has it.
fn raw(part: &Part<'_>) -> Value {
    if part.channel != "telegram" {
        return json!({ part.channel: { "send": { "text": part.text } } });
    }
    let chat = part.message.chat.clone().unwrap_or_default();
    // Telegram's numbers, which some write as text.
    let number = |value: Value| match value.as_str().map(str::parse::<i64>) {
        Some(Ok(number)) => json!(number),
        _ => value,
    };
    let mut body = serde_json::Map::new();
    body.insert("chat_id".to_owned(), number(chat));
    body.insert("text".to_owned(), part.text.into());
    if let Some(thread) = part.message.thread.clone().map(number).filter(Value::is_number) {
        body.insert("message_thread_id".to_owned(), thread);
    }
    json!({ "telegram": { "method": "sendMessage", "body": body } })
}

impl Outbound {
    pub(crate) async fn send(&self, part: &Part<'_>, mut pass: Pass) -> Outcome {
        let key = key(part.event, part.number);
        let body = body(part, &key, self.registration.device_id()).to_string();
        let mut renewed = false;
        loop {
            let asked = self.post(&pass, "/v1/mux/outbound/send", Some(&key), &body, TIME).await;
            let answer = match asked {
                Ok(answer) => answer,
                Err(why) => return Outcome::Unknown(format!("the mux-server does not answer: {why}"), None),
            };
            if answer.status == 401 && !renewed {
                renewed = true;
                if let Some(new) = self.registration.renew(&pass).await {
                    pass = new;
                    continue;
                }
            }
            return judge(&answer);
        }
    }

    async fn post(
        &self,
        pass: &Pass,
        path: &str,
        key: Option<&str>,
        body: &str,
        time: Duration,
    ) -> Result<Answer, Unanswered> {
        let id = ("x-openclaw-id", self.registration.device_id());
        let with_key = key.map(|key| [id, ("idempotency-key", key)]);
        let headers = with_key.as_ref().map_or(std::slice::from_ref(&id), |two| &two[..]);
        let ask = Ask {
            method: Method::POST,
            uri: self.registration.url(path),
            bearer: Some(pass.expose()),
            headers,
            body: Some(body.to_owned().into()),
            room: None,
            answer_max: ANSWER_MAX,
            time,
        };
        self.http.ask(ask).await
    }

    /// Shows "typing" until it is dropped. Nobody misses one that fails.
    pub(crate) async fn type_on(&self, channel: &str, session: &str) {
        let body = json!({
            "channel": channel, "sessionKey": session, "openclawId": self.registration.device_id(),
        })
        .to_string();
        tokio::time::sleep(TYPING_FIRST).await;
        loop {
            if let Some(pass) = self.registration.pass_at_hand() {
                let _ = self.post(&pass, "/v1/mux/outbound/typing", None, &body, TYPING_TIME).await;
            }
            tokio::time::sleep(TYPING_EVERY).await;
        }
    }
}

fn judge(answer: &Answer) -> Outcome {
    let words = answer.words();
    match answer.status {
        200..=299 => Outcome::Sent,
        409 => Outcome::AnsweredBefore,
        // A server that is being replaced, or a proxy before one that is away, has nothing there.
        404 if answer.code().is_none() => Outcome::Unknown(format!("the mux-server answers {words}"), None),
        401 | 408 | 425 | 429 => {
            Outcome::Unknown(format!("the mux-server answers {words}"), answer.retry_after())
        }
        400..=499 => Outcome::Refused(words),
        500 | 501 | 505..=599 => {
            Outcome::Failed(format!("the mux-server answers {words}"), answer.retry_after())
        }
        _ => Outcome::Unknown(format!("the mux-server answers {words}"), answer.retry_after()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn part<'a>(channel: &'a str, message: &'a Message<'a>) -> Part<'a> {
        Part { event: "e", number: 0, channel, session: "s", text: "hi", message }
    }

    #[test]
    fn a_part_has_the_same_key_for_ever() {
        assert_eq!(key("event-1", 0), "oc-786981315d6c0b80f10a34b0b307f51a-0");
        assert_ne!(key("event-1", 0), key("event-1", 1));
        assert_ne!(key("event-1", 0), key("event-2", 0));
    }

    #[test]
    fn each_channel_gets_its_own_envelope() {
        let message = Message { chat: Some(json!("42")), thread: Some(json!(7)), ..Message::default() };
        let telegram = raw(&part("telegram", &message));
        let wanted = json!({"chat_id": 42, "text": "hi", "message_thread_id": 7});
        assert_eq!(telegram, json!({"telegram": {"method": "sendMessage", "body": wanted}}));
        assert_eq!(raw(&part("discord", &message)), json!({"discord": {"send": {"text": "hi"}}}));
        assert_eq!(raw(&part("whatsapp", &message)), json!({"whatsapp": {"send": {"text": "hi"}}}));
    }

    #[test]
    fn what_is_final_is_told_apart_from_what_is_unknown() {
        let answer = |status, body: &'static str| Answer {
            status,
            headers: hyper::HeaderMap::new(),
            body: Bytes::from_static(body.as_bytes()),
        };
        assert_eq!(judge(&answer(200, "{}")), Outcome::Sent);
        assert_eq!(judge(&answer(409, "{}")), Outcome::AnsweredBefore);
        let refused = judge(&answer(403, r#"{"ok":false,"code":"ROUTE_NOT_BOUND"}"#));
        assert_eq!(refused, Outcome::Refused("403 ROUTE_NOT_BOUND".into()));
        for status in [401, 404, 408, 429, 502, 503, 504] {
            assert!(matches!(judge(&answer(status, "")), Outcome::Unknown(..)), "{status}");
        }
        assert!(matches!(judge(&answer(500, "")), Outcome::Failed(..)));
    }
}
