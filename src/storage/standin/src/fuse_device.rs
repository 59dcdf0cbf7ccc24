//! The one descriptor that is held, and what is done with it.

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

/// What there is to answer for.
pub(crate) enum Held {
    Nothing,
    /// Its server lives. `hydrated`: when it dies, answer.
    Kept {
        device: OwnedFd,
        trees: Option<Trees>,
        hydrated: bool,
    },
    /// Its server is dead. Without names there is nothing to answer with, and all is refused until
    /// the server's own descriptor is closed as well.
    Served {
        device: OwnedFd,
        names: Option<Names>,
        buffer: Vec<u8>,
    },
}

impl Held {
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
        *self = Self::Kept { device, trees, hydrated: false };
        true
    }

    /// Whether there is anything that this could be said of.
    pub(crate) fn hydrated(&mut self) -> bool {
        if let Self::Kept { hydrated, .. } = self {
            *hydrated = true;
        }
        !matches!(self, Self::Nothing)
    }

    pub(crate) fn word(&self) -> u8 {
        match self {
            Self::Nothing | Self::Served { names: None, .. } => b'n',
            Self::Kept { .. } => b'h',
            Self::Served { .. } => b's',
        }
    }

    pub(crate) fn is_kept(&self) -> bool {
        matches!(self, Self::Kept { .. })
    }

    /// The device, while it is ours to read.
    pub(crate) fn served(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Served { device, .. } => Some(device.as_fd()),
            _ => None,
        }
    }

    /// The server is gone, with all its descriptors.
    pub(crate) fn take_over(&mut self) {
        *self = match std::mem::replace(self, Self::Nothing) {
            Self::Kept { device, trees, hydrated: true } => begin(device, Some(names_of(trees))),
            // Closed: nobody else has it open, so the kernel fails every request at once.
            Self::Kept { .. } | Self::Served { names: None, .. } => {
                eprintln!(
                    "cvm-standin: the server ended before everything was copied: nothing to answer with"
                );
                Self::Nothing
            }
            other => other,
        };
    }

    /// The server is dead, but waits for itself: whatever it is answered, it ends then.
    pub(crate) fn set_free(&mut self) {
        *self = match std::mem::replace(self, Self::Nothing) {
            Self::Kept { device, trees, hydrated } => begin(device, hydrated.then(|| names_of(trees))),
            other => other,
        };
    }

    /// Answers what is there to be answered.
    pub(crate) fn serve(&mut self) {
        let Self::Served { device, names, buffer } = self else { return };
        for _ in 0..AT_ONCE {
            match nix::unistd::read(&*device, buffer) {
                Ok(length) => {
                    let request = buffer.get(..length).unwrap_or_default();
                    if let Some(answer) = fuse_replies::to(request, names.as_ref()) {
                        // Whoever asked may have gone since.
                        let _ = nix::unistd::write(&*device, &answer);
                    }
                }
                Err(Errno::EAGAIN) => return,
                // ENOENT: whoever asked was interrupted just now.
                Err(Errno::EINTR | Errno::ENOENT) => {}
                Err(errno) => {
                    eprintln!("cvm-standin: the mount has ended ({errno})");
                    *self = Self::Nothing;
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

fn begin(device: OwnedFd, names: Option<Names>) -> Held {
    // Not before: the server has the same open file, and may not expect it.
    if let Err(errno) = descriptor::set_nonblocking(&device) {
        eprintln!("cvm-standin: the device stays blocking ({errno}): it is closed instead");
        return Held::Nothing;
    }
    // What the dead server has read and not answered. An older kernel refuses, and then whoever
    // waits for such an answer waits until the mount is aborted.
    if let Err(errno) = nix::unistd::write(&device, &fuse_replies::resend()) {
        eprintln!("cvm-standin: requests already read by the server are lost ({errno})");
    }
    Held::Served { device, names, buffer: vec![0; REQUEST_MAX] }
}

/// Character device 10:229, by whatever name.
fn is_fuse_device(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) == SFlag::S_IFCHR
            && (major(stat.st_rdev), minor(stat.st_rdev)) == (10, 229)
    })
}
