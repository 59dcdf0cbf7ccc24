//! The one loop of PID 1: events in, decisions by `cvm-machine`, actions out.
//!
//! One wait point. Everything that can happen arrives as a readable descriptor or as the next
//! deadline of the machine. A panic in a turn of the loop is caught, logged with its place, and answered with an
//! ordered shutdown: the services that hold the user's data get their time whatever is wrong here.
//! A panic while an operator's request is answered costs that request and stops nothing.

use crate::control::Control;
use crate::defect::caught;
use crate::exit;
use crate::keepers::{Keeper, Keepers, Owner, Part, Received, Report};
use crate::last_net;
use crate::launch::Launcher;
use crate::log::Log;
use cvm_machine::awake_clock::AwakeClock;
use cvm_machine::description::Prepare;
use cvm_machine::machine::{self, Action, Event, Machine, Order, ServiceId, Try};
use cvm_machine::moment::Moment;
use cvm_machine::service::{self, Refusal, Run};
use cvm_machine::snapshot::{self, About};
use cvm_protocol::control::{Body, Request, Verb};
use cvm_protocol::exit_status::End;
use cvm_protocol::keeper::KeeperReport;
use cvm_protocol::report::Level;
use cvm_protocol::report::Note;
use cvm_protocol::status::Remark;
use cvm_protocol::status::{self, Status};
use cvm_protocol::task::{Facts, TaskReport};
use cvm_protocol::time::words;
use cvm_sys::clock::BootTime;
use cvm_sys::kernel::{Kernel, readable, writable};
use cvm_sys::port;
use cvm_sys::reap::Reaped;
use nix::unistd::Pid;
use std::collections::VecDeque;
use std::time::Duration;

/// Signals that PID 1 acts on. The kernel ignores the others for PID 1.
pub(crate) const HANDLED: [i32; 3] = [libc::SIGCHLD, libc::SIGTERM, libc::SIGINT];
/// How long the writer of PID 1's own log has for its last lines.
const FAREWELL: Duration = Duration::from_secs(1);
/// Between two looks for what a killed keeper left behind, and between two tries to open the
/// control socket.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// Children reaped in one turn of the loop, before everything else gets its turn.
const REAPS_A_TURN: usize = 4096;
/// After so many defects no turn of the loop is expected to succeed: see `last_net`.
const DEFECTS_MAX: u32 = 8;
/// For so long nobody is judged, restarted or tried again because somebody has frozen the clock.
const FREEZE_AT_MOST: Duration = Duration::from_mins(10);

pub(crate) struct Supervisor<K> {
    machine: Machine,
    launcher: Launcher,
    keepers: Keepers,
    kernel: K,
    log: Log,
    control: Option<Control>,
    control_path: &'static str,
    about: About,
    began: BootTime,
    clock: AwakeClock,
    /// Runs whose leftovers could not be found or ended, and when to look again.
    sweeps_due: Vec<(BootTime, ServiceId, Run)>,
    /// When to try again to open the control socket.
    control_due: Option<BootTime>,
    /// What the machine has ordered and is not done yet. It outlives a panic in one of its actions.
    orders: VecDeque<Action>,
    /// There may be children that have ended and were not reaped, and no signal will tell.
    unreaped: bool,
    leaving: Option<u8>,
    defects: u32,
}

impl<K: Kernel> Supervisor<K> {
    pub(crate) fn new(
        machine: Machine,
        launcher: Launcher,
        keepers: Keepers,
        kernel: K,
        log: Log,
        about: About,
        began: BootTime,
    ) -> Self {
        let (sweeps_due, control_due) = (Vec::new(), Some(began));
        Self {
            machine,
            launcher,
            keepers,
            kernel,
            log,
            control: None,
            control_path: cvm_protocol::paths::CONTROL_SOCKET,
            about,
            began,
            clock: AwakeClock::default(),
            sweeps_due,
            control_due,
            orders: VecDeque::new(),
            unreaped: false,
            leaving: None,
            defects: 0,
        }
    }

    /// Runs until the machine is down, and yields the status to leave with.
    pub(crate) fn run(&mut self) -> u8 {
        self.guarded(|supervisor| supervisor.feed(Event::Boot));
        while self.leaving.is_none() && self.defects < DEFECTS_MAX {
            self.guarded(Self::turn);
        }
        if self.leaving.is_none() {
            self.fall_into_the_last_net();
        }
        let _ = caught(|| self.farewell());
        match self.leaving {
            Some(status) if self.defects == 0 => status,
            _ => exit::INTERNAL,
        }
    }

    /// A panic in `work` stops everything in order.
    fn guarded<T>(&mut self, work: impl FnOnce(&mut Self) -> T) -> Option<T> {
        let place = match caught(|| work(self)) {
            Ok(done) => return Some(done),
            Err(place) => place,
        };
        self.defects += 1;
        let _ = caught(|| tracing::error!("A defect of the supervisor was caught, at {place}"));
        let _ = caught(|| self.thaw());
        let _ = caught(|| self.feed(Event::Defect));
        None
    }

    fn fall_into_the_last_net(&mut self) {
        let _ =
            caught(|| tracing::error!("The supervisor's defect does not pass; stopping without its machine"));
        let groups = self.keepers.groups(self.machine.services());
        let logger = self.keepers.find(Owner::Logger);
        let (keepers, log) = (&self.keepers, &self.log);
        let meanwhile = || {
            keepers.discard();
            let _ = caught(|| log.flush());
        };
        last_net::stop_all(&mut self.kernel, groups, logger, meanwhile);
    }

    fn turn(&mut self) {
        self.wait();
        let taken = self.kernel.signals();
        self.reap();
        let said = self.keepers.listen();
        self.on_reports(said);
        for _ in taken.iter().filter(|s| matches!(**s, libc::SIGTERM | libc::SIGINT)) {
            self.thaw();
            self.feed(Event::Terminate);
        }
        if self.clock.thaws_at().is_some_and(|at| at <= self.since_began()) {
            self.thaw();
        }
        self.feed(Event::Tick);
        self.sweep_what_is_due();
        self.keep_control_open();
        self.answer_operators();
        self.look_for_the_last();
        self.log.flush();
    }

    fn wait(&mut self) {
        let (began, due) = (self.since_began(), self.next_deadline());
        let until = if self.unreaped { Some(self.kernel.now()) } else { due };
        self.log.with_waiting(|writers| {
            self.keepers.with_reports(|reports| {
                let mut fds: Vec<_> = writers.iter().map(|fd| writable(*fd)).collect();
                fds.extend(reports.iter().map(|fd| readable(*fd)));
                let control = self.control.iter().flat_map(Control::interests);
                fds.extend(control.map(|(fd, writes)| if writes { writable(fd) } else { readable(fd) }));
                self.kernel.wait(fds, until);
            });
        });
        self.look_for_a_pause(began, due);
    }

    fn next_deadline(&self) -> Option<BootTime> {
        let machine = self.machine.deadline().and_then(|m| self.clock.due(m)).map(|span| self.began + span);
        let control = self.control.as_ref().and_then(Control::deadline);
        let sweeps = self.sweeps_due.iter().map(|(at, ..)| *at);
        let thaw = self.clock.thaws_at().map(|span| self.began + span);
        let own = self.control_due.into_iter().chain(sweeps).chain(thaw);
        machine.into_iter().chain(control).chain(own).min()
    }

    fn now(&self) -> Moment {
        self.clock.moment(self.since_began())
    }

    fn since_began(&self) -> Duration {
        self.kernel.now().saturating_duration_since(self.began)
    }

    /// Whether the wait that was to end at `due` has ended long after: the machine was paused, or asleep.
    /// Not during a stop: whoever waits for its end, the engine or dstack, has a clock that goes on.
    fn look_for_a_pause(&mut self, began: Duration, due: Option<BootTime>) {
        if self.machine.phase() != machine::Phase::Up {
            return;
        }
        let due = due.map(|due| due.saturating_duration_since(self.began));
        if let Some(pause) = self.clock.woke(began, due, self.since_began()) {
            tracing::warn!("This machine stood still for {}; nothing is judged by that time", words(pause));
        }
    }

    /// An order to stop, and a defect, are not to wait for somebody who has the clock stand still.
    fn thaw(&mut self) {
        if let Some(pause) = self.clock.thaw(self.since_began()) {
            tracing::info!("The clock goes on after {}", words(pause));
        }
    }

    fn feed(&mut self, event: Event) {
        let now = self.now();
        self.orders.extend(self.machine.step(event, now));
        while let Some(action) = self.orders.pop_front() {
            // What could not be started is an event of its own, and so is a port that is free. What follows from
            // it comes before the rest: sshd starts before everything else.
            for event in self.act(action) {
                for follows in self.machine.step(event, now).into_iter().rev() {
                    self.orders.push_front(follows);
                }
            }
        }
    }

    // === What comes in ===

    fn reap(&mut self) {
        self.unreaped = true;
        for _ in 0..REAPS_A_TURN {
            match self.kernel.reap() {
                Reaped::One(pid, _) => {
                    let mut said = Vec::new();
                    // An orphan that PID 1 never started: reaped, and nothing more.
                    let Some(keeper) = self.keepers.take(pid, &mut said) else { continue };
                    self.on_reports(said);
                    self.on_keeper_end(keeper);
                }
                Reaped::Later | Reaped::Childless => {
                    self.unreaped = false;
                    return;
                }
            }
        }
    }

    /// On the way out: whether anybody is left to wait for. The writer of our own log stays to
    /// the end and does not count.
    fn look_for_the_last(&mut self) {
        if matches!(self.machine.phase(), machine::Phase::Sweeping { .. }) {
            let logger = self.keepers.find(Owner::Logger);
            if self.kernel.children().iter().all(|pid| Some(*pid) == logger) {
                self.feed(Event::Childless);
            }
        }
    }

    fn on_reports(&mut self, said: Vec<Received>) {
        for Received { owner, report } in said {
            let Owner::Service { id, run, part: Part::Main } = owner else { continue };
            let report = match report {
                Report::Keeper(report) => report,
                Report::Service(report) => {
                    self.feed(Event::Report { id, run, report });
                    continue;
                }
            };
            let event = match report {
                KeeperReport::Started { pid } => service::Event::Exec { run, pid },
                KeeperReport::MainEnded { end } => service::Event::MainEnded { run, end },
                KeeperReport::Liveness { ok: true } => service::Event::Alive { run },
                KeeperReport::Works => service::Event::Works { run },
                KeeperReport::StartOver => service::Event::StartOver { run },
                KeeperReport::Failing { parts } => service::Event::Failing { run, parts },
                KeeperReport::Readiness { ok } => service::Event::Readiness { run, ready: ok },
                KeeperReport::Dropped { lines } => {
                    self.feed(Event::Dropped { id, lines });
                    continue;
                }
                // The machine measures silence by the answers that do not come; the other reports are handled above.
                KeeperReport::Liveness { ok: false } | KeeperReport::TreeGone { .. } => continue,
            };
            self.feed(Event::Service { id, event });
        }
    }

    /// A keeper was reaped.
    fn on_keeper_end(&mut self, mut keeper: Keeper) {
        // A good moment to see whether the control socket is still there.
        self.control_due.get_or_insert(self.kernel.now());
        let end = keeper.end();
        match keeper.owner {
            Owner::Logger => {
                self.log.write_also_to(None);
                if self.machine.phase() == machine::Phase::Up {
                    self.start_logger();
                }
            }
            Owner::Step(of) => {
                let outcome = self.outcome(keeper.task.take(), &end);
                self.feed(Event::StepEnded { of, outcome });
            }
            Owner::Service { id, run, part } => {
                let event = match part {
                    Part::Prepare => {
                        let outcome = self.outcome(keeper.task.take(), &end);
                        service::Event::Prepared { run, outcome }
                    }
                    Part::Main | Part::Repair => service::Event::Gone { run, end },
                    Part::Sweep => match self.outcome(keeper.task.take(), &end) {
                        Ok(()) => service::Event::Swept { run },
                        // A process of the run may be alive: nothing is started over it before a later
                        // look has found none.
                        Err(Refusal { why, .. }) => {
                            tracing::error!("{}: {why}", self.name_of(keeper.owner));
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
            None => Err(machine::unreported(end)),
        }
    }

    fn learn(&mut self, facts: Facts) {
        if let Some(token) = &facts.token {
            self.launcher.learn_token(token);
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

    // === What the machine orders ===

    fn act(&mut self, action: Action) -> Vec<Event> {
        match action {
            Action::Say(level, text) => say(level, &text),
            Action::RunStep(of) => {
                let run = format!("step-{}/{}", of.step.0, of.number);
                let kept = match self.launcher.step(of.step, &run) {
                    Some(spec) => self.keepers.keep(&mut self.kernel, Owner::Step(of), &spec, None),
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
                // Missing data matters more than left processes, which end with the machine.
                self.leaving = Some(match (undrained, abandoned) {
                    (true, _) => exit::UNDRAINED,
                    (false, true) => exit::ABANDONED,
                    (false, false) => exit::CLEAN,
                });
            }
        }
        Vec::new()
    }

    fn kill_step(&mut self, of: Try, hard: bool) {
        if let Some(pid) = self.keepers.find(Owner::Step(of)) {
            self.kernel.kill(pid, if hard { libc::SIGKILL } else { libc::SIGQUIT });
        }
    }

    fn act_on(&mut self, id: ServiceId, action: &service::Action) -> Option<Event> {
        use service::Action as Do;
        match *action {
            Do::Launch(run) => self.keep(id, run, Part::Main),
            Do::Prepare(run) => self.prepare(id, run),
            Do::Repair(run) => self.keep(id, run, Part::Repair),
            Do::Sweep(run) => self.keep(id, run, Part::Sweep),
            Do::Term(run) => self.signal_run(id, run, libc::SIGTERM),
            Do::KillTree(run) => self.signal_run(id, run, libc::SIGQUIT),
            Do::KillKeeper(run) => self.signal_run(id, run, libc::SIGKILL),
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
            Part::Main => self.launcher.service(service, &name),
            Part::Repair => self.launcher.repair(service, &name),
            Part::Sweep => self.launcher.sweep(service, &name),
            Part::Prepare => self.launcher.prepare(service.prepare?, service.name, &name),
        };
        let specification = if part == Part::Main { self.launcher.specification(service) } else { None };
        let owner = Owner::Service { id, run, part };
        let error = self.keepers.keep(&mut self.kernel, owner, &spec, specification).err()?;
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
                let event = service::Event::Prepared { run, outcome: Ok(()) };
                Some(Event::Service { id, event })
            }
            _ => self.keep(id, run, Part::Prepare),
        }
    }

    fn look_again(&mut self, id: ServiceId, run: Run) {
        self.sweeps_due.push((self.kernel.now() + LOOK_AGAIN, id, run));
    }

    fn sweep_what_is_due(&mut self) {
        let now = self.kernel.now();
        let due: Vec<_> = self.sweeps_due.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, id, run) in due {
            if let Some(event) = self.keep(id, run, Part::Sweep) {
                self.feed(event);
            }
        }
    }

    fn signal_run(&mut self, id: ServiceId, run: Run, what: i32) -> Option<Event> {
        if let Some(pid) = self.keepers.of_run(id, run) {
            // If the keeper has ended already, it is about to be reaped.
            self.kernel.kill(pid, what);
        }
        None
    }

    /// To every process in the machine. SIGTERM spares the writer of our log, which blocks it.
    /// SIGKILL goes to all at once, by the kernel, so that no fork can outrun it; the log ends
    /// with it, and the last lines are on standard output.
    fn signal_all(&mut self, hard: bool) {
        if hard {
            self.log.write_also_to(None);
        }
        self.kernel.kill(Pid::from_raw(-1), if hard { libc::SIGKILL } else { libc::SIGTERM });
    }

    pub(crate) fn start_logger(&mut self) {
        let file = format!("{}/supervisor.log", cvm_protocol::paths::LOGS);
        match self.keepers.keep_log(&mut self.kernel, &file) {
            Ok(pipe) => self.log.write_also_to(Some(pipe)),
            Err(why) => tracing::warn!("The supervisor's own log is not written to a file: {why}"),
        }
    }

    /// Lets the last lines reach the disk.
    fn farewell(&mut self) {
        self.log.flush();
        self.log.write_also_to(None);
        let until = self.kernel.now() + FAREWELL;
        while self.keepers.find(Owner::Logger).is_some() && self.kernel.now() < until {
            self.kernel.wait(Vec::new(), Some(until));
            self.kernel.signals();
            while let Reaped::One(pid, _) = self.kernel.reap() {
                self.keepers.take(pid, &mut Vec::new());
            }
        }
    }

    // === Operators ===

    /// Opens the control socket, and opens it anew when its path has been lost: `cvm` is how
    /// an operator finds out what is wrong, so a full /run must not cost it for good.
    fn keep_control_open(&mut self) {
        if self.control_due.is_none_or(|at| self.kernel.now() < at) {
            return;
        }
        self.control_due = None;
        if self.control.as_ref().is_some_and(Control::is_in_place) {
            return;
        }
        match Control::open(self.control_path) {
            Ok(control) => self.control = Some(control),
            Err(why) => {
                tracing::error!("`cvm` cannot find this supervisor: {why}; next try in 10 s");
                self.control_due = Some(self.kernel.now() + LOOK_AGAIN);
            }
        }
    }

    /// A panic here leaves a request without an answer and stops nothing: only an order changes the
    /// machine, and that is guarded by itself. The socket, which goes with the panic, is opened anew.
    fn answer_operators(&mut self) {
        let Some(mut control) = self.control.take() else { return };
        let now = self.kernel.now();
        let answered = caught(|| {
            control.turn(now, |request| self.answer(&request));
            control
        });
        match answered {
            Ok(control) => self.control = Some(control),
            Err(place) => {
                self.control_due = Some(now);
                tracing::error!(
                    "A request of `cvm` was not answered: a defect of the supervisor, at {place}"
                );
            }
        }
    }

    fn answer(&mut self, request: &Request) -> Body {
        match &request.verb {
            Verb::Status => {
                let status = snapshot::snapshot(&self.machine, &self.about, self.now());
                Body::Status(Box::new(Status { frozen: self.clock.is_frozen(), ..status }))
            }
            Verb::Start { service } => self.order(service, Order::Start),
            Verb::Stop { service } => self.order(service, Order::Stop),
            Verb::Restart { service } => self.order(service, Order::Restart),
            Verb::Freeze { at_most_s } => self.freeze(Duration::from_secs((*at_most_s).into())),
            Verb::Thaw => {
                self.thaw();
                Body::Taken
            }
            Verb::GatewayAccess => self.gateway_access(),
        }
    }

    /// Whoever is about to pause this machine says so. No time passes until it is thawed.
    fn freeze(&mut self, at_most: Duration) -> Body {
        if self.machine.phase() != machine::Phase::Up {
            return Body::Refused { why: "the machine is stopping".to_owned() };
        }
        if at_most > FREEZE_AT_MOST {
            let why = format!("a clock is frozen for {} at most", words(FREEZE_AT_MOST));
            return Body::Refused { why };
        }
        if self.clock.is_frozen() {
            return Body::Refused { why: "the clock is frozen already; `thaw` it first".to_owned() };
        }
        self.clock.freeze(self.since_began(), at_most);
        tracing::info!("The clock stands still for {} at most, or until `thaw` or a stop", words(at_most));
        Body::Taken
    }

    fn gateway_access(&self) -> Body {
        let services = self.machine.services().iter().map(|record| &record.service);
        match services.into_iter().find(|service| service.environment.of_the_gateway) {
            Some(gateway) => {
                let (user, environment) = self.launcher.access_to(gateway);
                Body::GatewayAccess { user, environment }
            }
            None => Body::Refused { why: "no gateway runs in this machine".to_owned() },
        }
    }

    fn order(&mut self, name: &str, order: Order) -> Body {
        if self.machine.phase() != machine::Phase::Up {
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
        match self.guarded(|supervisor| supervisor.feed(Event::Order { id, order })) {
            Some(()) => Body::Taken,
            None => {
                Body::Refused { why: "a defect of the supervisor; everything is being stopped".to_owned() }
            }
        }
    }

    fn name_of(&self, owner: Owner) -> &'static str {
        match owner {
            Owner::Step(of) => of.step.0,
            Owner::Service { id, .. } => self.machine.service(id).map_or("", |s| s.service.name),
            Owner::Logger => "log",
        }
    }
}

/// What it means for a service that the keeper of one part of a run could not be started.
fn not_kept(run: Run, part: Part, error: &str) -> Option<service::Event> {
    let why = format!("creating its process: {error}");
    match part {
        Part::Prepare => Some(service::Event::Prepared { run, outcome: Err(Refusal { why, retry: true }) }),
        Part::Main | Part::Repair => {
            say(Level::Error, &why);
            Some(service::Event::Gone { run, end: End::Code(i32::from(exit::INTERNAL)) })
        }
        // Nothing looked for leftovers, so nothing may be started over them.
        Part::Sweep => {
            say(Level::Error, &why);
            None
        }
    }
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

#[cfg(test)]
#[allow(clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
mod tests;
