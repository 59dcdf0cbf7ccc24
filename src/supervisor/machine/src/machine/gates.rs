//! Gates that services open and close, and what that means for whoever needs them.
//!
//! ```text
//! closed ──the service says open──> open ──it says closed, or ends and the gate does not outlive it──> closed
//!                                     │                                                                  │
//!                                     └───── open again: steps are done again, services start again <────┘
//! ```
//!
//! Two rules. When a gate closes, whoever needs it is ended, and comes back without an operator when the gate
//! opens again. And the provider of a closed gate does not start while anybody who needs the gate is still
//! alive: two overlays on one upper layer would corrupt it.

use super::reports::{LastWord, one_line};
use super::{Action, Machine, Next, Order, Phase, STEP_KILL, ServiceId, StepRecord, StepState, Try};
use crate::gate::GateName;
use crate::moment::Moment;
use crate::plan::Work;
use crate::service::{self, Run, State, Then};
use cvm_protocol::report::{GateState, Level};

/// What is known of a gate besides the state of its step.
#[derive(Debug, Default)]
pub struct Gate {
    /// Whether the gate, while it is open, stays open when its provider ends.
    pub outlives: bool,
    /// Reasons that were said since the gate was last open.
    said: Vec<String>,
}

/// How many reasons are remembered as said. A service that has more of them is worth the lines.
const SAID_MAX: usize = 16;
/// Why a gate is closed.
enum Closed {
    /// Nothing is wrong: its provider waits its turn.
    Waiting,
    Fault(Next),
}

impl Machine {
    /// The gates that a service provides, as indices of their steps.
    pub(super) fn gates_of(&self, id: ServiceId) -> Vec<usize> {
        let provided = |record: &StepRecord| record.provider == Some(id);
        self.steps.iter().enumerate().filter(|(_, r)| provided(r)).map(|(index, _)| index).collect()
    }

    pub(super) fn name_at(&self, index: usize) -> Option<GateName> {
        self.steps.get(index).map(|r| r.step.name)
    }

    fn is_open(&self, index: usize) -> bool {
        self.steps.get(index).is_some_and(|r| matches!(r.state, StepState::Done { .. }))
    }

    /// Whether the gate is open and stays so without its provider.
    fn stays_open(&self, index: usize) -> bool {
        self.is_open(index) && self.steps.get(index).is_some_and(|r| r.gate.outlives)
    }

    /// Whether one of `needs` is `gate`, or needs it in turn.
    fn depends_on(&self, needs: &[GateName], gate: GateName) -> bool {
        needs.iter().any(|name| {
            *name == gate || self.record_of(*name).is_some_and(|r| self.depends_on(r.step.needs, gate))
        })
    }

    /// Whether anything that needs `gate` is alive.
    pub fn is_in_use(&self, gate: GateName) -> bool {
        let steps = self.steps.iter().filter(|r| r.is_a_living_task()).map(|r| r.step.needs);
        let services = self.services.iter().filter(|s| s.unit.run().is_some()).map(|s| s.service.needs);
        steps.chain(services).any(|needs| self.depends_on(needs, gate))
    }

    // === What a service says ===

    pub(super) fn on_gate(
        &mut self,
        id: ServiceId,
        index: usize,
        state: GateState,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
        let Some(record) = self.services.get(id.0) else { return };
        // A report may come after the order to end; a gate that is about to close does not open.
        let stays = !matches!(record.unit.state(), State::Ending { .. }) && record.later.is_none();
        match state {
            GateState::Open { outlives } if stays => self.open_gate(index, outlives, now, out),
            GateState::Open { .. } => {}
            GateState::Closed { why, retry } => {
                let next = if retry { Next::Underway } else { Next::Operator };
                self.close_gate(index, &one_line(&why), &Closed::Fault(next), now, out);
            }
            GateState::Waiting { why } => self.close_gate(index, &one_line(&why), &Closed::Waiting, now, out),
            GateState::Unknown { why } => self.doubt_gate(index, &one_line(&why), now, out),
        }
    }

    fn open_gate(&mut self, index: usize, outlives: bool, now: Moment, out: &mut Vec<Action>) {
        let provider = self.steps.get(index).and_then(|r| r.provider);
        let was_there = provider.and_then(|id| self.services.get(id.0)).is_some_and(|s| s.has_opened_a_gate);
        let Some(record) = self.steps.get_mut(index) else { return };
        record.gate.outlives = outlives;
        record.gate.said.clear();
        let began = match record.state {
            StepState::Done { .. } => return,
            StepState::Running { since } | StepState::Killing { since, .. } => since,
            StepState::Failed { began, .. } => {
                let again = if was_there { " again" } else { "" };
                let text = format!("{} is there{again}; what waits for it starts", record.capitalized());
                out.push(Action::Say(Level::Info, text));
                began
            }
            StepState::Pending => now,
        };
        record.state = StepState::Done { began, took: now.since(began) };
        if let Some(service) = provider.and_then(|id| self.services.get_mut(id.0)) {
            service.last_word = LastWord::Unsaid;
            service.has_opened_a_gate = true;
        }
        self.advance(now, out);
    }

    /// A gate that outlives its provider outlives the provider's doubts too.
    fn doubt_gate(&mut self, index: usize, why: &str, now: Moment, out: &mut Vec<Action>) {
        if !self.stays_open(index) {
            self.close_gate(index, why, &Closed::Fault(Next::Underway), now, out);
            return;
        }
        let Some(record) = self.steps.get_mut(index) else { return };
        if record.gate.remember(why) {
            let Work::Service { called, by, in_doubt, .. } = &record.step.work else { return };
            let text =
                format!("{in_doubt}: {why}; {by} keeps trying, and whatever needs {called} keeps running");
            out.push(Action::Say(Level::Warn, text));
        }
    }

    /// The gate is not open yet, or not any more.
    fn close_gate(&mut self, index: usize, why: &str, closed: &Closed, now: Moment, out: &mut Vec<Action>) {
        let up = self.phase == Phase::Up;
        let Some(record) = self.steps.get_mut(index) else { return };
        let was_open = matches!(record.state, StepState::Done { .. });
        let next = match closed {
            Closed::Waiting => Next::Underway,
            Closed::Fault(next) => *next,
        };
        let began = match record.state {
            StepState::Running { since } | StepState::Killing { since, .. } => since,
            StepState::Failed { began, .. } => began,
            StepState::Pending | StepState::Done { .. } => now,
        };
        record.state = StepState::Failed { began, took: now.since(began), why: why.to_owned(), next };
        if record.gate.remember(why) || was_open {
            let follows = match next {
                _ if !up => "everything is being stopped".to_owned(),
                Next::Operator => "an operator is needed".to_owned(),
                Next::Underway | Next::TryAt(_) => format!("{} keeps trying", record.provided_by()),
            };
            let name = record.step.name.0;
            out.push(if was_open {
                let lost = record.capitalized();
                let text = format!("{lost} is lost: {why}; whatever needs it is stopped; {follows}");
                Action::Say(Level::Error, text)
            } else if matches!(closed, Closed::Waiting) {
                Action::Say(Level::Warn, format!("Boot step {name} waits: {why}"))
            } else {
                Action::Say(Level::Error, format!("Boot step {name} failed: {why}; {follows}"))
            });
        }
        if was_open {
            let name = record.step.name;
            self.withdraw_all_that_need(name, now, out);
        }
    }

    /// Ends all that needs the gate, and makes it ready to begin anew when the gate opens again.
    fn withdraw_all_that_need(&mut self, gate: GateName, now: Moment, out: &mut Vec<Action>) {
        // During a stop, services end in the order of the stop.
        if self.phase != Phase::Up {
            return;
        }
        for index in 0..self.steps.len() {
            let Some(needs) = self.steps.get(index).map(|r| r.step.needs) else { continue };
            if !self.depends_on(needs, gate) {
                continue;
            }
            let Some(record) = self.steps.get_mut(index) else { continue };
            match record.state {
                StepState::Running { since } if record.step.work == Work::Task => {
                    record.void = true;
                    record.state = StepState::Killing { since, hard: false, until: now + STEP_KILL };
                    let of = Try { step: record.step.name, number: record.tries };
                    out.push(Action::KillStep { of, hard: false });
                }
                StepState::Killing { .. } => record.void = true,
                StepState::Failed { .. } if record.held => record.void = true,
                StepState::Pending
                | StepState::Running { .. }
                | StepState::Done { .. }
                | StepState::Failed { .. } => {
                    record.state = StepState::Pending;
                }
            }
        }
        for index in 0..self.services.len() {
            let needs = self.services.get(index).map_or(&[][..], |s| s.service.needs);
            if self.depends_on(needs, gate) {
                self.tell_unit(ServiceId(index), service::Event::Withdraw, now, out);
            }
        }
    }

    // === What becomes of a provider ===

    /// Looks at what is about to be told to a service: its end may close its gates.
    pub(super) fn watch_provider(
        &mut self,
        id: ServiceId,
        event: &service::Event,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
        use service::Event as Happens;
        let Some(record) = self.services.get(id.0) else { return };
        let is_current = |run: &Run| record.unit.run() == Some(*run);
        match event {
            Happens::MainEnded { run, .. } | Happens::Gone { run, .. } if is_current(run) => {
                let then = match record.unit.state() {
                    State::Ending { then, .. } => Some(then.clone()),
                    _ => None,
                };
                self.on_provider_end(id, then.as_ref(), now, out);
            }
            _ => return,
        }
        self.hold_or_release_providers(now, out);
    }

    fn on_provider_end(&mut self, id: ServiceId, then: Option<&Then>, now: Moment, out: &mut Vec<Action>) {
        // A provider that was withdrawn ends because its own gate has closed, and that has been said.
        if self.phase != Phase::Up || then == Some(&Then::Withdrawn) {
            return;
        }
        for index in self.gates_of(id) {
            let Some(gate) = self.name_at(index) else { continue };
            if self.is_in_use(gate)
                && let Some(record) = self.services.get_mut(id.0)
            {
                // Services that need the gate go on writing, so the last word is not true any more.
                record.last_word = LastWord::Unsaid;
            }
            let known = self.steps.get(index).is_some_and(|r| matches!(r.state, StepState::Failed { .. }));
            // The reason that the service has reported says more than its end.
            if known || self.stays_open(index) {
                continue;
            }
            let by = self.steps.get(index).map(StepRecord::provided_by).unwrap_or_default();
            let (why, next) = if then == Some(&Then::StayDown) {
                (format!("{by} was stopped"), Next::Operator)
            } else {
                (format!("{by} ended and is started again"), Next::Underway)
            };
            self.close_gate(index, &why, &Closed::Fault(next), now, out);
        }
    }

    /// Holds the providers of closed gates until all that needs those gates has ended.
    pub(super) fn hold_or_release_providers(&mut self, now: Moment, out: &mut Vec<Action>) {
        for index in 0..self.services.len() {
            let id = ServiceId(index);
            let gates = self.gates_of(id);
            if !gates.is_empty() {
                self.hold_or_release(id, &gates, now, out);
            }
        }
    }

    fn hold_or_release(&mut self, id: ServiceId, gates: &[usize], now: Moment, out: &mut Vec<Action>) {
        // A process that the kernel holds may still write: nobody knows when it writes its last.
        let is_busy = |index: &usize| {
            let Some(gate) = self.name_at(*index) else { return false };
            let frozen = self.steps.iter().any(|r| r.held && self.depends_on(r.step.needs, gate));
            frozen || self.is_in_use(gate)
        };
        let busy: Vec<bool> = gates.iter().map(is_busy).collect();
        let held = gates.iter().zip(&busy).any(|(index, busy)| *busy && !self.is_open(*index));
        let waits = gates.iter().zip(&busy).any(|(index, busy)| *busy && !self.stays_open(*index));
        let up = self.phase == Phase::Up;
        let Some(record) = self.services.get_mut(id.0) else { return };
        let released = record.unit.is_held() && !held;
        record.unit.hold(held);
        let due = if !up {
            record.later = None;
            None
        } else if waits {
            None
        } else {
            record.later.take()
        };
        if released {
            self.tell_unit(id, service::Event::Tick, now, out);
        }
        if let Some(order) = due {
            self.carry_out(id, order, now, out);
        }
    }

    /// Ending a provider closes its gates, so whatever needs them is ended first. Returns whether the order
    /// waits for that.
    pub(super) fn comes_later(
        &mut self,
        id: ServiceId,
        order: Order,
        now: Moment,
        out: &mut Vec<Action>,
    ) -> bool {
        let gates: Vec<usize> = self.gates_of(id).into_iter().filter(|i| !self.stays_open(*i)).collect();
        let Some(record) = self.services.get_mut(id.0) else { return false };
        // The latest order counts.
        record.later = None;
        if order == Order::Start {
            return false;
        }
        for index in &gates {
            if !self.is_open(*index) {
                continue;
            }
            let by = self.steps.get(*index).map(StepRecord::provided_by).unwrap_or_default();
            let (verb, next) = match order {
                Order::Stop => ("stopped", Next::Operator),
                Order::Start | Order::Restart => ("restarted", Next::Underway),
            };
            let why = format!("{by} is {verb} by an operator");
            self.close_gate(*index, &why, &Closed::Fault(next), now, out);
        }
        let in_use = gates.iter().filter_map(|i| self.name_at(*i)).any(|gate| self.is_in_use(gate));
        if in_use && let Some(record) = self.services.get_mut(id.0) {
            record.later = Some(order);
        }
        in_use
    }

    /// An operator wants what a closed gate keeps from starting: its provider starts now.
    pub(super) fn wake_provider(&mut self, index: usize, now: Moment, out: &mut Vec<Action>) {
        let Some(id) = self.steps.get(index).and_then(|r| r.provider) else { return };
        if self.is_open(index) {
            return;
        }
        if let Some(record) = self.services.get_mut(id.0) {
            record.later = None;
        }
        self.tell_unit(id, service::Event::Start, now, out);
    }
}

impl Gate {
    /// Whether the reason is new since the gate was last open.
    fn remember(&mut self, why: &str) -> bool {
        if self.said.iter().any(|said| said == why) {
            return false;
        }
        self.said.truncate(SAID_MAX - 1);
        self.said.insert(0, why.to_owned());
        true
    }
}

impl StepRecord {
    fn is_a_living_task(&self) -> bool {
        self.step.work == Work::Task && self.state.is_alive()
    }

    /// The gate at the beginning of a sentence.
    fn capitalized(&self) -> String {
        let called = match &self.step.work {
            Work::Service { called, .. } => called,
            Work::Task => self.step.name.0,
        };
        let mut letters = called.chars();
        letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
    }

    /// Who opens the gate, in words.
    pub(crate) fn provided_by(&self) -> String {
        match &self.step.work {
            Work::Service { by, .. } => (*by).to_owned(),
            Work::Task => format!("boot step {}", self.step.name.0),
        }
    }
}
