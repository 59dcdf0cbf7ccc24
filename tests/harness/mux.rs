//! A mux-server with one tenant, strict about the wire contract: whatever the client does that the
//! contract does not allow is noted, and fails the test when the server is dropped.
//!
//! * The server's own side: registration, runtime tokens, routes, sends with their idempotency
//!   keys, files, pairing tokens. [`Mux::stop`] is a power cut; what was stored is kept.
//! * Deliveries: [`Mux::enqueue`] hands an event to the courier, which delivers in order and again
//!   and again until it is taken. [`Mux::post`] is one attempt, with any token.
//! * [`Mux::ill`] makes it fail on demand.

use crate::network::Network;
use crate::serve::{Answer, Client, Power, Reply, Request, Server, lock};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64_URL;
use ed25519_dalek::{Signer as _, SigningKey};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Where it listens, in the network of its machines.
pub const PORT: u16 = 9200;
/// Where the client listens.
const INBOUND_PORT: u16 = 18790;
const INBOUND_PATH: &str = "/v1/mux/inbound";
pub const REGISTER_KEY: &str = "register-canary-4be1d7a09c";
pub const ADMIN_TOKEN: &str = "admin-canary-8f02c6b41d";
/// In front of an Ed25519 public key in its SPKI form.
const SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
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

/// A connection to the client.
pub struct Courier {
    client: Client,
}

impl Courier {
    fn post_event(&mut self, shared: &Shared, body: &[u8], token: Option<&str>) -> std::io::Result<Answer> {
        let tenant = shared.state().tenant.clone();
        let bearer = token.map(|t| format!("Bearer {t}"));
        let mut headers = vec![("X-OpenClaw-Id", tenant.as_str()), ("X-Mux-Trace-Id", "trace-1")];
        headers.extend(bearer.as_deref().map(|b| ("Authorization", b)));
        self.client.post(INBOUND_PATH, &headers, body)
    }

    /// Without any of the headers that a delivery has.
    pub fn raw(&mut self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> std::io::Result<Answer> {
        self.client.post(path, headers, body)
    }

    /// A bare connection.
    pub fn connect(&self) -> std::io::Result<std::net::TcpStream> {
        self.client.connect()
    }
}

/// In order, each until it is taken.
fn carry(shared: &Shared) {
    let address: SocketAddr = (Ipv4Addr::LOCALHOST, INBOUND_PORT).into();
    let mut courier = Courier { client: Client::new(&shared.network, address, Duration::from_secs(15)) };
    courier.client.power(Arc::clone(&shared.power));
    let mut wait = FIRST_WAIT;
    loop {
        let mut state = shared.state();
        while !state.closing && (state.queue.is_empty() || !state.up || !state.registered) {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closing {
            return;
        }
        let event = state.queue[0].clone();
        let (header, claims) = state.claims();
        let signer = state.signer.clone();
        drop(state);
        let token = jwt(&header, &claims, |input| signer.sign(input).to_bytes().to_vec());
        let status = courier.post_event(shared, event.to_string().as_bytes(), Some(&token)).ok();
        let status = status.map(|answer| answer.status);
        let mut state = shared.state();
        let id = event["eventId"].as_str().unwrap_or_default().to_owned();
        state.deliveries.push(Delivery { at: Instant::now(), event: id, status });
        let accepted = status.is_some_and(|s| (200..300).contains(&s));
        // Who lost power does not know what was answered.
        if accepted && state.up {
            if state.deaf > 0 {
                state.deaf -= 1;
            } else {
                state.queue.pop_front();
                wait = FIRST_WAIT;
            }
            continue;
        }
        let waited = shared.changed.wait_timeout_while(state, wait, |s| !s.closing);
        drop(waited);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}

const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_millis(500);

/// `kid` of a key: the first 16 hex digits of the SHA-256 of its SPKI form.
fn kid(key: &SigningKey) -> String {
    let spki = [&SPKI_HEAD[..], key.verifying_key().as_bytes()].concat();
    Sha256::digest(spki)[..8].iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// A token signed by whatever `sign` does.
pub fn jwt(header: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let part = |value: &Value| BASE64_URL.encode(value.to_string());
    let input = format!("{}.{}", part(header), part(claims));
    let signature = BASE64_URL.encode(sign(input.as_bytes()));
    format!("{input}.{signature}")
}

pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(0)
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

fn refused(code: &str) -> Value {
    json!({"ok": false, "code": code, "error": code.to_lowercase().replace('_', " ")})
}

fn serve(request: &Request<'_>, shared: &Shared) -> Reply {
    let door = match (request.method(), request.path()) {
        ("GET", "/health") => return Reply::json(200, &json!({"ok": true})),
        ("POST", "/v1/admin/pairings/token") => return pairing(request, shared),
        ("POST", "/v1/instances/register") => Door::Register,
        ("GET", "/.well-known/jwks.json") => Door::Keys,
        ("POST", "/v1/mux/outbound/send") => Door::Send,
        ("POST", "/v1/mux/outbound/typing") => Door::Typing,
        ("GET", path) if path.starts_with("/v1/mux/files/") => Door::File,
        (method, path) => {
            shared.state().violation(format!("nothing is at {method} {path}"));
            return Reply::json(404, &refused("NOT_FOUND"));
        }
    };
    let mut state = shared.state();
    if request.is_orphan() {
        return Reply::Cut;
    }
    let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let header = |name: &str| request.head.header(name).map(str::to_owned);
    let number = state.visits.len();
    state.visits.push(Visit {
        at: Instant::now(),
        door,
        status: None,
        key: header("idempotency-key"),
        authorization: header("authorization"),
        body: body.clone(),
    });
    let ill = state.befalls(door);
    match ill {
        Some(Ill::Hangs) => return Reply::Hang,
        Some(Ill::Says(status)) => {
            state.visits[number].status = Some(status);
            return Reply::json(status, &refused("AS_THE_TEST_WANTS_IT"));
        }
        Some(Ill::Lost) | None => {}
    }
    let reply = match door {
        Door::Register => register(&mut state, request, &body),
        Door::Keys => keys(&state),
        Door::Send => send(&mut state, request, &body),
        Door::Typing => typing(&mut state, request, &body),
        Door::File => file(&mut state, request),
    };
    if let Reply::Whole { status, .. } = &reply
        && ill.is_none()
    {
        state.visits[number].status = Some(*status);
    }
    drop(state);
    shared.changed.notify_all();
    if ill == Some(Ill::Lost) { Reply::Cut } else { reply }
}

fn register(state: &mut State, request: &Request<'_>, body: &Value) -> Reply {
    if !request.head.says("content-type", "application/json") {
        state.violation("a registration is not said to be JSON");
    }
    if request.head.header("authorization") != Some(&format!("Bearer {REGISTER_KEY}")) {
        state.violation("a registration has another key");
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    let url = body["inboundUrl"].as_str().unwrap_or_default();
    if body["openclawId"] != state.tenant.as_str()
        || !url.ends_with(INBOUND_PATH)
        || body["inboundTimeoutMs"] != 15_000
    {
        state.violation(format!("a registration says {body}"));
        return Reply::json(400, &refused("BAD_REQUEST"));
    }
    state.issued += 1;
    let expires = SystemTime::now() + state.token_life;
    let at = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
    let claims = json!({"sub": state.tenant, "n": state.issued, "exp": at.as_secs()});
    // Nobody but the server has to be able to read it.
    let token = jwt(&json!({"alg": "HS256", "typ": "JWT"}), &claims, |input| {
        Sha256::digest([input, b"of the server"].concat()).to_vec()
    });
    state.tokens.insert(token.clone(), expires);
    state.registered = true;
    let millis = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
    Reply::json(
        200,
        &json!({
            "ok": true, "openclawId": state.tenant, "runtimeToken": token, "expiresAtMs": millis,
            "tokenType": "Bearer",
        }),
    )
}

fn keys(state: &State) -> Reply {
    let key = |key: &SigningKey| {
        json!({
            "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": kid(key),
            "x": BASE64_URL.encode(key.verifying_key().as_bytes()),
        })
    };
    Reply::json(200, &json!({"keys": state.published.iter().map(key).collect::<Vec<_>>()}))
}

/// Whether the runtime token is a good one; none at all is never allowed.
fn admitted(state: &mut State, request: &Request<'_>, what: &str) -> bool {
    let token = request.head.header("authorization").and_then(|a| a.strip_prefix("Bearer "));
    if let Some(end) = token.and_then(|t| state.tokens.get(t)) {
        return *end > SystemTime::now();
    }
    state.violation(format!("{what} with a token that was never given out"));
    false
}

fn send(state: &mut State, request: &Request<'_>, body: &Value) -> Reply {
    if !admitted(state, request, "a send") {
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    let key = request.head.header("idempotency-key").unwrap_or_default().to_owned();
    for fault in faults_of_send(state, request, body, &key) {
        state.violation(fault);
    }
    if let Some((payload, answer)) = state.stored.get(&key) {
        if payload == body {
            return Reply::json(200, answer);
        }
        let what = format!("the request {key} was sent with two payloads: {payload} and {body}");
        state.conflicts.push(what);
        return Reply::json(409, &refused("IDEMPOTENCY_CONFLICT"));
    }
    let word = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    let (channel, session) = (word("channel"), word("sessionKey"));
    if !state.routes.contains(&(channel.clone(), session.clone())) {
        return Reply::json(403, &refused("ROUTE_NOT_BOUND"));
    }
    let number = state.sent.len() + 1;
    let answer = json!({
        "ok": true, "messageId": format!("m{number}"), "chatId": word("to"), "providerMessageIds": [number],
    });
    state.stored.insert(key, (body.clone(), answer.clone()));
    state.sent.push(Sent { at: Instant::now(), channel, session, payload: body.clone() });
    Reply::json(200, &answer)
}

/// What of a send is not as the contract has it.
fn faults_of_send(state: &State, request: &Request<'_>, body: &Value, key: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let mut check = |holds: bool, what: &str| {
        if !holds {
            faults.push(format!("a send whose {what}: {body}"));
        }
    };
    let header = |name: &str| request.head.header(name).unwrap_or_default();
    let word = |name: &str| body[name].as_str().unwrap_or_default();
    check(header("content-type").starts_with("application/json"), "type is not JSON");
    check(header("x-openclaw-id") == state.tenant, "X-OpenClaw-Id is not the tenant's");
    check(body["openclawId"] == state.tenant.as_str(), "openclawId is not the tenant's");
    check(!key.is_empty() && key.len() <= 256, "idempotency key is missing or too long");
    check(body["requestId"] == key, "requestId is not its idempotency key");
    check(body["op"] == "send", "op is not send");
    check(!word("sessionKey").is_empty(), "sessionKey is missing");
    check(body["accountId"].is_string(), "accountId is missing");
    check(!word("to").is_empty(), "recipient is missing");
    let has_media = body["mediaUrl"].is_string() || body["mediaUrls"].is_array();
    check(body["text"].is_string(), "text is missing");
    check(has_media || !word("text").trim().is_empty(), "text is empty");
    for name in ["replyToId", "threadId"] {
        let value = &body[name];
        check(value.is_null() || value.is_string() || value.is_number(), &format!("{name} is no id"));
    }
    let channel = word("channel");
    let raw = body["raw"].as_object();
    check(raw.is_some_and(|r| r.len() == 1 && r.contains_key(channel)), "raw envelope is not its channel's");
    let envelope = &body["raw"][channel];
    let limit = match channel {
        "telegram" => {
            let inner = &envelope["body"];
            check(envelope["method"] == "sendMessage", "method is not sendMessage");
            check(inner["chat_id"].is_string() || inner["chat_id"].is_number(), "chat_id is missing");
            let known =
                ["chat_id", "text", "parse_mode", "message_thread_id", "reply_to_message_id", "reply_markup"];
            let fields = inner.as_object();
            check(
                fields.is_some_and(|f| f.keys().all(|k| known.contains(&k.as_str()))),
                "envelope has fields that nobody knows",
            );
            4096
        }
        "discord" => 2000,
        "whatsapp" => 4096,
        _ => {
            check(false, "channel is unknown");
            usize::MAX
        }
    };
    check(!text(body).trim().is_empty(), "envelope has no text");
    // Telegram and Discord count what UTF-16 needs; to be safe is the same for all.
    check(text(body).encode_utf16().count() <= limit, "text is too long for its channel");
    faults
}

/// The text in the envelope.
fn text(payload: &Value) -> &str {
    let channel = payload["channel"].as_str().unwrap_or_default();
    let envelope = &payload["raw"][channel];
    let inner = if channel == "telegram" { &envelope["body"] } else { &envelope["send"] };
    inner["text"].as_str().unwrap_or_default()
}

fn typing(state: &mut State, request: &Request<'_>, body: &Value) -> Reply {
    if !admitted(state, request, "typing") {
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    if body["openclawId"] != state.tenant.as_str()
        || !body["channel"].is_string()
        || !body["sessionKey"].is_string()
    {
        state.violation(format!("typing says {body}"));
        return Reply::json(400, &refused("BAD_REQUEST"));
    }
    Reply::json(200, &json!({"ok": true}))
}

fn file(state: &mut State, request: &Request<'_>) -> Reply {
    if !admitted(state, request, "a file") {
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    if let Some(to) = &state.redirect {
        let headers = vec![("Location".into(), to.clone())];
        return Reply::Whole { status: 302, headers, body: Vec::new() };
    }
    match state.files.get(request.head.word(1)) {
        Some((mime, bytes)) => Reply::of(200, mime, bytes.clone()),
        None => Reply::json(404, &refused("NOT_FOUND")),
    }
}

fn pairing(request: &Request<'_>, shared: &Shared) -> Reply {
    if request.head.header("authorization") != Some(&format!("Bearer {ADMIN_TOKEN}")) {
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let mut state = shared.state();
    let channel = body["channel"].as_str().unwrap_or_default();
    let known = ["openclawId", "inboundUrl", "inboundTimeoutMs", "channel", "sessionKey", "ttlSec"];
    let fields = body.as_object().into_iter().flatten();
    if body["openclawId"] != state.tenant.as_str()
        || !["telegram", "discord", "whatsapp"].contains(&channel)
        || fields.filter(|(_, v)| !v.is_null()).any(|(name, _)| !known.contains(&name.as_str()))
    {
        state.violation(format!("a pairing says {body}"));
        return Reply::json(400, &refused("BAD_REQUEST"));
    }
    let life = body["ttlSec"].as_i64().unwrap_or(900);
    let mut answer = json!({
        "ok": true, "channel": channel, "token": "mpt_token-of-a-pairing", "expiresAtMs": (unix_now() + life) * 1000,
    });
    if channel == "telegram" {
        answer["startCommand"] = json!("/start mpt_token-of-a-pairing");
        answer["deepLink"] = json!("https://t.me/a_bot?start=mpt_token-of-a-pairing");
    }
    Reply::json(200, &answer)
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
