//! The last net: stops everything in order without the machine, when defects end every turn of the loop.
//!
//! The services end group by group, each with its full time, so that the storage worker still
//! drains. It knows pids and times and nothing else, and does not care how anything ended.

use crate::defect::caught;
use cvm_sys::kernel::Kernel;
use cvm_sys::reap::Reaped;
use nix::unistd::Pid;
use std::time::Duration;

/// From the order to kill a tree to the end of its keeper.
const KILL: Duration = Duration::from_secs(5);
/// For processes that are left when the groups are down: from SIGTERM to SIGKILL, and from there on.
const SWEEP_TERM: Duration = Duration::from_secs(3);
const SWEEP_KILL: Duration = Duration::from_secs(5);

/// Keepers that are stopped together.
pub(crate) struct Group {
    pub(crate) keepers: Vec<Pid>,
    /// From SIGTERM to the end of what they keep.
    pub(crate) grace: Duration,
}

/// `spared` is not waited for at the end. `meanwhile` is called after each wait.
pub(crate) fn stop_all(
    kernel: &mut impl Kernel,
    groups: Vec<Group>,
    spared: Option<Pid>,
    mut meanwhile: impl FnMut(),
) {
    for Group { keepers, grace } in groups {
        for (signal, time) in [(libc::SIGTERM, grace), (libc::SIGQUIT, KILL)] {
            let living: Vec<Pid> =
                kernel.children().into_iter().filter(|pid| keepers.contains(pid)).collect();
            for pid in &living {
                kernel.kill(*pid, signal);
            }
            wait_for(kernel, time, &mut meanwhile, |children| {
                !living.iter().any(|pid| children.contains(pid))
            });
        }
    }
    let is_empty = |children: &[Pid]| children.iter().all(|pid| Some(*pid) == spared);
    for (signal, time) in [(libc::SIGTERM, SWEEP_TERM), (libc::SIGKILL, SWEEP_KILL)] {
        if !is_empty(&kernel.children()) {
            kernel.kill(Pid::from_raw(-1), signal);
            wait_for(kernel, time, &mut meanwhile, is_empty);
        }
    }
}

/// Reaps until `done` says so of the children that are left, or the time is over.
fn wait_for(
    kernel: &mut impl Kernel,
    time: Duration,
    meanwhile: &mut impl FnMut(),
    done: impl Fn(&[Pid]) -> bool,
) {
    let until = kernel.now() + time;
    loop {
        while let Reaped::One(..) = kernel.reap() {}
        if done(&kernel.children()) || kernel.now() >= until {
            return;
        }
        kernel.wait(Vec::new(), Some(until));
        // A signal that is still there would end the next wait at once.
        let _ = caught(|| kernel.signals());
        meanwhile();
    }
}
