//! The keeper's loop waits in one place for signals, the program's output, its exec, and its probes.

use crate::lines::Lines;
use crate::logbook::Logbook;
use crate::probe::Prober;
use crate::progress::Progress;
use crate::report::Reporter;
use cvm_protocol::accounts::Account;
use cvm_protocol::exit_status::{End, Stage};
use cvm_protocol::keeper::{Channel, KeeperReport, KeeperSpec, Leftovers, Log, descriptors};
use cvm_sys::clock::BootTime;
use cvm_sys::kernel::{Kernel, Linux, readable, writable};
use cvm_sys::reap::Reaped;
use cvm_sys::spawn::{Blocked, Identity, Limits, Program, Session};
use cvm_sys::{descriptor, memfd, process_tree};
use nix::errno::Errno;
use nix::unistd::Pid;
use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

/// Output is read in pieces of a quarter of a pipe's usual capacity.
const READ_SIZE: usize = 16 * 1024;
/// The supervisor's own log rotates at this size; each service has its own `rotate_bytes`.
const OWN_LOG_BYTES: u64 = 10 * 1024 * 1024;

/// The most children that one turn of the loop reaps, so that signals and output are served in between.
const REAPS_A_TURN: usize = 4096;
/// How long the last reports may wait for room in the pipe. Without them PID 1 looks for leftover processes itself.
const LAST_REPORTS_WAIT: Duration = Duration::from_secs(1);
/// Dropped lines are reported at most this often, so that a flood does not fill the supervisor's log too.
const BETWEEN_DROPS: Duration = Duration::from_secs(10);

/// Whether the loop goes on after a turn.
enum Turn {
    Go,
    Over,
}

struct Keeper<K> {
    leftovers: Leftovers,
    reporter: Reporter,
    kernel: K,
    main: Pid,
    lifeline: Lifeline,
    /// A pipe: the failed stage comes out of it, or end of file when the program executes.
    exec: Option<OwnedFd>,
    failed: Option<(Stage, i32)>,
    /// How the main process ended, once it has.
    end: Option<End>,
    output: Option<OwnedFd>,
    lines: Lines,
    log: Logbook,
    /// Liveness, startup and readiness. The startup probe is removed after its first yes.
    probers: [Option<Prober>; 3],
    /// Signs of work, looked for until the start is over.
    progress: Option<Progress>,
    /// The readiness that was reported last, and the failing parts that were reported with it.
    ready: bool,
    failing: Vec<String>,
    /// Whether the keeper sent a SIGKILL: then a death by SIGKILL is not the out-of-memory killer's.
    killed_by_us: bool,
    killed: u32,
    /// Whether ended children may be left unreaped, of which no further SIGCHLD will tell.
    unreaped: bool,
    oom_kills: Option<u64>,
    dropped_said: u64,
    dropped_at: Option<BootTime>,
}

/// How the main process is asked to end.
enum Lifeline {
    /// By SIGTERM.
    None,
    /// By closing this end of a pipe.
    Held(OwnedFd),
    /// The main process has been asked to end.
    Closed,
}

/// Keeps one program until nothing of it is left.
pub(crate) fn keep(spec: KeeperSpec) -> Result<(), String> {
    let pipe = descriptor::inherited(descriptors::REPORTS).map_err(|e| format!("the report pipe: {e}"))?;
    let reporter = Reporter::new(pipe).map_err(|e| format!("the report pipe: {}", e.desc()))?;
    let given = ProgramInput::of(&spec.channel).map_err(|e| format!("what the program is given: {e}"))?;
    if spec.leftovers == Leftovers::Kill {
        process_tree::adopt_orphans().map_err(|e| format!("becoming the one who adopts orphans: {e}"))?;
    }
    let kernel = Linux::taking(&[libc::SIGCHLD, libc::SIGTERM, libc::SIGQUIT])
        .map_err(|e| format!("taking signals: {e}"))?;
    if let Some(mut keeper) = begin(kernel, &spec, &given, reporter) {
        // The program has its copies, so the secrets in ours are wiped.
        drop((spec, given));
        while matches!(keeper.turn(), Turn::Go) {}
    }
    Ok(())
}

/// Starts the program. If that fails, reports it and returns none.
fn begin<K: Kernel>(
    mut kernel: K,
    spec: &KeeperSpec,
    given: &ProgramInput,
    mut reporter: Reporter,
) -> Option<Keeper<K>> {
    let oom_kills = oom_kills();
    let started = match start(&mut kernel, spec, given) {
        Ok(started) => started,
        Err((stage, errno)) => {
            let end = End::NotStarted { stage, errno: errno as i32 };
            reporter.send(&KeeperReport::MainEnded { end: end.clone() });
            reporter.send(&KeeperReport::TreeGone { end, killed: 0 });
            return None;
        }
    };
    let now = kernel.now();
    let prober = |probe: &Option<_>| probe.clone().map(|p| Prober::new(p, now));
    Some(Keeper {
        leftovers: spec.leftovers,
        kernel,
        main: started.pid,
        lifeline: started.lifeline,
        exec: Some(started.exec),
        failed: None,
        end: None,
        output: Some(started.output),
        lines: Lines::default(),
        log: Logbook::open(&spec.name, &spec.log, false),
        probers: [prober(&spec.liveness), prober(&spec.startup), prober(&spec.readiness)],
        progress: spec.liveness.is_some().then(|| Progress::new(now)),
        ready: false,
        failing: Vec::new(),
        killed_by_us: false,
        killed: 0,
        unreaped: false,
        oom_kills,
        dropped_said: 0,
        dropped_at: None,
        reporter,
    })
}

struct Started {
    pid: Pid,
    exec: OwnedFd,
    output: OwnedFd,
    lifeline: Lifeline,
}

/// The program's standard input and its report pipe.
struct ProgramInput {
    input: OwnedFd,
    report_pipe: Option<OwnedFd>,
}

impl ProgramInput {
    /// Must be called before the keeper opens a descriptor: a descriptor that PID 1 did not hand over is then an
    /// error, and not another file with the same number.
    fn of(channel: &Channel) -> std::io::Result<Self> {
        let of_the_program = || descriptor::inherited(descriptors::OF_THE_PROGRAM);
        Ok(match channel {
            Channel::None => Self { input: memfd::sealed(c"input", &[])?, report_pipe: None },
            Channel::Task(work) => {
                let report_pipe = Some(of_the_program()?);
                Self { input: memfd::sealed(c"input", &work.unpack().unwrap_or_default())?, report_pipe }
            }
            Channel::Service => {
                let report_pipe = Some(of_the_program()?);
                Self { input: descriptor::inherited(descriptors::SPECIFICATION)?, report_pipe }
            }
        })
    }
}

/// The program's end of the lifeline and the keeper's.
fn lifeline_of(channel: &Channel) -> nix::Result<(Option<OwnedFd>, Lifeline)> {
    match channel {
        Channel::None | Channel::Task(_) => Ok((None, Lifeline::None)),
        Channel::Service => {
            let (theirs, ours) = descriptor::pipe()?;
            Ok((Some(theirs), Lifeline::Held(ours)))
        }
    }
}

fn start(
    kernel: &mut impl Kernel,
    spec: &KeeperSpec,
    given: &ProgramInput,
) -> Result<Started, (Stage, Errno)> {
    let at_files = |errno: Errno| (Stage::Files, errno);
    let (output, output_theirs) = descriptor::pipe().map_err(at_files)?;
    let (exec, exec_theirs) = descriptor::pipe().map_err(at_files)?;
    descriptor::set_nonblocking(&output).map_err(at_files)?;
    descriptor::set_nonblocking(&exec).map_err(at_files)?;
    let (lifeline_theirs, lifeline) = lifeline_of(&spec.channel).map_err(at_files)?;
    let identity = identity_of(&spec.user)?;
    let words = |e| (Stage::Exec, e);
    let argv = c_strings(spec.argv.iter().map(|a| a.clone().into_bytes())).map_err(words)?;
    let mut environment = spec.environment.unpack_for_exec().ok_or((Stage::Exec, Errno::EINVAL))?;
    environment.push(CString::new(format!("CVM_RUN={}", spec.run)).map_err(|_| words(Errno::EINVAL))?.into());
    let directory = CString::new(spec.directory.as_str()).map_err(|_| (Stage::Directory, Errno::EINVAL))?;
    let out = output_theirs.as_fd();
    let mut descriptors = vec![given.input.as_fd(), out, out];
    descriptors.extend(given.report_pipe.as_ref().map(AsFd::as_fd));
    descriptors.extend(lifeline_theirs.as_ref().map(AsFd::as_fd));
    let program = Program {
        path: argv.first().ok_or((Stage::Exec, Errno::EINVAL))?,
        argv: &argv,
        environment: &environment,
        directory: &directory,
        descriptors: &descriptors,
        identity: identity.as_ref(),
        oom_score_adj: (spec.oom_score_adj != 0).then_some(spec.oom_score_adj),
        limits: spec.limits.map(|limits| Limits { processes: limits.processes }),
        session: Session::Own,
        dies_with_parent: true,
        blocked: Blocked::None,
        news: Some(exec_theirs.as_fd()),
    };
    let pid = kernel
        .spawn(&program, |stage, errno, pipe| {
            let mut news = [stage.to_byte(), 0, 0, 0, 0];
            news[1..].copy_from_slice(&(errno as i32).to_ne_bytes());
            if let Some(pipe) = pipe {
                let _ = nix::unistd::write(pipe, &news);
            }
            127
        })
        .map_err(|errno| (Stage::Fork, errno))?;
    Ok(Started { pid, exec, output, lifeline })
}

/// Root needs no change of identity, and works without a readable /etc/passwd.
fn identity_of(user: &str) -> Result<Option<Identity>, (Stage, Errno)> {
    if user == "root" {
        return Ok(None);
    }
    let read = |path: &str| std::fs::read_to_string(path).map_err(|_| (Stage::Account, Errno::ENOENT));
    let account = Account::find(&read("/etc/passwd")?, &read("/etc/group")?, user)
        .ok_or((Stage::Account, Errno::ESRCH))?;
    Ok(Some(Identity { uid: account.uid, gid: account.gid, groups: account.groups }))
}

fn c_strings(words: impl Iterator<Item = Vec<u8>>) -> Result<Vec<CString>, Errno> {
    words.map(|w| CString::new(w).map_err(|_| Errno::EINVAL)).collect()
}

impl<K: Kernel> Keeper<K> {
    fn turn(&mut self) -> Turn {
        self.wait();
        self.reporter.flush();
        for signal in self.kernel.signals() {
            match signal {
                libc::SIGTERM => self.end_main(),
                libc::SIGQUIT => self.kill_tree(),
                // SIGCHLD: every turn reaps.
                _ => {}
            }
        }
        self.read_exec();
        self.read_output();
        self.ask_probes();
        let childless = self.reap();
        if self.end.is_some() && (childless || self.leftovers == Leftovers::Leave) {
            self.farewell();
            return Turn::Over;
        }
        Turn::Go
    }

    fn wait(&mut self) {
        let mut fds: Vec<_> = self.exec.iter().map(|fd| readable(fd.as_fd())).collect();
        fds.extend(self.output.iter().map(|fd| readable(fd.as_fd())));
        fds.extend(self.reporter.interest().map(writable));
        let probing = self.end.is_none();
        let probers = || self.probers.iter().flatten().filter(|_| probing);
        fds.extend(probers().filter_map(|p| {
            let (fd, writes) = p.interest()?;
            Some(if writes { writable(fd) } else { readable(fd) })
        }));
        let progress = self.progress.iter().filter(|_| probing).map(Progress::deadline);
        let at_once = self.unreaped.then(|| self.kernel.now());
        let until = probers().map(Prober::deadline).chain(progress).chain(at_once).min();
        self.kernel.wait(fds, until);
    }

    fn end_main(&mut self) {
        if self.end.is_some() {
            return;
        }
        match std::mem::replace(&mut self.lifeline, Lifeline::Closed) {
            Lifeline::None => {
                self.lifeline = Lifeline::None;
                self.kernel.kill(self.main, libc::SIGTERM);
            }
            Lifeline::Held(end) => drop(end),
            Lifeline::Closed => {}
        }
    }

    /// Kills every process below the keeper. Processes that are orphaned by that become children of the keeper, and
    /// `reap` kills them.
    fn kill_tree(&mut self) {
        self.killed_by_us = true;
        if self.leftovers == Leftovers::Leave {
            // The other processes are somebody's work (a login session), even if the service ignores SIGTERM.
            if self.end.is_none() {
                self.kernel.kill(self.main, libc::SIGKILL);
            }
            return;
        }
        let killed = self.kernel.kill_descendants();
        if self.end.is_some() {
            self.killed += killed;
        }
    }

    fn read_exec(&mut self) {
        let Some(pipe) = &self.exec else { return };
        let mut news = [0u8; 5];
        match nix::unistd::read(pipe, &mut news) {
            Ok(5) => {
                let [stage, errno @ ..] = news;
                let stage = Stage::from_byte(stage).unwrap_or(Stage::Exec);
                self.failed = Some((stage, i32::from_ne_bytes(errno)));
            }
            Err(Errno::EAGAIN | Errno::EINTR) => return,
            // End of file: exec closed the pipe.
            Ok(_) | Err(_) => self.reporter.send(&KeeperReport::Started { pid: self.main.as_raw() }),
        }
        self.exec = None;
    }

    fn read_output(&mut self) {
        let Some(pipe) = &self.output else { return };
        let mut bytes = [0u8; READ_SIZE];
        // Bounded, so that a program that writes without end cannot keep the loop from signals.
        for _ in 0..64 {
            match nix::unistd::read(pipe, &mut bytes) {
                Ok(0) => {
                    self.output = None;
                    break;
                }
                Ok(n) => self.lines.feed(bytes.get(..n).unwrap_or_default(), |line| self.log.put(line)),
                Err(_) => break,
            }
        }
        let now = self.kernel.now();
        if self.dropped_at.is_none_or(|at| now.saturating_duration_since(at) >= BETWEEN_DROPS) {
            self.report_dropped();
        }
    }

    fn report_dropped(&mut self) {
        let dropped = self.log.dropped();
        if dropped > self.dropped_said {
            self.reporter.send(&KeeperReport::Dropped { lines: dropped - self.dropped_said });
            self.dropped_said = dropped;
            self.dropped_at = Some(self.kernel.now());
        }
    }

    fn ask_probes(&mut self) {
        if self.end.is_some() || self.exec.is_some() {
            return;
        }
        let now = self.kernel.now();
        let [liveness, startup, readiness] = &mut self.probers;
        if let Some(ok) = liveness.as_mut().and_then(|p| p.turn(now)) {
            self.reporter.send(&KeeperReport::Liveness { ok });
            if ok && startup.is_none() {
                self.progress = None;
            }
        }
        if startup.as_mut().and_then(|p| p.turn(now)) == Some(true) {
            self.reporter.send(&KeeperReport::StartOver);
            (*startup, self.progress) = (None, None);
        }
        if self.progress.as_mut().is_some_and(|p| p.turn(now)) {
            self.reporter.send(&KeeperReport::Works);
        }
        let Some(prober) = readiness else { return };
        let Some(ok) = prober.turn(now) else { return };
        if ok != self.ready {
            self.ready = ok;
            self.reporter.send(&KeeperReport::Readiness { ok });
        }
        if prober.failing() != self.failing {
            self.failing = prober.failing().to_vec();
            self.reporter.send(&KeeperReport::Failing { parts: self.failing.clone() });
        }
    }

    /// Reaps ended children. Returns whether no child is left.
    fn reap(&mut self) -> bool {
        self.unreaped = true;
        let mut childless = false;
        for _ in 0..REAPS_A_TURN {
            match self.kernel.reap() {
                Reaped::One(pid, end) if pid == self.main => self.main_ended(end.into()),
                Reaped::One(..) => {}
                other => {
                    self.unreaped = false;
                    childless = other == Reaped::Childless;
                    break;
                }
            }
        }
        // Zombies that are not reaped yet would be counted as killed.
        let living = !childless && !self.unreaped;
        if living && self.end.is_some() && self.leftovers == Leftovers::Kill {
            self.kill_tree();
        }
        childless
    }

    fn main_ended(&mut self, end: End) {
        // Read first, because the exec pipe says why a process that never ran ended with 127.
        self.read_exec();
        let end = match (self.failed, end) {
            (Some((stage, errno)), _) => End::NotStarted { stage, errno },
            (None, End::Signal(libc::SIGKILL)) if !self.killed_by_us && oom_kills() > self.oom_kills => {
                End::OutOfMemory
            }
            (None, end) => end,
        };
        self.reporter.send(&KeeperReport::MainEnded { end: end.clone() });
        self.end = Some(end);
    }

    fn farewell(&mut self) {
        self.read_output();
        self.lines.finish(|line| self.log.put(line));
        self.report_dropped();
        self.log.close();
        let end = self.end.clone().unwrap_or(End::Unseen);
        self.reporter.send(&KeeperReport::TreeGone { end, killed: self.killed });
        let until = self.kernel.now() + LAST_REPORTS_WAIT;
        while let Some(pipe) = self.reporter.interest()
            && self.kernel.now() < until
        {
            self.kernel.wait(vec![writable(pipe)], Some(until));
            self.kernel.signals();
            self.reporter.flush();
        }
    }
}

/// How often the kernel's out-of-memory killer has killed. A confidential VM has a kernel of its own.
fn oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|line| line.strip_prefix("oom_kill ")?.parse().ok())
}

/// Writes standard input into a rotating file, until nobody writes to it any more.
pub(crate) fn log_only(file: &str) -> Result<(), String> {
    let input = descriptor::inherited(0).map_err(|e| format!("standard input: {e}"))?;
    // Ends at the end of its input and not by a signal, so that the last lines of a shutdown are written.
    let log = Log { file: file.to_owned(), rotate_bytes: OWN_LOG_BYTES, copy_to_stdout: false, json: false };
    let book = Logbook::open("", &log, true);
    let mut lines = Lines::default();
    let mut bytes = vec![0u8; READ_SIZE];
    loop {
        match nix::unistd::read(&input, &mut bytes) {
            Ok(0) => break,
            Ok(n) => lines.feed(bytes.get(..n).unwrap_or_default(), |line| book.put(line)),
            Err(Errno::EINTR) => {}
            Err(error) => return Err(format!("reading its input: {error}")),
        }
    }
    lines.finish(|line| book.put(line));
    book.close();
    Ok(())
}

#[cfg(test)]
mod tests;
