//! Sends reports to PID 1 without waiting for it: reports for which the pipe has no room are kept in order, and sent
//! when it has room.

use cvm_protocol::json_lines;
use cvm_protocol::keeper::KeeperReport;
use cvm_sys::descriptor;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The most bytes kept while PID 1 does not read: many times what one run of a service reports.
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
        // An answer of the liveness probe that finds no room is dropped: the next one says the same.
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
                // PID 1 holds its end of the pipe for ever, so this is no pipe of PID 1's.
                Err(_) => self.kept.clear(),
            }
        }
    }

    /// The pipe, if kept reports wait for room in it.
    pub(crate) fn interest(&self) -> Option<BorrowedFd<'_>> {
        (!self.kept.is_empty()).then(|| self.pipe.as_fd())
    }

    #[cfg(test)]
    pub(crate) fn pipe(&self) -> &OwnedFd {
        &self.pipe
    }
}
