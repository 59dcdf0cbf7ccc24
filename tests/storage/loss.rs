//! What is written survives the loss of the machine, and a machine that is killed is gone.

use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, difference, digest, flush, independent, storage, until};
use nix::sys::signal::Signal;
use std::time::Duration;

#[test]
fn what_is_written_survives_the_loss_of_the_machine() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace/a/b && echo words > /data/openclaw/workspace/a/b/file && chmod 640 /data/openclaw/workspace/a/b/file && ln -s b /data/openclaw/workspace/a/link && ln /data/openclaw/workspace/a/b/file /data/openclaw/workspace/second && mkdir -m 711 /data/openclaw/workspace/empty"]);
    flush(&machine);
    let before = digest(&machine.path("/data"), &[".cvm", "lost+found"]);
    machine.destroy();
    drop(machine);
    let machine = cloud.machine().ready();
    independent(&machine);
    let after = digest(&machine.path("/data"), &[".cvm", "lost+found"]);
    assert_eq!(difference(&before, &after), "");
}

/// Threads that wait for the mount of their own process must not keep it from dying: nobody could
/// end such a container any more.
#[test]
fn a_machine_that_is_killed_while_files_are_fetched_is_gone() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    machine.ok(&[
        "sh",
        "-c",
        "cd /data/openclaw && mkdir many && for n in $(seq 300); do echo $n > many/$n; done",
    ]);
    flush(&machine);
    assert_eq!(machine.stop(), 0);
    drop(machine);
    cloud.proxy.latency(Duration::from_millis(200));
    let mut machine = cloud.machine().start();
    until("files are being fetched", PATIENCE, || {
        let done = storage(&machine)["progress"]["files_done"].as_u64()?;
        (done > 0).then_some(())
    });
    machine.signal(Signal::SIGKILL);
    until("nothing is left of it", PATIENCE, || (!machine.is_running()).then_some(()));
}
