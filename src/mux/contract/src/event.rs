//! What the server delivers: an event of a chat platform.
//!
//! An event is read twice: first its head, which is all that a queue needs, later the whole. Reading is
//! lenient where the platforms differ (numbers as text, fields that are null or of another type), and
//! strict about what an event cannot be without.

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

/// Where every inbound URL ends.
pub const INBOUND_PATH: &str = "/v1/mux/inbound";
/// The largest body of a delivery.
pub const BYTES_MAX: u64 = 10 * 1024 * 1024;
/// No platform has longer names.
const NAME_MAX: usize = 1024;

/// Which event it is, and whose.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EventHead {
    pub event_id: String,
    pub channel: String,
    pub session_key: String,
    #[serde(default)]
    pub openclaw_id: Option<String>,
}

impl EventHead {
    /// An error is the rule that the body breaks.
    pub fn read(from: impl std::io::Read) -> Result<Self, &'static str> {
        // serde_json reads a byte at a time.
        let head: Self = serde_json::from_reader(std::io::BufReader::new(from))
            .map_err(|_| "the body is no event: JSON with eventId, channel and sessionKey")?;
        let fits = |name: &str| !name.is_empty() && name.len() <= NAME_MAX;
        if !fits(&head.event_id) || !fits(&head.session_key) || !fits(&head.channel) {
            return Err("eventId, channel and sessionKey have 1 to 1024 bytes");
        }
        if head.session_key.chars().chain(head.channel.chars()).any(char::is_control) {
            return Err("sessionKey and channel have no control characters");
        }
        Ok(head)
    }
}

/// An event without its id. What may be most of it, such as a picture, is not copied.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Event<'a> {
    #[serde(deserialize_with = "lenient")]
    pub channel: Option<String>,
    #[serde(borrow)]
    pub event: Option<&'a RawValue>,
    #[serde(borrow)]
    pub raw: Option<&'a RawValue>,
    #[serde(deserialize_with = "lenient")]
    pub body: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub from: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub to: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub account_id: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub chat_type: Option<String>,
    pub thread_id: Option<Value>,
    #[serde(borrow)]
    pub channel_data: Option<&'a RawValue>,
    #[serde(borrow)]
    pub attachments: Option<&'a RawValue>,
    #[serde(deserialize_with = "lenient")]
    pub was_mentioned: Option<String>,
}

/// The `event` of an [`Event`]: its kind, and what the platform said.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct PlatformEvent<'a> {
    /// `message`, `callback`, `command` or `action`.
    #[serde(deserialize_with = "lenient")]
    pub kind: Option<String>,
    #[serde(borrow)]
    pub raw: Option<&'a RawValue>,
}

/// One of the `attachments` of an [`Event`].
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EventAttachment<'a> {
    #[serde(rename = "type", deserialize_with = "lenient")]
    pub kind: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub mime_type: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub file_name: Option<String>,
    #[serde(deserialize_with = "lenient")]
    pub url: Option<String>,
    /// Base64, as JSON has it.
    #[serde(borrow)]
    pub content: Option<&'a RawValue>,
}

/// A text; a number or a boolean becomes one, and anything else is left out.
fn lenient<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    Ok(text_of(&Value::deserialize(from)?))
}

/// A text, a number or a boolean as text.
pub fn text_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        Value::Bool(yes) => Some(yes.to_string()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_head_names_the_event_its_session_and_the_instance() {
        let event = r#"{"eventId":"e1","channel":"telegram","sessionKey":"s","openclawId":"me","body":5}"#;
        let head = EventHead::read(event.as_bytes()).unwrap();
        assert_eq!((head.event_id.as_str(), head.session_key.as_str()), ("e1", "s"));
        assert_eq!((head.channel.as_str(), head.openclaw_id.as_deref()), ("telegram", Some("me")));
    }

    #[test]
    fn what_cannot_be_an_event_is_refused() {
        for bad in ["", "[]", "{}", r#"{"eventId":"","channel":"c","sessionKey":"s"}"#] {
            assert!(EventHead::read(bad.as_bytes()).is_err(), "{bad}");
        }
        for control in [
            r#"{"eventId":"e","channel":"c","sessionKey":"a\nb"}"#,
            r#"{"eventId":"e","channel":"c\nd","sessionKey":"a"}"#,
        ] {
            assert!(EventHead::read(control.as_bytes()).is_err(), "{control}");
        }
    }

    #[test]
    fn what_one_side_writes_the_other_side_reads() {
        let inner = r#"{"kind":"message","raw":{"x":[1]}}"#;
        let event = Event {
            body: Some("hello".to_owned()),
            event: serde_json::from_str(inner).unwrap(),
            thread_id: Some(Value::from(7)),
            was_mentioned: Some("true".to_owned()),
            ..Event::default()
        };
        let written = serde_json::to_string(&event).unwrap();
        let read: Event<'_> = serde_json::from_str(&written).unwrap();
        assert_eq!((read.body, read.thread_id), (event.body, event.thread_id));
        assert_eq!((read.was_mentioned, read.from, read.raw.is_none()), (event.was_mentioned, None, true));
        let inner: PlatformEvent<'_> = serde_json::from_str(read.event.unwrap().get()).unwrap();
        assert_eq!((inner.kind.as_deref(), inner.raw.unwrap().get()), (Some("message"), r#"{"x":[1]}"#));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = EventHead::read(&bytes[..]);
            let _ = serde_json::from_slice::<Event<'_>>(&bytes);
        }
    }
}
