//! The descriptor of the FUSE device, and what is done with it while its server lives and afterwards.

use crate::fuse_replies;
use crate::kernel_dcache::{Names, Trees};
use cvm_sys::descriptor;
use nix::errno::Errno;
use nix::sys::stat::{SFlag, fstat, major, minor};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// The kernel refuses to fill a buffer that may not hold the largest write. Only the pages that
/// a request has touched are ever taken.
const REQUEST_MAX: usize = 1024 * 1024 + 4096;

/// Requests answered before the socket is looked at again.
const AT_ONCE: usize = 256;

/// The device of one mount.
pub(crate) enum FuseDevice {
    None,
    /// Its server lives. `hydrated`: everything is copied up, so this program answers when the server dies.
    WithServer {
        device: OwnedFd,
        trees: Option<Trees>,
        hydrated: bool,
    },
    /// Its server is dead and this program answers. Without names every request is refused, until the server's own
    /// descriptor is closed as well.
    Answered {
        device: OwnedFd,
        names: Option<Names>,
        buffer: Vec<u8>,
    },
}

impl FuseDevice {
    /// Takes over what came with an `F`: the device, or the device, the mount and the upper layer.
    pub(crate) fn keep(&mut self, passed: Vec<OwnedFd>) -> bool {
        let mut passed = passed.into_iter();
        let (device, trees) = match (passed.next(), passed.next(), passed.next(), passed.next()) {
            (Some(device), None, None, None) => (device, None),
            (Some(device), Some(mount), Some(upper), None) => (device, Some(Trees { mount, upper })),
            _ => return false,
        };
        if !is_fuse_device(&device) {
            return false;
        }
        *self = Self::WithServer { device, trees, hydrated: false };
        true
    }

    /// Everything is copied up. False when there is no device.
    pub(crate) fn hydrated(&mut self) -> bool {
        if let Self::WithServer { hydrated, .. } = self {
            *hydrated = true;
        }
        !matches!(self, Self::None)
    }

    pub(crate) fn state(&self) -> u8 {
        match self {
            Self::None | Self::Answered { names: None, .. } => b'n',
            Self::WithServer { .. } => b'h',
            Self::Answered { .. } => b's',
        }
    }

    pub(crate) fn has_server(&self) -> bool {
        matches!(self, Self::WithServer { .. })
    }

    /// The device, while this program answers its requests.
    pub(crate) fn answered(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Answered { device, .. } => Some(device.as_fd()),
            _ => None,
        }
    }

    /// The server is gone, with all its descriptors.
    pub(crate) fn take_over(&mut self) {
        *self = match std::mem::replace(self, Self::None) {
            Self::WithServer { device, trees, hydrated: true } => begin(device, Some(names_of(trees))),
            // Closed: nobody else has it open, so the kernel fails every request at once.
            Self::WithServer { .. } | Self::Answered { names: None, .. } => {
                eprintln!(
                    "cvm-standin: the server ended before everything was copied: nothing to answer with"
                );
                Self::None
            }
            other => other,
        };
    }

    /// The server was killed and waits for its own answer: whatever it is answered, it ends then.
    pub(crate) fn answer_while_dying(&mut self) {
        *self = match std::mem::replace(self, Self::None) {
            Self::WithServer { device, trees, hydrated } => begin(device, hydrated.then(|| names_of(trees))),
            other => other,
        };
    }

    /// Answers the requests that are waiting, without waiting for more.
    pub(crate) fn serve(&mut self) {
        let Self::Answered { device, names, buffer } = self else { return };
        for _ in 0..AT_ONCE {
            match nix::unistd::read(&*device, buffer) {
                Ok(length) => {
                    let request = buffer.get(..length).unwrap_or_default();
                    if let Some(answer) = fuse_replies::to(request, names.as_ref()) {
                        // The process that asked may have gone since.
                        let _ = nix::unistd::write(&*device, &answer);
                    }
                }
                Err(Errno::EAGAIN) => return,
                // ENOENT: the process that asked was interrupted just now.
                Err(Errno::EINTR | Errno::ENOENT) => {}
                Err(errno) => {
                    eprintln!("cvm-standin: the mount has ended ({errno})");
                    *self = Self::None;
                    return;
                }
            }
        }
    }
}

fn names_of(trees: Option<Trees>) -> Names {
    let names = trees.map_or_else(Names::default, |trees| Names::gather(&trees));
    let (known, made_up) = names.count();
    eprintln!(
        "cvm-standin: answering for a dead server: {known} names the kernel knew, {made_up} it did not"
    );
    names
}

fn begin(device: OwnedFd, names: Option<Names>) -> FuseDevice {
    // Only now: the server shares this open file, and may not expect it to be non-blocking.
    if let Err(errno) = descriptor::set_nonblocking(&device) {
        eprintln!("cvm-standin: the device stays blocking ({errno}): it is closed instead");
        return FuseDevice::None;
    }
    // Asks for the requests that the dead server has read and not answered. An older kernel refuses, and then such
    // a request waits until the mount is aborted.
    if let Err(errno) = nix::unistd::write(&device, &fuse_replies::resend()) {
        eprintln!("cvm-standin: requests already read by the server are lost ({errno})");
    }
    FuseDevice::Answered { device, names, buffer: vec![0; REQUEST_MAX] }
}

/// Character device 10:229, by whatever name.
fn is_fuse_device(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFCHR
            && (major(stat.st_rdev), minor(stat.st_rdev)) == (10, 229)
    })
}
