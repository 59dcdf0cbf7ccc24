//! Signals are blocked from the first instruction, and then delivered into a pipe on which the program's loop waits.
//!
//! The kernel drops a signal to PID 1 that has no handler, unless the signal is blocked, so
//! a SIGTERM that comes before the handlers are installed would be lost. So a program calls [`block_all`] first, then
//! [`Signals::take`].
//!
//! nix's `SignalFd` is not used: it takes signals by name, and the real-time signals, which PID 1 forwards too, have
//! none.

use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use signal_hook::consts::{FORBIDDEN, SIGKILL, SIGSTOP};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Signals that report a fault of the program itself, and are never blocked or forwarded.
const FAULTS: [i32; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP, libc::SIGABRT];

/// Highest signal number of Linux on the architectures we build for.
const SIGNAL_MAX: i32 = 64;

/// Blocks all signals except faults. Every program of ours calls this first.
pub fn block_all() {
    // Fails only for an unknown `how`.
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&all_but_faults()), None);
}

pub(crate) fn all_but_faults() -> SigSet {
    let mut all = SigSet::all();
    for fault in FAULTS {
        if let Ok(signal) = nix::sys::signal::Signal::try_from(fault) {
            all.remove(signal);
        }
    }
    all
}

/// The signals that have arrived: a descriptor to poll, and a list to take.
pub struct Signals {
    pipe: UnixStream,
    pending: Arc<AtomicU64>,
}

impl Signals {
    /// Installs handlers for `wanted` and unblocks all signals. The others keep their default action.
    pub fn take(wanted: &[i32]) -> std::io::Result<Self> {
        let (reader, writer) = UnixStream::pair()?;
        reader.set_nonblocking(true)?;
        writer.set_nonblocking(true)?;
        let writer = Arc::new(writer);
        let pending = Arc::new(AtomicU64::new(0));
        for &signal in wanted {
            install(signal, Arc::clone(&pending), Arc::clone(&writer))?;
        }
        let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
        Ok(Self { pipe: reader, pending })
    }

    /// The signals that have arrived since the last call, each number once.
    pub fn drain(&mut self) -> Vec<i32> {
        let mut scrap = [0u8; 64];
        while matches!(self.pipe.read(&mut scrap), Ok(n) if n > 0) {}
        let set = self.pending.swap(0, Ordering::AcqRel);
        (1..=SIGNAL_MAX).filter(|n| set & (1 << (n - 1)) != 0).collect()
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[allow(unsafe_code)]
fn install(signal: i32, pending: Arc<AtomicU64>, writer: Arc<UnixStream>) -> std::io::Result<()> {
    let act = move || {
        pending.fetch_or(1 << (signal - 1), Ordering::AcqRel);
        // If the pipe is full, the reader wakes up anyway.
        let _ = nix::unistd::write(&*writer, b"!");
    };
    // SAFETY: the action is one atomic operation and one write(2) to a non-blocking
    // descriptor, both async-signal-safe; nothing is allocated or dropped in it.
    unsafe { signal_hook::low_level::register(signal, act) }.map(drop)
}

/// All signals that can be handled, for an init that forwards every signal it gets.
pub fn forwardable() -> Vec<i32> {
    (1..=SIGNAL_MAX)
        .filter(|n| *n != SIGKILL && *n != SIGSTOP)
        .filter(|n| !FORBIDDEN.contains(n) && !FAULTS.contains(n))
        // 32 and 33 belong to the C library's threads.
        .filter(|n| *n != 32 && *n != 33)
        .collect()
}

/// Sends a signal of any number, also a real-time signal, which has no name in `nix`. Returns whether there was a
/// process to send it to.
#[allow(unsafe_code)]
pub fn send(to: nix::unistd::Pid, signal: i32) -> bool {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(to.as_raw(), signal) == 0 }
}
