//! A mux-server with one tenant, strict about the wire contract: whatever the client does that the
//! contract does not allow is noted, and fails the test when the server is dropped.
//!
//! * The server's own side: registration, runtime tokens, routes, sends with their idempotency
//!   keys, files, pairing tokens. [`Mux::stop`] is a power cut; what was stored is kept.
//! * Deliveries: [`Mux::enqueue`] hands an event to the courier, which delivers in order and again
//!   and again until it is taken. [`Mux::post`] is one attempt, with any token.
//! * [`Mux::ill`] makes it fail on demand.

mod courier;
mod doors;
mod tokens;

pub use courier::Courier;
pub use tokens::{jwt, unix_now};

use crate::network::Network;
use crate::serve::{Answer, Client, Power, Server};
use crate::wait::lock;
use courier::carry;
use doors::serve;
use ed25519_dalek::{Signer as _, SigningKey};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tokens::kid;

/// Where it listens, in the network of its machines.
pub const PORT: u16 = 9200;

/// Where the client listens.
const INBOUND_PORT: u16 = 18790;
const INBOUND_PATH: &str = "/v1/mux/inbound";
pub const REGISTER_KEY: &str = "register-canary-4be1d7a09c";
pub const ADMIN_TOKEN: &str = "admin-canary-8f02c6b41d";
const DAY: Duration = Duration::from_hours(24);

/// What can be asked of the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    Register,
    Keys,
    Send,
    Typing,
    File,
}

/// What can go wrong there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ill {
    /// It is done, and nobody is told.
    Lost,
    /// Nothing is done, and nothing comes back.
    Hangs,
    /// Nothing is done, and this comes back.
    Says(u16),
}

/// A send that was taken.
#[derive(Debug, Clone)]
pub struct Sent {
    pub at: Instant,
    pub channel: String,
    pub session: String,
    pub payload: Value,
}

impl Sent {
    /// What people read.
    pub fn text(&self) -> &str {
        text(&self.payload)
    }
}

/// Anything that was asked of a door, taken or not.
#[derive(Debug, Clone)]
pub struct Visit {
    pub at: Instant,
    pub door: Door,
    pub status: Option<u16>,
    /// Of a send: its idempotency key.
    pub key: Option<String>,
    /// With what it came.
    pub authorization: Option<String>,
    pub body: Value,
}

/// An attempt of the courier.
#[derive(Debug, Clone)]
pub struct Delivery {
    pub at: Instant,
    pub event: String,
    /// `None` when there was no answer.
    pub status: Option<u16>,
}

struct State {
    tenant: String,
    signer: SigningKey,
    /// In the key set.
    published: Vec<SigningKey>,
    seed: u8,
    token_life: Duration,
    tokens: HashMap<String, SystemTime>,
    issued: u64,
    registered: bool,
    routes: BTreeSet<(String, String)>,
    stored: HashMap<String, (Value, Value)>,
    sent: Vec<Sent>,
    visits: Vec<Visit>,
    ills: Vec<(Door, Ill, usize)>,
    files: BTreeMap<String, (String, Vec<u8>)>,
    redirect: Option<String>,
    violations: Vec<String>,
    conflicts: Vec<String>,
    queue: VecDeque<Value>,
    deliveries: Vec<Delivery>,
    /// So many acknowledgements are taken for lost.
    deaf: usize,
    up: bool,
    closing: bool,
}

struct Shared {
    network: Network,
    state: Mutex<State>,
    changed: Condvar,
    /// Of the courier.
    power: Arc<Power>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

pub struct Mux {
    shared: Arc<Shared>,
    server: Server,
    courier: Option<JoinHandle<()>>,
}

impl Mux {
    /// At 127.0.0.1:9200 of a network, for one tenant.
    pub fn start(network: &Network, tenant: &str) -> Self {
        let signer = SigningKey::from_bytes(&[1; 32]);
        let state = State {
            tenant: tenant.into(),
            published: vec![signer.clone()],
            signer,
            seed: 1,
            token_life: DAY,
            tokens: HashMap::new(),
            issued: 0,
            registered: false,
            routes: BTreeSet::new(),
            stored: HashMap::new(),
            sent: Vec::new(),
            visits: Vec::new(),
            ills: Vec::new(),
            files: BTreeMap::new(),
            redirect: None,
            violations: Vec::new(),
            conflicts: Vec::new(),
            queue: VecDeque::new(),
            deliveries: Vec::new(),
            deaf: 0,
            up: true,
            closing: false,
        };
        let shared = Arc::new(Shared {
            network: network.clone(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            power: Arc::default(),
        });
        let its = Arc::clone(&shared);
        let server = Server::start(network, (Ipv4Addr::LOCALHOST, PORT).into(), move |r| serve(r, &its));
        let its = Arc::clone(&shared);
        let courier = std::thread::spawn(move || carry(&its));
        Self { shared, server, courier: Some(courier) }
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{PORT}")
    }

    pub fn inbound_url(&self) -> String {
        format!("http://127.0.0.1:{INBOUND_PORT}{INBOUND_PATH}")
    }

    // --- What the client did ------------------------------------------------------------------

    pub fn registered(&self) -> bool {
        self.shared.state().registered
    }

    /// All sends that were taken, in their order.
    pub fn sent(&self) -> Vec<Sent> {
        self.shared.state().sent.clone()
    }

    pub fn sent_count(&self) -> usize {
        self.shared.state().sent.len()
    }

    /// Texts of a session, in their order.
    pub fn texts(&self, session: &str) -> Vec<String> {
        let state = self.shared.state();
        state.sent.iter().filter(|s| s.session == session).map(|s| s.text().to_owned()).collect()
    }

    pub fn visits(&self, door: Door) -> Vec<Visit> {
        self.shared.state().visits.iter().filter(|v| v.door == door).cloned().collect()
    }

    pub fn deliveries(&self) -> Vec<Delivery> {
        self.shared.state().deliveries.clone()
    }

    /// How many events the client has not taken yet.
    pub fn waiting(&self) -> usize {
        self.shared.state().queue.len()
    }

    /// Every runtime token there ever was.
    pub fn tokens(&self) -> Vec<String> {
        self.shared.state().tokens.keys().cloned().collect()
    }

    pub fn violations(&self) -> Vec<String> {
        self.shared.state().violations.clone()
    }

    /// Keys that came with a second payload. A client that lost what it knew may do that.
    pub fn conflicts(&self) -> Vec<String> {
        self.shared.state().conflicts.clone()
    }

    // --- What the server does -----------------------------------------------------------------

    /// A power cut.
    pub fn stop(&self) {
        self.shared.state().up = false;
        self.shared.power.cut();
        self.server.stop();
    }

    pub fn resume(&self) {
        self.server.resume();
        self.shared.power.on();
        self.shared.state().up = true;
        self.shared.changed.notify_all();
    }

    /// The next so many requests of a door go wrong.
    pub fn ill(&self, door: Door, ill: Ill, times: usize) {
        self.shared.state().ills.push((door, ill, times));
    }

    pub fn heal(&self) {
        self.shared.state().ills.clear();
    }

    /// The next so many acknowledgements of the client do not arrive.
    pub fn deaf(&self, times: usize) {
        self.shared.state().deaf = times;
    }

    /// Of tokens from now on.
    pub fn token_life(&self, life: Duration) {
        self.shared.state().token_life = life;
    }

    /// No token that was given out is good any more.
    pub fn revoke(&self) {
        for end in self.shared.state().tokens.values_mut() {
            *end = UNIX_EPOCH;
        }
    }

    /// For events that are not delivered by [`Mux::deliver`] or the courier.
    pub fn bind(&self, channel: &str, session: &str) {
        self.shared.state().routes.insert((channel.into(), session.into()));
    }

    pub fn unbind(&self, channel: &str, session: &str) {
        self.shared.state().routes.remove(&(channel.into(), session.into()));
    }

    /// A new signing key; the old ones are not published any more.
    pub fn rotate(&self) {
        let mut state = self.shared.state();
        state.seed += 1;
        state.signer = SigningKey::from_bytes(&[state.seed; 32]);
        state.published = vec![state.signer.clone()];
    }

    /// A file of a channel; the URL under which it is.
    pub fn file(&self, channel: &str, id: &str, mime: &str, bytes: &[u8]) -> String {
        let query = format!("/v1/mux/files/{channel}?fileId={id}");
        self.shared.state().files.insert(query.clone(), (mime.into(), bytes.to_vec()));
        self.url() + &query
    }

    /// Files are said to be elsewhere from now on.
    pub fn redirect_files(&self, to: &str) {
        self.shared.state().redirect = Some(to.into());
    }

    // --- Deliveries ---------------------------------------------------------------------------

    /// Leaves an event to the courier. What has been delivered has a route.
    pub fn enqueue(&self, event: &Value) {
        let mut state = self.shared.state();
        state.route(event);
        state.queue.push_back(event.clone());
        drop(state);
        self.shared.changed.notify_all();
    }

    /// One attempt with a good token.
    pub fn deliver(&self, event: &Value) -> std::io::Result<u16> {
        self.shared.state().route(event);
        let token = self.token(|_, _| {});
        self.post(event.to_string().as_bytes(), Some(&token)).map(|answer| answer.status)
    }

    /// Hands all of an event over, and hangs up at once.
    pub fn abandon(&self, event: &Value) -> std::io::Result<()> {
        let mut state = self.shared.state();
        state.route(event);
        let tenant = state.tenant.clone();
        drop(state);
        let bearer = format!("Bearer {}", self.token(|_, _| {}));
        let headers = [("X-OpenClaw-Id", tenant.as_str()), ("Authorization", &bearer)];
        let client = self.client(Duration::from_secs(20)).client;
        client.throw(INBOUND_PATH, &headers, event.to_string().as_bytes())
    }

    /// One attempt on a connection of its own.
    pub fn post(&self, body: &[u8], token: Option<&str>) -> std::io::Result<Answer> {
        self.client(Duration::from_secs(20)).post_event(&self.shared, body, token)
    }

    pub fn client(&self, timeout: Duration) -> Courier {
        let address = (Ipv4Addr::LOCALHOST, INBOUND_PORT).into();
        Courier { client: Client::new(&self.shared.network, address, timeout) }
    }

    /// One attempt on a connection that the caller keeps.
    pub fn deliver_by(&self, courier: &mut Courier, event: &Value) -> std::io::Result<u16> {
        self.shared.state().route(event);
        let token = self.token(|_, _| {});
        courier.post_event(&self.shared, event.to_string().as_bytes(), Some(&token)).map(|a| a.status)
    }

    /// A delivery token, good unless `change` makes it another one before it is signed.
    pub fn token(&self, change: impl FnOnce(&mut Value, &mut Value)) -> String {
        let state = self.shared.state();
        let (mut header, mut claims) = state.claims();
        change(&mut header, &mut claims);
        let signer = state.signer.clone();
        drop(state);
        jwt(&header, &claims, |input| signer.sign(input).to_bytes().to_vec())
    }

    /// The key that signs, for those who misuse it.
    pub fn public_key(&self) -> [u8; 32] {
        self.shared.state().signer.verifying_key().to_bytes()
    }
}

impl Drop for Mux {
    fn drop(&mut self) {
        self.shared.state().closing = true;
        self.shared.changed.notify_all();
        self.server.stop();
        if let Some(courier) = self.courier.take() {
            let _ = courier.join();
        }
        if !std::thread::panicking() {
            let violations = self.violations();
            assert!(violations.is_empty(), "the client broke the contract: {violations:#?}");
        }
    }
}

impl State {
    fn claims(&self) -> (Value, Value) {
        let now = unix_now();
        // `aud` may be one or several.
        let aud = if self.deliveries.len().is_multiple_of(2) {
            json!("openclaw-mux-inbound")
        } else {
            json!(["somebody-else", "openclaw-mux-inbound"])
        };
        let claims = json!({
            "iss": "mux-server", "sub": self.tenant, "aud": aud, "scope": "mux:inbound",
            "iat": now, "nbf": now, "exp": now + 300, "jti": format!("{now}-{}", self.deliveries.len()),
        });
        (json!({"alg": "EdDSA", "typ": "JWT", "kid": kid(&self.signer)}), claims)
    }

    fn route(&mut self, event: &Value) {
        let word = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        self.routes.insert((word("channel"), word("sessionKey")));
    }

    fn violation(&mut self, what: impl Into<String>) {
        let what = what.into();
        if !self.violations.contains(&what) {
            self.violations.push(what);
        }
    }

    /// What goes wrong at a door now.
    fn befalls(&mut self, door: Door) -> Option<Ill> {
        let (_, ill, times) = self.ills.iter_mut().find(|(d, _, times)| *d == door && *times > 0)?;
        *times -= 1;
        Some(*ill)
    }
}

/// The text in the envelope.
fn text(payload: &Value) -> &str {
    let channel = payload["channel"].as_str().unwrap_or_default();
    let envelope = &payload["raw"][channel];
    let inner = if channel == "telegram" { &envelope["body"] } else { &envelope["send"] };
    inner["text"].as_str().unwrap_or_default()
}

/// A message as a channel's user wrote it. `number` makes it unlike all others.
pub fn message(channel: &str, session: &str, number: usize, body: &str) -> Value {
    let raw = match channel {
        "telegram" => json!({
            "update_id": 1000 + number,
            "message": {
                "message_id": number, "date": unix_now(), "text": body,
                "from": {"id": 1001, "is_bot": false, "first_name": "Ada"},
                "chat": {"id": 1001, "type": "private", "first_name": "Ada"},
            },
        }),
        "discord" => json!({
            "id": number.to_string(), "channel_id": "2002", "content": body,
            "author": {"id": "3003", "username": "ada"},
        }),
        _ => json!({
            "key": {"remoteJid": "4004@s.whatsapp.net", "id": number.to_string(), "fromMe": false},
            "message": {"conversation": body},
        }),
    };
    let peer = match channel {
        "telegram" => "1001",
        "discord" => "2002",
        _ => "4004@s.whatsapp.net",
    };
    json!({
        "eventId": format!("{channel}:event:{number}"),
        "channel": channel,
        "event": {"kind": "message", "raw": raw},
        "raw": raw,
        "sessionKey": session,
        "body": body,
        "from": format!("{channel}:{peer}"),
        "to": format!("{channel}:{peer}"),
        "accountId": "default",
        "chatType": "direct",
        "messageId": number.to_string(),
        "timestampMs": unix_now() * 1000,
        "channelData": {"chatId": peer},
        "openclawId": crate::machine::DEVICE_ID,
    })
}
