//! Reads the files that `NAME_FILE` variables name, and hides them from the agent.
//!
//! A file that is root's alone (owner root, no right for anybody else) is read, and that is all. Any other
//! is covered: a copy that is root's alone is mounted over it, before there is an agent. So secrets of
//! docker compose, which are files of the host with whatever owner and mode they have there, often 0444,
//! can be used as they are. A tool that root runs with the same environment finds what it expects. Where
//! nothing may be mounted, such a file is refused.
//!
//! The copies lie in a `ramfs` without a name: it is never swapped, and ends with the container.
//!
//! Owner, mode and content of a file are never changed: it may be the host's.

use cvm_protocol::paths;
use cvm_sys::memfd;
use cvm_system::env::Environment;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::Mode;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use zeroize::Zeroizing;

/// A file with a secret, a configuration or workspace files.
const FILE_MAX: u64 = 16 * 1024 * 1024;
/// The number of `CAP_SYS_ADMIN`.
const SYS_ADMIN: u32 = 21;

/// What becomes of a file that others than root can read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exposed {
    Cover,
    /// Nothing is changed; whether it could be covered is told from this process's rights.
    OnlyJudge,
}

/// Hands the content of each file to `environment`. Yields a line for each that was, or would be, covered.
pub(crate) fn read(environment: &mut Environment, exposed: Exposed) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, path) in environment.wanted_files() {
        let (file, mut content) = match whole(&path) {
            Ok(found) => found,
            Err(why) => {
                environment.with_file(name, Err(why));
                continue;
            }
        };
        if is_roots_alone(&file) {
            environment.with_file(name, Ok(std::mem::take(&mut *content)));
            continue;
        }
        let hidden = match exposed {
            Exposed::Cover => cover(&file, &content).and_then(|()| {
                // Every later open of the path must find the copy.
                let found = File::open(&path).map_err(|error| error.to_string())?;
                if is_roots_alone(&found) { Ok(()) } else { Err("the copy cannot be seen there".to_owned()) }
            }),
            Exposed::OnlyJudge if may_mount() => Ok(()),
            Exposed::OnlyJudge => Err("mounting: this container lacks SYS_ADMIN".to_owned()),
        };
        match hidden {
            Ok(()) => {
                lines.push(format!(
                    "{name}_FILE: others than root can read the file itself; a copy that only root can read lies over \
                     it while this container runs"
                ));
                environment.with_file(name, Ok(std::mem::take(&mut *content)));
            }
            Err(why) => environment.with_exposed_file(name, &why),
        }
    }
    lines
}

/// A regular file of bearable size. Opened without waiting, so that a pipe somebody put in
/// its place cannot hold up the boot.
fn whole(path: &Path) -> Result<(File, Zeroizing<Vec<u8>>), String> {
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY;
    let file = File::from(open(path, flags, Mode::empty()).map_err(|errno| errno.desc().to_owned())?);
    let meta = file.metadata().map_err(|error| error.to_string())?;
    if !meta.is_file() {
        return Err("it is not a regular file".to_owned());
    }
    if meta.len() > FILE_MAX {
        return Err(format!("it is larger than {} MiB", FILE_MAX / 1024 / 1024));
    }
    let limit = usize::try_from(FILE_MAX).unwrap_or(usize::MAX);
    let copy = file.try_clone().map_err(|error| error.to_string())?;
    let content = memfd::read_all(copy.into(), limit).map_err(|error| error.to_string())?;
    Ok((file, content))
}

fn is_roots_alone(file: &File) -> bool {
    const OF_OTHERS: u32 = 0o077;
    file.metadata().is_ok_and(|meta| meta.uid() == 0 && meta.mode() & OF_OTHERS == 0)
}

/// Mounts a copy that is root's alone over the file that is open here, wherever it lies.
fn cover(file: &File, content: &[u8]) -> Result<(), String> {
    let place = PathBuf::from(format!("{}/secret", paths::RUN));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&place)
        .map_err(|error| format!("{}: {error}", place.display()))?;
    let none = None::<&str>;
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    let words = |errno: Errno| format!("mounting: {}", errno.desc());
    mount(Some("secret"), &place, Some("ramfs"), flags, Some("mode=700")).map_err(words)?;
    let lay = || -> Result<(), String> {
        let copy = place.join("copy");
        let mut options = OpenOptions::new();
        let made = options.write(true).create_new(true).mode(0o400).open(&copy);
        made.and_then(|mut made| made.write_all(content)).map_err(|error| error.to_string())?;
        let target = format!("/proc/self/fd/{}", file.as_raw_fd());
        mount(Some(&copy), target.as_str(), none, MsFlags::MS_BIND, none).map_err(words)
    };
    let outcome = lay();
    // The file system lives on below what it was bound to, without a path of its own.
    let _ = umount2(&place, MntFlags::MNT_DETACH);
    let _ = std::fs::remove_dir(&place);
    outcome
}

fn may_mount() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    effective.is_some_and(|bits| bits & (1 << SYS_ADMIN) != 0)
}
