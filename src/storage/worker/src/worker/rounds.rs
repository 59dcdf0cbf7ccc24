//! Rounds: what has changed is looked at, pushed slice by slice, and what has to wait is waited for.
//!
//! Refuses to let what cannot be sent hold up what can.

use super::answers::{Asked, done};
use super::{AGAIN_AND_AGAIN, Tree, backoff};
use crate::below;
use crate::entry::Path;
use crate::fault::Fault;
use crate::hydrate;
use crate::order::Unread;
use crate::owner::uptime;
use crate::push::{Pusher, Rest, Work};
use crate::scan::{Change, Fetched, Found, Scanner, Unfit};
use cvm_protocol::storage::{Answer, Progress};
use cvm_sys::file_handle::Handle;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

/// Between two batches: a second is what a crash may cost, and three requests are what it costs.
const BETWEEN: Duration = Duration::from_millis(700);
/// A round that takes longer than this is made in slices, so that orders and databases do not wait.
const SLICE: Duration = Duration::from_secs(1);
/// Nobody says when a database is not locked any more.
const LOCKED_MAX: Duration = Duration::from_secs(10);
/// Rounds for which removals wait for what is on the move; a tree in which something always is must
/// not keep what is gone for ever.
const MOVING_MAX: u32 = 8;
/// Rounds that a flush waits for removals that wait for something on the move.
const HELD_MAX: u32 = 20;

/// A round, from its one look at the tree to its last slice.
#[derive(Default)]
pub(super) struct Round {
    full: bool,
    dirty: BTreeSet<Vec<u8>>,
    /// The oldest change in it.
    pub(super) first: Option<Duration>,
    /// What is not done yet.
    work: Work,
    /// How much that was at the beginning.
    total: u64,
    /// What has changed since, but for databases, is the next round's.
    after: BTreeSet<Vec<u8>>,
    /// What has to wait for longer, and was left out.
    skipped: HashSet<Path>,
    /// What has failed again and again, and why.
    pub(super) failing: HashMap<Path, String>,
    /// It has to wait until nothing else is to do.
    leaves_out_failing: bool,
    /// What has changed since, and has to wait for something else.
    put_off: HashSet<Path>,
    pub(super) troubles: HashMap<Path, String>,
    /// Removals that wait for what was moved and is only below.
    pub(super) unconfirmed: usize,
    /// What a look has seen, and the one after it has not.
    pub(super) unseen: HashSet<Handle>,
    /// What was listed was gone when it was looked at.
    pub(super) slipped: bool,
}

impl Round {
    pub(super) fn of_everything(failing: HashMap<Path, String>, leaves_out_failing: bool) -> Self {
        Self { full: true, failing, leaves_out_failing, ..Self::default() }
    }
}

/// What comes before everything else, and what cannot be had.
type Looked = (Work, Vec<Unread>);

pub(super) struct Waiting {
    /// When it is tried again.
    pub(super) at: Duration,
    tries: u32,
    why: String,
    since: Duration,
}

impl Tree<'_> {
    /// One round, or a slice of one. An error ends this life of the worker: it no longer owns the
    /// bucket.
    pub(super) fn push(&mut self) -> Result<(), Fault> {
        let began = uptime();
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
        let anchor = self.ready.chain.anchor();
        if self.told.as_ref() != Some(&anchor) {
            let whole = self.ready.open.index.totals()?;
            self.worker.desk.head(&anchor, whole);
            self.ready.lease.has_come_to(anchor.head.generation);
            self.told = Some(anchor);
        }
        let again = rest.young.iter().chain(&rest.elsewhere);
        round.after.extend(again.map(|path| path.split().0.to_vec()));
        self.put_off(&rest, &looked_at, round.first.unwrap_or(began));
        let mut not_yet = std::mem::take(&mut round.put_off);
        let others = rest.blocked.iter().chain(&rest.vanished);
        not_yet.extend(rest.left.iter().flat_map(Work::files).chain(others).cloned());
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
        let since = round.first.unwrap_or(began);
        self.unsettled = match rest.removals {
            0 => (rest.missed() || round.unconfirmed > 0).then_some(since),
            _ => Some(self.unsettled.unwrap_or(since)),
        };
        self.settle(&round);
        self.go_on_with_the_chase(&rest, &round);
        self.finish(&rest);
        Ok(())
    }

    /// What a round means to those who ask.
    fn finish(&mut self, rest: &Rest) {
        let desk = Arc::clone(&self.worker.desk);
        // What has changed meanwhile is the next round's.
        let more = u64::from(self.first.is_some());
        let misses = self.chase.misses() || self.waiting.keys().any(|path| rest.is_behind(path));
        let goes_on = self.is_asked() && misses && self.chase.may_go_on();
        self.everything |= goes_on;
        if !self.waiting.is_empty() {
            desk.pending(self.waiting.len() as u64 + more, 0, self.oldest(self.first));
            let fault = have_to_wait(self.waiting.iter().map(|(path, w)| (path, w.why.as_str())));
            desk.failed(&fault, None);
            // What has failed for a reason of its own is not tried until it works.
            if !goes_on || self.waiting.keys().any(|path| !rest.is_behind(path)) {
                self.answer_all(Err(&fault));
            }
        } else if self.held > 0 {
            desk.pending(rest.removals + more, 0, self.oldest(self.first));
            self.start_verifies();
            if self.held >= HELD_MAX {
                self.answer_all(Err(&Fault::other(format!(
                    "{} names of old stay in it until their files are there under their new ones",
                    rest.removals
                ))));
            }
        } else {
            desk.pushed();
            desk.pending(more, 0, self.oldest(self.first));
            if goes_on {
                self.start_verifies();
            } else if misses {
                let why = "files are renamed faster than they can be read";
                self.answer_all(Err(&Fault::other(why)));
            } else if self.troubled.is_empty() {
                self.answer_all(Ok(()));
            } else {
                let fault = unfit(&self.troubled);
                self.answer_all(Err(&fault));
            }
        }
    }

    /// Since when the oldest change has been waiting, beside one that is known of.
    pub(super) fn oldest(&self, beside: Option<Duration>) -> Option<Duration> {
        self.waiting.values().map(|w| w.since).chain(self.unsettled).chain(beside).min()
    }

    fn begin(&mut self, now: Duration) -> Round {
        let full = std::mem::take(&mut self.everything);
        if full {
            self.rescan_at = now + self.rescan;
        }
        if !self.asked.is_empty() {
            self.chase.begin();
            self.answering.append(&mut self.asked);
        }
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
        self.chase.is_over();
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
    pub(super) fn look_around(&mut self, round: &mut Round, first: &HashSet<&Path>) -> Result<Looked, Fault> {
        if self.ready.chain.is_unsure() {
            let open = self.open();
            self.ready.lease.confirm_just_now(&open.bucket)?;
            // Before the look: what it says is true of the index from here on.
            self.ready.chain.settle(&open.bucket, &open.index)?;
        }
        let (mut found, unread) = self.look(round.full, &round.dirty)?;
        self.make_sure_of_removals(&mut found, round)?;
        round.slipped |= found.slipped;
        // What has been moved and could not be had is still only below, whatever its old name says;
        // and so is what was moved while we looked.
        let all_above = unread.is_empty() && found.to_fetch.is_empty() && round.unconfirmed == 0;
        if round.full && self.hydrated && !self.whole && all_above {
            self.on_whole()?;
        }
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
        let look = |fetched: &Fetched| {
            let scanner = Scanner::new(&open.volume, &open.index, &prefix, fetched);
            if full { scanner.full() } else { scanner.some(dirty) }
        };
        let lift = || {
            let mut fetched = self.fetched.clone();
            let mut found = look(&fetched)?;
            // What was moved while it was only below has to be above before its old name may go.
            found.to_fetch.extend_from_slice(&self.unread);
            let mut unread: Vec<Unread> = Vec::new();
            while !found.to_fetch.is_empty() {
                found.to_fetch.sort();
                found.to_fetch.dedup();
                for path in found.to_fetch {
                    fetched.note(&open.volume.upper, &path);
                    match hydrate::lift_tree(&open, &path)? {
                        Some(mut more) => unread.append(&mut more),
                        None => fetched.forget(&path),
                    }
                }
                for Unread { path, .. } in &unread {
                    fetched.note(&open.volume.upper, path);
                }
                found = look(&fetched)?;
            }
            unread.sort_by(|a, b| a.path.cmp(&b.path));
            unread.dedup_by(|a, b| a.path == b.path);
            Ok((found, unread, fetched))
        };
        let lifted: Result<_, Fault> = lift();
        // What was found this time is to be found again.
        self.everything |= lifted.is_err();
        let (found, unread, fetched) = lifted?;
        self.everything |= !self.unread.is_empty() && unread.is_empty();
        self.unread = unread.iter().map(|unread| unread.path.clone()).collect();
        self.fetched = fetched;
        Ok((found, unread))
    }

    pub(super) fn slice(
        &mut self,
        round: &mut Round,
        urgent: Work,
        unread: Vec<Unread>,
        until: Duration,
    ) -> Rest {
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
    fn make_sure_of_removals(&mut self, found: &mut Found, round: &mut Round) -> Result<(), Fault> {
        let gone = |change: &Change| matches!(change, Change::Gone { .. });
        let first: HashSet<Path> =
            found.changes.iter().filter(|c| gone(c)).map(|c| c.path().clone()).collect();
        if first.is_empty() {
            return Ok(());
        }
        let open = self.open();
        round.unseen = handles(&found.changes);
        round.slipped |= found.slipped;
        *found = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, &self.fetched).full()?;
        for handle in handles(&found.changes) {
            round.unseen.remove(&handle);
        }
        let whole = found.to_fetch.is_empty();
        // What was moved and is only below is brought up by the next look, if that is at everything.
        self.everything |= !whole;
        let dirty = &mut self.dirty;
        found.changes.retain(|change| {
            let sure = !gone(change) || whole && first.contains(change.path());
            if !sure {
                dirty.insert(change.path().split().0.to_vec());
                round.unconfirmed += usize::from(!whole);
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

    pub(super) fn note_damage(&mut self, round: &mut Round, rest: &Rest) {
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
        for (path, remark) in &rest.remarks {
            if self.remarked.insert(path.clone(), *remark) != Some(*remark) {
                tracing::warn!("{path}: {remark}; it is in the bucket as it is");
            }
        }
        let index = &self.ready.open.index;
        if let (Ok(bad), Ok(tainted)) = (index.bad(), index.tainted()) {
            let all = bad.iter().map(|(path, _)| path).chain(tainted.iter().map(|(path, _)| path));
            let now: HashSet<Path> = all.cloned().collect();
            // Written anew, or gone with the directory that it was in.
            for path in self.bad.difference(&now).filter(|path| !self.troubled.contains_key(path)) {
                self.worker.desk.settled(&path.to_string());
            }
            self.bad = now;
            for (path, why) in tainted {
                self.worker.desk.incident(&path.to_string(), &why, below::REMEDY);
            }
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
    pub(super) fn settle(&mut self, round: &Round) {
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
    pub(super) fn wants_committed(&mut self, path: &str, answer: tokio::sync::mpsc::UnboundedSender<Answer>) {
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
}

/// Of what is to be read, as it was seen.
fn handles(changes: &[Change]) -> HashSet<Handle> {
    let of = |change: &Change| match change {
        Change::Read { handle, .. } => handle.clone(),
        Change::Meta { .. } | Change::Gone { .. } => None,
    };
    changes.iter().filter_map(of).collect()
}

/// What stays out of the bucket until somebody does something about it.
fn unfit(troubled: &HashMap<Path, String>) -> Fault {
    let first = troubled.iter().min().map(|(path, why)| format!("{path}: {why}")).unwrap_or_default();
    Fault::other(format!("{} files cannot be in it as they are; the first is {first}", troubled.len()))
}

pub(super) fn have_to_wait<'a>(later: impl ExactSizeIterator<Item = (&'a Path, &'a str)>) -> Fault {
    let count = later.len();
    let first = later.min().map(|(path, why)| format!("; the first is {path}: {why}")).unwrap_or_default();
    Fault::other(format!("{count} files have to wait{first}"))
}
