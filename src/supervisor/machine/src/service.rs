//! The life of one service, as a pure state machine.
//!
//! ```text
//!            start                 exec'd               main ended
//! Idle ─┬──────────> Preparing ─> Starting ──> Running ──────────┐
//! Down ─┤ (if it has a step)          │            │ stop, silence │
//! Parked┘                             └── failed ──┤             v
//!   ^ ^                                            └────────> Ending (term → tree → keeper → orphans)
//!   │ └── 78 twice ──────────────┐                               │ everything of this run is gone
//!   └──── stop ──────────────────┴───────────── judge ───────────┘
//!                                   Waiting <── failure │ 78 once ──> Repairing ──> start
//! ```
//!
//! A gate that the service needs may close while it runs: `Withdraw` ends the run and takes the service back to
//! Idle. While the service is held, because others still use what an earlier run provided, no run begins.
//!
//! One `Run` is one attempt with everything it left behind. A run ends when nothing of its
//! process tree is left, and only then may the next begin: that is the whole of "never two
//! of one service". Events of an older run are ignored.
//!
//! It knows no clocks, no other service, and not what a service is for.

use crate::backoff::Backoff;
use crate::moment::Moment;
use cvm_protocol::exit_status::End;
use cvm_protocol::report::Level;
use cvm_protocol::time::words;
use std::time::Duration;

/// One attempt of one service, counted from 1 for each service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Run(pub u64);

/// What this machine needs to know of a service.
#[derive(Debug, Clone)]
pub struct Rules {
    pub backoff: Backoff,
    /// How long the main process has between SIGTERM and the end of its tree.
    pub grace: Duration,
    /// Whether a step runs before each start, and for how long at most.
    pub prepare: Option<Duration>,
    /// Whether exit code 78 has a repair command, and how long that may take.
    pub repair: Option<Duration>,
    pub liveness: Option<Liveness>,
    /// Without a startup probe its start is over with the first answer to the liveness probe.
    pub has_startup: bool,
    /// Without a readiness probe a service is ready when it runs.
    pub has_readiness: bool,
}

/// When a process that runs counts as hung.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Liveness {
    /// How long it may show no sign of work until its start is over.
    pub start: Duration,
    /// How long its first answer may take, however hard it works.
    pub start_at_most: Duration,
    /// Silence allowed once its start is over.
    pub silence: Duration,
}

/// `EX_CONFIG`: the service says its configuration is wrong, so trying again cannot help.
pub const EXIT_CONFIG: i32 = 78;
/// How long a start may take from fork to exec. An exec that takes longer hangs on its disk.
const EXEC_DEADLINE: Duration = Duration::from_secs(30);
/// From the order to kill a tree to its end. SIGKILL is immediate unless the kernel is stuck.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// Grace for a process that already showed that it does not answer.
const HUNG_GRACE: Duration = Duration::from_secs(10);
/// Runs shorter than this that end with code 0 are counted, so that "restart at once" cannot spin.
const QUICK_RUN: Duration = Duration::from_secs(10);
/// How many quick ends with code 0 in a row are restarted at once before the backoff applies.
const QUICK_RUNS_MAX: u32 = 3;
/// The least wait after a failure in which nothing ran: with a configured wait of zero, a fork
/// that fails at once would otherwise be tried for ever without a turn of the loop between.
const NOTHING_RAN_WAIT: Duration = Duration::from_secs(1);
/// Failures in a row, none of them after a stable run, that make a crash loop.
pub const CRASH_LOOP: u32 = 5;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Not asked for yet.
    Idle,
    Preparing {
        run: Run,
        since: Moment,
    },
    /// The keeper was asked for; the program has not been exec'd yet.
    Starting {
        run: Run,
        since: Moment,
    },
    Running {
        run: Run,
        pid: i32,
        since: Moment,
        ready: bool,
        life: Life,
    },
    Repairing {
        run: Run,
        since: Moment,
    },
    Ending {
        run: Run,
        pid: Option<i32>,
        started: Option<Moment>,
        phase: Phase,
        until: Moment,
        then: Then,
        end: Option<End>,
    },
    Waiting {
        until: Moment,
    },
    /// Given up until an operator acts.
    Parked {
        why: String,
    },
    /// Stopped on purpose.
    Down,
}

/// What a running service has shown of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// Its start is not over. A start is judged by progress and not by a clock: a gateway with hundreds of
    /// agents, or one that migrates its databases, works for many minutes before it answers.
    Starting {
        /// The last sign of work: processor time, bytes to or from a disk, an answer.
        progress: Moment,
        /// Whether it has answered its liveness probe.
        answered: bool,
    },
    Started {
        /// The last answer to the liveness probe.
        answered: Moment,
    },
}

/// How hard a run is being ended; only ever grows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// SIGTERM to the main process alone.
    Term,
    /// Main is gone or out of time: the keeper kills what is left of the tree.
    Tree,
    /// The keeper did not report in time and is killed.
    Keeper,
    /// The keeper was killed: a one-shot process looks for what it left behind.
    Orphans,
    /// Even that did not help; the kernel holds a process. Nothing is started over it.
    Stuck,
}

/// What follows when a run has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Then {
    /// It ended by itself: judge how.
    Judge,
    /// We ended it because it had failed.
    Fail(String),
    /// The operator wants a fresh one.
    Restart,
    StayDown,
    /// A gate that it needs has closed: it starts again when the gate opens.
    Withdrawn,
    /// It was a repair command: start the service again, whatever came of it.
    AfterRepair,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Start,
    Stop,
    Restart,
    /// The machine goes down: end it and refuse every later start.
    Close,
    /// A gate that it needs has closed: end it, and be ready to start anew.
    Withdraw,
    /// Do not wait any longer.
    Hurry,
    Prepared {
        run: Run,
        outcome: Result<(), Refusal>,
    },
    Exec {
        run: Run,
        pid: i32,
    },
    /// The main process ended; its tree may not have.
    MainEnded {
        run: Run,
        end: End,
    },
    /// Nothing of the run is left (or, with [`End::Unseen`], nobody knows).
    Gone {
        run: Run,
        end: End,
    },
    Swept {
        run: Run,
    },
    Alive {
        run: Run,
    },
    /// It works, whether or not it answers.
    Works {
        run: Run,
    },
    /// Its start is over.
    StartOver {
        run: Run,
    },
    Readiness {
        run: Run,
        ready: bool,
    },
    /// The parts that keep it from being ready. An empty list takes the last one back.
    Failing {
        run: Run,
        parts: Vec<String>,
    },
    Tick,
}

/// Why a boot step, or the task before a start, did not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub why: String,
    /// Whether the same attempt can succeed later.
    pub retry: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    Prepare(Run),
    Launch(Run),
    Repair(Run),
    /// SIGTERM to the main process.
    Term(Run),
    /// End the whole tree now.
    KillTree(Run),
    /// The keeper itself does not answer.
    KillKeeper(Run),
    /// Look for what a killed keeper left behind, and end it.
    Sweep(Run),
    Say(Level, String),
}

/// A past run, for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    pub end: Option<End>,
    pub why: Option<String>,
    pub ran: Duration,
    pub at: Moment,
}

#[derive(Debug, Clone)]
pub struct Unit {
    rules: Rules,
    state: State,
    runs: u64,
    launches: u64,
    failures: u32,
    first_failure: Option<Moment>,
    quick_runs: u32,
    repaired: bool,
    closed: bool,
    held: bool,
    last: Option<Past>,
    /// The parts that the current run names as failing.
    failing: Vec<String>,
}

impl Unit {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            state: State::Idle,
            runs: 0,
            launches: 0,
            failures: 0,
            first_failure: None,
            quick_runs: 0,
            repaired: false,
            closed: false,
            held: false,
            last: None,
            failing: Vec::new(),
        }
    }

    pub fn state(&self) -> &State {
        &self.state
    }

    pub fn last(&self) -> Option<&Past> {
        self.last.as_ref()
    }

    /// A run goes on, and a run that is being ended ends, but no run begins any more.
    pub fn refuse_starts(&mut self) {
        self.closed = true;
    }

    /// While the service is held no run begins, however long that takes.
    pub fn hold(&mut self, held: bool) {
        self.held = held;
    }

    pub fn is_held(&self) -> bool {
        self.held
    }

    /// It was stopped while it could not start anyway, and now an operator wants it after all.
    pub fn rearm(&mut self) {
        match &mut self.state {
            _ if self.closed => {}
            State::Down => self.state = State::Idle,
            State::Ending { then, .. } if *then == Then::StayDown => *then = Then::Withdrawn,
            _ => {}
        }
    }

    /// The parts that the current run names as failing. The names are the program's own, and private.
    pub fn failing(&self) -> &[String] {
        &self.failing
    }

    /// Starts beyond the first.
    pub fn restarts(&self) -> u64 {
        self.launches.saturating_sub(1)
    }

    /// Failures in a row without a stable run between them.
    pub fn failures(&self) -> u32 {
        self.failures
    }

    pub fn in_crash_loop(&self) -> bool {
        self.failures >= CRASH_LOOP
    }

    /// Whether nothing of this service is alive.
    pub fn is_at_rest(&self) -> bool {
        matches!(self.state, State::Idle | State::Waiting { .. } | State::Parked { .. } | State::Down)
    }

    /// Whether it was stopped on purpose, or can never be ended.
    pub fn is_finished(&self) -> bool {
        matches!(self.state, State::Down | State::Ending { phase: Phase::Stuck, .. })
    }

    /// The run that is alive, if one is.
    pub fn run(&self) -> Option<Run> {
        match self.state {
            State::Preparing { run, .. }
            | State::Starting { run, .. }
            | State::Running { run, .. }
            | State::Repairing { run, .. }
            | State::Ending { run, .. } => Some(run),
            State::Idle | State::Waiting { .. } | State::Parked { .. } | State::Down => None,
        }
    }

    /// When this machine wants a [`Event::Tick`] at the latest.
    pub fn deadline(&self) -> Option<Moment> {
        match &self.state {
            State::Preparing { since, .. } => self.rules.prepare.map(|d| *since + d),
            State::Starting { since, .. } => Some(*since + EXEC_DEADLINE),
            State::Repairing { since, .. } => self.rules.repair.map(|d| *since + d),
            State::Running { since, life, .. } => self.silence_limit(*since, *life),
            State::Ending { phase: Phase::Stuck, .. } => None,
            State::Waiting { .. } if self.held => None,
            State::Ending { until, .. } | State::Waiting { until } => Some(*until),
            State::Idle | State::Parked { .. } | State::Down => None,
        }
    }

    /// When a service that shows nothing more of itself counts as hung.
    pub fn silence_limit(&self, since: Moment, life: Life) -> Option<Moment> {
        let limits = self.rules.liveness?;
        Some(match life {
            Life::Starting { progress, answered: false } => {
                (progress + limits.start).min(since + limits.start_at_most)
            }
            Life::Starting { progress, answered: true } => progress + limits.start,
            Life::Started { answered } => answered + limits.silence,
        })
    }

    /// The one entrance: an event changes the state and yields what is to be done.
    pub fn step(&mut self, event: Event, now: Moment) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Start => self.on_start(now, &mut out),
            Event::Stop => self.on_stop(Then::StayDown, now, &mut out),
            Event::Restart => self.on_restart(now, &mut out),
            Event::Close => {
                self.closed = true;
                self.on_stop(Then::StayDown, now, &mut out);
            }
            Event::Withdraw => self.on_withdraw(now, &mut out),
            Event::Hurry => self.on_hurry(now, &mut out),
            Event::Prepared { run, outcome } => self.on_prepared(run, outcome, now, &mut out),
            Event::Exec { run, pid } => self.on_exec(run, pid, now),
            Event::MainEnded { run, end } => self.on_main_ended(run, end, now, &mut out),
            Event::Gone { run, end } => self.on_gone(run, end, now, &mut out),
            Event::Swept { run } => self.on_swept(run, now, &mut out),
            Event::Alive { run } => self.on_alive(run, now),
            Event::Works { run } => self.on_work(run, now),
            Event::StartOver { run } => self.on_start_over(run, now),
            Event::Failing { run, parts } if self.run() == Some(run) => self.failing = parts,
            Event::Failing { .. } => {}
            Event::Readiness { run, ready } => self.on_readiness(run, ready, now, &mut out),
            Event::Tick => self.on_tick(now, &mut out),
        }
        out
    }

    fn on_start(&mut self, now: Moment, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Idle => self.begin(now, out),
            State::Down | State::Parked { .. } | State::Waiting { .. } => {
                self.forget_failures();
                self.begin(now, out);
            }
            // The operator changed their mind while the service was being stopped.
            State::Ending { then, .. } if *then == Then::StayDown && !self.closed => *then = Then::Restart,
            _ => {}
        }
    }

    fn on_restart(&mut self, now: Moment, out: &mut Vec<Action>) {
        if self.is_at_rest() {
            self.on_start(now, out);
        } else {
            self.on_stop(Then::Restart, now, out);
        }
    }

    fn on_stop(&mut self, wanted: Then, now: Moment, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Idle | State::Waiting { .. } | State::Parked { .. } => self.state = State::Down,
            State::Down => {}
            // A run that is being ended already keeps its phase; only what follows changes.
            State::Ending { then, .. } => *then = wanted,
            State::Running { .. } => {
                let grace = self.rules.grace;
                self.end_main(wanted, grace, now, out);
            }
            State::Preparing { .. } | State::Starting { .. } | State::Repairing { .. } => {
                self.kill_tree(wanted, now, out);
            }
        }
    }

    /// A service that an operator has stopped, or that is parked, stays so: it was not waiting for the gate.
    fn on_withdraw(&mut self, now: Moment, out: &mut Vec<Action>) {
        match &self.state {
            State::Idle | State::Parked { .. } | State::Down => {}
            State::Ending { then: Then::StayDown, .. } => {}
            State::Waiting { .. } => self.state = State::Idle,
            _ => self.on_stop(Then::Withdrawn, now, out),
        }
    }

    fn on_hurry(&mut self, now: Moment, out: &mut Vec<Action>) {
        match &self.state {
            State::Ending { phase, then, .. } if *phase == Phase::Term => {
                let then = then.clone();
                self.kill_tree(then, now, out);
            }
            State::Ending { .. } => {}
            _ if self.is_at_rest() => {}
            _ => self.kill_tree(Then::StayDown, now, out),
        }
    }

    fn on_prepared(&mut self, of: Run, outcome: Result<(), Refusal>, now: Moment, out: &mut Vec<Action>) {
        match self.state {
            State::Preparing { run, .. } if run == of && self.closed => self.state = State::Down,
            State::Preparing { run, .. } if run == of => match outcome {
                Ok(()) => self.launch(run, now, out),
                Err(Refusal { why, retry: true }) => self.fail(None, why, Duration::ZERO, now, out),
                Err(Refusal { why, retry: false }) => self.park(why, out),
            },
            // The step was killed because it took too long, or because of a stop.
            State::Ending { run, .. } if run == of => self.conclude(now, out),
            _ => {}
        }
    }

    fn on_exec(&mut self, of: Run, pid: i32, now: Moment) {
        match &mut self.state {
            State::Starting { run, .. } if *run == of => {
                let ready = !self.rules.has_readiness;
                let life = Life::Starting { progress: now, answered: false };
                self.state = State::Running { run: of, pid, since: now, ready, life };
            }
            State::Ending { run, pid: known, .. } if *run == of => *known = Some(pid),
            _ => {}
        }
    }

    fn on_main_ended(&mut self, of: Run, how: End, now: Moment, out: &mut Vec<Action>) {
        match &mut self.state {
            State::Running { run, pid, since, .. } if *run == of => {
                let (pid, since) = (*pid, *since);
                self.state = State::Ending {
                    run: of,
                    pid: Some(pid),
                    started: Some(since),
                    phase: Phase::Tree,
                    until: now + KILL_DEADLINE,
                    then: Then::Judge,
                    end: Some(how),
                };
            }
            State::Ending { run, end, phase, until, .. } if *run == of => {
                *end = Some(how);
                if *phase == Phase::Term {
                    *phase = Phase::Tree;
                    *until = now + KILL_DEADLINE;
                    out.push(Action::KillTree(of));
                }
            }
            _ => {}
        }
    }

    fn on_gone(&mut self, of: Run, how: End, now: Moment, out: &mut Vec<Action>) {
        if self.run() != Some(of) || matches!(self.state, State::Preparing { .. }) {
            return;
        }
        let unseen = how == End::Unseen;
        let (pid, started, then, end) = match &self.state {
            // The keeper was killed, as ordered. Processes of the run may be left all the same.
            State::Ending { phase: Phase::Orphans | Phase::Stuck, .. } if unseen => return,
            State::Ending { pid, started, then, end, .. } => (*pid, *started, then.clone(), end.clone()),
            State::Running { pid, since, .. } => (Some(*pid), Some(*since), Then::Judge, None),
            State::Repairing { .. } => (None, None, Then::AfterRepair, None),
            _ => (None, None, Then::Judge, None),
        };
        let end = end.or(Some(how));
        let phase = Phase::Orphans;
        self.state = State::Ending { run: of, pid, started, phase, until: now + KILL_DEADLINE, then, end };
        if unseen {
            out.push(Action::Sweep(of));
        } else {
            self.conclude(now, out);
        }
    }

    fn on_swept(&mut self, of: Run, now: Moment, out: &mut Vec<Action>) {
        if matches!(&self.state, State::Ending { run, phase: Phase::Orphans | Phase::Stuck, .. } if *run == of)
        {
            self.conclude(now, out);
        }
    }

    fn on_alive(&mut self, of: Run, now: Moment) {
        let waits_for_more = self.rules.has_startup;
        self.shows(of, |life| match life {
            Life::Starting { .. } if waits_for_more => Life::Starting { progress: now, answered: true },
            Life::Starting { .. } | Life::Started { .. } => Life::Started { answered: now },
        });
    }

    fn on_work(&mut self, of: Run, now: Moment) {
        self.shows(of, |life| match life {
            Life::Starting { answered, .. } => Life::Starting { progress: now, answered },
            Life::Started { .. } => life,
        });
    }

    fn on_start_over(&mut self, of: Run, now: Moment) {
        self.shows(of, |_| Life::Started { answered: now });
    }

    fn shows(&mut self, of: Run, change: impl FnOnce(Life) -> Life) {
        if let State::Running { run, life, .. } = &mut self.state
            && *run == of
        {
            *life = change(*life);
        }
    }

    fn on_readiness(&mut self, of: Run, is: bool, now: Moment, out: &mut Vec<Action>) {
        if let State::Running { run, ready, since, .. } = &mut self.state
            && *run == of
            && *ready != is
        {
            *ready = is;
            let text = if is {
                format!("ready {} after its start", words(now.since(*since)))
            } else {
                "no longer ready".into()
            };
            out.push(Action::Say(Level::Info, text));
        }
    }

    fn on_tick(&mut self, now: Moment, out: &mut Vec<Action>) {
        self.notice_stable_run(now, out);
        if self.deadline().is_none_or(|due| now < due) {
            return;
        }
        match &self.state {
            State::Waiting { .. } => self.begin(now, out),
            State::Preparing { .. } => {
                self.kill_tree(Then::Fail("its preparation took too long".into()), now, out);
            }
            State::Starting { .. } => {
                let why = format!("the program was not executing after {}", words(EXEC_DEADLINE));
                self.kill_tree(Then::Fail(why), now, out);
            }
            State::Repairing { since, .. } => {
                let text =
                    format!("its repair command did not end within {}; ending it", words(now.since(*since)));
                out.push(Action::Say(Level::Warn, text));
                self.kill_tree(Then::AfterRepair, now, out);
            }
            State::Running { since, life, .. } => {
                let why = self.what_hangs(*since, *life, now);
                out.push(Action::Say(Level::Error, format!("{why}; ending it")));
                self.end_main(Then::Fail(why), HUNG_GRACE.min(self.rules.grace), now, out);
            }
            State::Ending { .. } => self.press(now, out),
            State::Idle | State::Parked { .. } | State::Down => {}
        }
    }

    fn what_hangs(&self, since: Moment, life: Life, now: Moment) -> String {
        match life {
            Life::Started { answered } => {
                format!("no answer to its liveness probe for {}", words(now.since(answered)))
            }
            Life::Starting { progress, answered: false } => {
                let (after, idle) = (words(now.since(since)), now.since(progress));
                if self.rules.liveness.is_some_and(|limits| idle < limits.start) {
                    format!("no first answer to its liveness probe within {after}, although it works")
                } else {
                    let idle = words(idle);
                    format!(
                        "no first answer to its liveness probe after {after}, and no sign of work for {idle}"
                    )
                }
            }
            Life::Starting { progress, answered: true } => {
                let idle = words(now.since(progress));
                format!("its start is not over, and it has shown no sign of work for {idle}")
            }
        }
    }

    /// A run that has lasted long enough ends a crash loop while it still runs. It needs no deadline of its own:
    /// whoever asks for the status brings a [`Event::Tick`] along.
    fn notice_stable_run(&mut self, now: Moment, out: &mut Vec<Action>) {
        let State::Running { since, .. } = self.state else { return };
        let ran = now.since(since);
        if self.failures == 0 || !self.rules.backoff.forgives(ran) {
            return;
        }
        if self.in_crash_loop() {
            out.push(Action::Say(Level::Info, format!("has run for {}; the crash loop is over", words(ran))));
        }
        self.forget_failures();
    }

    /// A phase of ending ran out of time: the next phase begins.
    fn press(&mut self, now: Moment, out: &mut Vec<Action>) {
        let State::Ending { run, phase, until, .. } = &mut self.state else { return };
        let run = *run;
        *until = now + KILL_DEADLINE;
        match *phase {
            Phase::Term => {
                *phase = Phase::Tree;
                out.push(Action::Say(
                    Level::Warn,
                    "did not end within its grace period; killing its process tree".into(),
                ));
                out.push(Action::KillTree(run));
            }
            Phase::Tree => {
                *phase = Phase::Keeper;
                out.push(Action::KillKeeper(run));
            }
            Phase::Keeper => {
                *phase = Phase::Orphans;
                out.push(Action::Sweep(run));
            }
            Phase::Orphans => {
                *phase = Phase::Stuck;
                let text = "something of its last run is still alive: the kernel holds it (a dead disk or mount?), or it could not be looked for. Nothing is started over it; it is looked for again";
                out.push(Action::Say(Level::Error, text.into()));
            }
            Phase::Stuck => {}
        }
    }

    fn end_main(&mut self, then: Then, grace: Duration, now: Moment, out: &mut Vec<Action>) {
        let State::Running { run, pid, since, .. } = self.state else { return };
        let (phase, until) = (Phase::Term, now + grace);
        self.state =
            State::Ending { run, pid: Some(pid), started: Some(since), phase, until, then, end: None };
        out.push(Action::Term(run));
    }

    fn kill_tree(&mut self, then: Then, now: Moment, out: &mut Vec<Action>) {
        let Some(run) = self.run() else { return };
        let (pid, started, end) = match &self.state {
            State::Running { pid, since, .. } => (Some(*pid), Some(*since), None),
            State::Ending { pid, started, end, .. } => (*pid, *started, end.clone()),
            _ => (None, None, None),
        };
        let (phase, until) = (Phase::Tree, now + KILL_DEADLINE);
        self.state = State::Ending { run, pid, started, phase, until, then, end };
        out.push(Action::KillTree(run));
    }

    /// Nothing of the run is left: decides what follows.
    fn conclude(&mut self, now: Moment, out: &mut Vec<Action>) {
        let State::Ending { started, then, end, .. } = &self.state else { return };
        let (then, end) = (then.clone(), end.clone());
        let ran = started.map_or(Duration::ZERO, |s| now.since(s));
        match then {
            Then::StayDown => {
                self.remember(end, Some("stopped on request".into()), ran, now);
                self.state = State::Down;
            }
            _ if self.closed => self.leave_down(end, then, ran, now, out),
            Then::Withdrawn => {
                self.remember(end, Some("ended because what it stands on was gone".into()), ran, now);
                self.state = State::Idle;
            }
            Then::Restart => {
                self.remember(end, Some("restarted on request".into()), ran, now);
                self.forget_failures();
                self.begin(now, out);
            }
            Then::AfterRepair => {
                let text = match end {
                    Some(end) => format!("repair command {end}; starting once more"),
                    None => "repair command had to be killed; starting once more".into(),
                };
                out.push(Action::Say(Level::Warn, text));
                self.begin(now, out);
            }
            Then::Fail(why) => self.fail(end, why, ran, now, out),
            Then::Judge => self.judge(end.unwrap_or(End::Unseen), ran, now, out),
        }
    }

    /// The service would start again if the machine were not going down.
    fn leave_down(
        &mut self,
        end: Option<End>,
        then: Then,
        ran: Duration,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
        let why = match then {
            Then::Fail(why) => Some(why),
            Then::Judge | Then::Restart | Then::StayDown | Then::Withdrawn | Then::AfterRepair => None,
        };
        let told = why.clone().or_else(|| end.as_ref().map(End::to_string));
        if let Some(told) = told {
            out.push(Action::Say(
                Level::Info,
                format!("{told}; not started again, everything is being stopped"),
            ));
        }
        self.remember(end, why, ran, now);
        self.state = State::Down;
    }

    /// The run ended and nobody had asked for that.
    fn judge(&mut self, end: End, ran: Duration, now: Moment, out: &mut Vec<Action>) {
        if self.rules.backoff.forgives(ran) {
            self.forget_failures();
        }
        match end {
            End::Code(0) if ran >= QUICK_RUN || self.quick_runs < QUICK_RUNS_MAX => {
                self.quick_runs = if ran >= QUICK_RUN { 0 } else { self.quick_runs + 1 };
                out.push(Action::Say(
                    Level::Warn,
                    format!("{end} after {} without being asked to; starting it again at once", words(ran)),
                ));
                self.remember(Some(end), None, ran, now);
                self.begin(now, out);
            }
            End::Code(EXIT_CONFIG) if self.rules.repair.is_some() => {
                self.remember(Some(end), None, ran, now);
                self.on_config_failure(now, out);
            }
            end => {
                let why = end.to_string();
                self.fail(Some(end), why, ran, now, out);
            }
        }
    }

    fn on_config_failure(&mut self, now: Moment, out: &mut Vec<Action>) {
        if std::mem::replace(&mut self.repaired, true) {
            self.park(
                "it refuses its configuration (code 78), also after its own repair command ran".into(),
                out,
            );
            return;
        }
        self.runs += 1;
        let run = Run(self.runs);
        self.state = State::Repairing { run, since: now };
        out.push(Action::Say(
            Level::Error,
            "refuses its configuration (code 78); running its repair command once".into(),
        ));
        out.push(Action::Repair(run));
    }

    fn fail(&mut self, end: Option<End>, why: String, ran: Duration, now: Moment, out: &mut Vec<Action>) {
        if self.rules.backoff.forgives(ran) {
            self.forget_failures();
        }
        self.failures = self.failures.saturating_add(1);
        let first = *self.first_failure.get_or_insert(now);
        let mut wait = self.rules.backoff.wait(self.failures);
        if ran.is_zero() {
            wait = wait.max(NOTHING_RAN_WAIT);
        }
        let mut text = format!("{why}; next start in {}", words(wait));
        if self.failures == CRASH_LOOP {
            text = format!(
                "{text}. This is a crash loop: {} failures in {}",
                self.failures,
                words(now.since(first))
            );
        }
        out.push(Action::Say(Level::Error, text));
        self.remember(end, Some(why), ran, now);
        self.state = State::Waiting { until: now + wait };
        // With a wait of zero the service starts at once, without a turn of the event loop between.
        if wait.is_zero() {
            self.begin(now, out);
        }
    }

    fn park(&mut self, why: String, out: &mut Vec<Action>) {
        out.push(Action::Say(Level::Error, format!("parked: {why}")));
        self.state = State::Parked { why };
    }

    fn begin(&mut self, now: Moment, out: &mut Vec<Action>) {
        if self.closed {
            self.state = State::Down;
            return;
        }
        if self.held {
            self.state = State::Waiting { until: now };
            return;
        }
        self.runs += 1;
        let run = Run(self.runs);
        if self.rules.prepare.is_some() {
            self.state = State::Preparing { run, since: now };
            out.push(Action::Prepare(run));
        } else {
            self.launch(run, now, out);
        }
    }

    fn launch(&mut self, run: Run, now: Moment, out: &mut Vec<Action>) {
        self.launches += 1;
        self.failing.clear();
        self.state = State::Starting { run, since: now };
        out.push(Action::Launch(run));
    }

    fn remember(&mut self, end: Option<End>, why: Option<String>, ran: Duration, at: Moment) {
        self.last = Some(Past { end, why, ran, at });
    }

    fn forget_failures(&mut self) {
        self.failures = 0;
        self.first_failure = None;
        self.quick_runs = 0;
        self.repaired = false;
    }
}

#[cfg(test)]
mod tests;
