//! The way down: one group of services after the other, each with its time, and then whoever is left.
//!
//! ```text
//! Up ── SIGTERM ──> Closing(order 1, 5, 9 …) ── all at rest ──> Sweeping(TERM → KILL) ── nobody left ──> Over
//! ```
//!
//! Each group of services has its grace, and all groups share five seconds for process trees that are slow to
//! die. A group that has used both up is left to the sweep, so the whole stop ends within
//! [`Machine::stop_budget`].

use super::{Action, Machine, Phase, ServiceId, Try};
use crate::moment::Moment;
use crate::plan::Work;
use crate::service;
use cvm_protocol::report::Level;
use cvm_protocol::time::words;
use std::time::Duration;

/// Between SIGTERM and SIGKILL for whoever is left when the services are down: login
/// sessions and daemons of theirs.
const SWEEP_TERM: Duration = Duration::from_secs(2);
/// Between SIGKILL and giving up on processes that the kernel holds.
const SWEEP_KILL: Duration = Duration::from_secs(3);
/// What the compose file has the engine wait after a stop, unless `STOP_GRACE_PERIOD` says otherwise. dstack
/// stops a VM's containers in a unit that systemd ends after this time, whatever the compose file says.
pub const ENGINE_WAITS: Duration = Duration::from_secs(90);
/// A stop by the defaults ends within this. The rest of [`ENGINE_WAITS`] is for the engine's own work.
pub const STOP_AT_MOST: Duration = Duration::from_secs(80);
/// What all groups together may take beyond their graces, for trees that do not die at once of SIGKILL.
pub(super) const OVERHEAD: Duration = Duration::from_secs(5);

impl Machine {
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

    pub(super) fn on_terminate(&mut self, now: Moment, out: &mut Vec<Action>) {
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

    pub(super) fn on_defect(&mut self, now: Moment, out: &mut Vec<Action>) {
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

    /// Stops the next group of services once the group before has ended or is out of time.
    pub(super) fn progress(&mut self, now: Moment, out: &mut Vec<Action>) {
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

    pub(super) fn sweep(&mut self, hard: bool, now: Moment, out: &mut Vec<Action>) {
        let until = now + if hard { SWEEP_KILL } else { SWEEP_TERM };
        self.phase = Phase::Sweeping { hard, until };
        out.push(Action::SignalAll { hard });
    }

    pub(super) fn leave(&mut self, abandoned: bool, now: Moment, out: &mut Vec<Action>) {
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
}
