//! The worker's one loop: opens the storage, keeps tree and bucket equal, answers orders, drains.
//!
//! ```text
//! opening ── tree ──> ready ── fenced ──> opening …
//!    │  └ fault: wait, again            └ stop: drain, release, end
//! ```
//!
//! Everything that writes to the bucket happens in this thread, one thing at a time. Beside it run
//! the heartbeat, the watcher, and in FUSE mode the hydrator; they send orders.
//!
//! Refuses to end because something failed. May import: everything here.

mod answers;
mod chase;
mod end;
mod helpers;
mod rounds;

use crate::boots::Boots;
use crate::chain::now_ms;
use crate::database::Remark;
use crate::desk::{Desk, Open};
use crate::ending::{self, Ending};
use crate::entry::Path;
use crate::fault::{Accepted, Fault};
use crate::manifest::Anchor;
use crate::mount;
use crate::opening::{self, Ready, Said};
use crate::owner::uptime;
use crate::scan::Fetched;
use crate::watch::Hints;
use answers::{Asked, done, is_as_seen, refuse_review};
use chase::Chase;
use cvm_protocol::storage::{Answer, Ask, Mode, StorageSpec, WorkerPhase};
use rounds::{Round, Waiting};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

/// A change is pushed when it has been quiet for this long, or has waited for [`PATIENCE`].
const QUIET: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_millis(300);
/// Hints are hints; the scan is the truth.
const RESCAN: Duration = Duration::from_secs(300);
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// Between two looks at whether a mount that was inherited still answers.
const LOOK: Duration = Duration::from_secs(2);
const LOGS: Duration = Duration::from_secs(60);

/// A file that could not be sent so often holds up as little as can be.
const AGAIN_AND_AGAIN: u32 = 3;

pub(crate) enum Order {
    /// The watcher has noted something.
    Hints,
    Ask(Ask, tokio::sync::mpsc::UnboundedSender<Answer>),
    /// The bucket does not have this right, and the tree does.
    SendAgain(Path),
    /// Nothing is only below any more.
    Hydrated,
    Fenced(String),
    /// What is below the tree has died.
    TreeIsDead,
    Stop,
}

/// How one life with an open bucket ended.
enum End {
    Stop,
    Again(Fault),
}

pub(crate) struct Worker {
    pub(crate) spec: Arc<StorageSpec>,
    pub(crate) desk: Arc<Desk>,
    pub(crate) orders: Receiver<Order>,
    pub(crate) sender: Sender<Order>,
    /// An operator does not want to wait for another owner.
    pub(crate) takeover: bool,
    /// Why the last try ended, where an operator may decide that it goes on.
    pub(crate) refusal: Option<Fault>,
    /// What he has accepted since there was a tree.
    pub(crate) accepted: Accepted,
    /// What cannot be checked is taken over.
    pub(crate) adopt: bool,
    pub(crate) stopping: bool,
    pub(crate) ending: Arc<Ending>,
    pub(crate) boots: Boots,
}

impl Worker {
    /// Until it is told to stop. True when the bucket has everything.
    pub(crate) fn run(mut self) -> bool {
        let mut tries = 0u32;
        loop {
            let fault = match self.life(&mut tries) {
                Ok(clean) => return clean,
                Err(fault) => fault,
            };
            if self.stopping {
                let (files, bytes) = self.left_behind();
                self.desk.drained(files, bytes);
                return files == 0;
            }
            let retry = fault.may_pass();
            let wait = if retry { backoff(tries) } else { RETRY.1 };
            tries += 1;
            let phase = if matches!(fault, Fault::Fenced(_)) {
                WorkerPhase::Fenced
            } else if retry {
                WorkerPhase::Opening
            } else {
                WorkerPhase::Refused
            };
            if fault.is_outage() {
                self.desk.unheard(phase, &fault);
            } else {
                self.desk.refused(phase, &fault);
            }
            self.refusal = Some(fault.clone());
            self.desk.failed(&fault, Some(wait));
            if matches!(fault, Fault::Tree) {
                // Somebody may still stand on it: process 1 starts the next worker when nobody does.
                return false;
            }
            self.pause(wait);
            self.desk.forget_steps();
        }
    }

    /// One try, from opening to the end. Only an ordered stop is an end that is not a fault.
    fn life(&mut self, tries: &mut u32) -> Result<bool, Fault> {
        self.refusal = None;
        let ready = self.open()?;
        self.accepted = Accepted::default();
        self.adopt = false;
        *tries = 0;
        let mut tree = Tree::new(self, ready)?;
        match tree.serve() {
            End::Stop => Ok(tree.drain()),
            End::Again(fault) => {
                let (open, lease) = (tree.open(), Arc::clone(&tree.ready.lease));
                let outcome = opening::lost(&tree.worker.desk, &open.index, &lease, fault);
                tree.leave();
                outcome
            }
        }
    }

    fn open(&mut self) -> Result<Ready, Fault> {
        let (desk, spec, accepted) = (Arc::clone(&self.desk), Arc::clone(&self.spec), self.accepted.clone());
        let mut forced = std::mem::take(&mut self.takeover);
        let said = Said { accepted: &accepted, adopt: self.adopt, takeover: forced };
        let outcome = opening::open(&spec, &desk, said, &mut |wait| {
            self.pause(wait);
            forced |= std::mem::take(&mut self.takeover);
            if self.stopping { Err(Fault::other("the machine is stopping")) } else { Ok(forced) }
        });
        // A heartbeat of the owner's came between, which the operator's word counts for too.
        self.takeover |= forced && matches!(outcome, Err(Fault::Conflict));
        outcome.map_err(|fault| fault.beside_anchor(self.spec.anchor.is_some()))
    }

    /// What the bucket does not have, as far as can be known without it.
    fn left_behind(&self) -> (u64, u64) {
        let known = opening::left_behind(&self.spec.prefix).unwrap_or_else(|fault| {
            tracing::warn!("what only this machine has is not known: {fault}");
            None
        });
        // Of a volume without a tree of this bucket's nothing is missing there.
        known.map_or((0, 0), |(volume, found)| ending::missing(&volume, &found))
    }

    /// What an operator says to what the last try has refused.
    fn decide(&mut self, ask: Ask) -> Result<String, String> {
        let desk = Arc::clone(&self.desk);
        match (ask, &self.refusal) {
            (Ask::AcceptOlder { seen }, Some(refusal @ Fault::Suspicious(_))) => {
                is_as_seen(&desk, seen.as_deref())?;
                self.accepted.refusal(refusal);
                Ok(format!("The next try goes on although {refusal}"))
            }
            (Ask::Adopt { seen }, Some(Fault::Unadopted { .. })) => {
                is_as_seen(&desk, seen.as_deref())?;
                self.adopt = true;
                Ok("The bucket is taken over as it is".to_owned())
            }
            (Ask::Forget { paths, seen }, Some(Fault::Lacking(_))) => {
                is_as_seen(&desk, seen.as_deref())?;
                let named = answers::named(&desk, &paths)?;
                let count = named.len();
                self.accepted.files(named);
                Ok(format!("The next try gives up {count} files"))
            }
            _ => Err("what the storage waits for is not decided by this; `cvm storage status` says what is"
                .to_owned()),
        }
    }

    /// Waits, and takes orders meanwhile.
    fn pause(&mut self, wait: Duration) {
        let until = uptime() + wait;
        while !self.stopping {
            let left = until.saturating_sub(uptime());
            match self.orders.recv_timeout(left) {
                Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => self.stopping = true,
                Ok(Order::Ask(
                    ask @ (Ask::Forget { .. }
                    | Ask::Keep { .. }
                    | Ask::AcceptOlder { .. }
                    | Ask::Adopt { .. }),
                    answer,
                )) => match self.decide(ask) {
                    Ok(text) => {
                        done(&answer, text, true);
                        return;
                    }
                    Err(why) => drop(answer.send(Answer::Refused { why })),
                },
                Ok(Order::Ask(Ask::Takeover, answer)) => {
                    self.takeover = true;
                    done(&answer, "The bucket is taken over now", true);
                    return;
                }
                Ok(Order::Ask(_, answer)) => {
                    let why =
                        self.desk.status().why.unwrap_or_else(|| "the storage is being opened".to_owned());
                    let _ = answer.send(Answer::Refused { why });
                }
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return,
            }
        }
    }
}

fn backoff(tries: u32) -> Duration {
    RETRY.0.saturating_mul(1 << tries.min(8)).min(RETRY.1)
}

/// How long until the next one; none where they are not wanted. One that is overdue leaves the boot
/// alone, and one that lies ahead of the clock says nothing of when it was.
fn next_drill(drilled_ms: u64, now_ms: u64, interval_s: u64) -> Option<Duration> {
    let since = now_ms.checked_sub(drilled_ms).map_or(interval_s, |ms| ms / 1000);
    let wait = interval_s.saturating_sub(since).max(interval_s.min(60));
    (interval_s > 0).then(|| Duration::from_secs(wait))
}

/// A tree that is good, and all that keeps it and the bucket equal.
struct Tree<'a> {
    worker: &'a mut Worker,
    ready: Ready,
    stop: Arc<AtomicBool>,
    hints: Arc<Hints>,
    /// A verify or a drill.
    reviewing: Option<std::thread::JoinHandle<()>>,
    dirty: BTreeSet<Vec<u8>>,
    everything: bool,
    first: Option<Duration>,
    last: Duration,
    not_before: Duration,
    rescan: Duration,
    rescan_at: Duration,
    retries: u32,
    logs_at: Duration,
    drill_at: Option<Duration>,
    /// One that is in slices.
    round: Option<Round>,
    /// They are answered by the round that begins after they have asked,
    asked: Vec<Asked>,
    /// which is this one, or the last.
    answering: Vec<Asked>,
    /// Files that somebody wants to be in the bucket as they are now.
    committed: Vec<(Path, tokio::sync::mpsc::UnboundedSender<Answer>)>,
    /// Moved directories whose content has come up.
    fetched: Fetched,
    /// Those of them that could not be had.
    unread: Vec<Path>,
    hydrated: bool,
    /// And what was moved before it came up is above too.
    whole: bool,
    /// Said by the heartbeat, which waits for no round.
    fenced: Arc<AtomicBool>,
    /// When the stand-in is looked at; never, where this worker serves no mount.
    stand_in_at: Option<Duration>,
    /// Paths with an incident of the tree's own.
    troubled: HashMap<Path, String>,
    /// What the log says of databases that go up although something is wrong with them.
    remarked: HashMap<Path, Remark>,
    /// What the bucket does not have right.
    bad: HashSet<Path>,
    /// What a review has found wrong in the bucket and good in the tree.
    mending: HashSet<Path>,
    /// Files that cannot be had now, as a database that is locked: nothing else waits for them.
    waiting: HashMap<Path, Waiting>,
    /// Rounds in a row in which something moved while it was looked at.
    moving: u32,
    chase: Chase,
    /// What the desk and the lease know of.
    told: Option<Anchor>,
    /// Rounds in a row that could not write down every removal.
    held: u32,
    /// The oldest change of a round that missed what was on the move, or of rounds in a row that could
    /// not write down every removal.
    unsettled: Option<Duration>,
}

impl<'a> Tree<'a> {
    fn new(worker: &'a mut Worker, ready: Ready) -> Result<Self, Fault> {
        let stop = Arc::new(AtomicBool::new(false));
        let hydrated = ready.mode == Mode::Sync || ready.open.index.count_lower()?.files == 0;
        let drilled = ready.open.index.number("drilled")?;
        let next = next_drill(drilled, now_ms(), u64::from(worker.spec.drill_s));
        let drill_at = next.map(|wait| uptime() + wait);
        ready.lease.has_come_to(ready.chain.head.generation);
        let mut this = Self {
            worker,
            stop,
            hints: Arc::default(),
            reviewing: None,
            dirty: BTreeSet::new(),
            everything: true,
            first: None,
            last: uptime(),
            not_before: Duration::ZERO,
            rescan: RESCAN,
            rescan_at: uptime() + RESCAN,
            retries: 0,
            // At once: a boot that ends soon is one that somebody wants to know of.
            logs_at: uptime(),
            drill_at,
            round: None,
            asked: Vec::new(),
            answering: Vec::new(),
            committed: Vec::new(),
            fetched: Fetched::default(),
            unread: Vec::new(),
            hydrated,
            whole: ready.mode == Mode::Sync || ready.open.index.meta("independent")?.is_some(),
            fenced: Arc::new(AtomicBool::new(false)),
            stand_in_at: mount::is_served_here().then(uptime),
            troubled: HashMap::new(),
            remarked: HashMap::new(),
            bad: HashSet::new(),
            mending: HashSet::new(),
            waiting: HashMap::new(),
            moving: 0,
            chase: Chase::default(),
            told: None,
            held: 0,
            unsettled: None,
            ready,
        };
        this.recall_drill()?;
        this.say_ready();
        this.worker.desk.say_steps();
        this.help();
        // What changes before the watches are set is found by the first look, which is a full one.
        this.watch()?;
        Ok(this)
    }

    fn open(&self) -> Arc<Open> {
        Arc::clone(&self.ready.open)
    }

    fn say_ready(&self) {
        if self.fenced.load(Ordering::Relaxed) {
            return;
        }
        self.worker.desk.ready(self.ready.mode, self.ready.reason.clone(), self.whole);
    }

    fn serve(&mut self) -> End {
        loop {
            let wait = self.due().saturating_sub(uptime());
            let order = match self.worker.orders.recv_timeout(wait) {
                Ok(order) => Some(order),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Order::Stop),
            };
            if let Err(fault) = self.ready.open.index.look_at_clock() {
                self.worker.desk.failed(&fault, None);
            }
            let mut next = order;
            while let Some(order) = next {
                if let Some(end) = self.take(order) {
                    return end;
                }
                next = self.worker.orders.try_recv().ok();
            }
            let now = uptime();
            if now >= self.rescan_at {
                self.rescan_at = now + self.rescan;
                self.everything = true;
                self.note_change();
            }
            self.wake(now);
            if self.push_is_due(now)
                && let Err(fault) = self.push()
            {
                return End::Again(fault);
            }
            if self.stand_in_at.is_some_and(|at| now >= at) {
                self.stand_in_at = Some(now + LOOK);
                self.mind_the_stand_in();
            }
            if now >= self.logs_at {
                self.logs_at = now + LOGS;
                self.last_words();
            }
            if self.drill_at.is_some_and(|at| now >= at) {
                self.drill_at = Some(now + Duration::from_secs(u64::from(self.worker.spec.drill_s)));
                self.drill(None);
            }
        }
    }

    /// What had to wait is looked at again.
    fn wake(&mut self, now: Duration) {
        let due = self.waiting.iter().filter(|(_, w)| now >= w.at);
        self.dirty.extend(due.map(|(path, _)| path.split().0.to_vec()));
    }

    fn due(&self) -> Duration {
        let push = self.has_to_push().then(|| self.push_at());
        let drill = self.drill_at;
        let waiting = self.waiting.values().map(|w| w.at.max(self.not_before)).min();
        [Some(self.rescan_at), push, Some(self.logs_at), drill, waiting, self.stand_in_at]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.rescan_at)
    }

    fn is_asked(&self) -> bool {
        !self.asked.is_empty() || !self.answering.is_empty()
    }

    fn has_to_push(&self) -> bool {
        self.round.is_some() || self.everything || !self.dirty.is_empty() || self.is_asked()
    }

    fn push_at(&self) -> Duration {
        let patience = self.first.unwrap_or(self.last) + PATIENCE;
        if self.round.is_some() || self.is_asked() && self.held == 0 {
            Duration::ZERO
        } else {
            (self.last + QUIET).min(patience).max(self.not_before)
        }
    }

    fn push_is_due(&self, now: Duration) -> bool {
        self.has_to_push() && now >= self.push_at()
    }

    fn note_change(&mut self) {
        self.last = uptime();
        self.first.get_or_insert(self.last);
    }

    fn take(&mut self, order: Order) -> Option<End> {
        match order {
            Order::Hints => {
                let mut noted = self.hints.take()?;
                self.note_change();
                self.dirty.append(&mut noted.directories);
                if noted.anywhere {
                    self.everything = true;
                    self.mind_the_databases();
                }
                if noted.no_more_watches {
                    self.worker.desk.warn(
                        "The kernel gives no more inotify watches (fs.inotify.max_user_watches): some changes are only found by the scan every 5 minutes",
                    );
                }
                let oldest = self.round.as_ref().and_then(|round| round.first).or(self.first);
                self.worker.desk.changed(self.oldest(oldest));
            }
            Order::SendAgain(path) => {
                self.dirty.insert(path.split().0.to_vec());
                self.mending.insert(path);
                self.note_change();
            }
            Order::Ask(Ask::Flush, answer) => {
                self.everything = true;
                self.asked.push(Asked::Flush(answer));
            }
            Order::Ask(Ask::Verify { deep }, to) => {
                if self.is_reviewing() {
                    refuse_review(&to);
                } else {
                    // What is only on its way is no difference; what cannot be sent now stays one.
                    self.everything = true;
                    self.asked.push(Asked::Verify { deep, to });
                }
            }
            Order::Ask(Ask::Committed { path }, answer) => self.wants_committed(&path, answer),
            Order::Ask(ask, answer) => self.answer(&ask, &answer),
            Order::Hydrated => self.on_hydrated(),
            Order::Fenced(why) => return Some(End::Again(Fault::Fenced(why))),
            Order::TreeIsDead => {
                // The next worker need not find out for itself.
                let _ = mount::is_first_to_find_it_dead();
                return Some(End::Again(Fault::Tree));
            }
            Order::Stop => return Some(End::Stop),
        }
        None
    }

    /// A full look comes after a round that goes on; what databases commit does not wait for it.
    fn mind_the_databases(&mut self) {
        if self.round.is_some()
            && let Ok(rows) = self.ready.open.index.all()
        {
            let databases = rows.iter().filter(|(_, row)| row.entry.is_database());
            self.dirty.extend(databases.map(|(path, _)| path.split().0.to_vec()));
        }
    }

    fn on_hydrated(&mut self) {
        self.hydrated = true;
        self.everything = true;
        self.note_change();
    }

    /// Nothing is only below: neither under the names of the manifest, nor under those to which
    /// it was moved before it came up. The second is known after a full look.
    fn on_whole(&mut self) -> Result<(), Fault> {
        self.ready.open.index.set_meta("independent", "1")?;
        self.whole = true;
        if let Some(stand_in) = &self.ready.stand_in
            && let Err(fault) = stand_in.tree_is_whole()
        {
            self.worker.desk.warn(format!("The stand-in for the mount does not answer: {fault}"));
        }
        self.worker
            .desk
            .info("Everything of the bucket is on the volume now; nothing depends on the mount any more");
        self.say_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tries_are_ever_further_apart_up_to_a_minute() {
        let waits: Vec<u64> = (0..8).map(|tries| backoff(tries).as_secs()).collect();
        assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60, 60]);
        assert_eq!(backoff(u32::MAX), RETRY.1);
    }

    #[test]
    fn a_drill_comes_in_its_time_also_when_the_clock_was_set_back() {
        const DAY: u64 = 86_400;
        let wait = |drilled, now| next_drill(drilled, now, DAY).map(|wait| wait.as_secs());
        assert_eq!(wait(1000, 1000 + 3_600_000), Some(DAY - 3600));
        assert_eq!(wait(0, 1_700_000_000_000), Some(60), "one that is overdue");
        assert_eq!(wait(1_900_000_000_000, 1_700_000_000_000), Some(60), "of a clock that was ahead");
        assert_eq!(next_drill(0, 1_700_000_000_000, 0), None);
        assert_eq!(next_drill(0, 1_700_000_000_000, 2), Some(Duration::from_secs(2)));
    }
}
