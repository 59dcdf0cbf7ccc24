//! A stop in order: budgets, signals, and who is told first.

use crate::fixtures::{product, until_sigterm_is_in};
use cvm_harness::machine::PATIENCE;
use cvm_harness::until;
use nix::sys::signal::Signal;

#[test]
fn sigterm_ends_a_backoff_wait_at_once() {
    let mut machine = product("#!/bin/sh\nexit 3\n")
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "3600")
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "3600")
        .start();
    machine.service_in("gateway", &["waiting"]);
    assert_eq!(machine.stop(), 0);
}

#[test]
fn a_gateway_that_ignores_sigterm_is_killed_at_the_end_of_its_budget_and_the_stop_is_clean() {
    let script = "#!/bin/sh\nexec cvm-victim stubborn\n";
    let mut machine = product(script).environment("OPENCLAW_GATEWAY_STOP_TIMEOUT", "1").start();
    machine.service_in("gateway", &["up"]);
    until_sigterm_is_in(&["SigIgn"], &machine, machine.pid_of("gateway"));
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    machine.line("did not end within its grace period");
}

#[test]
fn a_second_sigterm_does_not_wait_any_longer() {
    let script = "#!/bin/sh\nexec cvm-victim stubborn\n";
    let mut machine = product(script).environment("OPENCLAW_GATEWAY_STOP_TIMEOUT", "3600").start();
    machine.service_in("gateway", &["up"]);
    until_sigterm_is_in(&["SigIgn"], &machine, machine.pid_of("gateway"));
    machine.signal(Signal::SIGTERM);
    machine.line("Stopping");
    machine.signal(Signal::SIGTERM);
    machine.line("Second stop signal");
    assert_eq!(machine.wait(), 0, "{}", machine.output());
}

#[test]
fn the_gateway_is_stopped_alone_before_its_children() {
    let script = "#!/bin/sh\n\
        (trap 'echo child was told > /data/openclaw/told' TERM; while :; do sleep 0.05; done) &\n\
        trap 'sleep 0.3; [ -e /data/openclaw/told ] || echo alone > /data/openclaw/alone; exit 0' TERM\n\
        touch /data/openclaw/up; while :; do sleep 0.05; done\n";
    let mut machine = product(script).start();
    until("the gateway's trap stands", PATIENCE, || machine.path("/data/openclaw/up").exists().then_some(()));
    // The script may run before PID 1 has heard that it executes, and what only starts gets no grace.
    machine.service_in("gateway", &["up", "ready"]);
    let data = machine.data();
    assert_eq!(machine.stop(), 0);
    assert!(data.join("openclaw/alone").exists());
}
