//! The client of the storage worker's socket: one question, and lines until the last one.
//!
//! A worker that works says something at least every few seconds, progress if nothing else; one
//! that is silent for longer is given up.
//!
//! Refuses lines over the protocol's limit, and to ask twice. May import: `socket`, `trouble`,
//! `words`.

use crate::socket::{self, Failure};
use crate::trouble::{Exit, Trouble};
use crate::words;
use cvm_protocol::json_lines;
use cvm_protocol::paths;
use cvm_protocol::storage::{ANSWER_MAX, Answer, Ask, QUESTION_MAX, Question, VERSION};
use cvm_protocol::time::words as words_of;
use nix::unistd::geteuid;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const SOCKET_VARIABLE: &str = "CVM_STORAGE_SOCKET";
const BLOCK: usize = 64 * 1024;

/// How long to wait for what.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// For the next line.
    pub silence: Duration,
    /// For the last one, if there is a limit.
    pub total: Option<Duration>,
}

impl Patience {
    /// For an answer that is at hand.
    pub(crate) const fn short(time: Duration) -> Self {
        Self { silence: time, total: Some(time) }
    }

    /// For work of any length.
    pub(crate) const fn working(total: Option<Duration>) -> Self {
        Self { silence: Duration::from_secs(60), total }
    }
}

/// A question that was asked, and the lines that come.
#[derive(Debug)]
pub(crate) struct Client {
    what: String,
    stream: UnixStream,
    patience: Patience,
    until: Option<Instant>,
    /// What has arrived and was not given out.
    pending: Vec<u8>,
}

impl Client {
    /// `what` is told when something goes wrong: "storage flush".
    pub(crate) fn ask(what: &str, verb: Ask, patience: Patience) -> Result<Self, Trouble> {
        Self::ask_at(&socket::path_of(SOCKET_VARIABLE, paths::STORAGE_SOCKET), what, verb, patience)
    }

    fn ask_at(path: &Path, what: &str, verb: Ask, patience: Patience) -> Result<Self, Trouble> {
        let question = json_lines::line(&Question { v: VERSION, verb });
        if question.len() > QUESTION_MAX {
            return Err(Trouble::new(Exit::Usage, what, "the path is too long to ask for"));
        }
        let told = |failure| trouble_of(failure, what);
        let now = Instant::now();
        // Connecting takes no time unless the worker hangs.
        let time = patience.total.map_or(patience.silence, |total| total.min(patience.silence));
        let mut stream = socket::open(path, time, now + time).map_err(told)?;
        let until = patience.total.map(|total| now + total);
        stream.set_write_timeout(Some(time)).map_err(|e| told(Failure::Other(words::of_io(&e))))?;
        stream.write_all(&question).map_err(|e| told(socket::of_transfer(&e, time)))?;
        Ok(Self { what: what.to_owned(), stream, patience, until, pending: Vec::new() })
    }

    /// The next answer. What the worker refused is trouble.
    pub(crate) fn answer(&mut self) -> Result<Answer, Trouble> {
        let line = self.line()?;
        self.parsed(&line)
    }

    /// The last line of an answer of one line, as it came, and what it says.
    pub(crate) fn only(mut self) -> Result<(Vec<u8>, Answer), Trouble> {
        let line = self.line()?;
        let answer = self.parsed(&line)?;
        Ok((line, answer))
    }

    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    fn parsed(&self, line: &[u8]) -> Result<Answer, Trouble> {
        match serde_json::from_slice(line) {
            Ok(Answer::Refused { why }) => {
                let cause = format!("the storage worker refused: {why}");
                let hint = "`cvm storage status` shows how things stand";
                Err(Trouble::new(Exit::Refused, &self.what, cause).hint(hint))
            }
            Ok(answer) => Ok(answer),
            Err(_) => Err(trouble_of(Failure::Garbage, &self.what)),
        }
    }

    /// The next line, without its line break.
    fn line(&mut self) -> Result<Vec<u8>, Trouble> {
        let silent = Instant::now() + self.patience.silence;
        let mut searched = 0;
        loop {
            if let Some(end) = self.pending[searched..].iter().position(|b| *b == b'\n') {
                let mut line: Vec<u8> = self.pending.drain(..=searched + end).collect();
                line.pop();
                return if line.len() > ANSWER_MAX { Err(self.failed(Failure::TooLong)) } else { Ok(line) };
            }
            searched = self.pending.len();
            if searched > ANSWER_MAX {
                return Err(self.failed(Failure::TooLong));
            }
            self.more(silent)?;
        }
    }

    fn more(&mut self, silent: Instant) -> Result<(), Trouble> {
        let now = Instant::now();
        let due = self.until.map_or(silent, |until| until.min(silent));
        let left = due.saturating_duration_since(now);
        if left.is_zero() {
            return Err(self.too_late(now));
        }
        self.stream
            .set_read_timeout(Some(left))
            .map_err(|e| self.failed(Failure::Other(words::of_io(&e))))?;
        let mut bytes = vec![0; BLOCK];
        match self.stream.read(&mut bytes) {
            // Root is let in by mode and by credentials; whoever else got this far was cut off.
            Ok(0) if self.pending.is_empty() && !geteuid().is_root() => Err(self.failed(Failure::NotAllowed)),
            Ok(0) => Err(self.failed(Failure::CutOff)),
            Ok(n) => {
                self.pending.extend_from_slice(&bytes[..n]);
                Ok(())
            }
            Err(error) => match error.kind() {
                ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut => Ok(()),
                _ => Err(self.failed(socket::of_transfer(&error, self.patience.silence))),
            },
        }
    }

    fn failed(&self, failure: Failure) -> Trouble {
        trouble_of(failure, &self.what)
    }

    /// An order that takes longer than the operator wants to wait is not the worker's failure.
    fn too_late(&self, now: Instant) -> Trouble {
        let Some(total) = self.patience.total.filter(|t| *t != self.patience.silence) else {
            return self.failed(Failure::Busy(self.patience.silence));
        };
        if self.until.is_some_and(|until| now >= until) {
            let cause = format!("it did not come to its end within {}", words_of(total));
            let hint = "the worker goes on: `cvm storage status --watch`";
            return Trouble::new(Exit::Bad, &self.what, cause).hint(hint);
        }
        self.failed(Failure::Busy(self.patience.silence))
    }
}

/// For an answer that is none to the question.
pub(crate) fn no_answer_fits(what: &str) -> Trouble {
    trouble_of(Failure::Garbage, what)
}

fn trouble_of(failure: Failure, what: &str) -> Trouble {
    let (cause, hint) = match failure {
        Failure::NotRunning(detail) => (
            format!("there is no storage worker here ({detail})"),
            "only S3 mode has one, inside the VM: `cvm status` shows the mode, and what the worker does",
        ),
        Failure::NotAllowed => {
            ("only root may speak to the storage worker".to_owned(), "log in as root, or put sudo before it")
        }
        Failure::Busy(time) => (
            format!("the storage worker said nothing for {}", words_of(time)),
            "try again; if it stays so: `cvm doctor`, and `cvm logs storage` for what the worker writes",
        ),
        Failure::CutOff => (
            "the storage worker ended the connection before its last word".to_owned(),
            "try again; it does so when it ends: `cvm status` shows whether it runs",
        ),
        Failure::TooLong => (
            format!("a line of the answer is longer than {}", words::size(ANSWER_MAX as u64)),
            "this is no storage worker of openclaw-cvm; look at CVM_STORAGE_SOCKET",
        ),
        Failure::Garbage | Failure::Version(_) => (
            "the answer is not one of the storage protocol".to_owned(),
            "use the `cvm` of the same image, and look at CVM_STORAGE_SOCKET",
        ),
        Failure::Other(cause) => (cause, "`cvm doctor` looks for the cause"),
    };
    Trouble::new(Exit::Away, what, cause).hint(hint)
}

#[cfg(test)]
mod tests;
