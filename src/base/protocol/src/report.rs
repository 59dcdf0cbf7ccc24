//! The reports of a service of ours or of a task to PID 1, one JSON object a line on its report pipe.
//!
//! PID 1 has no code for single services. It logs their notes, opens and closes the gates that they provide, keeps
//! their facts for `cvm status`, and remembers their last report. Reports are public: they must hold no name of the
//! agent's files and no word of a message.

use crate::fact::Fact;
use serde::{Deserialize, Serialize};

/// The most bytes of one report of a keeper, a task or a service. A task's report may hold many notes.
pub const REPORT_MAX: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

/// A line for the boot log, which may be public.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub level: Level,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum ServiceReport {
    /// A line for the boot log. If a service sends very many, some are dropped.
    Note { level: Level, text: String },
    /// A gate that the service provides has opened or closed.
    Gate {
        gate: String,
        #[serde(flatten)]
        state: GateState,
    },
    /// The state of the service: all its facts, sent each time one of them changes.
    Status { facts: Vec<Fact> },
    /// The last report: a sentence about the work that the service leaves undone, or none if all is done.
    Drained { missing: Option<String> },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum GateState {
    /// Services and tasks that need the gate may run. Sent again when `outlives` changes.
    Open {
        /// Whether the gate stays open when the service ends.
        outlives: bool,
    },
    /// Services that need the gate are ended.
    Closed {
        why: String,
        /// Whether the service keeps trying to open it.
        retry: bool,
    },
    /// The gate is closed, but nothing is wrong: the service waits for its turn.
    Waiting { why: String },
    /// The service does not know the state any more. An open gate that outlives the service stays open; any other
    /// closes.
    Unknown { why: String },
}
