//! The boot: which step may begin, which service may start, and what a failed step leads to.

use super::{Action, Machine, Next, Phase, Refusal, STEP_KILL, ServiceId, StepRecord, StepState, Try};
use crate::gate::GateName;
use crate::moment::Moment;
use crate::plan::{STEP_BACKOFF, Weight, Work};
use crate::service::{self, State};
use cvm_protocol::report::Level;
use cvm_protocol::time::words;

impl Machine {
    /// Starts whatever has become possible.
    pub(super) fn advance(&mut self, now: Moment, out: &mut Vec<Action>) {
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
            if idle && self.may_start(index) && self.courtesy_ends(index).is_none_or(|end| now >= end) {
                self.tell_unit(ServiceId(index), service::Event::Start, now, out);
            }
        }
    }

    fn may_begin(&self, index: usize) -> bool {
        let Some(record) = self.steps.get(index) else { return false };
        record.state == StepState::Pending
            // A gate does not open anew while anybody who used it before it closed is still alive.
            && !self.is_in_use(record.step.name)
            && record.provider.is_none_or(|id| self.services_may_start() && self.may_open(id))
            && record.step.after.iter().all(|name| self.has_settled(*name))
            && record.step.needs.iter().all(|name| self.is_done(*name))
    }

    pub(super) fn may_start(&self, index: usize) -> bool {
        self.services_may_start()
            && self.services.get(index).is_some_and(|s| s.service.needs.iter().all(|n| self.is_done(*n)))
    }

    /// Whether a provider is not stopped or parked until an operator acts.
    fn may_open(&self, provider: ServiceId) -> bool {
        let state = self.services.get(provider.0).map(|s| s.unit.state());
        !matches!(state, Some(State::Down | State::Parked { .. }))
    }

    /// Whether the steps that come before every service have ended.
    fn services_may_start(&self) -> bool {
        self.steps.iter().filter(|r| r.step.before_services).all(StepRecord::has_settled)
    }

    pub(super) fn begin_step(&mut self, index: usize, now: Moment, out: &mut Vec<Action>) {
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

    pub(super) fn on_step_ended(
        &mut self,
        of: Try,
        outcome: Result<(), Refusal>,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
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

    /// Not even SIGKILL ended the step's process in time. Steps and services that wait for its end go on. It is not
    /// tried again by itself, because each try would leave another process that the kernel holds.
    fn give_up_step(&mut self, index: usize, began: Moment, now: Moment, out: &mut Vec<Action>) {
        let Some(record) = self.steps.get_mut(index) else { return };
        record.held = true;
        let name = record.step.name;
        let why = "its process does not die of SIGKILL: the kernel holds it (a dead disk or mount?)".into();
        self.fail_step(name, began, Refusal { why, retry: false }, now, out);
        self.advance(now, out);
    }

    pub(super) fn tick_steps(&mut self, now: Moment, out: &mut Vec<Action>) {
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
}
