//! S3 mode, end to end: the real worker, a real S3 server behind a network that fails on demand,
//! and machines that are lost.

use cvm_harness::{Cloud, difference, digest, flush, independent};

#[test]
fn what_is_written_survives_the_loss_of_the_machine() {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().start();
    machine.service_in("gateway", &["ready"]);
    machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace/a/b && echo words > /data/openclaw/workspace/a/b/file && chmod 640 /data/openclaw/workspace/a/b/file && ln -s b /data/openclaw/workspace/a/link && ln /data/openclaw/workspace/a/b/file /data/openclaw/workspace/second && mkdir -m 711 /data/openclaw/workspace/empty"]);
    flush(&machine);
    let before = digest(&machine.path("/data"), &[".cvm", "lost+found"]);
    machine.destroy();
    drop(machine);
    let machine = cloud.machine().environment("S3_HEARTBEAT", "1").start();
    machine.service_in("gateway", &["ready"]);
    independent(&machine);
    let after = digest(&machine.path("/data"), &[".cvm", "lost+found"]);
    assert_eq!(difference(&before, &after), "");
}
