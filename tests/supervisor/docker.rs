//! dockerd as a service.

use crate::fixtures::{Backoff, assert_no_zombies, kill_again_and_again, product};
use cvm_harness::machine::HEALTHY;
use cvm_harness::rounds;

#[test]
fn dockerd_comes_up_and_nothing_waited_for_it() {
    let machine = product(HEALTHY).environment("ENABLE_DOCKER", "1").ready();
    machine.line("Docker daemon ready.");
    let dockerd = machine.service_in("dockerd", &["ready"]);
    let gateway = machine.service("gateway");
    assert!(
        gateway["first_exec_ms"].as_u64() < dockerd["first_ready_ms"].as_u64(),
        "{gateway:#} {dockerd:#}"
    );
}

#[test]
fn dockerd_comes_back_from_kill_9_again_and_again() {
    let machine = product(HEALTHY).environment("ENABLE_DOCKER", "1").start();
    kill_again_and_again(&machine, "dockerd", rounds(10, 100), Backoff::IsSkipped);
    assert_no_zombies(&machine);
    assert!(machine.pid_of("gateway") > 0);
}
