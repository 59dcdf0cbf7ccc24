//! The client of PID 1's control socket: connect, one line, one line back, within 5 s.
//!
//! PID 1 answers in its one loop, in a fraction of a millisecond; whatever takes longer is
//! trouble, and is told as what it is: nobody there, not for you, busy, another version.
//!
//! Refuses answers over a limit, and to ask twice. May import: `trouble`, `words`.

use crate::trouble::{Exit, Trouble};
use crate::words;
use cvm_protocol::control::{Body, Request, Response, VERSION, Verb};
use cvm_protocol::json_lines;
use cvm_protocol::paths;
use cvm_protocol::status::Status;
use cvm_protocol::time::words as words_of;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use serde::Deserialize;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// From connecting to having the answer. The supervisor parts with a client after the same time.
const TIME: Duration = Duration::from_secs(5);
/// An environment may take a megabyte or two; a status takes some kilobytes.
const ANSWER_MAX: usize = 16 * 1024 * 1024;
/// Between tries to connect while the supervisor's queue is full.
const RETRY: Duration = Duration::from_millis(20);

/// A status, and the words in which it came.
pub(crate) struct Snapshot {
    pub status: Status,
    /// One JSON object as the supervisor wrote it, without its envelope.
    pub json: String,
}

/// `what` is told when something goes wrong: "status", "restart gateway".
pub(crate) fn ask(what: &str, verb: Verb) -> Result<Body, Trouble> {
    ask_within(TIME, what, verb)
}

/// With less patience, for those who have little time themselves.
pub(crate) fn ask_within(time: Duration, what: &str, verb: Verb) -> Result<Body, Trouble> {
    let line = exchange(&path(), time, verb).map_err(|failure| failure.into_trouble(what))?;
    match parse(&line) {
        Ok(Body::Refused { why }) => {
            let hint = "`cvm status` shows what there is and what it does";
            Err(Trouble::new(Exit::Refused, what, format!("the supervisor refused: {why}")).hint(hint))
        }
        Ok(body) => Ok(body),
        Err(failure) => Err(failure.into_trouble(what)),
    }
}

/// The snapshot of this moment.
pub(crate) fn status() -> Result<Snapshot, Trouble> {
    status_within(TIME)
}

pub(crate) fn status_within(time: Duration) -> Result<Snapshot, Trouble> {
    let what = "status";
    let line = exchange(&path(), time, Verb::Status).map_err(|failure| failure.into_trouble(what))?;
    match parse(&line) {
        Ok(Body::Status(status)) => Ok(Snapshot { status: *status, json: without_envelope(&line) }),
        Ok(Body::Refused { why }) => {
            Err(Trouble::new(Exit::Refused, what, format!("the supervisor refused: {why}")))
        }
        Ok(_) => Err(Failure::Garbage.into_trouble(what)),
        Err(failure) => Err(failure.into_trouble(what)),
    }
}

fn path() -> PathBuf {
    path_of("CVM_CONTROL_SOCKET", paths::CONTROL_SOCKET)
}

/// Where a socket is: as a variable says, or in its usual place.
pub(crate) fn path_of(variable: &str, usual: &str) -> PathBuf {
    let given = std::env::var_os(variable).filter(|v| !v.is_empty());
    given.map_or_else(|| PathBuf::from(usual), PathBuf::from)
}

/// Why there is no answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// No socket, or nobody behind it.
    NotRunning(String),
    NotAllowed,
    /// It took longer than this.
    Busy(Duration),
    /// The connection ended before the answer did.
    CutOff,
    TooLong,
    Garbage,
    Version(u32),
    Other(String),
}

impl Failure {
    fn into_trouble(self, what: &str) -> Trouble {
        let (cause, hint) = match self {
            Self::NotRunning(detail) => (
                format!("the supervisor is not running here ({detail})"),
                "run it inside the VM: `ssh -p 1022 root@HOST cvm status`; outside only `cvm derive` works",
            ),
            Self::NotAllowed => {
                ("only root may speak to the supervisor".to_owned(), "log in as root, or put sudo before it")
            }
            Self::Busy(time) => (
                format!("the supervisor did not answer within {}", words_of(time)),
                "try again; if it stays so, read `cvm logs supervisor` and look at the load with `uptime`",
            ),
            Self::CutOff => (
                "the supervisor ended the connection without an answer".to_owned(),
                "try again; it does so when it ends, or when more than 32 clients ask at once",
            ),
            Self::TooLong => (
                format!("the answer is longer than {}", words::size(ANSWER_MAX as u64)),
                "this is no supervisor of openclaw-cvm; look at CVM_CONTROL_SOCKET",
            ),
            Self::Garbage => (
                "the answer is not one of the control protocol".to_owned(),
                "use the `cvm` of the same image, and look at CVM_CONTROL_SOCKET",
            ),
            Self::Version(theirs) => (
                format!(
                    "the supervisor speaks version {theirs} of the control protocol, this cvm version {VERSION}"
                ),
                "use the `cvm` of the same image",
            ),
            Self::Other(cause) => (cause, "`cvm doctor` looks for the cause"),
        };
        Trouble::new(Exit::Away, what, cause).hint(hint)
    }
}

fn exchange(path: &Path, time: Duration, verb: Verb) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let until = Instant::now() + time;
    let mut stream = open(path, time, until)?;
    let request = json_lines::line(&Request { v: VERSION, verb });
    let left = until.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_write_timeout(Some(left)).map_err(|e| Failure::Other(words::of_io(&e)))?;
    match stream.write_all(&request) {
        Ok(()) => read_line(&mut stream, time, until),
        Err(error) => Err(of_transfer(&error, time)),
    }
}

/// Connects without ever waiting longer than until `until`: with a full queue a blocking
/// connect(2) of a unix socket waits for ever.
pub(crate) fn open(path: &Path, time: Duration, until: Instant) -> Result<UnixStream, Failure> {
    let other = |errno: Errno| Failure::Other(format!("{}: {}", path.display(), errno.desc()));
    let address = UnixAddr::new(path).map_err(other)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    loop {
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(other)?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false).map_err(|e| Failure::Other(words::of_io(&e)))?;
                return Ok(stream);
            }
            Err(Errno::EAGAIN) if Instant::now() < until => std::thread::sleep(RETRY),
            Err(Errno::EAGAIN) => return Err(Failure::Busy(time)),
            Err(Errno::EACCES | Errno::EPERM) => return Err(Failure::NotAllowed),
            Err(errno @ (Errno::ENOENT | Errno::ENOTDIR)) => {
                return Err(Failure::NotRunning(format!("{}: {}", path.display(), errno.desc())));
            }
            Err(Errno::ECONNREFUSED) => {
                return Err(Failure::NotRunning(format!("{}: nobody listens", path.display())));
            }
            Err(errno) => return Err(other(errno)),
        }
    }
}

fn read_line(stream: &mut UnixStream, time: Duration, until: Instant) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut answer = Zeroizing::new(Vec::with_capacity(64 * 1024));
    let mut bytes = Zeroizing::new([0u8; 16 * 1024]);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::Busy(time));
        }
        stream.set_read_timeout(Some(left)).map_err(|e| Failure::Other(words::of_io(&e)))?;
        match stream.read(&mut bytes[..]) {
            // Root is let in by mode and by credentials; whoever else got this far was cut off.
            Ok(0) if answer.is_empty() && !nix::unistd::geteuid().is_root() => {
                return Err(Failure::NotAllowed);
            }
            Ok(0) => return Err(Failure::CutOff),
            Ok(n) => {
                let piece = &bytes[..n];
                let end = piece.iter().position(|b| *b == b'\n');
                answer.extend_from_slice(&piece[..end.unwrap_or(n)]);
                if answer.len() > ANSWER_MAX {
                    return Err(Failure::TooLong);
                }
                if end.is_some() {
                    return Ok(answer);
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(of_transfer(&error, time)),
        }
    }
}

pub(crate) fn of_transfer(error: &std::io::Error, time: Duration) -> Failure {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => Failure::Busy(time),
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => Failure::CutOff,
        _ => Failure::Other(words::of_io(error)),
    }
}

fn parse(line: &[u8]) -> Result<Body, Failure> {
    #[derive(Deserialize)]
    struct Head {
        v: u32,
    }
    // The version first: what a newer supervisor says need not be readable.
    let head: Head = serde_json::from_slice(line).map_err(|_| Failure::Garbage)?;
    if head.v != VERSION {
        return Err(Failure::Version(head.v));
    }
    let response: Response = serde_json::from_slice(line).map_err(|_| Failure::Garbage)?;
    Ok(response.body)
}

/// The snapshot without what the protocol put around it, otherwise byte by byte: fields that
/// this version does not know stay in.
fn without_envelope(line: &[u8]) -> String {
    stripped(line, &format!("{{\"v\":{VERSION},\"answer\":\"status\","))
}

/// `line` without `envelope`, which it begins with unless somebody put its fields in another order.
pub(crate) fn stripped(line: &[u8], envelope: &str) -> String {
    let text = String::from_utf8_lossy(line);
    if let Some(rest) = text.strip_prefix(envelope) {
        return format!("{{{rest}");
    }
    let mut value: serde_json::Value = serde_json::from_slice(line).unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.remove("v");
        object.remove("answer");
    }
    value.to_string()
}

#[cfg(test)]
mod tests;
