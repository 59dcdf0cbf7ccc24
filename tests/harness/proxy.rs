//! A proxy in front of an S3 server that does to requests what networks and providers do.
//!
//! It passes heads and bodies on as they came: the signature covers the host, which is the
//! proxy's, and a store that takes buckets from the path does not mind. Each request goes to
//! the server on a connection of its own; towards the client connections are kept.

use crate::http::{Body, Head};
use crate::network::{Network, own_loopback};
use crate::s3::{S3, unescape};
use nix::sys::socket::{Shutdown, setsockopt, shutdown, sockopt};
use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Error, ErrorKind, Read, Result, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// What can happen to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It waits this long before it goes on; waits of several rules add up.
    Latency(Duration),
    /// The connection is reset.
    Reset,
    /// Nothing comes back, and the body is not read, until the rules change; then the
    /// connection is closed.
    Hang,
    /// The proxy answers with this status and S3's words for it.
    Status(u16),
    /// Half of the request's body reaches the server, then the connection closes on both sides.
    HalfRequest,
    /// The server does what it was asked, and half of its answer's body comes back.
    HalfResponse,
    /// The server does what it was asked, and nothing of its answer comes back.
    NoResponse,
    /// The client's connection is reset, and the server does what it was asked when the rules change.
    Late,
}

/// A fault, and the requests that it happens to: all, unless told otherwise.
#[derive(Debug, Clone)]
pub struct Rule {
    fault: Fault,
    method: Option<String>,
    path: Option<String>,
    which: Which,
    times: usize,
    seen: u64,
}

#[derive(Debug, Clone, Copy)]
enum Which {
    Every(u64),
    /// Of 1000, chosen by the seed.
    Some {
        per_mille: u64,
        seed: u64,
    },
}

impl Rule {
    pub fn new(fault: Fault) -> Self {
        Self { fault, method: None, path: None, which: Which::Every(1), times: usize::MAX, seen: 0 }
    }

    #[must_use]
    pub fn method(self, method: &str) -> Self {
        Self { method: Some(method.to_owned()), ..self }
    }

    /// Requests whose path and query contain this.
    #[must_use]
    pub fn path(self, part: &str) -> Self {
        Self { path: Some(part.to_owned()), ..self }
    }

    /// The `nth` of those that match, and again after as many.
    #[must_use]
    pub fn every(self, nth: u64) -> Self {
        Self { which: Which::Every(nth.max(1)), ..self }
    }

    /// A share of those that match; the same seed takes the same ones.
    #[must_use]
    pub fn some(self, per_mille: u64, seed: u64) -> Self {
        Self { which: Which::Some { per_mille, seed }, ..self }
    }

    /// At most so often.
    #[must_use]
    pub fn times(self, times: usize) -> Self {
        Self { times, ..self }
    }

    fn happens(&mut self, method: &str, path: &str) -> bool {
        let matches = self.method.as_ref().is_none_or(|m| m == method)
            && self.path.as_ref().is_none_or(|part| path.contains(part));
        if !matches {
            return false;
        }
        self.seen += 1;
        let chosen = match self.which {
            Which::Every(nth) => self.seen.is_multiple_of(nth),
            Which::Some { per_mille, seed } => mixed(seed ^ mixed(self.seen)) % 1000 < per_mille,
        };
        if chosen && self.times > 0 {
            self.times -= 1;
            return true;
        }
        false
    }
}

/// The finalizer of `SplitMix64`.
fn mixed(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}

/// A request that came in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub method: String,
    /// With the query.
    pub path: String,
    /// Of temporary credentials, in the query or in a header.
    pub session_token: Option<String>,
    /// Whether the store can tell by the head that the body did not arrive as it was sent.
    pub has_md5: bool,
    /// None as long as there is no answer, and when none came.
    pub status: Option<u16>,
    /// What happened to it, besides latency.
    pub fault: Option<Fault>,
    /// Bytes of the bodies, as far as they were passed on.
    pub up: u64,
    pub down: u64,
}

#[derive(Default)]
struct State {
    rules: Vec<Rule>,
    /// See [`Proxy::foreign_etags`].
    foreign_etags: Option<bool>,
    /// Goes up when the rules change.
    edition: u64,
    /// Nothing new is begun.
    refusing: bool,
    closing: bool,
    entries: BTreeMap<u64, Entry>,
    arrived: u64,
    /// Both sides of each connection, so that they can be cut.
    sockets: HashMap<u64, OwnedFd>,
    opened: u64,
    connections: usize,
}

struct Shared {
    upstream: SocketAddr,
    state: Mutex<State>,
    changed: Condvar,
    /// Who enforces conditions. Writers with a condition are alone, others are not.
    conditions: RwLock<Option<S3>>,
    writing: RwLock<()>,
    running: AtomicUsize,
}

/// A proxy that runs. Dropping it cuts every connection.
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    network: Option<Network>,
    listening: Mutex<Option<Listening>>,
}

struct Listening {
    socket: Arc<TcpListener>,
    accepts: JoinHandle<()>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    /// On this machine's loopback.
    pub fn start(upstream: SocketAddr) -> Self {
        Self::new(upstream, own_loopback(1), None)
    }

    /// At 127.0.0.1:9000 of a network that machines are put into.
    pub fn start_in(network: &Network, upstream: SocketAddr) -> Self {
        Self::new(upstream, (Ipv4Addr::LOCALHOST, 9000).into(), Some(network.clone()))
    }

    /// At port 9000 of every address of a network, for containers that have networks of their own.
    pub fn open_in(network: &Network, upstream: SocketAddr) -> Self {
        Self::new(upstream, (Ipv4Addr::UNSPECIFIED, 9000).into(), Some(network.clone()))
    }

    fn new(upstream: SocketAddr, address: SocketAddr, network: Option<Network>) -> Self {
        let shared = Arc::new(Shared {
            upstream,
            state: Mutex::default(),
            changed: Condvar::new(),
            conditions: RwLock::default(),
            writing: RwLock::default(),
            running: AtomicUsize::new(0),
        });
        let proxy = Self { shared, address, network, listening: Mutex::default() };
        proxy.refuse(false);
        proxy
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Adds a fault. Of several that would happen to a request, the first one added does.
    pub fn add(&self, rule: Rule) {
        self.change(|rules| rules.push(rule));
    }

    /// Adds a fault that happens to every request.
    pub fn fault(&self, fault: Fault) {
        self.add(Rule::new(fault));
    }

    pub fn latency(&self, each: Duration) {
        self.fault(Fault::Latency(each));
    }

    /// Takes the faults of this part of a path away.
    pub fn spare(&self, part: &str) {
        self.change(|rules| rules.retain(|rule| rule.path.as_deref() != Some(part)));
    }

    /// Takes all faults away, and listens.
    pub fn heal(&self) {
        self.change(Vec::clear);
        self.refuse(false);
    }

    fn change(&self, how: impl FnOnce(&mut Vec<Rule>)) {
        let mut state = lock(&self.shared.state);
        how(&mut state.rules);
        state.edition += 1;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Whether connections are refused. Those that exist are cut, as when a host goes.
    pub fn refuse(&self, yes: bool) {
        let mut listening = lock(&self.listening);
        // Also for who has been accepted a moment ago.
        lock(&self.shared.state).refusing = yes;
        if yes {
            if let Some(Listening { socket, accepts }) = listening.take() {
                // Wakes who waits in accept(2), with an error.
                let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
                let _ = accepts.join();
            }
            self.cut();
        } else if listening.is_none() {
            let bind = || match &self.network {
                Some(network) => network.listen(self.address),
                None => TcpListener::bind(self.address),
            };
            let socket = Arc::new(bind().expect("an address of our own is free"));
            let (accepting, shared) = (Arc::clone(&socket), Arc::clone(&self.shared));
            let accepts = std::thread::spawn(move || accept(&accepting, &shared));
            *listening = Some(Listening { socket, accepts });
        }
    }

    /// Cuts every connection there is.
    pub fn cut(&self) {
        for socket in lock(&self.shared.state).sockets.values() {
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        }
        self.shared.changed.notify_all();
    }

    /// From now on If-None-Match and If-Match of writes are enforced here: such a write is
    /// alone among all writes while the store, asked as `s3`, is looked at and written to.
    /// `None` leaves them to the store again.
    pub fn conditional_puts(&self, s3: Option<&S3>) {
        *self.shared.conditions.write().unwrap_or_else(PoisonError::into_inner) = s3.cloned();
    }

    /// Every request since the last [`Proxy::clear_log`], in the order of arrival.
    pub fn log(&self) -> Vec<Entry> {
        lock(&self.shared.state).entries.values().cloned().collect()
    }

    pub fn clear_log(&self) {
        lock(&self.shared.state).entries.clear();
    }

    /// From now on no `ETag` of an object that the store tells is an MD5, as with SSE-KMS: with that
    /// headers, if `says_so`, or without a word about it.
    pub fn foreign_etags(&self, says_so: bool) {
        lock(&self.shared.state).foreign_etags = Some(says_so);
    }

    /// How many requests of the log have this method.
    pub fn requests(&self, method: &str) -> usize {
        self.log().iter().filter(|e| e.method == method).count()
    }

    /// Bytes of bodies in the log: to the server, and from it.
    pub fn bytes(&self) -> (u64, u64) {
        self.log().iter().fold((0, 0), |(up, down), e| (up + e.up, down + e.down))
    }

    /// How many connections have been accepted.
    pub fn connections(&self) -> usize {
        lock(&self.shared.state).connections
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        lock(&self.shared.state).closing = true;
        self.refuse(true);
        // Connections take few moments to end, and their threads hold nothing of anybody's.
        let deadline = Instant::now() + Duration::from_secs(1);
        while self.shared.running.load(Ordering::Acquire) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>) {
    while let Ok((client, _)) = listener.accept() {
        let shared = Arc::clone(shared);
        shared.running.fetch_add(1, Ordering::AcqRel);
        std::thread::spawn(move || {
            lock(&shared.state).connections += 1;
            // Whatever went wrong, the connection's end tells the client.
            let _ = serve(&shared, client);
            shared.running.fetch_sub(1, Ordering::AcqRel);
        });
    }
}

/// A socket that [`Proxy::cut`] knows of.
struct Known<'a>(&'a Shared, u64);

impl Drop for Known<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).sockets.remove(&self.1);
    }
}

impl Shared {
    fn know(&self, stream: &TcpStream) -> Result<Known<'_>> {
        stream.set_nodelay(true)?;
        let mut state = lock(&self.state);
        if state.refusing {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        state.opened += 1;
        let id = state.opened;
        state.sockets.insert(id, stream.try_clone()?.into());
        Ok(Known(self, id))
    }

    /// Notes a request and says what is to happen to it.
    fn arrive(&self, head: &Head) -> (u64, Duration, Option<Fault>) {
        let (method, path) = (head.word(0), head.word(1));
        let mut state = lock(&self.state);
        let (mut wait, mut fault) = (Duration::ZERO, None);
        for rule in &mut state.rules {
            let waits = matches!(rule.fault, Fault::Latency(_));
            if (waits || fault.is_none()) && rule.happens(method, path) {
                match rule.fault {
                    Fault::Latency(more) => wait += more,
                    other => fault = Some(other),
                }
            }
        }
        state.arrived += 1;
        let id = state.arrived;
        let (method, path) = (method.to_owned(), path.to_owned());
        let session_token = session_token(head);
        let has_md5 = head.header("content-md5").is_some();
        let entry = Entry { method, path, session_token, has_md5, status: None, fault, up: 0, down: 0 };
        state.entries.insert(id, entry);
        (id, wait, fault)
    }

    fn note(&self, id: u64, what: impl FnOnce(&mut Entry)) {
        if let Some(entry) = lock(&self.state).entries.get_mut(&id) {
            what(entry);
        }
    }

    fn pause(&self, length: Duration) {
        let state = lock(&self.state);
        drop(self.changed.wait_timeout_while(state, length, |s| !s.closing));
    }

    /// Until the rules change or the client gives up.
    fn hang(&self, client: &TcpStream) {
        let _ = client.set_nonblocking(true);
        let mut state = lock(&self.state);
        let edition = state.edition;
        while state.edition == edition && !state.closing && !gone(client) {
            let waited = self.changed.wait_timeout(state, Duration::from_millis(50));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Whether the peer has closed. Only the first byte can be looked at: with data waiting before
/// the end, it is not seen.
fn gone(stream: &TcpStream) -> bool {
    matches!(stream.peek(&mut [0]), Ok(0))
}

fn serve(shared: &Shared, client: TcpStream) -> Result<()> {
    let _known = shared.know(&client)?;
    let mut from = BufReader::new(client.try_clone()?);
    let mut client = client;
    while let Some(head) = Head::read(&mut from)? {
        if !exchange(shared, &head, &mut from, &mut client)? {
            break;
        }
    }
    Ok(())
}

fn session_token(head: &Head) -> Option<String> {
    let query = head.word(1).split(['?', '&']).find_map(|pair| pair.strip_prefix("X-Amz-Security-Token="));
    query.map(unescape).or_else(|| head.header("x-amz-security-token").map(str::to_owned))
}

/// One request. Yields whether another may follow on this connection.
fn exchange(
    shared: &Shared,
    head: &Head,
    from: &mut BufReader<TcpStream>,
    client: &mut TcpStream,
) -> Result<bool> {
    let method = head.word(0);
    let (id, wait, fault) = shared.arrive(head);
    if !wait.is_zero() {
        shared.pause(wait);
    }
    match fault {
        Some(Fault::Hang) => {
            shared.hang(client);
            return Ok(false);
        }
        Some(Fault::Reset) => {
            reset(client);
            return Ok(false);
        }
        _ => {}
    }
    let may_follow = !head.says("connection", "close");
    let expects = head.says("expect", "100-continue");
    let refusal = match fault {
        Some(Fault::Status(status)) => Some(status),
        _ => None,
    };
    if let Some(status) = refusal {
        // Who waits for a word before sending its body gets the last one.
        if !expects {
            head.request_body().relay(from, &mut std::io::sink())?;
        }
        shared.note(id, |e| e.status = Some(status));
        return refuse(client, method, status, may_follow && !expects);
    }
    if expects {
        client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    // Taken once the whole head is here, given back when the store has answered.
    let conditions = shared.conditions.read().unwrap_or_else(PoisonError::into_inner).clone();
    let condition = conditions.filter(|_| matches!(method, "PUT" | "POST" | "DELETE"));
    let (_alone, _among);
    if let Some(s3) = condition {
        if head.header("if-none-match").is_some() || head.header("if-match").is_some() {
            _alone = shared.writing.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(status) = unmet(&s3, head)? {
                head.request_body().relay(from, &mut std::io::sink())?;
                shared.note(id, |e| e.status = Some(status));
                return refuse(client, method, status, may_follow);
            }
        } else {
            _among = shared.writing.read().unwrap_or_else(PoisonError::into_inner);
        }
    }
    if fault == Some(Fault::Late) {
        return late(shared, id, head, from, client);
    }
    let Ok(upstream) = TcpStream::connect(shared.upstream) else {
        // The nearest thing to a refusal that is left.
        reset(client);
        return Ok(false);
    };
    let _known = shared.know(&upstream)?;
    let mut to = Deaf { inner: &upstream, broken: false };
    to.write_all(&head.raw)?;
    if fault == Some(Fault::HalfRequest) {
        let half = Body::Length(half_of(head.request_body(), from)?).relay(from, &mut to)?;
        shared.note(id, |e| e.up = half);
        return Ok(false);
    }
    let up = head.request_body().relay(from, &mut to)?;
    shared.note(id, |e| e.up = up);
    let kept = respond(shared, id, head, fault, &upstream, client)?;
    Ok(kept && may_follow)
}

/// Keeps a request whose sender is told that it is lost.
fn late(
    shared: &Shared,
    id: u64,
    head: &Head,
    from: &mut BufReader<TcpStream>,
    client: &TcpStream,
) -> Result<bool> {
    let mut request = head.raw.clone();
    head.request_body().relay(from, &mut request)?;
    reset(client);
    client.shutdown(std::net::Shutdown::Both)?;
    let mut state = lock(&shared.state);
    let edition = state.edition;
    while state.edition == edition && !state.closing {
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    drop(state);
    let mut upstream = TcpStream::connect(shared.upstream)?;
    upstream.write_all(&request)?;
    let answer = Head::read(&mut BufReader::new(upstream))?.ok_or(ErrorKind::UnexpectedEof)?;
    shared.note(id, |e| e.status = answer.status().ok());
    Ok(false)
}

/// Passes the answer on. Yields whether the connection can be used again.
fn respond(
    shared: &Shared,
    id: u64,
    request: &Head,
    fault: Option<Fault>,
    upstream: &TcpStream,
    client: &mut TcpStream,
) -> Result<bool> {
    let method = request.word(0);
    let mut from = BufReader::new(upstream);
    let mut answer = loop {
        let head = Head::read(&mut from)?.ok_or(ErrorKind::UnexpectedEof)?;
        // The proxy has said 100 itself.
        if head.status()? >= 200 {
            break head;
        }
    };
    let body = answer.response_body(method)?;
    if matches!(fault, Some(Fault::HalfResponse | Fault::NoResponse)) {
        let mut whole = Vec::new();
        body.relay(&mut from, &mut whole)?;
        shared.note(id, |e| e.status = Some(answer.status().unwrap_or(0)));
        if fault == Some(Fault::HalfResponse) && !whole.is_empty() {
            let half = &whole[..whole.len() / 2];
            client.write_all(&answer.raw)?;
            client.write_all(half)?;
            shared.note(id, |e| e.down = half.len() as u64);
        }
        return Ok(false);
    }
    let status = answer.status()?;
    // The parts of an upload keep theirs, which the store wants to see again.
    let foreign = lock(&shared.state).foreign_etags.filter(|_| !request.word(1).contains("partNumber="));
    let down = if let Some(says_so) = foreign {
        answer.raw = with_foreign_etag(&answer.raw, says_so);
        client.write_all(&answer.raw)?;
        // What completes an upload has it in the body too.
        let mut whole = Vec::new();
        let down = body.relay(&mut from, &mut whole)?;
        client.write_all(&if method == "POST" { with_foreign_etag(&whole, false) } else { whole })?;
        down
    } else {
        client.write_all(&answer.raw)?;
        body.relay(&mut from, client)?
    };
    shared.note(id, |e| (e.status, e.down) = (Some(status), down));
    Ok(body != Body::UntilClose && !answer.says("connection", "close"))
}

/// The same head, or XML, of the same length, with another `ETag` of the same form.
fn with_foreign_etag(bytes: &[u8], says_so: bool) -> Vec<u8> {
    let text = String::from_utf8_lossy(bytes);
    let lower = text.to_ascii_lowercase();
    let Some(begins) = ["\netag:", "<etag>"].iter().find_map(|name| Some(lower.find(name)? + name.len()))
    else {
        return bytes.to_vec();
    };
    let mut changed = text.into_owned().into_bytes();
    let digits = changed.iter_mut().skip(begins).skip_while(|b| !b.is_ascii_hexdigit());
    for digit in digits.take_while(|b| b.is_ascii_hexdigit()) {
        let value = char::from(*digit).to_digit(16).unwrap_or(0);
        *digit = char::from_digit(15 - value, 16).map_or(b'0', |c| c as u8);
    }
    if says_so {
        let headers = b"x-amz-server-side-encryption: aws:kms\r\n\
            x-amz-server-side-encryption-aws-kms-key-id: arn:aws:kms:us-east-1:1:key/1\r\n";
        let end = changed.len().saturating_sub(2);
        changed.splice(end..end, headers.iter().copied());
    }
    changed
}

/// Half of what is to come. Of chunks nobody knows how many there are: half of the first.
fn half_of(body: Body, from: &mut impl BufRead) -> Result<u64> {
    Ok(match body {
        Body::Length(length) => length / 2,
        Body::Chunked | Body::UntilClose => from.fill_buf()?.len() as u64 / 2,
    })
}

/// The status that a condition which does not hold is answered with.
fn unmet(s3: &S3, head: &Head) -> Result<Option<u16>> {
    let path = head.word(1).split('?').next().unwrap_or_default();
    let found = s3.send("HEAD", &unescape(path), &[], &[], &[])?;
    let tag = found.head.header("etag").filter(|_| found.status == 200).map(bare);
    if !matches!(found.status, 200 | 404) {
        return Err(Error::other(format!("the store answered {} to HEAD {path}", found.status)));
    }
    let listed =
        |wanted: &str, tag: &str| wanted.split(',').any(|w| w.trim() == "*" || bare(w.trim()) == tag);
    if let (Some(wanted), Some(tag)) = (head.header("if-none-match"), tag)
        && listed(wanted, tag)
    {
        return Ok(Some(412));
    }
    Ok(match (head.header("if-match"), tag) {
        (Some(_), None) => Some(404),
        (Some(wanted), Some(tag)) if !listed(wanted, tag) => Some(412),
        _ => None,
    })
}

/// An entity tag without what is around it.
fn bare(tag: &str) -> &str {
    tag.trim_start_matches("W/").trim_matches('"')
}

/// Answers as the store would. Yields whether the connection can be used again.
fn refuse(client: &mut TcpStream, method: &str, status: u16, may_follow: bool) -> Result<bool> {
    let (reason, code) = match status {
        400 => ("Bad Request", "InvalidRequest"),
        403 => ("Forbidden", "AccessDenied"),
        404 => ("Not Found", "NoSuchKey"),
        409 => ("Conflict", "ConditionalRequestConflict"),
        412 => ("Precondition Failed", "PreconditionFailed"),
        429 => ("Too Many Requests", "TooManyRequests"),
        503 => ("Service Unavailable", "SlowDown"),
        507 => ("Insufficient Storage", "QuotaExceeded"),
        _ => ("Internal Server Error", "InternalError"),
    };
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{reason}</Message>\
         <RequestId>proxy</RequestId></Error>"
    );
    let length = text.len();
    let connection = if may_follow { "keep-alive" } else { "close" };
    let body = if method == "HEAD" { "" } else { text.as_str() };
    write!(
        client,
        "HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\n\
         Connection: {connection}\r\n\r\n{body}"
    )?;
    if !may_follow {
        linger(client);
    }
    Ok(may_follow)
}

/// Closing with bytes unread resets the connection and takes the answer with it: says that
/// nothing follows, and waits a moment for the other side's end.
fn linger(client: &mut TcpStream) {
    let _ = client.shutdown(std::net::Shutdown::Write);
    let _ = client.set_read_timeout(Some(Duration::from_millis(200)));
    let mut rest = [0; 4096];
    while matches!(client.read(&mut rest), Ok(1..)) {}
}

/// The connection is reset once its last descriptor is closed.
fn reset(client: &TcpStream) {
    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    let _ = setsockopt(client, sockopt::Linger, &at_once);
}

/// The server, which may answer before it has read everything: the answer counts, and the rest
/// of the request goes nowhere.
struct Deaf<'a> {
    inner: &'a TcpStream,
    broken: bool,
}

impl Write for Deaf<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        if !self.broken && self.inner.write_all(bytes).is_err() {
            self.broken = true;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
