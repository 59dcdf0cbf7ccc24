//! The way back to PID 1. A report that cannot be delivered is dropped: PID 1 is there as long
//! as anything is, and a keeper must not hang on it.

use cvm_blueprint::wire::{self, KeeperReport};
use std::os::fd::OwnedFd;

pub(crate) struct Reporter(OwnedFd);

impl Reporter {
    pub(crate) fn new(pipe: OwnedFd) -> Self {
        Self(pipe)
    }

    pub(crate) fn send(&self, report: &KeeperReport) {
        let _ = nix::unistd::write(&self.0, &wire::line(report));
    }

    pub(crate) fn pipe(&self) -> &OwnedFd {
        &self.0
    }
}
