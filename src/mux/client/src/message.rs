//! The message of an event, as the agent is to get it, and the chat that its answer goes to.

use crate::mention;
use cvm_mux_contract::event::{Event, EventAttachment, PlatformEvent, text_of};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Larger values of a platform are not searched: what is looked for is in small ones.
const SEARCHED_BYTES_MAX: usize = 256 * 1024;

#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub(crate) text: String,
    /// Whether the agent is spoken to: in a group most messages are for others.
    pub(crate) for_us: bool,
    pub(crate) account: Option<String>,
    /// The chat that the answer goes to, as the server names it.
    pub(crate) to: Option<String>,
    /// The same chat, as the platform numbers it.
    pub(crate) chat: Option<Value>,
    pub(crate) thread: Option<Value>,
    pub(crate) attachments: Vec<Attachment<'a>>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Attachment<'a> {
    /// Lower case, without parameters.
    pub(crate) mime: String,
    pub(crate) name: Option<String>,
    pub(crate) source: Source<'a>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Source<'a> {
    Url(String),
    /// Base64.
    Content(Cow<'a, str>),
    Nothing,
}

impl<'a> Message<'a> {
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, String> {
        // The text of the error says where, and quotes nothing.
        let event: Event<'a> =
            serde_json::from_slice(bytes).map_err(|e| format!("line {} column {}", e.line(), e.column()))?;
        let PlatformEvent { kind, raw } = event.event.and_then(typed).unwrap_or_default();
        let kind = kind.unwrap_or_else(|| "message".to_owned());
        let (raw, data) = (searchable(raw.or(event.raw)), searchable(event.channel_data));
        let mut text = event.body.unwrap_or_default().trim().to_owned();
        if text.is_empty() && matches!(kind.as_str(), "callback" | "action") {
            text = pressed_button(&raw, &data).map(|id| format!("callback_data: {id}")).unwrap_or_default();
        }
        let is_direct = event.chat_type.as_deref() != Some("group");
        // A command and a button are for the bot by their nature. Where the server says whether the bot
        // was mentioned, that counts.
        let is_mentioned = || match event.was_mentioned.as_deref() {
            Some(said) => is_yes(said),
            None => mention::speaks_to_us(event.channel.as_deref().unwrap_or_default(), &text, &raw),
        };
        let for_us = is_direct || kind != "message" || is_mentioned();
        let chat = chat_id(&raw, &data)
            .or_else(|| event.from.as_deref().filter(|_| is_direct).map(last_part))
            .or_else(|| event.to.as_deref().map(last_part));
        let given: Vec<&RawValue> = event.attachments.and_then(typed).unwrap_or_default();
        Ok(Self {
            text,
            for_us,
            account: event.account_id,
            to: if is_direct { event.from.or(event.to) } else { event.to.or(event.from) },
            chat,
            thread: event.thread_id.filter(|t| text_of(t).is_some_and(|text| !text.is_empty())),
            attachments: given.into_iter().filter_map(typed).map(attachment).collect(),
        })
    }

    /// The chat that an answer goes to, without what was said.
    pub(crate) fn address(self) -> Message<'static> {
        Message { text: String::new(), attachments: Vec::new(), ..self }
    }
}

/// None when the JSON is of another type.
fn typed<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Option<T> {
    serde_json::from_str(raw.get()).ok()
}

fn searchable(raw: Option<&RawValue>) -> Value {
    let text = raw.map(RawValue::get).filter(|text| text.len() <= SEARCHED_BYTES_MAX);
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

/// The first of these places that holds a text or a number.
fn first<'a>(value: &'a Value, places: &[&str]) -> Option<&'a Value> {
    places.iter().filter_map(|place| value.pointer(place)).find(|found| text_of(found).is_some())
}

/// A button has no text of its own; what it stands for is what was meant.
fn pressed_button(raw: &Value, data: &Value) -> Option<String> {
    let in_raw = [
        "/data",
        "/callback_query/data",
        "/callbackQuery/data",
        "/custom_id",
        "/data/custom_id",
        "/value",
        "/id",
    ];
    let in_data = ["/callbackData", "/data", "/value"];
    first(raw, &in_raw).or_else(|| first(data, &in_data)).and_then(text_of)
}

fn chat_id(raw: &Value, data: &Value) -> Option<Value> {
    let in_data = ["/chatId", "/chat_id", "/chat/id"];
    let in_raw =
        ["/message/chat/id", "/chat/id", "/callback_query/message/chat/id", "/edited_message/chat/id"];
    first(data, &in_data).or_else(|| first(raw, &in_raw)).cloned()
}

/// `42` of `telegram:42`.
fn last_part(name: &str) -> Value {
    name.rsplit(':').next().unwrap_or(name).into()
}

fn is_yes(text: &str) -> bool {
    ["true", "yes", "1"].iter().any(|yes| text.trim().eq_ignore_ascii_case(yes))
}

fn attachment(given: EventAttachment<'_>) -> Attachment<'_> {
    let kind = given.kind.unwrap_or_default();
    let mime = given.mime_type.unwrap_or_else(|| match kind.as_str() {
        "image" | "photo" => "image/jpeg".to_owned(),
        other if other.contains('/') => other.to_owned(),
        _ => String::new(),
    });
    let mime = mime.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let content = given.content.and_then(string).filter(|content| !content.is_empty());
    let source = match (content, given.url.filter(|url| !url.is_empty())) {
        (Some(content), _) => Source::Content(content),
        (None, Some(url)) => Source::Url(url),
        (None, None) => Source::Nothing,
    };
    Attachment { mime, name: given.file_name.filter(|name| !name.is_empty()), source }
}

/// A JSON string, without a copy unless it has escapes.
fn string(raw: &RawValue) -> Option<Cow<'_, str>> {
    let text = raw.get();
    if text.contains('\\') {
        return serde_json::from_str(text).ok().map(Cow::Owned);
    }
    text.strip_prefix('"')?.strip_suffix('"').map(Cow::Borrowed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn event(change: &Value) -> Vec<u8> {
        let mut event = json!({
            "eventId": "e1", "channel": "telegram", "sessionKey": "s", "body": " hello ", "from": "telegram:42",
            "to": "telegram:7", "accountId": "default", "chatType": "direct", "messageId": 5, "timestampMs": 1,
            "event": {"kind": "message", "raw": {"message": {"chat": {"id": 42}}}}, "raw": {}, "channelData": {},
            "openclawId": "me"
        });
        for (name, value) in change.as_object().unwrap() {
            event[name] = value.clone();
        }
        event.to_string().into_bytes()
    }

    fn for_us(change: &Value) -> bool {
        Message::read(&event(change)).unwrap().for_us
    }

    #[test]
    fn a_message_is_read_with_the_chat_it_came_from() {
        let bytes = event(&json!({}));
        let message = Message::read(&bytes).unwrap();
        assert_eq!((message.text.as_str(), message.chat), ("hello", Some(json!(42))));
        assert_eq!(
            (message.to.as_deref(), message.account.as_deref()),
            (Some("telegram:42"), Some("default"))
        );
    }

    #[test]
    fn a_group_is_answered_when_it_speaks_to_us() {
        assert!(for_us(&json!({})));
        assert!(!for_us(&json!({"chatType": "group"})));
        assert!(!for_us(&json!({"chatType": "group", "wasMentioned": false})));
        assert!(for_us(&json!({"chatType": "group", "wasMentioned": true})));
        assert!(for_us(&json!({"chatType": "group", "event": {"kind": "command"}})));
        assert!(for_us(&json!({"chatType": "group", "event": {"kind": "callback"}})));
    }

    #[test]
    fn where_the_server_does_not_say_it_the_platforms_own_words_count() {
        let raw = json!({"message": {"text": "@a_bot hi", "entities": [{"type": "mention", "offset": 0, "length": 6}]}});
        let with = |more: Value| {
            let mut event =
                json!({"chatType": "group", "event": {"kind": "message", "raw": raw}, "body": "@a_bot hi"});
            for (name, value) in more.as_object().unwrap() {
                event[name] = value.clone();
            }
            for_us(&event)
        };
        assert!(with(json!({})) && with(json!({"wasMentioned": null})));
        assert!(with(json!({"event": {"kind": "message"}, "raw": raw})));
        assert!(!with(json!({"wasMentioned": false})));
        assert!(!with(json!({"event": {"kind": "message"}, "raw": {}})));
    }

    #[test]
    fn a_button_says_what_it_stands_for() {
        let raw = json!({"kind": "callback", "raw": {"callback_query": {"data": "yes"}}});
        let bytes = event(&json!({"event": raw, "body": ""}));
        assert_eq!(Message::read(&bytes).unwrap().text, "callback_data: yes");
        let bytes = event(&json!({"event": {"kind": "callback"}, "body": null}));
        assert_eq!(Message::read(&bytes).unwrap().text, "");
    }

    #[test]
    fn attachments_are_by_content_or_by_address() {
        let given = json!([{"type": "image", "mimeType": "image/PNG; x", "content": "AAAA"},
            {"type": "photo", "url": "/v1/mux/files/telegram?id=1"}, {"type": "audio"}]);
        let bytes = event(&json!({"attachments": given}));
        let all = Message::read(&bytes).unwrap().attachments;
        assert_eq!((all[0].mime.as_str(), &all[0].source), ("image/png", &Source::Content("AAAA".into())));
        assert_eq!(all[1].mime, "image/jpeg");
        assert_eq!((all[2].mime.as_str(), &all[2].source), ("", &Source::Nothing));
    }

    #[test]
    fn a_field_of_another_type_does_not_cost_the_message() {
        assert!(for_us(&json!({"chatType": "group", "wasMentioned": "yes"})));
        assert!(for_us(&json!({"chatType": "group", "wasMentioned": 1})));
        assert!(!for_us(&json!({"chatType": "group", "wasMentioned": "no"})));
        assert!(!for_us(&json!({"chatType": "group", "wasMentioned": [true]})));
        assert!(!for_us(&json!({"chatType": "group", "channel": 5, "raw": "x", "event": null})));
        for change in [
            json!({"event": "message"}),
            json!({"attachments": "none"}),
            json!({"attachments": ["a", 5, null]}),
            json!({"channelData": 7, "threadId": {"a": 1}, "accountId": []}),
        ] {
            let bytes = event(&change);
            assert_eq!(Message::read(&bytes).unwrap().text, "hello", "{change}");
        }
        let given = json!([5, {"type": "image", "fileName": ["x"], "content": "AAAA"}]);
        assert_eq!(Message::read(&event(&json!({"attachments": given}))).unwrap().attachments.len(), 1);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::read(&bytes);
        }
    }
}
