//! A small S3 client for the control objects: get, put (also on condition), delete, list.
//!
//! rclone moves the user's files. It can neither write on condition nor say in so many words why
//! a bucket does not open; both are needed here, for objects of at most some megabytes.
//!
//! Refuses: multipart uploads, redirects, and to put a URL (which carries a signature) or a
//! credential into an error. May import: `fault`.

use crate::fault::Fault;
use cvm_protocol::storage::StorageSpec;
use rusty_s3::actions::ListObjectsV2;
use rusty_s3::{Bucket, Credentials, S3Action, UrlStyle};
use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use ureq::tls::{RootCerts, TlsConfig};
use zeroize::Zeroizing;

/// How long a signature is good for: longer than any request lasts.
const SIGNED_FOR: Duration = Duration::from_secs(600);
/// A control object is far smaller; what is larger is not ours.
const OBJECT_MAX: u64 = 1 << 30;

pub(crate) struct S3 {
    agent: ureq::Agent,
    bucket: Bucket,
    credentials: Credentials,
    requests: AtomicU64,
    sent: AtomicU64,
    received: AtomicU64,
}

/// An object as it was read.
pub(crate) struct Object {
    pub(crate) bytes: Vec<u8>,
    pub(crate) etag: Option<String>,
}

/// On what a write depends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum When {
    Always,
    /// Nobody has written it yet.
    Absent,
    /// It is still the one that was read.
    Unchanged(String),
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Listing {
    pub(crate) keys: Vec<(String, u64)>,
    /// What follows up to a delimiter, when one was asked for.
    pub(crate) folders: Vec<String>,
    pub(crate) more: Option<String>,
}

impl Listing {
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty() && self.folders.is_empty()
    }
}

impl S3 {
    pub(crate) fn new(spec: &StorageSpec) -> Result<Self, Fault> {
        let endpoint =
            spec.endpoint.clone().unwrap_or_else(|| format!("https://s3.{}.amazonaws.com", spec.region));
        let url = endpoint.parse().map_err(|_| Fault::config("S3_ENDPOINT is not a URL"))?;
        let bucket = Bucket::new(url, UrlStyle::Path, spec.bucket.clone(), spec.region.clone())
            .map_err(|_| Fault::config("S3_ENDPOINT and S3_BUCKET do not make a URL"))?;
        let text = |bytes: &cvm_secrets::base64_bytes::PackedBytes| {
            let bytes = bytes.unpack().ok_or_else(|| Fault::config("the credentials did not arrive"))?;
            let text =
                std::str::from_utf8(&bytes).map_err(|_| Fault::config("the credentials are not text"))?;
            Ok::<_, Fault>(Zeroizing::new(text.to_owned()))
        };
        let (key, secret) = (text(&spec.access_key_id)?, text(&spec.secret_access_key)?);
        let credentials = match &spec.session_token {
            Some(token) => Credentials::new_with_token(key.as_str(), secret.as_str(), text(token)?.as_str()),
            None => Credentials::new(key.as_str(), secret.as_str()),
        };
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::PlatformVerifier)
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .build();
        let agent = ureq::Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(ureq::Proxy::try_from_env())
            .timeout_connect(Some(Duration::from_secs(15)))
            .timeout_global(Some(Duration::from_secs(120)))
            .timeout_recv_response(Some(Duration::from_secs(30)))
            .user_agent(concat!("openclaw-cvm/", env!("CARGO_PKG_VERSION")))
            .build()
            .new_agent();
        let zero = || AtomicU64::new(0);
        Ok(Self { agent, bucket, credentials, requests: zero(), sent: zero(), received: zero() })
    }

    /// Requests, and bytes sent and received, since the start.
    pub(crate) fn counts(&self) -> [u64; 3] {
        [&self.requests, &self.sent, &self.received].map(|n| n.load(Ordering::Relaxed))
    }

    pub(crate) fn get(&self, key: &str) -> Result<Option<Object>, Fault> {
        let url = self.bucket.get_object(Some(&self.credentials), key).sign(SIGNED_FOR);
        let response = self.count(self.agent.get(url.as_str()).call())?;
        match self.judge(response) {
            Ok(object) => Ok(Some(object)),
            Err(Fault::Missing) => Ok(None),
            Err(fault) => Err(fault),
        }
    }

    /// Writes, and yields the new `ETag`.
    pub(crate) fn put(&self, key: &str, bytes: &[u8], when: &When) -> Result<Option<String>, Fault> {
        let url = self.bucket.put_object(Some(&self.credentials), key).sign(SIGNED_FOR);
        let mut request = self.agent.put(url.as_str()).header("content-type", "application/octet-stream");
        request = match when {
            When::Always => request,
            When::Absent => request.header("if-none-match", "*"),
            When::Unchanged(etag) => request.header("if-match", etag),
        };
        self.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let response = self.count(request.send(bytes))?;
        Ok(self.judge(response)?.etag)
    }

    pub(crate) fn delete(&self, key: &str) -> Result<(), Fault> {
        let url = self.bucket.delete_object(Some(&self.credentials), key).sign(SIGNED_FOR);
        let response = self.count(self.agent.delete(url.as_str()).call())?;
        match self.judge(response) {
            Ok(_) | Err(Fault::Missing) => Ok(()),
            Err(fault) => Err(fault),
        }
    }

    /// One page of what is below `prefix`.
    pub(crate) fn list(
        &self,
        prefix: &str,
        folders: bool,
        most: usize,
        after: Option<&str>,
    ) -> Result<Listing, Fault> {
        let mut action = ListObjectsV2::new(&self.bucket, Some(&self.credentials));
        action.with_prefix(prefix);
        action.with_max_keys(most);
        if folders {
            action.with_delimiter("/");
        }
        if let Some(token) = after {
            action.with_continuation_token(token);
        }
        let url = action.sign(SIGNED_FOR);
        let response = self.count(self.agent.get(url.as_str()).call())?;
        let object = match self.judge(response) {
            // A bucket that exists answers a list whatever is in it.
            Err(Fault::Missing) => return Err(Fault::NoBucket),
            other => other?,
        };
        let text = String::from_utf8_lossy(&object.bytes);
        let parsed = ListObjectsV2::parse_response(&text).map_err(|_| {
            Fault::other("the server's answer to a list request is not S3's: is S3_ENDPOINT right?")
        })?;
        Ok(Listing {
            keys: parsed.contents.into_iter().map(|c| (c.key, c.size.unwrap_or(0))).collect(),
            folders: parsed.common_prefixes.into_iter().map(|p| p.prefix).collect(),
            more: parsed.next_continuation_token,
        })
    }

    fn count<T>(&self, result: Result<T, ureq::Error>) -> Result<T, Fault> {
        self.requests.fetch_add(1, Ordering::Relaxed);
        result.map_err(|error| unreachable(&error))
    }

    fn judge(&self, mut response: ureq::http::Response<ureq::Body>) -> Result<Object, Fault> {
        let status = response.status().as_u16();
        let etag = response.headers().get("etag").and_then(|v| v.to_str().ok()).map(str::to_owned);
        let mut bytes = Vec::new();
        let limit = if response.status().is_success() { OBJECT_MAX } else { 64 * 1024 };
        let expected =
            response.headers().get("content-length").and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        let read = response.body_mut().as_reader().take(limit).read_to_end(&mut bytes);
        self.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        if !(200..300).contains(&status) {
            return Err(Fault::of_answer(status, &String::from_utf8_lossy(&bytes)));
        }
        if read.is_err() || expected.is_some_and(|n| n != bytes.len() as u64) {
            return Err(Fault::Unreachable("the connection broke in the middle of an answer".to_owned()));
        }
        Ok(Object { bytes, etag })
    }
}

/// In words of ours: the library's may quote the URL, and with it a signature.
fn unreachable(error: &ureq::Error) -> Fault {
    use ureq::Error as E;
    match error {
        E::HostNotFound => Fault::Unreachable("the host name of S3_ENDPOINT is not found".to_owned()),
        E::Timeout(_) => Fault::Unreachable("no answer in time".to_owned()),
        E::Io(io) => match rustls_words(io) {
            Some(words) => Fault::Tls(words),
            None => Fault::Unreachable(io_words(io)),
        },
        E::Tls(words) => Fault::Tls((*words).to_owned()),
        E::Rustls(error) => Fault::Tls(error.to_string()),
        E::ConnectionFailed => Fault::Unreachable("no connection".to_owned()),
        E::InvalidProxyUrl => Fault::config("the proxy of the environment is not a URL"),
        _ => Fault::Unreachable("the answer is not HTTP as it should be".to_owned()),
    }
}

fn rustls_words(error: &std::io::Error) -> Option<String> {
    let inner = error.get_ref()?;
    let text = inner.to_string();
    (error.kind() == std::io::ErrorKind::InvalidData || text.contains("certificate")).then_some(text)
}

fn io_words(error: &std::io::Error) -> String {
    use std::io::ErrorKind as K;
    match error.kind() {
        K::ConnectionRefused => "the connection is refused".to_owned(),
        K::ConnectionReset | K::ConnectionAborted | K::BrokenPipe | K::UnexpectedEof => {
            "the connection broke".to_owned()
        }
        K::TimedOut | K::WouldBlock => "no answer in time".to_owned(),
        _ => error.raw_os_error().map_or_else(
            || "the connection failed".to_owned(),
            |code| nix::errno::Errno::from_raw(code).desc().to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_protocol::storage::CryptSpec;
    use cvm_secrets::base64_bytes::PackedBytes;
    use std::io::Write as _;

    #[test]
    fn what_does_not_speak_tls_is_no_s3_server() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let endpoint = format!("https://{}", listener.local_addr().expect("an address"));
        let server = std::thread::spawn(move || {
            let (mut client, _) = listener.accept().expect("a client");
            let mut hello = [0; 6];
            client.read_exact(&mut hello).expect("its first words");
            client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").expect("the client reads");
            hello
        });
        let key = || PackedBytes::pack(b"key");
        let spec = StorageSpec {
            bucket: "claws".into(),
            prefix: String::new(),
            region: "us-east-1".into(),
            provider: "Other".into(),
            endpoint: Some(endpoint),
            access_key_id: key(),
            secret_access_key: key(),
            session_token: None,
            crypt: CryptSpec::Clear { password: key(), salt: key() },
            manifest_key: key(),
            user: "openclaw".into(),
            anchor: None,
            adopt: false,
            owner_epoch: 0,
            heartbeat_s: 60,
            drain_s: 60,
            drill_s: 0,
        };
        let s3 = S3::new(&spec).unwrap_or_else(|_| panic!("a client"));
        assert!(matches!(s3.get("object"), Err(Fault::Tls(_) | Fault::Unreachable(_))));
        // A handshake, and in it a hello.
        let hello = server.join().expect("the server does not panic");
        assert_eq!((hello[0], hello[5]), (22, 1));
    }
}
