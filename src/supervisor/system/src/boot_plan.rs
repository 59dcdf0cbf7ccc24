//! The steps of a boot, by what the configuration asks for.
//!
//! A step is carried out by `cvm-task`, in a process of its own, because everything here may block on a disk.

use crate::config::{Config, Storage};
use cvm_machine::plan::{Step, StepName, Weight, Work};
use cvm_protocol::storage::STORAGE_WORKER;
use std::time::Duration;

/// The steps of this boot, in the order in which they may begin. SSH is first.
pub fn steps(config: &Config) -> Vec<Step> {
    // Generous: their own work takes milliseconds, but they may look at a dead volume.
    let deadline = Some(Duration::from_secs(10));
    let first =
        |name, weight| Step { name, after: &[], needs: &[], deadline, weight, work: Work::Run, says: None };
    let mut steps = vec![first(StepName::Ssh, Weight::Degradable), first(StepName::Volume, Weight::Required)];
    if let Storage::S3(s3) = &config.storage {
        steps.push(Step {
            name: StepName::Storage,
            after: &[StepName::Ssh],
            needs: &[StepName::Volume],
            // A restore takes as long as the state is large, and a bucket may be away for days.
            deadline: None,
            weight: Weight::Required,
            work: Work::Awaited {
                from: STORAGE_WORKER,
                says: format!("S3 storage configured (bucket: {}), setting up rclone...", s3.bucket.as_str()),
            },
            says: None,
        });
    }
    let needs_storage: &[StepName] = match config.storage {
        Storage::S3(_) => &[StepName::Storage],
        Storage::Local => &[StepName::Volume],
    };
    steps.push(Step {
        name: StepName::Home,
        after: &[StepName::Ssh],
        needs: needs_storage,
        // Moving a large real directory onto the volume copies it.
        deadline: Some(Duration::from_mins(5)),
        weight: Weight::Required,
        work: Work::Run,
        says: Some("Home symlinks created (~/.openclaw, ~/.config → /data)"),
    });
    steps.push(Step {
        name: StepName::State,
        after: &[],
        needs: &[StepName::Home],
        deadline: Some(Duration::from_mins(1)),
        weight: Weight::Required,
        work: Work::Run,
        says: None,
    });
    steps
}
