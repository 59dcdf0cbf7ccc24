//! The way back to PID 1. Nothing here waits for a reader: what the pipe does not take is kept, in
//! its order, until it does.

use cvm_protocol::json_lines;
use cvm_protocol::keeper::KeeperReport;
use cvm_sys::descriptor;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// What is kept for a reader that has stopped reading. Many times what one life of a service says.
const KEPT_MAX: usize = 64 * 1024;

pub(crate) struct Reporter {
    pipe: OwnedFd,
    kept: Vec<u8>,
}

impl Reporter {
    pub(crate) fn new(pipe: OwnedFd) -> nix::Result<Self> {
        descriptor::set_nonblocking(&pipe)?;
        Ok(Self { pipe, kept: Vec::new() })
    }

    pub(crate) fn send(&mut self, report: &KeeperReport) {
        self.flush();
        // The next answer says the same again.
        let repeats = matches!(report, KeeperReport::Liveness { .. }) && !self.kept.is_empty();
        let line = json_lines::line(report);
        if !repeats && self.kept.len() + line.len() <= KEPT_MAX {
            self.kept.extend_from_slice(&line);
            self.flush();
        }
    }

    pub(crate) fn flush(&mut self) {
        while !self.kept.is_empty() {
            match descriptor::write_some(&self.pipe, &self.kept) {
                Ok(n) => drop(self.kept.drain(..n)),
                Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => return,
                // PID 1 is there as long as anything is: this pipe is not one.
                Err(_) => self.kept.clear(),
            }
        }
    }

    /// What to wait for: room for what is kept.
    pub(crate) fn interest(&self) -> Option<BorrowedFd<'_>> {
        (!self.kept.is_empty()).then(|| self.pipe.as_fd())
    }

    #[cfg(test)]
    pub(crate) fn pipe(&self) -> &OwnedFd {
        &self.pipe
    }
}
