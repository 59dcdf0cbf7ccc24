//! The mux client between a mux-server and the gateway: who is let in, what is promised with a
//! 2xx, that each event is answered once and in order whatever dies, and what the server is told.
//!
//! The server is the harness's, strict about the contract: it fails a test by itself when the
//! client breaks it. The gateway is a stub where a test decides what a gateway does, and the real
//! one where it matters what it makes of a message. `CVM_SOAK=1` makes more rounds of what is
//! random; moments are chosen by a seed.

use cvm_harness::chat::{Asked, MODEL_PORT, two_agents};
use cvm_harness::machine::{DEVICE_ID, GATEWAY_TOKEN, MASTER_KEY, PATIENCE};
use cvm_harness::mux::{ADMIN_TOKEN, Door, Ill, REGISTER_KEY, jwt, message, unix_now};

use cvm_harness::{Builder, Chat, Cloud, Machine, Mux, Network, Said, before, until};
use hmac::{Hmac, KeyInit as _, Mac as _};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};
use sha2::Sha256;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

/// In the place of the gateway: its death cuts whatever it was asked.
const RELAY: &str = "#!/bin/sh\nexec cvm-victim relay 18789 9300\n";
const STUB_PORT: u16 = 9300;

fn soak(usual: usize, long: usize) -> usize {
    if std::env::var_os("CVM_SOAK").is_some() { long } else { usual }
}

/// Words that say which event they belong to.
fn event_word(n: usize) -> String {
    format!("ev{n}x")
}

/// The events that a text speaks of.
fn events_in(text: &str) -> Vec<usize> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter_map(|w| w.strip_prefix("ev")?.strip_suffix('x')?.parse().ok()).collect()
}

/// Says which event it answers, and never the same twice: who asks again has another answer.
fn echo(asked: &Asked, number: usize) -> Said {
    Said::Text(echo_text(asked, number))
}

fn echo_text(asked: &Asked, number: usize) -> String {
    let words: Vec<String> = events_in(&asked.last()).into_iter().map(event_word).collect();
    format!("answer {number} to {}", words.join(" "))
}

fn telegram(session: &str) -> String {
    format!("agent:main:telegram:direct:{session}")
}

/// A machine with a client, a mux-server and a stub.
struct World {
    machine: Machine,
    chat: Chat,
    mux: Mux,
    next: usize,
}

impl World {
    fn new() -> Self {
        Self::with(echo, |builder| builder)
    }

    fn with(
        script: impl Fn(&Asked, usize) -> Said + Send + Sync + 'static,
        change: impl FnOnce(Builder) -> Builder,
    ) -> Self {
        let world = Self::unregistered(script, |_| {}, change);
        until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
        world.up();
        world
    }

    /// For those who have something to say to the server before the client does.
    fn unregistered(
        script: impl Fn(&Asked, usize) -> Said + Send + Sync + 'static,
        prepare: impl FnOnce(&Mux),
        change: impl FnOnce(Builder) -> Builder,
    ) -> Self {
        let network = Network::new();
        let mux = Mux::start(&network, DEVICE_ID);
        prepare(&mux);
        let chat = Chat::start(&network, STUB_PORT, script);
        let builder = Builder::product()
            .fake_gateway(RELAY)
            .environment("MASTER_KEY", MASTER_KEY)
            .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
            .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "0")
            .mux(&network, &mux);
        Self { machine: change(builder).start(), chat, mux, next: 1 }
    }

    /// The client listens.
    fn up(&self) {
        self.machine.service_in("gateway", &["ready"]);
        self.machine.service_in("mux", &["ready"]);
    }

    /// The next message of a session, and its number.
    fn message(&mut self, session: &str) -> (usize, Value) {
        let n = self.next;
        self.next += 1;
        let body = format!("hello {}", event_word(n));
        (n, message("telegram", session, n, &body))
    }

    /// A message that the courier delivers; its number.
    fn say(&mut self, session: &str) -> usize {
        let (n, event) = self.message(session);
        self.mux.enqueue(&event);
        n
    }

    /// A message that is taken at the first attempt.
    #[track_caller]
    fn hand_over(&mut self, session: &str) -> usize {
        let (n, event) = self.message(session);
        self.deliver(&event);
        n
    }

    #[track_caller]
    fn deliver(&self, event: &Value) {
        let status = self.mux.deliver(event);
        assert!(matches!(status, Ok(200..300)), "{status:?}\n{}", self.logs());
    }

    /// Waits until a session has exactly these answers, in this order. For the order in a session
    /// nothing can be on its way any more when an event that came after all others is answered.
    #[track_caller]
    fn answered(&mut self, expected: &BTreeMap<String, Vec<usize>>) {
        let last: Vec<(String, usize)> = expected.keys().map(|s| (s.clone(), self.say(s))).collect();
        for (session, last) in last {
            until(&format!("{session} is answered to the end; {}", self.state(&session)), PATIENCE, || {
                self.events(&session).contains(&last).then_some(())
            });
            let mut all = expected[&session].clone();
            all.push(last);
            assert_eq!(self.events(&session), all, "{session}: {:#?}", self.mux.texts(&session));
        }
    }

    #[track_caller]
    fn answers(&mut self, session: &str, expected: &[usize]) {
        self.answered(&BTreeMap::from([(session.to_owned(), expected.to_vec())]));
    }

    /// The events that a session has answers to, in the order of the answers.
    fn events(&self, session: &str) -> Vec<usize> {
        self.mux.texts(session).iter().flat_map(|t| events_in(t)).collect()
    }

    /// How often the stub was asked about an event.
    fn asked(&self, event: usize) -> usize {
        self.chat.asked().iter().filter(|a| events_in(&a.last()).contains(&event)).count()
    }

    fn state(&self, session: &str) -> String {
        format!("answered: {:?}\n{}", self.mux.texts(session), self.logs())
    }

    fn logs(&self) -> String {
        format!("{}\n{}", self.machine.output(), self.machine.read("/var/log/openclaw-cvm/mux.log"))
    }

    fn pid(&self, service: &str) -> i64 {
        self.machine.service_in(service, &["up", "ready"])["pid"]
            .as_i64()
            .expect("a running service has a pid")
    }

    /// `kill -9`, at once.
    fn kill(&self, service: &str) -> i64 {
        let pid = self.pid(service);
        let _ = kill(self.machine.outside(pid), Signal::SIGKILL);
        pid
    }

    /// Waits for the successor of a service that was killed.
    #[track_caller]
    fn back(&self, service: &str, old: i64) {
        until(&format!("{service} is back\n{}", self.logs()), PATIENCE, || {
            let now = self.machine.service(service);
            if now["state"] == "waiting" {
                // It need not wait for its backoff.
                self.machine.exec(&["cvm", "start", service, "--no-wait"]);
            }
            (now["pid"] != old && now["state"] == "ready").then_some(())
        });
    }
}

/// Xorshift: the same seed is the same run.
struct Dice(u64);

impl Dice {
    fn up_to(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    /// Lets a moment pass that nobody can foresee.
    fn pause(&mut self, at_most_ms: u64) {
        std::thread::sleep(Duration::from_millis(self.up_to(at_most_ms)));
    }
}

// === A message and its answer ===

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

// === Attachments ===

const PNG: &str =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";

fn png() -> Vec<u8> {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.decode(PNG).expect("it is base64")
}

/// The pictures of a question, as they travel.
fn pictures(asked: &Asked) -> Vec<String> {
    let messages = asked.body["messages"].as_array().cloned().unwrap_or_default();
    let parts = messages.iter().filter_map(|m| m["content"].as_array()).flatten();
    parts.filter_map(|p| Some(p["image_url"]["url"].as_str()?.to_owned())).collect()
}

#[test]
fn pictures_reach_the_gateway_whether_they_came_along_or_have_to_be_fetched() {
    let mut world = World::new();
    let session = telegram("1");
    let url = world.mux.file("telegram", "abc", "image/png", &png());
    let mut all = Vec::new();
    for place in [json!({"content": PNG}), json!({"url": url})] {
        let (n, mut event) = world.message(&session);
        let mut attachment = json!({"type": "image", "mimeType": "image/png", "fileName": "dot.png"});
        for (name, value) in place.as_object().expect("an object") {
            attachment[name] = value.clone();
        }
        event["attachments"] = json!([attachment]);
        world.deliver(&event);
        all.push(n);
    }
    // A picture needs no words.
    let (_, mut event) = world.message(&session);
    event["body"] = json!("");
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "content": PNG}]);
    world.deliver(&event);
    world.answers(&session, &all);
    let asked = world.chat.asked();
    assert_eq!(asked.len(), 4, "{asked:#?}");
    for asked in &asked[..3] {
        assert_eq!(pictures(asked), [format!("data:image/png;base64,{PNG}")], "{:#}", asked.body);
    }
    let visits = world.mux.visits(Door::File);
    assert_eq!(visits.len(), 1);
    assert_eq!(visits[0].status, Some(200));
}

#[test]
fn pictures_that_nobody_can_fetch_hold_up_no_other_chat() {
    let mut world = World::new();
    world.mux.ill(Door::File, Ill::Hangs, 1_000_000);
    let url = world.mux.file("telegram", "abc", "image/png", &png());
    for chat in 0..20 {
        let (_, mut event) = world.message(&telegram(&format!("picture-{chat}")));
        event["attachments"] =
            json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "url": url}]);
        world.deliver(&event);
    }
    until("a picture is asked for", PATIENCE, || (!world.mux.visits(Door::File).is_empty()).then_some(()));
    let session = telegram("words");
    let n = world.hand_over(&session);
    world.answers(&session, &[n]);
}

#[test]
fn pictures_are_not_fetched_again_and_again_while_the_gateway_is_away() {
    let mut world = World::new();
    world.chat.ready(false);
    let url = world.mux.file("telegram", "abc", "image/png", &png());
    let (session, other) = (telegram("picture"), telegram("words"));
    let (n, mut event) = world.message(&session);
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "url": url}]);
    world.deliver(&event);
    until("it was asked", PATIENCE, || (world.chat.turned_away() == 1).then_some(()));
    let m = world.hand_over(&other);
    until("the other one was asked often", PATIENCE, || (world.chat.turned_away() >= 6).then_some(()));
    world.chat.ready(true);
    world.answers(&session, &[n]);
    world.answers(&other, &[m]);
    assert!(world.mux.visits(Door::File).len() <= 2, "{:#?}", world.mux.visits(Door::File));
}

#[test]
fn a_gateway_that_takes_no_pictures_gets_the_words_and_is_told_of_them() {
    let script =
        |asked: &Asked, n: usize| if pictures(asked).is_empty() { echo(asked, n) } else { Said::Status(413) };
    let mut world = World::with(script, |builder| builder);
    let session = telegram("1");
    let (n, mut event) = world.message(&session);
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "dot.png", "content": PNG}]);
    world.deliver(&event);
    world.answers(&session, &[n]);
    let asked = world.chat.asked();
    assert_eq!(asked.len(), 3, "{asked:#?}");
    assert!(asked[1].last().contains("dot.png"), "{:#}", asked[1].body);
}

#[test]
fn an_attachment_that_cannot_be_had_does_not_cost_its_message_the_answer() {
    let mut world = World::with(
        |asked, n| if pictures(asked).len() > 8 { Said::Status(400) } else { echo(asked, n) },
        |builder| builder,
    );
    let session = telegram("1");
    let missing = format!("{}/v1/mux/files/telegram?fileId=nobody-has-it", world.mux.url());
    let one = |place: Value| {
        let mut attachment = json!({"type": "image", "mimeType": "image/png", "fileName": "dot.png"});
        attachment.as_object_mut().expect("an object").extend(place.as_object().cloned().unwrap_or_default());
        attachment
    };
    let sets = [
        json!([one(json!({"url": missing}))]),
        json!([one(json!({"url": "http://127.0.0.1:9/refused"}))]),
        json!([one(json!({"content": "!! not base64 !!"}))]),
        json!([{"type": "document", "mimeType": "application/pdf", "fileName": "a.pdf", "content": PNG}]),
        json!([one(json!({}))]),
        // The gateway takes eight at most.
        Value::Array((0..12).map(|_| one(json!({"content": PNG}))).collect()),
    ];
    let mut all = Vec::new();
    for set in sets {
        let (n, mut event) = world.message(&session);
        event["attachments"] = set;
        world.deliver(&event);
        all.push(n);
    }
    world.answers(&session, &all);
}

#[test]
fn the_runtime_token_is_shown_to_the_mux_server_alone() {
    let network = Network::new();
    let mux = Mux::start(&network, DEVICE_ID);
    let elsewhere = Chat::start(&network, 9400, echo);
    let spy = Spy::start(&network, 9401);
    let chat = Chat::start(&network, STUB_PORT, echo);
    let machine = Builder::product()
        .fake_gateway(RELAY)
        .environment("MASTER_KEY", MASTER_KEY)
        .mux(&network, &mux)
        .start();
    let mut world = World { machine, chat, mux, next: 1 };
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    world.up();
    let session = telegram("1");
    let attachment =
        |url: &str| json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "url": url}]);
    let mut all = Vec::new();
    for url in
        ["http://127.0.0.1:9401/v1/mux/files/telegram?fileId=1", "http://127.0.0.1:9200@127.0.0.1:9401/x"]
    {
        let (n, mut event) = world.message(&session);
        event["attachments"] = attachment(url);
        world.deliver(&event);
        all.push(n);
    }
    let own = world.mux.file("telegram", "moved", "image/png", &png());
    world.mux.redirect_files("http://127.0.0.1:9401/redirected");
    let (n, mut event) = world.message(&session);
    event["attachments"] = attachment(&own);
    world.deliver(&event);
    all.push(n);
    world.answers(&session, &all);
    let seen = spy.seen();
    for token in world.mux.tokens() {
        assert!(!seen.contains(&token), "somebody else has seen the token:\n{seen}");
    }
    for secret in [REGISTER_KEY, GATEWAY_TOKEN] {
        assert!(!seen.contains(secret), "somebody else has seen {secret}");
    }
    drop(elsewhere);
}

/// Keeps every byte that comes in, and closes.
struct Spy(Arc<Mutex<Vec<u8>>>);

impl Spy {
    fn start(network: &Network, port: u16) -> Self {
        use std::io::Read as _;
        let listener = network.listen((std::net::Ipv4Addr::LOCALHOST, port).into()).expect("a free port");
        let seen = Arc::new(Mutex::new(Vec::new()));
        let keep = Arc::clone(&seen);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut bytes = [0; 8192];
                let count = stream.read(&mut bytes).unwrap_or(0);
                keep.lock().expect("nobody panics").extend_from_slice(&bytes[..count]);
                let _ =
                    stream.write_all(b"HTTP/1.1 404 No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
            }
        });
        Self(seen)
    }

    fn seen(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("nobody panics")).into_owned()
    }
}

// === Who is let in ===

fn hs256(key: &[u8]) -> impl Fn(&[u8]) -> Vec<u8> {
    let mac = Hmac::<Sha256>::new_from_slice(key).expect("any key will do");
    move |input| mac.clone().chain_update(input).finalize().into_bytes().to_vec()
}

/// What is no token of a delivery, and why.
fn bad_tokens(mux: &Mux) -> Vec<(&'static str, Option<String>)> {
    let now = unix_now();
    let good = mux.token(|_, _| {});
    let parts: Vec<&str> = good.split('.').collect();
    let header: Value = {
        use base64::Engine as _;
        let bytes = base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(parts[0]).expect("it is base64");
        serde_json::from_slice(&bytes).expect("it is JSON")
    };
    let claims = json!({
        "sub": DEVICE_ID, "aud": "openclaw-mux-inbound", "scope": "mux:inbound", "iat": now, "exp": now + 300,
    });
    let with_alg = |alg: &str| {
        let mut header = header.clone();
        header["alg"] = json!(alg);
        header
    };
    let other = {
        use ed25519_dalek::{Signer as _, SigningKey};
        let key = SigningKey::from_bytes(&[99; 32]);
        let (header, claims) = (header.clone(), claims.clone());
        jwt(&header, &claims, |input| key.sign(input).to_bytes().to_vec())
    };
    let public = mux.public_key();
    let mut bad = vec![
        ("none at all", None),
        ("empty", Some(String::new())),
        ("no token", Some("mpt_not-a-token".into())),
        ("one part", Some(parts[0].into())),
        ("two parts", Some(format!("{}.{}", parts[0], parts[1]))),
        ("no signature", Some(format!("{}.{}.", parts[0], parts[1]))),
        ("four parts", Some(format!("{good}.{}", parts[2]))),
        ("alg none", Some(jwt(&with_alg("none"), &claims, |_| Vec::new()))),
        ("alg None, signed with nothing", Some(jwt(&with_alg("None"), &claims, |_| vec![0; 64]))),
        ("HS256 with the public key", Some(jwt(&with_alg("HS256"), &claims, hs256(&public)))),
        ("HS256 with an empty key", Some(jwt(&with_alg("HS256"), &claims, hs256(b"")))),
        ("signed by somebody else", Some(other)),
        ("zeroes as signature", Some(jwt(&header, &claims, |_| vec![0; 64]))),
        ("the register key", Some(REGISTER_KEY.into())),
        ("a runtime token", mux.tokens().first().cloned()),
    ];
    let mut changed = |what, change: &dyn Fn(&mut Value, &mut Value)| {
        bad.push((what, Some(mux.token(|header, claims| change(header, claims)))));
    };
    changed("another alg", &|h, _| h["alg"] = json!("ES256"));
    changed("no alg", &|h, _| drop(h.as_object_mut().map(|h| h.remove("alg"))));
    changed("an extension that has to be understood", &|h, _| h["crit"] = json!(["b64"]));
    changed("another audience", &|_, c| c["aud"] = json!("openclaw-mux-outbound"));
    changed("a longer audience", &|_, c| c["aud"] = json!("openclaw-mux-inbound2"));
    changed("other audiences", &|_, c| c["aud"] = json!(["a", "b"]));
    changed("no audience", &|_, c| c["aud"] = Value::Null);
    changed("another subject", &|_, c| c["sub"] = json!(DEVICE_ID.replace('4', "5")));
    changed("a shorter subject", &|_, c| c["sub"] = json!(DEVICE_ID[..63]));
    changed("no subject", &|_, c| c["sub"] = Value::Null);
    changed("another scope", &|_, c| c["scope"] = json!("mux:outbound"));
    changed("a longer scope", &|_, c| c["scope"] = json!("mux:inbound:read xmux:inbound"));
    changed("no scope", &|_, c| c["scope"] = Value::Null);
    changed("long over", &|_, c| c["exp"] = json!(now - 3600));
    changed("over beyond the tolerance", &|_, c| c["exp"] = json!(now - 70));
    changed("no end", &|_, c| c["exp"] = Value::Null);
    changed("an end in words", &|_, c| c["exp"] = json!("tomorrow"));
    changed("not yet valid", &|_, c| c["nbf"] = json!(now + 3600));
    changed("not yet valid, beyond the tolerance", &|_, c| c["nbf"] = json!(now + 120));
    changed("an unknown key", &|h, _| h["kid"] = json!("0123456789abcdef"));
    bad
}

#[test]
fn a_delivery_without_a_good_token_is_401_and_nobody_hears_of_it() {
    let mut world = World::new();
    let session = telegram("1");
    let now = unix_now();
    let good = world.mux.token(|_, _| {});
    for (what, token) in &bad_tokens(&world.mux) {
        let (_, event) = {
            let n = world.next;
            world.next += 1;
            (n, message("telegram", &session, n, &event_word(n)))
        };
        let answer = world.mux.post(event.to_string().as_bytes(), token.as_deref());
        assert_eq!(answer.expect("an answer").status, 401, "{what}");
    }
    let event = world.message(&session).1.to_string();
    for (what, value) in [
        ("basic", format!("Basic {good}")),
        ("a bare token", good.clone()),
        ("a scheme alone", "Bearer".into()),
    ] {
        let answer = world.mux.client(Duration::from_secs(20)).raw(
            "/v1/mux/inbound",
            &[("Authorization", &value)],
            event.as_bytes(),
        );
        assert_eq!(answer.expect("an answer").status, 401, "{what}");
    }
    // At the edges of what is allowed.
    let mut all = Vec::new();
    let edges: [&dyn Fn(&mut Value); 5] = [
        &|c| c["exp"] = json!(now - 40),
        &|c| c["nbf"] = json!(now + 40),
        &|c| c["aud"] = json!(["a", "openclaw-mux-inbound"]),
        &|c| c["scope"] = json!("a mux:inbound b"),
        &|c| drop(c.as_object_mut().map(|c| c.remove("nbf"))),
    ];
    for (at, edge) in edges.iter().enumerate() {
        let (n, event) = world.message(&session);
        world.mux.bind("telegram", &session);
        let token = world.mux.token(|_, claims| edge(claims));
        let answer = world.mux.post(event.to_string().as_bytes(), Some(&token)).expect("an answer");
        assert!((200..300).contains(&answer.status), "edge {at}: {}", answer.status);
        all.push(n);
    }
    world.answers(&session, &all);
    let fetched = world.mux.visits(Door::Keys).len();
    assert!(fetched <= 3, "the keys were fetched {fetched} times");
}

#[test]
fn a_rotated_key_is_learned_and_strangers_cannot_make_the_client_ask_for_keys() {
    let mut world = World::new();
    let session = telegram("1");
    let first = world.hand_over(&session);
    let before = world.mux.visits(Door::Keys).len();
    for n in 0..200 {
        let token = world.mux.token(|header, _| header["kid"] = json!(format!("{n:016x}")));
        let answer = world.mux.post(b"{}", Some(&token)).expect("an answer");
        assert_eq!(answer.status, 401);
    }
    let asked = world.mux.visits(Door::Keys).len() - before;
    assert!(asked <= 1, "200 strangers made the client ask {asked} times");
    world.mux.rotate();
    let second = world.say(&session);
    until(&format!("the new key is known; {}", world.logs()), PATIENCE, || {
        (world.mux.waiting() == 0).then_some(())
    });
    // The first time it asks for the keys, not for the keys again.
    let visits = world.mux.visits(Door::Keys);
    for pair in visits[1..].windows(2) {
        let apart = pair[1].at - pair[0].at;
        assert!(apart > Duration::from_secs(50), "asked again after {apart:?}");
    }
    world.answers(&session, &[first, second]);
}

#[test]
fn a_client_that_starts_while_there_are_no_keys_takes_events_as_soon_as_there_are() {
    let mut world =
        World::unregistered(echo, |mux| mux.ill(Door::Keys, Ill::Says(503), 2), |builder| builder);
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    let session = telegram("1");
    let n = world.say(&session);
    world.answers(&session, &[n]);
}

#[test]
fn ten_mebibytes_are_taken_and_more_is_not() {
    let mut world = World::new();
    let session = telegram("1");
    let sized = |event: &mut Value, size: usize| {
        event["channelData"]["padding"] = json!("");
        let missing = size - event.to_string().len();
        event["channelData"]["padding"] = json!("x".repeat(missing));
        assert_eq!(event.to_string().len(), size);
    };
    let limit = 10 * 1024 * 1024;
    let (n, mut event) = world.message(&session);
    sized(&mut event, limit);
    world.deliver(&event);
    let (_, mut event) = world.message(&session);
    sized(&mut event, limit + 1);
    let token = world.mux.token(|_, _| {});
    // An answer, or a connection that is closed before all of it was sent.
    if let Ok(answer) = world.mux.post(event.to_string().as_bytes(), Some(&token)) {
        assert_eq!(answer.status, 413);
    }
    // Who has no token does not get to fill memory either.
    let before = memory_kib(&world, "VmHWM:");
    for _ in 0..20 {
        let _ = world.mux.post(&vec![b'x'; 9 * 1024 * 1024], Some("nonsense"));
    }
    let grown = memory_kib(&world, "VmHWM:") - before;
    assert!(grown < 20 * 1024, "grown by {grown} KiB");
    world.answers(&session, &[n]);
}

fn memory_kib(world: &World, key: &str) -> i64 {
    let status = world.machine.read(&format!("/proc/{}/status", world.pid("mux")));
    let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn idle_and_slow_connections_do_not_keep_a_delivery_out() {
    // Each connection is a descriptor here too.
    let (soft, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("a limit");
    let _ = nix::sys::resource::setrlimit(
        nix::sys::resource::Resource::RLIMIT_NOFILE,
        soft.max(8192).min(hard),
        hard,
    );
    let mut world = World::new();
    let session = telegram("1");
    let first = world.hand_over(&session);
    let courier = world.mux.client(Duration::from_secs(5));
    let token = world.mux.token(|_, _| {});
    let mut open = Vec::new();
    for n in 0..soak(1500, 4000) {
        let Ok(mut stream) = courier.connect() else { break };
        let head = format!(
            "POST /v1/mux/inbound HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nAuthorization: Bearer {token}\r\n\r\n{{"
        );
        let said: &[u8] = match n % 4 {
            0 => b"",
            1 => b"POST /v1/mux/inbound HT",
            2 => b"POST /v1/mux/inbound HTTP/1.1\r\nHost: x\r\nX-A: b\r\n",
            _ => head.as_bytes(),
        };
        let _ = stream.write_all(said);
        open.push(stream);
    }
    assert!(open.len() > 500, "{} connections", open.len());
    // As the server does it: again until it is taken.
    let began = Instant::now();
    let mut all = vec![first];
    for _ in 0..5 {
        all.push(world.say(&session));
    }
    until(&format!("the good ones are taken; {}", world.logs()), Duration::from_secs(40), || {
        // The slow ones go on, a byte at a time.
        for stream in open.iter_mut().step_by(50) {
            let _ = stream.write_all(b"x");
        }
        (world.mux.waiting() == 0).then_some(())
    });
    eprintln!("five deliveries among {} connections: {:?}", open.len(), began.elapsed());
    world.answers(&session, &all);
    assert!(memory_kib(&world, "VmRSS:") < 100 * 1024, "{} KiB", memory_kib(&world, "VmRSS:"));
}

// === What a 2xx promises ===

#[test]
fn an_event_that_comes_again_is_taken_again_and_answered_once() {
    let mut world = World::with(
        |asked, n| Said::After(Duration::from_millis(300), echo_text(asked, n)),
        |builder| builder,
    );
    let session = telegram("1");
    let (n, event) = world.message(&session);
    // Before, while and after it is answered, and several at the same time.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| world.deliver(&event));
        }
    });
    until("it is answered", PATIENCE, || (world.events(&session) == [n]).then_some(()));
    world.deliver(&event);
    let pid = world.kill("mux");
    world.back("mux", pid);
    world.deliver(&event);
    let m = world.hand_over(&session);
    world.answers(&session, &[n, m]);
    assert_eq!(world.asked(n), 1);
}

#[test]
fn what_was_handed_over_is_answered_though_the_server_hangs_up_at_once() {
    let mut world = World::new();
    let session = |n: usize| telegram(&(n % 10).to_string());
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let events: Vec<(usize, Value)> = (0..50).map(|n| world.message(&session(n))).collect();
    for (_, event) in &events {
        world.mux.abandon(event).expect("it listens");
    }
    // The server does not know what became of them.
    for (at, (n, event)) in events.iter().enumerate() {
        world.deliver(event);
        expected.entry(session(at)).or_default().push(*n);
    }
    for (session, all) in &expected {
        until(&format!("all of {session} is answered; {}", world.state(session)), PATIENCE, || {
            (world.events(session).len() >= all.len()).then_some(())
        });
    }
    let last: Vec<(String, usize)> = expected.keys().map(|s| (s.clone(), world.hand_over(s))).collect();
    for (session, last) in last {
        until("the last one is answered", PATIENCE, || world.events(&session).contains(&last).then_some(()));
        // Connections that are beside each other have no order.
        let mut events = world.events(&session);
        events.sort_unstable();
        let mut all = expected[&session].clone();
        all.push(last);
        assert_eq!(events, all, "{session}");
    }
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn what_was_taken_is_answered_though_the_client_is_killed_at_once() {
    let mut world = World::new();
    let session = telegram("1");
    let mut all = Vec::new();
    let rounds = soak(6, 60);
    for _ in 0..rounds {
        let pid = world.pid("mux");
        let outside = world.machine.outside(pid);
        let (n, event) = world.message(&session);
        let status = world.mux.deliver(&event);
        let _ = kill(outside, Signal::SIGKILL);
        assert!(matches!(status, Ok(200..300)), "{status:?}");
        all.push(n);
        world.back("mux", pid);
    }
    world.answers(&session, &all);
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn whatever_is_killed_each_event_is_answered_once_and_in_order() {
    let seed = 0x5eed_0001_u64;
    eprintln!("seed {seed:#x}");
    let mut dice = Dice(seed);
    // Every seventh answer takes several sends.
    let script = |asked: &Asked, n: usize| {
        let mut text = echo_text(asked, n);
        if events_in(&asked.last()).first().is_some_and(|e| e.is_multiple_of(7)) {
            text += &" and more of it".repeat(600);
        }
        Said::After(Duration::from_millis(u64::try_from(n * 7 % 60).unwrap_or(0)), text)
    };
    let mut world = World::with(script, |builder| builder);
    let sessions: Vec<String> = (0..4).map(|n| telegram(&n.to_string())).collect();
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let rounds = soak(12, 120);
    for round in 0..rounds {
        for _ in 0..8 {
            let session = &sessions[usize::try_from(dice.up_to(4)).expect("small")];
            expected.entry(session.clone()).or_default().push(world.say(session));
        }
        world.mux.deaf(usize::try_from(dice.up_to(3)).expect("small"));
        dice.pause(400);
        match round % 3 {
            0 => {
                let pid = world.kill("mux");
                world.back("mux", pid);
            }
            1 => drop(world.kill("gateway")),
            _ => {
                world.mux.stop();
                dice.pause(200);
                world.mux.resume();
            }
        }
    }
    world.answered(&expected);
    for (session, events) in &expected {
        for n in events.iter().filter(|n| n.is_multiple_of(7)) {
            let texts = world.mux.texts(session);
            let first = texts.iter().position(|t| events_in(t) == [*n]).expect("it was answered");
            let rest = texts[first + 1..].iter().take_while(|t| events_in(t).is_empty());
            let whole: String =
                std::iter::once(&texts[first]).chain(rest).flat_map(|t| t.split_whitespace()).collect();
            assert!(whole.ends_with(&"andmoreofit".repeat(600)), "the answer to {n} is not whole");
            assert_eq!(whole.matches("andmoreofit").count(), 600, "the answer to {n} has a part twice");
        }
    }
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

// === Order, patience, and the gateway ===

#[test]
fn a_session_is_asked_one_message_at_a_time_and_sixteen_sessions_at_once() {
    // No question is answered before all have been handed over.
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write().expect("nobody has it");
    let its = Arc::clone(&gate);
    let script = move |asked: &Asked, n: usize| {
        drop(its.read());
        Said::Text(echo_text(asked, n))
    };
    let mut world = World::with(script, |builder| builder);
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let hand_over = |world: &mut World, expected: &mut BTreeMap<String, Vec<usize>>| {
        for session in 0..40 {
            let session = telegram(&session.to_string());
            expected.entry(session.clone()).or_default().push(world.hand_over(&session));
        }
    };
    hand_over(&mut world, &mut expected);
    until("sixteen are asked", PATIENCE, || (world.chat.most_at_once().1 >= 16).then_some(()));
    // Whoever could be asked besides would be, while these are taken.
    hand_over(&mut world, &mut expected);
    assert_eq!(world.chat.most_at_once(), (1, 16));
    drop(closed);
    world.answered(&expected);
    assert_eq!(world.chat.most_at_once(), (1, 16));
}

#[test]
fn a_session_that_hangs_does_not_hold_up_the_others() {
    let script = |asked: &Asked, n: usize| {
        if asked.session.as_deref() == Some("agent:main:telegram:direct:stuck") {
            Said::Hang
        } else {
            echo(asked, n)
        }
    };
    let mut world = World::with(script, |builder| builder);
    let stuck = world.hand_over(&telegram("stuck"));
    until("it is asked", PATIENCE, || (world.asked(stuck) == 1).then_some(()));
    let mut expected = BTreeMap::new();
    for session in 0..10 {
        let session = telegram(&session.to_string());
        let n = world.hand_over(&session);
        expected.insert(session, vec![n]);
    }
    world.answered(&expected);
    assert!(world.events(&telegram("stuck")).is_empty());
}

#[test]
fn events_are_taken_while_there_is_no_gateway_and_answered_when_there_is() {
    let mut world = World::new();
    world.machine.ok(&["cvm", "stop", "gateway"]);
    let session = telegram("1");
    let mut all: Vec<usize> = (0..3).map(|_| world.hand_over(&session)).collect();
    world.chat.ready(false);
    world.machine.exec(&["cvm", "start", "gateway", "--no-wait"]);
    world.machine.service_in("gateway", &["up", "ready"]);
    all.push(world.hand_over(&session));
    assert_eq!(world.events(&session), Vec::<usize>::new());
    world.chat.ready(true);
    world.answers(&session, &all);
}

#[test]
fn a_gateway_that_dies_while_it_thinks_is_asked_again() {
    let mut world =
        World::with(|asked, n| if n == 1 { Said::Hang } else { echo(asked, n) }, |builder| builder);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until("it thinks", PATIENCE, || (world.asked(n) == 1).then_some(()));
    world.kill("gateway");
    world.answers(&session, &[n]);
    assert_eq!(world.asked(n), 2);
}

#[test]
fn a_gateway_that_fails_for_a_while_is_asked_again_until_it_does_not() {
    let script = |asked: &Asked, n: usize| match n {
        1 => Said::Status(500),
        2 => Said::Cut,
        3 => Said::Status(503),
        4 => Said::Status(429),
        _ => echo(asked, n),
    };
    let mut world = World::with(script, |builder| builder);
    let session = telegram("1");
    let all = [world.hand_over(&session), world.hand_over(&session)];
    world.answers(&session, &all);
}

#[test]
fn an_agent_that_thinks_long_is_not_asked_twice() {
    let long = Duration::from_secs(soak(15, 400) as u64);
    let mut world = World::with(move |asked, n| Said::After(long, echo_text(asked, n)), |builder| builder);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until(&format!("the answer; {}", world.state(&session)), long + PATIENCE, || {
        (world.events(&session) == [n]).then_some(())
    });
    assert_eq!(world.asked(n), 1);
}

#[test]
fn a_stop_in_order_loses_nothing_and_repeats_nothing() {
    let script = |asked: &Asked, n: usize| Said::After(Duration::from_millis(400), echo_text(asked, n));
    let mut world = World::with(script, |builder| builder);
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for _ in 0..3 {
        for _ in 0..3 {
            for session in ["1", "2", "3"] {
                expected.entry(telegram(session)).or_default().push(world.hand_over(&telegram(session)));
            }
        }
        let World { mut machine, chat, mux, next } = world;
        assert_eq!(machine.stop(), 0, "{}", machine.output());
        world = World { machine: machine.again(|builder| builder), chat, mux, next };
        world.up();
    }
    world.answered(&expected);
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn what_the_gateway_is_about_to_answer_is_sent_before_a_stop_is_over() {
    let script = |asked: &Asked, n: usize| Said::After(Duration::from_secs(2), echo_text(asked, n));
    let mut world = World::with(script, |builder| builder);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until("it is asked", PATIENCE, || (world.asked(n) == 1).then_some(()));
    world.machine.ok(&["cvm", "stop", "mux"]);
    assert_eq!(world.events(&session), [n], "{}", world.logs());
    world.machine.ok(&["cvm", "start", "mux"]);
    world.answers(&session, &[n]);
    assert_eq!(world.asked(n), 1);
}

// === What the server is told ===

#[test]
fn the_status_says_soon_that_an_answer_waits_for_the_server() {
    let mut world =
        World::with(|asked, n| Said::After(Duration::from_secs(3), echo_text(asked, n)), |builder| builder);
    world.mux.ill(Door::Send, Ill::Says(503), 1_000_000);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until("it waits for the server", PATIENCE, || {
        let mux = &world.machine.status()["mux"];
        (mux["waiting"] == 0 && mux["to_send"] == 1).then_some(())
    });
    world.mux.heal();
    world.answers(&session, &[n]);
}

#[test]
fn an_answer_whose_fate_is_unknown_is_sent_again_under_the_same_key_and_arrives_once() {
    let mut world = World::new();
    let mut all = Vec::new();
    let session = telegram("1");
    for ill in [Ill::Lost, Ill::Says(500), Ill::Says(503), Ill::Says(429), Ill::Lost, Ill::Hangs] {
        world.mux.ill(Door::Send, ill, 1);
        let n = world.hand_over(&session);
        all.push(n);
        until(&format!("it is answered after {ill:?}; {}", world.state(&session)), PATIENCE, || {
            (world.mux.visits(Door::Send).last().is_some_and(|v| v.status == Some(200))
                && world.events(&session).last() == Some(&n))
            .then_some(())
        });
        assert_eq!(world.asked(n), 1, "the agent is not asked again after {ill:?}");
    }
    let visits = world.mux.visits(Door::Send);
    let mut keys: BTreeMap<String, usize> = BTreeMap::new();
    for visit in &visits {
        *keys.entry(visit.key.clone().unwrap_or_default()).or_default() += 1;
    }
    assert_eq!(keys.len(), 6, "{keys:?}");
    assert!(keys.values().all(|n| *n == 2), "{keys:?}");
    world.answers(&session, &all);
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn answers_wait_for_a_server_that_is_away_and_keep_their_order() {
    let mut world = World::new();
    let session = telegram("1");
    let mut all = vec![world.hand_over(&session)];
    until("it is answered", PATIENCE, || (world.events(&session) == all).then_some(()));
    world.mux.stop();
    all.extend((0..5).map(|_| world.hand_over(&session)));
    until("the agent has answered", PATIENCE, || (world.asked(all[1]) == 1).then_some(()));
    let pid = world.kill("mux");
    world.back("mux", pid);
    world.mux.resume();
    world.answers(&session, &all);
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn a_refused_token_is_renewed_and_the_answer_sent_once_more() {
    let mut world = World::new();
    let session = telegram("1");
    let mut all = vec![world.hand_over(&session)];
    until("it is answered", PATIENCE, || (world.events(&session) == all).then_some(()));
    let registrations = world.mux.visits(Door::Register).len();
    world.mux.revoke();
    let n = world.hand_over(&session);
    all.push(n);
    until(&format!("it is answered; {}", world.state(&session)), PATIENCE, || {
        (world.events(&session) == all).then_some(())
    });
    assert_eq!(world.mux.visits(Door::Register).len(), registrations + 1);
    let visits = world.mux.visits(Door::Send);
    let statuses: Vec<Option<u16>> = visits.iter().map(|v| v.status).collect();
    assert_eq!(statuses, [Some(200), Some(401), Some(200)]);
    assert_eq!(visits[1].key, visits[2].key);
    // A server that refuses every token is not asked as fast as it can refuse.
    world.mux.ill(Door::Send, Ill::Says(401), 1_000_000);
    let (sends, registered) = (world.mux.visits(Door::Send).len(), world.mux.visits(Door::Register).len());
    all.push(world.hand_over(&session));
    let began = Instant::now();
    until("it is tried", PATIENCE, || (world.mux.visits(Door::Send).len() > sends + 3).then_some(()));
    let took = began.elapsed();
    assert!(took > Duration::from_millis(900), "four attempts in {took:?}");
    assert!(world.mux.visits(Door::Register).len() - registered <= 4);
    world.mux.heal();
    world.answers(&session, &all);
}

#[test]
fn an_event_without_a_route_ends_and_holds_up_nobody() {
    let mut world = World::with(
        |asked, n| Said::After(Duration::from_millis(500), echo_text(asked, n)),
        |builder| builder,
    );
    let (gone, session) = (telegram("gone"), telegram("1"));
    let lost = world.hand_over(&gone);
    until("it is asked", PATIENCE, || (world.asked(lost) == 1).then_some(()));
    world.mux.unbind("telegram", &gone);
    until("it is refused", PATIENCE, || {
        world.mux.visits(Door::Send).iter().any(|v| v.status == Some(403)).then_some(())
    });
    let n = world.hand_over(&session);
    world.answers(&session, &[n]);
    // With a route again, the next message is answered, and the old answer does not come.
    let n = world.hand_over(&gone);
    world.answers(&gone, &[n]);
    let refused = world.mux.visits(Door::Send).into_iter().filter(|v| v.status == Some(403)).count();
    assert_eq!(refused, 1);
}

// === Registration ===

#[test]
fn a_token_is_renewed_before_it_ends_and_not_without_need() {
    // Of a life of a day, six hours are left in three seconds.
    let life = Duration::from_secs(6 * 3600 + 3);
    let mut world = World::unregistered(echo, |mux| mux.token_life(life), |builder| builder);
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    let first = world.mux.visits(Door::Register)[0].at;
    // Once it has a token for a day, there is no need for another.
    world.mux.token_life(Duration::from_hours(24));
    until(&format!("it registers again; {}", world.logs()), PATIENCE, || {
        (world.mux.visits(Door::Register).len() == 2).then_some(())
    });
    let second = world.mux.visits(Door::Register)[1].at;
    assert!(second - first >= Duration::from_millis(2500), "after {:?}", second - first);
    world.up();
    let session = telegram("1");
    let all: Vec<usize> = (0..10).map(|_| world.hand_over(&session)).collect();
    world.answers(&session, &all);
    assert_eq!(world.mux.visits(Door::Register).len(), 2);
    let tokens = world.mux.visits(Door::Send).into_iter().map(|v| v.authorization);
    assert_eq!(tokens.collect::<std::collections::BTreeSet<_>>().len(), 1);
}

#[test]
fn tokens_with_short_lives_do_not_make_the_client_register_all_the_time() {
    let life = Duration::from_secs(60);
    let mut world = World::unregistered(echo, |mux| mux.token_life(life), |builder| builder);
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    world.up();
    let began = Instant::now();
    let session = telegram("1");
    let mut all = Vec::new();
    // While something goes on.
    while began.elapsed() < Duration::from_secs(4) {
        all.push(world.hand_over(&session));
        until("it is answered", PATIENCE, || (world.events(&session).len() == all.len()).then_some(()));
    }
    let count = world.mux.visits(Door::Register).len();
    assert!(count <= 5, "{count} registrations in {:?}", began.elapsed());
    assert!(world.mux.visits(Door::Send).iter().all(|v| v.status == Some(200)));
}

/// Mostly they wait, so they do it beside each other.
fn beside_each_other<T: Copy + Send + Sync>(cases: &[T], case: impl Fn(T) + Sync) {
    std::thread::scope(|scope| {
        let all: Vec<_> = cases.iter().map(|c| scope.spawn(|| case(*c))).collect();
        for one in all {
            one.join().expect("the case holds");
        }
    });
}

#[test]
fn mistakes_of_the_configuration_are_in_the_status_and_the_client_keeps_trying() {
    beside_each_other(&[400, 401, 404, 409], |status| {
        let refuses = |mux: &Mux| mux.ill(Door::Register, Ill::Says(status), 1_000_000);
        let mut world = World::unregistered(echo, refuses, |builder| builder);
        let told = until(&format!("the status speaks of {status}; {}", world.logs()), PATIENCE, || {
            let error = world.machine.status()["mux"]["register_error"].as_str()?.to_owned();
            error.contains(&status.to_string()).then_some(error)
        });
        eprintln!("{told}");
        let shown = String::from_utf8_lossy(&world.machine.exec(&["cvm", "status"]).stdout).into_owned();
        assert!(shown.split_whitespace().any(|word| word.contains(&status.to_string())), "{shown}");
        assert!(!(told + &shown).contains(REGISTER_KEY));
        assert!(world.mux.visits(Door::Register).len() <= 3, "slowly");
        world.mux.heal();
        // Slowly is every five minutes; an operator need not wait for that.
        if soak(0, 1) == 0 {
            world.machine.ok(&["cvm", "restart", "mux"]);
        }
        let told = || format!("it has registered after {status}; {}", world.logs());
        until(&told(), Duration::from_secs(400), || world.mux.registered().then_some(()));
        world.up();
        let session = telegram("1");
        let n = world.hand_over(&session);
        world.answers(&session, &[n]);
    });
}

#[test]
fn a_server_that_is_not_well_is_asked_again_after_longer_and_longer_waits() {
    beside_each_other(&[Ill::Says(500), Ill::Says(503), Ill::Lost], |ill| {
        let world = World::unregistered(echo, |mux| mux.ill(Door::Register, ill, 4), |builder| builder);
        until(&format!("it has registered; {}", world.logs()), PATIENCE, || {
            (world.mux.visits(Door::Register).len() == 5).then_some(())
        });
        let visits = world.mux.visits(Door::Register);
        let waits: Vec<f64> = visits.windows(2).map(|pair| (pair[1].at - pair[0].at).as_secs_f64()).collect();
        // 1, 2, 4, 8 seconds, or some part of them by chance.
        assert!(waits[0] >= 0.4 && waits[3] >= 3.5 && waits[3] > waits[0] * 2.0, "{waits:?}");
        assert!(waits.iter().sum::<f64>() < 30.0, "{waits:?}");
    });
}

// === Secrets ===

#[test]
fn no_key_and_no_token_is_in_a_log_a_command_line_or_an_environment() {
    let mut world = World::with(
        |asked, n| if n % 5 == 1 { Said::Status(500) } else { echo(asked, n) },
        |b| {
            b.environment("LOG_LEVEL", "trace").environment("LOG_SERVICES", "1").file(
                "/run/admin-token",
                ADMIN_TOKEN,
                0o600,
            )
        },
    );
    let session = telegram("1");
    let mut all = vec![world.hand_over(&session)];
    // What goes wrong is what is talked about.
    world.mux.ill(Door::Send, Ill::Says(500), 1);
    all.push(world.hand_over(&session));
    world.mux.revoke();
    all.push(world.hand_over(&session));
    world.mux.stop();
    all.push(world.hand_over(&session));
    world.mux.resume();
    let url = world.mux.file("telegram", "x", "image/png", &png());
    let (n, mut event) = world.message(&session);
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "url": url}]);
    world.deliver(&event);
    all.push(n);
    let delivery_token = world.mux.token(|_, _| {});
    let _ = world.mux.post(b"{", Some(&delivery_token));
    let bad = world.mux.token(|_, c| c["aud"] = json!("x"));
    let _ = world.mux.post(b"{}", Some(&bad));
    world.answers(&session, &all);
    // Somebody who pairs while others look at what runs.
    let mut pairing =
        world.machine.command(&["cvm", "pair", "telegram", "--server", "http://127.0.0.1:9300"]);
    let asked = world.chat.asked().len();
    world.chat.script(|_, _| Said::Hang);
    let mut pairing = pairing.env("MUX_ADMIN_TOKEN_FILE", "/run/admin-token").spawn().expect("nsenter runs");
    until("it asks", PATIENCE, || (world.chat.asked().len() > asked).then_some(()));
    let mut secrets = world.mux.tokens();
    assert!(secrets.len() >= 2);
    secrets.extend([REGISTER_KEY, ADMIN_TOKEN, MASTER_KEY, &delivery_token, &bad].map(str::to_owned));
    let mut looked_at = 0;
    for process in world.machine.processes() {
        for file in ["environ", "cmdline"] {
            let path = world.machine.path(&format!("/proc/{}/{file}", process.pid));
            let Ok(bytes) = std::fs::read(path) else { continue };
            looked_at += 1;
            for secret in &secrets {
                assert!(!contains(&bytes, secret), "{secret} is in {file} of {}", process.arguments);
            }
            // The gateway has its own.
            let gateways = process.arguments.contains("relay") || process.arguments.contains("gateway");
            assert!(
                gateways || !contains(&bytes, GATEWAY_TOKEN),
                "the gateway's token is in {file} of {}",
                process.arguments
            );
        }
    }
    assert!(looked_at > 10, "{looked_at} files");
    world.chat.stop();
    let _ = pairing.wait();
    let status = world.machine.ok(&["cvm", "status", "--json"]) + &world.machine.ok(&["cvm", "status"]);
    secrets.push(GATEWAY_TOKEN.into());
    // What people wrote to each other is nobody's business either.
    secrets.extend(all.iter().map(|n| event_word(*n)));
    assert_eq!(world.machine.stop(), 0, "{}", world.logs());
    let mut logs = vec![
        ("the output".to_owned(), world.machine.output().into_bytes()),
        ("the status".into(), status.into_bytes()),
    ];
    let scratch = world.machine.data();
    logs.extend(files(&scratch).into_iter().filter(|(name, _)| name.contains("/log")));
    for (name, bytes) in &logs {
        for secret in &secrets {
            assert!(!contains(bytes, secret), "{secret} is in {name}");
        }
    }
    // On the volume may be what people wrote, but nothing that opens a door.
    for (name, bytes) in files(&scratch) {
        for secret in [REGISTER_KEY, ADMIN_TOKEN, MASTER_KEY, GATEWAY_TOKEN] {
            assert!(!contains(&bytes, secret), "{secret} is in {name}");
        }
    }
}

fn contains(bytes: &[u8], text: &str) -> bool {
    bytes.windows(text.len()).any(|w| w == text.as_bytes())
}

fn files(dir: &std::path::Path) -> Vec<(String, Vec<u8>)> {
    let (mut found, mut open) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let kind = entry.file_type().expect("an entry has a type");
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                found.push((
                    entry.path().display().to_string(),
                    std::fs::read(entry.path()).unwrap_or_default(),
                ));
            }
        }
    }
    found
}

// === Loss of the whole machine ===

#[test]
fn what_was_taken_is_answered_once_though_the_machine_and_its_disk_are_lost() {
    let cloud = Cloud::new();
    let mux = Mux::start(&cloud.network, DEVICE_ID);
    let script = |asked: &Asked, n: usize| {
        Said::After(Duration::from_millis(u64::try_from(n * 53 % 400).unwrap_or(0)), echo_text(asked, n))
    };
    let chat = Chat::start(&cloud.network, STUB_PORT, script);
    let start = || cloud.machine().fake_gateway(RELAY).mux(&cloud.network, &mux).start();
    let mut machine = start();
    machine.service_in("mux", &["ready"]);
    let mut dice = Dice(0x5eed_0002);
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut n = 0;
    for round in 0..soak(3, 20) {
        for _ in 0..5 {
            n += 1;
            let session = telegram(&dice.up_to(3).to_string());
            mux.enqueue(&message("telegram", &session, n, &event_word(n)));
            expected.entry(session).or_default().push(n);
        }
        let before = mux.waiting();
        until("some were taken", PATIENCE, || (mux.waiting() + 3 <= before).then_some(()));
        dice.pause(2500);
        let began = Instant::now();
        machine.destroy();
        drop(machine);
        machine = start();
        machine.service_in("mux", &["ready"]);
        eprintln!("round {round}: {} waiting, a new machine after {:?}", mux.waiting(), began.elapsed());
    }
    let all: usize = expected.values().map(Vec::len).sum();
    let told = || format!("{}\n{}", machine.output(), machine.read("/var/log/openclaw-cvm/mux.log"));
    until(&format!("all is answered; {}", told()), 2 * PATIENCE, || {
        (mux.waiting() == 0 && mux.sent().len() >= all).then_some(())
    });
    // Nothing can come after what came after all.
    for (session, expected) in &mut expected {
        n += 1;
        mux.enqueue(&message("telegram", session, n, &event_word(n)));
        expected.push(n);
        let events = || mux.texts(session).iter().flat_map(|t| events_in(t)).collect::<Vec<_>>();
        until(&format!("{session} is answered to the end; {}", told()), PATIENCE, || {
            events().contains(&n).then_some(())
        });
        assert_eq!(&events(), expected, "{session}: {:#?}\n{:#?}", mux.texts(session), mux.deliveries());
    }
    eprintln!("{} conflicts", mux.conflicts().len());
    machine.destroy();
    drop(chat);
}

#[test]
fn what_the_bucket_does_not_have_is_not_acknowledged_and_answered_once_all_the_same() {
    let cloud = Cloud::new();
    let mux = Mux::start(&cloud.network, DEVICE_ID);
    let chat = Chat::start(&cloud.network, STUB_PORT, echo);
    let machine = cloud
        .machine()
        .fake_gateway(RELAY)
        .mux(&cloud.network, &mux)
        .environment("MUX_ACK_REPLICATION_WAIT", "2")
        .start();
    machine.service_in("mux", &["ready"]);
    until("the client has registered", PATIENCE, || mux.registered().then_some(()));
    let session = telegram("1");
    let unreplicated = || machine.status()["mux"]["unreplicated_acks"].as_u64().unwrap_or(0);
    let told = || format!("{}\n{}", machine.output(), machine.read("/var/log/openclaw-cvm/mux.log"));
    for n in 1..=5 {
        // On a busy machine the bucket may take longer than the client waits.
        until(&format!("event {n} is taken; {}", told()), PATIENCE, || {
            let status = mux.deliver(&message("telegram", &session, n, &event_word(n)));
            matches!(status, Ok(200..300)).then_some(())
        });
    }
    let before = unreplicated();
    cloud.proxy.refuse(true);
    // The second time it is known already, and no safer.
    let event = message("telegram", &session, 6, &event_word(6));
    for _ in 0..2 {
        let began = Instant::now();
        let status = mux.deliver(&event);
        assert!(matches!(status, Ok(503)), "{status:?}");
        assert!(began.elapsed() > Duration::from_millis(1900), "after {:?}", began.elapsed());
    }
    until("it is counted", PATIENCE, || (unreplicated() == before + 2).then_some(()));
    cloud.proxy.heal();
    mux.enqueue(&event);
    mux.enqueue(&message("telegram", &session, 7, &event_word(7)));
    let events = || mux.texts(&session).iter().flat_map(|t| events_in(t)).collect::<Vec<_>>();
    until(&format!("all of it is answered; {}", told()), PATIENCE, || events().contains(&7).then_some(()));
    assert_eq!(events(), [1, 2, 3, 4, 5, 6, 7]);
    until("it is taken", PATIENCE, || (mux.waiting() == 0).then_some(()));
    drop(machine);
    drop(chat);
}

// === Pairing ===

#[test]
fn an_operator_gets_a_pairing_token_as_text_as_json_and_as_a_picture() {
    let world = World::new();
    let pair = |words: &[&str], token: &str| {
        let mut command = world.machine.command(words);
        command.env("MUX_ADMIN_TOKEN", token).env("TERM", "xterm");
        let output = command.output().expect("nsenter runs");
        let all = [&output.stdout[..], &output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&all).into_owned())
    };
    let (code, said) = pair(&["cvm", "pair", "telegram"], ADMIN_TOKEN);
    assert_eq!(code, Some(0), "{said}");
    let link = "https://t.me/a_bot?start=mpt_token-of-a-pairing";
    for part in ["mpt_token-of-a-pairing", "/start mpt_token-of-a-pairing", link] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(!said.contains('█'), "a picture is for people:\n{said}");
    let (code, said) = pair(&["cvm", "pair", "discord", "--ttl", "60", "--json"], ADMIN_TOKEN);
    assert_eq!(code, Some(0), "{said}");
    let answer: Value = serde_json::from_str(&said).expect("JSON and nothing else");
    assert_eq!((&answer["token"], &answer["channel"]), (&json!("mpt_token-of-a-pairing"), &json!("discord")));
    let left = answer["expiresAtMs"].as_i64().expect("a time") / 1000 - unix_now();
    assert!((50..=60).contains(&left), "{left} s");

    let wide = "stty cols 100 rows 40; exec cvm pair telegram";
    let (code, said) = pair(&["script", "-qec", wide, "/dev/null"], ADMIN_TOKEN);
    assert_eq!(code, Some(0), "{said}");
    let rows: Vec<&str> = said.lines().filter(|line| line.contains(['█', '▀', '▄'])).collect();
    // The link needs 33 modules a side, and two rows of them are a line.
    assert!((14..30).contains(&rows.len()), "{} rows\n{said}", rows.len());
    assert!(said.contains(link));
    let narrow = "stty cols 20 rows 40; exec cvm pair telegram";
    let (_, said) = pair(&["script", "-qec", narrow, "/dev/null"], ADMIN_TOKEN);
    assert!(said.contains("mpt_token-of-a-pairing") && !said.contains('█'), "{said}");

    let (code, said) = pair(&["cvm", "pair", "telegram"], "wrong-canary-1");
    assert!(code != Some(0) && said.contains("401"), "{code:?} {said}");
    assert!(!said.contains("wrong-canary-1"));
    let (code, _) = pair(&["cvm", "pair", "telegram"], "");
    assert_ne!(code, Some(0));
    let (code, said) = pair(&["cvm", "pair", "telegram", "--server", "http://127.0.0.1:9"], ADMIN_TOKEN);
    assert!(code != Some(0) && !said.contains(ADMIN_TOKEN), "{code:?} {said}");
}

#[test]
fn another_device_is_not_said_to_be_reached_where_this_one_is() {
    let network = Network::new();
    let spy = Spy::start(&network, 9401);
    let machine = Builder::product().fake_gateway(RELAY).network(&network).start();
    let pair = |more: &[&str]| {
        let words = [&["cvm", "pair", "telegram", "--server", "http://127.0.0.1:9401"], more].concat();
        let mut command = machine.command(&words);
        command.env("MUX_ADMIN_TOKEN", ADMIN_TOKEN).env("MASTER_KEY", MASTER_KEY);
        command.env("MUX_INBOUND_URL", "https://here.example.org/v1/mux/inbound");
        let output = command.output().expect("nsenter runs");
        assert_ne!(output.status.code(), Some(0), "the spy answers 404");
        spy.seen()
    };
    let other = "0".repeat(64);
    let seen = pair(&["--device", &other]);
    assert!(seen.contains(&other) && !seen.contains("here.example.org"), "{seen}");
    let seen = pair(&[]);
    assert!(seen.contains("here.example.org"), "{seen}");
}

// === The real gateway ===

/// What a model would say that shows what it was told.
fn model(asked: &Asked, _: usize) -> Said {
    let words: Vec<String> = events_in(&asked.everything()).into_iter().map(event_word).collect();
    Said::Text(format!("I know {} and {} pictures", words.join(" "), pictures(asked).len()))
}

#[test]
fn the_real_gateway_answers_with_each_of_its_agents_remembers_its_sessions_and_survives_its_own_death() {
    let network = Network::new();
    let mux = Mux::start(&network, DEVICE_ID);
    let chat = Chat::start(&network, MODEL_PORT, model);
    let machine = Builder::product()
        .real_gateway()
        .environment("MASTER_KEY", MASTER_KEY)
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
        .environment("OPENCLAW_CONFIG_B64", &two_agents())
        .mux(&network, &mux)
        .start();
    let mut world = World { machine, chat, mux, next: 1 };
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    let (one, two) = (telegram("one"), telegram("two"));
    // Before there is a gateway that could answer.
    let first = world.say(&one);
    let last = |world: &World, session: &str, count: usize| {
        let found = before(2 * PATIENCE, || world.mux.texts(session).get(count - 1).cloned());
        found.unwrap_or_else(|| {
            let gateway = world.machine.read("/var/log/openclaw-cvm/gateway.log");
            panic!("no {count} answers; {}\n{gateway}", world.state(session))
        })
    };
    assert_eq!(events_in(&last(&world, &one, 1)), [first]);
    let other = world.say(&two);
    assert_eq!(events_in(&last(&world, &two, 1)), [other]);
    let (second, mut event) = world.message(&one);
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "content": PNG}]);
    world.mux.enqueue(&event);
    let said = last(&world, &one, 2);
    // With what it said itself: the conversation is told whole.
    let known = events_in(&said);
    assert!(known.contains(&first) && known.contains(&second) && !known.contains(&other), "{said}");
    assert!(said.ends_with("and 1 pictures"), "{said}");
    // It dies while the model thinks.
    let before = world.chat.asked().len();
    world.chat.script(move |asked, n| if n == before + 1 { Said::Hang } else { model(asked, n) });
    let third = world.say(&two);
    until("the model thinks", PATIENCE, || (world.chat.asked().len() > before).then_some(()));
    world.kill("gateway");
    let said = last(&world, &two, 2);
    let known = events_in(&said);
    assert!(known.contains(&other) && known.contains(&third) && !known.contains(&first), "{said}");
    let fourth = world.say(&two);
    assert!(events_in(&last(&world, &two, 3)).contains(&fourth));
    assert_eq!((world.mux.texts(&one).len(), world.mux.texts(&two).len()), (2, 3));
    // The session names its agent; one that names none is of `main`.
    for (session, model) in [("agent:bob:telegram:direct:one", "m2"), ("telegram:three", "m"), (&two, "m")] {
        let before = world.mux.texts(session).len();
        let n = world.say(session);
        assert!(events_in(&last(&world, session, before + 1)).contains(&n));
        let asked = world.chat.asked().into_iter().filter(|a| events_in(&a.everything()).contains(&n));
        let models: Vec<Value> = asked.map(|a| a.body["model"].clone()).collect();
        assert!(!models.is_empty() && models.iter().all(|m| m == model), "{session}: {models:?}");
    }
    // The schemas that the package says it knows are those of the databases that it makes: a boot relies on it.
    let package: Value =
        serde_json::from_str(&world.machine.read("/opt/openclaw/node_modules/openclaw/package.json"))
            .expect("the package says what it is");
    for (name, file) in [
        ("state", "state/openclaw.sqlite"),
        ("agent", "agents/main/agent/openclaw-agent.sqlite"),
        ("agent", "agents/bob/agent/openclaw-agent.sqlite"),
    ] {
        let db = rusqlite::Connection::open_with_flags(
            world.machine.data().join("openclaw").join(file),
            rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY,
        );
        let number = db.and_then(|db| db.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)));
        assert_eq!(number.ok(), package["openclaw"]["schemaVersions"][name].as_i64(), "{file}");
    }
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}
