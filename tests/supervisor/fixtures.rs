//! Machines of this wing, and what is done to their services.

use cvm_harness::machine::{MASTER_KEY, PATIENCE};
use cvm_harness::{Builder, Machine, until};
use nix::sys::signal::Signal;

pub(crate) fn product(gateway: &str) -> Builder {
    Builder::product()
        .fake_gateway(gateway)
        .environment("MASTER_KEY", MASTER_KEY)
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
}

#[track_caller]
pub(crate) fn assert_no_zombies(machine: &Machine) {
    until("no zombie is left", PATIENCE, || machine.processes().iter().all(|p| p.state != 'Z').then_some(()));
}

/// Whether a service comes back by itself, or an operator saves the wait.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backoff {
    Waits,
    IsSkipped,
}

#[track_caller]
pub(crate) fn kill_again_and_again(machine: &Machine, service: &str, rounds: usize, backoff: Backoff) {
    for round in 0..rounds {
        let pid = machine.pid_of(service);
        machine.kill(pid, "KILL");
        until(&format!("a new {service} in round {round}"), PATIENCE, || {
            let now = machine.service(service);
            if backoff == Backoff::IsSkipped && now["state"] == "waiting" {
                machine.exec(&["cvm", "start", service, "--no-wait"]);
            }
            now["pid"].as_i64().is_some_and(|new| new != pid).then_some(())
        });
    }
}

/// Waits until a process has SIGTERM in one of its signal masks: blocks, catches or ignores it.
#[track_caller]
pub(crate) fn until_sigterm_is_in(masks: &[&str], machine: &Machine, pid: i64) {
    until(&format!("{pid} has SIGTERM in {masks:?}"), PATIENCE, || {
        let status = machine.read(&format!("/proc/{pid}/status"));
        status
            .lines()
            .filter_map(|line| line.split_once(":\t"))
            .filter(|(name, _)| masks.contains(name))
            .filter_map(|(_, bits)| u64::from_str_radix(bits, 16).ok())
            .any(|bits| bits & (1 << (Signal::SIGTERM as u32 - 1)) != 0)
            .then_some(())
    });
}
