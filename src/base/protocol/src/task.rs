//! The messages between PID 1 and `cvm-task`.
//!
//! * PID 1 to `cvm-task`: [`Task`], in a sealed memfd on standard input.
//! * `cvm-task` to PID 1: [`TaskReport`], on the task's own report pipe.

use crate::report::Note;
use crate::status::Remark;
use crate::volume::Claim;
use cvm_secrets::base64_bytes::PackedBytes;
use serde::{Deserialize, Serialize};

/// The work of one boot step, with everything that the step has to know.
#[derive(Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Task {
    Ssh {
        port: u16,
        /// The seed of the host key. Without one the task keeps a random one on the volume.
        seed: Option<PackedBytes>,
        /// Whether sshd also reads the keys at `/root/.ssh`, so that one that is added later works at once.
        trust_host_keys: bool,
    },
    /// Finds out whose volume it is, and lets the owners of the keys log in.
    Volume {
        claim: Claim,
        /// Public keys from the environment.
        extra_keys: String,
        /// Whether the keys mounted at `/root/.ssh` may log in too.
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
        /// The service to which the port belongs.
        service: String,
    },
    /// Ends the processes that a killed keeper left behind.
    Sweep {
        run: String,
        /// If given, ends only the process that listens on this port: the others of the run are somebody's work.
        listens_on: Option<u16>,
    },
}

/// Whether the gateway's user may use docker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DockerUse {
    /// The user may use docker, as a member of its group.
    Allowed,
    None,
    /// As `None`, but by a default that has changed, so an operator whose volume holds containers is told.
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
    /// A JSON object from paths to texts.
    pub workspace: Option<PackedBytes>,
    pub device_seed: Option<PackedBytes>,
    /// The gateway's token. Without one the task keeps a random one on the volume and reports it.
    pub token: Option<PackedBytes>,
}

/// The report of a task to PID 1. A task that sends no report, or a broken one, has failed.
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
        /// Whether another try can help.
        retry: bool,
    },
}

/// Results of a task that other parts of the supervisor need.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// The gateway's random token, if there is no `MASTER_KEY`.
    pub token: Option<PackedBytes>,
    /// The fingerprint of the SSH host key.
    pub host_key: Option<String>,
    /// Remarks for `cvm status`, each with its topic.
    pub remarks: Vec<Remark>,
}
