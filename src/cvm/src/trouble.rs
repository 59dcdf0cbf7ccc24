//! What went wrong, in the one form all commands share, and the exit status that goes with it.
//!
//! ```text
//! cvm: WHAT: CAUSE
//!   hint: what to do now
//! ```
//!
//! Refuses to print anything twice, and to complain about a reader that went away.
//! May import: `words`.

use crate::words;
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
    /// No supervisor, or none that answers.
    Away,
    /// The supervisor said no.
    Refused,
    /// Interrupted at a prompt, as a shell shows it.
    Interrupted,
    /// What the program ended with that was run.
    Of(u8),
}

impl Exit {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::Good => 0,
            Self::Bad => 1,
            Self::Usage => 2,
            Self::Away => 3,
            Self::Refused => 4,
            Self::Interrupted => 130,
            Self::Of(status) => status,
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
pub(crate) struct Trouble {
    pub what: String,
    pub cause: String,
    pub hint: Option<String>,
    pub exit: Exit,
    /// There is nobody to tell, or it was told already.
    silent: bool,
}

impl Trouble {
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

    /// Ends the program with `exit`, without a word.
    pub(crate) fn silent(exit: Exit) -> Self {
        Self { what: String::new(), cause: String::new(), hint: None, exit, silent: true }
    }

    /// Standard output could not be written to. A reader that had enough (`cvm logs | head`) is
    /// no failure.
    pub(crate) fn output(error: &std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::silent(Exit::Good);
        }
        Self::new(Exit::Bad, "standard output", words::of_io(error))
    }

    pub(crate) fn tell(&self) {
        if self.silent {
            return;
        }
        // Standard error may be closed as well; then there is nobody left to tell.
        let _ = write!(std::io::stderr().lock(), "{self}");
    }
}

impl std::fmt::Display for Trouble {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "cvm: {}: {}", words::clean(&self.what), words::clean(&self.cause))?;
        match &self.hint {
            Some(hint) => writeln!(f, "  hint: {}", words::clean(hint)),
            None => Ok(()),
        }
    }
}

/// A remark on standard error that stops nothing.
pub(crate) fn warn(text: &str) {
    let _ = writeln!(std::io::stderr().lock(), "cvm: warning: {}", words::clean(text));
}

/// Every mistake of a configuration, as `cvm-init --check` tells them.
pub(crate) fn mistakes(what: &str, problems: &[Problem], so: &str) -> Trouble {
    let mut stderr = std::io::stderr().lock();
    let number = words::count(problems.len() as u64, "mistake", "mistakes");
    // Standard error may be closed; then there is nobody to tell.
    let _ = writeln!(stderr, "cvm: {what}: the configuration has {number}; {so}");
    for problem in problems {
        let _ = writeln!(stderr, "  {}", words::clean(&problem.to_string()));
    }
    Trouble::silent(Exit::Usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trouble_names_the_thing_the_cause_and_the_remedy() {
        let trouble = Trouble::new(Exit::Away, "status", "nobody\x1b[2Jlistens").hint("start it");
        assert_eq!(trouble.to_string(), "cvm: status: nobody\u{fffd}[2Jlistens\n  hint: start it\n");
    }

    #[test]
    fn a_reader_that_had_enough_is_no_failure() {
        let trouble = Trouble::output(&std::io::ErrorKind::BrokenPipe.into());
        assert!(trouble.silent && trouble.exit == Exit::Good);
        assert!(!Trouble::output(&std::io::ErrorKind::StorageFull.into()).silent);
    }
}
