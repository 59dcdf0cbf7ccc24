//! S3 mode, end to end: the real worker, a real S3 server behind a network that fails on demand,
//! and machines that are lost.

use cvm_harness::machine::PATIENCE;
use cvm_harness::{Builder, Garage, Machine, Network, Proxy, difference, digest, until};
use std::time::Duration;

const HEALTHY: &str = "#!/bin/sh\nexec cvm-victim http 18789\n";

/// One bucket, and the network in which machines find it.
struct Cloud {
    garage: Garage,
    network: Network,
    proxy: Proxy,
}

impl Cloud {
    fn new() -> Self {
        let garage = Garage::start();
        let network = Network::new();
        let proxy = Proxy::start_in(&network, garage.address());
        Self { garage, network, proxy }
    }

    fn machine(&self) -> Builder {
        Builder::product().fake_gateway(HEALTHY).s3(&self.network, &self.proxy.endpoint(), &self.garage)
    }
}

fn storage(machine: &Machine) -> serde_json::Value {
    let output = machine.exec(&["cvm", "storage", "status", "--json"]);
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

fn flush(machine: &Machine) {
    machine.ok(&["cvm", "storage", "flush"]);
}

#[test]
fn what_is_written_survives_the_loss_of_the_machine() {
    let cloud = Cloud::new();
    let machine = cloud.machine().start();
    machine.service_in("gateway", &["ready"]);
    machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace/a/b && echo words > /data/openclaw/workspace/a/b/file && chmod 640 /data/openclaw/workspace/a/b/file && ln -s b /data/openclaw/workspace/a/link && ln /data/openclaw/workspace/a/b/file /data/openclaw/workspace/second && mkdir -m 711 /data/openclaw/workspace/empty"]);
    flush(&machine);
    eprintln!("{}", machine.ok(&["cvm", "storage", "status"]));
    let before = digest(&machine.path("/data"), &[".cvm", "lost+found"]);
    let mut machine = machine;
    machine.destroy();
    drop(machine);
    let machine = cloud.machine().environment("S3_HEARTBEAT", "1").start();
    machine.service_in("gateway", &["ready"]);
    eprintln!("{}\n{}", machine.output(), machine.ok(&["cvm", "storage", "status"]));
    until("all is hydrated", PATIENCE, || (storage(&machine)["independent"] == true).then_some(()));
    let after = digest(&machine.path("/data"), &[".cvm", "lost+found"]);
    assert_eq!(difference(&before, &after), "");
    let _ = Duration::ZERO;
}
