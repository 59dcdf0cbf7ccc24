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

use crate::boots::Boots;
use crate::chain::now_ms;
use crate::desk::{Desk, Open};
use crate::ending::{self, Ending};
use crate::entry::Path;
use crate::fault::{Accepted, Fault};
use crate::opening::{self, Ready, Said};
use crate::order::Unread;
use crate::owner::uptime;
use crate::push::{Pusher, Rest, Work};
use crate::review::Review;
use crate::scan::{Change, Found, Scanner, Unfit};
use crate::watch::{Hints, Watcher};
use crate::{boots, hydrate, mount, parallel};
use cvm_blueprint::storage::{Answer, Ask, Mode, Progress, StorageSpec};
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::Duration;

/// A change is pushed when it has been quiet for this long, or has waited for [`PATIENCE`].
const QUIET: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_millis(300);
/// Between two batches: a second is what a crash may cost, and three requests are what it costs.
const BETWEEN: Duration = Duration::from_millis(700);
/// A round that takes longer than this is made in slices, so that orders and databases do not wait.
const SLICE: Duration = Duration::from_secs(1);
/// While this passes hints gather in the kernel: who commits thousands of times a second must not
/// have us woken as often.
const GATHER: Duration = Duration::from_millis(20);
/// Nobody says when a database is not locked any more.
const LOCKED_MAX: Duration = Duration::from_secs(10);
/// Hints are hints; the scan is the truth.
const RESCAN: Duration = Duration::from_secs(300);
/// The same where nobody gives hints.
const BLIND_RESCAN: Duration = Duration::from_secs(20);
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// Between two looks at whether a mount that was inherited still answers.
const LOOK: Duration = Duration::from_secs(2);
const LOGS: Duration = Duration::from_secs(60);

/// Rounds for which removals wait for what is on the move; a tree in which something always is must
/// not keep what is gone for ever.
const MOVING_MAX: u32 = 8;
/// A file that could not be sent so often holds up as little as can be.
const AGAIN_AND_AGAIN: u32 = 3;
/// Rounds that a flush waits for removals which wait for what is on the move.
const HELD_MAX: u32 = 20;

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
    /// Why the last try ended, where an operator may accept that.
    pub(crate) refusal: Option<Fault>,
    /// What he has accepted since there was a tree.
    pub(crate) accepted: Accepted,
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
                "fenced"
            } else if retry {
                "opening"
            } else {
                "refused"
            };
            if fault.is_outage() {
                self.desk.unheard(phase, &fault);
            } else {
                self.desk.refused(phase, &fault);
            }
            self.refusal = matches!(fault, Fault::Suspicious(_)).then(|| fault.clone());
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
        let ready = self.open()?;
        self.refusal = None;
        self.accepted = Accepted::default();
        *tries = 0;
        let mut tree = Tree::new(self, ready)?;
        match tree.serve() {
            End::Stop => Ok(tree.drain()),
            End::Again(fault) => {
                tree.leave();
                Err(fault)
            }
        }
    }

    fn open(&mut self) -> Result<Ready, Fault> {
        let (desk, spec, accepted) = (Arc::clone(&self.desk), Arc::clone(&self.spec), self.accepted.clone());
        let mut forced = std::mem::take(&mut self.takeover);
        let said = Said { accepted: &accepted, takeover: forced };
        let outcome = opening::open(&spec, &desk, said, &mut |wait| {
            self.pause(wait);
            forced |= std::mem::take(&mut self.takeover);
            if self.stopping { Err(Fault::other("the machine is stopping")) } else { Ok(forced) }
        });
        // A heartbeat of the owner's came between, which the operator's word counts for too.
        self.takeover |= forced && matches!(outcome, Err(Fault::Conflict));
        outcome
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

    /// Waits, and takes orders meanwhile.
    fn pause(&mut self, wait: Duration) {
        let until = uptime() + wait;
        while !self.stopping {
            let left = until.saturating_sub(uptime());
            match self.orders.recv_timeout(left) {
                Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => self.stopping = true,
                Ok(Order::Ask(Ask::Accept { seen }, answer)) => {
                    if has_changed(&self.desk, seen.as_deref(), &answer) {
                        continue;
                    }
                    let Some(refusal) = &self.refusal else {
                        let why = "nothing was refused that this could accept; `cvm storage status` says what is waited for";
                        let _ = answer.send(Answer::Refused { why: why.to_owned() });
                        continue;
                    };
                    done(&answer, format!("The next try goes on although {refusal}"), true);
                    self.accepted.and(refusal, self.desk.named());
                    return;
                }
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

fn done(to: &tokio::sync::mpsc::UnboundedSender<Answer>, text: impl Into<String>, good: bool) {
    // Whoever asked may be gone.
    let _ = to.send(Answer::Done { text: text.into(), good });
}

fn answer(to: &tokio::sync::mpsc::UnboundedSender<Answer>, outcome: Result<(String, bool), Fault>) {
    match outcome {
        Ok((text, good)) => done(to, text, good),
        Err(fault) => done(to, format!("{fault}; {}", fault.remedy()), false),
    }
}

/// Who waits for what was there when it was asked.
enum Asked {
    Flush(tokio::sync::mpsc::UnboundedSender<Answer>),
    Verify { deep: bool, to: tokio::sync::mpsc::UnboundedSender<Answer> },
}

/// A round, from its one look at the tree to its last slice.
#[derive(Default)]
struct Round {
    full: bool,
    dirty: BTreeSet<Vec<u8>>,
    /// The oldest change in it.
    first: Option<Duration>,
    /// What is not done yet.
    work: Work,
    /// How much that was at the beginning.
    total: u64,
    /// What has changed since, but for databases, is the next round's.
    after: BTreeSet<Vec<u8>>,
    /// What has to wait for longer, and was left out.
    skipped: HashSet<Path>,
    /// What has failed again and again, and why.
    failing: HashMap<Path, String>,
    /// It has to wait until nothing else is to do.
    leaves_out_failing: bool,
    /// What has changed since, and has to wait for something else.
    put_off: HashSet<Path>,
    troubles: HashMap<Path, String>,
}

/// What comes before everything else, and what cannot be had.
type Looked = (Work, Vec<Unread>);

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
    fetched: HashSet<Path>,
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
    /// What the bucket does not have right.
    bad: HashSet<Path>,
    /// What a review has found wrong in the bucket and good in the tree.
    mending: HashSet<Path>,
    /// Files that cannot be had now, as a database that is locked: nothing else waits for them.
    waiting: HashMap<Path, Waiting>,
    /// Rounds in a row in which something moved while it was looked at.
    moving: u32,
    /// Rounds in a row that could not write down every removal.
    held: u32,
}

struct Waiting {
    /// When it is tried again.
    at: Duration,
    tries: u32,
    why: String,
    since: Duration,
}

impl<'a> Tree<'a> {
    fn new(worker: &'a mut Worker, ready: Ready) -> Result<Self, Fault> {
        let stop = Arc::new(AtomicBool::new(false));
        let hydrated = ready.mode == Mode::Sync || ready.open.index.count_lower()?.files == 0;
        let drill = ready.open.index.number("drilled")?;
        let interval = u64::from(worker.spec.drill_s);
        let drill_at = (interval > 0).then(|| {
            let since = now_ms().saturating_sub(drill) / 1000;
            uptime() + Duration::from_secs(interval.saturating_sub(since).max(60))
        });
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
            fetched: HashSet::new(),
            unread: Vec::new(),
            hydrated,
            whole: ready.mode == Mode::Sync || ready.open.index.meta("independent")?.is_some(),
            fenced: Arc::new(AtomicBool::new(false)),
            stand_in_at: mount::is_served_here().then(uptime),
            troubled: HashMap::new(),
            bad: HashSet::new(),
            mending: HashSet::new(),
            waiting: HashMap::new(),
            moving: 0,
            held: 0,
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

    // === Helpers ===

    fn watch(&mut self) -> Result<(), Fault> {
        let (sender, stop, open) = (self.worker.sender.clone(), Arc::clone(&self.stop), self.open());
        let hints = Arc::clone(&self.hints);
        let (tell, watching) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // It looks at the merged tree.
            parallel::set_apart();
            let mut watcher = match Watcher::new(&open.volume) {
                Ok(watcher) => watcher,
                Err(fault) => return drop(tell.send(Err(fault))),
            };
            // From here on nothing is missed: the first scan may begin.
            let _ = tell.send(Ok(()));
            while let Ok(seen) = watcher.next() {
                let new = hints.note(seen);
                if stop.load(Ordering::Relaxed) || new && sender.send(Order::Hints).is_err() {
                    return;
                }
                std::thread::sleep(GATHER);
            }
        });
        if let Err(fault) = watching.recv().map_err(|_| Fault::other("the watcher did not start"))? {
            self.rescan = BLIND_RESCAN;
            self.rescan_at = uptime() + self.rescan;
            self.worker.desk.warn(format!(
                "The kernel does not say what changes ({fault}; fs.inotify.max_user_instances?): changes are found by a scan every {} s",
                self.rescan.as_secs()
            ));
        }
        Ok(())
    }

    fn help(&self) {
        self.beat();
        self.mind_what_was_inherited();
        if !self.hydrated {
            let (open, desk, stop, sender) = (
                self.open(),
                Arc::clone(&self.worker.desk),
                Arc::clone(&self.stop),
                self.worker.sender.clone(),
            );
            std::thread::spawn(move || {
                loop {
                    match hydrate::run(&open, &desk, &stop) {
                        Ok(true) => return drop(sender.send(Order::Hydrated)),
                        Ok(false) => return,
                        // What it had is closed.
                        Err(_) if stop.load(Ordering::Relaxed) => return,
                        Err(fault) => {
                            desk.failed(&fault, Some(RETRY.0));
                            std::thread::sleep(RETRY.0);
                        }
                    }
                }
            });
        }
    }

    fn beat(&self) {
        let (open, lease, stop, fenced, sender, desk) = (
            self.open(),
            Arc::clone(&self.ready.lease),
            Arc::clone(&self.stop),
            Arc::clone(&self.fenced),
            self.worker.sender.clone(),
            Arc::clone(&self.worker.desk),
        );
        let beat = Duration::from_secs(u64::from(self.worker.spec.heartbeat_s.max(1)));
        std::thread::spawn(move || {
            let mut due = uptime() + beat;
            while !stop.load(Ordering::Relaxed) {
                // Short sleeps, so that a stop is not waited for, on a clock that counts sleep.
                std::thread::sleep(Duration::from_millis(200).min(beat));
                if uptime() < due {
                    continue;
                }
                due = match lease.renew(&open.bucket) {
                    Ok(()) => uptime() + beat,
                    Err(Fault::Fenced(why)) => {
                        // A round may be long, and nobody may stand on the tree until it ends: its
                        // next write asks the lease, and fails.
                        fenced.store(true, Ordering::Relaxed);
                        desk.refused("fenced", &Fault::Fenced(why.clone()));
                        return drop(sender.send(Order::Fenced(why)));
                    }
                    Err(fault) => {
                        desk.failed(&fault, None);
                        uptime() + (beat / 4).max(Duration::from_secs(1))
                    }
                };
            }
        });
    }

    /// A mount that an earlier worker left is answered by the stand-in, which may die too. Whoever
    /// asks may have to wait for the answer, and so does nothing else.
    fn mind_what_was_inherited(&self) {
        let inherited = self.ready.mode == Mode::Fuse
            && self.ready.stand_in.is_none()
            && mount::is_mount(cvm_blueprint::paths::BUCKET_MOUNT);
        if !inherited {
            return;
        }
        let (stop, sender) = (Arc::clone(&self.stop), self.worker.sender.clone());
        std::thread::spawn(move || {
            let mut number = now_ms();
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                if mount::is_dead(number) && !stop.load(Ordering::Relaxed) {
                    return drop(sender.send(Order::TreeIsDead));
                }
                std::thread::sleep(LOOK);
            }
        });
    }

    // === The loop ===

    fn serve(&mut self) -> End {
        loop {
            let wait = self.due().saturating_sub(uptime());
            let order = match self.worker.orders.recv_timeout(wait) {
                Ok(order) => Some(order),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => Some(Order::Stop),
            };
            let mut next = order;
            while let Some(order) = next {
                if let Some(end) = self.take(order) {
                    return end;
                }
                next = self.worker.orders.try_recv().ok();
            }
            let now = uptime();
            if now >= self.rescan_at {
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

    /// One that has died is succeeded by one that has to be told.
    fn mind_the_stand_in(&mut self) {
        if self.ready.stand_in.as_ref().is_some_and(mount::StandIn::is_there) {
            return;
        }
        let told = mount::StandIn::hand_over(&self.ready.open.volume).and_then(|stand_in| {
            if self.whole {
                stand_in.tree_is_whole()?;
            }
            Ok(stand_in)
        });
        self.ready.stand_in = match told {
            Ok(stand_in) => {
                self.worker.desk.info("The stand-in for the mount was told again");
                Some(stand_in)
            }
            // Not up yet: it is looked at again.
            Err(fault) => {
                tracing::debug!("the stand-in does not answer: {fault}");
                None
            }
        };
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

    // === Pushing ===

    /// One round, or a slice of one. An error ends this life of the worker: it no longer owns the
    /// bucket.
    fn push(&mut self) -> Result<(), Fault> {
        let began = uptime();
        let generation = self.ready.chain.head.generation;
        let before = self.round.take();
        let goes_on = before.is_some();
        let mut round = before.unwrap_or_else(|| self.begin(began));
        let asked = std::mem::take(&mut self.committed);
        let first: HashSet<&Path> = asked.iter().map(|(path, _)| path).collect();
        let looked =
            if goes_on { self.look_again(&mut round, &first) } else { self.look_around(&mut round, &first) };
        let (urgent, unread) = match looked {
            Ok(looked) => looked,
            Err(fault @ Fault::Fenced(_)) => return Err(fault),
            Err(fault) => {
                self.answer_committed(asked, false, &HashSet::new());
                self.again(&fault, round);
                return Ok(());
            }
        };
        let looked_at = self.waiting_in(&round, &urgent, goes_on);
        let mut rest = self.slice(&mut round, urgent, unread, began + SLICE);
        self.note_damage(&mut round, &rest);
        if let Some(Fault::Fenced(why)) = rest.fault {
            return Err(Fault::Fenced(why));
        }
        if self.ready.chain.head.generation != generation {
            let whole = self.ready.open.index.totals()?;
            self.worker.desk.head(self.ready.chain.head, whole);
            self.ready.lease.has_come_to(self.ready.chain.head.generation);
        }
        let again = rest.young.iter().chain(&rest.elsewhere);
        round.after.extend(again.map(|path| path.split().0.to_vec()));
        self.put_off(&rest, &looked_at, round.first.unwrap_or(began));
        let mut not_yet = std::mem::take(&mut round.put_off);
        not_yet.extend(rest.left.iter().flat_map(Work::files).chain(&rest.blocked).cloned());
        self.answer_committed(asked, rest.fault.is_none(), &not_yet);
        if let Some(fault) = rest.fault {
            let pending = round.total.max(self.waiting.len() as u64).max(1);
            self.worker.desk.pending(pending, 0, self.oldest(round.first.or(Some(began))));
            self.again(&fault, round);
            return Ok(());
        }
        self.retries = 0;
        if let Some(work) = rest.left.take() {
            round.work = work;
            self.round = Some(round);
            return Ok(());
        }
        // A pause that is worth something beside what the round took: it must not take all there is.
        let took = uptime().saturating_sub(began);
        self.not_before = (began + BETWEEN).max(began + took + took / 4);
        self.dirty.append(&mut round.after);
        // What moved on is found where it is now, and then what it left may go.
        self.moving = if rest.moving() { self.moving + 1 } else { 0 };
        self.everything |= rest.moving() && rest.removals > 0;
        self.held = if rest.removals > 0 { self.held + 1 } else { 0 };
        self.settle(&round);
        self.finish(&rest, began);
        Ok(())
    }

    /// What a round means to those who ask.
    fn finish(&mut self, rest: &Rest, began: Duration) {
        let desk = Arc::clone(&self.worker.desk);
        // What has changed meanwhile is the next round's.
        let more = u64::from(self.first.is_some());
        if !self.waiting.is_empty() {
            desk.pending(self.waiting.len() as u64 + more, 0, self.oldest(self.first));
            let fault = have_to_wait(self.waiting.iter().map(|(path, w)| (path, w.why.as_str())));
            desk.failed(&fault, None);
            self.answer_all(Err(&fault));
        } else if self.held > 0 {
            desk.pending(rest.removals + more, 0, self.first.or(Some(began)));
            self.start_verifies();
            if self.held >= HELD_MAX {
                self.answer_all(Err(&Fault::other(format!(
                    "{} names of old stay in it until their files are there under their new ones",
                    rest.removals
                ))));
            }
        } else {
            desk.pushed();
            desk.pending(more, 0, self.first);
            if self.troubled.is_empty() {
                self.answer_all(Ok(()));
            } else {
                let fault = unfit(&self.troubled);
                self.answer_all(Err(&fault));
            }
        }
    }

    /// Since when the oldest change has been waiting, beside one that is known of.
    fn oldest(&self, beside: Option<Duration>) -> Option<Duration> {
        self.waiting.values().map(|w| w.since).chain(beside).min()
    }

    fn begin(&mut self, now: Duration) -> Round {
        let full = std::mem::take(&mut self.everything) || !self.hydrated;
        if full {
            self.rescan_at = now + self.rescan;
        }
        self.answering.append(&mut self.asked);
        let first = self.first.take().or(Some(now));
        let failing = self.waiting.iter().filter(|(_, waiting)| waiting.tries + 1 >= AGAIN_AND_AGAIN);
        let failing = failing.map(|(path, waiting)| (path.clone(), waiting.why.clone())).collect();
        Round { full, dirty: std::mem::take(&mut self.dirty), first, failing, ..Round::default() }
    }

    /// Those of the files that have to wait which this slice is to try, or has found to be gone or
    /// settled.
    fn waiting_in(&self, round: &Round, urgent: &Work, goes_on: bool) -> HashSet<Path> {
        if self.waiting.is_empty() {
            return HashSet::new();
        }
        let mut to_do: HashSet<&Path> = round.work.files().collect();
        to_do.extend(urgent.files());
        let looked = |path: &Path| {
            let there = round.full || round.dirty.contains(path.split().0);
            !goes_on && there && !round.skipped.contains(path)
        };
        self.waiting.keys().filter(|path| to_do.contains(path) || looked(path)).cloned().collect()
    }

    /// Files that could not be had, and the removals that wait with them. `since` is the oldest
    /// change of this round.
    fn put_off(&mut self, rest: &Rest, looked_at: &HashSet<Path>, since: Duration) {
        let mut before = std::mem::take(&mut self.waiting);
        for (path, why) in &rest.later {
            let (tries, since) = before.remove(path).map_or((0, since), |w| (w.tries + 1, w.since));
            let at = uptime() + backoff(tries).min(LOCKED_MAX);
            self.waiting.insert(path.clone(), Waiting { at, tries, why: why.clone(), since });
        }
        if rest.fault.is_none() {
            let left: HashSet<&Path> = rest.left.iter().flat_map(Work::files).collect();
            before.retain(|path, _| !looked_at.contains(path) || left.contains(path));
        }
        self.waiting.extend(before);
        if rest.removals > 0 && rest.fault.is_none() && rest.left.is_none() {
            self.rescan_at = self.rescan_at.min(uptime() + LOCKED_MAX);
        }
    }

    fn answer_all(&mut self, outcome: Result<(), &Fault>) {
        self.start_verifies();
        for asked in self.answering.drain(..) {
            let Asked::Flush(flush) = asked else { continue };
            match outcome {
                Ok(()) => done(&flush, "The bucket has everything", true),
                Err(fault) => done(
                    &flush,
                    format!(
                        "Not everything is in the bucket: {fault}; {}. It is tried again",
                        fault.remedy()
                    ),
                    false,
                ),
            }
        }
    }

    fn start_verifies(&mut self) {
        for asked in std::mem::take(&mut self.answering) {
            match asked {
                Asked::Verify { deep, to } => {
                    let (fetched, asker) = (self.fetched.clone(), to.clone());
                    self.review(Some(to), move |review| review.verify(&fetched, deep, &asker));
                }
                flush @ Asked::Flush(_) => self.answering.push(flush),
            }
        }
    }

    fn again(&mut self, fault: &Fault, round: Round) {
        let wait = backoff(self.retries);
        self.retries += 1;
        self.worker.desk.failed(fault, Some(wait));
        self.everything |= round.full;
        self.dirty.extend(round.dirty);
        self.dirty.extend(round.after);
        self.first = round.first.or(self.first);
        self.not_before = uptime() + wait;
        self.answering.append(&mut self.asked);
        self.answer_all(Err(fault));
    }

    /// What a round is to do: first of all these, and what cannot be had.
    fn look_around(&mut self, round: &mut Round, first: &HashSet<&Path>) -> Result<Looked, Fault> {
        if self.ready.chain.is_unsure() {
            let open = self.open();
            self.ready.lease.confirm(&open.bucket)?;
            // Before the look: what it says is true of the index from here on.
            self.ready.chain.settle(&open.bucket, &open.index)?;
        }
        let (mut found, unread) = self.look(round.full, &round.dirty)?;
        if round.full && self.hydrated && !self.whole {
            self.on_whole()?;
        }
        self.make_sure_of_removals(&mut found)?;
        if self.answering.is_empty() {
            let now = uptime();
            let (waiting, skipped) = (&self.waiting, &mut round.skipped);
            found.changes.retain(|change| {
                let due = waiting.get(change.path()).is_none_or(|w| now >= w.at);
                if !due {
                    skipped.insert(change.path().clone());
                }
                due
            });
        }
        self.note_impossible(round, &found);
        round.total = found.changes.len() as u64;
        if round.total > 0 {
            self.worker.desk.pending(round.total, 0, self.oldest(round.first));
        }
        round.work = self.work(found.changes)?;
        Ok((round.work.urgent(|path| first.contains(path)), unread))
    }

    /// Databases that have changed since the round began, and these. The rest is for the next one: a
    /// round has an end, whatever is written meanwhile.
    fn look_again(&mut self, round: &mut Round, first: &HashSet<&Path>) -> Result<Looked, Fault> {
        let dirty = std::mem::take(&mut self.dirty);
        if dirty.is_empty() {
            return Ok(Looked::default());
        }
        let open = self.open();
        let looked = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, &self.fetched).some(&dirty);
        round.after.extend(dirty);
        let now = uptime();
        let mut urgent = looked?.changes;
        urgent.retain(|change| match change {
            Change::Read { path, database, .. } => {
                (*database || first.contains(path)) && self.waiting.get(path).is_none_or(|w| now >= w.at)
            }
            Change::Meta { .. } | Change::Gone { .. } => false,
        });
        let mut work = self.work(urgent)?;
        let urgent = work.urgent(|_| true);
        // What waits for something else does so in the next round.
        round.put_off.extend(work.files().cloned());
        Ok((urgent, Vec::new()))
    }

    fn work(&self, changes: Vec<Change>) -> Result<Work, Fault> {
        let open = &self.ready.open;
        Work::of(changes, &open.volume, &open.index, &open.bucket.prefix)
    }

    fn look(&mut self, full: bool, dirty: &BTreeSet<Vec<u8>>) -> Result<(Found, Vec<Unread>), Fault> {
        let open = self.open();
        let prefix = open.bucket.prefix.clone();
        let look = |fetched: &HashSet<Path>| {
            let scanner = Scanner::new(&open.volume, &open.index, &prefix, fetched);
            if full { scanner.full() } else { scanner.some(dirty) }
        };
        let mut found = look(&self.fetched)?;
        // What was moved while it was only below has to be above before its old name may go.
        found.to_fetch.append(&mut self.unread);
        let mut unread = Vec::new();
        while !found.to_fetch.is_empty() {
            for path in found.to_fetch {
                unread.append(&mut hydrate::lift_tree(&open, &path)?);
                self.fetched.insert(path);
            }
            self.fetched.extend(unread.iter().map(|unread| unread.path.clone()));
            found = look(&self.fetched)?;
        }
        self.unread = unread.iter().map(|unread| unread.path.clone()).collect();
        Ok((found, unread))
    }

    fn slice(&mut self, round: &mut Round, urgent: Work, unread: Vec<Unread>, until: Duration) -> Rest {
        let open = self.open();
        let mut work = std::mem::take(&mut round.work);
        work.forget(&urgent);
        let (desk, total) = (Arc::clone(&self.worker.desk), round.total);
        let oldest = self.oldest(round.first);
        let flushes = self.answering.iter().filter_map(|asked| match asked {
            Asked::Flush(to) => Some(to.clone()),
            Asked::Verify { .. } => None,
        });
        let answers: Vec<_> = flushes.collect();
        let progress = move |files: u64, bytes: u64| {
            desk.pending(files, bytes, oldest);
            let progress = Progress {
                what: "pushing".to_owned(),
                files_done: total.saturating_sub(files),
                files_total: total,
                bytes_done: 0,
                bytes_total: bytes,
            };
            for to in &answers {
                let _ = to.send(Answer::Progress(progress.clone()));
            }
        };
        let mut pusher = Pusher {
            bucket: &open.bucket,
            index: &open.index,
            volume: &open.volume,
            lease: &self.ready.lease,
            chain: &mut self.ready.chain,
            may_delete: self.whole,
            insists: self.moving >= MOVING_MAX,
            failing: &round.failing,
            leaves_out_failing: round.leaves_out_failing,
            until,
            progress: &progress,
        };
        pusher.round(work, urgent, unread)
    }

    /// What was moved while we looked may have been missed at both names. So what is gone is only
    /// believed when it was gone before a second look at everything, which sees its new name.
    fn make_sure_of_removals(&mut self, found: &mut Found) -> Result<(), Fault> {
        let gone = |change: &Change| matches!(change, Change::Gone { .. });
        let first: HashSet<Path> =
            found.changes.iter().filter(|c| gone(c)).map(|c| c.path().clone()).collect();
        if first.is_empty() {
            return Ok(());
        }
        let open = self.open();
        *found = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, &self.fetched).full()?;
        let whole = found.to_fetch.is_empty();
        let dirty = &mut self.dirty;
        found.changes.retain(|change| {
            let sure = !gone(change) || whole && first.contains(change.path());
            if !sure {
                dirty.insert(change.path().split().0.to_vec());
            }
            sure
        });
        Ok(())
    }

    // === Incidents of the tree itself ===

    fn note_impossible(&mut self, round: &mut Round, found: &Found) {
        for (path, Unfit { why, remedy }) in &found.impossible {
            let what = format!("it cannot be in the bucket: {why}");
            self.worker.desk.incident(&path.to_string(), &what, remedy);
            round.troubles.insert(path.clone(), what);
        }
        self.troubled.extend(round.troubles.clone());
    }

    fn note_damage(&mut self, round: &mut Round, rest: &Rest) {
        for (path, why) in &rest.damaged {
            let what = format!("this database is damaged: {why}; the bucket keeps its last good state");
            self.worker.desk.incident(
                &path.to_string(),
                &what,
                "repair it, or take the good one back with `cvm storage get`; if it is to be another file now, write that beside it and rename it",
            );
            round.troubles.insert(path.clone(), what.clone());
            self.troubled.insert(path.clone(), what);
        }
        if let Ok(bad) = self.ready.open.index.bad() {
            let now: HashSet<Path> = bad.iter().map(|(path, _)| path.clone()).collect();
            // Written anew, or gone with the directory that it was in.
            for path in self.bad.difference(&now).filter(|path| !self.troubled.contains_key(path)) {
                self.worker.desk.settled(&path.to_string());
            }
            self.bad = now;
            for (path, row) in bad {
                self.worker.desk.incident(
                    &path.to_string(),
                    row.bad.as_deref().unwrap_or_default(),
                    hydrate::REMEDY,
                );
            }
        }
    }

    /// Those that are over, for a round that has looked there, and to its end.
    fn settle(&mut self, round: &Round) {
        let desk = Arc::clone(&self.worker.desk);
        self.troubled.retain(|path, _| {
            let looked = round.full || round.dirty.contains(path.split().0);
            let stays = round.troubles.contains_key(path) || !looked;
            if !stays {
                desk.settled(&path.to_string());
            }
            stays
        });
        let index = &self.ready.open.index;
        self.mending.retain(|path| {
            let stays = index.get(path).is_ok_and(|row| row.is_some_and(|row| row.unsure));
            if !stays && desk.settled(&path.to_string()) {
                tracing::info!("sent again: {path}");
            }
            stays
        });
    }

    /// A round that begins after the question, and takes the file, is the answer.
    fn wants_committed(&mut self, path: &str, answer: tokio::sync::mpsc::UnboundedSender<Answer>) {
        let Some(path) = Path::new(path.as_bytes()) else {
            let _ = answer.send(Answer::Refused { why: "this is no path below /data".to_owned() });
            return;
        };
        // Looked at even if nobody has hinted at it yet; nothing else is hurried.
        self.dirty.insert(path.split().0.to_vec());
        self.first.get_or_insert(uptime());
        self.committed.push((path, answer));
    }

    /// Who hung up is forgotten; whose file is not there yet stays for the next slice or round.
    fn answer_committed(
        &mut self,
        asked: Vec<(Path, tokio::sync::mpsc::UnboundedSender<Answer>)>,
        good: bool,
        not_yet: &HashSet<Path>,
    ) {
        for (path, answer) in asked {
            if let Some(why) = self.troubled.get(&path) {
                done(&answer, format!("The bucket does not have it: {why}"), false);
            } else if good && !self.waiting.contains_key(&path) && !not_yet.contains(&path) {
                done(&answer, "The bucket has it", true);
            } else if !answer.is_closed() {
                self.dirty.insert(path.split().0.to_vec());
                self.committed.push((path, answer));
            }
        }
    }

    // === Orders ===

    fn answer(&mut self, ask: &Ask, to: &tokio::sync::mpsc::UnboundedSender<Answer>) {
        let outcome = match ask {
            Ask::Drill => return self.drill(Some(to.clone())),
            Ask::Accept { seen } => {
                if has_changed(&self.worker.desk, seen.as_deref(), to) {
                    return;
                }
                self.accept()
            }
            Ask::Takeover => Ok(("This instance owns the bucket already".to_owned(), true)),
            _ => Err(Fault::other("this is answered elsewhere")),
        };
        answer(to, outcome);
    }

    /// What the bucket does not have right is given up: it is gone from the manifest too. Only what
    /// has been named is.
    fn accept(&mut self) -> Result<(String, bool), Fault> {
        let open = self.open();
        let named: HashSet<String> = self.worker.desk.named().into_iter().map(|(path, _)| path).collect();
        let mut bad = open.index.bad()?;
        bad.retain(|(path, _)| named.contains(&path.to_string()));
        for (path, _) in &bad {
            open.index.set_bad(path, None)?;
            open.index.set_lower(std::slice::from_ref(path), false)?;
        }
        for path in &named {
            self.worker.desk.settled(path);
        }
        self.everything = true;
        self.note_change();
        Ok((format!("{} files are given up", bad.len()), true))
    }

    fn is_reviewing(&self) -> bool {
        self.reviewing.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Beside this loop: it may take as long as the bucket is large.
    fn review(
        &mut self,
        to: Option<tokio::sync::mpsc::UnboundedSender<Answer>>,
        work: impl FnOnce(&Review) -> Result<(String, bool), Fault> + Send + 'static,
    ) {
        if self.is_reviewing() {
            to.as_ref().map(refuse_review);
            return;
        }
        let sender = self.worker.sender.clone();
        let review = Review { open: self.open(), desk: Arc::clone(&self.worker.desk), sender };
        self.reviewing = Some(std::thread::spawn(move || {
            let outcome = work(&review);
            match to {
                Some(to) => answer(&to, outcome),
                None => drop(outcome.inspect_err(|fault| review.desk.failed(fault, None))),
            }
        }));
    }

    fn drill(&mut self, to: Option<tokio::sync::mpsc::UnboundedSender<Answer>>) {
        self.review(to.clone(), move |review| review.drill(&to));
    }

    fn recall_drill(&self) -> Result<(), Fault> {
        let index = &self.ready.open.index;
        if let Some(drill) = index.meta("drill")?.and_then(|text| serde_json::from_str(&text).ok()) {
            self.worker.desk.drill(drill, index.number("drilled")?);
        }
        Ok(())
    }

    fn last_words(&mut self) {
        let open = self.open();
        let boots = &mut self.worker.boots;
        let grown = boots.grown();
        if grown.is_empty() {
            return;
        }
        let sent = self.ready.lease.confirm(&open.bucket).and_then(|()| boots.send(&open.bucket, grown));
        if let Err(fault) = sent {
            tracing::warn!("logs are not in the bucket: {fault}");
        }
    }

    // === The end ===

    /// Pushes what is pending, and gives the bucket away. True when it has everything.
    fn drain(&mut self) -> bool {
        self.worker.desk.phase("draining");
        let until = self.worker.ending.until();
        let open = self.open();
        self.waiting.clear();
        self.round = None;
        let mut left = (0u64, 0u64);
        let mut failed = Failed::default();
        let clean = loop {
            let mut round = failed.round();
            let outcome = self.look_around(&mut round, &HashSet::new()).map(|(urgent, unread)| {
                let rest = self.slice(&mut round, urgent, unread, Duration::MAX);
                self.note_damage(&mut round, &rest);
                failed.learn(&rest, &round);
                rest
            });
            let of_old = outcome.as_ref().map_or_else(|_| HashSet::new(), |rest| rest.stays.clone());
            let fault = match outcome {
                Ok(rest) if rest.fault.is_none() && rest.later.is_empty() => None,
                Ok(rest) => {
                    let later = || have_to_wait(rest.later.iter().map(|(path, why)| (path, why.as_str())));
                    Some(rest.fault.unwrap_or_else(later))
                }
                Err(fault) => Some(fault),
            };
            if let Some(fault) = &fault {
                self.worker.desk.failed(fault, None);
            } else {
                self.settle(&round);
            }
            let clean = fault.is_none();
            let scanned = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, &self.fetched).full();
            left = match scanned {
                Ok(mut found) => {
                    // A file whose name cannot be there is counted by that one.
                    if !found.impossible.is_empty() {
                        found.changes.retain(
                            |change| !matches!(change, Change::Gone { path } if of_old.contains(path)),
                        );
                    }
                    ending::missing(&open.volume, &found)
                }
                Err(_) => (left.0.max(1), left.1),
            };
            // No round mends what is damaged, or gives what cannot be named a name.
            let stays = round.troubles.len() as u64;
            let fenced = matches!(fault, Some(Fault::Fenced(_)));
            if clean && left.0 <= stays || fenced || uptime() >= until {
                break clean;
            }
            std::thread::sleep(Duration::from_millis(if clean { 10 } else { 500 }));
        };
        if !clean {
            left.0 = left.0.max(1);
        }
        // Of a bucket that did not answer until now nothing more is asked.
        if left.0 == 0 {
            self.worker.ending.all_is_there();
            self.last_words();
        }
        self.leave();
        self.ready.lease.has_come_to(self.ready.chain.head.generation);
        if left.0 == 0
            && let Err(fault) = self.ready.lease.release(&open.bucket)
        {
            self.worker.desk.failed(&fault, None);
        }
        self.worker.desk.drained(left.0, left.1);
        left.0 == 0
    }

    fn leave(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.answering.append(&mut self.asked);
        for asked in self.answering.drain(..) {
            let (Asked::Flush(to) | Asked::Verify { to, .. }) = asked;
            let why = "the storage was closed before this was done".to_owned();
            let _ = to.send(Answer::Refused { why });
        }
        self.worker.desk.opened(None);
        // A hydrator or a review that is still on its way must write nothing into the next life.
        self.ready.open.index.close();
    }
}

/// What a stop could not send. One file that the server refuses is not to keep others out.
#[derive(Default)]
struct Failed {
    tries: HashMap<Path, (u32, String)>,
    others_are_left: bool,
}

impl Failed {
    fn round(&self) -> Round {
        let often = self.tries.iter().filter(|(_, (tries, _))| *tries >= AGAIN_AND_AGAIN);
        let failing = often.map(|(path, (_, why))| (path.clone(), why.clone())).collect();
        Round { full: true, failing, leaves_out_failing: self.others_are_left, ..Round::default() }
    }

    fn learn(&mut self, rest: &Rest, round: &Round) {
        let before = std::mem::take(&mut self.tries);
        for (path, why) in &rest.later {
            let tries = before.get(path).map_or(0, |(tries, _)| *tries) + 1;
            self.tries.insert(path.clone(), (tries, why.clone()));
        }
        let others = rest.later.iter().any(|(path, _)| !round.failing.contains_key(path));
        self.others_are_left = rest.fault.is_some() || others;
    }
}

/// Says so to an operator who has looked at something else than there is now.
fn has_changed(desk: &Desk, seen: Option<&str>, to: &tokio::sync::mpsc::UnboundedSender<Answer>) -> bool {
    let changed = seen.is_some() && seen != desk.status().wrong.as_deref();
    if changed {
        let why = "what is wrong is not what it was when it was shown; look at it again".to_owned();
        let _ = to.send(Answer::Refused { why });
    }
    changed
}

fn refuse_review(to: &tokio::sync::mpsc::UnboundedSender<Answer>) {
    let why = "a verify or a drill is running already; ask again when it is over".to_owned();
    let _ = to.send(Answer::Refused { why });
}

/// What stays out of the bucket until somebody does something about it.
fn unfit(troubled: &HashMap<Path, String>) -> Fault {
    let first = troubled.iter().min().map(|(path, why)| format!("{path}: {why}")).unwrap_or_default();
    Fault::other(format!("{} files cannot be in it as they are; the first is {first}", troubled.len()))
}

fn have_to_wait<'a>(later: impl ExactSizeIterator<Item = (&'a Path, &'a str)>) -> Fault {
    let count = later.len();
    let first = later.min().map(|(path, why)| format!("; the first is {path}: {why}")).unwrap_or_default();
    Fault::other(format!("{count} files have to wait{first}"))
}

/// Logs of earlier boots, for operators.
pub(crate) fn boots(open: &Open) -> Result<Vec<String>, Fault> {
    let earlier = boots::before(&open.bucket, &open.boot)?;
    Ok(earlier
        .iter()
        .zip(1..)
        .map(|((boot, logs), n)| {
            let when = boot.parse::<u64>().unwrap_or(0);
            let name = format!("--boot -{n}");
            format!("{name:<12} {}  {}", cvm_blueprint::time::rfc3339(when), logs.join(" "))
        })
        .collect())
}

pub(crate) fn boot_log(open: &Open, boot: i32, log: &str) -> Result<Vec<u8>, Fault> {
    let earlier = boots::before(&open.bucket, &open.boot)?;
    let number = usize::try_from(boot.unsigned_abs()).unwrap_or(0);
    let (name, logs) = number.checked_sub(1).and_then(|n| earlier.get(n)).ok_or_else(|| {
        Fault::other(format!("the bucket keeps no boot {boot}; `cvm logs --boots` lists them"))
    })?;
    boots::read(&open.bucket, name, log)?
        .ok_or_else(|| Fault::other(format!("that boot has no log {log}; it has: {}", logs.join(", "))))
}
