//! HTTP requests to the mux-server, to the gateway on loopback, and for attachments.
//!
//! A redirect is an answer like any other and is not followed. Every answer has a largest size, and
//! every request a longest time.

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue, RETRY_AFTER, USER_AGENT};
use hyper::{Method, Uri};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde::Serialize;
use std::error::Error;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

const CONNECT_TIME: Duration = Duration::from_secs(5);
/// A connection without a request is kept for this long.
const IDLE_TIME: Duration = Duration::from_secs(20);
const IDLE_MAX: usize = 4;
/// Of an answer, unless its request says otherwise.
const ANSWER_BYTES_MAX: usize = 64 * 1024;

pub(crate) struct HttpClient {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// A request. `bearer` goes into the Authorization header and nowhere else.
pub(crate) struct Request<'a> {
    method: Method,
    uri: Uri,
    time: Duration,
    bearer: Option<&'a str>,
    headers: Vec<(&'static str, &'a str)>,
    body: Option<Bytes>,
    answer_bytes_max: usize,
}

impl<'a> Request<'a> {
    pub(crate) fn get(uri: Uri, time: Duration) -> Self {
        Self {
            method: Method::GET,
            uri,
            time,
            bearer: None,
            headers: Vec::new(),
            body: None,
            answer_bytes_max: ANSWER_BYTES_MAX,
        }
    }

    /// With a body that is JSON.
    pub(crate) fn post(uri: Uri, body: Bytes, time: Duration) -> Self {
        Self { method: Method::POST, body: Some(body), ..Self::get(uri, time) }
    }

    pub(crate) fn bearer(self, token: &'a str) -> Self {
        Self { bearer: Some(token), ..self }
    }

    pub(crate) fn header(mut self, name: &'static str, value: &'a str) -> Self {
        self.headers.push((name, value));
        self
    }

    pub(crate) fn answer_bytes_max(self, most: usize) -> Self {
        Self { answer_bytes_max: most, ..self }
    }

    fn build(self) -> Result<hyper::Request<Full<Bytes>>, RequestError> {
        let broken = |why: String| RequestError::Broken(why);
        let mut request = hyper::Request::builder()
            .method(self.method)
            .uri(self.uri)
            .header(USER_AGENT, concat!("openclaw-cvm/", env!("CARGO_PKG_VERSION")));
        if let Some(bearer) = self.bearer {
            let mut value = HeaderValue::try_from(format!("Bearer {bearer}"))
                .map_err(|_| broken("the token cannot stand in a header".to_owned()))?;
            value.set_sensitive(true);
            request = request.header(AUTHORIZATION, value);
        }
        if self.body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        for (name, value) in self.headers {
            let value = HeaderValue::from_bytes(value.as_bytes())
                .map_err(|_| broken(format!("{name} cannot stand in a header")))?;
            request = request.header(name, value);
        }
        request
            .body(self.body.map(Full::new).unwrap_or_default())
            .map_err(|_| broken("this is no address that can be asked".to_owned()))
    }
}

/// The body of a request. Strings, numbers and lists: JSON has all of them.
pub(crate) fn json(body: &impl Serialize) -> Bytes {
    serde_json::to_vec(body).unwrap_or_default().into()
}

pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Response {
    pub(crate) fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// What the server calls the error. Only letters, digits, `_` and `-`, since logs show it.
    pub(crate) fn error_code(&self) -> Option<String> {
        let body = self.json();
        let code = ["/code", "/error/code", "/error", "/error/type"]
            .iter()
            .find_map(|place| body.pointer(place)?.as_str())?;
        let is_plain = code.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-'));
        (is_plain && code.len() <= 64).then(|| code.to_owned())
    }

    /// Status and error code, for people.
    pub(crate) fn summary(&self) -> String {
        match self.error_code() {
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

/// Why a request has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RequestError {
    /// There was no connection.
    Unreachable(String),
    /// The exchange broke off or took too long, or the request cannot be made at all.
    Broken(String),
    /// The answer has more bytes than this.
    TooLarge(usize),
}

impl fmt::Display for RequestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(why) | Self::Broken(why) => f.write_str(why),
            Self::TooLarge(most) => write!(f, "the answer is larger than {most} bytes"),
        }
    }
}

impl HttpClient {
    /// For `https` the system's root certificates are read, which is memory that `http` does not need.
    pub(crate) fn new(with_tls: bool, keeps_connections: bool) -> Result<Self, String> {
        let mut roots = rustls::RootCertStore::empty();
        if with_tls {
            roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            if roots.is_empty() {
                return Err("no root certificates were found; install the package ca-certificates".to_owned());
            }
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| format!("TLS: {e}"))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIME));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(tls)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_idle_timeout(IDLE_TIME)
            .pool_timer(TokioTimer::new())
            .pool_max_idle_per_host(if keeps_connections { IDLE_MAX } else { 0 })
            .build(connector);
        Ok(Self { client })
    }

    /// The answer, whatever its status.
    pub(crate) async fn send(&self, request: Request<'_>) -> Result<Response, RequestError> {
        let time = request.time;
        match tokio::time::timeout(time, self.exchange(request)).await {
            Ok(outcome) => outcome,
            Err(_) => Err(RequestError::Broken(format!("no answer within {} s", time.as_secs()))),
        }
    }

    async fn exchange(&self, request: Request<'_>) -> Result<Response, RequestError> {
        let most = request.answer_bytes_max;
        let answer = self.client.request(request.build()?).await.map_err(|e| {
            let why = innermost(&e);
            if e.is_connect() { RequestError::Unreachable(why) } else { RequestError::Broken(why) }
        })?;
        let (head, mut body) = answer.into_parts();
        let mut bytes = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|e| RequestError::Broken(innermost(&e)))?;
            if let Some(data) = frame.data_ref() {
                if bytes.len() + data.len() > most {
                    return Err(RequestError::TooLarge(most));
                }
                bytes.extend_from_slice(data);
            }
        }
        Ok(Response { status: head.status.as_u16(), headers: head.headers, body: bytes.freeze() })
    }
}

/// The innermost cause says most. No cause holds a header or a body.
fn innermost(error: &(dyn Error + 'static)) -> String {
    match error.source() {
        Some(cause) => innermost(cause),
        None => error.to_string().replace(char::is_control, " "),
    }
}
