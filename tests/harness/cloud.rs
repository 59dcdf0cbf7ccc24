//! One bucket, the network in which machines find it, and what is asked of machines in S3 mode.

use crate::machine::{HEALTHY, MASTER_KEY, PATIENCE};
use crate::wait::until;
use crate::{Builder, Garage, Machine, Network, Proxy};
use serde_json::Value;
use std::process::Output;

/// A store behind a network that fails on demand. It outlives its machines.
pub struct Cloud {
    pub garage: Garage,
    pub network: Network,
    pub proxy: Proxy,
}

impl Default for Cloud {
    fn default() -> Self {
        Self::new()
    }
}

impl Cloud {
    pub fn new() -> Self {
        let garage = Garage::start();
        let network = Network::new();
        let proxy = Proxy::start_in(&network, garage.address());
        Self { garage, network, proxy }
    }

    /// A new machine on this bucket, with a healthy gateway.
    #[must_use]
    pub fn machine(&self) -> Builder {
        Builder::product().fake_gateway(HEALTHY).s3(&self.network, &self.proxy.endpoint(), &self.garage)
    }
}

/// How the worker keeps the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Fuse,
    Sync,
}

impl Mode {
    /// A machine that can only have this mode.
    #[must_use]
    pub fn of(self, builder: Builder) -> Builder {
        match self {
            Self::Fuse => builder,
            Self::Sync => builder.without_fuse(),
        }
    }

    /// One on this bucket, with a gateway that is ready.
    #[track_caller]
    pub fn start(self, cloud: &Cloud) -> Machine {
        self.of(cloud.machine()).ready()
    }
}

/// What `cvm storage status` says; null when it says nothing.
pub fn storage(machine: &Machine) -> Value {
    let output = machine.exec(&["cvm", "storage", "status", "--json"]);
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// Everything is in the bucket when this returns.
#[track_caller]
pub fn flush(machine: &Machine) {
    machine.ok(&["cvm", "storage", "flush"]);
}

/// Nothing is left that only the bucket has.
#[track_caller]
pub fn independent(machine: &Machine) {
    until("nothing depends on the bucket any more", PATIENCE, || {
        (storage(machine)["independent"] == true).then_some(())
    });
}

/// `cvm storage restore`, by what may come before it.
pub fn restore_by_hand(cloud: &Cloud, machine: &Machine, before: &[&str], to: &str) -> Output {
    let mut command = machine.command(&[before, &["cvm", "storage", "restore", "--to", to]].concat());
    command.env("MASTER_KEY", MASTER_KEY).env("S3_BUCKET", cloud.garage.bucket());
    command.env("S3_ENDPOINT", cloud.proxy.endpoint()).env("S3_REGION", cloud.garage.region());
    command.env("AWS_ACCESS_KEY_ID", cloud.garage.access_key());
    command.env("AWS_SECRET_ACCESS_KEY", cloud.garage.secret_key()).output().expect("nsenter runs")
}
