//! FUSE mode: the bucket as a frozen, read-only file system, and over it the overlay that the
//! gateway sees.
//!
//! ```text
//! /data                        overlay: upper on the volume, lower the mount
//! /run/openclaw-cvm/volume     the volume itself, which /data hides now
//! /run/openclaw-cvm/bucket     the mount: exactly what the manifest names
//! ```
//!
//! Refuses to leave half of it behind: a step that fails takes down what came before.
//! May import: `fault`, `rclone`, `volume`.

use crate::fault::Fault;
use crate::parallel;
use crate::rclone::{MountModes, Rclone};
use crate::volume::{self, Volume};
use cvm_protocol::paths;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::fs;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

/// Why /data cannot be an overlay here. A reason for sync mode, not an error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NoMount(pub(crate) String);

/// What the kernel says of the mount on top at a mount point.
fn mounted_at(point: &str) -> Option<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").ok()?;
    table.lines().rev().find(|line| line.split(' ').nth(4) == Some(point)).map(str::to_owned)
}

/// Whether something is mounted exactly there.
pub(crate) fn is_mount(point: &str) -> bool {
    mounted_at(point).is_some()
}

/// Whether an overlay of ours is on top at /data, by its upper layer: the volume may lie on one itself.
pub(crate) fn overlay_is_there() -> bool {
    let on_volume = |dir: &str| Path::new(dir).starts_with(paths::VOLUME);
    let is_ours = |mount: String| {
        let (_, of) = mount.split_once(" - ")?;
        let mut options = of.strip_prefix("overlay ")?.split([' ', ',']);
        options.find_map(|option| option.strip_prefix("upperdir=")).map(on_volume)
    };
    mounted_at(paths::DATA).and_then(is_ours).unwrap_or(false)
}

/// Whether it answers.
pub(crate) fn overlay_is_alive() -> bool {
    overlay_is_there()
        && is_mount(paths::VOLUME)
        && fs::read_dir(paths::DATA).is_ok_and(|entries| entries.filter(Result::is_err).count() == 0)
}

/// Whether the mount below the overlay has died with whoever answered for it. Asked for a name that
/// no cache knows.
pub(crate) fn is_dead(number: u64) -> bool {
    let name = Path::new(paths::DATA).join(format!(".cvm-look-{number}"));
    matches!(
        nix::sys::stat::lstat(&name),
        Err(nix::errno::Errno::ENOTCONN | nix::errno::Errno::EIO | nix::errno::Errno::ESTALE)
    )
}

/// A dead tree may only be rebuilt when nobody stands on it any more. Who finds it dead says so and
/// ends; process 1 starts the next worker when everybody has left.
pub(crate) fn is_first_to_find_it_dead() -> bool {
    let said = Path::new(paths::RUN).join("tree-is-dead");
    if fs::remove_file(&said).is_ok() {
        return false;
    }
    fs::write(&said, "").is_ok()
}

/// Takes down what an earlier worker left, so that the volume is at /data again. Whoever still
/// holds something open there keeps a dead tree, and nobody new finds it.
pub(crate) fn clear() -> Result<(), Fault> {
    if is_mount(paths::BUCKET_MOUNT)
        && let Ok(stream) = std::os::unix::net::UnixStream::connect(paths::STANDIN_SOCKET)
    {
        // What it holds would keep the mount busy.
        let _ = stream.set_read_timeout(Some(std::time::Duration::from_secs(2)));
        let _ = (&stream).write_all(b"D");
        let _ = std::io::Read::read(&mut &stream, &mut [0u8; 1]);
    }
    while overlay_is_there() {
        umount2(paths::DATA, MntFlags::MNT_DETACH)?;
    }
    unmount_bucket()?;
    unmount(paths::VOLUME)
}

/// Takes down what no overlay stands on yet.
pub(crate) fn unmount_bucket() -> Result<(), Fault> {
    unmount(paths::BUCKET_MOUNT)
}

fn unmount(point: &str) -> Result<(), Fault> {
    while is_mount(point) {
        umount2(point, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

/// What has to be there before it is worth trying.
pub(crate) fn possible() -> Result<(), NoMount> {
    let no = |why: String| Err(NoMount(why));
    if let Err(why) = open_fuse(Path::new("/dev/fuse")) {
        return no(why);
    }
    let path = std::env::var("PATH").unwrap_or_else(|_| paths::PATH.to_owned());
    if !path.split(':').any(|d| Path::new(d).join("fusermount3").exists()) {
        return no("fusermount3 is not installed".to_owned());
    }
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if !filesystems.lines().any(|l| l.ends_with("\toverlay")) {
        return no("this kernel has no overlayfs".to_owned());
    }
    Ok(())
}

/// Whether a file is known again that has been renamed: by its handle.
pub(crate) fn may_open_by_handle() -> bool {
    const DAC_READ_SEARCH: u64 = 1 << 2;
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .is_none_or(|bits| bits & DAC_READ_SEARCH != 0)
}

/// Makes the device where there is none: an engine that has to bring it starts nothing on a host
/// that lacks it. One that does not open is not left behind.
fn open_fuse(device: &Path) -> Result<(), String> {
    use nix::sys::stat::{Mode, SFlag, makedev, mknod};
    let open = || fs::OpenOptions::new().read(true).write(true).open(device).map(drop);
    let cannot = |error: std::io::Error| {
        let more = match error.raw_os_error().map(nix::errno::Errno::from_raw) {
            Some(nix::errno::Errno::EPERM) => "; `device_cgroup_rules: [\"c 10:229 rwm\"]` allows it",
            Some(nix::errno::Errno::ENODEV | nix::errno::Errno::ENXIO) => "; this kernel has no FUSE",
            _ => "",
        };
        format!("{} cannot be opened ({}){more}", device.display(), words(&error))
    };
    match open() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        opened => return opened.map_err(cannot),
    }
    // We alone mount here: the agent has no need of it.
    let ours = Mode::from_bits_truncate(0o600);
    mknod(device, SFlag::S_IFCHR, ours, makedev(10, 229)).map_err(|e| {
        format!("there is no {}, and it cannot be made ({}; CAP_MKNOD?)", device.display(), e.desc())
    })?;
    open().map_err(|error| {
        let _ = fs::remove_file(device);
        cannot(error)
    })
}

/// Makes the volume reachable below the overlay that will hide it.
pub(crate) fn bind_volume() -> Result<(), NoMount> {
    let no = |what: &str, error: nix::errno::Errno| NoMount(format!("{what}: {}", error.desc()));
    fs::create_dir_all(paths::VOLUME).map_err(|e| NoMount(words(&e)))?;
    // Above everything that follows: only root goes through here.
    let _ = fs::set_permissions(paths::VOLUME, fs::Permissions::from_mode(0o700));
    let bind = MsFlags::MS_BIND;
    mount(Some(paths::DATA), paths::VOLUME, None::<&str>, bind, None::<&str>).map_err(|e| {
        let lacks = if e == nix::errno::Errno::EACCES { "apparmor=unconfined" } else { "CAP_SYS_ADMIN" };
        no(&format!("the volume cannot be bound elsewhere ({lacks}?)"), e)
    })
}

/// Mounts the bucket: `names` is everything it may show.
pub(crate) fn mount_bucket(rclone: &Rclone, names: &[u8], modes: &MountModes) -> Result<(), NoMount> {
    let no = |error: std::io::Error| NoMount(words(&error));
    fs::create_dir_all(paths::BUCKET_MOUNT).map_err(no)?;
    let list = Path::new(paths::RUN).join("bucket-names");
    let mut options = fs::OpenOptions::new();
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.write(true).create(true).truncate(true).open(&list).map_err(no)?;
    file.write_all(names).map_err(no)?;
    let mounted = rclone.mount(Path::new(paths::BUCKET_MOUNT), &list, modes);
    let _ = fs::remove_file(&list);
    mounted.map_err(|fault| NoMount(fault.to_string()))?;
    if is_mount(paths::BUCKET_MOUNT) {
        Ok(())
    } else {
        Err(NoMount("rclone says that it mounted, and did not".to_owned()))
    }
}

/// The overlay at /data. Without a mount below, an empty directory takes its place.
pub(crate) fn overlay(volume: &Volume, lower: Option<&str>) -> Result<(), NoMount> {
    let empty = volume.own.join("empty");
    fs::create_dir_all(&empty).map_err(|e| NoMount(words(&e)))?;
    // The upper layer's top is the top of /data, and as open as the volume's own.
    let top = fs::metadata(&volume.root).map_err(|e| NoMount(words(&e)))?;
    let _ = fs::set_permissions(&volume.upper, fs::Permissions::from_mode(top.mode() & 0o7777));
    let _ = std::os::unix::fs::lchown(&volume.upper, Some(top.uid()), Some(top.gid()));
    let lower = lower.map_or_else(|| empty.display().to_string(), str::to_owned);
    // A directory that is renamed, and a file whose mode changes, are not fetched for that.
    let options = format!(
        "lowerdir={lower},upperdir={},workdir={},metacopy=on,redirect_dir=on,index=off,xino=off",
        volume.upper.display(),
        volume.own.join("work").display()
    );
    let mounted = parallel::apart(|| {
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID;
        mount(Some("overlay"), &volume.tree, Some("overlay"), flags, Some(options.as_str()))
    });
    mounted.map_err(|error| {
        NoMount(format!("overlayfs cannot be mounted with its upper layer on the volume: {}", error.desc()))
    })
}

/// Keeps the bucket's own directory, which the mount would show, out of the merged tree.
pub(crate) fn hide_reserved(volume: &Volume) -> Result<(), Fault> {
    let own = volume.upper.join(".cvm");
    fs::create_dir_all(&own)?;
    let _ = fs::set_permissions(&own, fs::Permissions::from_mode(0o700));
    volume::set_mark(&own, c"trusted.overlay.opaque", b"y")
}

fn words(error: &std::io::Error) -> String {
    error
        .raw_os_error()
        .map_or_else(|| error.to_string(), |code| nix::errno::Errno::from_raw(code).desc().to_owned())
}

/// The descriptor over which the kernel asks for the mount, as this process holds it. One of an
/// earlier mount may be open yet; kernels that do not say which is which have the first one taken.
fn fuse_descriptor() -> Option<i32> {
    let mount = mounted_at(paths::BUCKET_MOUNT)?;
    let connection = mount.split(' ').nth(2)?.split_once(':')?.1;
    let entries = fs::read_dir("/proc/self/fd").ok()?;
    entries.flatten().find_map(|entry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        let leads = fs::read_link(entry.path()).ok()?;
        let said = fs::read_to_string(format!("/proc/self/fdinfo/{number}")).ok()?;
        let mut words = said.split_whitespace();
        let of = words.find(|word| *word == "fuse_connection:").and_then(|_| words.next());
        (leads == Path::new("/dev/fuse") && of.is_none_or(|of| of == connection)).then_some(number)
    })
}

/// Whether this process serves the mount, and not one before it.
pub(crate) fn is_served_here() -> bool {
    fuse_descriptor().is_some()
}

/// The one who answers for the mount when we are gone: see `cvm-standin`.
pub(crate) struct StandIn {
    stream: std::os::unix::net::UnixStream,
}

impl StandIn {
    /// Gives it the mount's descriptor to hold, and by which it can gather the names that the
    /// kernel knows: the top of the mount, and the upper layer.
    pub(crate) fn hand_over(volume: &Volume) -> Result<Self, Fault> {
        use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
        let stream = std::os::unix::net::UnixStream::connect(paths::STANDIN_SOCKET)?;
        stream.set_read_timeout(Some(std::time::Duration::from_secs(5)))?;
        let number = fuse_descriptor().ok_or_else(|| Fault::other("the mount's descriptor is not found"))?;
        let place = |path: &Path| {
            let mut options = fs::OpenOptions::new();
            std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, nix::fcntl::OFlag::O_PATH.bits());
            options.read(true).open(path)
        };
        let (top, upper) = (place(Path::new(paths::BUCKET_MOUNT))?, place(&volume.upper)?);
        let fds = [number, top.as_raw_fd(), upper.as_raw_fd()];
        let message = [std::io::IoSlice::new(b"F")];
        sendmsg::<()>(
            stream.as_raw_fd(),
            &message,
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        let this = Self { stream };
        this.answered()?;
        Ok(this)
    }

    /// Whether it still holds on.
    pub(crate) fn is_there(&self) -> bool {
        use nix::sys::socket::{MsgFlags, recv};
        let how = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
        // It says nothing unasked: what can be read is the end.
        recv(self.stream.as_raw_fd(), &mut [0u8; 1], how) == Err(nix::errno::Errno::EAGAIN)
    }

    /// From now on it answers for us if we die.
    pub(crate) fn tree_is_whole(&self) -> Result<(), Fault> {
        (&self.stream).write_all(b"H")?;
        self.answered()
    }

    fn answered(&self) -> Result<(), Fault> {
        let mut answer = [0u8; 1];
        std::io::Read::read_exact(&mut &self.stream, &mut answer)?;
        if answer == *b"k" {
            Ok(())
        } else {
            Err(Fault::other("the stand-in gives an answer that nobody knows"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_missing_is_made_and_stays_only_when_it_opens() {
        let temp = tempfile::tempdir().unwrap();
        let device = temp.path().join("fuse");
        let opened = open_fuse(&device);
        assert_eq!(opened.is_ok(), device.exists(), "{opened:?}");
        assert!(fs::metadata(&device).is_ok_and(|made| made.mode() & 0o7777 == 0o600) || opened.is_err());
        let why = open_fuse(&temp.path().join("no/such/place")).unwrap_err();
        assert!(why.contains("it cannot be made"), "{why}");
    }
}
