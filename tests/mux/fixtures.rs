//! A machine with a mux client, between a mux-server that is strict about the contract and a stub that answers as a test
//! wants it.

use cvm_harness::chat::Asked;
use cvm_harness::machine::{DEVICE_ID, MASTER_KEY, PATIENCE, RELAY, STUB_PORT};
use cvm_harness::mux::message;
use cvm_harness::{Builder, Chat, Machine, Mux, Network, Said, until};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write as _;
use std::sync::{Arc, Mutex};

/// Words that say which event they belong to.
pub(crate) fn event_word(n: usize) -> String {
    format!("ev{n}x")
}

/// The events that a text speaks of.
pub(crate) fn events_in(text: &str) -> Vec<usize> {
    let words = text.split(|c: char| !c.is_ascii_alphanumeric());
    words.filter_map(|w| w.strip_prefix("ev")?.strip_suffix('x')?.parse().ok()).collect()
}

/// Says which event it answers, and never the same twice: who asks again has another answer.
pub(crate) fn echo(asked: &Asked, number: usize) -> Said {
    Said::Text(echo_text(asked, number))
}

pub(crate) fn echo_text(asked: &Asked, number: usize) -> String {
    let words: Vec<String> = events_in(&asked.last()).into_iter().map(event_word).collect();
    format!("answer {number} to {}", words.join(" "))
}

pub(crate) fn telegram(session: &str) -> String {
    format!("agent:main:telegram:direct:{session}")
}

/// A machine with a client, a mux-server and a stub.
pub(crate) struct World {
    pub(crate) machine: Machine,
    pub(crate) chat: Chat,
    pub(crate) mux: Mux,
    pub(crate) next: usize,
}

impl World {
    pub(crate) fn new() -> Self {
        Self::with(echo, |builder| builder)
    }

    pub(crate) fn with(
        script: impl Fn(&Asked, usize) -> Said + Send + Sync + 'static,
        change: impl FnOnce(Builder) -> Builder,
    ) -> Self {
        let world = Self::unregistered(script, |_| {}, change);
        until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
        world.up();
        world
    }

    /// For those who have something to say to the server before the client does.
    pub(crate) fn unregistered(
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
    pub(crate) fn up(&self) {
        self.machine.service_in("gateway", &["ready"]);
        self.machine.service_in("mux", &["ready"]);
    }

    /// The next message of a session, and its number.
    pub(crate) fn message(&mut self, session: &str) -> (usize, Value) {
        let n = self.next;
        self.next += 1;
        let body = format!("hello {}", event_word(n));
        (n, message("telegram", session, n, &body))
    }

    /// A message that the courier delivers; its number.
    pub(crate) fn say(&mut self, session: &str) -> usize {
        let (n, event) = self.message(session);
        self.mux.enqueue(&event);
        n
    }

    /// A message that is taken at the first attempt.
    #[track_caller]
    pub(crate) fn hand_over(&mut self, session: &str) -> usize {
        let (n, event) = self.message(session);
        self.deliver(&event);
        n
    }

    #[track_caller]
    pub(crate) fn deliver(&self, event: &Value) {
        let status = self.mux.deliver(event);
        assert!(matches!(status, Ok(200..300)), "{status:?}\n{}", self.logs());
    }

    /// Waits until a session has exactly these answers, in this order. For the order in a session
    /// nothing can be on its way any more when an event that came after all others is answered.
    #[track_caller]
    pub(crate) fn answered(&mut self, expected: &BTreeMap<String, Vec<usize>>) {
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
    pub(crate) fn answers(&mut self, session: &str, expected: &[usize]) {
        self.answered(&BTreeMap::from([(session.to_owned(), expected.to_vec())]));
    }

    /// The events that a session has answers to, in the order of the answers.
    pub(crate) fn events(&self, session: &str) -> Vec<usize> {
        self.mux.texts(session).iter().flat_map(|t| events_in(t)).collect()
    }

    /// How often the stub was asked about an event.
    pub(crate) fn asked(&self, event: usize) -> usize {
        self.chat.asked().iter().filter(|a| events_in(&a.last()).contains(&event)).count()
    }

    pub(crate) fn state(&self, session: &str) -> String {
        format!("answered: {:?}\n{}", self.mux.texts(session), self.logs())
    }

    pub(crate) fn logs(&self) -> String {
        format!("{}\n{}", self.machine.output(), self.machine.read("/var/log/openclaw-cvm/mux.log"))
    }

    pub(crate) fn pid(&self, service: &str) -> i64 {
        self.machine.service_in(service, &["up", "ready"])["pid"]
            .as_i64()
            .expect("a running service has a pid")
    }

    /// `kill -9`, at once.
    pub(crate) fn kill(&self, service: &str) -> i64 {
        let pid = self.pid(service);
        let _ = kill(self.machine.outside(pid), Signal::SIGKILL);
        pid
    }

    /// Waits for the successor of a service that was killed.
    #[track_caller]
    pub(crate) fn back(&self, service: &str, old: i64) {
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

pub(crate) const PNG: &str =
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";

pub(crate) fn png() -> Vec<u8> {
    use base64::Engine as _;
    base64::prelude::BASE64_STANDARD.decode(PNG).expect("it is base64")
}

/// The pictures of a question, as they travel.
pub(crate) fn pictures(asked: &Asked) -> Vec<String> {
    let messages = asked.body["messages"].as_array().cloned().unwrap_or_default();
    let parts = messages.iter().filter_map(|m| m["content"].as_array()).flatten();
    parts.filter_map(|p| Some(p["image_url"]["url"].as_str()?.to_owned())).collect()
}

/// Keeps every byte that comes in, and closes.
pub(crate) struct Spy(Arc<Mutex<Vec<u8>>>);

impl Spy {
    pub(crate) fn start(network: &Network, port: u16) -> Self {
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

    pub(crate) fn seen(&self) -> String {
        String::from_utf8_lossy(&self.0.lock().expect("nobody panics")).into_owned()
    }
}
