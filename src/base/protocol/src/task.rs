//! The messages between PID 1 and `cvm-task`.
//!
//! * PID 1 to `cvm-task`: [`Task`], in a sealed memfd on standard input.
//! * `cvm-task` to PID 1: [`TaskReport`], on a report pipe of its own.

use crate::report::Note;
use crate::status::Remark;
use crate::volume::Claim;
use cvm_secrets::base64_bytes::PackedBytes;
use serde::{Deserialize, Serialize};

/// One step's work, with all it needs to know.
#[derive(Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Task {
    Ssh {
        port: u16,
        /// None: keep a random one on the volume.
        seed: Option<PackedBytes>,
        /// Whether a key that is added at `/root/.ssh` later counts at once.
        trust_host_keys: bool,
    },
    /// See whose volume it is, and let the owners of the keys in.
    Volume {
        claim: Claim,
        /// Of the environment.
        extra_keys: String,
        /// Whether the keys mounted at `/root/.ssh` count too.
        trust_host_keys: bool,
    },
    Home {
        user: String,
        docker: DockerUse,
    },
    State(StateTask),
    DockerPrepare,
    FreePort {
        port: u16,
        /// Whose it is.
        service: String,
    },
    /// End what a killed keeper left behind.
    Sweep {
        run: String,
        /// End only whoever listens on this port; the rest of the run is somebody's work.
        listens_on: Option<u16>,
    },
}

/// What the gateway's user has to do with docker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DockerUse {
    /// It may use it: it is in the group.
    Allowed,
    None,
    /// As `None`, but because the default has changed: who has containers is told.
    NoneByDefault,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateTask {
    pub user: String,
    pub port: u16,
    pub redpill: bool,
    /// The user's own openclaw.json.
    pub config: Option<PackedBytes>,
    /// Path to text, as JSON.
    pub workspace: Option<PackedBytes>,
    pub device_seed: Option<PackedBytes>,
    /// None: keep a random one on the volume and report it.
    pub token: Option<PackedBytes>,
}

/// What a step tells PID 1. No line, or a broken one, is a failure.
#[derive(Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum TaskReport {
    Done {
        notes: Vec<Note>,
        facts: Facts,
    },
    Failed {
        notes: Vec<Note>,
        why: String,
        /// Whether trying again can help.
        retry: bool,
    },
}

/// What a step found out that others need.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// The random gateway token, when there is no `MASTER_KEY`.
    pub token: Option<PackedBytes>,
    /// Fingerprint of the SSH host key.
    pub host_key: Option<String>,
    /// A standing remark for `status`, by topic.
    pub remarks: Vec<Remark>,
}
