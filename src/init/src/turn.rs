//! The one loop of PID 1: events in, decisions by the blueprint, actions out.
//!
//! One wait point. Everything that can happen arrives as a readable descriptor or as the next
//! deadline of the machine. A panic in a turn is caught, said, and answered with an ordered
//! shutdown: the services that hold the user's data get their time whatever is wrong here.
//!
//! May import: all of this crate, `cvm-process`, `cvm-blueprint`.

use crate::children::{Child, Children, Owner, Part, Said, Words};
use crate::control::Control;
use crate::exit;
use crate::kit::Kit;
use crate::voice::Voice;
use cvm_blueprint::conduct::{self, Action, Event, Machine, Order, ServiceId, Try};
use cvm_blueprint::ending::End;
use cvm_blueprint::mux::MuxReport;
use cvm_blueprint::service::{Leftovers, Prepare};
use cvm_blueprint::status::{self, About};
use cvm_blueprint::supervise::{self, Level, Refusal, Run};
use cvm_blueprint::time::Moment;
use cvm_blueprint::wire::{Body, Facts, KeeperReport, Note, Remark, Request, TaskReport, Verb};
use cvm_process::signals::Signals;
use cvm_process::{port, reap, tree};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// Signals PID 1 acts on. The rest is ignored by the kernel, as PID 1's right.
pub(crate) const HANDLED: [i32; 3] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT];
/// How long the writer of our own log has for its last lines.
const FAREWELL: Duration = Duration::from_secs(1);
/// Between two looks for what a killed keeper left behind, and between two tries to open the
/// control socket.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Children reaped in one turn before the rest of the world gets its own.
const REAPS_A_TURN: usize = 4096;
/// A defect that strikes this often will not let the shutdown through either.
const PANICS_MAX: u32 = 8;

pub(crate) struct World {
    pub(crate) machine: Machine,
    pub(crate) kit: Kit,
    pub(crate) children: Children,
    pub(crate) signals: Signals,
    pub(crate) voice: Voice,
    pub(crate) control: Option<Control>,
    pub(crate) about: About,
    pub(crate) began: Instant,
    /// Runs whose leftovers could not be found or ended, and when to look again.
    sweeps_due: Vec<(Instant, ServiceId, Run)>,
    /// When to try again to open the control socket.
    control_due: Option<Instant>,
    leaving: Option<u8>,
    panics: u32,
}

impl World {
    pub(crate) fn new(
        machine: Machine,
        kit: Kit,
        children: Children,
        signals: Signals,
        voice: Voice,
        about: About,
        began: Instant,
    ) -> Self {
        let (control, leaving, panics) = (None, None, 0);
        let (sweeps_due, control_due) = (Vec::new(), Some(began));
        Self {
            machine,
            kit,
            children,
            signals,
            voice,
            control,
            about,
            began,
            sweeps_due,
            control_due,
            leaving,
            panics,
        }
    }

    /// Runs until the machine is down, and yields the status to leave with.
    pub(crate) fn run(mut self) -> u8 {
        self.guarded(|world| world.feed(Event::Boot));
        loop {
            self.guarded(Self::turn);
            if let Some(status) = self.leaving {
                self.farewell();
                return if self.panics > 0 { exit::INTERNAL } else { status };
            }
            if self.panics >= PANICS_MAX {
                self.signal_all(true);
                return exit::INTERNAL;
            }
        }
    }

    fn guarded(&mut self, work: impl FnOnce(&mut Self)) {
        if catch_unwind(AssertUnwindSafe(|| work(self))).is_err() {
            self.panics += 1;
            tracing::error!("A defect of the supervisor was caught; stopping everything in order");
            let _ = catch_unwind(AssertUnwindSafe(|| self.feed(Event::Terminate)));
        }
    }

    fn turn(&mut self) {
        self.wait();
        let taken = self.signals.drain();
        self.reap();
        let said = self.children.listen();
        self.hear(said);
        for _ in taken.iter().filter(|s| matches!(**s, libc::SIGTERM | libc::SIGINT)) {
            self.feed(Event::Terminate);
        }
        self.feed(Event::Tick);
        self.sweep_what_is_due();
        self.keep_control_open();
        self.answer_operators();
        self.look_for_the_last();
        self.voice.flush();
    }

    fn wait(&self) {
        let until = self.next_deadline();
        self.voice.with_waiting(|writers| {
            self.children.with_reports(|reports| {
                let reading = |fd| PollFd::new(fd, PollFlags::POLLIN);
                let writing = |fd| PollFd::new(fd, PollFlags::POLLOUT);
                let mut fds = vec![reading(std::os::fd::AsFd::as_fd(&self.signals))];
                fds.extend(writers.iter().map(|fd| writing(*fd)));
                fds.extend(reports.iter().map(|fd| reading(*fd)));
                let control = self.control.iter().flat_map(Control::interests);
                fds.extend(control.map(|(fd, writes)| if writes { writing(fd) } else { reading(fd) }));
                // An interrupted or failed wait is a short one.
                let _ = poll(&mut fds, until);
            });
        });
    }

    fn next_deadline(&self) -> PollTimeout {
        let machine = self.machine.deadline().map(|m| self.began + Duration::from_millis(m.as_millis()));
        let control = self.control.as_ref().and_then(Control::deadline);
        let sweeps = self.sweeps_due.iter().map(|(at, ..)| *at);
        let own = self.control_due.into_iter().chain(sweeps);
        let Some(due) = machine.into_iter().chain(control).chain(own).min() else { return PollTimeout::NONE };
        let left = due.saturating_duration_since(Instant::now());
        // Rounded up: a turn before its time would find nothing to do.
        let wait = if left.is_zero() { left } else { left + Duration::from_millis(1) };
        PollTimeout::try_from(wait).unwrap_or(PollTimeout::MAX)
    }

    fn now(&self) -> Moment {
        let ms = self.began.elapsed().as_millis();
        Moment::from_millis(u64::try_from(ms).unwrap_or(u64::MAX))
    }

    fn feed(&mut self, event: Event) {
        let now = self.now();
        let mut actions = std::collections::VecDeque::from(self.machine.step(event, now));
        while let Some(action) = actions.pop_front() {
            // What could not be started is an event of its own.
            for event in self.act(action) {
                actions.extend(self.machine.step(event, now));
            }
        }
    }

    // === Ears ===

    fn reap(&mut self) {
        for _ in 0..REAPS_A_TURN {
            match reap::next() {
                reap::Reaped::One(pid, _) => {
                    let mut said = Vec::new();
                    // An orphan of somebody's: buried, and nothing more.
                    let Some(child) = self.children.take(pid, &mut said) else { continue };
                    self.hear(said);
                    self.bury(child);
                }
                reap::Reaped::Later | reap::Reaped::Childless => break,
            }
        }
    }

    /// On the way out: whether anybody is left to wait for. The writer of our own log stays to
    /// the end and does not count.
    fn look_for_the_last(&mut self) {
        if matches!(self.machine.phase(), conduct::Phase::Sweeping { .. }) {
            let logger = self.children.find(Owner::Logger);
            if tree::children().iter().all(|pid| Some(*pid) == logger) {
                self.feed(Event::Childless);
            }
        }
    }

    fn hear(&mut self, said: Vec<Said>) {
        for Said { owner, words } in said {
            let Owner::Service { id, run, part: Part::Main } = owner else { continue };
            let report = match words {
                Words::Keeper(report) => report,
                Words::Mux(report) => {
                    self.hear_mux(report);
                    continue;
                }
                Words::Storage(report) => {
                    self.feed(Event::Storage { id, run, report });
                    continue;
                }
            };
            let event = match report {
                KeeperReport::Started { pid } => supervise::Event::Exec { run, pid },
                KeeperReport::MainEnded { end } => supervise::Event::MainEnded { run, end },
                KeeperReport::Liveness { ok: true } => supervise::Event::Alive { run },
                KeeperReport::Readiness { ok } => supervise::Event::Readiness { run, ready: ok },
                KeeperReport::Dropped { lines } => {
                    self.count_dropped(id, lines);
                    continue;
                }
                // Silence is measured by the absence of answers; the rest has been dealt with.
                KeeperReport::Liveness { ok: false } | KeeperReport::TreeGone { .. } => continue,
            };
            self.feed(Event::Service { id, event });
        }
    }

    fn hear_mux(&mut self, report: MuxReport) {
        match report {
            // It hands on what a server says, which must not write lines into our log.
            MuxReport::Note { level, text } => say(level, &text.replace(char::is_control, " ")),
            MuxReport::State(state) => self.about.mux = Some(*state),
        }
    }

    fn count_dropped(&mut self, id: ServiceId, lines: u64) {
        let name = self.machine.service(id).map_or("", |s| s.service.name);
        tracing::warn!("{name}: {lines} log lines dropped, the disk was slower than the service");
        if let Some(count) = self.about.dropped_lines.get_mut(id.0) {
            *count += lines;
        }
    }

    /// A keeper is gone, and with it all that it kept.
    fn bury(&mut self, mut child: Child) {
        // Something has changed in this machine: a moment to look after what we own in it.
        self.control_due.get_or_insert_with(Instant::now);
        let end = child.end();
        match child.owner {
            Owner::Logger => {
                self.voice.write_also_to(None);
                if self.machine.phase() == conduct::Phase::Up {
                    self.start_logger();
                }
            }
            Owner::Step(of) => {
                let outcome = self.outcome(child.task.take(), &end);
                self.feed(Event::StepEnded { of, outcome });
            }
            Owner::Service { id, run, part } => {
                let event = match part {
                    Part::Prepare => {
                        let outcome = self.outcome(child.task.take(), &end);
                        supervise::Event::Prepared { run, outcome }
                    }
                    Part::Main | Part::Repair => supervise::Event::Gone { run, end },
                    Part::Sweep => match self.outcome(child.task.take(), &end) {
                        Ok(()) => supervise::Event::Swept { run },
                        // Something of it may live: nothing is started over it before a later
                        // look has found nobody.
                        Err(Refusal { why, .. }) => {
                            tracing::error!("{}: {why}", self.name_of(child.owner));
                            self.look_again(id, run);
                            return;
                        }
                    },
                };
                self.feed(Event::Service { id, event });
            }
        }
    }

    fn outcome(&mut self, report: Option<TaskReport>, end: &End) -> Result<(), Refusal> {
        match report {
            Some(TaskReport::Done { notes, facts }) => {
                say_notes(notes);
                self.learn(facts);
                Ok(())
            }
            Some(TaskReport::Failed { notes, why, retry }) => {
                say_notes(notes);
                Err(Refusal { why, retry })
            }
            None => Err(conduct::unreported(end)),
        }
    }

    fn learn(&mut self, facts: Facts) {
        if let Some(token) = &facts.token {
            self.kit.learn_token(token);
        }
        if let Some(fingerprint) = facts.host_key {
            let name = "ssh host key".to_owned();
            self.about.keys.retain(|k| k.name != name);
            self.about.keys.push(status::Fingerprint { name, fingerprint });
        }
        for remark in facts.remarks {
            self.remark(remark);
        }
    }

    /// One remark for each topic; an empty one takes it back.
    fn remark(&mut self, remark: Remark) {
        self.about.remarks.retain(|r| r.topic != remark.topic);
        if !remark.text.is_empty() {
            self.about.remarks.push(remark);
        }
    }

    // === Hands ===

    fn act(&mut self, action: Action) -> Vec<Event> {
        match action {
            Action::Say(level, text) => say(level, &text),
            Action::RunStep(of) => {
                let run = format!("step-{}/{}", of.step.as_str(), of.number);
                let kept = match self.kit.step(of.step, &run) {
                    Some(spec) => self.children.keep(Owner::Step(of), &spec, None),
                    None => Err("this version has no work for it".to_owned()),
                };
                if let Err(why) = kept {
                    let outcome = Err(Refusal { why: format!("creating its process: {why}"), retry: true });
                    return vec![Event::StepEnded { of, outcome }];
                }
            }
            Action::KillStep { of, hard } => self.kill_step(of, hard),
            Action::Service { id, action } => return self.act_on(id, &action).into_iter().collect(),
            Action::SignalAll { hard } => self.signal_all(hard),
            Action::Exit { abandoned, undrained } => {
                // Data before processes: a process that the kernel holds ends with the machine.
                self.leaving = Some(match (undrained, abandoned) {
                    (true, _) => exit::UNDRAINED,
                    (false, true) => exit::ABANDONED,
                    (false, false) => exit::CLEAN,
                });
            }
        }
        Vec::new()
    }

    fn kill_step(&self, of: Try, hard: bool) {
        if let Some(pid) = self.children.find(Owner::Step(of)) {
            signal(pid, if hard { Signal::SIGKILL } else { Signal::SIGQUIT });
        }
    }

    fn act_on(&mut self, id: ServiceId, action: &supervise::Action) -> Option<Event> {
        use supervise::Action as Do;
        match *action {
            Do::Launch(run) => self.keep(id, run, Part::Main),
            Do::Prepare(run) => self.prepare(id, run),
            Do::Repair(run) => self.keep(id, run, Part::Repair),
            Do::Sweep(run) => self.sweep(id, run),
            Do::Term(run) => self.signal_run(id, run, Signal::SIGTERM),
            Do::KillTree(run) => self.signal_run(id, run, Signal::SIGQUIT),
            Do::KillKeeper(run) => self.signal_run(id, run, Signal::SIGKILL),
            Do::Say(level, ref text) => {
                say(level, text);
                None
            }
        }
    }

    fn keep(&mut self, id: ServiceId, run: Run, part: Part) -> Option<Event> {
        let record = self.machine.service(id)?;
        let service = &record.service;
        let name = format!("{}/{}", service.name, run.0);
        let spec = match part {
            Part::Main => self.kit.service(service, &name),
            Part::Repair => self.kit.repair(service, &name),
            Part::Sweep => self.kit.sweep(service.name, &name),
            Part::Prepare => self.kit.prepare(service.prepare?, service.name, &name),
        };
        let handed = if part == Part::Main { self.kit.handed(service) } else { None };
        let error = self.children.keep(Owner::Service { id, run, part }, &spec, handed).err()?;
        if part == Part::Sweep {
            self.look_again(id, run);
        }
        let event = not_kept(run, part, &error)?;
        Some(Event::Service { id, event })
    }

    /// A free port needs no process to free it, which is what a restart usually finds: asking
    /// costs microseconds, the process milliseconds.
    fn prepare(&mut self, id: ServiceId, run: Run) -> Option<Event> {
        match self.machine.service(id)?.service.prepare {
            Some(Prepare::FreePort(port)) if port::is_free(port) => {
                let event = supervise::Event::Prepared { run, outcome: Ok(()) };
                Some(Event::Service { id, event })
            }
            _ => self.keep(id, run, Part::Prepare),
        }
    }

    /// What a killed keeper left behind. A service whose leftovers stay (a login session) has
    /// none: its main process died with the keeper.
    fn sweep(&mut self, id: ServiceId, run: Run) -> Option<Event> {
        match self.machine.service(id)?.service.leftovers {
            Leftovers::Kill => self.keep(id, run, Part::Sweep),
            Leftovers::Leave => Some(Event::Service { id, event: supervise::Event::Swept { run } }),
        }
    }

    fn look_again(&mut self, id: ServiceId, run: Run) {
        self.sweeps_due.push((Instant::now() + LOOK_AGAIN, id, run));
    }

    fn sweep_what_is_due(&mut self) {
        let now = Instant::now();
        let due: Vec<_> = self.sweeps_due.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, id, run) in due {
            if let Some(event) = self.keep(id, run, Part::Sweep) {
                self.feed(event);
            }
        }
    }

    fn signal_run(&self, id: ServiceId, run: Run, what: Signal) -> Option<Event> {
        if let Some(pid) = self.children.of_run(id, run) {
            signal(pid, what);
        }
        None
    }

    /// To every process in the machine. SIGTERM spares the writer of our log, which blocks it.
    /// SIGKILL goes to all at once, by the kernel, so that no fork can outrun it; the log ends
    /// with it, and the last lines are on standard output.
    fn signal_all(&self, hard: bool) {
        if hard {
            self.voice.write_also_to(None);
        }
        cvm_process::signals::send(Pid::from_raw(-1), if hard { libc::SIGKILL } else { libc::SIGTERM });
    }

    pub(crate) fn start_logger(&mut self) {
        let file = format!("{}/supervisor.log", cvm_blueprint::paths::LOGS);
        match self.children.keep_log(&file) {
            Ok(pipe) => self.voice.write_also_to(Some(pipe)),
            Err(why) => tracing::warn!("The supervisor's own log is not written to a file: {why}"),
        }
    }

    /// Lets the last lines reach the disk.
    fn farewell(&mut self) {
        self.voice.flush();
        self.voice.write_also_to(None);
        let until = Instant::now() + FAREWELL;
        while self.children.find(Owner::Logger).is_some() && Instant::now() < until {
            let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&self.signals), PollFlags::POLLIN)];
            let _ = poll(&mut fds, 50u16);
            self.signals.drain();
            while let reap::Reaped::One(pid, _) = reap::next() {
                self.children.take(pid, &mut Vec::new());
            }
        }
    }

    // === Operators ===

    /// Opens the control socket, and opens it anew when its path has been lost: `cvm` is how
    /// an operator finds out what is wrong, so a full /run must not cost it for good.
    fn keep_control_open(&mut self) {
        if self.control_due.is_none_or(|at| Instant::now() < at) {
            return;
        }
        self.control_due = None;
        if self.control.as_ref().is_some_and(Control::is_in_place) {
            return;
        }
        match Control::open(cvm_blueprint::paths::CONTROL_SOCKET) {
            Ok(control) => self.control = Some(control),
            Err(why) => {
                tracing::error!("`cvm` cannot find this supervisor: {why}; next try in 10 s");
                self.control_due = Some(Instant::now() + LOOK_AGAIN);
            }
        }
    }

    fn answer_operators(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        control.turn(Instant::now(), |request| self.answer(&request));
        self.control = Some(control);
    }

    fn answer(&mut self, request: &Request) -> Body {
        match &request.verb {
            Verb::Status => Body::Status(Box::new(status::snapshot(&self.machine, &self.about, self.now()))),
            Verb::Start { service } => self.order(service, Order::Start),
            Verb::Stop { service } => self.order(service, Order::Stop),
            Verb::Restart { service } => self.order(service, Order::Restart),
            Verb::GatewayAccess => {
                let (user, environment) = self.kit.gateway_access();
                Body::GatewayAccess { user, environment }
            }
        }
    }

    fn order(&mut self, name: &str, order: Order) -> Body {
        if self.machine.phase() != conduct::Phase::Up {
            return Body::Refused { why: "the machine is stopping".to_owned() };
        }
        let Some(id) = self.machine.find(name) else {
            let names: Vec<&str> = self.machine.services().iter().map(|s| s.service.name).collect();
            let why = format!("there is no service of that name; there are: {}", names.join(", "));
            return Body::Refused { why };
        };
        let word = match order {
            Order::Start => "start",
            Order::Stop => "stop",
            Order::Restart => "restart",
        };
        tracing::info!("{name}: {word} requested by an operator");
        self.feed(Event::Order { id, order });
        Body::Taken
    }

    fn name_of(&self, owner: Owner) -> &'static str {
        match owner {
            Owner::Step(of) => of.step.as_str(),
            Owner::Service { id, .. } => self.machine.service(id).map_or("", |s| s.service.name),
            Owner::Logger => "log",
        }
    }
}

/// What it means for a service that the keeper of one part of a run could not be started.
fn not_kept(run: Run, part: Part, error: &str) -> Option<supervise::Event> {
    let why = format!("creating its process: {error}");
    match part {
        Part::Prepare => Some(supervise::Event::Prepared { run, outcome: Err(Refusal { why, retry: true }) }),
        Part::Main | Part::Repair => {
            say(Level::Error, &why);
            Some(supervise::Event::Gone { run, end: End::Code(i32::from(exit::INTERNAL)) })
        }
        // Nobody could look, so nothing may be started over what may be there.
        Part::Sweep => {
            say(Level::Error, &why);
            None
        }
    }
}

fn signal(pid: Pid, what: Signal) {
    // A keeper that is gone already is about to be reaped.
    let _ = kill(pid, what);
}

fn say_notes(notes: Vec<Note>) {
    for note in notes {
        say(note.level, &note.text);
    }
}

fn say(level: Level, text: &str) {
    match level {
        Level::Error => tracing::error!("{text}"),
        Level::Warn => tracing::warn!("{text}"),
        Level::Info => tracing::info!("{text}"),
        Level::Debug => tracing::debug!("{text}"),
    }
}
