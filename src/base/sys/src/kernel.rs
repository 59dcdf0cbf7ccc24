//! The calls that the loops of PID 1, of a keeper and of plain mode make to the kernel, as a trait, so that a unit
//! test can put `fake` in the kernel's place.
//!
//! Reading and writing descriptors is not part of it, because a test can make a real pipe.

use crate::clock::BootTime;
use crate::process_tree;
use crate::reap::{self, Reaped};
use crate::signals::{self, Signals};
use crate::spawn::{self, Program, Stage};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

pub trait Kernel {
    fn now(&self) -> BootTime;

    /// Returns when one of `fds` is ready, when a signal has arrived, at `until`, or earlier.
    fn wait(&mut self, fds: Vec<PollFd<'_>>, until: Option<BootTime>);

    /// Signals that have arrived since the last call, each number once.
    fn signals(&mut self) -> Vec<i32>;

    /// Reaps one child, without waiting.
    fn reap(&mut self) -> Reaped;

    /// See [`spawn::spawn`].
    fn spawn(
        &mut self,
        program: &Program<'_>,
        on_failure: impl FnOnce(Stage, Errno, Option<BorrowedFd<'_>>) -> u8,
    ) -> nix::Result<Pid>;

    /// Sends a signal; a process that has gone is no failure. `-1` is every process except this one.
    fn kill(&mut self, pid: Pid, signal: i32);

    /// The children of this process, zombies included.
    fn children(&self) -> Vec<Pid>;

    fn signal_descendants(&mut self, signal: i32);

    /// Ends every process below this one, and returns how many there were.
    fn kill_descendants(&mut self) -> u32;
}

/// The real kernel.
pub struct Linux(Signals);

impl Linux {
    /// Installs handlers for `wanted`: see [`Signals::take`].
    pub fn taking(wanted: &[i32]) -> std::io::Result<Self> {
        Signals::take(wanted).map(Self)
    }
}

impl Kernel for Linux {
    fn now(&self) -> BootTime {
        BootTime::now()
    }

    fn wait(&mut self, fds: Vec<PollFd<'_>>, until: Option<BootTime>) {
        let mut all = fds;
        all.push(readable(self.0.as_fd()));
        let timeout = until.map_or(PollTimeout::NONE, |until| {
            let left = until.saturating_duration_since(BootTime::now());
            // Rounded up: if a wait ended before the deadline, the loop would find nothing to do and spin.
            let wait = if left.is_zero() { left } else { left + Duration::from_millis(1) };
            PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
        });
        // The caller expects that a wait may end early, so an error needs no handling.
        let _ = poll(&mut all, timeout);
    }

    fn signals(&mut self) -> Vec<i32> {
        self.0.drain()
    }

    fn reap(&mut self) -> Reaped {
        reap::next()
    }

    fn spawn(
        &mut self,
        program: &Program<'_>,
        on_failure: impl FnOnce(Stage, Errno, Option<BorrowedFd<'_>>) -> u8,
    ) -> nix::Result<Pid> {
        spawn::spawn(program, on_failure)
    }

    fn kill(&mut self, pid: Pid, signal: i32) {
        signals::send(pid, signal);
    }

    fn children(&self) -> Vec<Pid> {
        process_tree::children()
    }

    fn signal_descendants(&mut self, signal: i32) {
        process_tree::signal_descendants(signal);
    }

    fn kill_descendants(&mut self) -> u32 {
        process_tree::kill_descendants()
    }
}

/// For `wait`: ready when `fd` can be read.
pub fn readable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLIN)
}

/// For `wait`: ready when `fd` can be written.
pub fn writable(fd: BorrowedFd<'_>) -> PollFd<'_> {
    PollFd::new(fd, PollFlags::POLLOUT)
}
