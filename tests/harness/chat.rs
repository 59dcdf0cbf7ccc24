//! What answers `POST /v1/chat/completions`: a model for the real gateway, and in the place of a
//! gateway when a test has to decide what it does.
//!
//! It keeps what it was asked, and answers what its script says, in a stream or at once.

use crate::machine::base64;
use crate::network::Network;
use crate::serve::{Reply, Request, Server};
use crate::wait::lock;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Where [`local_model`] has its model.
pub const MODEL_PORT: u16 = 9100;

const CONFIG: &str = r#"{
  "gateway": {"mode": "local", "bind": "lan", "port": 18789,
    "auth": {"mode": "token", "token": "${OPENCLAW_GATEWAY_TOKEN}"},
    "http": {"endpoints": {"chatCompletions": {"enabled": true}}}},
  "update": {"checkOnStart": false},
  "agents": {"defaults": {"model": {"primary": "local/m"}}},
  "models": {"mode": "merge", "providers": {"local": {"baseUrl": "http://127.0.0.1:9100/v1", "apiKey": "sk-local",
    "api": "openai-completions", "models": [{"id": "m", "name": "M", "input": ["text", "image"], "contextWindow": 120000, "maxTokens": 4096}]}}}
}
"#;

/// `OPENCLAW_CONFIG_B64` for a real gateway whose model is a [`Chat`] at [`MODEL_PORT`].
pub fn local_model() -> String {
    base64(CONFIG)
}

/// The same for one with two agents: `main`, whose model is `m`, and `bob`, whose model is `m2`.
pub fn two_agents() -> String {
    let mut config: Value = serde_json::from_str(CONFIG).expect("it is JSON");
    config["agents"]["ownership"] = json!("explicit");
    config["agents"]["entries"] = json!({"main": {}, "bob": {"model": "local/m2"}});
    let models = &mut config["models"]["providers"]["local"]["models"];
    let mut second = models[0].clone();
    second["id"] = json!("m2");
    models.as_array_mut().expect("it is a list").push(second);
    base64(config.to_string())
}

/// One question.
#[derive(Debug, Clone)]
pub struct Asked {
    pub at: Instant,
    /// `x-openclaw-session-key`.
    pub session: Option<String>,
    /// `x-openclaw-message-channel`.
    pub channel: Option<String>,
    pub authorization: Option<String>,
    pub body: Value,
}

impl Asked {
    /// What the user said last, without pictures.
    pub fn last(&self) -> String {
        self.of("user").last().map(text).unwrap_or_default()
    }

    /// How many messages are the user's.
    pub fn users(&self) -> usize {
        self.of("user").count()
    }

    /// Everything in the conversation that is text.
    pub fn everything(&self) -> String {
        let all = self.body["messages"].as_array().into_iter().flatten();
        all.map(text).collect::<Vec<_>>().join("\n")
    }

    fn of<'a>(&'a self, role: &'a str) -> impl Iterator<Item = &'a Value> {
        self.body["messages"].as_array().into_iter().flatten().filter(move |m| m["role"] == role)
    }
}

/// The text of a message, whole or in parts.
fn text(message: &Value) -> String {
    match &message["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|p| p["text"].as_str()).collect::<Vec<_>>().join("\n"),
        _ => String::new(),
    }
}

/// What is answered.
#[derive(Debug, Clone)]
pub enum Said {
    Text(String),
    After(Duration, String),
    Status(u16),
    /// Nothing comes, as long as the other side waits.
    Hang,
    /// The connection is closed.
    Cut,
}

type Script = dyn Fn(&Asked, usize) -> Said + Send + Sync;

struct State {
    asked: Vec<Asked>,
    script: Arc<Script>,
    /// What `/readyz` says, and whether questions are taken.
    ready: bool,
    turned_away: usize,
    at_once: HashMap<String, usize>,
    most_in_a_session: usize,
    most: usize,
}

pub struct Chat {
    state: Arc<Mutex<State>>,
    server: Server,
}

impl Chat {
    /// At 127.0.0.1 of a network. The script gets the question and its number, from 1.
    pub fn start(
        network: &Network,
        port: u16,
        script: impl Fn(&Asked, usize) -> Said + Send + Sync + 'static,
    ) -> Self {
        let state = State {
            asked: Vec::new(),
            script: Arc::new(script),
            ready: true,
            turned_away: 0,
            at_once: HashMap::new(),
            most_in_a_session: 0,
            most: 0,
        };
        let state = Arc::new(Mutex::new(state));
        let its = Arc::clone(&state);
        let server =
            Server::start(network, (Ipv4Addr::LOCALHOST, port).into(), move |request| answer(request, &its));
        Self { state, server }
    }

    pub fn script(&self, script: impl Fn(&Asked, usize) -> Said + Send + Sync + 'static) {
        lock(&self.state).script = Arc::new(script);
    }

    pub fn ready(&self, yes: bool) {
        lock(&self.state).ready = yes;
    }

    /// All questions so far.
    pub fn asked(&self) -> Vec<Asked> {
        lock(&self.state).asked.clone()
    }

    /// How many questions came while it was not ready.
    pub fn turned_away(&self) -> usize {
        lock(&self.state).turned_away
    }

    /// How many questions were being answered at the same time: at most in any one session, and
    /// in all together.
    pub fn most_at_once(&self) -> (usize, usize) {
        let state = lock(&self.state);
        (state.most_in_a_session, state.most)
    }

    pub fn stop(&self) {
        self.server.stop();
    }

    pub fn resume(&self) {
        self.server.resume();
    }
}

fn answer(request: &Request<'_>, state: &Mutex<State>) -> Reply {
    if request.method() != "POST" {
        let ready = lock(state).ready;
        let probed = json!({"ok": true, "status": "live", "ready": ready, "failing": [], "data": []});
        let status = if ready || request.path() != "/readyz" { 200 } else { 503 };
        return Reply::json(status, &probed);
    }
    let header = |name: &str| request.head.header(name).map(str::to_owned);
    let asked = Asked {
        at: Instant::now(),
        session: header("x-openclaw-session-key"),
        channel: header("x-openclaw-message-channel"),
        authorization: header("authorization"),
        body: serde_json::from_slice(&request.body).unwrap_or_default(),
    };
    let session = asked.session.clone().unwrap_or_default();
    let (script, number) = {
        let mut state = lock(state);
        if !state.ready {
            state.turned_away += 1;
            return Reply::json(503, &json!({"error": {"message": "not ready", "type": "unavailable"}}));
        }
        state.asked.push(asked.clone());
        let same = state.at_once.entry(session.clone()).or_default();
        *same += 1;
        let same = *same;
        state.most_in_a_session = state.most_in_a_session.max(same);
        state.most = state.most.max(state.at_once.values().sum());
        (Arc::clone(&state.script), state.asked.len())
    };
    let said = script(&asked, number);
    let reply = match said {
        Said::Text(text) => completion(&asked, &text),
        Said::After(wait, text) => {
            request.pause(wait);
            completion(&asked, &text)
        }
        Said::Status(status) => {
            Reply::json(status, &json!({"error": {"message": "as the test wants it", "type": "test"}}))
        }
        Said::Hang => {
            request.pause(Duration::from_hours(24));
            Reply::Cut
        }
        Said::Cut => Reply::Cut,
    };
    if let Some(same) = lock(state).at_once.get_mut(&session) {
        *same -= 1;
    }
    reply
}

fn completion(asked: &Asked, text: &str) -> Reply {
    let model = asked.body["model"].as_str().unwrap_or("m");
    let usage = json!({"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7});
    if asked.body["stream"] != true {
        return Reply::json(
            200,
            &json!({
                "id": "c1", "object": "chat.completion", "created": 1, "model": model, "usage": usage,
                "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            }),
        );
    }
    let chunk = |choices: Value, usage: Value| {
        let chunk = json!({
            "id": "c1", "object": "chat.completion.chunk", "created": 1, "model": model,
            "choices": choices, "usage": usage,
        });
        format!("data: {chunk}\n\n")
    };
    let part = |delta: Value, end: Value| {
        chunk(json!([{"index": 0, "delta": delta, "finish_reason": end}]), Value::Null)
    };
    // Two pieces, so that whoever takes the first one for the whole is seen.
    let middle = text.char_indices().nth(text.chars().count() / 2).map_or(0, |(at, _)| at);
    let (one, two) = text.split_at(middle);
    let stream = [
        part(json!({"role": "assistant", "content": one}), Value::Null),
        part(json!({"content": two}), Value::Null),
        part(json!({}), json!("stop")),
        chunk(json!([]), usage),
        "data: [DONE]\n\n".into(),
    ];
    Reply::of(200, "text/event-stream", stream.concat().into_bytes())
}
