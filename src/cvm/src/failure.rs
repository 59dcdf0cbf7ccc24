//! What went wrong, in the one form that all commands share, and the exit status that goes with it.
//!
//! ```text
//! cvm: WHAT: CAUSE
//!   hint: what to do now
//! ```

use crate::text;
use crate::units;
use cvm_system::env::Problem;
use std::io::Write as _;
use std::process::ExitCode;

/// The exit statuses of `cvm`. They are documented in `cvm --help`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done, healthy, nothing failed.
    Good,
    /// Done, and the answer is bad: not healthy, a check failed, a service did not start.
    Bad,
    /// The command line is wrong, or the key that was given cannot be one.
    Usage,
    /// The supervisor, or the storage worker, is not there or does not answer.
    Unreachable,
    /// The supervisor, or the storage worker, refused.
    Refused,
    /// Interrupted at a prompt, as a shell shows it.
    Interrupted,
    /// The exit status of the program that was run.
    Program(u8),
}

impl Exit {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Good => 0,
            Self::Bad => 1,
            Self::Usage => 2,
            Self::Unreachable => 3,
            Self::Refused => 4,
            Self::Interrupted => 130,
            Self::Program(status) => status,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

/// A command that could not do its work.
#[derive(Debug, Clone)]
pub(crate) struct Failure {
    pub what: String,
    pub cause: String,
    pub hint: Option<String>,
    pub exit: Exit,
    /// The failure was printed already, or nobody is left to read it.
    silent: bool,
}

impl Failure {
    pub(crate) fn new(exit: Exit, what: impl Into<String>, cause: impl Into<String>) -> Self {
        Self { what: what.into(), cause: cause.into(), hint: None, exit, silent: false }
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub(crate) fn with_exit(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }

    /// Ends the program with `exit` and prints nothing.
    pub(crate) fn silent(exit: Exit) -> Self {
        Self { what: String::new(), cause: String::new(), hint: None, exit, silent: true }
    }

    /// Standard output could not be written to. A reader that has left (`cvm logs | head`) is no
    /// failure.
    pub(crate) fn output(error: &std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::silent(Exit::Good);
        }
        Self::new(Exit::Bad, "standard output", text::io_error(error))
    }

    pub(crate) fn print(&self) {
        if self.silent {
            return;
        }
        // Standard error may be closed as well; then nobody is left to read it.
        let _ = write!(std::io::stderr().lock(), "{self}");
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "cvm: {}: {}", text::clean(&self.what), text::clean(&self.cause))?;
        match &self.hint {
            Some(hint) => writeln!(f, "  hint: {}", text::clean(hint)),
            None => Ok(()),
        }
    }
}

/// Prints a warning on standard error; the command goes on.
pub(crate) fn warn(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "cvm: warning: {}", text::clean(text));
}

/// Prints every mistake of a configuration as `cvm-init --check` does, and `consequence`.
pub(crate) fn mistakes(what: &str, problems: &[Problem], consequence: &str) -> Failure {
    let mut stderr = std::io::stderr().lock();
    let number = units::count(problems.len() as u64, "mistake", "mistakes");
    // Standard error may be closed; then nobody is left to read it.
    let _ = writeln!(stderr, "cvm: {what}: the configuration has {number}; {consequence}");
    for problem in problems {
        let _ = writeln!(stderr, "  {}", text::clean(&problem.to_string()));
    }
    Failure::silent(Exit::Usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_the_thing_the_cause_and_the_remedy() {
        let failure = Failure::new(Exit::Unreachable, "status", "nobody\x1b[2Jlistens").hint("start it");
        assert_eq!(failure.to_string(), "cvm: status: nobody\u{fffd}[2Jlistens\n  hint: start it\n");
    }

    #[test]
    fn a_reader_that_has_left_is_no_failure() {
        let failure = Failure::output(&std::io::ErrorKind::BrokenPipe.into());
        assert!(failure.silent && failure.exit == Exit::Good);
        assert!(!Failure::output(&std::io::ErrorKind::StorageFull.into()).silent);
    }
}
