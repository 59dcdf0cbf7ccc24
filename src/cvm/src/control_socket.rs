//! The client of PID 1's control socket: one line out, one line back, within 5 s.
//!
//! PID 1 answers from its one event loop in a fraction of a millisecond. Whatever takes longer is a
//! failure with its own cause: nobody there, not allowed, busy, another version.

use crate::connection::{Connection, NoAnswer, socket_path};
use crate::failure::{Exit, Failure};
use crate::units;
use cvm_protocol::control::{Body, Request, Response, VERSION, Verb};
use cvm_protocol::json_lines;
use cvm_protocol::paths;
use cvm_protocol::status::Status;
use cvm_protocol::time::words;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// From connecting to the end of the answer. The supervisor hangs up on a client after the same time.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);
/// An environment may take a megabyte or two; a status takes some kilobytes.
const ANSWER_MAX: usize = 16 * 1024 * 1024;

/// A status, and the JSON text in which it came.
pub(crate) struct Snapshot {
    pub status: Status,
    /// One JSON object as the supervisor wrote it, without its envelope.
    pub json: String,
}

/// Asks the supervisor. `what` names the command in a failure: "restart gateway".
pub(crate) fn ask(what: &str, verb: Verb) -> Result<Body, Failure> {
    ask_within(PATIENCE, what, verb)
}

/// The same for callers that have less time themselves.
pub(crate) fn ask_within(patience: Duration, what: &str, verb: Verb) -> Result<Body, Failure> {
    let (_, body) = exchange(&path(), patience, what, verb)?;
    match body {
        Body::Refused { why } => {
            let hint = "`cvm status` shows the services and their states";
            Err(refused(what, &why).hint(hint))
        }
        body => Ok(body),
    }
}

pub(crate) fn status() -> Result<Snapshot, Failure> {
    status_within(PATIENCE)
}

pub(crate) fn status_within(patience: Duration) -> Result<Snapshot, Failure> {
    const WHAT: &str = "status";
    match exchange(&path(), patience, WHAT, Verb::Status)? {
        (line, Body::Status(status)) => Ok(Snapshot { status: *status, json: without_envelope(&line) }),
        (_, Body::Refused { why }) => Err(refused(WHAT, &why)),
        _ => Err(failure_of(NoAnswer::Garbage, patience, WHAT)),
    }
}

fn path() -> PathBuf {
    socket_path("CVM_CONTROL_SOCKET", paths::CONTROL_SOCKET)
}

fn refused(what: &str, why: &str) -> Failure {
    Failure::new(Exit::Refused, what, format!("the supervisor refused: {why}"))
}

/// The answer, and the line in which it came.
fn exchange(
    path: &Path,
    patience: Duration,
    what: &str,
    verb: Verb,
) -> Result<(Zeroizing<Vec<u8>>, Body), Failure> {
    let deadline = Instant::now() + patience;
    let request = json_lines::line(&Request { v: VERSION, verb });
    let line = Connection::open(path, &request, ANSWER_MAX, deadline).and_then(|mut c| c.line(deadline));
    let answer = line.and_then(|line| parse(&line).map(|body| (line, body)));
    answer.map_err(|no_answer| failure_of(no_answer, patience, what))
}

fn parse(line: &[u8]) -> Result<Body, NoAnswer> {
    #[derive(Deserialize)]
    struct Head {
        v: u32,
    }
    // The version first: the answer of a newer supervisor need not be readable.
    let head: Head = serde_json::from_slice(line).map_err(|_| NoAnswer::Garbage)?;
    if head.v != VERSION {
        return Err(NoAnswer::Version(head.v));
    }
    let response: Response = serde_json::from_slice(line).map_err(|_| NoAnswer::Garbage)?;
    Ok(response.body)
}

fn failure_of(no_answer: NoAnswer, patience: Duration, what: &str) -> Failure {
    let (cause, hint) = match no_answer {
        NoAnswer::NotRunning(detail) => (
            format!("the supervisor is not running here ({detail})"),
            "run it inside the VM: `ssh -p 1022 root@HOST cvm status`; outside only `cvm derive` works",
        ),
        NoAnswer::NotAllowed => {
            ("only root may speak to the supervisor".to_owned(), "log in as root, or put sudo before it")
        }
        NoAnswer::Late => (
            format!("the supervisor did not answer within {}", words(patience)),
            "try again; if it stays so, read `cvm logs supervisor` and look at the load with `uptime`",
        ),
        NoAnswer::CutOff => (
            "the supervisor ended the connection without an answer".to_owned(),
            "try again; it does so when it ends, or when more than 32 clients ask at once",
        ),
        NoAnswer::TooLong => (
            format!("the answer is longer than {}", units::size(ANSWER_MAX as u64)),
            "this is no supervisor of openclaw-cvm; look at CVM_CONTROL_SOCKET",
        ),
        NoAnswer::Garbage => (
            "the answer is not one of the control protocol".to_owned(),
            "use the `cvm` of the same image, and look at CVM_CONTROL_SOCKET",
        ),
        NoAnswer::Version(theirs) => (
            format!(
                "the supervisor speaks version {theirs} of the control protocol, this cvm version {VERSION}"
            ),
            "use the `cvm` of the same image",
        ),
        NoAnswer::Other(cause) => (cause, "`cvm doctor` looks for the cause"),
    };
    Failure::new(Exit::Unreachable, what, cause).hint(hint)
}

/// The snapshot without its envelope, otherwise byte by byte: fields that this version does not know
/// stay.
fn without_envelope(line: &[u8]) -> String {
    stripped(line, &format!("{{\"v\":{VERSION},\"answer\":\"status\","))
}

/// `line` without `envelope`, with which it begins unless its fields are in another order.
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
mod tests {
    use super::*;
    use crate::connection::tests::FakeServer;

    const PATIENT: Duration = Duration::from_secs(20);

    fn answer_of(line: impl Into<Vec<u8>>) -> Result<Body, Failure> {
        let server = FakeServer::answering(line);
        exchange(&server.socket(), PATIENT, "status", Verb::Status).map(|(_, body)| body)
    }

    #[test]
    fn one_line_goes_out_and_one_comes_back() {
        let server = FakeServer::new(|request, mut stream| {
            use std::io::Write as _;
            assert_eq!(Request::parse(request.trim_end().as_bytes()).unwrap().verb, Verb::Status);
            // In pieces, as a slow machine would.
            for piece in [&b"{\"v\":1,\"answ"[..], b"er\":\"taken\"}", b"\n"] {
                stream.write_all(piece).unwrap();
                std::thread::yield_now();
            }
        });
        let answer = exchange(&server.socket(), PATIENT, "status", Verb::Status);
        assert!(matches!(answer, Ok((_, Body::Taken))));
    }

    #[test]
    fn garbage_is_called_garbage() {
        for answer in
            ["hello\n", "{}\n", "{\"v\":1,\"answer\":\"poem\"}\n", "\n", "{\"v\":\"1\"}\n", "\u{0}\n"]
        {
            let cause = answer_of(answer).err().unwrap().cause;
            assert_eq!(cause, "the answer is not one of the control protocol", "{answer:?}");
        }
        assert!(answer_of([0xff, b'\n']).is_err());
    }

    #[test]
    fn another_version_is_named_by_its_number_whatever_else_the_answer_says() {
        let cause = answer_of("{\"v\":7,\"answer\":\"telepathy\"}\n").err().unwrap().cause;
        assert_eq!(cause, "the supervisor speaks version 7 of the control protocol, this cvm version 1");
    }

    #[test]
    fn every_failure_names_a_remedy_and_exits_with_3() {
        let all = [
            NoAnswer::NotRunning("x".into()),
            NoAnswer::NotAllowed,
            NoAnswer::Late,
            NoAnswer::CutOff,
            NoAnswer::TooLong,
            NoAnswer::Garbage,
            NoAnswer::Version(9),
            NoAnswer::Other("x".into()),
        ];
        for no_answer in all {
            let failure = failure_of(no_answer, PATIENCE, "status");
            assert!(failure.hint.is_some() && failure.exit == Exit::Unreachable, "{failure}");
        }
    }

    #[test]
    fn the_snapshot_keeps_fields_that_this_version_does_not_know() {
        let line = br#"{"v":1,"answer":"status","zeta":{"b":1,"a":2},"alpha":3}"#;
        assert_eq!(without_envelope(line), r#"{"zeta":{"b":1,"a":2},"alpha":3}"#);
        let shuffled = br#"{"answer":"status","zeta":1,"v":1}"#;
        assert_eq!(without_envelope(shuffled), r#"{"zeta":1}"#);
    }
}
