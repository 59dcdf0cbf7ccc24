//! A throw-away machine: fresh namespaces on an overlay of this machine's root file system.
//!
//! What runs inside is process 1 of its own pid namespace, sees every installed program, and
//! may write anywhere: all of it lands in a tmpfs that goes with the namespace. Volumes are
//! real directories, bound in, so that databases and dockerd have a real disk below them.
//!
//! Refuses to run without root, and to leave anything mounted: every mount lives in the
//! namespace and dies with it.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::ffi::CString;
use std::fs;
use std::io::{Error, Read, Result, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Everything about one throw-away machine.
#[derive(Debug, Clone, Default)]
pub struct Plan {
    /// A network of its own, with nothing but a loopback; else this machine's.
    pub private_network: bool,
    /// A file that stands for a network which is there already, in place of either.
    pub network: Option<PathBuf>,
    pub binds: Vec<Bind>,
    /// Host file to path inside, copied with its mode.
    pub copies: Vec<(PathBuf, PathBuf)>,
    /// Target to path of the link inside.
    pub symlinks: Vec<(PathBuf, PathBuf)>,
    pub files: Vec<FileInside>,
    /// The whole environment of the command.
    pub environment: Vec<(String, String)>,
    /// Gets the pid of process 1 as seen from outside, once it executes the command.
    pub info: Option<PathBuf>,
    pub command: Vec<String>,
}

#[derive(Debug, Clone)]
pub struct Bind {
    pub source: PathBuf,
    pub target: PathBuf,
    pub read_only: bool,
}

#[derive(Debug, Clone)]
pub struct FileInside {
    pub path: PathBuf,
    pub content: Vec<u8>,
    pub mode: u32,
}

/// Starts the machine and yields the pid of its process 1 once the command executes.
///
/// Call it from a program with one thread: it forks and goes on in the child.
pub fn start(plan: &Plan) -> Result<Pid> {
    if !nix::unistd::geteuid().is_root() {
        return Err(Error::other("namespaces and mounts need root"));
    }
    let (news, theirs) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let mut flags = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    if let Some(network) = &plan.network {
        let file = fs::File::open(network).map_err(context("a network at", network))?;
        nix::sched::setns(file, CloneFlags::CLONE_NEWNET)?;
    } else if plan.private_network {
        flags |= CloneFlags::CLONE_NEWNET;
    }
    // The pid namespace is entered by the next fork; the others at once, so that they do not
    // stick to the caller the fork comes first and a second one makes process 1.
    let pid = clone_into(flags)?;
    if let Some(pid) = pid {
        drop(theirs);
        let mut why = String::new();
        fs::File::from(news).read_to_string(&mut why)?;
        if why.is_empty() {
            if let Some(info) = &plan.info {
                fs::write(info, pid.to_string())?;
            }
            return Ok(pid);
        }
        let _ = waitpid(pid, None);
        return Err(Error::other(why));
    }
    let failure = become_machine(plan);
    let _ = fs::File::from(theirs).write_all(failure.to_string().as_bytes());
    leave()
}

/// fork(2) with new namespaces: `None` in the child.
#[allow(unsafe_code)]
fn clone_into(flags: CloneFlags) -> Result<Option<Pid>> {
    let bits = i64::from(flags.bits()) | i64::from(nix::libc::SIGCHLD);
    // SAFETY: clone without CLONE_VM and without a stack is fork with flags; the program has
    // one thread, as the caller promises.
    let pid = unsafe { nix::libc::syscall(nix::libc::SYS_clone, bits, 0, 0, 0, 0) };
    match pid {
        -1 => Err(Error::last_os_error()),
        0 => Ok(None),
        pid => Ok(Some(Pid::from_raw(i32::try_from(pid).unwrap_or(-1)))),
    }
}

/// The child has nothing to clean up: its mounts end with it.
#[allow(unsafe_code)]
fn leave() -> ! {
    // SAFETY: ends the process without running anything.
    unsafe { nix::libc::_exit(125) }
}

fn become_machine(plan: &Plan) -> Error {
    let work = || -> Result<std::convert::Infallible> {
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        // So that what stops the starter does not stop the machine a second time.
        nix::unistd::setsid()?;
        if plan.private_network && plan.network.is_none() {
            loopback_up()?;
        }
        build_root(plan)?;
        fresh_signals();
        execute(plan)
    };
    match work() {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

/// A path inside as a path below the new root that is still mounted elsewhere.
fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn context(what: &str, path: &Path) -> impl FnOnce(Error) -> Error {
    let told = format!("{what} {}", path.display());
    move |error| Error::other(format!("{told}: {error}"))
}

fn build_root(plan: &Plan) -> Result<()> {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // The upper layer must not lie below the lower one on the same file system.
    let base = Path::new("/mnt");
    mount(Some("tmpfs"), base, Some("tmpfs"), MsFlags::empty(), Some("mode=755"))?;
    let (upper, work, root) = (base.join("upper"), base.join("work"), base.join("root"));
    for dir in [&upper, &work, &root] {
        fs::create_dir(dir)?;
    }
    let options = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    mount(Some("overlay"), &root, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(Error::from)
        .map_err(context("an overlay over", Path::new("/")))?;
    furnish(plan, &root)?;
    nix::unistd::chdir(&root)?;
    nix::unistd::pivot_root(".", ".")?;
    umount2(".", MntFlags::MNT_DETACH)?;
    nix::unistd::chdir("/")?;
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), none)?;
    Ok(())
}

fn furnish(plan: &Plan, root: &Path) -> Result<()> {
    let none = None::<&str>;
    for kept in ["/dev", "/sys"] {
        let target = inside(root, Path::new(kept));
        mount(Some(kept), &target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)?;
    }
    for fresh in ["/run", "/tmp"] {
        let mode = if fresh == "/tmp" { "mode=1777" } else { "mode=755" };
        mount(Some("tmpfs"), &inside(root, Path::new(fresh)), Some("tmpfs"), MsFlags::empty(), Some(mode))?;
    }
    let devpts = inside(root, Path::new("/dev/pts"));
    mount(
        Some("devpts"),
        &devpts,
        Some("devpts"),
        MsFlags::empty(),
        Some("newinstance,ptmxmode=0666,mode=620"),
    )?;
    let ptmx = inside(root, Path::new("/dev/ptmx"));
    mount(Some(&devpts.join("ptmx")), &ptmx, none, MsFlags::MS_BIND, none)?;
    for (from, to) in &plan.copies {
        let to = inside(root, to);
        fs::create_dir_all(to.parent().unwrap_or(root))?;
        fs::copy(from, &to).map_err(context("copying", from))?;
    }
    for (target, link) in &plan.symlinks {
        let link = inside(root, link);
        fs::create_dir_all(link.parent().unwrap_or(root))?;
        let _ = fs::remove_file(&link);
        symlink(target, &link).map_err(context("linking", &link))?;
    }
    // Files after volumes: one may lie on the other.
    for bind in &plan.binds {
        bind_into(root, bind)?;
    }
    for file in &plan.files {
        let path = inside(root, &file.path);
        fs::create_dir_all(path.parent().unwrap_or(root))?;
        fs::write(&path, &file.content).map_err(context("writing", &path))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?;
    }
    Ok(())
}

fn bind_into(root: &Path, bind: &Bind) -> Result<()> {
    let none = None::<&str>;
    let target = inside(root, &bind.target);
    if bind.source.is_dir() {
        fs::create_dir_all(&target)?;
    } else {
        fs::create_dir_all(target.parent().unwrap_or(root))?;
        fs::OpenOptions::new().create(true).append(true).open(&target)?;
    }
    mount(Some(&bind.source), &target, none, MsFlags::MS_BIND | MsFlags::MS_REC, none)
        .map_err(Error::from)
        .map_err(context("binding", &bind.source))?;
    if bind.read_only {
        let again = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mount(none, &target, none, again, none)?;
    }
    Ok(())
}

/// A child must not inherit what the starter ignores or blocks.
fn fresh_signals() {
    cvm_sys::spawn::reset_handlers();
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None);
}

fn execute(plan: &Plan) -> Result<std::convert::Infallible> {
    let words = |text: &str| CString::new(text).map_err(Error::other);
    let argv = plan.command.iter().map(|a| words(a)).collect::<Result<Vec<_>>>()?;
    let pairs = plan.environment.iter().map(|(name, value)| words(&format!("{name}={value}")));
    let environment = pairs.collect::<Result<Vec<_>>>()?;
    let program = argv.first().ok_or_else(|| Error::other("no command"))?;
    nix::unistd::execve(program, &argv, &environment)
        .map_err(Error::from)
        .map_err(context("executing", Path::new(&*program.to_string_lossy())))
}

/// A new network namespace has a loopback that is down.
#[allow(unsafe_code)]
pub(crate) fn loopback_up() -> Result<()> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
    let fd: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an all-zero ifreq is valid; the name fits with its null byte; the ioctl reads
    // and writes only this structure.
    unsafe {
        let mut request: nix::libc::ifreq = std::mem::zeroed();
        for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
            *to = from.cast_signed();
        }
        request.ifr_ifru.ifru_flags = i16::try_from(nix::libc::IFF_UP | nix::libc::IFF_RUNNING).unwrap_or(0);
        if nix::libc::ioctl(fd.as_raw_fd(), nix::libc::SIOCSIFFLAGS, &request) != 0 {
            return Err(Error::last_os_error());
        }
    }
    Ok(())
}

/// The status of the machine's process 1 as a shell would show it, once it has ended.
pub fn try_wait(pid: Pid) -> Option<i32> {
    match waitpid(pid, Some(WaitPidFlag::WNOHANG)) {
        Ok(WaitStatus::Exited(_, code)) => Some(code),
        Ok(WaitStatus::Signaled(_, signal, _)) => Some(128 + signal as i32),
        Ok(_) | Err(nix::errno::Errno::EINTR) => None,
        Err(_) => Some(125),
    }
}

/// Files to lay inside, one JSON array of `[path, octal mode, content]`; see [`write_files`].
pub fn read_files(path: &str) -> Result<Vec<FileInside>> {
    let rows: Vec<(PathBuf, u32, String)> = serde_json::from_slice(&fs::read(path)?)?;
    Ok(rows
        .into_iter()
        .map(|(path, mode, content)| FileInside { path, mode, content: content.into() })
        .collect())
}

pub fn write_files(path: &Path, files: &[FileInside]) -> Result<()> {
    let rows: Vec<_> = files.iter().map(|f| (&f.path, f.mode, String::from_utf8_lossy(&f.content))).collect();
    fs::write(path, serde_json::to_vec(&rows)?)
}
