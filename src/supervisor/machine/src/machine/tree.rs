//! The tree that the storage worker keeps: what its words mean for those who stand on it.
//!
//! ```text
//! awaited ──ready──> good ──not ready, or the worker ends and the tree is not independent──> lost
//!                      ^                                                                      │
//!                      └──── ready again: steps are done again, services start again <────────┘
//! ```
//!
//! Two rules. Who stands on a tree that is lost is ended, and comes back with the next tree
//! without an operator. And no worker begins while anybody still stands on the old one: two
//! overlays on one upper layer would corrupt it.
//!
//! It does not know what a bucket is.

use super::{Action, Machine, Next, Order, Phase, STEP_KILL, ServiceId, StepState, Try};
use crate::moment::Moment;
use crate::plan::{StepName, Work};
use crate::service::{self, Run, State, Then};
use cvm_protocol::report::Level;
use cvm_protocol::storage::{Mode, StorageReport};

/// The tree as the worker last described it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    pub mode: Mode,
    /// Why it is not the better mode.
    pub reason: Option<String>,
    /// Whether it outlives the worker.
    pub independent: bool,
}

/// What is known of the storage besides the state of its step.
#[derive(Debug, Default)]
pub(super) struct Storage {
    tree: Option<Tree>,
    /// At any time in this life.
    was_ready: bool,
    /// The worker's last word: files and bytes that the bucket does not have.
    drained: Option<(u64, u64)>,
    /// What an operator wants of the worker, once nobody stands on its tree.
    later: Option<Order>,
    /// Reasons that were said since the tree was last good.
    said: Vec<String>,
}

/// How many reasons are remembered as said. A worker that has more of them is worth the lines.
const SAID_MAX: usize = 16;

/// The worker hands on what a server says, and a server must not write lines into our log.
fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

/// Why there is no tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    /// Another instance has the bucket.
    Turn,
    Fault(Next),
}

impl Machine {
    /// The tree of the bucket, while it is good.
    pub fn tree(&self) -> Option<&Tree> {
        self.storage.tree.as_ref()
    }

    /// The service that keeps the tree, and the step that waits for it.
    fn worker(&self) -> Option<(ServiceId, StepName)> {
        self.steps.iter().find_map(|record| match record.step.work {
            Work::Awaited { from, .. } => Some((self.find(from)?, record.step.name)),
            Work::Run => None,
        })
    }

    /// Whether one of `needs` is `step`, or needs it in turn.
    fn stands_on(&self, needs: &[StepName], step: StepName) -> bool {
        needs.iter().any(|name| {
            *name == step || self.record_of(*name).is_some_and(|r| self.stands_on(r.step.needs, step))
        })
    }

    /// Whether anything that needs `step` is alive.
    pub fn is_stood_on(&self, step: StepName) -> bool {
        let steps = self.steps.iter().filter(|r| r.state.is_alive()).map(|r| r.step.needs);
        let services = self.services.iter().filter(|s| s.unit.run().is_some()).map(|s| s.service.needs);
        steps.chain(services).any(|needs| self.stands_on(needs, step))
    }

    // === What the worker says ===

    pub(super) fn on_storage(
        &mut self,
        id: ServiceId,
        run: Run,
        report: StorageReport,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
        let Some((worker, step)) = self.worker().filter(|(worker, _)| *worker == id) else { return };
        let Some(unit) = self.services.get(worker.0).map(|s| &s.unit).filter(|u| u.run() == Some(run)) else {
            return;
        };
        // Its last words may come after the order to end; a tree it is about to leave is none.
        let stays = !matches!(unit.state(), State::Ending { .. }) && self.storage.later.is_none();
        match report {
            StorageReport::Note { level, text } => out.push(Action::Say(level, one_line(&text))),
            StorageReport::Ready { mode, reason, independent } if stays => {
                let reason = reason.map(|text| one_line(&text));
                self.tree_is_good(step, Tree { mode, reason, independent }, now, out);
            }
            StorageReport::Ready { .. } => {}
            StorageReport::NotReady { why, retry } => {
                let next = if retry { Next::Underway } else { Next::Operator };
                self.tree_is_not_good(step, one_line(&why), Lack::Fault(next), now, out);
            }
            StorageReport::Unheard { why } => self.bucket_is_silent(step, one_line(&why), now, out),
            StorageReport::Waits { why } => {
                self.tree_is_not_good(step, one_line(&why), Lack::Turn, now, out);
            }
            StorageReport::Drained { files, bytes } => self.storage.drained = Some((files, bytes)),
        }
    }

    fn tree_is_good(&mut self, step: StepName, tree: Tree, now: Moment, out: &mut Vec<Action>) {
        self.storage.drained = None;
        self.storage.tree = Some(tree);
        let Some(record) = self.steps.iter_mut().find(|r| r.step.name == step) else { return };
        let began = match record.state {
            StepState::Done { .. } => return self.storage.said.clear(),
            StepState::Running { since } | StepState::Killing { since, .. } => since,
            StepState::Failed { began, .. } => {
                let text = "The storage is there; what waits for it goes on";
                out.push(Action::Say(Level::Info, text.into()));
                began
            }
            StepState::Pending => now,
        };
        record.state = StepState::Done { began, took: now.since(began) };
        self.storage.was_ready = true;
        self.storage.said.clear();
        self.advance(now, out);
    }

    /// A tree that outlives its worker outlives an outage too, whichever comes first.
    fn bucket_is_silent(&mut self, step: StepName, why: String, now: Moment, out: &mut Vec<Action>) {
        if !self.is_done(step) || !self.tree().is_some_and(|tree| tree.independent) {
            self.tree_is_not_good(step, why, Lack::Fault(Next::Underway), now, out);
        } else if !self.storage.said.contains(&why) {
            let text = format!(
                "Nothing is replicated: {why}; the storage worker goes on trying, and what stands on the tree goes on"
            );
            out.push(Action::Say(Level::Warn, text));
            self.remember(why);
        }
    }

    fn remember(&mut self, why: String) {
        self.storage.said.truncate(SAID_MAX - 1);
        self.storage.said.insert(0, why);
    }

    /// There is no tree yet, or there is none any more.
    fn tree_is_not_good(
        &mut self,
        step: StepName,
        why: String,
        lack: Lack,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
        let Some(record) = self.steps.iter_mut().find(|r| r.step.name == step) else { return };
        let was_good = matches!(record.state, StepState::Done { .. });
        let next = match lack {
            Lack::Turn => Next::Underway,
            Lack::Fault(next) => next,
        };
        let began = match record.state {
            StepState::Running { since } | StepState::Killing { since, .. } => since,
            StepState::Failed { began, .. } => began,
            StepState::Pending | StepState::Done { .. } => now,
        };
        record.state = StepState::Failed { began, took: now.since(began), why: why.clone(), next };
        if was_good || !self.storage.said.contains(&why) {
            let follows = match next {
                _ if self.phase != Phase::Up => "everything is being stopped".to_owned(),
                Next::Operator => "an operator is needed".to_owned(),
                Next::Underway | Next::TryAt(_) => "the storage worker goes on trying".to_owned(),
            };
            let (level, text) = if was_good {
                let text = format!("The storage is lost: {why}; what stands on it is stopped; {follows}");
                (Level::Error, text)
            } else if lack == Lack::Turn {
                (Level::Warn, format!("Boot step {} waits: {why}", step.as_str()))
            } else {
                (Level::Error, format!("Boot step {} failed: {why}; {follows}", step.as_str()))
            };
            out.push(Action::Say(level, text));
            self.remember(why);
        }
        if was_good {
            self.storage.tree = None;
            self.clear_tree(step, now, out);
        }
    }

    /// Ends all that stands on the tree, and makes it ready to begin anew on the next one.
    fn clear_tree(&mut self, step: StepName, now: Moment, out: &mut Vec<Action>) {
        // On the way down the rest follows in its own order.
        if self.phase != Phase::Up {
            return;
        }
        for index in 0..self.steps.len() {
            let Some(needs) = self.steps.get(index).map(|r| r.step.needs) else { continue };
            if !self.stands_on(needs, step) {
                continue;
            }
            let Some(record) = self.steps.get_mut(index) else { continue };
            match record.state {
                StepState::Running { since } => {
                    record.void = true;
                    record.state = StepState::Killing { since, hard: false, until: now + STEP_KILL };
                    let of = Try { step: record.step.name, number: record.tries };
                    out.push(Action::KillStep { of, hard: false });
                }
                StepState::Killing { .. } => record.void = true,
                StepState::Failed { .. } if record.held => record.void = true,
                StepState::Pending | StepState::Done { .. } | StepState::Failed { .. } => {
                    record.state = StepState::Pending;
                }
            }
        }
        for index in 0..self.services.len() {
            let needs = self.services.get(index).map_or(&[][..], |s| s.service.needs);
            if self.stands_on(needs, step) {
                self.tell_unit(ServiceId(index), service::Event::Withdraw, now, out);
            }
        }
    }

    // === What becomes of the worker ===

    /// Looks at what is about to be told to a service: the end of the worker may be the end of
    /// its tree.
    pub(super) fn watch_worker(
        &mut self,
        id: ServiceId,
        event: &service::Event,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
        use service::Event as Happens;
        let Some((worker, step)) = self.worker().filter(|(worker, _)| *worker == id) else { return };
        let Some(unit) = self.services.get(worker.0).map(|s| &s.unit) else { return };
        match event {
            // Another one, which has not said anything yet.
            Happens::Exec { run, .. } if unit.run() == Some(*run) => self.storage.drained = None,
            Happens::MainEnded { run, .. } | Happens::Gone { run, .. } if unit.run() == Some(*run) => {
                let stopped = matches!(unit.state(), State::Ending { then: Then::StayDown, .. });
                self.on_worker_end(step, stopped, now, out);
            }
            _ => return,
        }
        self.settle_worker(now, out);
    }

    fn on_worker_end(&mut self, step: StepName, stopped: bool, now: Moment, out: &mut Vec<Action>) {
        if self.phase != Phase::Up {
            return;
        }
        if self.is_stood_on(step) {
            // Who goes on writing makes its last word untrue.
            self.storage.drained = None;
        }
        let outlived = self.tree().is_some_and(|tree| tree.independent);
        let known = self.record_of(step).is_some_and(|r| matches!(r.state, StepState::Failed { .. }));
        // What the worker itself has said of its trouble says more.
        if outlived || known {
            return;
        }
        let (why, next) = if stopped {
            ("the storage worker was stopped", Next::Operator)
        } else {
            ("the storage worker ended; the tree is rebuilt", Next::Underway)
        };
        self.tree_is_not_good(step, why.into(), Lack::Fault(next), now, out);
    }

    /// Lets the worker go, or holds it, as those who stand on its tree come to rest.
    pub(super) fn settle_worker(&mut self, now: Moment, out: &mut Vec<Action>) {
        let Some((worker, step)) = self.worker() else { return };
        // Also of what the kernel holds nobody knows when it writes its last.
        let frozen = self.steps.iter().any(|r| r.held && self.stands_on(r.step.needs, step));
        let busy = frozen || self.is_stood_on(step);
        let held = busy && !self.is_done(step);
        let Some(record) = self.services.get_mut(worker.0) else { return };
        let released = record.unit.is_held() && !held;
        record.unit.hold(held);
        if released {
            self.tell_unit(worker, service::Event::Tick, now, out);
        }
        if self.phase != Phase::Up {
            self.storage.later = None;
        } else if !busy && let Some(order) = self.storage.later.take() {
            self.carry_out(worker, order, now, out);
        }
    }

    /// Ending the worker takes its tree away, so first everybody is taken from the tree. Says
    /// whether that is to be waited for.
    pub(super) fn comes_later(
        &mut self,
        id: ServiceId,
        order: Order,
        now: Moment,
        out: &mut Vec<Action>,
    ) -> bool {
        let Some((_, step)) = self.worker().filter(|(worker, _)| *worker == id) else { return false };
        // The latest order counts.
        self.storage.later = None;
        if order == Order::Start || self.tree().is_some_and(|tree| tree.independent) {
            return false;
        }
        if self.is_done(step) {
            let (why, next) = match order {
                Order::Stop => ("the storage worker is stopped by an operator", Next::Operator),
                Order::Start | Order::Restart => {
                    ("the storage worker is restarted by an operator", Next::Underway)
                }
            };
            self.tree_is_not_good(step, why.into(), Lack::Fault(next), now, out);
        }
        if self.is_stood_on(step) {
            self.storage.later = Some(order);
        }
        self.storage.later.is_some()
    }

    /// An operator wants what the worker has to make possible.
    pub(super) fn wake_worker(&mut self, now: Moment, out: &mut Vec<Action>) {
        let Some((worker, step)) = self.worker() else { return };
        if !self.is_done(step) {
            self.storage.later = None;
            self.tell_unit(worker, service::Event::Start, now, out);
        }
    }

    // === The last line ===

    /// What the bucket lacks at the end, in words; None when it lacks nothing, or was never there.
    pub(super) fn missing_in_bucket(&self) -> Option<String> {
        const WHERE: &str = "they are on the volume and are pushed at the next boot";
        match self.storage.drained {
            _ if !self.storage.was_ready => None,
            Some((0, _)) => None,
            Some((files, bytes)) => Some(format!(
                "Not everything is in the bucket: {files} files, {bytes} bytes are missing there; {WHERE}"
            )),
            None => Some(format!(
                "Perhaps not everything is in the bucket: the storage worker ended without saying what is missing; \
                 missing files, if any, {}",
                WHERE.trim_start_matches("they ")
            )),
        }
    }
}
