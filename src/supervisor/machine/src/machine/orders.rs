//! What an operator may ask of a service, and what the machine does for it.

use super::{Action, Machine, Phase, ServiceId, StepState};
use crate::gate::GateName;
use crate::moment::Moment;
use crate::plan::Work;
use crate::service;

/// What an operator may ask of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Start,
    Stop,
    Restart,
}

impl Machine {
    pub(super) fn on_order(&mut self, id: ServiceId, order: Order, now: Moment, out: &mut Vec<Action>) {
        if self.phase != Phase::Up {
            return;
        }
        let Some(record) = self.services.get(id.0) else { return };
        if order != Order::Stop && !self.may_start(id.0) {
            // The operator wants the gates that the service waits for: their steps are tried again now.
            let needs = record.service.needs;
            self.retry_now(needs, now, out);
            if let Some(record) = self.services.get_mut(id.0) {
                record.unit.rearm();
                // The latest order counts.
                record.later = None;
            }
            self.advance(now, out);
            return;
        }
        if self.comes_later(id, order, now, out) {
            return;
        }
        self.carry_out(id, order, now, out);
    }

    pub(super) fn carry_out(&mut self, id: ServiceId, order: Order, now: Moment, out: &mut Vec<Action>) {
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
}
