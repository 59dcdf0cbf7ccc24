//! The inbound server: HTTP that everybody on the Internet reaches, for deliveries of one mux-server.
//!
//! A request is authenticated by its head; the body of a stranger's is not read. A stranger gets one
//! answer and is disconnected. Deliveries are limited in number, time and bytes, and acknowledged when
//! the event is safe.

use crate::connections::{Connection, ConnectionLimit};
use crate::delivery_auth::{DeliveryAuth, Denied};
use crate::dispatch::Dispatcher;
use crate::event_body::{self, BodyError};
use crate::queue::{Accepted, Queue};
use crate::replication::Replication;
use crate::status::StatusReporter;
use bytes::Bytes;
use cvm_mux_contract::INSTANCE_HEADER;
use cvm_mux_contract::event::{BYTES_MAX, EventHead, INBOUND_PATH};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

/// Of all bodies that are in memory: one of the largest, or many of the usual.
const BODIES_KIB_MAX: u32 = 12 * 1024;
/// A head has some 600 bytes.
const HEAD_BYTES_MAX: usize = 16 * 1024;
const HEAD_TIME: Duration = Duration::from_secs(5);
/// From a stranger's connection to the answer.
const STRANGER_TIME: Duration = Duration::from_secs(10);
/// The server waits for 15 s in all.
const BODY_TIME: Duration = Duration::from_secs(10);
/// How long a delivery waits for memory. Later would be too late for this try.
const MEMORY_TIME: Duration = Duration::from_secs(2);
/// Events that are not done. The server keeps what is not taken.
const OPEN_EVENTS_MAX: u64 = 50_000;
const OPEN_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// With a bucket, to which the queue goes as one file whenever it has changed.
const OPEN_BYTES_MAX_BUCKET: u64 = 64 * 1024 * 1024;

type HttpResponse = Response<Full<Bytes>>;

pub(crate) struct InboundServer {
    auth: Arc<DeliveryAuth>,
    queue: Queue,
    dispatcher: Arc<Dispatcher>,
    replication: Option<Arc<Replication>>,
    status: Arc<StatusReporter>,
    body_memory: Arc<Semaphore>,
    connections: Arc<ConnectionLimit>,
}

impl InboundServer {
    pub(crate) fn new(
        auth: Arc<DeliveryAuth>,
        queue: Queue,
        dispatcher: Arc<Dispatcher>,
        replication: Option<Arc<Replication>>,
        status: Arc<StatusReporter>,
    ) -> Self {
        let body_memory = Arc::new(Semaphore::new(BODIES_KIB_MAX as usize));
        Self { auth, queue, dispatcher, replication, status, body_memory, connections: Arc::default() }
    }

    /// Serves until `stopping` says so. Deliveries that have been let in are still answered.
    pub(crate) async fn serve(self: Arc<Self>, listener: TcpListener, mut stopping: watch::Receiver<bool>) {
        let mut tasks = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = tasks.join_next() => continue,
                _ = stopping.wait_for(|stop| *stop) => break,
            };
            match accepted {
                Ok((stream, _)) => {
                    if let Some(connection) = self.connections.admit() {
                        let server = Arc::clone(&self);
                        tasks.spawn(server.serve_connection(stream, connection, stopping.clone()));
                    }
                }
                // There may be no descriptors left. Connections end by themselves.
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
        drop(listener);
        while tasks.join_next().await.is_some() {}
    }

    async fn serve_connection(
        self: Arc<Self>,
        stream: TcpStream,
        connection: Connection,
        mut stopping: watch::Receiver<bool>,
    ) {
        let _ = stream.set_nodelay(true);
        let connection = &connection;
        let service = service_fn(|request| {
            let server = Arc::clone(&self);
            async move { Ok::<_, Infallible>(server.answer(connection, request).await) }
        });
        let mut builder = http1::Builder::new();
        builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIME).max_buf_size(HEAD_BYTES_MAX);
        let exchange = builder.serve_connection(TokioIo::new(stream), service);
        tokio::pin!(exchange);
        let stranger_time = tokio::time::sleep(STRANGER_TIME);
        tokio::pin!(stranger_time);
        let (mut is_stopping, mut time_is_over) = (false, false);
        loop {
            tokio::select! {
                _ = exchange.as_mut() => break,
                () = connection.evicted() => break,
                () = stranger_time.as_mut(), if !time_is_over => time_is_over = true,
                _ = stopping.wait_for(|stop| *stop), if !is_stopping => {
                    is_stopping = true;
                    exchange.as_mut().graceful_shutdown();
                }
            }
            if (time_is_over || is_stopping) && connection.is_stranger() {
                break;
            }
        }
    }

    async fn answer(self: &Arc<Self>, connection: &Connection, request: Request<Incoming>) -> HttpResponse {
        match (request.uri().path(), request.method()) {
            (INBOUND_PATH, &Method::POST) => {}
            (INBOUND_PATH, _) => return last_response(StatusCode::METHOD_NOT_ALLOWED, "only POST"),
            ("/healthz", &Method::GET | &Method::HEAD) => return last_response(StatusCode::OK, "live"),
            _ => return last_response(StatusCode::NOT_FOUND, "no such path"),
        }
        if let Err(response) = self.authenticate(&request).await {
            return response;
        }
        connection.is_known();
        match self.take(request).await {
            Ok(response) | Err(response) => response,
        }
    }

    /// By the head alone.
    async fn authenticate(&self, request: &Request<Incoming>) -> Result<(), HttpResponse> {
        let no = |why: &str| last_response(StatusCode::UNAUTHORIZED, why);
        let token = bearer(request).ok_or_else(|| no("a bearer token is needed"))?;
        self.auth.check(token).await.map_err(|denied| match denied {
            Denied::Token(why) => no(why),
            Denied::NoKeys => try_later("the mux-server's keys have not been fetched yet"),
        })?;
        let named = request.headers().get(INSTANCE_HEADER);
        if named.is_some_and(|id| id.as_bytes() != self.auth.device_id().as_bytes()) {
            return Err(no("X-OpenClaw-Id names another device"));
        }
        Ok(())
    }

    async fn take(self: &Arc<Self>, request: Request<Incoming>) -> Result<HttpResponse, HttpResponse> {
        let length = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if length.is_some_and(|length| length > BYTES_MAX) {
            return Err(too_large());
        }
        if self.is_full() {
            return Err(try_later("the queue is full"));
        }
        let kib = u32::try_from(length.unwrap_or(BYTES_MAX).div_ceil(1024)).unwrap_or(BODIES_KIB_MAX).max(1);
        let memory = Arc::clone(&self.body_memory).acquire_many_owned(kib);
        let Ok(Ok(memory)) = tokio::time::timeout(MEMORY_TIME, memory).await else {
            return Err(try_later("too many deliveries at the same time"));
        };
        let reading = event_body::read(request.into_body(), length);
        let body = match tokio::time::timeout(BODY_TIME, reading).await {
            Ok(Ok(body)) => body,
            Ok(Err(BodyError::TooLarge)) => return Err(too_large()),
            Ok(Err(BodyError::Broken)) => {
                return Err(last_response(StatusCode::BAD_REQUEST, "the body broke off"));
            }
            Err(_) => {
                return Err(last_response(StatusCode::REQUEST_TIMEOUT, "the body did not come in time"));
            }
        };
        // A task of its own: an event that is in the queue must be worked on, even when the server hangs up.
        let storing = tokio::spawn(Arc::clone(self).store(body, memory));
        let result = storing.await.map_err(|_| try_later("the event was not stored"))??;
        // Without the bucket the event is answered as ever. The server keeps it too, and the queue knows it
        // when it comes again.
        if let Some(replication) = &self.replication
            && !replication.wait().await
        {
            return Err(try_later("the bucket does not have it yet"));
        }
        Ok(response(StatusCode::OK, result))
    }

    fn is_full(&self) -> bool {
        let sessions = self.dispatcher.sessions();
        let bytes_max = if self.replication.is_some() { OPEN_BYTES_MAX_BUCKET } else { OPEN_BYTES_MAX };
        sessions.events() >= OPEN_EVENTS_MAX || sessions.bytes() >= bytes_max
    }

    /// Puts the event into the queue, and has it worked on.
    async fn store(
        self: Arc<Self>,
        body: Vec<Vec<u8>>,
        memory: OwnedSemaphorePermit,
    ) -> Result<&'static str, HttpResponse> {
        let head = EventHead::read(event_body::reader(&body))
            .map_err(|rule| response(StatusCode::BAD_REQUEST, rule))?;
        if head.openclaw_id.as_deref().is_some_and(|id| id != self.auth.device_id()) {
            return Err(response(StatusCode::BAD_REQUEST, "openclawId names another device"));
        }
        let size = body.iter().map(Vec::len).sum::<usize>() as u64;
        let session = head.session_key.clone();
        let accepted = self.queue.accept(head.event_id, head.session_key, head.channel, body).await;
        drop(memory);
        match accepted {
            Ok(Accepted::New(seq)) => {
                self.status.update(|status| status.accepted += 1);
                self.dispatcher.push(seq, session, size);
                Ok("accepted")
            }
            Ok(Accepted::Known(open)) => {
                self.status.update(|status| status.duplicates += 1);
                if let Some((seq, session)) = open {
                    self.dispatcher.push(seq, session, size);
                }
                Ok("known")
            }
            Err(failure) => {
                self.status.failed(failure.to_string());
                Err(try_later("the queue cannot be written"))
            }
        }
    }
}

/// The token of the one Authorization header.
fn bearer(request: &Request<Incoming>) -> Option<&str> {
    let mut given = request.headers().get_all(AUTHORIZATION).iter();
    let (Some(given), None) = (given.next(), given.next()) else { return None };
    let (scheme, token) = given.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn response(status: StatusCode, code: &str) -> HttpResponse {
    let body = if status.is_success() {
        serde_json::json!({"ok": true, "result": code})
    } else {
        serde_json::json!({"ok": false, "error": code})
    };
    let mut response = Response::new(Full::new(Bytes::from(body.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// A response after which the connection is closed.
fn last_response(status: StatusCode, code: &str) -> HttpResponse {
    let mut response = response(status, code);
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    response
}

fn try_later(code: &str) -> HttpResponse {
    let mut response = last_response(StatusCode::SERVICE_UNAVAILABLE, code);
    response.headers_mut().insert(RETRY_AFTER, HeaderValue::from_static("5"));
    response
}

fn too_large() -> HttpResponse {
    last_response(StatusCode::PAYLOAD_TOO_LARGE, "an event has at most 10 MiB")
}
