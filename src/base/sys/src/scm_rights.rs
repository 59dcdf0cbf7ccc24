//! Receives descriptors over a Unix socket.

use nix::cmsg_space;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

/// The kernel passes at most this many at once. With less room it would install some of them and not say which.
const PASSED_MAX: usize = 253;

/// The next byte and the descriptors that were sent with it; `None` at end of file. Never waits: `EAGAIN` instead.
///
/// It reads one byte at a time, so that it is known which byte a descriptor was sent with.
#[allow(unsafe_code)]
pub fn next_byte<F: AsFd>(socket: F) -> nix::Result<Option<(u8, Vec<OwnedFd>)>> {
    let mut byte = [0u8];
    let mut room = cmsg_space!([RawFd; PASSED_MAX]);
    let mut vectors = [IoSliceMut::new(&mut byte)];
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(socket.as_fd().as_raw_fd(), &mut vectors, Some(&mut room), flags)?;
    let mut passed = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = part {
            // SAFETY: the kernel has just installed these descriptors for this message, and
            // nobody else knows their numbers.
            passed.extend(numbers.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    let count = message.bytes;
    Ok((count > 0).then_some((byte[0], passed)))
}
