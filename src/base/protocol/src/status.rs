//! The supervisor's status: a snapshot that `cvm status` shows and that programs read.
//!
//! It holds names, times and fingerprints, never a secret and never text of the gateway, so an operator may paste it
//! in public.

use crate::doors::Door;
use crate::fact::Fact;
use crate::word_enum::word_enum;
use serde::{Deserialize, Serialize};

/// The whole snapshot. Its field names are an interface: add fields, but do not rename any.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Status {
    /// The version of the supervisor.
    pub version: String,
    pub phase: Phase,
    /// How long the machine has been up, without the time in which it was frozen.
    pub uptime_ms: u64,
    /// Whether an operator has frozen the machine's clock.
    #[serde(default)]
    pub frozen: bool,
    pub storage: Storage,
    pub keys: Vec<Fingerprint>,
    /// Protections that this configuration turns off.
    #[serde(default)]
    pub doors: Vec<Door>,
    /// Facts that an operator should know as long as they are true.
    pub remarks: Vec<Remark>,
    pub boot: Vec<Step>,
    pub services: Vec<Service>,
    pub healthy: bool,
    /// The reasons why the machine is not healthy, one line each.
    pub unhealthy: Vec<String>,
}

word_enum! {
    /// The phase of the whole machine.
    pub enum Phase {
        /// Required steps are still to come.
        Booting = "booting",
        Running = "running",
        /// A required step failed. It will be tried again, or waits for an operator.
        Degraded = "degraded",
        Stopping = "stopping",
    }
}

word_enum! {
    pub enum StorageMode {
        Local = "local",
        S3 = "s3",
    }
}

word_enum! {
    pub enum StepState {
        Waiting = "waiting",
        Running = "running",
        Done = "done",
        Failed = "failed",
    }
}

word_enum! {
    pub enum ServiceState {
        /// A gate that the service needs is closed.
        Blocked = "blocked",
        Preparing = "preparing",
        Starting = "starting",
        /// The service runs, and is not ready yet or has no readiness probe.
        Up = "up",
        Ready = "ready",
        Repairing = "repairing",
        Stopping = "stopping",
        /// The service starts again at a known time.
        Waiting = "waiting",
        /// Only an operator can start it again.
        Parked = "parked",
        Stopped = "stopped",
        /// A process of the last run does not end, because the kernel holds it.
        Stuck = "stuck",
    }
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Storage {
    pub mode: StorageMode,
    /// What the mode means for the data, in a sentence.
    pub meaning: String,
}

impl Storage {
    /// The status from the configuration alone.
    pub fn new(mode: StorageMode, meaning: impl Into<String>) -> Self {
        Self { mode, meaning: meaning.into() }
    }
}

/// A public fingerprint of a key: machines with the same key show the same one.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Fingerprint {
    pub name: String,
    pub fingerprint: String,
}

/// A fact that an operator should know as long as it is true.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remark {
    pub topic: String,
    pub text: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Step {
    pub name: String,
    pub state: StepState,
    pub required: bool,
    /// When the step began, since PID 1 started.
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
    pub state: ServiceState,
    pub why: Option<String>,
    pub pid: Option<i32>,
    pub up_ms: Option<u64>,
    /// When the service was first executed and first ready, since PID 1 started.
    pub first_exec_ms: Option<u64>,
    pub first_ready_ms: Option<u64>,
    pub restarts: u64,
    pub failures_in_a_row: u32,
    pub crash_loop: bool,
    pub last_end: Option<String>,
    pub last_end_ago_ms: Option<u64>,
    pub next_start_in_ms: Option<u64>,
    /// What the supervisor does next, or what an operator can do. None is `-` on the wire.
    #[serde(with = "dash")]
    pub next_action: Option<String>,
    pub required: bool,
    pub dropped_lines: u64,
    /// The facts that the service has reported about itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub facts: Vec<Fact>,
}

impl Service {
    /// Whether the service runs and, if it has a readiness probe, is ready.
    pub fn is_ready(&self) -> bool {
        match self.state {
            ServiceState::Ready => true,
            ServiceState::Up => self.next_action.is_none(),
            _ => false,
        }
    }

    /// The next action as a page shows it, `-` if nothing is due.
    pub fn shown_action(&self) -> &str {
        self.next_action.as_deref().unwrap_or(dash::NONE)
    }
}

/// Writes an absent text as `-`.
mod dash {
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) const NONE: &str = "-";

    #[allow(clippy::ref_option)] // serde passes a reference to the field
    pub(super) fn serialize<S: Serializer>(text: &Option<String>, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(text.as_deref().unwrap_or(NONE))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
        Ok(Some(String::deserialize(from)?).filter(|text| text != NONE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(state: &str, next_action: &str) -> Service {
        let service = serde_json::json!({
            "name": "gateway", "what": "a gateway", "state": state, "restarts": 0, "failures_in_a_row": 0,
            "crash_loop": false, "next_action": next_action, "required": true, "dropped_lines": 0,
        });
        serde_json::from_value(service).unwrap()
    }

    #[test]
    fn a_state_is_one_word_on_the_wire_and_on_the_screen_and_a_new_word_is_unknown() {
        assert_eq!(serde_json::to_string(&StepState::Failed).unwrap(), r#""failed""#);
        assert_eq!(StepState::Failed.to_string(), "failed");
        assert_eq!(serde_json::from_str::<StepState>(r#""failed""#).unwrap(), StepState::Failed);
        assert_eq!(serde_json::from_str::<StepState>(r#""ultraviolet""#).unwrap(), StepState::Unknown);
        assert_eq!(StepState::default().to_string(), "unknown");
    }

    #[test]
    fn a_service_without_a_next_action_shows_a_dash_and_reads_it_back() {
        let idle = service("up", "-");
        assert_eq!((idle.next_action.as_deref(), idle.shown_action()), (None, "-"));
        assert_eq!(serde_json::to_value(&idle).unwrap()["next_action"], "-");
        let busy = service("waiting", "starts in 5 s");
        assert_eq!(serde_json::to_value(&busy).unwrap()["next_action"], "starts in 5 s");
    }

    #[test]
    fn a_service_that_runs_is_ready_unless_something_is_due() {
        let ready =
            [("ready", "-"), ("up", "-"), ("up", "becomes ready"), ("starting", "-"), ("new word", "-")]
                .map(|(state, next)| service(state, next).is_ready());
        assert_eq!(ready, [true, true, false, false, false]);
    }
}
