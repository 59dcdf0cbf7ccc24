//! Starts programs by fork and exec, and never waits for the child.
//!
//! All signals are blocked around the fork, so that no handler of ours runs in the child and
//! writes into a pipe it shares with us. The child then has default handlers, and exactly the mask, session,
//! descriptors and environment that it was given.

use crate::signals;
use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{ForkResult, Pid, fork};
use std::ffi::{CStr, CString};
use std::os::fd::{BorrowedFd, RawFd};
use zeroize::Zeroizing;

/// A program to start. All of it is prepared before the fork, because the child must not allocate.
pub struct Program<'a> {
    pub path: &'a CStr,
    pub argv: &'a [CString],
    pub environment: &'a [Zeroizing<CString>],
    pub directory: &'a CStr,
    /// The descriptors 0, 1, 2, 3 … of the child. All others close on exec.
    pub descriptors: &'a [BorrowedFd<'a>],
    pub identity: Option<&'a Identity>,
    pub oom_score_adj: Option<i16>,
    pub limits: Option<Limits>,
    pub session: Session,
    /// Whether the child is killed when its parent dies.
    pub dies_with_parent: bool,
    pub blocked: Blocked,
    /// The descriptor to which `on_failure` of [`spawn`] writes.
    pub news: Option<BorrowedFd<'a>>,
}

/// Limits of the child: no core files, and so many processes of its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Threads count as processes.
    pub processes: u64,
}

/// The stages between fork and exec, in the order in which they happen. Their numbers are those of the same
/// stages in `cvm_protocol::exit_status`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Fork = 0,
    Session = 1,
    Files = 2,
    Priority = 3,
    Groups = 5,
    User = 6,
    Directory = 7,
    Exec = 8,
}

impl Stage {
    pub const ALL: [Self; 8] = [
        Self::Fork,
        Self::Session,
        Self::Files,
        Self::Priority,
        Self::Groups,
        Self::User,
        Self::Directory,
        Self::Exec,
    ];

    /// The byte that carries a stage over a pipe.
    pub fn to_byte(self) -> u8 {
        self as u8
    }
}

/// Signals that are blocked in the child when it begins to execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Blocked {
    None,
    /// All except faults, for a program of ours, which unblocks its signals when it is ready for them.
    All,
}

/// Whose terminal and process group the child has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Session {
    /// A session of its own, without a terminal.
    Own,
    /// A session of its own, whose terminal is the first of its descriptors that is one.
    Terminal,
    /// A process group of its own, in the foreground of our terminal if there is one.
    Foreground,
}

pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    pub groups: Vec<u32>,
}

/// Starts `program`. `on_failure` runs in the child when a stage before or at exec fails. It reports the failure, and
/// returns the child's exit status. It may only write to the descriptor that it gets, which is `news` at the number
/// that it has by then.
///
/// The child allocates nothing, so the fork is sound also in a process with several threads.
pub fn spawn(
    program: &Program<'_>,
    on_failure: impl FnOnce(Stage, Errno, Option<BorrowedFd<'_>>) -> u8,
) -> nix::Result<Pid> {
    spawn_below(nix::unistd::getpid(), program, on_failure)
}

#[allow(unsafe_code)]
fn spawn_below(
    parent: Pid,
    program: &Program<'_>,
    on_failure: impl FnOnce(Stage, Errno, Option<BorrowedFd<'_>>) -> u8,
) -> nix::Result<Pid> {
    let argv = pointers(program.argv.iter());
    let environment = pointers(program.environment.iter().map(|entry| &**entry));
    let mut old = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::all()), Some(&mut old))?;
    // SAFETY: between fork and exec the child makes system calls on memory that was prepared
    // before, and nothing else.
    let forked = unsafe { fork() };
    if let Ok(ForkResult::Child) = forked {
        let mut news = program.news;
        let (stage, errno) = become_program(parent, program, &argv, &environment, &mut news);
        let status = on_failure(stage, errno, news);
        // SAFETY: _exit runs no handlers and flushes nothing of the parent's.
        unsafe { libc::_exit(i32::from(status)) }
    }
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&old), None);
    match forked? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => unreachable!("the child has become the program or has ended"),
    }
}

fn pointers<'a>(strings: impl Iterator<Item = &'a CString>) -> Vec<*const libc::c_char> {
    strings.map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
}

/// Goes through all stages up to exec, in the child. Returns only if a stage failed.
#[allow(unsafe_code)]
fn become_program(
    parent: Pid,
    program: &Program<'_>,
    argv: &[*const libc::c_char],
    environment: &[*const libc::c_char],
    news: &mut Option<BorrowedFd<'_>>,
) -> (Stage, Errno) {
    if let Err(failure) = prepare(parent, program, news) {
        return failure;
    }
    let mask = match program.blocked {
        Blocked::None => SigSet::empty(),
        Blocked::All => signals::all_but_faults(),
    };
    let _ = sigprocmask(SigmaskHow::SIG_SETMASK, Some(&mask), None);
    // SAFETY: both arrays end with a null pointer and outlive the call, as do the strings.
    unsafe {
        libc::execve(program.path.as_ptr(), argv.as_ptr(), environment.as_ptr());
    }
    (Stage::Exec, Errno::last())
}

fn prepare(
    parent: Pid,
    program: &Program<'_>,
    news: &mut Option<BorrowedFd<'_>>,
) -> Result<(), (Stage, Errno)> {
    let at = |stage: Stage| move |errno: Errno| (stage, errno);
    match program.session {
        Session::Own | Session::Terminal => drop(nix::unistd::setsid().map_err(at(Stage::Session))?),
        Session::Foreground => take_foreground().map_err(at(Stage::Session))?,
    }
    reset_handlers();
    place_descriptors(program.descriptors, news).map_err(at(Stage::Files))?;
    if program.session != Session::Foreground {
        close_the_rest_on_exec(program.descriptors.len());
    }
    if program.session == Session::Terminal {
        take_terminal(program.descriptors.len());
    }
    if let Some(score) = program.oom_score_adj {
        set_oom_score(score).map_err(at(Stage::Priority))?;
    }
    if let Some(limits) = program.limits {
        set_limits(limits).map_err(at(Stage::Priority))?;
    }
    if let Some(identity) = program.identity {
        become_user(identity)?;
    }
    if program.dies_with_parent {
        // Comes after the change of user, which clears the request.
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(at(Stage::User))?;
        // The kernel does not send the signal if the parent has died already.
        if nix::unistd::getppid() != parent {
            return Err((Stage::Fork, Errno::ESRCH));
        }
    }
    nix::unistd::chdir(program.directory).map_err(at(Stage::Directory))
}

/// Puts the child into the foreground of our terminal. The kernel would stop a background process by SIGTTOU for
/// that, unless the signal is blocked, as all are here.
fn take_foreground() -> Result<(), Errno> {
    nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(0))?;
    // Not an error without a terminal: most containers have none.
    let _ = nix::unistd::tcsetpgrp(std::io::stdin(), nix::unistd::getpgrp());
    Ok(())
}

/// Makes the first terminal among the descriptors the session's terminal, if there is one.
#[allow(unsafe_code)]
fn take_terminal(count: usize) {
    // SAFETY: the call takes no pointer; on a descriptor that is no terminal it fails and does nothing.
    let takes = |fd: RawFd| unsafe { libc::ioctl(fd, libc::TIOCSCTTY, 0) } == 0;
    let _ = (0..RawFd::try_from(count).unwrap_or(RawFd::MAX)).any(takes);
}

/// Sets the default action for all signals. Exec would reset handlers but keep ignored signals, and Rust ignores
/// SIGPIPE. This is a system call, because the C library refuses the two signals that it uses for its threads, which
/// a parent may have ignored too.
#[allow(unsafe_code)]
pub fn reset_handlers() {
    // The kernel's `struct sigaction`: handler, flags, restorer, mask. All zero is the default action.
    let default = [0u64; 4];
    for signal in 1..=64 {
        // SAFETY: sets default actions from a structure of the right size; fails harmlessly
        // for the two signals that cannot be set.
        unsafe { libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), 0, size_of::<u64>()) };
    }
}

/// Gives each descriptor its number in the child, and overwrites neither a descriptor that is still to be moved nor
/// the one for news.
#[allow(unsafe_code)]
fn place_descriptors(wanted: &[BorrowedFd<'_>], news: &mut Option<BorrowedFd<'_>>) -> Result<(), Errno> {
    let count = RawFd::try_from(wanted.len()).unwrap_or(RawFd::MAX);
    if let Some(fd) = news {
        let moved = nix::fcntl::fcntl(*fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(count))?;
        // SAFETY: the descriptor has just been made, and stays open until this process executes or exits.
        *fd = unsafe { BorrowedFd::borrow_raw(moved) };
    }
    let mut above = [-1; 8];
    if wanted.len() > above.len() {
        return Err(Errno::EINVAL);
    }
    for (copy, fd) in above.iter_mut().zip(wanted) {
        // Moved beyond all wanted numbers first.
        *copy = nix::fcntl::fcntl(*fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(count))?;
    }
    for (place, copy) in (0..count).zip(above) {
        // SAFETY: dup2 onto a number that this child owns; the copies made above have higher numbers.
        Errno::result(unsafe { libc::dup2(copy, place) })?;
    }
    Ok(())
}

/// Descriptors that we inherited ourselves must not reach the program. They close at exec and not now, because the
/// pipe that reports a failure is among them.
#[allow(unsafe_code)]
fn close_the_rest_on_exec(from: usize) {
    // SAFETY: sets a flag on descriptors of this process. A kernel before 5.11 refuses, and
    // then only descriptors that were inherited without the flag stay open.
    unsafe { libc::syscall(libc::SYS_close_range, from, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

#[allow(unsafe_code)]
fn set_oom_score(score: i16) -> Result<(), Errno> {
    // Formatted by hand, because the child must not allocate.
    let mut text = [0u8; 6];
    let mut at = text.len();
    let mut rest = score.unsigned_abs();
    loop {
        at -= 1;
        // A digit fits a byte.
        text[at] = b'0' + u8::try_from(rest % 10).unwrap_or(0);
        rest /= 10;
        if rest == 0 {
            break;
        }
    }
    if score < 0 {
        at -= 1;
        text[at] = b'-';
    }
    // SAFETY: a constant path and a buffer of this frame; the descriptor is closed here.
    unsafe {
        let fd = libc::open(c"/proc/self/oom_score_adj".as_ptr(), libc::O_WRONLY | libc::O_CLOEXEC);
        Errno::result(fd)?;
        let written = libc::write(fd, text[at..].as_ptr().cast(), text.len() - at);
        let outcome = Errno::result(written).map(drop);
        libc::close(fd);
        outcome
    }
}

/// Sets the limits of this process and of all that it starts, up to the hard limit that the container engine has set.
fn set_limits(limits: Limits) -> Result<(), Errno> {
    let (_, most) = getrlimit(Resource::RLIMIT_NPROC)?;
    let processes = limits.processes.min(most);
    setrlimit(Resource::RLIMIT_NPROC, processes, processes)?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0)
}

fn become_user(identity: &Identity) -> Result<(), (Stage, Errno)> {
    set_groups(&identity.groups).map_err(|e| (Stage::Groups, e))?;
    nix::unistd::setgid(identity.gid.into()).map_err(|e| (Stage::Groups, e))?;
    nix::unistd::setuid(identity.uid.into()).map_err(|e| (Stage::User, e))
}

#[allow(unsafe_code)]
fn set_groups(groups: &[u32]) -> Result<(), Errno> {
    // SAFETY: pointer and length of one slice. The raw call, because the C library's wrapper
    // talks to threads that a child does not have.
    Errno::result(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::descriptor;
    use std::fs::File;
    use std::io::Read as _;
    use std::os::fd::{AsFd as _, OwnedFd};

    fn program<'a>(argv: &'a [CString], descriptors: &'a [BorrowedFd<'a>]) -> Program<'a> {
        Program {
            path: argv[0].as_c_str(),
            argv,
            environment: &[],
            directory: c"/",
            descriptors,
            identity: None,
            oom_score_adj: None,
            limits: None,
            session: Session::Own,
            dies_with_parent: true,
            blocked: Blocked::None,
            news: None,
        }
    }

    fn words(words: &[&str]) -> Vec<CString> {
        words.iter().map(|w| CString::new(*w).unwrap()).collect()
    }

    fn null() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    fn outlive(child: Pid) {
        use nix::sys::wait::{Id, WaitPidFlag, waitid};
        let _ = waitid(Id::Pid(child), WaitPidFlag::WEXITED);
    }

    /// Everything that comes out of a pipe until all its writers have ended.
    fn all_of(reader: OwnedFd) -> String {
        let mut text = String::new();
        File::from(reader).read_to_string(&mut text).unwrap();
        text
    }

    /// What a child writes. Tests run in threads, so a child that another test forks at this moment holds our pipe
    /// too, until it executes.
    fn output_of(argv: &[&str], blocked: Blocked, parent: Pid) -> String {
        let (reader, writer) = descriptor::pipe().unwrap();
        let (argv, null) = (words(argv), null());
        let descriptors = [null.as_fd(), writer.as_fd(), null.as_fd()];
        let program = Program { blocked, ..program(&argv, &descriptors) };
        let pid = spawn_below(parent, &program, |stage, errno, _| {
            u8::from((stage, errno) != (Stage::Fork, Errno::ESRCH))
        });
        drop(writer);
        let text = all_of(reader);
        outlive(pid.unwrap());
        text
    }

    #[test]
    fn a_child_whose_parent_is_gone_before_it_could_ask_to_die_with_it_executes_nothing() {
        let (us, another) = (nix::unistd::getpid(), Pid::from_raw(1));
        assert_eq!(output_of(&["/bin/echo", "alive"], Blocked::None, us), "alive\n");
        assert_eq!(output_of(&["/bin/echo", "alive"], Blocked::None, another), "");
    }

    #[test]
    fn a_program_of_ours_executes_with_every_signal_blocked_and_others_with_none() {
        let mask = |blocked| {
            let argv = ["/bin/grep", "^SigBlk", "/proc/self/status"];
            let line = output_of(&argv, blocked, nix::unistd::getpid());
            u64::from_str_radix(line.trim_start_matches("SigBlk:").trim(), 16).unwrap()
        };
        assert_eq!(mask(Blocked::None), 0);
        for signal in [libc::SIGTERM, libc::SIGQUIT, libc::SIGCHLD, libc::SIGHUP] {
            assert_ne!(mask(Blocked::All) & 1 << (signal - 1), 0, "signal {signal}");
        }
    }

    #[test]
    #[allow(unsafe_code)]
    fn the_news_of_a_failure_arrive_also_from_a_descriptor_that_the_child_replaces() {
        let (reader, writer) = descriptor::pipe().unwrap();
        let (argv, null) = (words(&["/no/such/program"]), null());
        let descriptors = [null.as_fd(), null.as_fd(), null.as_fd()];
        // A forked process, so that the test's own standard error stays.
        // SAFETY: the child only calls `spawn`, and exits.
        if let ForkResult::Child = unsafe { fork() }.unwrap() {
            // SAFETY: descriptor 2 belongs to this process, and stays open.
            let news = unsafe {
                libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&writer), 2);
                BorrowedFd::borrow_raw(2)
            };
            let program = Program { news: Some(news), ..program(&argv, &descriptors) };
            let pid = spawn(&program, |stage, _, news| {
                let _ = news.map(|pipe| nix::unistd::write(pipe, &[b'0' + stage.to_byte()]));
                1
            });
            let _ = pid.map(outlive);
            // SAFETY: exits without the test harness's handlers, which must not run in the child.
            unsafe { libc::_exit(0) }
        }
        drop(writer);
        assert_eq!(all_of(reader), format!("{}", Stage::Exec.to_byte()));
    }
}
