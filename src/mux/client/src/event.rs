//! What the mux-server hands us, read: first only what the queue needs, later the message.
//!
//! Lenient where the chat platforms differ (numbers as text, fields that are null or of another type),
//! strict about what a message cannot be without. Pure.
//! May import: `mention`.

use crate::mention;
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_json::value::RawValue;
use std::borrow::Cow;

/// Longer names are nobody's.
const NAME_MAX: usize = 1024;

/// What the queue needs of an event.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Head {
    pub(crate) event_id: String,
    pub(crate) channel: String,
    pub(crate) session_key: String,
    #[serde(default)]
    pub(crate) openclaw_id: Option<String>,
}

impl Head {
    /// None with a rule when it cannot be an event.
    pub(crate) fn read(from: impl std::io::Read) -> Result<Self, &'static str> {
        // It reads a byte at a time.
        let head: Self = serde_json::from_reader(std::io::BufReader::new(from))
            .map_err(|_| "the body is no event: JSON with eventId, channel and sessionKey")?;
        let fits = |text: &str| !text.is_empty() && text.len() <= NAME_MAX;
        if !fits(&head.event_id) || !fits(&head.session_key) || !fits(&head.channel) {
            return Err("eventId, channel and sessionKey have 1 to 1024 bytes");
        }
        if head.session_key.chars().chain(head.channel.chars()).any(char::is_control) {
            return Err("sessionKey and channel have no control characters");
        }
        Ok(head)
    }
}

/// A message as the agent is to get it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Message<'a> {
    pub(crate) text: String,
    pub(crate) for_us: bool,
    pub(crate) account: Option<String>,
    /// Whom the answer goes to, as the platform names the chat.
    pub(crate) to: Option<String>,
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

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Whole<'a> {
    #[serde(default, deserialize_with = "text")]
    channel: Option<String>,
    #[serde(borrow, default)]
    event: Option<&'a RawValue>,
    #[serde(borrow, default)]
    raw: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "text")]
    body: Option<String>,
    #[serde(default, deserialize_with = "text")]
    from: Option<String>,
    #[serde(default, deserialize_with = "text")]
    to: Option<String>,
    #[serde(default, deserialize_with = "text")]
    account_id: Option<String>,
    #[serde(default, deserialize_with = "text")]
    chat_type: Option<String>,
    #[serde(default)]
    thread_id: Option<Value>,
    #[serde(borrow, default)]
    channel_data: Option<&'a RawValue>,
    #[serde(borrow, default)]
    attachments: Option<&'a RawValue>,
    #[serde(default, deserialize_with = "text")]
    was_mentioned: Option<String>,
}

#[derive(Default, Deserialize)]
struct Inner<'a> {
    #[serde(default, deserialize_with = "text")]
    kind: Option<String>,
    #[serde(borrow, default)]
    raw: Option<&'a RawValue>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Given<'a> {
    #[serde(rename = "type", default, deserialize_with = "text")]
    kind: Option<String>,
    #[serde(default, deserialize_with = "text")]
    mime_type: Option<String>,
    #[serde(default, deserialize_with = "text")]
    file_name: Option<String>,
    #[serde(default, deserialize_with = "text")]
    url: Option<String>,
    /// As it stands, because it may be most of the event.
    #[serde(borrow, default)]
    content: Option<&'a RawValue>,
}

/// A string, or a number or boolean as one; anything else is nothing.
fn text<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(word(&Value::deserialize(from)?))
}

fn word(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(yes) => Some(yes.to_string()),
        _ => None,
    }
}

fn is_yes(text: &str) -> bool {
    ["true", "yes", "1"].iter().any(|yes| text.trim().eq_ignore_ascii_case(yes))
}

/// None when it is something else.
fn typed<'a, T: Deserialize<'a>>(raw: &'a RawValue) -> Option<T> {
    serde_json::from_str(raw.get()).ok()
}

/// Larger raw envelopes are not searched: what is looked for stands in small ones.
const RAW_MAX: usize = 256 * 1024;

fn small(raw: Option<&RawValue>) -> Value {
    let text = raw.map(RawValue::get).filter(|text| text.len() <= RAW_MAX);
    text.and_then(|text| serde_json::from_str(text).ok()).unwrap_or_default()
}

fn first(value: &Value, pointers: &[&str]) -> Option<Value> {
    pointers.iter().filter_map(|p| value.pointer(p)).find(|v| word(v).is_some()).cloned()
}

impl<'a> Message<'a> {
    /// Where an answer goes, without what was said.
    pub(crate) fn address(self) -> Message<'static> {
        Message { text: String::new(), attachments: Vec::new(), ..self }
    }

    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, String> {
        // The text of the error says where, and quotes nothing.
        let whole: Whole<'a> =
            serde_json::from_slice(bytes).map_err(|e| format!("line {} column {}", e.line(), e.column()))?;
        let Inner { kind, raw } = whole.event.and_then(typed).unwrap_or_default();
        let kind = kind.unwrap_or_else(|| "message".to_owned());
        let (raw, data) = (small(raw.or(whole.raw)), small(whole.channel_data));
        let mut said = whole.body.unwrap_or_default().trim().to_owned();
        if said.is_empty() && matches!(kind.as_str(), "callback" | "action") {
            // A button has no text of its own; what it stands for is what was meant.
            let pressed = [
                "/data",
                "/callback_query/data",
                "/callbackQuery/data",
                "/custom_id",
                "/data/custom_id",
                "/value",
                "/id",
            ];
            let pressed =
                first(&raw, &pressed).or_else(|| first(&data, &["/callbackData", "/data", "/value"]));
            if let Some(pressed) = pressed.as_ref().and_then(word) {
                said = format!("callback_data: {pressed}");
            }
        }
        let direct = whole.chat_type.as_deref() != Some("group");
        // Commands and buttons are for us by their nature. What the server says counts where it says it.
        let is_mentioned = || match whole.was_mentioned.as_deref() {
            Some(said) => is_yes(said),
            None => mention::speaks_to_us(whole.channel.as_deref().unwrap_or_default(), &said, &raw),
        };
        let for_us = direct || kind != "message" || is_mentioned();
        let chats = ["/chatId", "/chat_id", "/chat/id"];
        let chats_raw =
            ["/message/chat/id", "/chat/id", "/callback_query/message/chat/id", "/edited_message/chat/id"];
        let bare = |name: &String| name.rsplit(':').next().map(|n| Value::String(n.to_owned()));
        let chat = first(&data, &chats)
            .or_else(|| first(&raw, &chats_raw))
            .or_else(|| if direct { whole.from.as_ref().and_then(bare) } else { None })
            .or_else(|| whole.to.as_ref().and_then(bare));
        let given: Vec<&RawValue> = whole.attachments.and_then(typed).unwrap_or_default();
        let attachments = given.into_iter().filter_map(typed).map(attachment).collect();
        Ok(Self {
            text: said,
            for_us,
            account: whole.account_id,
            to: if direct { whole.from.or(whole.to) } else { whole.to.or(whole.from) },
            chat,
            thread: whole.thread_id.filter(|t| word(t).is_some_and(|w| !w.is_empty())),
            attachments,
        })
    }
}

/// A string without a copy, unless it has escapes.
fn content(raw: &RawValue) -> Option<Cow<'_, str>> {
    let text = raw.get();
    if text.contains('\\') {
        return serde_json::from_str(text).ok().map(Cow::Owned);
    }
    text.strip_prefix('"')?.strip_suffix('"').map(Cow::Borrowed)
}

fn attachment(given: Given<'_>) -> Attachment<'_> {
    let kind = given.kind.unwrap_or_default();
    let mime = given.mime_type.unwrap_or_else(|| match kind.as_str() {
        "image" | "photo" => "image/jpeg".to_owned(),
        other if other.contains('/') => other.to_owned(),
        _ => String::new(),
    });
    let mime = mime.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    let source = match (
        given.content.and_then(content).filter(|c| !c.is_empty()),
        given.url.filter(|u| !u.is_empty()),
    ) {
        (Some(content), _) => Source::Content(content),
        (None, Some(url)) => Source::Url(url),
        (None, None) => Source::Nothing,
    };
    Attachment { mime, name: given.file_name.filter(|n| !n.is_empty()), source }
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
        let head = Head::read(&bytes[..]).unwrap();
        assert_eq!((head.event_id.as_str(), head.openclaw_id.as_deref()), ("e1", Some("me")));
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
    fn what_cannot_be_an_event_is_refused() {
        for bad in ["", "[]", "{}", r#"{"eventId":"","channel":"c","sessionKey":"s"}"#] {
            assert!(Head::read(bad.as_bytes()).is_err(), "{bad}");
        }
        for control in [
            r#"{"eventId":"e","channel":"c","sessionKey":"a\nb"}"#,
            r#"{"eventId":"e","channel":"c\nd","sessionKey":"a"}"#,
        ] {
            assert!(Head::read(control.as_bytes()).is_err(), "{control}");
        }
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
            let _ = Head::read(&bytes[..]);
            let _ = Message::read(&bytes);
        }
    }
}
