//! A proxy in front of an S3 server that does to requests what networks and providers do.
//!
//! It passes heads and bodies on as they came: the signature covers the host, which is the
//! proxy's, and a store that takes buckets from the path does not mind. Each request goes to
//! the server on a connection of its own; towards the client connections are kept.

mod exchange;
mod rules;

pub use rules::{Fault, Rule};

use crate::http::Head;
use crate::network::{Network, own_loopback};
use crate::s3::S3;
use crate::wait::lock;
use exchange::{serve, session_token};
use nix::sys::socket::{Shutdown, shutdown};
use std::collections::{BTreeMap, HashMap};
use std::io::{ErrorKind, Result};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

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
