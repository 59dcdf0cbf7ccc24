//! What can be wrong between us and the bucket, in the operator's words: cause and remedy.
//!
//! Refuses to hold anything but words of ours, the server's error codes and paths: never a URL,
//! a key or a password. Imports nothing of ours.

use nix::errno::Errno;
use std::collections::BTreeSet;
use std::fmt;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fault {
    /// No such object.
    Missing,
    NoBucket,
    /// The server's code for it.
    Denied(String),
    /// A conditional write lost.
    Conflict,
    /// The server does not do this.
    NotImplemented,
    Unreachable(String),
    Tls(String),
    /// Our clock and the server's are too far apart.
    Clock,
    /// Try later.
    Busy(u16),
    /// Cannot get better by itself.
    Config(String),
    /// Another key, or not ours at all.
    WrongKey(String),
    /// What is in the bucket is not what the manifest says, or older than what we know.
    Suspicious(String),
    /// What is in the bucket cannot be checked, and nobody has said that it is to be taken over.
    Unadopted {
        why: String,
        /// Beside `STATE_ANCHOR`, with which `S3_ADOPT=1` is refused.
        anchored: bool,
    },
    /// Files without which the gateway must not start are not in the bucket as they should be.
    Lacking(String),
    /// Somebody else owns the bucket.
    Fenced(String),
    /// The machine's own disk.
    Disk(String),
    /// The tree at /data does not answer any more.
    Tree,
    Other(String),
}

impl Fault {
    pub(crate) fn config(text: impl Into<String>) -> Self {
        Self::Config(text.into())
    }

    pub(crate) fn unadopted(text: impl Into<String>) -> Self {
        Self::Unadopted { why: text.into(), anchored: false }
    }

    /// The same, where an operator has set `STATE_ANCHOR`, or has not.
    pub(crate) fn beside_anchor(self, anchored: bool) -> Self {
        match self {
            Self::Unadopted { why, .. } => Self::Unadopted { why, anchored },
            other => other,
        }
    }

    pub(crate) fn other(text: impl Into<String>) -> Self {
        Self::Other(text.into())
    }

    /// Of an answer that is not a success.
    pub(crate) fn of_answer(status: u16, body: &str) -> Self {
        let code = between(body, "<Code>", "</Code>").unwrap_or_default();
        let code: String = code.chars().filter(char::is_ascii_alphanumeric).take(60).collect();
        match (status, code.as_str()) {
            (_, "NoSuchBucket") => Self::NoBucket,
            (404, _) => Self::Missing,
            (409 | 412, _) => Self::Conflict,
            (_, "RequestTimeTooSkewed") => Self::Clock,
            (501, _) | (_, "NotImplemented") => Self::NotImplemented,
            (401 | 403, "") => Self::Denied(format!("status {status}")),
            (401 | 403, _) => Self::Denied(code),
            (_, "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "InvalidToken" | "ExpiredToken") => {
                Self::Denied(code)
            }
            (429 | 500..=599, _) => Self::Busy(status),
            (300..=399, _) => Self::config(format!(
                "the server redirects (status {status}): S3_REGION or S3_ENDPOINT is not the bucket's own"
            )),
            (_, "") => Self::other(format!("the server answers with status {status}")),
            _ => Self::other(format!("the server answers with status {status}, {code}")),
        }
    }

    /// Whether the same request may succeed later without anybody acting on this machine.
    pub(crate) fn may_pass(&self) -> bool {
        !matches!(
            self,
            Self::Config(_)
                | Self::WrongKey(_)
                | Self::Suspicious(_)
                | Self::Unadopted { .. }
                | Self::Lacking(_)
        )
    }

    /// Whether it says nothing about the tree that is there: the bucket could not be asked.
    pub(crate) fn is_outage(&self) -> bool {
        match self {
            Self::Missing
            | Self::NoBucket
            | Self::Denied(_)
            | Self::Unreachable(_)
            | Self::Tls(_)
            | Self::Clock
            | Self::Busy(_)
            | Self::Other(_) => true,
            Self::Conflict
            | Self::NotImplemented
            | Self::Config(_)
            | Self::WrongKey(_)
            | Self::Suspicious(_)
            | Self::Unadopted { .. }
            | Self::Lacking(_)
            | Self::Fenced(_)
            | Self::Disk(_)
            | Self::Tree => false,
        }
    }

    /// Whether another object would not fare better.
    pub(crate) fn concerns_all(&self) -> bool {
        match self {
            Self::NoBucket
            | Self::Denied(_)
            | Self::Unreachable(_)
            | Self::Tls(_)
            | Self::Clock
            | Self::Busy(_)
            | Self::Config(_)
            | Self::Fenced(_)
            | Self::Disk(_)
            | Self::Tree => true,
            Self::Missing
            | Self::Conflict
            | Self::NotImplemented
            | Self::WrongKey(_)
            | Self::Suspicious(_)
            | Self::Unadopted { .. }
            | Self::Lacking(_)
            | Self::Other(_) => false,
        }
    }

    /// The volume is full, or what its user may have of it.
    pub(crate) fn is_no_room(&self) -> bool {
        let full = [Errno::ENOSPC, Errno::EDQUOT];
        matches!(self, Self::Disk(why) if full.iter().any(|error| why.eq_ignore_ascii_case(error.desc())))
    }

    pub(crate) fn remedy(&self) -> &'static str {
        match self {
            Self::Missing | Self::Other(_) | Self::NotImplemented => "look at `cvm logs storage`",
            Self::NoBucket => "create the bucket, or set S3_BUCKET to the one that exists",
            Self::Denied(_) => {
                "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and what they may do on this bucket: list, read, write, delete"
            }
            Self::Conflict | Self::Fenced(_) => {
                "stop the other instance, or give this one a prefix of its own"
            }
            Self::Unreachable(_) => "check S3_ENDPOINT and the network",
            Self::Tls(_) => {
                "check that S3_ENDPOINT is right and that the image has the certificate of its authority"
            }
            Self::Clock => "set the clock of this machine",
            Self::Busy(_) => "nothing to do here: it is tried again",
            Self::Config(_) => "mend the configuration and start again",
            Self::WrongKey(_) => {
                "use the MASTER_KEY (or RCLONE_CRYPT_PASSWORD) that the bucket was written with, or an empty S3_PREFIX"
            }
            Self::Suspicious(_) => {
                "look at the bucket and its versions; `cvm storage accept-older` goes on with what it holds now"
            }
            Self::Unadopted { anchored: true, .. } => {
                "if you know that this bucket is yours as it is, `cvm storage adopt` takes it over"
            }
            Self::Unadopted { anchored: false, .. } => {
                "if you know that this bucket is yours as it is, `cvm storage adopt` takes it over, and so does a boot with S3_ADOPT=1"
            }
            Self::Lacking(_) => {
                "put good objects back into the bucket, or give the files up with `cvm storage forget PATH...`"
            }
            Self::Tree => "nothing to do here: it is rebuilt",
            Self::Disk(_) => "make room on the volume, or mend it",
        }
    }
}

/// What an operator has looked at and goes on with: these refusals and the loss of these files, and
/// nothing else that is wrong.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Accepted {
    refusals: BTreeSet<String>,
    /// With what is wrong with them.
    files: BTreeSet<(String, String)>,
}

impl Accepted {
    pub(crate) fn refusal(&mut self, refusal: &Fault) {
        self.refusals.insert(refusal.to_string());
    }

    pub(crate) fn files(&mut self, files: impl IntoIterator<Item = (String, String)>) {
        self.files.extend(files);
    }

    pub(crate) fn is_any(&self) -> bool {
        !self.refusals.is_empty()
    }

    pub(crate) fn includes(&self, fault: &Fault) -> bool {
        matches!(fault, Fault::Suspicious(why) if self.refusals.contains(why))
    }

    pub(crate) fn includes_file(&self, path: &str, why: &str) -> bool {
        self.files.contains(&(path.to_owned(), why.to_owned()))
    }

    pub(crate) fn or_refuse(&self, why: String) -> Result<(), Fault> {
        let fault = Fault::Suspicious(why);
        if self.includes(&fault) { Ok(()) } else { Err(fault) }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("there is no such object"),
            Self::NoBucket => f.write_str("there is no bucket of this name"),
            Self::Denied(code) => write!(f, "the server denies access ({code})"),
            Self::Conflict => f.write_str("somebody else has written it"),
            Self::NotImplemented => f.write_str("the server does not implement this"),
            Self::Unreachable(why) => write!(f, "the bucket cannot be reached: {why}"),
            Self::Tls(why) => write!(f, "no trusted connection to the bucket: {why}"),
            Self::Tree => f.write_str("the tree does not answer any more: what is below it has died"),
            Self::Clock => f.write_str("the server refuses our clock"),
            Self::Busy(status) => write!(f, "the server cannot answer now (status {status})"),
            Self::Config(why)
            | Self::WrongKey(why)
            | Self::Suspicious(why)
            | Self::Unadopted { why, .. }
            | Self::Lacking(why)
            | Self::Fenced(why)
            | Self::Other(why) => f.write_str(why),
            Self::Disk(why) => write!(f, "the volume: {why}"),
        }
    }
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        // The kernel's words; ours are added where the path is known.
        Self::Disk(
            error
                .raw_os_error()
                .map_or_else(|| error.kind().to_string(), |code| Errno::from_raw(code).desc().to_owned()),
        )
    }
}

impl From<rusqlite::Error> for Fault {
    fn from(error: rusqlite::Error) -> Self {
        Self::Disk(format!(
            "the index: {}",
            error.sqlite_error_code().map_or_else(|| "broken".to_owned(), |c| format!("{c:?}"))
        ))
    }
}

impl From<Errno> for Fault {
    fn from(error: Errno) -> Self {
        Self::Disk(error.desc().to_owned())
    }
}

fn between<'a>(text: &'a str, from: &str, to: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(from)?;
    Some(rest.split_once(to)?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_told_apart() {
        let xml = |code: &str| format!("<?xml?><Error><Code>{code}</Code><Message>m</Message></Error>");
        assert_eq!(Fault::of_answer(404, &xml("NoSuchKey")), Fault::Missing);
        assert_eq!(Fault::of_answer(404, &xml("NoSuchBucket")), Fault::NoBucket);
        assert_eq!(Fault::of_answer(403, &xml("AccessDenied")), Fault::Denied("AccessDenied".into()));
        assert_eq!(Fault::of_answer(403, &xml("RequestTimeTooSkewed")), Fault::Clock);
        assert_eq!(Fault::of_answer(412, ""), Fault::Conflict);
        assert_eq!(Fault::of_answer(503, "<html>"), Fault::Busy(503));
        assert!(!Fault::of_answer(301, "").may_pass());
    }

    #[test]
    fn beside_an_anchor_no_remedy_is_named_that_is_refused_there() {
        let remedy = |anchored| Fault::unadopted("why").beside_anchor(anchored).remedy();
        assert!(remedy(false).contains("S3_ADOPT=1") && remedy(false).contains("cvm storage adopt"));
        assert!(!remedy(true).contains("S3_ADOPT") && remedy(true).contains("cvm storage adopt"));
        assert_eq!(Fault::Clock.beside_anchor(true), Fault::Clock);
    }

    #[test]
    fn a_servers_words_cannot_speak_to_a_terminal() {
        assert_eq!(
            Fault::of_answer(400, "<Code>a\x1b[2J b</Code>"),
            Fault::other("the server answers with status 400, a2Jb")
        );
    }
}
