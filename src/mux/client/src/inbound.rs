//! The door: an HTTP server that the whole Internet reaches, and one mux-server may enter.
//!
//! Who a request is from is known from its head; the body of a stranger's is not read. Strangers are
//! sent away after one answer, and when there are too many connections the stranger who came first
//! goes. What is let in is bounded in number, time and bytes, and answered when it is safe.
//!
//! Refuses: bodies over 10 MiB, more bodies at a time than the memory has room for, and everything
//! that is no event. May import: `desk`, `dispatch`, `event`, `queue`, `register`, `replication`, `token`.

use crate::desk::Desk;
use crate::dispatch::Dispatch;
use crate::event::Head;
use crate::queue::{Accepted, Queue};
use crate::register::{Denied, Registration};
use crate::replication::Replication;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

/// The contract's.
const BODY_MAX: u64 = 10 * 1024 * 1024;
/// Bodies that are in memory at the same time: one of the largest, or many of the usual.
const BODIES_KIB: u32 = 12 * 1024;
const PIECE: usize = 256 * 1024;
const CONNECTIONS_MAX: usize = 512;
/// A head is some 600 bytes.
const BUFFER_MAX: usize = 16 * 1024;
const HEAD_TIME: Duration = Duration::from_secs(5);
/// Of a stranger, from the connection to the answer.
const STRANGER_TIME: Duration = Duration::from_secs(10);
/// The server waits for 15 s in all.
const BODY_TIME: Duration = Duration::from_secs(10);
/// For memory. Later is too late for this try.
const ROOM_TIME: Duration = Duration::from_secs(2);
/// Events that are not done. The server keeps what is not taken.
const DEPTH_MAX: u64 = 50_000;
const DEPTH_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// With a bucket, where the queue goes as one file whenever it has changed.
const DEPTH_BYTES_MAX_BUCKET: u64 = 64 * 1024 * 1024;

pub(crate) struct Door {
    pub(crate) registration: Arc<Registration>,
    pub(crate) queue: Queue,
    pub(crate) dispatch: Arc<Dispatch>,
    pub(crate) replication: Option<Arc<Replication>>,
    pub(crate) desk: Arc<Desk>,
    pub(crate) bodies: Arc<Semaphore>,
    pub(crate) guests: Guests,
    bytes_max: u64,
}

impl Door {
    pub(crate) fn new(
        registration: Arc<Registration>,
        queue: Queue,
        dispatch: Arc<Dispatch>,
        replication: Option<Arc<Replication>>,
        desk: Arc<Desk>,
    ) -> Self {
        let bodies = Arc::new(Semaphore::new(BODIES_KIB as usize));
        let bytes_max = if replication.is_some() { DEPTH_BYTES_MAX_BUCKET } else { DEPTH_BYTES_MAX };
        Self {
            registration,
            queue,
            dispatch,
            replication,
            desk,
            bodies,
            guests: Guests::default(),
            bytes_max,
        }
    }
}

// === Connections ===

/// Who is connected. A stranger is one who has shown no good token yet.
#[derive(Default)]
pub(crate) struct Guests {
    next: AtomicU64,
    here: Mutex<Here>,
}

#[derive(Default)]
struct Here {
    count: usize,
    strangers: BTreeMap<u64, Arc<Notify>>,
}

impl Guests {
    fn here(&self) -> MutexGuard<'_, Here> {
        self.here.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// None when everybody here is known and there is no room.
    fn admit(self: &Guests) -> Option<(u64, Arc<Notify>)> {
        let mut here = self.here();
        if here.count >= CONNECTIONS_MAX {
            let (_, first) = here.strangers.pop_first()?;
            first.notify_one();
        }
        let (number, notify) = (self.next.fetch_add(1, Ordering::Relaxed), Arc::new(Notify::new()));
        here.count += 1;
        here.strangers.insert(number, Arc::clone(&notify));
        Some((number, notify))
    }

    fn is_known(&self, number: u64) {
        self.here().strangers.remove(&number);
    }

    fn is_stranger(&self, number: u64) -> bool {
        self.here().strangers.contains_key(&number)
    }

    fn leave(&self, number: u64) {
        let mut here = self.here();
        here.count = here.count.saturating_sub(1);
        here.strangers.remove(&number);
    }
}

/// Serves until it is told to stop; what has been let in is still answered.
pub(crate) async fn serve(door: Arc<Door>, listener: TcpListener, mut stopping: watch::Receiver<bool>) {
    let mut hosts = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = hosts.join_next() => continue,
            _ = stopping.wait_for(|stop| *stop) => break,
        };
        match accepted {
            Ok((stream, _)) => {
                if let Some((number, leave)) = door.guests.admit() {
                    hosts.spawn(host(Arc::clone(&door), stream, number, leave, stopping.clone()));
                }
            }
            // No descriptors left, say. Connections end by themselves.
            Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
    drop(listener);
    while hosts.join_next().await.is_some() {}
}

/// Makes room when a connection ends, however that comes.
struct Leaving<'a>(&'a Guests, u64);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

async fn host(
    door: Arc<Door>,
    stream: TcpStream,
    number: u64,
    leave: Arc<Notify>,
    mut stopping: watch::Receiver<bool>,
) {
    let _leaving = Leaving(&door.guests, number);
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| {
        let door = Arc::clone(&door);
        async move { Ok::<_, Infallible>(answer(&door, number, request).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(BUFFER_MAX);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let patience = tokio::time::sleep(STRANGER_TIME);
    tokio::pin!(patience);
    let (mut stopped, mut waited) = (false, false);
    loop {
        tokio::select! {
            _ = connection.as_mut() => break,
            () = leave.notified() => break,
            () = patience.as_mut(), if !waited => {
                if door.guests.is_stranger(number) {
                    break;
                }
                waited = true;
            }
            _ = stopping.wait_for(|stop| *stop), if !stopped => {
                if door.guests.is_stranger(number) {
                    break;
                }
                stopped = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

// === Requests ===

type Reply = Response<Full<Bytes>>;

fn reply(status: StatusCode, code: &str) -> Reply {
    let body = if status.is_success() {
        serde_json::json!({"ok": true, "result": code})
    } else {
        serde_json::json!({"ok": false, "error": code})
    };
    let mut reply = Response::new(Full::new(Bytes::from(body.to_string())));
    *reply.status_mut() = status;
    reply.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    reply
}

/// To a stranger: one answer, and goodbye.
fn away(status: StatusCode, code: &str) -> Reply {
    let mut reply = reply(status, code);
    reply.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    reply
}

fn later(code: &str) -> Reply {
    let mut reply = away(StatusCode::SERVICE_UNAVAILABLE, code);
    reply.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    reply
}

async fn answer(door: &Arc<Door>, guest: u64, request: Request<Incoming>) -> Reply {
    match (request.uri().path(), request.method()) {
        ("/v1/mux/inbound", &Method::POST) => {}
        ("/v1/mux/inbound", _) => return away(StatusCode::METHOD_NOT_ALLOWED, "only POST"),
        ("/healthz", &Method::GET | &Method::HEAD) => return away(StatusCode::OK, "live"),
        _ => return away(StatusCode::NOT_FOUND, "there is nothing here"),
    }
    if let Err(reply) = is_allowed(door, &request).await {
        return reply;
    }
    door.guests.is_known(guest);
    match take(door, request).await {
        Ok(reply) | Err(reply) => reply,
    }
}

/// By the head alone.
async fn is_allowed(door: &Door, request: &Request<Incoming>) -> Result<(), Reply> {
    let no = |why: &str| away(StatusCode::UNAUTHORIZED, why);
    let mut given = request.headers().get_all(AUTHORIZATION).iter();
    let (Some(given), None) = (given.next(), given.next()) else {
        return Err(no("a bearer token is needed"));
    };
    let token = given.to_str().ok().and_then(|text| {
        let (scheme, token) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    let Some(token) = token else { return Err(no("a bearer token is needed")) };
    door.registration.check(token).await.map_err(|denied| match denied {
        Denied::Token(why) => no(why),
        Denied::NoKeys => later("the mux-server's keys are not at hand"),
    })?;
    let named = request.headers().get("x-openclaw-id");
    if named.is_some_and(|id| id.as_bytes() != door.registration.device_id().as_bytes()) {
        return Err(no("X-OpenClaw-Id names another device"));
    }
    Ok(())
}

async fn take(door: &Arc<Door>, request: Request<Incoming>) -> Result<Reply, Reply> {
    let too_large = || away(StatusCode::PAYLOAD_TOO_LARGE, "an event has at most 10 MiB");
    let announced = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > BODY_MAX) {
        return Err(too_large());
    }
    if door.dispatch.depth() >= DEPTH_MAX || door.dispatch.bytes() >= door.bytes_max {
        return Err(later("the queue is full"));
    }
    let kib = u32::try_from(announced.unwrap_or(BODY_MAX).div_ceil(1024)).unwrap_or(BODIES_KIB).max(1);
    let room = tokio::time::timeout(ROOM_TIME, Arc::clone(&door.bodies).acquire_many_owned(kib)).await;
    let Ok(Ok(room)) = room else { return Err(later("too much at a time")) };
    let reading = read(request.into_body(), announced);
    let body = match tokio::time::timeout(BODY_TIME, reading).await {
        Ok(Ok(body)) => body,
        Ok(Err(Unread::TooLarge)) => return Err(too_large()),
        Ok(Err(Unread::Broken)) => return Err(away(StatusCode::BAD_REQUEST, "the body broke off")),
        Err(_) => return Err(away(StatusCode::REQUEST_TIMEOUT, "the body took too long")),
    };
    // To the end, even when the server hangs up and nobody waits any more: what is in the queue must
    // be worked on.
    let keeping = tokio::spawn(keep(Arc::clone(door), body, room));
    let word = keeping.await.map_err(|_| later("this was not taken"))??;
    // The event is ours and is answered as ever; the server keeps it too, and its next delivery is known.
    if let Some(replication) = &door.replication
        && !replication.wait().await
    {
        return Err(later("the bucket does not have it yet"));
    }
    Ok(reply(StatusCode::OK, word))
}

/// Into the queue, and on its way.
async fn keep(
    door: Arc<Door>,
    body: Vec<Vec<u8>>,
    room: OwnedSemaphorePermit,
) -> Result<&'static str, Reply> {
    let head = Head::read(Pieces { all: &body, at: 0, offset: 0 })
        .map_err(|rule| reply(StatusCode::BAD_REQUEST, rule))?;
    if head.openclaw_id.as_deref().is_some_and(|id| id != door.registration.device_id()) {
        return Err(reply(StatusCode::BAD_REQUEST, "openclawId names another device"));
    }
    let size = body.iter().map(Vec::len).sum::<usize>() as u64;
    let session = head.session_key.clone();
    let accepted = door.queue.accept(head.event_id, head.session_key, head.channel, body).await;
    drop(room);
    match accepted {
        Ok(Accepted::New(seq)) => {
            door.desk.change(|board| board.accepted += 1);
            door.dispatch.push(seq, session, size);
            Ok("accepted")
        }
        Ok(Accepted::Known(open)) => {
            door.desk.change(|board| board.duplicates += 1);
            if let Some((seq, session)) = open {
                door.dispatch.push(seq, session, size);
            }
            Ok("known")
        }
        Err(failure) => {
            door.desk.failed(failure.to_string());
            Err(later("the queue cannot be written"))
        }
    }
}

enum Unread {
    TooLarge,
    Broken,
}

/// In pieces, so that a large event never needs one large room.
async fn read(mut body: Incoming, announced: Option<u64>) -> Result<Vec<Vec<u8>>, Unread> {
    let announced = usize::try_from(announced.unwrap_or(PIECE as u64)).unwrap_or(PIECE);
    let room = |left: usize| Vec::with_capacity(left.clamp(64, PIECE));
    let mut pieces: Vec<Vec<u8>> = Vec::new();
    let mut piece: Vec<u8> = room(announced);
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let Ok(data) = frame.map_err(|_| Unread::Broken)?.into_data() else { continue };
        length += data.len();
        if length as u64 > BODY_MAX {
            return Err(Unread::TooLarge);
        }
        if piece.len() + data.len() > PIECE {
            let left = announced.saturating_sub(length - data.len());
            pieces.push(std::mem::replace(&mut piece, room(left)));
        }
        piece.extend_from_slice(&data);
    }
    pieces.push(piece);
    Ok(pieces)
}

/// Pieces, read as one.
struct Pieces<'a> {
    all: &'a [Vec<u8>],
    at: usize,
    offset: usize,
}

impl std::io::Read for Pieces<'_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        while let Some(piece) = self.all.get(self.at) {
            let rest = piece.get(self.offset..).unwrap_or_default();
            if rest.is_empty() {
                (self.at, self.offset) = (self.at + 1, 0);
                continue;
            }
            let n = rest.len().min(into.len());
            if let (Some(to), Some(from)) = (into.get_mut(..n), rest.get(..n)) {
                to.copy_from_slice(from);
            }
            self.offset += n;
            return Ok(n);
        }
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn pieces_are_read_as_one() {
        let all = [b"ab".to_vec(), Vec::new(), b"cde".to_vec()];
        let mut text = String::new();
        Pieces { all: &all, at: 0, offset: 0 }.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abcde");
    }

    #[test]
    fn the_first_stranger_makes_room_and_who_is_known_stays() {
        let guests = Guests::default();
        let all: Vec<_> = (0..CONNECTIONS_MAX).map(|_| guests.admit().unwrap()).collect();
        guests.is_known(all[0].0);
        assert!(guests.admit().is_some());
        assert!(!guests.is_stranger(all[1].0) && guests.is_stranger(all[2].0));
        // It is still here until its task has ended.
        guests.leave(all[1].0);
        for (number, _) in &all {
            guests.is_known(*number);
        }
    }
}
