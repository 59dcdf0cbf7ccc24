//! How a process ended: by exit code, by signal or by the kernel's out-of-memory killer, with words for people.
//!
//! `cvm_machine::service` judges whether an end is good or bad.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

/// The end of one process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The process called exit with this code.
    Code(i32),
    /// A signal ended the process.
    Signal(i32),
    /// SIGKILL, while the kernel counted an out-of-memory kill.
    OutOfMemory,
    /// The program never ran, because a stage of starting it failed with this errno.
    NotStarted { stage: Stage, errno: i32 },
    /// The keeper of the process was killed, so its end is not known.
    Unseen,
}

/// The stages between fork and exec, in the order in which they happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    Fork,
    Session,
    Files,
    Priority,
    Account,
    Groups,
    User,
    Directory,
    Exec,
}

impl Stage {
    pub const ALL: [Self; 9] = [
        Self::Fork,
        Self::Session,
        Self::Files,
        Self::Priority,
        Self::Account,
        Self::Groups,
        Self::User,
        Self::Directory,
        Self::Exec,
    ];

    /// What failed, for people. Without a wildcard, so that a new stage needs words to compile.
    pub fn words(self) -> &'static str {
        match self {
            Self::Fork => "creating the process",
            Self::Session => "making it a session of its own",
            Self::Files => "setting up its files",
            Self::Priority => "setting its out-of-memory score and limits",
            Self::Account => "looking up its user in /etc/passwd",
            Self::Groups => "setting its groups",
            Self::User => "setting its user id",
            Self::Directory => "changing to its directory",
            Self::Exec => "executing the program",
        }
    }

    /// The byte that carries a stage over a pipe; the inverse of [`Stage::from_byte`].
    pub fn to_byte(self) -> u8 {
        self as u8
    }

    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.get(usize::from(byte)).copied()
    }
}

impl From<ExitStatus> for End {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            // Stopped or continued: none of our waits asks for these.
            (None, None) => Self::Unseen,
        }
    }
}

impl End {
    /// `stage` is the byte of a [`Stage`].
    pub fn not_started(stage: u8, errno: i32) -> Self {
        Self::NotStarted { stage: Stage::from_byte(stage).unwrap_or(Stage::Exec), errno }
    }

    pub fn is_success(&self) -> bool {
        *self == Self::Code(0)
    }

    /// The exit status that a shell would show for this end.
    pub fn shell_status(&self) -> u8 {
        match self {
            // Codes are eight bits wide and signals end at 64.
            Self::Code(code) => u8::try_from(code & 0xff).unwrap_or(u8::MAX),
            Self::Signal(signal) => u8::try_from(128 + (signal & 0x7f)).unwrap_or(u8::MAX),
            Self::OutOfMemory => 137,
            Self::NotStarted { errno, .. } if *errno == ENOENT => 127,
            Self::NotStarted { .. } => 126,
            Self::Unseen => 137,
        }
    }
}

const ENOENT: i32 = 2;

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with code {code}"),
            Self::Signal(signal) => match signal_name(*signal) {
                Some(name) => write!(f, "killed by {name}"),
                None => write!(f, "killed by signal {signal}"),
            },
            Self::OutOfMemory => f.write_str("killed by the kernel: out of memory"),
            Self::NotStarted { stage: Stage::Account, .. } => {
                f.write_str("could not start: its user is not in /etc/passwd")
            }
            Self::NotStarted { stage, errno } => {
                write!(f, "could not start: {}: {}", stage.words(), std::io::Error::from_raw_os_error(*errno))
            }
            Self::Unseen => f.write_str("ended unseen (its keeper was killed)"),
        }
    }
}

/// The name of a signal as `kill -l` shows it, for Linux on every architecture that we build for.
pub fn signal_name(signal: i32) -> Option<&'static str> {
    const NAMES: [&str; 31] = [
        "SIGHUP",
        "SIGINT",
        "SIGQUIT",
        "SIGILL",
        "SIGTRAP",
        "SIGABRT",
        "SIGBUS",
        "SIGFPE",
        "SIGKILL",
        "SIGUSR1",
        "SIGSEGV",
        "SIGUSR2",
        "SIGPIPE",
        "SIGALRM",
        "SIGTERM",
        "SIGSTKFLT",
        "SIGCHLD",
        "SIGCONT",
        "SIGSTOP",
        "SIGTSTP",
        "SIGTTIN",
        "SIGTTOU",
        "SIGURG",
        "SIGXCPU",
        "SIGXFSZ",
        "SIGVTALRM",
        "SIGPROF",
        "SIGWINCH",
        "SIGIO",
        "SIGPWR",
        "SIGSYS",
    ];
    usize::try_from(signal).ok()?.checked_sub(1).and_then(|i| NAMES.get(i).copied())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stage_survives_its_byte() {
        for stage in Stage::ALL {
            assert_eq!(Stage::from_byte(stage.to_byte()), Some(stage));
        }
        assert_eq!(Stage::from_byte(200), None);
    }

    #[test]
    fn the_status_of_a_wait_keeps_codes_and_signals_apart() {
        assert_eq!(End::from(ExitStatus::from_raw(78 << 8)), End::Code(78));
        for signal in [9, 15, 64] {
            assert_eq!(End::from(ExitStatus::from_raw(signal)), End::Signal(signal));
        }
        // With a core file.
        assert_eq!(End::from(ExitStatus::from_raw(0x80 + 11)), End::Signal(11));
    }

    #[test]
    fn every_way_to_end_reads_differently() {
        let told = [
            End::Code(78),
            End::Signal(11),
            End::Signal(40),
            End::OutOfMemory,
            End::NotStarted { stage: Stage::User, errno: 1 },
            End::Unseen,
        ]
        .map(|e| e.to_string());
        assert_eq!(
            told,
            [
                "exited with code 78",
                "killed by SIGSEGV",
                "killed by signal 40",
                "killed by the kernel: out of memory",
                "could not start: setting its user id: Operation not permitted (os error 1)",
                "ended unseen (its keeper was killed)",
            ]
        );
    }

    #[test]
    fn shells_see_the_status_they_know() {
        assert_eq!(End::Code(255).shell_status(), 255);
        assert_eq!(End::Signal(15).shell_status(), 143);
        assert_eq!(End::NotStarted { stage: Stage::Exec, errno: 2 }.shell_status(), 127);
        assert_eq!(End::NotStarted { stage: Stage::Exec, errno: 13 }.shell_status(), 126);
    }
}
