//! The messages between an operator's `cvm` and PID 1: [`Request`] on the control socket, answered by [`Response`].
//!
//! This protocol has a version, because an operator may use the `cvm` of another image. Most other protocols need
//! none: one image carries all the programs that use them. A line that is too long or is not understood is answered
//! by the reason.

use crate::status::Status;
use cvm_secrets::base64_bytes::PackedEnvironment;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Version of the control protocol. It grows when an old `cvm` could misread an answer.
pub const VERSION: u32 = 1;
/// The most bytes of a request, which is a verb and perhaps a name.
pub const REQUEST_MAX: usize = 4 * 1024;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub v: u32,
    #[serde(flatten)]
    pub verb: Verb,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Verb {
    Status,
    Start {
        service: String,
    },
    Stop {
        service: String,
    },
    Restart {
        service: String,
    },
    /// The machine is about to be paused. No time passes for its services until `Thaw`, a stop, or until so many
    /// seconds have passed.
    Freeze {
        at_most_s: u32,
    },
    Thaw,
    /// Asks for the user and the environment with which the command `openclaw` can talk to the gateway.
    GatewayAccess,
}

#[derive(Serialize, Deserialize)]
pub struct Response {
    pub v: u32,
    #[serde(flatten)]
    pub body: Body,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Body {
    Status(Box<Status>),
    /// The order was accepted; `status` shows its effect.
    Taken,
    GatewayAccess {
        user: String,
        environment: PackedEnvironment,
    },
    Refused {
        why: String,
    },
}

/// Why a request was not understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadRequest {
    TooLong,
    NotUnderstood,
    Version(u32),
}

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "a request has at most {REQUEST_MAX} bytes and ends with a newline"),
            Self::NotUnderstood => f.write_str("this is not a request; `cvm --help` lists what can be asked"),
            Self::Version(theirs) => write!(
                f,
                "this supervisor speaks version {VERSION} of the control protocol, not {theirs}; use the `cvm` of the same image"
            ),
        }
    }
}

impl Request {
    /// Reads one line, without its newline.
    pub fn parse(line: &[u8]) -> Result<Self, BadRequest> {
        #[derive(Deserialize)]
        struct Head {
            v: u32,
        }
        if line.len() > REQUEST_MAX {
            return Err(BadRequest::TooLong);
        }
        // The version is checked first, so that a request of another version is refused for its version.
        let head: Head = serde_json::from_slice(line).map_err(|_| BadRequest::NotUnderstood)?;
        if head.v != VERSION {
            return Err(BadRequest::Version(head.v));
        }
        serde_json::from_slice(line).map_err(|_| BadRequest::NotUnderstood)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::json_lines::line;
    use proptest::prelude::*;

    #[test]
    fn a_newer_request_is_told_the_version_and_not_that_it_is_garbage() {
        let line = br#"{"v":2,"verb":"levitate","how":"high"}"#;
        assert_eq!(Request::parse(line), Err(BadRequest::Version(2)));
    }

    #[test]
    fn a_request_reads_back_as_it_was_written() {
        let request = Request { v: VERSION, verb: Verb::Restart { service: "gateway".into() } };
        let bytes = line(&request);
        assert_eq!(Request::parse(bytes.trim_ascii_end()), Ok(request));
    }

    #[test]
    fn a_request_over_the_limit_is_refused_before_it_is_read() {
        assert_eq!(Request::parse(&vec![b' '; REQUEST_MAX + 1]), Err(BadRequest::TooLong));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_request_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Request::parse(&bytes);
        }
    }
}
