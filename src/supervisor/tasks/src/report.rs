//! What a step says when it has ended: notes for the boot log, facts for the supervisor, and in
//! the end done or failed.
//!
//! Notes and reasons become public: they name things of ours, and of the agent's things at most
//! how many there are. What an operator may know beyond that goes to standard error, which is a
//! private log ([`detail`]).
//!
//! It never becomes longer than one line of the report pipe may be.

use cvm_protocol::report::{Level, Note, REPORT_MAX};
use cvm_protocol::status::Remark;
use cvm_protocol::task::{Facts, TaskReport};
use std::path::Path;

/// All notes together stay far below the limit of a report, escapes included.
const NOTES_MAX: usize = 24;
const TEXT_MAX: usize = 1000;
const _: () = assert!(NOTES_MAX * TEXT_MAX * 2 <= REPORT_MAX);

pub(crate) type Outcome<T> = Result<T, Failure>;

/// Why a task is not done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    pub(crate) why: String,
    /// Whether trying again can help without anybody acting.
    pub(crate) retry: bool,
}

impl Failure {
    pub(crate) fn again(why: impl Into<String>) -> Self {
        Self { why: why.into(), retry: true }
    }

    pub(crate) fn for_good(why: impl Into<String>) -> Self {
        Self { why: why.into(), retry: false }
    }
}

#[derive(Default)]
pub(crate) struct Report {
    pub(crate) notes: Vec<Note>,
    pub(crate) facts: Facts,
}

impl Report {
    pub(crate) fn info(&mut self, text: impl AsRef<str>) {
        self.note(Level::Info, text.as_ref());
    }

    pub(crate) fn warn(&mut self, text: impl AsRef<str>) {
        self.note(Level::Warn, text.as_ref());
    }

    /// A warning that also stays in `status`.
    pub(crate) fn remark(&mut self, topic: &str, text: &str) {
        self.warn(text);
        self.facts.remarks.push(Remark { topic: topic.to_owned(), text: tidy(text) });
    }

    fn note(&mut self, level: Level, text: &str) {
        let text = tidy(text);
        eprintln!("{text}");
        match self.notes.len() {
            ..NOTES_MAX => self.notes.push(Note { level, text }),
            NOTES_MAX => {
                self.notes.push(Note { level: Level::Warn, text: "more is in this step's log".into() });
            }
            _ => {}
        }
    }

    pub(crate) fn finish(self, outcome: Outcome<()>) -> TaskReport {
        let Self { notes, facts } = self;
        match outcome {
            Ok(()) => TaskReport::Done { notes, facts },
            Err(Failure { why, retry }) => {
                let why = tidy(&why);
                eprintln!("failed: {why}");
                TaskReport::Failed { notes, why, retry }
            }
        }
    }
}

/// A line for operators only, not for the boot log: it may name the agent's files.
pub(crate) fn detail(text: impl AsRef<str>) {
    eprintln!("{}", tidy(text.as_ref()));
}

/// A path as it may be printed.
pub(crate) fn shown(path: &Path) -> String {
    tidy(&path.display().to_string())
}

/// One line without control characters: names of files and words of programs go into logs and
/// terminals, and both obey some characters.
fn tidy(text: &str) -> String {
    let mut tidied: String =
        text.trim().chars().take(TEXT_MAX).map(|c| if c.is_control() { ' ' } else { c }).collect();
    while tidied.len() > TEXT_MAX {
        tidied.pop();
    }
    tidied
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_protocol::json_lines;

    #[test]
    fn a_note_cannot_speak_to_a_terminal_or_begin_a_second_line() {
        assert_eq!(tidy("a\x1b[2Jb\nc\u{9b}d"), "a [2Jb c d");
    }

    #[test]
    fn the_longest_report_fits_its_line() {
        let mut report = Report::default();
        for _ in 0..1000 {
            report.warn("\"\\\u{fffd}".repeat(1000));
        }
        let line = json_lines::line(&report.finish(Err(Failure::again("\\".repeat(5000)))));
        assert!(line.len() <= REPORT_MAX, "{}", line.len());
    }

    #[test]
    fn a_remark_is_heard_twice() {
        let mut report = Report::default();
        report.remark("gateway token", "differs");
        assert_eq!((report.notes.len(), report.facts.remarks.len()), (1, 1));
    }
}
