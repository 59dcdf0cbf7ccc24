//! What a service of ours, or a task, tells PID 1, one JSON object a line on its report pipe.
//!
//! PID 1 knows none of the services: it says their notes, opens and closes the gates that they provide, keeps
//! their facts for `cvm status`, and remembers their last word. All of it is public: no name of the agent's
//! files and no word of a message may be in it.

use crate::fact::Fact;
use serde::{Deserialize, Serialize};

/// One report of a keeper, a task or a service; a task's may carry notes for the boot log.
pub const REPORT_MAX: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

/// A line for the boot log. Safe to be public.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub level: Level,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum ServiceReport {
    /// A line for the boot log. A service that sends very many loses some of them.
    Note { level: Level, text: String },
    /// A gate that the service provides has opened or closed.
    Gate {
        gate: String,
        #[serde(flatten)]
        state: GateState,
    },
    /// How the service stands: all facts, each time one of them changes.
    Status { facts: Vec<Fact> },
    /// The last word: what the service leaves undone, in a sentence; none when all is done.
    Drained { missing: Option<String> },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum GateState {
    /// Whoever needs the gate may run. Sent again when `outlives` changes.
    Open {
        /// Whether the gate stays open when the service ends.
        outlives: bool,
    },
    /// Whoever needs the gate is ended.
    Closed {
        why: String,
        /// Whether the service keeps trying to open it.
        retry: bool,
    },
    /// The gate is closed and nothing is wrong: the service waits its turn.
    Waiting { why: String },
    /// The service cannot tell any more. An open gate that outlives the service stays open; any other closes.
    Unknown { why: String },
}
