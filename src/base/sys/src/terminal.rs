//! Pseudo-terminals, for a program that must not get the operator's terminal.

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

/// The two ends of a pseudo-terminal. Bytes written to `master` are typed at `slave`; output of `slave` is read at
/// `master`.
pub struct Pair {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

impl Pair {
    /// Opens one with the size and settings of `model`. Both ends close on exec, and `master` never blocks.
    pub fn like(model: BorrowedFd<'_>) -> nix::Result<Self> {
        let settings = tcgetattr(model)?;
        let OpenptyResult { master, slave } = openpty(size(model).as_ref(), &settings)?;
        for end in [&master, &slave] {
            nix::fcntl::fcntl(end, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
        }
        crate::descriptor::set_nonblocking(&master)?;
        Ok(Self { master, slave })
    }
}

/// Gives `terminal` the size of `model`. The kernel tells its foreground processes by SIGWINCH.
pub fn resize(terminal: impl AsFd, model: BorrowedFd<'_>) {
    if let Some(size) = size(model) {
        set_size(terminal, &size);
    }
}

#[allow(unsafe_code)]
fn size(terminal: BorrowedFd<'_>) -> Option<Winsize> {
    let mut size = Winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel fills in one structure of this frame.
    let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (done == 0).then_some(size)
}

#[allow(unsafe_code)]
fn set_size(terminal: impl AsFd, size: &Winsize) {
    // SAFETY: the kernel reads one structure that lives as long as the call. On a descriptor that is no
    // terminal the call fails.
    unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, std::ptr::from_ref(size)) };
}

/// A terminal in raw mode, which delivers every key as it is pressed, until this value is dropped.
pub struct Raw<'t> {
    terminal: BorrowedFd<'t>,
    before: Termios,
}

impl<'t> Raw<'t> {
    pub fn make(terminal: BorrowedFd<'t>) -> nix::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(terminal, SetArg::TCSANOW, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl Drop for Raw<'_> {
    fn drop(&mut self) {
        // Fails only if the terminal has gone.
        let _ = tcsetattr(self.terminal, SetArg::TCSANOW, &self.before);
    }
}
