//! Whatever the mux-server delivers is an event or is refused. The names of an event fit into a log line, and
//! a message in a group that speaks to others is not for us.
#![no_main]

#[path = "../../../src/mux/client/src/mention.rs"]
mod mention;
#[allow(dead_code)]
#[path = "../../../src/mux/client/src/message.rs"]
mod message;

use cvm_mux_contract::event::EventHead;
use libfuzzer_sys::fuzz_target;
use message::{Message, Source};
use serde_json::{Value, json};

const CHANNELS: [&str; 4] = ["telegram", "discord", "whatsapp", "other"];

fuzz_target!(|data: &[u8]| {
    look(data);
    let Some((first, rest)) = data.split_first() else { return };
    let Ok(value) = serde_json::from_slice::<Value>(rest) else { return };
    // Every field of a good event, one at a time, and what a platform may say.
    let mut event = json!({
        "eventId": "e1", "channel": CHANNELS[usize::from(first % 4)], "sessionKey": "s", "body": "hello",
        "from": "telegram:42", "to": "telegram:7", "accountId": "default", "chatType": "group", "messageId": 5,
        "threadId": 3, "channelData": {}, "attachments": [], "openclawId": "me",
        "event": {"kind": "message", "raw": {}}, "raw": {},
    });
    let names: Vec<String> = event.as_object().into_iter().flat_map(|map| map.keys().cloned()).collect();
    match usize::from(first / 4) {
        n if n < names.len() => event[names[n].as_str()] = value,
        n if n < 40 => event["event"]["raw"] = json!({ "message": value }),
        n if n < 50 => event["attachments"] = json!([value]),
        _ => event["event"]["raw"] = json!({"message": {"text": value, "reply_to_message": value, "mentionedJids": value}}),
    }
    look(event.to_string().as_bytes());
    event["event"] = json!({"kind": "message", "raw": event["event"]["raw"]});
    (event["chatType"], event["wasMentioned"]) = (json!("group"), json!(false));
    if let Ok(message) = Message::read(event.to_string().as_bytes()) {
        assert!(!message.for_us, "the server has said that nobody speaks to us");
    }
});

fn look(bytes: &[u8]) {
    if let Ok(head) = EventHead::read(bytes) {
        for name in [&head.event_id, &head.channel, &head.session_key] {
            assert!((1..=1024).contains(&name.len()));
        }
        assert!(!head.channel.contains(char::is_control) && !head.session_key.contains(char::is_control));
    }
    if let Ok(message) = Message::read(bytes) {
        assert_eq!(message.text, message.text.trim());
        for one in &message.attachments {
            assert!(!one.mime.contains(';') && !matches!(&one.source, Source::Url(url) if url.is_empty()));
        }
        assert!(message.address().text.is_empty());
    }
}
