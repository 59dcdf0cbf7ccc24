//! A message and its answer: sessions, threads, groups, parts, and what is no message.

use crate::fixtures::{World, echo, echo_text, event_word, events_in, telegram};
use cvm_harness::machine::{GATEWAY_TOKEN, PATIENCE};
use cvm_harness::mux::{Door, Ill, message};
use cvm_harness::{Said, until};
use serde_json::{Value, json};
use std::time::Duration;

#[test]
fn a_message_of_each_channel_is_asked_in_its_session_and_answered_there() {
    let mut world = World::new();
    let sessions = ["telegram", "discord", "whatsapp"].map(|c| (c, format!("agent:main:{c}:direct:77")));
    for (channel, session) in &sessions {
        let n = world.next;
        world.next += 1;
        world.deliver(&message(channel, session, n, &format!("hello {}", event_word(n))));
        until(&format!("{channel} is answered; {}", world.state(session)), PATIENCE, || {
            (world.events(session) == [n]).then_some(())
        });
        let asked = world.chat.asked();
        let asked = asked.iter().find(|a| events_in(&a.last()) == [n]).expect("it was asked");
        assert_eq!(asked.session.as_deref(), Some(session.as_str()));
        assert_eq!(asked.channel.as_deref(), Some(*channel));
        assert_eq!(asked.authorization, Some(format!("Bearer {GATEWAY_TOKEN}")));
        assert_eq!(asked.users(), 1, "the session is the gateway's to remember: {:#}", asked.body);
        let sent = world.mux.sent();
        let sent = sent.iter().find(|s| s.session == *session).expect("it was sent");
        assert_eq!(sent.channel, *channel);
        assert_eq!(sent.payload["text"], sent.text());
        assert_eq!(sent.payload["accountId"], "default");
    }
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn an_answer_stays_in_the_thread_of_its_message() {
    let mut world = World::new();
    let session = "agent:main:telegram:group:-1005:topic:42";
    let (n, mut event) = world.message(session);
    event["threadId"] = json!("42");
    event["chatType"] = json!("group");
    event["wasMentioned"] = json!(true);
    event["to"] = json!("telegram:-1005");
    let chat = json!({"id": -1005, "type": "supergroup", "is_forum": true, "title": "Club"});
    for raw in ["/raw", "/event/raw"] {
        let raw = event.pointer_mut(raw).expect("it is there");
        raw["message"]["chat"] = chat.clone();
        raw["message"]["message_thread_id"] = json!(42);
    }
    event["channelData"] = json!({"chatId": "-1005", "topicId": 42});
    world.deliver(&event);
    world.answers(session, &[n]);
    let payload = world.mux.sent()[0].payload.clone();
    let number = |v: &Value| v.as_i64().or_else(|| v.as_str()?.parse().ok());
    assert_eq!(number(&payload["threadId"]), Some(42), "{payload:#}");
    let envelope = &payload["raw"]["telegram"]["body"];
    assert_eq!(number(&envelope["message_thread_id"]), Some(42), "{payload:#}");
    assert_eq!(number(&envelope["chat_id"]), Some(-1005), "{payload:#}");
}

#[test]
fn while_the_agent_thinks_the_channel_shows_that_it_types() {
    let mut world =
        World::with(|asked, n| Said::After(Duration::from_secs(3), echo_text(asked, n)), |builder| builder);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until("it types", PATIENCE, || {
        let visits = world.mux.visits(Door::Typing);
        visits.iter().any(|v| v.body["sessionKey"] == session.as_str()).then_some(())
    });
    assert_eq!(world.events(&session), Vec::<usize>::new(), "typing comes before the answer");
    until("the answer", PATIENCE, || (world.events(&session) == [n]).then_some(()));
}

#[test]
fn a_server_that_takes_no_typing_takes_answers() {
    let mut world = World::new();
    world.mux.ill(Door::Typing, Ill::Hangs, 1000);
    let session = telegram("1");
    let n = world.hand_over(&session);
    world.answers(&session, &[n]);
}

#[test]
fn a_long_answer_comes_whole_in_parts_that_the_channel_takes() {
    let words = |count: usize| (0..count).map(|n| format!("word{n}é🦞")).collect::<Vec<_>>().join(" ");
    let long = words(1500);
    let one_word = "x🦞".repeat(4000);
    let texts = [long.clone(), one_word.clone()];
    let mut world = World::with(
        move |asked, _| {
            Said::Text(
                texts[usize::from(asked.last().contains("ev2x") || asked.last().contains("ev4x"))].clone(),
            )
        },
        |builder| builder,
    );
    for (channel, first) in [("telegram", 1), ("discord", 3)] {
        let session = format!("agent:main:{channel}:direct:9");
        let mut so_far = 0;
        for (n, whole) in [(first, &long), (first + 1, &one_word)] {
            world.next = n + 1;
            world.deliver(&message(channel, &session, n, &event_word(n)));
            let plain = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
            until(&format!("all of the answer; {}", world.state(&session)), PATIENCE, || {
                (plain(&world.mux.texts(&session)[so_far..].concat()).len() >= plain(whole).len())
                    .then_some(())
            });
            let parts = world.mux.texts(&session)[so_far..].to_vec();
            assert_eq!(plain(&parts.concat()), plain(whole));
            let least = whole.encode_utf16().count() / if channel == "discord" { 2000 } else { 4096 };
            assert!(parts.len() > least && parts.len() <= 2 * least + 2, "{} parts", parts.len());
            so_far += parts.len();
        }
        let keys: std::collections::BTreeSet<String> =
            world.mux.visits(Door::Send).into_iter().filter_map(|v| v.key).collect();
        assert_eq!(keys.len(), world.mux.sent().len(), "each part has a key of its own");
    }
}

#[test]
fn a_group_is_answered_when_the_agent_was_mentioned_and_not_otherwise() {
    let mut world = World::new();
    let session = "agent:main:telegram:group:-1007";
    let (quiet, mut event) = world.message(session);
    event["chatType"] = json!("group");
    event["wasMentioned"] = json!(false);
    world.deliver(&event);
    let (mentioned, mut event) = world.message(session);
    event["chatType"] = json!("group");
    event["wasMentioned"] = json!(true);
    world.deliver(&event);
    until("the mention is answered", PATIENCE, || world.events(session).contains(&mentioned).then_some(()));
    assert_eq!(world.events(session), [mentioned]);
    assert_eq!(world.asked(quiet), 0);
    // As a server of the register-key era delivers: it does not say whether there was a mention.
    let (unsaid, mut event) = world.message(session);
    event["chatType"] = json!("group");
    world.deliver(&event);
    let (replied, mut event) = world.message(session);
    event["chatType"] = json!("group");
    let mut message = event["raw"]["message"].clone();
    message["reply_to_message"] =
        json!({"message_id": 1, "from": {"id": 99, "is_bot": true, "first_name": "Bot"}});
    let raw = json!({"update": {"update_id": 5, "message": message}, "message": message});
    (event["raw"], event["event"]["raw"]) = (raw.clone(), raw);
    world.deliver(&event);
    until("the reply is answered", PATIENCE, || world.events(session).contains(&replied).then_some(()));
    assert_eq!(world.events(session), [mentioned, replied]);
    assert_eq!(world.asked(unsaid), 0);
}

#[test]
fn a_message_with_nothing_in_it_is_taken_and_ends_there() {
    let mut world = World::new();
    let session = telegram("1");
    for body in ["", "  \n "] {
        let (_, mut event) = world.message(&session);
        event["body"] = json!(body);
        world.deliver(&event);
    }
    let n = world.hand_over(&session);
    world.answers(&session, &[n]);
    assert_eq!(world.mux.sent().len(), 2);
}

#[test]
fn commands_callbacks_and_actions_reach_the_agent_as_messages_do() {
    let mut world = World::new();
    let session = telegram("1");
    let mut all = Vec::new();
    for kind in ["command", "callback", "action", "message"] {
        let (n, mut event) = world.message(&session);
        event["event"]["kind"] = json!(kind);
        event["body"] = json!(format!("/do {}", event_word(n)));
        world.deliver(&event);
        all.push(n);
    }
    world.answers(&session, &all);
}

#[test]
fn what_is_no_event_is_refused_and_disturbs_nobody() {
    let mut world = World::new();
    let token = world.mux.token(|_, _| {});
    let whole = world.message("agent:main:telegram:direct:1").1;
    let mut bodies =
        vec![Vec::new(), b"{".to_vec(), b"[]".to_vec(), b"null".to_vec(), b"\"x\"".to_vec(), vec![0xff; 100]];
    bodies.push(br#"{"eventId":"#.repeat(20_000));
    for name in ["eventId", "channel", "sessionKey"] {
        let mut event = whole.clone();
        event.as_object_mut().expect("an object").remove(name);
        bodies.push(event.to_string().into_bytes());
        event[name] = json!({"a": 1});
        bodies.push(event.to_string().into_bytes());
    }
    // It could not stand in a header.
    let mut event = whole.clone();
    event["channel"] = json!("tele\ngram");
    bodies.push(event.to_string().into_bytes());
    for body in bodies {
        let shown: String = String::from_utf8_lossy(&body).chars().take(80).collect();
        let answer = world.mux.post(&body, Some(&token)).expect("an answer");
        assert!((400..500).contains(&answer.status), "{} to {shown}", answer.status);
    }
    let bearer = format!("Bearer {token}");
    let mut elsewhere = world.mux.client(Duration::from_secs(20));
    let body = whole.to_string();
    let answer = elsewhere.raw("/v1/mux/outbound", &[("Authorization", &bearer)], body.as_bytes());
    assert_eq!(answer.expect("an answer").status, 404);
    let session = telegram("2");
    let n = world.hand_over(&session);
    world.answers(&session, &[n]);
    assert!(world.events("agent:main:telegram:direct:1").is_empty());
}

#[test]
fn a_message_that_the_gateway_will_never_take_does_not_stop_its_session() {
    let mut world = World::with(
        |asked, n| if asked.last().contains("ev1x") { Said::Status(400) } else { echo(asked, n) },
        |builder| builder,
    );
    let session = telegram("1");
    let poison = world.hand_over(&session);
    let n = world.hand_over(&session);
    until(&format!("the next one is answered; {}", world.state(&session)), PATIENCE, || {
        world.events(&session).contains(&n).then_some(())
    });
    assert!(!world.events(&session).contains(&poison));
}
