//! Courtesy: a service that nobody waits for does not slow another one's start down. It depends on the other in
//! nothing.

use super::{Machine, Phase};
use crate::description::{Courtesy, Service};
use crate::moment::Moment;
use crate::service::State;

impl Machine {
    /// Until when at most a service that might start waits. An operator's order does not wait.
    pub(super) fn courtesy_ends(&self, index: usize) -> Option<Moment> {
        let record = self.services.get(index).filter(|s| *s.unit.state() == State::Idle)?;
        let courtesy = self.courtesy_of(&record.service)?;
        (self.phase == Phase::Up && self.may_start(index)).then(|| self.booted + courtesy.at_most)
    }

    /// The courtesy of `service`, as long as the other one's first start lasts.
    pub fn courtesy_of(&self, service: &Service) -> Option<Courtesy> {
        let courtesy = service.courtesy?;
        let other = self.service(self.find(courtesy.to)?)?;
        let starts = matches!(
            other.unit.state(),
            State::Idle | State::Preparing { .. } | State::Starting { .. } | State::Running { .. }
        );
        (starts && other.first_ready.is_none() && other.unit.failures() == 0).then_some(courtesy)
    }
}
