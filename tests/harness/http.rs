//! The little of HTTP/1.1 that the S3 client and the proxy need: heads, and where a body ends.

use std::io::{BufRead, Error, ErrorKind, Read, Result, Write};

/// A request's or a response's head, with the bytes it came in.
#[derive(Debug, Clone)]
pub struct Head {
    /// The first line, without its end.
    pub start: String,
    pub headers: Vec<(String, String)>,
    pub raw: Vec<u8>,
}

impl Head {
    /// `None` when the peer closed instead of starting another message.
    pub fn read(from: &mut impl BufRead) -> Result<Option<Self>> {
        let mut raw = Vec::new();
        loop {
            let before = raw.len();
            if from.read_until(b'\n', &mut raw)? == 0 {
                return if before == 0 { Ok(None) } else { Err(ErrorKind::UnexpectedEof.into()) };
            }
            if matches!(raw.get(before..), Some(b"\r\n" | b"\n")) {
                break;
            }
        }
        let text = String::from_utf8_lossy(&raw).into_owned();
        let mut lines = text.lines();
        let start = lines.next().unwrap_or_default().to_owned();
        let pairs = lines.filter_map(|line| line.split_once(':'));
        let headers =
            pairs.map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned())).collect();
        Ok(Some(Self { start, headers, raw }))
    }

    /// By its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// Whether a header has this value, whatever its case.
    pub fn says(&self, name: &str, value: &str) -> bool {
        self.header(name).is_some_and(|v| v.eq_ignore_ascii_case(value))
    }

    /// A word of the first line, from 0.
    pub fn word(&self, n: usize) -> &str {
        self.start.split(' ').nth(n).unwrap_or_default()
    }

    /// The status of a response.
    pub fn status(&self) -> Result<u16> {
        self.word(1).parse().map_err(|_| Error::new(ErrorKind::InvalidData, self.start.clone()))
    }

    pub fn request_body(&self) -> Body {
        self.framing().unwrap_or(Body::Length(0))
    }

    /// `method` is the request's: the answer to a HEAD tells of a body that does not come.
    pub fn response_body(&self, method: &str) -> Result<Body> {
        if method == "HEAD" || matches!(self.status()?, 204 | 304) {
            return Ok(Body::Length(0));
        }
        Ok(self.framing().unwrap_or(Body::UntilClose))
    }

    fn framing(&self) -> Option<Body> {
        if self.says("transfer-encoding", "chunked") {
            return Some(Body::Chunked);
        }
        self.header("content-length").and_then(|n| n.parse().ok()).map(Body::Length)
    }
}

/// Where a body ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Body {
    Length(u64),
    Chunked,
    UntilClose,
}

impl Body {
    /// Passes a whole body on as it stands, chunk sizes and all, and yields its length on the
    /// wire. An early end is an error.
    pub fn relay(self, from: &mut impl BufRead, to: &mut impl Write) -> Result<u64> {
        match self {
            Self::Length(length) => exactly(length, from, to),
            Self::UntilClose => std::io::copy(from, to),
            Self::Chunked => {
                let mut passed = 0;
                loop {
                    let line = line(from, to)?;
                    passed += line.len() as u64;
                    let digits = line.trim_end().split(';').next().unwrap_or_default();
                    let size = u64::from_str_radix(digits, 16)
                        .map_err(|_| Error::new(ErrorKind::InvalidData, line.clone()))?;
                    if size == 0 {
                        break;
                    }
                    passed += exactly(size + 2, from, to)?;
                }
                // Trailers, up to an empty line.
                loop {
                    let line = line(from, to)?;
                    passed += line.len() as u64;
                    if line.trim_end().is_empty() {
                        return Ok(passed);
                    }
                }
            }
        }
    }

    /// The content of a body, out of its chunks.
    pub fn content(self, from: &mut impl BufRead) -> Result<Vec<u8>> {
        let mut raw = Vec::new();
        self.relay(from, &mut raw)?;
        if self != Self::Chunked {
            return Ok(raw);
        }
        let (mut rest, mut content) = (raw.as_slice(), Vec::new());
        loop {
            let line = line(&mut rest, &mut std::io::sink())?;
            let digits = line.trim_end().split(';').next().unwrap_or_default();
            let size = u64::from_str_radix(digits, 16).unwrap_or(0);
            if size == 0 {
                return Ok(content);
            }
            exactly(size, &mut rest, &mut content)?;
            exactly(2, &mut rest, &mut std::io::sink())?;
        }
    }
}

fn exactly(length: u64, from: &mut impl BufRead, to: &mut impl Write) -> Result<u64> {
    let passed = std::io::copy(&mut from.take(length), to)?;
    if passed == length { Ok(passed) } else { Err(ErrorKind::UnexpectedEof.into()) }
}

fn line(from: &mut impl BufRead, to: &mut impl Write) -> Result<String> {
    let mut line = Vec::new();
    if from.read_until(b'\n', &mut line)? == 0 {
        return Err(ErrorKind::UnexpectedEof.into());
    }
    to.write_all(&line)?;
    Ok(String::from_utf8_lossy(&line).into_owned())
}
