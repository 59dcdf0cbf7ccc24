//! The whole machine: boot steps, services, orders from operators, and the way down.
//!
//! A pure state machine over the machines of the single services. It owns which step may
//! run, which service may start, and in which order things end.
//!
//! It knows no pids, files or clocks. What services report is heard in [`reports`], what
//! becomes of their gates is in [`gates`], and the rest is in the files named for it.

mod boot;
mod courtesy;
mod gates;
mod orders;
mod reports;
mod stop;

use crate::description::Service;
use crate::gate::GateName;
use crate::moment::Moment;
use crate::plan::{Plan, Step, Work};
use crate::service::{self, Refusal, Run, State, Unit};
use cvm_protocol::exit_status::End;
use cvm_protocol::fact::Fact;
use cvm_protocol::report::{Level, ServiceReport};
pub use gates::Gate;
pub use orders::Order;
use std::time::Duration;
pub use stop::{ENGINE_WAITS, STOP_AT_MOST};

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

/// Between the end of a step's deadline and the end of its keeper.
const STEP_KILL: Duration = Duration::from_secs(3);

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
    /// The service that opens the gate keeps trying.
    Underway,
    /// Nothing until an operator acts.
    Operator,
}

impl StepState {
    /// Whether steps and services that only wait for the end of this step may go on.
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
    /// The last try was given up, and its process has not ended.
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

    /// Whether steps and services that only wait for the end of this step may go on: also while it is tried again.
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
    /// Lines of its log that were dropped because the disk was too slow.
    pub dropped_lines: u64,
    /// What the service reported last about itself.
    pub facts: Vec<Fact>,
    last_word: reports::LastWord,
    /// Whether the service has opened a gate at any time since PID 1 began.
    has_opened_a_gate: bool,
    /// An operator's order that waits until nobody needs its gates any more.
    later: Option<Order>,
    notes: reports::NoteAllowance,
    errors: reports::NoteAllowance,
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
            last_word: reports::LastWord::Unsaid,
            has_opened_a_gate: false,
            later: None,
            notes: reports::NoteAllowance::of_notes(),
            errors: reports::NoteAllowance::of_errors(),
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
    booted: Moment,
    /// A stop signal has come.
    asked: bool,
    hurried: bool,
    closing_since: Moment,
    /// What is left of [`stop::OVERHEAD`].
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
            booted: Moment::default(),
            asked: false,
            hurried: false,
            closing_since: Moment::default(),
            overhead: stop::OVERHEAD,
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

    /// The step that `service` waits for, or the step that this one waits for in turn: the first cause.
    pub fn missing_for(&self, service: &Service) -> Option<&StepRecord> {
        let missing = |r: &&StepRecord| {
            service.needs.contains(&r.step.name) && !matches!(r.state, StepState::Done { .. })
        };
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
        let courtesies = (0..self.services.len()).filter_map(|index| self.courtesy_ends(index));
        let phase = match self.phase {
            Phase::Sweeping { until, .. } => Some(until),
            Phase::Closing { until, .. } => Some(until + self.overhead),
            Phase::Up | Phase::Over => None,
        };
        steps.chain(units).chain(courtesies).chain(phase).min()
    }

    /// The one entrance.
    pub fn step(&mut self, event: Event, now: Moment) -> Vec<Action> {
        let mut out = Vec::new();
        match event {
            Event::Boot => {
                self.booted = now;
                self.advance(now, &mut out);
            }
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
        // Gates close before the service hears of its end, because it may start again at once.
        self.watch_provider(id, &event, now, out);
        self.tell_unit(id, event, now, out);
        // A step or another service may have waited for this event.
        self.advance(now, out);
    }

    fn on_dropped(&mut self, id: ServiceId, lines: u64, out: &mut Vec<Action>) {
        let Some(record) = self.services.get_mut(id.0) else { return };
        record.dropped_lines += lines;
        let name = record.service.name;
        let text = format!("{name}: {lines} log lines dropped, the disk was slower than the service");
        out.push(Action::Say(Level::Warn, text));
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

    fn on_tick(&mut self, now: Moment, out: &mut Vec<Action>) {
        self.say_dropped_notes(now, out);
        self.tick_steps(now, out);
        for index in 0..self.services.len() {
            self.tell_unit(ServiceId(index), service::Event::Tick, now, out);
        }
        self.advance(now, out);
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

    fn tell_unit(&mut self, id: ServiceId, event: service::Event, now: Moment, out: &mut Vec<Action>) {
        let Some(record) = self.services.get_mut(id.0) else { return };
        let was_running = matches!(record.unit.state(), State::Running { .. });
        let was_ready = matches!(record.unit.state(), State::Running { ready: true, .. });
        let actions = record.unit.step(event, now);
        if actions.iter().any(|action| matches!(action, service::Action::Launch(_))) {
            record.last_word = reports::LastWord::Unsaid;
        }
        if record.unit.run().is_none() {
            record.facts.clear();
        }
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
