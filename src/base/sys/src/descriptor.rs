//! File descriptors: pipes, inherited descriptors, and a standard output that never blocks.

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, open};
use nix::sys::stat::{Mode, SFlag, fstat};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A pipe whose two ends close on exec.
pub fn pipe() -> nix::Result<(OwnedFd, OwnedFd)> {
    nix::unistd::pipe2(OFlag::O_CLOEXEC)
}

/// Gives the calling thread a descriptor table of its own, with only the standard three in it. Descriptors that the
/// thread opens from now on are in that table only, and close when the thread ends.
///
/// Needed by threads that may wait for an answer of their own process, such as a thread of a FUSE server that looks
/// at the server's mount. The descriptors of a killed process close when its last thread has gone. A thread that
/// waits for an answer which only this close can end would hold a shared table open for ever. The thread must not use
/// descriptors of other threads afterwards.
#[allow(unsafe_code)]
pub fn own_table() -> nix::Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_FILES)?;
    // SAFETY: closes descriptors of the table that was just copied for this thread alone; other
    // threads keep theirs, and this one has no owner of any of these numbers.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, 3u32, u32::MAX, 0u32) };
    Errno::result(closed).map(drop)
}

pub fn set_nonblocking<F: AsFd>(fd: F) -> nix::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK)).map(drop)
}

/// A non-blocking descriptor of our own for the file, pipe or terminal of `fd`.
///
/// `O_NONBLOCK` belongs to the open file, which we share with whoever started us and with every
/// child: setting it on the inherited descriptor would change theirs too. Opening the same pipe
/// or terminal anew through /proc gives an open file of our own. Anything else is duplicated: [`write_some`] writes
/// to a socket with `MSG_DONTWAIT`, and all writers of a regular file must share its write position.
#[allow(unsafe_code)]
pub fn own_nonblocking(fd: RawFd) -> nix::Result<OwnedFd> {
    let path = format!("/proc/self/fd/{fd}");
    let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let kind = SFlag::from_bits_truncate(fstat(borrow(fd)?)?.st_mode) & SFlag::S_IFMT;
    let anew = match kind {
        SFlag::S_IFIFO | SFlag::S_IFCHR => open(path.as_str(), flags, Mode::empty()),
        _ => Err(Errno::EOPNOTSUPP),
    };
    anew.or_else(|_| {
        let copy = fcntl(borrow(fd)?, FcntlArg::F_DUPFD_CLOEXEC(3))?;
        // SAFETY: F_DUPFD_CLOEXEC has just returned this descriptor, and nobody else knows it.
        Ok(unsafe { OwnedFd::from_raw_fd(copy) })
    })
}

/// Writes as many bytes as fit without waiting.
pub fn write_some(fd: &OwnedFd, bytes: &[u8]) -> nix::Result<usize> {
    use nix::sys::socket::{MsgFlags, send};
    match send(fd.as_raw_fd(), bytes, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
        Err(Errno::ENOTSOCK) => nix::unistd::write(fd, bytes),
        other => other,
    }
}

/// A borrowed view of a raw descriptor, if it is open.
#[allow(unsafe_code)]
fn borrow(fd: RawFd) -> nix::Result<std::os::fd::BorrowedFd<'static>> {
    if fd < 0 {
        return Err(Errno::EBADF);
    }
    // SAFETY: the descriptor is not -1; the borrow is used for one fcntl call, which reports
    // EBADF if it is not open.
    Ok(unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) })
}

/// Takes over a descriptor that was inherited at exec.
///
/// Sound only if the program calls it once for each number, at its start.
#[allow(unsafe_code)]
pub fn inherited(fd: RawFd) -> nix::Result<OwnedFd> {
    fcntl(borrow(fd)?, FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC))?;
    // SAFETY: the call above has shown that the descriptor is open, and by this function's contract nobody else in
    // this program owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Seek as _, Write as _};

    #[test]
    fn a_file_that_is_shared_is_written_one_after_the_other() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"a").unwrap();
        let own = own_nonblocking(file.as_raw_fd()).unwrap();
        assert_eq!(write_some(&own, b"b"), Ok(1));
        file.write_all(b"c").unwrap();
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "abc");
    }

    #[test]
    fn a_pipe_is_opened_anew_and_its_other_writers_still_wait() {
        let (_reader, writer) = pipe().unwrap();
        let own = own_nonblocking(writer.as_raw_fd()).unwrap();
        let flags = |fd: &OwnedFd| OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL).unwrap());
        assert!(flags(&own).contains(OFlag::O_NONBLOCK) && !flags(&writer).contains(OFlag::O_NONBLOCK));
        while write_some(&own, &[0; 4096]).is_ok() {}
        assert_eq!(write_some(&own, b"x"), Err(Errno::EAGAIN));
    }
}
