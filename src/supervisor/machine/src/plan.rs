//! The boot, as a list that can be printed: each step with what it needs, how long it may
//! take, and what its failure means.

use crate::backoff::Backoff;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The steps of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepName {
    /// Host key and configuration of sshd.
    Ssh,
    /// The volume belongs to the key of this environment, and so the environment's keys open a shell.
    Volume,
    /// The tree at /data is the bucket's. Only with S3.
    Storage,
    /// The gateway's user, its home and root's home lead to the volume.
    Home,
    /// Configuration, workspace files and device identity of the gateway.
    State,
}

impl StepName {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ssh => "ssh",
            Self::Volume => "volume",
            Self::Storage => "storage",
            Self::Home => "home",
            Self::State => "state",
        }
    }
}

/// What the failure of a step means for the boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Weight {
    /// What needs it waits, status says why, and the step is tried again.
    Required,
    /// A warning; only what needs it directly goes without.
    Degradable,
}

/// How a step comes to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// By a process.
    Run,
    /// By a service that runs on: it is done when the service says so, and undone when the
    /// service takes that back.
    Awaited {
        from: &'static str,
        /// Said when the waiting begins.
        says: String,
    },
}

#[derive(Debug, Clone)]
pub struct Step {
    pub name: StepName,
    /// Steps that must have ended before, however.
    pub after: &'static [StepName],
    /// Steps that must have succeeded before.
    pub needs: &'static [StepName],
    /// None: as long as it takes.
    pub deadline: Option<Duration>,
    pub weight: Weight,
    pub work: Work,
    /// The line of the boot log that operators look for.
    pub says: Option<&'static str>,
}

/// Waits between tries of a step: soon at first, since most causes are a disk or a mount
/// that is late, and then no rarer than an operator's patience.
pub const STEP_BACKOFF: Backoff = Backoff::seconds(2, 60, 600);
