//! A terminal of one's own for a program that must not have ours.

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};

/// What is written to `master` is typed at `slave`, and what is written to `slave` is read at `master`.
pub struct Pair {
    pub master: OwnedFd,
    pub slave: OwnedFd,
}

impl Pair {
    /// As large as `model`, and with its settings. Both ends are close-on-exec, and `master` never blocks.
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

/// Gives one terminal the size of another, whose foreground hears of it.
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
    // SAFETY: the kernel reads one structure that lives as long as the call. What is no terminal stays as it is.
    unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, std::ptr::from_ref(size)) };
}

/// A terminal that hands on every key as it is pressed, until this is dropped.
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
        // A terminal that has gone has no settings.
        let _ = tcsetattr(self.terminal, SetArg::TCSANOW, &self.before);
    }
}
