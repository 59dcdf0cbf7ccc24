//! A fake kernel for unit tests, with virtual time, a table of child processes, and a record of starts and signals.
//! Descriptors are real, processes are not.

use crate::clock::BootTime;
use crate::kernel::Kernel;
use crate::reap::Reaped;
use crate::spawn::{Program, Stage};
use nix::errno::Errno;
use nix::poll::{PollFd, PollTimeout, poll};
use nix::unistd::Pid;
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::time::Duration;

/// A program that was started.
pub struct Started {
    pub pid: Pid,
    pub words: Vec<String>,
    pub descriptors: Vec<OwnedFd>,
}

/// How a child takes a request to end.
#[derive(Debug, Clone, Copy)]
pub enum Manners {
    /// The child ends so long after SIGTERM.
    EndsAfter(Duration),
    IgnoresTerm,
}

/// The end of a process that called exit with `code`.
pub fn exited(code: i32) -> ExitStatus {
    ExitStatus::from_raw(code << 8)
}

/// The end of a process that died of `signal`.
pub fn killed_by(signal: i32) -> ExitStatus {
    ExitStatus::from_raw(signal)
}

struct Child {
    manners: Manners,
    /// When the child dies, and how.
    death: Option<(Duration, ExitStatus)>,
    /// Whether SIGCHLD was sent for its death.
    told: bool,
}

pub struct Fake {
    epoch: BootTime,
    /// The virtual time since `epoch`.
    pub elapsed: Duration,
    signals: Vec<(Duration, i32)>,
    children: BTreeMap<i32, Child>,
    next_pid: i32,
    /// How a program behaves if one of its words contains the text. Other programs end at SIGTERM at once.
    pub manners: Vec<(&'static str, Manners)>,
    pub started: Vec<Started>,
    /// Every signal that was sent: when, to whom, which.
    pub sent: Vec<(Duration, i32, i32)>,
    /// How many turns the loop has made: each asks for signals once.
    pub turns: u32,
    /// The numbers of the turns that panic.
    pub panics: BTreeSet<u32>,
    /// Whether every turn panics.
    pub always_panics: bool,
    /// How many calls of `spawn`, or of `now`, are left until one panics.
    pub panics_at_spawn: Option<u32>,
    pub panics_at_now: Cell<Option<u32>>,
    /// By how much the next wait is late.
    pub stands_still: Option<Duration>,
    /// Whether there was a wait that nothing could end.
    pub stuck: bool,
}

impl Default for Fake {
    fn default() -> Self {
        Self {
            epoch: BootTime::since_the_kernel_began(Duration::from_secs(1_000)),
            elapsed: Duration::ZERO,
            signals: Vec::new(),
            children: BTreeMap::new(),
            next_pid: 100,
            manners: Vec::new(),
            started: Vec::new(),
            sent: Vec::new(),
            turns: 0,
            panics: BTreeSet::new(),
            always_panics: false,
            panics_at_spawn: None,
            panics_at_now: Cell::new(None),
            stands_still: None,
            stuck: false,
        }
    }
}

impl Fake {
    /// `signal` arrives at `at`.
    pub fn signal_at(&mut self, at: Duration, signal: i32) {
        self.signals.push((at, signal));
    }

    /// Adds an orphan: a child that was not started by `spawn`.
    pub fn adopt(&mut self, manners: Manners) -> Pid {
        let pid = self.next_pid;
        self.next_pid += 1;
        self.children.insert(pid, Child { manners, death: None, told: false });
        Pid::from_raw(pid)
    }

    pub fn set_manners(&mut self, pid: Pid, manners: Manners) {
        if let Some(child) = self.children.get_mut(&pid.as_raw()) {
            child.manners = manners;
        }
    }

    /// `pid` dies now.
    pub fn dies(&mut self, pid: Pid, end: ExitStatus) {
        let now = self.elapsed;
        if let Some(child) = self.children.get_mut(&pid.as_raw()) {
            child.death = Some((now, end));
        }
    }

    /// The last program that was started with `word` among its words.
    pub fn started_as(&self, word: &str) -> Option<&Started> {
        self.started.iter().rev().find(|s| s.words.iter().any(|w| w.contains(word)))
    }

    /// When `pid` was first sent `signal`.
    pub fn sent_at(&self, pid: Pid, signal: i32) -> Option<Duration> {
        let to = |to: i32| to == pid.as_raw() || to == -1;
        self.sent.iter().find(|(_, pid, sent)| to(*pid) && *sent == signal).map(|(at, ..)| *at)
    }

    pub fn lives(&self, pid: Pid) -> bool {
        self.children.get(&pid.as_raw()).is_some_and(|c| !is_over(c, self.elapsed))
    }

    fn deliver(&mut self, to: i32, signal: i32) {
        let now = self.elapsed;
        let Some(child) = self.children.get_mut(&to) else { return };
        let death = match (signal, child.manners) {
            (libc::SIGKILL | libc::SIGQUIT, _) => Some((now, killed_by(signal))),
            (libc::SIGTERM, Manners::EndsAfter(span)) if child.death.is_none() => {
                Some((now + span, exited(0)))
            }
            _ => None,
        };
        // A dead child does not die again.
        if death.is_some() && !is_over(child, now) {
            child.death = death;
        }
    }

    fn news(&self) -> bool {
        self.signals.iter().any(|(at, _)| *at <= self.elapsed)
            || self.children.values().any(|c| !c.told && is_over(c, self.elapsed))
    }
}

/// The next lower number; none after zero.
fn count_down(left: Option<u32>) -> Option<u32> {
    left.and_then(|left| left.checked_sub(1))
}

fn is_over(child: &Child, now: Duration) -> bool {
    child.death.as_ref().is_some_and(|(at, _)| *at <= now)
}

impl Kernel for Fake {
    fn now(&self) -> BootTime {
        let left = count_down(self.panics_at_now.get());
        self.panics_at_now.set(left);
        assert!(left != Some(0), "this question panics");
        self.epoch + self.elapsed
    }

    /// Time passes only here: the clock moves on to the next event.
    fn wait(&mut self, mut fds: Vec<PollFd<'_>>, until: Option<BootTime>) {
        if self.news() || poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            return;
        }
        let until = until.map(|until| until.saturating_duration_since(self.epoch));
        let signals = self.signals.iter().map(|(at, _)| *at);
        let deaths = self.children.values().filter(|c| !c.told).filter_map(|c| c.death.as_ref());
        let next = signals.chain(deaths.map(|(at, _)| *at)).chain(until).min();
        self.stuck |= next.is_none();
        let next = next.expect("nothing will ever happen again, and the loop went to sleep");
        self.elapsed = self.elapsed.max(next) + self.stands_still.take().unwrap_or_default();
    }

    fn signals(&mut self) -> Vec<i32> {
        self.turns += 1;
        assert!(!self.always_panics && !self.panics.contains(&self.turns), "this turn panics");
        let now = self.elapsed;
        let mut arrived: Vec<i32> =
            self.signals.extract_if(.., |(at, _)| *at <= now).map(|(_, signal)| signal).collect();
        for child in self.children.values_mut().filter(|c| !c.told && is_over(c, now)) {
            child.told = true;
            arrived.push(libc::SIGCHLD);
        }
        arrived.sort_unstable();
        arrived.dedup();
        arrived
    }

    fn reap(&mut self) -> Reaped {
        let now = self.elapsed;
        let Some((&pid, _)) = self.children.iter().find(|(_, c)| is_over(c, now)) else {
            return if self.children.is_empty() { Reaped::Childless } else { Reaped::Later };
        };
        let end = self.children.remove(&pid).and_then(|c| c.death).map_or(exited(0), |(_, end)| end);
        Reaped::One(Pid::from_raw(pid), end)
    }

    fn spawn(
        &mut self,
        program: &Program<'_>,
        _on_failure: impl FnOnce(Stage, Errno, Option<BorrowedFd<'_>>) -> u8,
    ) -> nix::Result<Pid> {
        self.panics_at_spawn = count_down(self.panics_at_spawn);
        assert!(self.panics_at_spawn != Some(0), "this start panics");
        let words: Vec<String> = program.argv.iter().map(|w| w.to_string_lossy().into_owned()).collect();
        let known = self.manners.iter().find(|(part, _)| words.iter().any(|w| w.contains(part)));
        let pid = self.adopt(known.map_or(Manners::EndsAfter(Duration::ZERO), |(_, manners)| *manners));
        let copies = program.descriptors.iter().map(BorrowedFd::try_clone_to_owned);
        let descriptors = copies.collect::<Result<_, _>>().map_err(|_| Errno::EMFILE)?;
        self.started.push(Started { pid, words, descriptors });
        Ok(pid)
    }

    fn kill(&mut self, pid: Pid, signal: i32) {
        self.sent.push((self.elapsed, pid.as_raw(), signal));
        if pid.as_raw() == -1 {
            self.children
                .keys()
                .copied()
                .collect::<Vec<_>>()
                .into_iter()
                .for_each(|p| self.deliver(p, signal));
        } else {
            self.deliver(pid.as_raw(), signal);
        }
    }

    fn children(&self) -> Vec<Pid> {
        self.children.keys().copied().map(Pid::from_raw).collect()
    }

    fn signal_descendants(&mut self, signal: i32) {
        for pid in self.children() {
            self.kill(pid, signal);
        }
    }

    fn kill_descendants(&mut self) -> u32 {
        let living = self.children.values().filter(|c| !is_over(c, self.elapsed)).count();
        self.signal_descendants(libc::SIGKILL);
        u32::try_from(living).unwrap_or(u32::MAX)
    }
}
