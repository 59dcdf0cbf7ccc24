//! The boot steps that are tasks. `cvm-task` does each in a process of its own, because it may block on a disk.

use crate::gates;
use cvm_machine::gate::GateName;
use cvm_machine::plan::{Step, Weight, Work};
use std::time::Duration;

/// Long for work of milliseconds, which may meet a dead volume.
const DEADLINE: Duration = Duration::from_secs(10);

fn task(name: GateName, needs: &'static [GateName], weight: Weight) -> Step {
    Step {
        name,
        after: &[],
        needs,
        before_services: false,
        deadline: Some(DEADLINE),
        weight,
        work: Work::Task,
        says: None,
    }
}

/// SSH comes up before anything that can fail, so every service waits until this step has ended.
pub(crate) fn ssh() -> Step {
    Step { before_services: true, ..task(gates::SSH, &[], Weight::Degradable) }
}

/// Runs before sshd, because its result decides whose keys may open a shell.
pub(crate) fn volume() -> Step {
    Step { before_services: true, ..task(gates::VOLUME, &[], Weight::Required) }
}

/// `needs` are the gates that are open once /data holds the state.
pub(crate) fn home(needs: &'static [GateName]) -> Step {
    Step {
        after: &[gates::SSH],
        // Moving a large real directory onto the volume copies it.
        deadline: Some(Duration::from_mins(5)),
        says: Some("Home symlinks created (~/.openclaw, ~/.config → /data)"),
        ..task(gates::HOME, needs, Weight::Required)
    }
}

pub(crate) fn state() -> Step {
    Step { deadline: Some(Duration::from_mins(1)), ..task(gates::STATE, &[gates::HOME], Weight::Required) }
}
