//! The boot, as a list that can be printed: each step with what it needs, how long it may
//! take, and what its failure means.
//!
//! Refuses to do any of it: a step is carried out by `cvm-step`, in a process of its own,
//! because everything here may block on a disk.
//! May import: `config`, `backoff`.

use crate::backoff::Backoff;
use crate::config::{Config, Storage};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// The steps of a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StepName {
    /// Host key, authorized keys and configuration of sshd.
    Ssh,
    /// The state is there: today a local volume, with S3 the encrypted bucket.
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
    /// This build cannot do it; the reason is known before trying.
    Refused(String),
}

#[derive(Debug, Clone)]
pub struct Step {
    pub name: StepName,
    /// Steps that must have ended before, however.
    pub after: &'static [StepName],
    /// Steps that must have succeeded before.
    pub needs: &'static [StepName],
    pub deadline: Duration,
    pub weight: Weight,
    pub work: Work,
    /// The line of the boot log that operators look for.
    pub says: Option<&'static str>,
}

/// Waits between tries of a step: soon at first, since most causes are a disk or a mount
/// that is late, and then no rarer than an operator's patience.
pub const STEP_BACKOFF: Backoff = Backoff::seconds(2, 60, 600);

/// The steps of this boot, in the order in which they may begin. SSH is first.
pub fn steps(config: &Config) -> Vec<Step> {
    let mut steps = vec![Step {
        name: StepName::Ssh,
        after: &[],
        needs: &[],
        // Generous: its own work takes milliseconds, but it may look at a dead volume.
        deadline: Duration::from_secs(10),
        weight: Weight::Degradable,
        work: Work::Run,
        says: None,
    }];
    if let Storage::S3(s3) = &config.storage {
        steps.push(Step {
            name: StepName::Storage,
            after: &[StepName::Ssh],
            needs: &[],
            deadline: Duration::from_secs(1),
            weight: Weight::Required,
            work: Work::Refused(format!(
                "S3 storage is configured (bucket: {}), but this build has no storage worker. The gateway is not \
                 started, so that nothing is written where it would be lost; unset S3_BUCKET to run on the local volume",
                s3.bucket.as_str()
            )),
            says: None,
        });
    }
    let needs_storage: &[StepName] = match config.storage {
        Storage::S3(_) => &[StepName::Storage],
        Storage::Local => &[],
    };
    steps.push(Step {
        name: StepName::Home,
        after: &[StepName::Ssh],
        needs: needs_storage,
        // Moving a large real directory onto the volume copies it.
        deadline: Duration::from_mins(5),
        weight: Weight::Required,
        work: Work::Run,
        says: Some("Home symlinks created (~/.openclaw, ~/.config → /data)"),
    });
    steps.push(Step {
        name: StepName::State,
        after: &[],
        needs: &[StepName::Home],
        deadline: Duration::from_mins(1),
        weight: Weight::Required,
        work: Work::Run,
        says: None,
    });
    steps
}
