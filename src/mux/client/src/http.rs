//! Asking others over HTTP: the mux-server, the gateway on loopback, attachments.
//!
//! Refuses redirects (an answer with one is an answer), answers over a limit, and to wait for ever.
//! May import: nothing of this crate.

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Request, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use std::convert::Infallible;
use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

const CONNECT: Duration = Duration::from_secs(5);
/// A connection that nobody needs is kept for this long.
const IDLE: Duration = Duration::from_secs(20);
const IDLE_MAX: usize = 4;

pub(crate) struct Http {
    client: Client<HttpsConnector<HttpConnector>, Payload>,
}

pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn is_good(&self) -> bool {
        (200..300).contains(&self.status)
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// What the server calls the matter, where it says so: letters, digits, `_` and `-` only, since
    /// it goes to where everybody reads.
    pub(crate) fn code(&self) -> Option<String> {
        let body = self.json();
        let code = ["/code", "/error/code", "/error", "/error/type"]
            .iter()
            .find_map(|p| body.pointer(p)?.as_str())?;
        let plain = code.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        (plain && code.len() <= 64).then(|| code.to_owned())
    }

    /// Status and code, for people.
    pub(crate) fn words(&self) -> String {
        match self.code() {
            Some(code) => format!("{} {code}", self.status),
            None => self.status.to_string(),
        }
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        const LONGEST: u64 = 60;
        let seconds: u64 = self.headers.get(RETRY_AFTER)?.to_str().ok()?.trim().parse().ok()?;
        Some(Duration::from_secs(seconds.min(LONGEST)))
    }
}

/// Why nobody knows an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Unanswered {
    /// Nobody was reached.
    Away(String),
    /// Somebody was, and it broke off, took too long, or cannot be asked at all.
    Broken(String),
    /// Trying again does not make it smaller.
    TooLarge(usize),
}

impl fmt::Display for Unanswered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Away(why) | Self::Broken(why) => f.write_str(why),
            Self::TooLarge(most) => write!(f, "the answer is larger than {most} bytes"),
        }
    }
}

/// A question. `bearer` goes into the Authorization header and nowhere else.
pub(crate) struct Ask<'a> {
    pub(crate) method: Method,
    pub(crate) uri: Uri,
    pub(crate) bearer: Option<&'a str>,
    pub(crate) headers: &'a [(&'static str, &'a str)],
    pub(crate) body: Option<Bytes>,
    /// What a large body holds until it is on its way.
    pub(crate) room: Option<OwnedSemaphorePermit>,
    pub(crate) answer_max: usize,
    pub(crate) time: Duration,
}

impl Http {
    /// For `https` the system's roots are read, which is memory that `http` does not need.
    pub(crate) fn new(with_tls: bool, keeps_connections: bool) -> Result<Self, String> {
        let mut roots = rustls::RootCertStore::empty();
        if with_tls {
            let found = rustls_native_certs::load_native_certs();
            roots.add_parsable_certificates(found.certs);
            if roots.is_empty() {
                return Err("no root certificates were found; install the package ca-certificates".to_owned());
            }
        }
        let provider = std::sync::Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| format!("TLS: {e}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut plain = HttpConnector::new();
        plain.enforce_http(false);
        plain.set_nodelay(true);
        plain.set_connect_timeout(Some(CONNECT));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(plain);
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE)
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(if keeps_connections { IDLE_MAX } else { 0 })
            .build(connector);
        Ok(Self { client })
    }

    /// The answer, whatever its status; or why nobody knows one.
    pub(crate) async fn ask(&self, ask: Ask<'_>) -> Result<Answer, Unanswered> {
        let time = ask.time;
        match tokio::time::timeout(time, self.exchange(ask)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Unanswered::Broken(format!("no answer within {} s", time.as_secs()))),
        }
    }

    async fn exchange(&self, ask: Ask<'_>) -> Result<Answer, Unanswered> {
        let broken = |why: &str| Unanswered::Broken(why.to_owned());
        let mut request = Request::builder()
            .method(ask.method)
            .uri(ask.uri)
            .header(USER_AGENT, concat!("openclaw-cvm/", env!("CARGO_PKG_VERSION")));
        if let Some(bearer) = ask.bearer {
            let mut value = HeaderValue::try_from(format!("Bearer {bearer}"))
                .map_err(|_| broken("the token cannot stand in a header"))?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        if ask.body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        for (name, value) in ask.headers {
            let value = HeaderValue::from_bytes(value.as_bytes())
                .map_err(|_| broken(&format!("{name} cannot stand in a header")))?;
            request = request.header(*name, value);
        }
        let request = request
            .body(Payload { data: ask.body, _room: ask.room })
            .map_err(|_| broken("this is no address that can be asked"))?;
        let answer = self.client.request(request).await.map_err(|e| {
            if e.is_connect() { Unanswered::Away(words(&e)) } else { Unanswered::Broken(words(&e)) }
        })?;
        let (parts, mut body) = answer.into_parts();
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| Unanswered::Broken(words(&e)))?;
            if let Some(data) = frame.data_ref() {
                if bytes.len() + data.len() > ask.answer_max {
                    return Err(Unanswered::TooLarge(ask.answer_max));
                }
                bytes.extend_from_slice(data);
            }
        }
        Ok(Answer { status: parts.status.as_u16(), headers: parts.headers, body: bytes.freeze() })
    }
}

/// A body in one piece, which is let go when it has been sent.
struct Payload {
    data: Option<Bytes>,
    _room: Option<OwnedSemaphorePermit>,
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.data.take().map(|data| Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.data.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.data.as_ref().map_or(0, Bytes::len) as u64)
    }
}

/// The last cause says most; none of them holds a header or a body.
fn words(error: &(dyn Error + 'static)) -> String {
    let mut last: &(dyn Error + 'static) = error;
    while let Some(next) = last.source() {
        last = next;
    }
    last.to_string().replace(char::is_control, " ")
}
