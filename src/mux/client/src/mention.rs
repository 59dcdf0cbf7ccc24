//! Whether a message in a group speaks to the bot, judged by what the platform says of the message.
//!
//! It is asked where the mux-server leaves `wasMentioned` out; otherwise every group would be ignored.
//!
//! * A command: `/word` at the beginning, alone or with the name of a bot behind it.
//! * Telegram: a mention of a bot, or a reply to a message of one. The bot's own name is not in an
//!   event, so every bot counts. A bot's name ends in `bot`.
//! * Discord: a mention of a bot or a reply to one. The platform says which users are bots.
//! * `WhatsApp`: a mention of the account's own number, or a reply to it. The event has the number.

use serde_json::Value;

/// `raw` is the platform's message, or an envelope around it.
pub(crate) fn speaks_to_us(channel: &str, text: &str, raw: &Value) -> bool {
    let places = ["/message", "/update/message", "/update/edited_message", "/edited_message"];
    let message = places.iter().find_map(|place| raw.pointer(place).filter(|v| v.is_object()));
    // In the envelope of WhatsApp's own library, which has a `key`, "message" is another thing.
    let message = if raw.get("key").is_some() { raw } else { message.unwrap_or(raw) };
    is_command(text)
        || match channel {
            "telegram" => is_telegram(message),
            "discord" => is_discord(message),
            "whatsapp" => is_whatsapp(message),
            _ => false,
        }
}

fn is_command(text: &str) -> bool {
    let Some(word) = text.strip_prefix('/').and_then(|rest| rest.split(char::is_whitespace).next()) else {
        return false;
    };
    let (command, bot) = word.split_once('@').map_or((word, None), |(command, bot)| (command, Some(bot)));
    let is_name = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !command.is_empty() && command.bytes().all(is_name) && bot.is_none_or(is_bot_name)
}

/// In Telegram the name of every bot ends like this.
fn is_bot_name(name: &str) -> bool {
    let at = name.len().saturating_sub(3);
    name.get(at..).is_some_and(|end| end.eq_ignore_ascii_case("bot"))
}

fn is_true(value: &Value, pointer: &str) -> bool {
    value.pointer(pointer) == Some(&Value::Bool(true))
}

fn string<'a>(value: &'a Value, name: &str) -> Option<&'a str> {
    value.get(name)?.as_str()
}

fn list<'a>(value: &'a Value, name: &str) -> impl Iterator<Item = &'a Value> {
    value.get(name).and_then(Value::as_array).into_iter().flatten()
}

fn is_telegram(message: &Value) -> bool {
    // In a forum each message is a reply to the one that opened its topic. The messages of a channel, and
    // of an administrator without a name, are sent by a bot of Telegram's.
    let replied = message.get("reply_to_message").filter(|replied| {
        ["forum_topic_created", "sender_chat"].iter().all(|name| replied.get(name).is_none())
    });
    let mentions =
        [("text", "entities"), ("caption", "caption_entities")].into_iter().any(|(field, entities)| {
            let text: Vec<u16> = string(message, field).unwrap_or_default().encode_utf16().collect();
            list(message, entities).any(|entity| match string(entity, "type") {
                Some("text_mention") => is_true(entity, "/user/is_bot"),
                Some("mention") => telegram_name(&text, entity).is_some_and(|name| is_bot_name(&name)),
                _ => false,
            })
        });
    mentions || replied.is_some_and(|replied| is_true(replied, "/from/is_bot"))
}

/// Telegram counts offset and length in UTF-16 code units.
fn telegram_name(text: &[u16], entity: &Value) -> Option<String> {
    let number = |name: &str| usize::try_from(entity.get(name)?.as_u64()?).ok();
    let (offset, length) = (number("offset")?, number("length")?);
    String::from_utf16(text.get(offset..offset.checked_add(length)?)?).ok()
}

fn is_discord(message: &Value) -> bool {
    // A webhook is marked as a bot too, and answers nobody.
    let replied =
        message.get("referenced_message").filter(|m| m.get("webhook_id").is_none_or(Value::is_null));
    list(message, "mentions").any(|user| is_true(user, "/bot"))
        || replied.is_some_and(|replied| is_true(replied, "/author/bot"))
}

fn is_whatsapp(message: &Value) -> bool {
    let own: Vec<&str> = ["to", "selfE164", "selfJid", "selfLid"]
        .iter()
        .filter_map(|name| string(message, name).and_then(number))
        .collect();
    let is_own = |name: &str| number(name).is_some_and(|number| own.contains(&number));
    list(message, "mentionedJids").filter_map(Value::as_str).any(is_own)
        || ["replyToSenderJid", "replyToSenderE164"].iter().any(|n| string(message, n).is_some_and(is_own))
}

/// The telephone number of `+4915..`, `4915..@s.whatsapp.net` and `4915..:7@s.whatsapp.net`.
fn number(name: &str) -> Option<&str> {
    let user = name.split(['@', ':']).next()?.trim_start_matches('+');
    (!user.is_empty() && user.bytes().all(|b| b.is_ascii_digit())).then_some(user)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// As a server of the register-key era hands it on: the update and the message.
    fn telegram(text: &str, more: &Value) -> bool {
        let mut message = json!({
            "message_id": 812, "date": 1_796_000_000, "text": text,
            "from": {"id": 1001, "is_bot": false, "first_name": "Ada", "username": "ada"},
            "chat": {"id": -100_555, "type": "supergroup", "title": "Club"},
        });
        for (name, value) in more.as_object().unwrap() {
            message[name] = value.clone();
        }
        let raw = json!({"update": {"update_id": 4711, "message": message}, "message": message});
        speaks_to_us("telegram", text, &raw)
    }

    fn mention(at: usize, length: usize) -> Value {
        json!({"entities": [{"type": "mention", "offset": at, "length": length}]})
    }

    #[test]
    fn in_telegram_a_mention_of_a_bot_counts() {
        assert!(telegram("@helper_bot what is this?", &mention(0, 11)));
        // The crab is two code units.
        assert!(telegram("🦀 @HelperBot hi", &mention(3, 10)));
        assert!(!telegram("@grace what is this?", &mention(0, 6)));
        assert!(!telegram("what is this, robot?", &json!({})));
        assert!(!telegram(
            "mail me at a@helper_bot",
            &json!({"entities": [{"type": "email", "offset": 11, "length": 12}]})
        ));
        let named = |is_bot: bool| {
            let user = json!({"id": 99, "is_bot": is_bot, "first_name": "Helper"});
            json!({"entities": [{"type": "text_mention", "offset": 0, "length": 6, "user": user}]})
        };
        assert!(telegram("Helper, hi", &named(true)) && !telegram("Helper, hi", &named(false)));
        let picture = json!({"text": null, "caption": "see @helper_bot", "photo": [{"file_id": "x"}],
            "caption_entities": [{"type": "mention", "offset": 4, "length": 11}]});
        assert!(telegram("", &picture));
    }

    #[test]
    fn in_telegram_a_reply_to_a_bot_counts() {
        let reply = |from: &Value, more: &Value| {
            let mut replied = json!({"message_id": 800, "date": 1, "text": "yes", "from": from});
            for (name, value) in more.as_object().unwrap() {
                replied[name] = value.clone();
            }
            telegram("and then?", &json!({ "reply_to_message": replied }))
        };
        let bot = json!({"id": 99, "is_bot": true, "first_name": "Helper", "username": "helper_bot"});
        assert!(reply(&bot, &json!({})));
        assert!(!reply(&json!({"id": 7, "is_bot": false, "first_name": "Grace"}), &json!({})));
        // What a forum makes of each message in a topic that a bot has opened.
        assert!(!reply(&bot, &json!({"forum_topic_created": {"name": "News", "icon_color": 1}})));
        let anonymous = json!({"id": 1_087_968_824, "is_bot": true, "username": "GroupAnonymousBot"});
        assert!(!reply(&anonymous, &json!({"sender_chat": {"id": -100_555, "type": "supergroup"}})));
    }

    #[test]
    fn a_command_counts_unless_it_names_somebody_else() {
        let none = json!({});
        for text in ["/help", "/help@helper_bot", "/help@Helper_Bot now", "/new_chat please", "/help\nnow"] {
            assert!(telegram(text, &none), "{text}");
        }
        for text in ["/", "/ help", "a /help", "/etc/passwd is a file", "/help@grace", "//", "/@helper_bot"] {
            assert!(!telegram(text, &none), "{text}");
        }
        assert!(speaks_to_us("whatsapp", "/help", &none) && speaks_to_us("discord", "/help", &none));
    }

    fn discord(more: &Value) -> bool {
        let mut message = json!({
            "id": "1301", "channel_id": "2002", "guild_id": "2000", "content": "hi", "type": 0, "mentions": [],
            "mention_roles": [], "mention_everyone": false, "timestamp": "2026-11-30T12:00:00Z",
            "author": {"id": "3003", "username": "ada"},
        });
        for (name, value) in more.as_object().unwrap() {
            message[name] = value.clone();
        }
        speaks_to_us("discord", "hi", &json!({ "message": message }))
    }

    #[test]
    fn in_discord_a_mention_of_a_bot_and_a_reply_to_one_count() {
        let bot = json!({"id": "99", "username": "helper", "bot": true});
        let grace = json!({"id": "7", "username": "grace"});
        assert!(!discord(&json!({})));
        assert!(discord(&json!({"content": "<@99> hi", "mentions": [bot]})));
        assert!(!discord(&json!({"content": "<@7> hi", "mentions": [grace]})));
        assert!(!discord(&json!({"content": "@everyone", "mention_everyone": true, "mention_roles": ["5"]})));
        assert!(discord(&json!({"type": 19, "referenced_message": {"id": "1300", "author": bot}})));
        assert!(discord(&json!({"referenced_message": {"id": "1300", "author": bot, "webhook_id": null}})));
        assert!(!discord(&json!({"type": 19, "referenced_message": {"id": "1300", "author": grace}})));
        assert!(!discord(&json!({"type": 19, "referenced_message": null})));
        assert!(!discord(&json!({"referenced_message": {"author": bot, "webhook_id": "55"}})));
    }

    fn whatsapp(more: &Value) -> bool {
        let mut message = json!({
            "id": "3EB0", "from": "1203630@g.us", "to": "+491511234567", "body": "hi", "accountId": "default",
            "chatType": "group", "chatId": "1203630@g.us", "senderJid": "4915199@s.whatsapp.net",
            "senderE164": "+4915199", "groupSubject": "Club",
            "groupParticipants": ["+4915199", "+491511234567"],
        });
        for (name, value) in more.as_object().unwrap() {
            message[name] = value.clone();
        }
        speaks_to_us("whatsapp", "hi", &json!({ "message": message }))
    }

    #[test]
    fn in_whatsapp_a_mention_of_our_number_and_a_reply_to_it_count() {
        assert!(!whatsapp(&json!({})));
        assert!(whatsapp(
            &json!({"mentionedJids": ["4915177@s.whatsapp.net", "491511234567@s.whatsapp.net"]})
        ));
        assert!(whatsapp(&json!({"mentionedJids": ["491511234567:12@s.whatsapp.net"]})));
        assert!(!whatsapp(&json!({"mentionedJids": ["4915177@s.whatsapp.net"]})));
        assert!(whatsapp(&json!({"replyToId": "A1", "replyToSenderE164": "+491511234567"})));
        assert!(whatsapp(&json!({"replyToId": "A1", "replyToSenderJid": "491511234567@s.whatsapp.net"})));
        assert!(!whatsapp(&json!({"replyToId": "A1", "replyToSenderE164": "+4915177"})));
        // Without a number of our own nobody is us.
        assert!(!whatsapp(&json!({"to": "me", "mentionedJids": ["@s.whatsapp.net", "me"]})));
        assert!(whatsapp(&json!({"to": "me", "selfLid": "998:3@lid", "mentionedJids": ["998@lid"]})));
    }

    proptest! {
        #[test]
        fn no_event_makes_it_panic(text in "\\PC{0,40}", offset in any::<u64>(), length in any::<u64>()) {
            let entity = json!([{"type": "mention", "offset": offset, "length": length}]);
            let raw = json!({"message": {"text": text, "entities": entity, "mentions": text, "to": text}});
            for channel in ["telegram", "discord", "whatsapp", "other"] {
                let _ = speaks_to_us(channel, &text, &raw);
            }
        }
    }
}
