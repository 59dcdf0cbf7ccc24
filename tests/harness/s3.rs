//! A small S3 client of the tests' own: it sees the bucket as the store does, below the
//! encryption, and shares no code with what is tested.

use crate::http::Head;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use std::fmt::Write as _;
use std::io::{BufReader, Error, ErrorKind, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, SystemTime};

/// Where and as whom.
#[derive(Debug, Clone)]
pub struct S3 {
    pub address: SocketAddr,
    pub region: String,
    pub access_key: String,
    pub secret_key: String,
    /// How long the server may be silent.
    pub timeout: Duration,
}

#[derive(Debug, Clone)]
pub struct Response {
    pub status: u16,
    pub head: Head,
    pub body: Vec<u8>,
}

impl S3 {
    /// The same client, at a proxy for example.
    #[must_use]
    pub fn at(&self, address: SocketAddr) -> Self {
        Self { address, ..self.clone() }
    }

    #[must_use]
    pub fn bucket(&self, name: &str) -> Bucket {
        Bucket { s3: self.clone(), name: name.to_owned() }
    }

    /// One signed request on a connection of its own. `path` is `/BUCKET/KEY` as it is, and
    /// `headers` have names in lower case.
    pub fn send(
        &self,
        method: &str,
        path: &str,
        query: &[(&str, &str)],
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<Response> {
        let mut stream = TcpStream::connect(self.address)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        let head = self.signed(method, path, query, headers, body);
        // A server may answer and close before it has read all of a body.
        let written = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        let mut from = BufReader::new(stream);
        let head = loop {
            match (Head::read(&mut from), &written) {
                (Ok(Some(head)), _) if head.status()? < 200 => {}
                (Ok(Some(head)), _) => break head,
                (Ok(None) | Err(_), Err(error)) => return Err(Error::new(error.kind(), error.to_string())),
                (Ok(None), Ok(())) => return Err(ErrorKind::UnexpectedEof.into()),
                (Err(error), Ok(())) => return Err(error),
            }
        };
        let body = head.response_body(method)?.content(&mut from)?;
        Ok(Response { status: head.status()?, head, body })
    }

    /// AWS Signature Version 4, with every header signed.
    fn signed(
        &self,
        method: &str,
        path: &str,
        query: &[(&str, &str)],
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> String {
        let now = timestamp(SystemTime::now());
        let today = &now[..8];
        let path = escape(path, true);
        let mut query: Vec<_> =
            query.iter().map(|(n, v)| format!("{}={}", escape(n, false), escape(v, false))).collect();
        query.sort();
        let query = query.join("&");
        let content = hex(&Sha256::digest(body));
        let mut headers: Vec<(&str, String)> = headers.iter().map(|(n, v)| (*n, (*v).to_owned())).collect();
        headers.extend([
            ("host", self.address.to_string()),
            ("x-amz-content-sha256", content.clone()),
            ("x-amz-date", now.clone()),
        ]);
        headers.sort();
        let lines = headers.iter().fold(String::new(), |all, (n, v)| all + n + ":" + v + "\n");
        let names = headers.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(";");
        let canonical = format!("{method}\n{path}\n{query}\n{lines}\n{names}\n{content}");
        let scope = format!("{today}/{}/s3/aws4_request", self.region);
        let to_sign = format!("AWS4-HMAC-SHA256\n{now}\n{scope}\n{}", hex(&Sha256::digest(canonical)));
        let key = [today, &self.region, "s3", "aws4_request"]
            .iter()
            .fold(format!("AWS4{}", self.secret_key).into_bytes(), |key, part| mac(&key, part));
        let signature = hex(&mac(&key, &to_sign));
        let target = if query.is_empty() { path } else { format!("{path}?{query}") };
        let lines = lines.replace('\n', "\r\n");
        format!(
            "{method} {target} HTTP/1.1\r\n{lines}content-length: {}\r\nconnection: close\r\nauthorization: \
             AWS4-HMAC-SHA256 Credential={}/{scope}, SignedHeaders={names}, Signature={signature}\r\n\r\n",
            body.len(),
            self.access_key,
        )
    }
}

/// An object with what the store keeps beside its bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    pub bytes: Vec<u8>,
    /// The `x-amz-meta-…` headers and the content type.
    pub metadata: Vec<(String, String)>,
}

/// One bucket, below the encryption. Its methods panic when the store does not do as told.
#[derive(Debug, Clone)]
pub struct Bucket {
    pub s3: S3,
    pub name: String,
}

impl Bucket {
    fn path(&self, key: &str) -> String {
        format!("/{}/{key}", self.name)
    }

    /// A request for one key, with everything that may go wrong.
    pub fn send(&self, method: &str, key: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Response> {
        self.s3.send(method, &self.path(key), &[], headers, body)
    }

    #[track_caller]
    fn expect(&self, method: &str, key: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        let ask = || {
            self.send(method, key, headers, body).unwrap_or_else(|error| panic!("{method} {key}: {error}"))
        };
        let mut response = ask();
        // Garage answers so while its own database is locked, and means it.
        for _ in 0..50 {
            if response.status != 503 {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
            response = ask();
        }
        assert!(
            matches!(response.status, 200..=299 | 404),
            "{method} {key}: {}\n{}",
            response.status,
            String::from_utf8_lossy(&response.body)
        );
        response
    }

    #[track_caller]
    pub fn object(&self, key: &str) -> Option<Object> {
        let got = self.expect("GET", key, &[], &[]);
        (got.status == 200).then(|| Object { metadata: metadata(&got.head), bytes: got.body })
    }

    #[track_caller]
    pub fn put_object(&self, key: &str, object: &Object) {
        let headers: Vec<_> = object.metadata.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        let status = self.expect("PUT", key, &headers, &object.bytes).status;
        assert_eq!(status, 200, "PUT {key}");
    }

    #[track_caller]
    pub fn get_raw(&self, key: &str) -> Option<Vec<u8>> {
        self.object(key).map(|o| o.bytes)
    }

    /// Puts other bytes below a key. What is stored beside them stays, as it would when the
    /// store itself, or who has its keys, changed them.
    #[track_caller]
    pub fn put_raw(&self, key: &str, bytes: &[u8]) {
        let metadata = metadata(&self.expect("HEAD", key, &[], &[]).head);
        self.put_object(key, &Object { bytes: bytes.to_vec(), metadata });
    }

    #[track_caller]
    pub fn delete_raw(&self, key: &str) {
        self.expect("DELETE", key, &[], &[]);
    }

    /// The entity tag, without its quotes.
    #[track_caller]
    pub fn etag(&self, key: &str) -> Option<String> {
        let head = self.expect("HEAD", key, &[], &[]);
        let tag = head.head.header("etag").unwrap_or_default().trim_matches('"').to_owned();
        (head.status == 200).then_some(tag)
    }

    /// Keys that start with `prefix`, in order, with their sizes.
    #[track_caller]
    pub fn objects(&self, prefix: &str) -> Vec<(String, u64)> {
        let (mut found, mut token) = (Vec::new(), None::<String>);
        loop {
            let mut query = vec![("list-type", "2"), ("encoding-type", "url"), ("prefix", prefix)];
            query.extend(token.as_deref().map(|t| ("continuation-token", t)));
            let page = self.s3.send("GET", &format!("/{}", self.name), &query, &[], &[]);
            let page = page.unwrap_or_else(|error| panic!("listing {}: {error}", self.name));
            let text = String::from_utf8_lossy(&page.body);
            assert_eq!(page.status, 200, "listing {}: {text}", self.name);
            for entry in text.split("<Contents>").skip(1) {
                let size = element(entry, "Size").and_then(|n| n.parse().ok());
                let key = element(entry, "Key").map(unescape);
                found.push((key.expect("an entry has a key"), size.expect("an entry has a size")));
            }
            token = element(&text, "NextContinuationToken").map(ToOwned::to_owned);
            if token.is_none() {
                return found;
            }
        }
    }

    /// Every object with its bytes.
    pub fn all_bytes(&self) -> impl Iterator<Item = (String, Vec<u8>)> + '_ {
        // One that goes while the others are read is no longer stored.
        self.objects("").into_iter().filter_map(|(key, _)| self.get_raw(&key).map(|bytes| (key, bytes)))
    }
}

fn metadata(head: &Head) -> Vec<(String, String)> {
    let kept = |name: &str| name.starts_with("x-amz-meta-") || name == "content-type";
    head.headers.iter().filter(|(name, _)| head.start.contains(" 200 ") && kept(name)).cloned().collect()
}

fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let from = text.find(&format!("<{name}>"))? + name.len() + 2;
    let rest = text.get(from..)?;
    rest.split_once(&format!("</{name}>")).map(|(value, _)| value)
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("a key of any length");
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn escape(text: &str, path: bool) -> String {
    text.bytes().fold(String::new(), |mut out, byte| {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => out.push(byte.into()),
            b'/' if path => out.push('/'),
            _ => drop(write!(out, "%{byte:02X}")),
        }
        out
    })
}

pub(crate) fn unescape(text: &str) -> String {
    let (mut out, mut bytes) = (Vec::new(), text.bytes());
    while let Some(byte) = bytes.next() {
        if byte == b'%' {
            let digits: String = bytes.by_ref().take(2).map(char::from).collect();
            out.push(u8::from_str_radix(&digits, 16).expect("two digits after a percent sign"));
        } else {
            out.push(if byte == b'+' { b' ' } else { byte });
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// `20130524T000000Z`
fn timestamp(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, seconds) = (seconds / 86_400, seconds % 86_400);
    // The days of an era of 400 years, in years that start in March.
    let days = days + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_that_of_the_example_in_the_specification() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        assert_eq!(timestamp(at(1_369_353_600)), "20130524T000000Z");
        assert_eq!(timestamp(at(1_709_210_096)), "20240229T123456Z");
        // The signing key of the AWS General Reference, for iam in us-east-1 on 2015-08-30.
        let secret = "AWS4wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY";
        let key = ["20150830", "us-east-1", "iam", "aws4_request"]
            .iter()
            .fold(secret.as_bytes().to_vec(), |key, part| mac(&key, part));
        assert_eq!(hex(&key), "c4afb1cc5771d871763a393e44b703571b55cc28424d1a5e86da6ed3c154a4b9");
    }

    #[test]
    fn a_key_survives_the_way_through_a_url() {
        let key = "a b/ä+%/c";
        assert_eq!(unescape(&escape(key, true)), key);
    }
}
