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
use crate::entry::Path;
use crate::fault::Fault;
use crate::opening::{self, Ready, Said};
use crate::owner::uptime;
use crate::push::{Pusher, Rest};
use crate::review::Review;
use crate::scan::{Change, Found, Scanner};
use crate::watch::{Hint, Watcher};
use crate::{boots, hydrate, mount, parallel, volume};
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
/// Nobody says when a database is not locked any more.
const LOCKED_MAX: Duration = Duration::from_secs(10);
/// Hints are hints; the scan is the truth.
const RESCAN: Duration = Duration::from_secs(300);
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// What the last request of a drain may take beyond its time.
const DRAIN_GRACE: Duration = Duration::from_secs(1);
/// Between two looks at whether a mount that was inherited still answers.
const LOOK: Duration = Duration::from_secs(2);
const LOGS: Duration = Duration::from_secs(60);

/// Rounds for which removals wait for what is on the move; a tree in which something always is must
/// not keep what is gone for ever.
const MOVING_MAX: u32 = 8;
/// Rounds that a flush waits for removals which wait for what is on the move.
const HELD_MAX: u32 = 20;

pub(crate) enum Order {
    Hint(Hint),
    Ask(Ask, tokio::sync::mpsc::UnboundedSender<Answer>),
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
    pub(crate) said: Said,
    pub(crate) stopping: bool,
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
                // There was no tree, so there is nothing that only this machine has and that this
                // worker could know of.
                self.desk.drained(0, 0);
                return true;
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
            self.desk.not_ready(phase, format!("{fault}; {}", fault.remedy()), retry);
            self.desk.failed(&fault, Some(wait));
            if matches!(fault, Fault::Tree) {
                // Somebody may still stand on it: process 1 starts the next worker when nobody does.
                return false;
            }
            self.pause(wait);
        }
    }

    /// One try, from opening to the end. Only an ordered stop is an end that is not a fault.
    fn life(&mut self, tries: &mut u32) -> Result<bool, Fault> {
        let (desk, said) = (Arc::clone(&self.desk), std::mem::take(&mut self.said));
        let spec = Arc::clone(&self.spec);
        let opened = opening::open(&spec, &desk, said, &mut |wait| {
            self.pause(wait);
            if self.stopping {
                Err(Fault::other("the machine is stopping"))
            } else {
                Ok(std::mem::take(&mut self.said.takeover))
            }
        });
        let ready = opened.inspect_err(|fault| {
            // The operator's word counts for a try that gets as far as to need it.
            self.said.accept |= said.accept && fault.may_pass();
        })?;
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

    /// Waits, and takes orders meanwhile.
    fn pause(&mut self, wait: Duration) {
        let until = uptime() + wait;
        while !self.stopping {
            let left = until.saturating_sub(uptime());
            match self.orders.recv_timeout(left) {
                Ok(Order::Stop) | Err(RecvTimeoutError::Disconnected) => self.stopping = true,
                Ok(Order::Ask(Ask::Accept, answer)) => {
                    self.said.accept = true;
                    done(&answer, "The next try goes on with what the bucket holds now", true);
                    return;
                }
                Ok(Order::Ask(Ask::Takeover, answer)) => {
                    self.said.takeover = true;
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

/// A tree that is good, and all that keeps it and the bucket equal.
struct Tree<'a> {
    worker: &'a mut Worker,
    ready: Ready,
    stop: Arc<AtomicBool>,
    /// A verify or a drill.
    reviewing: Option<std::thread::JoinHandle<()>>,
    dirty: BTreeSet<Vec<u8>>,
    everything: bool,
    first: Option<Duration>,
    last: Duration,
    not_before: Duration,
    rescan_at: Duration,
    retries: u32,
    logs_at: Duration,
    drill_at: Option<Duration>,
    flushes: Vec<tokio::sync::mpsc::UnboundedSender<Answer>>,
    /// Files that somebody wants to be in the bucket as they are now.
    committed: Vec<(Path, tokio::sync::mpsc::UnboundedSender<Answer>)>,
    /// Moved directories whose content has come up.
    fetched: HashSet<Path>,
    /// Those of them that could not be had.
    unread: Vec<Path>,
    hydrated: bool,
    /// And what was moved before it came up is above too.
    whole: bool,
    /// When the stand-in is looked at; never, where this worker serves no mount.
    stand_in_at: Option<Duration>,
    /// Paths with an incident of the tree's own.
    troubled: HashSet<Path>,
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
        let mut this = Self {
            worker,
            stop,
            reviewing: None,
            dirty: BTreeSet::new(),
            everything: true,
            first: None,
            last: uptime(),
            not_before: Duration::ZERO,
            rescan_at: uptime() + RESCAN,
            retries: 0,
            // At once: a boot that ends soon is one that somebody wants to know of.
            logs_at: uptime(),
            drill_at,
            flushes: Vec::new(),
            committed: Vec::new(),
            fetched: HashSet::new(),
            unread: Vec::new(),
            hydrated,
            whole: ready.mode == Mode::Sync || ready.open.index.meta("independent")?.is_some(),
            stand_in_at: mount::is_served_here().then(uptime),
            troubled: HashSet::new(),
            waiting: HashMap::new(),
            moving: 0,
            held: 0,
            ready,
        };
        this.help()?;
        this.recall_drill()?;
        this.say_ready();
        Ok(this)
    }

    fn open(&self) -> Arc<Open> {
        Arc::clone(&self.ready.open)
    }

    fn say_ready(&self) {
        self.worker.desk.ready(self.ready.mode, self.ready.reason.clone(), self.whole);
    }

    // === Helpers ===

    fn help(&mut self) -> Result<(), Fault> {
        let (sender, stop, open) = (self.worker.sender.clone(), Arc::clone(&self.stop), self.open());
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
            while let Ok(hints) = watcher.next() {
                for hint in hints {
                    if stop.load(Ordering::Relaxed) || sender.send(Order::Hint(hint)).is_err() {
                        return;
                    }
                }
            }
        });
        watching.recv().map_err(|_| Fault::other("the watcher did not start"))??;
        self.beat();
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
                        Err(fault) => {
                            desk.failed(&fault, Some(RETRY.0));
                            std::thread::sleep(RETRY.0);
                        }
                    }
                }
            });
        }
        Ok(())
    }

    fn beat(&mut self) {
        let (open, lease, stop, sender, desk) = (
            self.open(),
            Arc::clone(&self.ready.lease),
            Arc::clone(&self.stop),
            self.worker.sender.clone(),
            Arc::clone(&self.worker.desk),
        );
        let beat = Duration::from_secs(u64::from(self.worker.spec.heartbeat_s.max(1)));
        // A mount that an earlier worker left is answered by the stand-in, which may die too.
        let inherited = self.ready.mode == Mode::Fuse
            && self.ready.stand_in.is_none()
            && mount::is_mount(cvm_blueprint::paths::BUCKET_MOUNT);
        let (mut looks, mut look_at) = (now_ms(), uptime());
        std::thread::spawn(move || {
            let mut due = uptime() + beat;
            while !stop.load(Ordering::Relaxed) {
                // Short sleeps, so that a stop is not waited for, on a clock that counts sleep.
                std::thread::sleep(Duration::from_millis(200).min(beat));
                if inherited && uptime() >= look_at {
                    (looks, look_at) = (looks + 1, uptime() + LOOK);
                    if mount::is_dead(looks) {
                        return drop(sender.send(Order::TreeIsDead));
                    }
                }
                if uptime() < due {
                    continue;
                }
                due = match lease.renew(&open.bucket) {
                    Ok(()) => uptime() + beat,
                    Err(Fault::Fenced(why)) => return drop(sender.send(Order::Fenced(why))),
                    Err(fault) => {
                        desk.failed(&fault, None);
                        uptime() + (beat / 4).max(Duration::from_secs(1))
                    }
                };
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
        let push = (self.everything || !self.dirty.is_empty()).then(|| self.push_at());
        let drill = self.drill_at;
        let waiting = self.waiting.values().map(|w| w.at.max(self.not_before)).min();
        [Some(self.rescan_at), push, Some(self.logs_at), drill, waiting, self.stand_in_at]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(self.rescan_at)
    }

    fn push_at(&self) -> Duration {
        let patience = self.first.unwrap_or(self.last) + PATIENCE;
        if self.flushes.is_empty() || self.held > 0 {
            (self.last + QUIET).min(patience).max(self.not_before)
        } else {
            Duration::ZERO
        }
    }

    fn push_is_due(&self, now: Duration) -> bool {
        (self.everything || !self.dirty.is_empty() || !self.flushes.is_empty()) && now >= self.push_at()
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
            Order::Hint(hint) => {
                self.note_change();
                match hint {
                    Hint::Directory(dir) => drop(self.dirty.insert(dir)),
                    Hint::Anywhere => self.everything = true,
                    Hint::NoMoreWatches => self.worker.desk.warn(
                        "The kernel gives no more inotify watches (fs.inotify.max_user_watches): some changes are only found by the scan every 5 minutes",
                    ),
                }
                self.worker.desk.changed(self.first);
            }
            Order::Ask(Ask::Flush, answer) => {
                self.everything = true;
                self.flushes.push(answer);
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

    /// One round. An error ends this life of the worker: it no longer owns the bucket.
    fn push(&mut self) -> Result<(), Fault> {
        let began = uptime();
        let full = std::mem::take(&mut self.everything) || !self.hydrated;
        let dirty = std::mem::take(&mut self.dirty);
        let first = self.first.take();
        let asked = std::mem::take(&mut self.committed);
        if full {
            self.rescan_at = began + RESCAN;
        }
        let (rest, found) = match self.round(full, &dirty, first) {
            Ok(done) => done,
            Err(fault @ Fault::Fenced(_)) => return Err(fault),
            Err(fault) => {
                self.answer_committed(asked, false);
                self.again(&fault, full, dirty, first);
                return Ok(());
            }
        };
        self.speak_of(&found, &rest, full, &dirty);
        if let Some(Fault::Fenced(why)) = rest.fault {
            return Err(Fault::Fenced(why));
        }
        let open = self.open();
        self.worker.desk.head(self.ready.chain.head, open.index.totals()?);
        // A pause that is worth something beside what the round took: it must not take all there is.
        let took = uptime().saturating_sub(began);
        self.not_before = (began + BETWEEN).max(began + took + took / 4);
        let again = rest.young.iter().chain(&rest.elsewhere);
        self.dirty.extend(again.map(|path| path.split().0.to_vec()));
        self.put_off(&rest, began);
        self.answer_committed(asked, rest.fault.is_none());
        let first = first.or(Some(began));
        if let Some(fault) = rest.fault {
            self.worker.desk.pending(rest.later.len().max(1) as u64, 0, first);
            self.again(&fault, full, dirty, first);
            return Ok(());
        }
        self.retries = 0;
        self.held = if rest.removals > 0 { self.held + 1 } else { 0 };
        if self.waiting.is_empty() && self.held > 0 {
            self.worker.desk.pending(rest.removals, 0, Some(began));
            if self.held >= HELD_MAX {
                self.answer_flushes(Err(&Fault::other(format!(
                    "{} names of old stay in it until their files are there under their new ones",
                    rest.removals
                ))));
            }
        } else if self.waiting.is_empty() {
            self.worker.desk.pushed();
            self.worker.desk.pending(0, 0, None);
            self.answer_flushes(Ok(()));
        } else {
            self.worker.desk.pending(self.waiting.len() as u64, 0, first);
            let fault = have_to_wait(self.waiting.iter().map(|(path, w)| (path, w.why.as_str())));
            self.worker.desk.failed(&fault, None);
            self.answer_flushes(Err(&fault));
        }
        Ok(())
    }

    /// Files that could not be had, and the removals that wait with them.
    fn put_off(&mut self, rest: &Rest, began: Duration) {
        let mut before = std::mem::take(&mut self.waiting);
        for (path, why) in &rest.later {
            let tries = before.remove(path).map_or(0, |w| w.tries + 1);
            let at = uptime() + backoff(tries).min(LOCKED_MAX);
            self.waiting.insert(path.clone(), Waiting { at, tries, why: why.clone() });
        }
        // Not looked at in this round.
        before.retain(|_, w| w.at > began);
        self.waiting.extend(before);
        if rest.removals > 0 && rest.fault.is_none() {
            self.rescan_at = self.rescan_at.min(uptime() + LOCKED_MAX);
        }
    }

    fn answer_flushes(&mut self, outcome: Result<(), &Fault>) {
        for flush in self.flushes.drain(..) {
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

    fn again(&mut self, fault: &Fault, full: bool, dirty: BTreeSet<Vec<u8>>, first: Option<Duration>) {
        let wait = backoff(self.retries);
        self.retries += 1;
        self.worker.desk.failed(fault, Some(wait));
        self.everything |= full;
        self.dirty.extend(dirty);
        self.first = first.or(self.first);
        self.not_before = uptime() + wait;
        self.answer_flushes(Err(fault));
    }

    fn round(
        &mut self,
        full: bool,
        dirty: &BTreeSet<Vec<u8>>,
        first: Option<Duration>,
    ) -> Result<(Rest, Found), Fault> {
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
            self.fetched.extend(unread.iter().map(|(path, _)| path.clone()));
            found = look(&self.fetched)?;
        }
        self.unread = unread.iter().map(|(path, _)| path.clone()).collect();
        if full && self.hydrated && !self.whole {
            self.on_whole()?;
        }
        self.make_sure_of_removals(&mut found)?;
        if self.flushes.is_empty() {
            let now = uptime();
            found.changes.retain(|c| self.waiting.get(c.path()).is_none_or(|w| now >= w.at));
        }
        if !found.changes.is_empty() {
            self.worker.desk.pending(found.changes.len() as u64, 0, first.or(Some(uptime())));
        }
        let (desk, answers) = (Arc::clone(&self.worker.desk), self.flushes.clone());
        let total = found.changes.len() as u64;
        let progress = move |files: u64, bytes: u64| {
            desk.pending(files, bytes, first);
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
            progress: &progress,
        };
        let rest = pusher.round(std::mem::take(&mut found.changes), unread);
        // What moved on is found where it is now, and then what it left may go.
        self.moving = if rest.moving { self.moving + 1 } else { 0 };
        self.everything |= rest.moving && rest.removals > 0;
        Ok((rest, found))
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

    /// Incidents of the tree itself, and those that are over.
    fn speak_of(&mut self, found: &Found, rest: &Rest, full: bool, dirty: &BTreeSet<Vec<u8>>) {
        let mut now: HashSet<Path> = HashSet::new();
        for (path, why) in &found.impossible {
            self.worker.desk.incident(
                &path.to_string(),
                &format!("it cannot be in the bucket: {why}"),
                "give it a shorter name",
            );
            now.insert(path.clone());
        }
        for (path, why) in &rest.damaged {
            let what = format!("this database is damaged: {why}; the bucket keeps its last good state");
            self.worker.desk.incident(
                &path.to_string(),
                &what,
                "repair it, or take the good one back with `cvm storage get`",
            );
            now.insert(path.clone());
        }
        let over: Vec<Path> = self
            .troubled
            .iter()
            // A round that looked elsewhere, or not to its end, says nothing about it.
            .filter(|p| !now.contains(*p) && rest.fault.is_none() && (full || dirty.contains(p.split().0)))
            .cloned()
            .collect();
        for path in over {
            self.troubled.remove(&path);
            self.worker.desk.settled(&path.to_string());
        }
        self.troubled.extend(now);
        if let Ok(bad) = self.ready.open.index.bad() {
            for (path, row) in bad {
                self.worker.desk.incident(
                    &path.to_string(),
                    row.bad.as_deref().unwrap_or_default(),
                    hydrate::REMEDY,
                );
            }
        }
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

    /// Who hung up is forgotten; whose file is not there yet stays for the next round.
    fn answer_committed(
        &mut self,
        asked: Vec<(Path, tokio::sync::mpsc::UnboundedSender<Answer>)>,
        good: bool,
    ) {
        for (path, answer) in asked {
            if good && !self.waiting.contains_key(&path) {
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
            Ask::Verify { deep } => {
                // What is only on its way is no difference; what cannot be sent now stays one.
                self.everything = true;
                let pushed = self.push();
                let (deep, fetched, asker) = (*deep, self.fetched.clone(), to.clone());
                self.review(Some(to.clone()), move |review| {
                    pushed.and_then(|()| review.verify(&fetched, deep, &asker))
                });
                return;
            }
            Ask::Drill => return self.drill(Some(to.clone())),
            Ask::Accept => self.accept(),
            Ask::Takeover => Ok(("This instance owns the bucket already".to_owned(), true)),
            _ => Err(Fault::other("this is answered elsewhere")),
        };
        answer(to, outcome);
    }

    /// What the bucket does not have right is given up: it is gone from the manifest too.
    fn accept(&mut self) -> Result<(String, bool), Fault> {
        let open = self.open();
        let bad = open.index.bad()?;
        for (path, _) in &bad {
            open.index.set_bad(path, None)?;
            open.index.set_lower(std::slice::from_ref(path), false)?;
        }
        self.worker.desk.forget_incidents();
        self.everything = true;
        self.note_change();
        Ok((format!("{} files are given up", bad.len()), true))
    }

    /// Beside this loop: it may take as long as the bucket is large.
    fn review(
        &mut self,
        to: Option<tokio::sync::mpsc::UnboundedSender<Answer>>,
        work: impl FnOnce(&Review) -> Result<(String, bool), Fault> + Send + 'static,
    ) {
        if self.reviewing.as_ref().is_some_and(|thread| !thread.is_finished()) {
            let why = "a verify or a drill is running already; ask again when it is over".to_owned();
            to.map(|to| to.send(Answer::Refused { why }));
            return;
        }
        let review = Review { open: self.open(), desk: Arc::clone(&self.worker.desk) };
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
        let sent = self.ready.lease.confirm(&open.bucket).and_then(|()| boots.send(&open.bucket));
        if let Err(fault) = sent {
            tracing::warn!("logs are not in the bucket: {fault}");
        }
    }

    // === The end ===

    /// Pushes what is pending, and gives the bucket away. True when it has everything.
    fn drain(&mut self) -> bool {
        self.worker.desk.phase("draining");
        let until = uptime() + Duration::from_secs(u64::from(self.worker.spec.drain_s));
        let open = self.open();
        self.waiting.clear();
        self.leave_at(until);
        let (mut left, mut fenced) = ((0u64, 0u64), false);
        loop {
            self.everything = true;
            let outcome = self.round(true, &BTreeSet::new(), None);
            let clean = match outcome {
                Ok((rest, found)) if rest.fault.is_none() && rest.later.is_empty() => {
                    self.speak_of(&found, &rest, true, &BTreeSet::new());
                    true
                }
                Ok((rest, _)) => {
                    let later = || have_to_wait(rest.later.iter().map(|(path, why)| (path, why.as_str())));
                    let fault = rest.fault.unwrap_or_else(later);
                    self.worker.desk.failed(&fault, None);
                    fenced = matches!(fault, Fault::Fenced(_));
                    false
                }
                Err(fault) => {
                    self.worker.desk.failed(&fault, None);
                    fenced = matches!(fault, Fault::Fenced(_));
                    false
                }
            };
            let scanned = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, &self.fetched).full();
            left = match scanned {
                Ok(found) => count(&open, &found),
                Err(_) => (left.0.max(1), left.1),
            };
            if clean && left.0 == 0 || fenced || uptime() >= until {
                break;
            }
            std::thread::sleep(Duration::from_millis(if clean { 10 } else { 500 }));
        }
        // Of a bucket that did not answer until now nothing more is asked.
        if left.0 == 0 {
            self.last_words();
        }
        self.leave();
        if left.0 == 0
            && let Err(fault) = self.ready.lease.release(&open.bucket)
        {
            self.worker.desk.failed(&fault, None);
        }
        self.worker.desk.drained(left.0, left.1);
        left.0 == 0
    }

    /// A request that hangs must not hold up the end for longer than was asked for.
    fn leave_at(&self, until: Duration) {
        let (open, desk, fetched) = (self.open(), Arc::clone(&self.worker.desk), self.fetched.clone());
        std::thread::spawn(move || {
            std::thread::sleep(until.saturating_sub(uptime()) + DRAIN_GRACE);
            let scanned = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, &fetched).full();
            let (files, bytes) = scanned.map_or((1, 0), |found| count(&open, &found));
            desk.drained(files.max(1), bytes);
            #[allow(clippy::exit)] // the other threads wait for the network; dying loses nothing
            std::process::exit(i32::from(crate::UNDRAINED));
        });
    }

    fn leave(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.worker.desk.opened(None);
    }
}

/// Files that the bucket does not have as they are, and their names for the log.
fn count(open: &Open, found: &Found) -> (u64, u64) {
    let files: Vec<_> = found.changes.iter().filter(|c| !matches!(c, Change::Meta { .. })).collect();
    let bytes = files
        .iter()
        .filter_map(|c| volume::look(&c.path().below(&open.volume.upper)).ok().flatten())
        .map(|s| crate::scan::size_of(&s))
        .sum();
    for change in files.iter().take(100) {
        tracing::warn!("not in the bucket: {}", change.path());
    }
    (files.len() as u64, bytes)
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
