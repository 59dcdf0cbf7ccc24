//! What a check found, and how a room tells it: one JSON object a line.
//!
//! Refuses findings without a remedy unless all is well. Imports nothing of ours.

use serde::{Deserialize, Serialize};
use std::io::Write;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    Ok,
    /// Not made, because it would say nothing here.
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
    /// What to do.
    pub remedy: Option<String>,
}

/// What one check yields.
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

/// A line from a room to the one who asked.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub(crate) enum Line {
    /// The next check, so that one that hangs is known by name.
    About {
        check: String,
    },
    Found(Finding),
    /// The last words: nothing was left out.
    Done,
}

/// Takes down what a room finds.
pub(crate) struct Notebook<'w> {
    room: String,
    out: &'w mut dyn Write,
}

impl<'w> Notebook<'w> {
    pub(crate) fn new(room: &str, out: &'w mut dyn Write) -> Self {
        Self { room: room.to_owned(), out }
    }

    /// Makes one check, and notes it.
    pub(crate) fn check(&mut self, name: &str, make: impl FnOnce() -> Outcome) {
        self.about(name);
        let outcome = make();
        self.note(name, outcome);
    }

    pub(crate) fn about(&mut self, check: &str) {
        self.line(&Line::About { check: check.to_owned() });
    }

    pub(crate) fn note(&mut self, check: &str, outcome: Outcome) {
        let Outcome { verdict, found, remedy } = outcome;
        let (room, check) = (self.room.clone(), check.to_owned());
        self.line(&Line::Found(Finding { room, check, verdict, found, remedy }));
    }

    fn line(&mut self, line: &Line) {
        if let Ok(mut text) = serde_json::to_string(line) {
            text.push('\n');
            // Whoever asked has given up on this room; it will be ended.
            let _ = self.out.write_all(text.as_bytes()).and_then(|()| self.out.flush());
        }
    }
}

impl Drop for Notebook<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.line(&Line::Done);
        }
    }
}

/// The findings of a room, for tests.
#[cfg(test)]
pub(crate) fn findings_of(room: impl FnOnce(&mut Notebook<'_>)) -> Vec<Finding> {
    let mut bytes = Vec::new();
    room(&mut Notebook::new("room", &mut bytes));
    let lines = bytes.split(|b| *b == b'\n').filter(|l| !l.is_empty());
    let lines = lines.map(|l| serde_json::from_slice::<Line>(l).unwrap());
    lines.filter_map(|l| if let Line::Found(finding) = l { Some(finding) } else { None }).collect()
}
