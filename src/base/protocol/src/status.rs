//! What the supervisor says of itself: a snapshot that `cvm status` shows and machines read.
//!
//! Holds names, times and fingerprints, never a secret and never a word of the gateway's: it is safe to be pasted
//! in public.

use crate::doors::Door;
use crate::fact::Fact;
use serde::{Deserialize, Serialize};

/// The whole snapshot. Field names are an interface: add, do not rename.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// Version of the supervisor.
    pub version: String,
    pub phase: Phase,
    /// Time in which the machine stood still does not count.
    pub uptime_ms: u64,
    /// Whether somebody has the clock stand still.
    #[serde(default)]
    pub frozen: bool,
    pub storage: Storage,
    pub keys: Vec<Fingerprint>,
    /// What the configuration opens that is shut by default.
    #[serde(default)]
    pub doors: Vec<Door>,
    /// What an operator should know as long as it is true.
    pub remarks: Vec<Remark>,
    pub boot: Vec<Step>,
    pub services: Vec<Service>,
    pub healthy: bool,
    /// Why not, one line each.
    pub unhealthy: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Required steps are still to come.
    Booting,
    Running,
    /// A required step failed; it is tried again, or waits for an operator.
    Degraded,
    Stopping,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Storage {
    /// `local` or `s3`.
    pub mode: String,
    /// What that means for the data, in words.
    pub meaning: String,
}

impl Storage {
    /// Before anything is known but the configuration.
    pub fn new(mode: &str, meaning: impl Into<String>) -> Self {
        let (mode, meaning) = (mode.to_owned(), meaning.into());
        Self { mode, meaning }
    }
}

/// Something two machines with the same key have in common.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fingerprint {
    pub name: String,
    pub fingerprint: String,
}

/// Something an operator should know as long as it is true.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remark {
    pub topic: String,
    pub text: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    /// `waiting`, `running`, `done`, `failed`.
    pub state: String,
    pub required: bool,
    /// Since PID 1 started.
    pub began_ms: Option<u64>,
    pub took_ms: Option<u64>,
    pub tries: u32,
    pub why: Option<String>,
    pub next_try_in_ms: Option<u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Service {
    pub name: String,
    pub what: String,
    /// `blocked`, `preparing`, `starting`, `up`, `ready`, `repairing`, `stopping`, `waiting`,
    /// `parked`, `stopped`, `stuck`.
    pub state: String,
    pub why: Option<String>,
    pub pid: Option<i32>,
    pub up_ms: Option<u64>,
    /// First exec and first readiness, since PID 1 started.
    pub first_exec_ms: Option<u64>,
    pub first_ready_ms: Option<u64>,
    pub restarts: u64,
    pub failures_in_a_row: u32,
    pub crash_loop: bool,
    pub last_end: Option<String>,
    pub last_end_ago_ms: Option<u64>,
    pub next_start_in_ms: Option<u64>,
    pub next_action: String,
    pub required: bool,
    pub dropped_lines: u64,
    /// How it says that it stands, where it says anything.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub facts: Vec<Fact>,
}
