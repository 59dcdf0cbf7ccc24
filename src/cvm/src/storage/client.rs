//! The client of the storage worker's socket: one question, and lines until the last one.
//!
//! A worker that works sends a line at least every few seconds, progress if nothing else. The client
//! gives up on one that is silent for longer.

use crate::connection::{Connection, NoAnswer, socket_path};
use crate::failure::{Exit, Failure};
use crate::units;
use cvm_protocol::json_lines;
use cvm_protocol::paths;
use cvm_protocol::storage::{ANSWER_MAX, Answer, Ask, QUESTION_MAX, Question, VERSION};
use cvm_protocol::time::words;
use std::path::Path;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

const SOCKET_VARIABLE: &str = "CVM_STORAGE_SOCKET";

/// How long to wait.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// For the next line.
    pub silence: Duration,
    /// For the last line, if there is a limit.
    pub total: Option<Duration>,
}

impl Patience {
    /// For an answer that the worker has at hand.
    pub(crate) const fn short(time: Duration) -> Self {
        Self { silence: time, total: Some(time) }
    }

    /// For work of any length.
    pub(crate) const fn working(total: Option<Duration>) -> Self {
        Self { silence: Duration::from_secs(60), total }
    }
}

/// A question that was asked, and the lines of its answer.
#[derive(Debug)]
pub(crate) struct Client {
    what: String,
    connection: Connection,
    patience: Patience,
    deadline: Option<Instant>,
}

impl Client {
    /// Asks the worker. `what` names the command in a failure: "storage flush".
    pub(crate) fn ask(what: &str, verb: Ask, patience: Patience) -> Result<Self, Failure> {
        Self::ask_at(&socket_path(SOCKET_VARIABLE, paths::STORAGE_SOCKET), what, verb, patience)
    }

    fn ask_at(path: &Path, what: &str, verb: Ask, patience: Patience) -> Result<Self, Failure> {
        let question = json_lines::line(&Question { v: VERSION, verb });
        if question.len() > QUESTION_MAX {
            return Err(Failure::new(Exit::Usage, what, "the path is too long to ask for"));
        }
        let now = Instant::now();
        // Connecting takes no time unless the worker hangs.
        let time = patience.total.map_or(patience.silence, |total| total.min(patience.silence));
        let connection = Connection::open(path, &question, ANSWER_MAX, now + time)
            .map_err(|no_answer| failure_of(no_answer, time, what))?;
        let deadline = patience.total.map(|total| now + total);
        Ok(Self { what: what.to_owned(), connection, patience, deadline })
    }

    /// The next answer. A refusal is a failure.
    pub(crate) fn answer(&mut self) -> Result<Answer, Failure> {
        let line = self.line()?;
        self.parsed(&line)
    }

    /// An answer of one line: the line as it came, and its meaning.
    pub(crate) fn only_answer(mut self) -> Result<(Zeroizing<Vec<u8>>, Answer), Failure> {
        let line = self.line()?;
        let answer = self.parsed(&line)?;
        Ok((line, answer))
    }

    pub(crate) fn what(&self) -> &str {
        &self.what
    }

    fn parsed(&self, line: &[u8]) -> Result<Answer, Failure> {
        match serde_json::from_slice(line) {
            Ok(Answer::Refused { why }) => {
                let cause = format!("the storage worker refused: {why}");
                let hint = "`cvm storage status` shows how things stand";
                Err(Failure::new(Exit::Refused, &self.what, cause).hint(hint))
            }
            Ok(answer) => Ok(answer),
            Err(_) => Err(unexpected_answer(&self.what)),
        }
    }

    fn line(&mut self) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let silent = Instant::now() + self.patience.silence;
        let due = self.deadline.map_or(silent, |deadline| deadline.min(silent));
        self.connection.line(due).map_err(|no_answer| match no_answer {
            NoAnswer::Late => self.too_late(),
            no_answer => failure_of(no_answer, self.patience.silence, &self.what),
        })
    }

    /// If the operator's limit is over, the worker has not failed: it goes on.
    fn too_late(&self) -> Failure {
        let limit = self.patience.total.filter(|total| *total != self.patience.silence);
        if let Some(limit) = limit.filter(|_| self.deadline.is_some_and(|at| Instant::now() >= at)) {
            let cause = format!("it was not done within {}", words(limit));
            let hint = "the worker goes on: `cvm storage status --watch`";
            return Failure::new(Exit::Bad, &self.what, cause).hint(hint);
        }
        failure_of(NoAnswer::Late, self.patience.silence, &self.what)
    }
}

/// For an answer that does not fit the question.
pub(crate) fn unexpected_answer(what: &str) -> Failure {
    failure_of(NoAnswer::Garbage, Duration::ZERO, what)
}

fn failure_of(no_answer: NoAnswer, patience: Duration, what: &str) -> Failure {
    let (cause, hint) = match no_answer {
        NoAnswer::NotRunning(detail) => (
            format!("there is no storage worker here ({detail})"),
            "only S3 mode has one, inside the VM: `cvm status` shows the mode and the state of the worker",
        ),
        NoAnswer::NotAllowed => {
            ("only root may speak to the storage worker".to_owned(), "log in as root, or put sudo before it")
        }
        NoAnswer::Late => (
            format!("the storage worker sent nothing for {}", words(patience)),
            "try again; if it stays so: `cvm doctor`, and `cvm logs storage` for what the worker writes",
        ),
        NoAnswer::CutOff => (
            "the storage worker ended the connection before its last line".to_owned(),
            "try again; it does so when it ends: `cvm status` shows whether it runs",
        ),
        NoAnswer::TooLong => (
            format!("a line of the answer is longer than {}", units::size(ANSWER_MAX as u64)),
            "this is no storage worker of openclaw-cvm; look at CVM_STORAGE_SOCKET",
        ),
        NoAnswer::Garbage | NoAnswer::Version(_) => (
            "the answer is not one of the storage protocol".to_owned(),
            "use the `cvm` of the same image, and look at CVM_STORAGE_SOCKET",
        ),
        NoAnswer::Other(cause) => (cause, "`cvm doctor` looks for the cause"),
    };
    Failure::new(Exit::Unreachable, what, cause).hint(hint)
}

#[cfg(test)]
mod tests;
