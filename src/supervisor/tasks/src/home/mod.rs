//! The home of the gateway's user leads to the volume: `~/.openclaw` to `/data/openclaw` and
//! `~/.config` to `/data/.config`. The user is made if the image lacks one.
//!
//! Root has `/root/.openclaw` alone: programs that an operator runs as root read settings below
//! `~/.config`, and the agent writes `/data/.config`.
//!
//! Nothing is lost: the files of a home move to the volume, or are kept beside what is
//! there, under a name that says so. If the link to the gateway's state cannot be made, the task fails and no gateway
//! starts.

mod chown_tree;
mod dstack;
mod merge;
mod mounts;
mod user;

use crate::files::{Dir, Owner, is_kind};
use crate::report::{self, Failure, Outcome, Report, shown};
use crate::root_dir::RootDir;
use cvm_protocol::paths;
use cvm_protocol::task::DockerUse;
use mounts::Mounts;
use nix::sys::stat::SFlag;
use std::ffi::OsStr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

const ROOT_HOME: &str = "/root";
/// Suffix of a file that had to make room; a number follows.
const ASIDE: &str = "before-openclaw-cvm";

pub(crate) fn prepare(root_dir: &RootDir, user: &str, docker: DockerUse, report: &mut Report) -> Outcome<()> {
    dstack::is_out_of_reach(root_dir)?;
    let account = user::ensure(root_dir, user, docker == DockerUse::Allowed, report)?;
    if docker == DockerUse::NoneByDefault && has_containers(root_dir) {
        report.remark(
            "docker",
            "dockerd does not run: since this version ENABLE_DOCKER is 0 unless you set it, because who may use docker is \
             root in this container. /var/lib/docker holds containers or images of an earlier version; they stay as they \
             are. Set ENABLE_DOCKER=1 to have them back, or ENABLE_DOCKER=0 to leave it so",
        );
    }
    let owner = Owner { uid: account.uid, gid: account.gid };
    let mounts = Mounts::read(root_dir);
    volume(root_dir, &mounts, report)?;
    for path in [paths::STATE, paths::CONFIG_HOME] {
        claim(root_dir, path, owner, report)?;
    }
    let (own, root) = (root_dir.at(&account.home), root_dir.at(ROOT_HOME));
    let mut links = vec![(own.join(".openclaw"), paths::STATE), (own.join(".config"), paths::CONFIG_HOME)];
    if own != root && root.is_dir() {
        links.push((root.join(".openclaw"), paths::STATE));
        undo(root_dir, &root.join(".config"), paths::CONFIG_HOME, report)?;
    }
    for (path, target) in links {
        let vital = path.starts_with(&own) && target == paths::STATE;
        let link = Link { path, target, owner };
        link_home(root_dir, &link, &mounts, report).or_else(|obstacle| obstacle.judge(vital, report))?;
    }
    Ok(())
}

/// Whether dockerd was used here: it makes its directories even if it never is.
fn has_containers(root_dir: &RootDir) -> bool {
    let root = root_dir.at("/var/lib/docker");
    let has_entries = |dir: PathBuf| std::fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
    let drivers = std::fs::read_dir(root.join("image")).into_iter().flatten().flatten();
    has_entries(root.join("containers"))
        || drivers.map(|driver| driver.path().join("imagedb/content/sha256")).any(has_entries)
}

/// Removes a link that a version before made. What it led to stays where it is.
fn undo(root_dir: &RootDir, link: &Path, target: &str, report: &mut Report) -> Outcome<()> {
    let is_link = std::fs::symlink_metadata(link).is_ok_and(|found| found.is_symlink());
    if is_link && leads_to(link, target, &root_dir.at(target)) {
        std::fs::remove_file(link).map_err(crate::files::trouble("remove", link))?;
        report.info(format!("{} does not lead to {target} any more: the agent writes there", shown(link)));
    }
    Ok(())
}

/// `/data` itself: there, and passable for the gateway's user.
fn volume(root_dir: &RootDir, mounts: &Mounts, report: &mut Report) -> Outcome<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let path = root_dir.at(paths::DATA);
    if !path.is_dir() {
        Dir::ensure(&path, 0o755, None)?;
    }
    if !mounts.is_mount_point(&path) {
        report.remark(
            "storage",
            "/data is not a volume: the agent's state does not survive this container. Mount one there \
             (in docker-compose.yml: `volumes: [data:/data]`)",
        );
    }
    if mounts.is_mount_point(&path)
        && let Err(errno) = mounts::lend_no_rights(&path)
    {
        // `cvm doctor` says it to operators, with what it takes.
        report::detail(format!("/data is not mounted nosuid and nodev: {}", errno.desc()));
    }
    let mode = std::fs::metadata(&path).map_or(0o755, |m| m.permissions().mode() & 0o7777);
    if mode & 0o011 != 0o011 {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode | 0o011))
            .map_err(crate::files::trouble("change the mode of", &path))?;
        report.info("/data could not be entered by the gateway's user; its mode is corrected");
    }
    Ok(())
}

/// The directory `path` on the volume is the gateway's user's, with all that is in it.
fn claim(root_dir: &RootDir, path: &str, owner: Owner, report: &mut Report) -> Outcome<()> {
    use std::os::unix::fs::MetadataExt as _;
    let at = root_dir.at(path);
    let stranger = match std::fs::symlink_metadata(&at) {
        Ok(there) if there.is_dir() => there.uid() != owner.uid,
        Ok(_) => {
            return Err(Failure::for_good(format!(
                "{path} is not a directory; move it away, so that the agent's state can lie there"
            )));
        }
        Err(_) => false,
    };
    if stranger {
        let given = chown_tree::give(&at, owner)?;
        report.info(format!("{path} belonged to another user; {given}"));
    }
    Dir::ensure(&at, 0o700, Some(owner))?;
    Ok(())
}

struct Link {
    path: PathBuf,
    target: &'static str,
    owner: Owner,
}

/// Why a home does not lead to the volume.
enum Obstacle {
    /// Something is mounted there: an operator's decision, which we cannot undo.
    Mounted(PathBuf),
    Other(Failure),
}

impl<E: Into<Failure>> From<E> for Obstacle {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

impl Obstacle {
    fn judge(self, vital: bool, report: &mut Report) -> Outcome<()> {
        match self {
            Self::Other(failure) => Err(failure),
            Self::Mounted(at) if vital => Err(Failure::for_good(format!(
                "something is mounted at {}, where a link to the volume belongs; mount it at {} instead",
                shown(&at),
                paths::STATE
            ))),
            Self::Mounted(at) => {
                let at = shown(&at);
                report.warn(format!("something is mounted at {at}; that directory stays as it is and is not kept on the volume"));
                Ok(())
            }
        }
    }
}

/// Makes `link` lead to its target, and moves there what lies in its place.
fn link_home(root_dir: &RootDir, link: &Link, mounts: &Mounts, report: &mut Report) -> Result<(), Obstacle> {
    let target = root_dir.at(link.target);
    let (Some(home), Some(name)) = (link.path.parent(), link.path.file_name()) else { return Ok(()) };
    // A home on the volume: the directory is there already, and cannot lead to itself.
    if link.path == target {
        return Ok(());
    }
    let dir = Dir::open(home)?;
    match dir.stat(name)? {
        None => {}
        Some(stat) if is_kind(&stat, SFlag::S_IFLNK) => {
            if leads_to(&link.path, link.target, &target) {
                return Ok(());
            }
            set_aside(&dir, name, "a link to somewhere else", report)?;
        }
        Some(stat) if is_kind(&stat, SFlag::S_IFDIR) => {
            if let Some(mount) = mounts.at_or_below(&link.path) {
                return Err(Obstacle::Mounted(mount));
            }
            move_in(&link.path, &target, link, report)?;
        }
        Some(_) => set_aside(&dir, name, "a file", report)?,
    }
    symlink(link.target, &link.path).map_err(crate::files::trouble("make the link", &link.path))?;
    Ok(())
}

/// Whether the link says so, or comes there by another way.
fn leads_to(link: &Path, said: &str, target: &Path) -> bool {
    let words = std::fs::read_link(link).unwrap_or_default();
    words == Path::new(said) || std::fs::canonicalize(link).is_ok_and(|real| real == target)
}

/// A link or file that is not ours gets another name and stays as it is: what the link leads to
/// is not ours to move.
fn set_aside(dir: &Dir, name: &OsStr, what: &str, report: &mut Report) -> Result<(), Obstacle> {
    let aside = dir.set_aside(name, ASIDE)?;
    let (old, new) = (shown(&dir.path().join(name)), aside.to_string_lossy().into_owned());
    report.warn(format!("{old} was {what}; it is now called {new}, and {old} leads to the volume"));
    Ok(())
}

fn move_in(from: &Path, to: &Path, link: &Link, report: &mut Report) -> Result<(), Obstacle> {
    // The owner first: files that a killed try has moved must belong to the agent too.
    chown_tree::give(from, link.owner)?;
    let moved = merge::into(from, to)?;
    if moved.entries > 0 {
        report.info(format!("{} entries of {} moved to {}", moved.entries, shown(from), link.target));
    }
    if moved.kept_beside > 0 {
        report.warn(format!(
            "{} entries of {} were on the volume already with another content; those on the volume count, the others \
             lie beside them as NAME.{}-N (the log of this step lists them)",
            moved.kept_beside,
            shown(from),
            merge::SUFFIX
        ));
    }
    if moved.dropped > 0 {
        report::detail(format!("{} sockets or devices of {} were not moved", moved.dropped, shown(from)));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
