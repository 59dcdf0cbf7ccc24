//! Findings, and the lines in which a room's process reports them: one JSON object each.

use serde::{Deserialize, Serialize};
use std::io::Write;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    Ok,
    /// The check was not made, because it has no meaning here.
    Skip,
    Warn,
    Fail,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finding {
    pub room: String,
    pub check: String,
    pub verdict: Verdict,
    pub found: String,
    /// None unless the verdict is a warning or a failure.
    pub remedy: Option<String>,
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub verdict: Verdict,
    pub found: String,
    pub remedy: Option<String>,
}

pub(crate) fn ok(found: impl Into<String>) -> Outcome {
    Outcome { verdict: Verdict::Ok, found: found.into(), remedy: None }
}

pub(crate) fn skip(found: impl Into<String>) -> Outcome {
    Outcome { verdict: Verdict::Skip, found: found.into(), remedy: None }
}

pub(crate) fn warn(found: impl Into<String>, remedy: impl Into<String>) -> Outcome {
    Outcome { verdict: Verdict::Warn, found: found.into(), remedy: Some(remedy.into()) }
}

pub(crate) fn fail(found: impl Into<String>, remedy: impl Into<String>) -> Outcome {
    Outcome { verdict: Verdict::Fail, found: found.into(), remedy: Some(remedy.into()) }
}

/// A line from a room's process to the doctor.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub(crate) enum Line {
    /// The name of the next check, for the case that it hangs.
    About {
        check: String,
    },
    Found(Finding),
    /// The last line: every check was made.
    Done,
}

/// The checks of one room, and the pipe to which their findings go.
pub(crate) struct Checks<'w> {
    room: String,
    out: &'w mut dyn Write,
}

impl<'w> Checks<'w> {
    pub(crate) fn new(room: &str, out: &'w mut dyn Write) -> Self {
        Self { room: room.to_owned(), out }
    }

    /// Makes one check, and reports it.
    pub(crate) fn run(&mut self, name: &str, make: impl FnOnce() -> Outcome) {
        self.begin(name);
        let outcome = make();
        self.add(name, outcome);
    }

    /// Names the next check.
    pub(crate) fn begin(&mut self, check: &str) {
        self.line(&Line::About { check: check.to_owned() });
    }

    /// Reports the outcome of a check.
    pub(crate) fn add(&mut self, check: &str, outcome: Outcome) {
        let Outcome { verdict, found, remedy } = outcome;
        let (room, check) = (self.room.clone(), check.to_owned());
        self.line(&Line::Found(Finding { room, check, verdict, found, remedy }));
    }

    fn line(&mut self, line: &Line) {
        if let Ok(mut text) = serde_json::to_string(line) {
            text.push('\n');
            // Without a reader the doctor has given up on this room, and ends its process.
            let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        }
    }
}

impl Drop for Checks<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.line(&Line::Done);
        }
    }
}

/// The findings of a room, for tests.
#[cfg(test)]
pub(crate) fn findings_of(room: impl FnOnce(&mut Checks<'_>)) -> Vec<Finding> {
    let mut bytes = Vec::new();
    room(&mut Checks::new("room", &mut bytes));
    let lines = bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let lines = lines.map(|l| serde_json::from_slice::<Line>(l).unwrap());
    lines.filter_map(|l| if let Line::Found(finding) = l { Some(finding) } else { None }).collect()
}
