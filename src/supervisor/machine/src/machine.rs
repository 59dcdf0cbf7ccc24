//! The whole machine: boot steps, services, orders from operators, and the way down.
//!
//! ```text
//! Up ── SIGTERM ──> Closing(order 1, 5, 9 …) ── all at rest ──> Sweeping(TERM → KILL) ── nobody left ──> Over
//! ```
//!
//! Each group of services has its grace, and all groups share five seconds for process trees that are slow to
//! die. A group that has used both up is left to the sweep, so the whole stop ends within
//! [`Machine::stop_budget`].
//!
//! A pure state machine over the machines of the single services. It owns which step may
//! run, which service may start, and in which order things end.
//!
//! It knows no pids, files or clocks. What the reports of services mean is in [`gates`].

mod gates;

use crate::description::Service;
use crate::gate::GateName;
use crate::moment::Moment;
use crate::plan::{Plan, STEP_BACKOFF, Step, Weight, Work};
use crate::service::{self, Refusal, Run, State, Unit};
use cvm_protocol::exit_status::End;
use cvm_protocol::fact::Fact;
use cvm_protocol::report::{Level, ServiceReport};
use cvm_protocol::time::words;
pub use gates::Gate;
use std::time::Duration;

/// Index of a service in the plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceId(pub usize);

/// One try of one step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Try {
    pub step: GateName,
    pub number: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Boot,
    StepEnded {
        of: Try,
        outcome: Result<(), Refusal>,
    },
    Service {
        id: ServiceId,
        event: service::Event,
    },
    /// What a service of ours said in one of its runs.
    Report {
        id: ServiceId,
        run: Run,
        report: ServiceReport,
    },
    Order {
        id: ServiceId,
        order: Order,
    },
    /// The keeper of a service dropped lines of its log.
    Dropped {
        id: ServiceId,
        lines: u64,
    },
    /// SIGTERM or SIGINT. A second one shortens.
    Terminate,
    /// The supervisor itself has failed. Everything is stopped, in order and with full budgets: the
    /// first stop signal that comes later shortens nothing.
    Defect,
    /// PID 1 has no children left.
    Childless,
    Tick,
}

/// What an operator may ask of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Start,
    Stop,
    Restart,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    RunStep(Try),
    /// End a step that took too long; `hard` when its keeper does not answer either.
    KillStep {
        of: Try,
        hard: bool,
    },
    Service {
        id: ServiceId,
        action: service::Action,
    },
    /// A line for the log, in our words.
    Say(Level, String),
    /// To every process that is left in the machine: SIGTERM, or SIGKILL when `hard`.
    SignalAll {
        hard: bool,
    },
    /// Nothing is left to do.
    Exit {
        /// Processes did not die of SIGKILL in time.
        abandoned: bool,
        /// A service left something undone, or nobody knows whether it did.
        undrained: bool,
    },
}

/// Between SIGTERM and SIGKILL for whoever is left when the services are down: login
/// sessions and daemons of theirs.
const SWEEP_TERM: Duration = Duration::from_secs(2);
/// Between SIGKILL and giving up on processes that the kernel holds.
const SWEEP_KILL: Duration = Duration::from_secs(3);
/// Between the end of a step's deadline and the end of its keeper.
const STEP_KILL: Duration = Duration::from_secs(3);
/// What the compose file has the engine wait after a stop, unless `STOP_GRACE_PERIOD` says otherwise. dstack
/// stops a VM's containers in a unit that systemd ends after this time, whatever the compose file says.
pub const ENGINE_WAITS: Duration = Duration::from_secs(90);
/// A stop by the defaults ends within this. The rest of [`ENGINE_WAITS`] is for the engine's own work.
pub const STOP_AT_MOST: Duration = Duration::from_secs(80);
/// What all groups together may take beyond their graces, for trees that do not die at once of SIGKILL.
const OVERHEAD: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StepState {
    Pending,
    Running {
        since: Moment,
    },
    /// Its deadline has passed and it is being ended.
    Killing {
        since: Moment,
        hard: bool,
        until: Moment,
    },
    Done {
        began: Moment,
        took: Duration,
    },
    Failed {
        began: Moment,
        took: Duration,
        why: String,
        next: Next,
    },
}

/// What follows a failed step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    TryAt(Moment),
    /// Whoever does it keeps trying by itself.
    Underway,
    /// Nothing, before an operator has acted.
    Operator,
}

impl StepState {
    /// Whether what waits for its end may go on.
    fn has_ended(&self) -> bool {
        matches!(self, Self::Done { .. } | Self::Failed { .. })
    }

    pub fn is_alive(&self) -> bool {
        matches!(self, Self::Running { .. } | Self::Killing { .. })
    }
}

#[derive(Debug)]
pub struct StepRecord {
    pub step: Step,
    pub state: StepState,
    pub tries: u32,
    /// Its last try was given up on without having ended.
    pub held: bool,
    /// A gate that it needs closed while it ran: whatever its outcome, it is done again.
    void: bool,
    /// The service that opens the gate, where it is not this step's own task.
    provider: Option<ServiceId>,
    pub gate: Gate,
}

impl StepRecord {
    fn overdue_at(&self, since: Moment) -> Option<Moment> {
        self.step.deadline.map(|span| since + span)
    }

    /// Whether what only waits for its end may go on: also while it is tried again.
    fn has_settled(&self) -> bool {
        self.state.has_ended() || self.tries > 1
    }
}

#[derive(Debug)]
pub struct ServiceRecord {
    pub service: Service,
    pub unit: Unit,
    pub first_exec: Option<Moment>,
    pub first_ready: Option<Moment>,
    /// Lines of its log that the disk was too slow for.
    pub dropped_lines: u64,
    /// How the service said last that it stands.
    pub facts: Vec<Fact>,
    last_word: gates::LastWord,
    /// At any time in this life.
    has_opened_a_gate: bool,
    /// An operator's order that waits until nobody needs its gates any more.
    later: Option<Order>,
    notes: gates::NoteAllowance,
}

impl ServiceRecord {
    fn new(service: Service) -> Self {
        Self {
            unit: Unit::new(service.rules()),
            service,
            first_exec: None,
            first_ready: None,
            dropped_lines: 0,
            facts: Vec::new(),
            last_word: gates::LastWord::Unsaid,
            has_opened_a_gate: false,
            later: None,
            notes: gates::NoteAllowance::default(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Up,
    /// The group of services with this order is being stopped, and its longest grace ends at `until`.
    Closing {
        order: u8,
        until: Moment,
    },
    Sweeping {
        hard: bool,
        until: Moment,
    },
    Over,
}

#[derive(Debug)]
pub struct Machine {
    steps: Vec<StepRecord>,
    services: Vec<ServiceRecord>,
    phase: Phase,
    /// A stop signal has come.
    asked: bool,
    hurried: bool,
    closing_since: Moment,
    /// What is left of [`OVERHEAD`].
    overhead: Duration,
}

impl Machine {
    pub fn new(plan: Plan) -> Self {
        let (steps, services) = plan.into_parts();
        let provider = |step: &Step| match step.work {
            Work::Service { name, .. } => services.iter().position(|s| s.name == name).map(ServiceId),
            Work::Task => None,
        };
        let steps = steps
            .into_iter()
            .map(|step| StepRecord {
                provider: provider(&step),
                step,
                state: StepState::Pending,
                tries: 0,
                held: false,
                void: false,
                gate: Gate::default(),
            })
            .collect();
        let services = services.into_iter().map(ServiceRecord::new).collect();
        Self {
            steps,
            services,
            phase: Phase::Up,
            asked: false,
            hurried: false,
            closing_since: Moment::default(),
            overhead: OVERHEAD,
        }
    }

    pub fn phase(&self) -> Phase {
        self.phase
    }

    pub fn steps(&self) -> &[StepRecord] {
        &self.steps
    }

    pub fn services(&self) -> &[ServiceRecord] {
        &self.services
    }

    pub fn service(&self, id: ServiceId) -> Option<&ServiceRecord> {
        self.services.get(id.0)
    }

    pub fn find(&self, name: &str) -> Option<ServiceId> {
        self.services.iter().position(|s| s.service.name == name).map(ServiceId)
    }

    /// What to say at boot when a stop may take longer than the engine waits by default.
    pub fn warning_of_a_long_stop(&self) -> Option<String> {
        let budget = self.stop_budget();
        (budget > STOP_AT_MOST).then(|| {
            format!(
                "A stop may take up to {}, and the compose file has the engine kill everything after {}: set \
                 STOP_GRACE_PERIOD={}s for it, or `--stop-timeout` where there is no compose file. dstack gives a \
                 machine that is shut down {}, whatever is set",
                words(budget),
                words(ENGINE_WAITS),
                budget.as_secs() + 10,
                words(ENGINE_WAITS)
            )
        })
    }

    /// The longest an ordered shutdown may take; compose's `stop_grace_period` lies above it.
    pub fn stop_budget(&self) -> Duration {
        let mut orders: Vec<u8> = self.services.iter().map(|s| s.service.stop_order).collect();
        orders.sort_unstable();
        orders.dedup();
        let graces = orders.into_iter().map(|order| self.grace_of(order));
        graces.sum::<Duration>() + OVERHEAD + SWEEP_TERM + SWEEP_KILL
    }

    /// The longest grace in the group of services with this order.
    fn grace_of(&self, order: u8) -> Duration {
        let graces = self.services.iter().filter(|s| s.service.stop_order == order).map(|s| s.service.grace);
        graces.max().unwrap_or_default()
    }

    /// Steps that `service` still waits for, with what is known of them.
    pub fn missing_for(&self, service: &Service) -> Option<&StepRecord> {
        let missing = |r: &&StepRecord| {
            service.needs.contains(&r.step.name) && !matches!(r.state, StepState::Done { .. })
        };
        // The first cause, not its consequence: what a missing step itself waits for.
        let mut record = self.steps.iter().find(missing)?;
        while matches!(record.state, StepState::Pending) {
            let Some(cause) = self.steps.iter().find(|r| {
                record.step.needs.contains(&r.step.name) && !matches!(r.state, StepState::Done { .. })
            }) else {
                break;
            };
            record = cause;
        }
        Some(record)
    }

    /// When this machine wants a [`Event::Tick`] at the latest.
    pub fn deadline(&self) -> Option<Moment> {
        let steps = self.steps.iter().filter_map(|r| match &r.state {
            StepState::Running { since } => r.overdue_at(*since),
            StepState::Killing { until, .. } => Some(*until),
            StepState::Failed { next: Next::TryAt(at), .. } if self.phase == Phase::Up => Some(*at),
            _ => None,
        });
        let units = self.services.iter().filter_map(|s| s.unit.deadline());
        let phase = match self.phase {
            Phase::Sweeping { until, .. } => Some(until),
            Phase::Closing { until, .. } => Some(until + self.overhead),
            Phase::Up | Phase::Over => None,
        };
        steps.chain(units).chain(phase).min()
    }

    /// The one entrance.
    pub fn step(&mut self, event: Event, now: Moment) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Boot => self.advance(now, &mut out),
            Event::StepEnded { of, outcome } => self.on_step_ended(of, outcome, now, &mut out),
            Event::Service { id, event } => self.on_service(id, event, now, &mut out),
            Event::Report { id, run, report } => self.on_report(id, run, report, now, &mut out),
            Event::Dropped { id, lines } => self.on_dropped(id, lines, &mut out),
            Event::Order { id, order } => self.on_order(id, order, now, &mut out),
            Event::Terminate => self.on_terminate(now, &mut out),
            Event::Defect => self.on_defect(now, &mut out),
            Event::Childless => {
                if matches!(self.phase, Phase::Sweeping { .. }) {
                    self.leave(false, now, &mut out);
                }
            }
            Event::Tick => self.on_tick(now, &mut out),
        }
        self.hold_or_release_providers(now, &mut out);
        self.progress(now, &mut out);
        out
    }

    fn on_service(&mut self, id: ServiceId, event: service::Event, now: Moment, out: &mut Vec<Action>) {
        // Before the service itself hears of it, which may start it again at once.
        self.watch_provider(id, &event, now, out);
        self.tell_unit(id, event, now, out);
        // Something may have waited for this end.
        self.advance(now, out);
    }

    fn on_dropped(&mut self, id: ServiceId, lines: u64, out: &mut Vec<Action>) {
        let Some(record) = self.services.get_mut(id.0) else { return };
        record.dropped_lines += lines;
        let name = record.service.name;
        let text = format!("{name}: {lines} log lines dropped, the disk was slower than the service");
        out.push(Action::Say(Level::Warn, text));
    }

    /// Starts whatever has become possible.
    fn advance(&mut self, now: Moment, out: &mut Vec<Action>) {
        if self.phase != Phase::Up {
            return;
        }
        loop {
            // Services first: sshd comes up before the next step that can fail.
            self.start_services(now, out);
            let startable = (0..self.steps.len()).find(|i| self.may_begin(*i));
            let Some(index) = startable else { break };
            self.begin_step(index, now, out);
        }
    }

    fn start_services(&mut self, now: Moment, out: &mut Vec<Action>) {
        for index in 0..self.services.len() {
            let idle = self.services.get(index).is_some_and(|s| *s.unit.state() == State::Idle);
            if idle && self.may_start(index) {
                self.tell_unit(ServiceId(index), service::Event::Start, now, out);
            }
        }
    }

    fn may_begin(&self, index: usize) -> bool {
        let Some(record) = self.steps.get(index) else { return false };
        record.state == StepState::Pending
            // While somebody from before the gate closed is still alive, it does not open anew.
            && !self.is_in_use(record.step.name)
            && (record.provider.is_none() || self.services_may_start())
            && record.step.after.iter().all(|name| self.has_settled(*name))
            && record.step.needs.iter().all(|name| self.is_done(*name))
    }

    fn may_start(&self, index: usize) -> bool {
        self.services_may_start()
            && self.services.get(index).is_some_and(|s| s.service.needs.iter().all(|n| self.is_done(*n)))
    }

    /// Whether the steps that come before every service have ended.
    fn services_may_start(&self) -> bool {
        self.steps.iter().filter(|r| r.step.before_services).all(StepRecord::has_settled)
    }

    fn record_of(&self, name: GateName) -> Option<&StepRecord> {
        self.steps.iter().find(|r| r.step.name == name)
    }

    fn has_settled(&self, name: GateName) -> bool {
        self.record_of(name).is_none_or(StepRecord::has_settled)
    }

    fn is_done(&self, name: GateName) -> bool {
        self.record_of(name).is_none_or(|r| matches!(r.state, StepState::Done { .. }))
    }

    fn begin_step(&mut self, index: usize, now: Moment, out: &mut Vec<Action>) {
        let Some(record) = self.steps.get_mut(index) else { return };
        record.tries += 1;
        (record.held, record.void) = (false, false);
        record.state = StepState::Running { since: now };
        out.push(match &record.step.work {
            Work::Task => Action::RunStep(Try { step: record.step.name, number: record.tries }),
            Work::Service { says: Some(says), .. } => Action::Say(Level::Info, says.clone()),
            Work::Service { says: None, .. } => return,
        });
    }

    fn on_step_ended(&mut self, of: Try, outcome: Result<(), Refusal>, now: Moment, out: &mut Vec<Action>) {
        let Some(record) = self.steps.iter_mut().find(|r| r.step.name == of.step && r.tries == of.number)
        else {
            return;
        };
        let (began, overdue) = match record.state {
            StepState::Running { since } => (since, false),
            StepState::Killing { since, .. } => (since, true),
            StepState::Failed { began, .. } if record.held => (began, true),
            _ => return,
        };
        record.held = false;
        if std::mem::take(&mut record.void) {
            record.state = StepState::Pending;
            return self.advance(now, out);
        }
        let allowed = words(record.step.deadline.unwrap_or_default());
        match outcome {
            Ok(()) => {
                record.state = StepState::Done { began, took: now.since(began) };
                if let Some(line) = record.step.says {
                    out.push(Action::Say(Level::Info, line.into()));
                }
            }
            Err(_) if overdue => {
                let why = format!("it took longer than its {allowed} and was ended");
                self.fail_step(of.step, began, Refusal { why, retry: true }, now, out);
            }
            Err(refusal) => self.fail_step(of.step, began, refusal, now, out),
        }
        self.advance(now, out);
    }

    fn fail_step(
        &mut self,
        name: GateName,
        began: Moment,
        refusal: Refusal,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
        let up = self.phase == Phase::Up;
        let Some(record) = self.steps.iter_mut().find(|r| r.step.name == name) else { return };
        let Refusal { why, retry } = refusal;
        let wait = STEP_BACKOFF.wait(record.tries);
        let next = if retry && up { Next::TryAt(now + wait) } else { Next::Operator };
        let level = match record.step.weight {
            _ if !up => Level::Info,
            Weight::Required => Level::Error,
            Weight::Degradable => Level::Warn,
        };
        let follows = match next {
            _ if !up => "everything is being stopped".into(),
            Next::TryAt(_) => format!("next try in {}", words(wait)),
            Next::Underway | Next::Operator => "trying again cannot help until something is changed".into(),
        };
        out.push(Action::Say(level, format!("Boot step {} failed: {why}; {follows}", name.0)));
        record.state = StepState::Failed { began, took: now.since(began), why, next };
    }

    /// Not even SIGKILL ended it in time. What waits for its end goes on; it is not tried again
    /// by itself, because each try would leave another process in the kernel's hands.
    fn give_up_step(&mut self, index: usize, began: Moment, now: Moment, out: &mut Vec<Action>) {
        let Some(record) = self.steps.get_mut(index) else { return };
        record.held = true;
        let name = record.step.name;
        let why = "its process does not die of SIGKILL: the kernel holds it (a dead disk or mount?)".into();
        self.fail_step(name, began, Refusal { why, retry: false }, now, out);
        self.advance(now, out);
    }

    fn on_order(&mut self, id: ServiceId, order: Order, now: Moment, out: &mut Vec<Action>) {
        if self.phase != Phase::Up {
            return;
        }
        let Some(record) = self.services.get(id.0) else { return };
        if order != Order::Stop && !self.may_start(id.0) {
            // What it waits for is what the operator means: try that again now.
            let needs = record.service.needs;
            self.retry_now(needs, now, out);
            if let Some(record) = self.services.get_mut(id.0) {
                record.unit.rearm();
            }
            self.advance(now, out);
            return;
        }
        if self.comes_later(id, order, now, out) {
            return;
        }
        self.carry_out(id, order, now, out);
    }

    fn carry_out(&mut self, id: ServiceId, order: Order, now: Moment, out: &mut Vec<Action>) {
        let event = match order {
            Order::Start => service::Event::Start,
            Order::Stop => service::Event::Stop,
            Order::Restart => service::Event::Restart,
        };
        self.tell_unit(id, event, now, out);
    }

    /// Failed steps among `names`, and among what those need, are tried again at once.
    fn retry_now(&mut self, names: &[GateName], now: Moment, out: &mut Vec<Action>) {
        for name in names {
            let Some(index) = self.steps.iter().position(|r| r.step.name == *name) else { continue };
            let Some(record) = self.steps.get(index) else { continue };
            let needs = record.step.needs;
            if matches!(record.step.work, Work::Service { .. }) {
                if needs.iter().all(|n| self.is_done(*n)) {
                    self.wake_provider(index, now, out);
                } else {
                    self.retry_now(needs, now, out);
                }
                continue;
            }
            match record.state {
                StepState::Failed { .. } if needs.iter().all(|n| self.is_done(*n)) => {
                    self.begin_step(index, now, out);
                }
                StepState::Failed { .. } | StepState::Pending => self.retry_now(needs, now, out),
                _ => {}
            }
        }
    }

    fn on_terminate(&mut self, now: Moment, out: &mut Vec<Action>) {
        let again = std::mem::replace(&mut self.asked, true);
        match self.phase {
            Phase::Up => self.close(now, out),
            // After a defect.
            Phase::Closing { .. } | Phase::Sweeping { .. } if !again => {
                out.push(Action::Say(Level::Info, "Stop signal: everything is being stopped already".into()));
            }
            Phase::Closing { .. } if !self.hurried => {
                self.hurried = true;
                out.push(Action::Say(Level::Warn, "Second stop signal: not waiting any longer".into()));
                for index in 0..self.services.len() {
                    self.tell_unit(ServiceId(index), service::Event::Close, now, out);
                    self.tell_unit(ServiceId(index), service::Event::Hurry, now, out);
                }
            }
            Phase::Sweeping { hard: false, .. } => self.sweep(true, now, out),
            _ => {}
        }
    }

    fn on_defect(&mut self, now: Moment, out: &mut Vec<Action>) {
        if self.phase == Phase::Up {
            self.close(now, out);
        }
    }

    fn close(&mut self, now: Moment, out: &mut Vec<Action>) {
        self.closing_since = now;
        out.push(Action::Say(
            Level::Info,
            format!("Stopping: services get up to {} in all", words(self.stop_budget())),
        ));
        for record in &mut self.steps {
            if record.state.is_alive() && record.step.work == Work::Task {
                let of = Try { step: record.step.name, number: record.tries };
                out.push(Action::KillStep { of, hard: false });
            }
        }
        let first = self.services.iter().map(|s| s.service.stop_order).min().unwrap_or(0);
        // A service of a later group that dies meanwhile must not come back.
        for record in &mut self.services {
            record.unit.refuse_starts();
        }
        self.close_waiting(now, out);
        self.close_order(first, now, out);
    }

    /// Nothing may start any more, so whatever is at rest is closed at once.
    fn close_waiting(&mut self, now: Moment, out: &mut Vec<Action>) {
        for index in 0..self.services.len() {
            if self.services.get(index).is_some_and(|s| s.unit.is_at_rest()) {
                self.tell_unit(ServiceId(index), service::Event::Close, now, out);
            }
        }
    }

    fn close_order(&mut self, order: u8, now: Moment, out: &mut Vec<Action>) {
        self.phase = Phase::Closing { order, until: now + self.grace_of(order) };
        for index in 0..self.services.len() {
            if self.services.get(index).is_some_and(|s| s.service.stop_order == order) {
                self.tell_unit(ServiceId(index), service::Event::Close, now, out);
            }
        }
    }

    /// On the way down: the next group, once the one before is at rest or out of time.
    fn progress(&mut self, now: Moment, out: &mut Vec<Action>) {
        while let Phase::Closing { order, until } = self.phase {
            let group = || self.services.iter().filter(move |s| s.service.stop_order == order);
            let alive: Vec<&str> =
                group().filter(|s| !s.unit.is_finished()).map(|s| s.service.name).collect();
            if !alive.is_empty() {
                if now < until + self.overhead {
                    return;
                }
                let text = format!("{} did not end in time; the stop goes on without", alive.join(", "));
                out.push(Action::Say(Level::Error, text));
            }
            self.overhead = self.overhead.saturating_sub(now.since(until));
            let later = self.services.iter().map(|s| s.service.stop_order).filter(|o| *o > order).min();
            if let Some(next) = later {
                self.close_order(next, now, out);
            } else {
                let hard = self.hurried;
                self.sweep(hard, now, out);
            }
        }
    }

    fn sweep(&mut self, hard: bool, now: Moment, out: &mut Vec<Action>) {
        let until = now + if hard { SWEEP_KILL } else { SWEEP_TERM };
        self.phase = Phase::Sweeping { hard, until };
        out.push(Action::SignalAll { hard });
    }

    fn leave(&mut self, abandoned: bool, now: Moment, out: &mut Vec<Action>) {
        self.phase = Phase::Over;
        let took = words(now.since(self.closing_since));
        out.push(if abandoned {
            Action::Say(Level::Error, format!("Stopped after {took}; some processes did not die of SIGKILL"))
        } else {
            Action::Say(Level::Info, format!("Stopped in order after {took}"))
        });
        let undone = self.left_undone();
        let undrained = !undone.is_empty();
        out.extend(undone.into_iter().map(|text| Action::Say(Level::Error, text)));
        out.push(Action::Exit { abandoned, undrained });
    }

    fn on_tick(&mut self, now: Moment, out: &mut Vec<Action>) {
        self.tick_steps(now, out);
        for index in 0..self.services.len() {
            self.tell_unit(ServiceId(index), service::Event::Tick, now, out);
        }
        match self.phase {
            Phase::Sweeping { hard, until } if now >= until => {
                if hard {
                    self.leave(true, now, out);
                } else {
                    self.sweep(true, now, out);
                }
            }
            _ => {}
        }
    }

    fn tick_steps(&mut self, now: Moment, out: &mut Vec<Action>) {
        let up = self.phase == Phase::Up;
        for index in 0..self.steps.len() {
            let Some(record) = self.steps.get_mut(index) else { continue };
            let of = Try { step: record.step.name, number: record.tries };
            match record.state {
                StepState::Running { since } if record.overdue_at(since).is_some_and(|due| now >= due) => {
                    record.state = StepState::Killing { since, hard: false, until: now + STEP_KILL };
                    out.push(Action::KillStep { of, hard: false });
                }
                StepState::Killing { since, hard: false, until } if now >= until => {
                    record.state = StepState::Killing { since, hard: true, until: now + STEP_KILL };
                    out.push(Action::KillStep { of, hard: true });
                }
                StepState::Killing { since, hard: true, until } if now >= until => {
                    self.give_up_step(index, since, now, out);
                }
                StepState::Failed { next: Next::TryAt(at), .. } if up && now >= at => {
                    self.begin_step(index, now, out);
                }
                _ => {}
            }
        }
    }

    fn tell_unit(&mut self, id: ServiceId, event: service::Event, now: Moment, out: &mut Vec<Action>) {
        let Some(record) = self.services.get_mut(id.0) else { return };
        let was_running = matches!(record.unit.state(), State::Running { .. });
        let was_ready = matches!(record.unit.state(), State::Running { ready: true, .. });
        let actions = record.unit.step(event, now);
        let (is_running, is_ready) = match record.unit.state() {
            State::Running { ready, .. } => (true, *ready),
            _ => (false, false),
        };
        if is_running && !was_running {
            record.first_exec.get_or_insert(now);
            if let Some(line) = record.service.says_started {
                out.push(Action::Say(Level::Info, line.into()));
            }
        }
        if is_ready && !was_ready {
            record.first_ready.get_or_insert(now);
            if let Some(line) = record.service.says_ready {
                out.push(Action::Say(Level::Info, line.into()));
            }
        }
        let name = record.service.name;
        let required = record.service.required;
        out.extend(actions.into_iter().map(|action| match action {
            // A failed optional service is a warning.
            service::Action::Say(Level::Error, text) if !required => {
                Action::Say(Level::Warn, format!("{name}: {text}"))
            }
            service::Action::Say(level, text) => Action::Say(level, format!("{name}: {text}")),
            action => Action::Service { id, action },
        }));
    }
}

/// How a step's process ended, when it left no report.
pub fn unreported(end: &End) -> Refusal {
    Refusal { why: format!("its process {end} without a report"), retry: true }
}
