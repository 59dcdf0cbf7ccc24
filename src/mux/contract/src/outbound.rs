//! What a client sends to a chat: messages, and the sign that somebody is typing.
//!
//! The server compares the bodies that come under one idempotency key. So the fields stand in the order
//! in which every version of the client has written them, which is alphabetical.

use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::borrow::Cow;
use std::collections::BTreeMap;

pub const SEND_PATH: &str = "/v1/mux/outbound/send";
pub const TYPING_PATH: &str = "/v1/mux/outbound/typing";
/// Below it are the files that the server keeps for an instance.
pub const FILES_PATH: &str = "/v1/mux/files/";
/// Requests with the same key are one request: the server acts on the first.
pub const IDEMPOTENCY_HEADER: &str = "idempotency-key";

/// One message. The server finds the chat by instance, channel and session alone.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SendMessage<'a> {
    pub account_id: Cow<'a, str>,
    pub channel: Cow<'a, str>,
    pub op: Operation,
    pub openclaw_id: Cow<'a, str>,
    /// The same message as the channel's own API has it, under the channel's name.
    pub raw: BTreeMap<Cow<'a, str>, ChannelCall<'a>>,
    /// The idempotency key again.
    pub request_id: Cow<'a, str>,
    pub session_key: Cow<'a, str>,
    pub text: Cow<'a, str>,
    /// A number or a text, as it came with the event.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<Value>,
    pub to: Cow<'a, str>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Operation {
    Send,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum ChannelCall<'a> {
    /// A method of Telegram's Bot API.
    Telegram { body: TelegramMessage<'a>, method: Cow<'a, str> },
    /// Every other channel takes plain text.
    Plain { send: PlainText<'a> },
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct TelegramMessage<'a> {
    pub chat_id: Value,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message_thread_id: Option<Value>,
    pub text: Cow<'a, str>,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct PlainText<'a> {
    pub text: Cow<'a, str>,
}

impl<'a> ChannelCall<'a> {
    /// What sends `text` to a chat of `channel`. Telegram needs to know the chat, and the topic if there
    /// is one.
    pub fn message(channel: &str, text: &'a str, chat: Option<&Value>, topic: Option<&Value>) -> Self {
        if channel != "telegram" {
            return Self::Plain { send: PlainText { text: text.into() } };
        }
        let body = TelegramMessage {
            chat_id: chat.map(telegram_number).unwrap_or_default(),
            message_thread_id: topic.map(telegram_number).filter(Value::is_number),
            text: text.into(),
        };
        Self::Telegram { body, method: "sendMessage".into() }
    }
}

/// Some servers write Telegram's numbers as text.
fn telegram_number(value: &Value) -> Value {
    match value.as_str().map(str::parse::<i64>) {
        Some(Ok(number)) => number.into(),
        _ => value.clone(),
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ShowTyping<'a> {
    pub channel: Cow<'a, str>,
    pub openclaw_id: Cow<'a, str>,
    pub session_key: Cow<'a, str>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_channel_gets_its_own_envelope() {
        let envelope = |channel: &str| {
            let call = ChannelCall::message(channel, "hi", Some(&json!("42")), Some(&json!(7)));
            serde_json::to_value(call).unwrap()
        };
        let wanted = json!({"chat_id": 42, "text": "hi", "message_thread_id": 7});
        assert_eq!(envelope("telegram"), json!({"method": "sendMessage", "body": wanted}));
        assert_eq!(envelope("discord"), json!({"send": {"text": "hi"}}));
        assert_eq!(envelope("whatsapp"), json!({"send": {"text": "hi"}}));
    }

    #[test]
    fn a_message_is_written_in_the_same_bytes_for_ever_and_read_again() {
        let call = ChannelCall::message("telegram", "hi", Some(&json!("-5")), Some(&json!("topic")));
        let send = SendMessage {
            account_id: "default".into(),
            channel: "telegram".into(),
            op: Operation::Send,
            openclaw_id: "me".into(),
            raw: BTreeMap::from([("telegram".into(), call)]),
            request_id: "oc-1-0".into(),
            session_key: "s".into(),
            text: "hi".into(),
            thread_id: Some(json!("topic")),
            to: "telegram:-5".into(),
        };
        let written = serde_json::to_string(&send).unwrap();
        let wanted = concat!(
            r#"{"accountId":"default","channel":"telegram","op":"send","openclawId":"me","#,
            r#""raw":{"telegram":{"body":{"chat_id":-5,"text":"hi"},"method":"sendMessage"}},"#,
            r#""requestId":"oc-1-0","sessionKey":"s","text":"hi","threadId":"topic","to":"telegram:-5"}"#,
        );
        assert_eq!(written, wanted);
        let read: SendMessage<'_> = serde_json::from_str(&written).unwrap();
        assert_eq!(read.raw, send.raw);
    }
}
