//! One round of pushing: from what a scan found to a bucket that has it.
//!
//! ```text
//! for each batch:  copies and hashes -> on the disk -> intents into the manifest -> objects -> entries into the manifest
//! then             the same for what takes the place of something else, whose removal is in the same segment
//! at the end:      removals into the manifest, with what comes instead -> objects deleted
//! ```
//!
//! Removals come last, so that what was moved is there under its new name before it goes under its
//! old one: a file that lives on under a name that the bucket does not have yet keeps its old one,
//! however fast it moves. What cannot be beside something that stays, as a link where a directory was
//! whose files are not yet there under new names, waits with it. A batch that fails half way leaves intents behind, and its files are pushed again.
//!
//! A round that is long is made in slices: between two of them the worker reads its orders, and what
//! databases have committed meanwhile goes up before the rest.
//!
//! Refuses to write when the lease does not confirm it. May import: `below`, `bucket`, `chain`, `disk`,
//! `entry`, `fault`, `index`, `manifest`, `order`, `owner`, `parallel`, `rules`, `scan`, `stage`, `volume`, `way`.

mod exchange;
mod work;

use crate::below::{self, Verdict};
use crate::bucket::Bucket;
use crate::chain::{Chain, LINES};
use crate::disk;
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::index::{Index, Known, Row};
use crate::manifest::{Line, Word};
use crate::order::{self, Passed, ToRead, Unread};
use crate::owner::{Lease, uptime};
use crate::parallel;
use crate::stage::{self, Before, Outcome, Staged};
use crate::volume::{self, Room, Volume};
use crate::way::Way;
use cvm_sys::file_handle::{Fate, Handle};
use exchange::{Exchange, Living};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use work::{Holds, SoFar};
pub(crate) use work::{Rest, Work};

/// A batch is as large as a loss of half its work is cheap.
const BATCH_FILES: usize = 400;
const BATCH_BYTES: u64 = 128 << 20;
/// Copies made at once: the disk's and the processor's business.
const STAGERS: usize = 2;
/// Uploads at once: the latency's business.
const UPLOADERS: usize = 16;
/// Between tries of an upload that the server had no time for just then, as it says under load.
const SLOWER: [Duration; 2] = [Duration::from_millis(200), Duration::from_millis(800)];
/// What a file may have been before it was written to, and be checked in the loop.
const CHECKED_HERE: u64 = 64 << 20;

pub(crate) struct Pusher<'a> {
    pub(crate) bucket: &'a Bucket,
    pub(crate) index: &'a Index,
    pub(crate) volume: &'a Volume,
    pub(crate) lease: &'a Lease,
    pub(crate) chain: &'a mut Chain,
    /// Whether objects may be deleted: not while a mount still shows them.
    pub(crate) may_delete: bool,
    /// Whether what vanishes while it is looked at no longer holds up removals.
    pub(crate) insists: bool,
    /// What has failed again and again, and why.
    pub(crate) failing: &'a HashMap<Path, String>,
    /// Whether that is not even tried.
    pub(crate) leaves_out_failing: bool,
    /// When to leave the next batch to another slice.
    pub(crate) until: Duration,
    /// Told after every batch: files and bytes that are left.
    pub(crate) progress: &'a dyn Fn(u64, u64),
}

impl Pusher<'_> {
    /// One slice. `urgent` is what comes first, and then at least one batch of its own. `unread` was
    /// moved and cannot be had: until it can, nothing may go that it may be.
    pub(crate) fn round(&mut self, mut work: Work, mut urgent: Work, unread: Vec<Unread>) -> Rest {
        let mut rest =
            Rest { removals: work.gone.len() as u64, so_far: work.so_far.clone(), ..Rest::default() };
        for Unread { path, data_at, why } in unread {
            if let Some(old) = data_at.filter(|old| work.leave_out(old) | urgent.leave_out(old)) {
                rest.waits_for_its_name(old);
            }
            rest.wait(path, why, Holds::Everything);
        }
        for Passed { path, now_at, handle } in std::mem::take(&mut work.passed) {
            if self.insists {
                rest.so_far.moved.insert(handle);
            } else if work.leave_out(&path) {
                rest.is_passed(path, now_at);
            }
        }
        let outcome = self.send_first(work, urgent, &mut rest).and_then(|left| match left {
            Left::Nothing(work) => self.put_in_place(work, &mut rest),
            left @ Left::Some(_) => Ok(left),
        });
        rest.fault = match outcome {
            Ok(Left::Nothing(_)) => self.conclude().err(),
            Ok(Left::Some(work)) => {
                rest.left = Some(Work { so_far: rest.so_far.clone(), ..work });
                None
            }
            Err(fault) => Some(fault),
        };
        rest
    }

    /// All that nothing stands in the way of.
    fn send_first(&mut self, mut work: Work, urgent: Work, rest: &mut Rest) -> Result<Left, Fault> {
        let (late, reads): (Vec<_>, Vec<_>) =
            std::mem::take(&mut work.reads).into_iter().partition(|read| read.late);
        let bytes = reads.iter().chain(&late).map(|read| read.size).sum();
        let after = ((reads.len() + late.len()) as u64, bytes);
        self.files(urgent.reads, Duration::MAX, after, None, rest)?;
        self.metas(&std::mem::take(&mut work.opening))?;
        let after = (late.len() as u64, late.iter().map(|read| read.size).sum());
        let mut left = self.files(reads, self.until, after, None, rest)?;
        if !left.is_empty() {
            left.extend(late);
            return Ok(Left::Some(Work { reads: left, ..work }));
        }
        self.metas(&std::mem::take(&mut work.metas))?;
        Ok(Left::Nothing(Work { reads: late, ..work }))
    }

    /// What takes the place of something else, and removals.
    fn put_in_place(&mut self, work: Work, rest: &mut Rest) -> Result<Left, Fault> {
        let Work { mut reads, instead, mut gone, .. } = work;
        let instead = instead.into_iter().map(|line| (line.path.clone(), line)).collect();
        let mut exchange = Exchange { instead, ..Exchange::default() };
        if !reads.is_empty() {
            let late: HashSet<Path> = reads.iter().map(|read| read.path.clone()).collect();
            // What it keeps now may go when these have arrived.
            let mut for_now = Rest { so_far: rest.so_far.clone(), ..Rest::default() };
            exchange.going = self.going(&gone, &exchange, &late, &mut for_now)?;
            let carriers: HashSet<Path> = exchange.going.values().flatten().cloned().collect();
            reads.sort_by_key(|read| (read.rank, !carriers.contains(&read.path)));
            let left = self.files(reads, self.until, (0, 0), Some(&mut exchange), rest)?;
            gone.retain(|path| !exchange.gone.contains(path));
            if !left.is_empty() {
                let instead = exchange.instead.into_values().collect();
                return Ok(Left::Some(Work { reads: left, instead, gone, ..Work::default() }));
            }
        }
        self.remove(&gone, exchange, rest)?;
        Ok(Left::Nothing(Work::default()))
    }

    fn remove(&mut self, gone: &[Path], mut exchange: Exchange, rest: &mut Rest) -> Result<(), Fault> {
        exchange.going = self.going(gone, &exchange, &HashSet::new(), rest)?;
        rest.removals = rest.removals.saturating_sub(rest.stays.len() as u64);
        let going = gone.iter().filter(|path| exchange.going.contains_key(path));
        let mut lines: Vec<Line> = going.map(|path| Line { path: path.clone(), word: Word::Gone }).collect();
        let way = Way::new(self.index);
        let mut directories = HashSet::new();
        for (path, line) in exchange.instead {
            let Word::Is(entry) = &line.word else { continue };
            let in_the_way = way.of(&path, self.index.get(&path)?.as_ref(), &entry.kind)?;
            let goes = |row: &Path| exchange.going.contains_key(row) || directories.contains(row);
            if in_the_way.iter().all(goes) {
                if entry.kind == Kind::Directory {
                    directories.insert(path);
                }
                lines.push(line);
            } else {
                rest.block(&path);
            }
        }
        for lines in lines.chunks(LINES) {
            disk::settle(self.volume, self.index, lines)?;
            self.write(lines)?;
            rest.removals = rest.removals.saturating_sub(removals_in(lines));
        }
        Ok(())
    }

    /// What may go, and where that counts only when something else has arrived, what that is.
    fn going(
        &self,
        gone: &[Path],
        exchange: &Exchange,
        late: &HashSet<Path>,
        rest: &mut Rest,
    ) -> Result<HashMap<Path, Option<Path>>, Fault> {
        let gone = self.may_go(gone.to_vec(), &rest.so_far)?;
        let living = Living { volume: self.volume, index: self.index, prefix: &self.bucket.prefix };
        living.left_out(&gone, &exchange.instead, late, rest)
    }

    fn conclude(&mut self) -> Result<(), Fault> {
        if self.may_delete {
            self.bury()?;
        }
        self.keep_short()
    }

    /// However many batches a round has, a boot has few segments to read.
    fn keep_short(&mut self) -> Result<(), Fault> {
        if self.chain.wants_merging() { self.merge() } else { Ok(()) }
    }

    /// Yields those that are left when the time is over. `after` are files and bytes that come later.
    fn files(
        &mut self,
        reads: Vec<ToRead>,
        until: Duration,
        after: (u64, u64),
        mut exchange: Option<&mut Exchange>,
        rest: &mut Rest,
    ) -> Result<Vec<ToRead>, Fault> {
        let mut left: u64 = after.1 + reads.iter().map(|read| read.size).sum::<u64>();
        let mut files = after.0 + reads.len() as u64;
        let mut queue = reads.into_iter().peekable();
        while let Some(rank) = queue.peek().map(|read| read.rank) {
            let (mut batch, mut bytes, mut count) = (Vec::new(), 0, 0);
            let goes_with = |other| exchange.is_none() || other == rank;
            let room = self.volume.room().map_or(u64::MAX, Room::for_copies);
            let most = BATCH_BYTES.min(room);
            while let Some(read) =
                queue.next_if(|read| goes_with(read.rank) && (batch.is_empty() || bytes + read.size <= most))
            {
                bytes += read.size;
                count += 1;
                if let Some(why) = self.failing.get(&read.path).filter(|_| self.leaves_out_failing) {
                    self.fails(&read.path, why.clone(), Holds::Everything, rest);
                } else if rest.so_far.lets_wait(read.rank, read.after.as_ref()) {
                    rest.follows(read.path);
                } else {
                    batch.push(read);
                }
                if batch.len() == BATCH_FILES {
                    break;
                }
            }
            if !batch.is_empty() {
                self.batch(batch, room, exchange.as_deref_mut(), rest)?;
                self.keep_short()?;
            }
            (left, files) = (left.saturating_sub(bytes), files.saturating_sub(count));
            (self.progress)(files, left);
            if uptime() >= until {
                break;
            }
        }
        Ok(queue.collect())
    }

    fn batch(
        &mut self,
        mut batch: Vec<ToRead>,
        room: u64,
        exchange: Option<&mut Exchange>,
        rest: &mut Rest,
    ) -> Result<(), Fault> {
        if let Some(exchange) = &exchange {
            batch = exchange.allowed(batch, self.index, rest)?;
        }
        let volume = self.volume;
        let mut numbered = Vec::new();
        for (number, read) in batch.into_iter().enumerate() {
            let was = match &read.was {
                Some(row) if row.entry.is_database() => Before::Database(self.index.handle(&read.path)?),
                _ => Before::AnyFile,
            };
            numbered.push((number, read, was));
        }
        let looked = volume::now_ns();
        let is_written_out = numbered.len() > disk::ONE_BY_ONE;
        if is_written_out {
            disk::write_out_everything(volume)?;
        }
        let since = is_written_out.then_some(looked);
        let staged = parallel::each_apart(numbered, STAGERS, |(number, read, was)| {
            let name = format!("push-{number}");
            let is_lower = read.was.as_ref().is_some_and(|row| row.lower || row.bad.is_some());
            let built_on = is_lower && below::is_built_on(volume, &read.path);
            let outcome = stage::stage(volume, &read.path, read.database, &was, room, since, name);
            (read, outcome, built_on)
        });
        self.settle_copied(&staged)?;
        let mut unchecked = self.check_below(&staged);
        let top = File::open(&volume.upper)?;
        let (mut to_send, mut lines) = (Vec::new(), Vec::new());
        let mut known: Vec<(Path, Known)> = Vec::new();
        for (read, outcome, _) in staged {
            // The object is all that tells what that was: it stays until it has been looked at.
            let outcome = match unchecked.remove(&read.path) {
                Some(Err(fault)) => Err(fault),
                Some(Ok(Err(why))) => {
                    self.index.taint(&read.path, &below::built_on(&why))?;
                    outcome
                }
                Some(Ok(Ok(()))) | None => outcome,
            };
            let passed = match &outcome {
                Ok(Outcome::Ready(staged)) => self.passed_since(&read, staged)?,
                _ => None,
            };
            let ToRead { path, database, was, rank, after, handle, .. } = read;
            let settled = was.as_ref().is_some_and(|row| !row.promised);
            let held = match (settled, database) {
                (true, _) => Holds::Nothing,
                (false, true) => Holds::Databases,
                (false, false) => Holds::Everything,
            };
            match outcome {
                Ok(Outcome::Ready(staged)) => {
                    // Another has its name now, and it lives on under one that the scan may have passed.
                    let seen = handle.filter(|seen| staged.known.handle.as_ref() != Some(seen));
                    rest.so_far.moved.extend(seen.filter(|seen| seen.fate(&top) != Fate::Gone));
                    rest.young.extend(staged.young.then(|| path.clone()));
                    rest.remarks.extend(staged.remark.map(|remark| (path.clone(), remark)));
                    let same = is_same(was.as_deref(), &staged.entry);
                    if same {
                        known.push((path.clone(), staged.known));
                        lines.extend(
                            changed(was.as_deref(), &staged.entry)
                                .then_some(Line { path, word: Word::Is(staged.entry) }),
                        );
                    } else if let Some(now_at) = passed {
                        rest.is_passed(path, now_at);
                    } else {
                        to_send.push(ToSend { staged, rank, after });
                    }
                }
                Ok(Outcome::Vanished) | Err(Fault::Missing) => {
                    rest.vanishes(path, handle, held, self.insists);
                }
                Ok(Outcome::Later(why)) => self.waits(path, why, held, rest),
                Ok(Outcome::Damaged(why)) => rest.damaged.push((path, why)),
                Err(fault) => self.waits(path, fault.to_string(), held, rest),
            }
        }
        let sent = self.send(to_send, rest)?;
        for Sent { path, entry, known: sign } in sent {
            known.push((path.clone(), sign));
            lines.push(Line { path, word: Word::Is(entry) });
        }
        let removals = match exchange {
            Some(exchange) => {
                let removals = exchange.with_what_goes(&mut lines, &mut known, self.index, rest)?;
                disk::settle(self.volume, self.index, &lines)?;
                removals
            }
            None => 0,
        };
        self.write(&lines)?;
        rest.removals = rest.removals.saturating_sub(removals);
        self.index.set_known(&known)
    }

    /// What files began as that were written to before they were fetched, and that are to be sent. Who
    /// is large is left to the hydrator, and waits: this loop has others to send.
    fn check_below(
        &self,
        staged: &[(ToRead, Result<Outcome, Fault>, bool)],
    ) -> HashMap<Path, Result<Verdict, Fault>> {
        let mut verdicts = HashMap::new();
        let mut to_check = Vec::new();
        for (read, outcome, _) in staged.iter().filter(|(.., built_on)| *built_on) {
            let (Ok(Outcome::Ready(now)), Some(row)) = (outcome, &read.was) else { continue };
            if let Some(why) = &row.bad {
                verdicts.insert(read.path.clone(), Ok(Err(why.clone())));
            } else if row.unsure || is_same(Some(row), &now.entry) {
                // Either it was checked before that upload was begun, or it is what it should be.
            } else if row.entry.size() > CHECKED_HERE {
                let why = "what it was in the bucket is large, and checked first";
                verdicts.insert(read.path.clone(), Err(Fault::other(why)));
            } else {
                to_check.push((read.path.clone(), row.entry.clone()));
            }
        }
        let failed = AtomicUsize::new(0);
        let checked = parallel::each_apart(to_check, UPLOADERS, |(path, entry)| {
            // A mount that gives nothing is not asked for each.
            let asks = failed.load(Ordering::Relaxed) < UPLOADERS;
            let verdict = asks.then(|| below::check(&path, &entry)).and_then(|verdict| {
                let note = |_: &Fault| _ = failed.fetch_add(1, Ordering::Relaxed);
                verdict.inspect_err(note).ok()
            });
            (path, entry, verdict)
        });
        let mut outage: Option<Fault> = None;
        for (path, entry, verdict) in checked {
            let verdict = match (verdict, &outage) {
                (Some(verdict), _) => Ok(verdict),
                (None, Some(fault)) => Err(fault.clone()),
                (None, None) => below::check_object(self.bucket, self.volume, &path, &entry),
            };
            if let Err(fault) = &verdict {
                outage = Some(fault.clone()).filter(Fault::is_outage);
            }
            verdicts.insert(path, verdict);
        }
        verdicts
    }

    /// Where the file that the bucket has under this name has gone since it was seen:
    /// the one that is there now would take the name of what lives on.
    fn passed_since(&self, read: &ToRead, staged: &Staged) -> Result<Option<Path>, Fault> {
        if self.insists || read.replaces().is_none() || staged.known.handle == read.handle {
            return Ok(None);
        }
        order::lives_on(&read.path, self.volume, self.index, &self.bucket.prefix)
    }

    /// The volume must not be behind the bucket: what is about to be told of these copies, or is known of
    /// them from now on, is on the disk first.
    fn settle_copied(&self, staged: &[(ToRead, Result<Outcome, Fault>, bool)]) -> Result<(), Fault> {
        let of = |(_, outcome, _): &(ToRead, Result<Outcome, Fault>, bool)| match outcome {
            Ok(Outcome::Ready(now)) => {
                Some(Line { path: now.path.clone(), word: Word::Is(now.entry.clone()) })
            }
            _ => None,
        };
        let lines: Vec<Line> = staged.iter().filter_map(of).collect();
        disk::settle(self.volume, self.index, &lines)
    }

    /// It could not be had or sent. What has failed before does not hold up what is not it.
    fn waits(&self, path: Path, why: String, holds: Holds, rest: &mut Rest) {
        let again = holds == Holds::Everything && self.failing.contains_key(&path);
        rest.so_far.holds_strangers |= again;
        rest.wait(path, why, if again { Holds::Nothing } else { holds });
    }

    /// The same, of what others wait for.
    fn fails(&self, path: &Path, why: String, holds: Holds, rest: &mut Rest) {
        rest.so_far.unsent.insert(path.clone());
        self.waits(path.clone(), why, holds, rest);
    }

    /// Intents, then the objects, each rank when the one below it has arrived: what a crash leaves is
    /// in the intents. Yields those that have arrived.
    fn send(&mut self, to_send: Vec<ToSend>, rest: &mut Rest) -> Result<Vec<Sent>, Fault> {
        let moving = rest.so_far.moving;
        let (mut to_send, waiting): (Vec<_>, Vec<_>) =
            to_send.into_iter().partition(|one| one.rank == 0 || !moving);
        for one in waiting {
            rest.follows(one.staged.path);
        }
        if to_send.is_empty() {
            return Ok(Vec::new());
        }
        let intent = |s: &Staged| Line { path: s.path.clone(), word: Word::WillBe(s.entry.clone()) };
        let intents: Vec<Line> = to_send.iter().map(|one| intent(&one.staged)).collect();
        self.write(&intents)?;
        to_send.sort_by_key(|one| one.rank);
        // Of a bucket that does not answer nothing more is asked: each would wait as long as the first.
        let silent = OnceLock::new();
        let (mut done, mut fault) = (Vec::new(), None);
        let mut queue = to_send.into_iter().peekable();
        while let Some(rank) = queue.peek().map(|one| one.rank) {
            let mut now = Vec::new();
            while let Some(ToSend { staged, after, .. }) = queue.next_if(|one| one.rank == rank) {
                if rest.so_far.lets_wait(rank, after.as_ref()) {
                    rest.follows(staged.path);
                } else {
                    now.push(staged);
                }
            }
            for (sent, outcome) in self.upload(now, &silent) {
                match outcome {
                    Ok(()) => done.push(sent),
                    Err(why) => {
                        self.fails(&sent.path, why.to_string(), Holds::Everything, rest);
                        fault = Some(why);
                    }
                }
            }
        }
        // The entries of what did arrive are written all the same, and what one object is refused for
        // holds up no other.
        match fault {
            Some(fault) if done.is_empty() && fault.concerns_all() => Err(fault),
            _ => Ok(done),
        }
    }

    fn upload(&self, now: Vec<Staged>, silent: &OnceLock<Fault>) -> Vec<(Sent, Result<(), Fault>)> {
        let (bucket, lease, staging) = (self.bucket, self.lease, self.volume.staging());
        // One has been told "slower" again and again: the others need not be.
        let overrun = AtomicBool::new(false);
        // What it may have to wait for must not lie between the lease's word and a write.
        bucket.rclone.make_ready();
        parallel::each(now, UPLOADERS, |staged| {
            let Staged { path, entry, known, copy, .. } = staged;
            let sent = Sent { path, entry, known };
            if let Some(fault) = silent.get().cloned() {
                return (sent, Err(fault));
            }
            // Asked for each: between two of them this machine may have slept, and been succeeded.
            let upload = || {
                lease
                    .confirm(bucket)
                    .and_then(|()| bucket.rclone.upload(&staging, copy.name(), &sent.path.object()))
            };
            let mut outcome = upload();
            for pause in SLOWER {
                if !matches!(outcome, Err(Fault::Busy(_))) || overrun.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(pause);
                outcome = upload();
            }
            if matches!(outcome, Err(Fault::Busy(_))) {
                overrun.store(true, Ordering::Relaxed);
            }
            if let Err(fault @ Fault::Unreachable(_)) = &outcome {
                let _ = silent.set(fault.clone());
            }
            (sent, outcome)
        })
    }

    fn metas(&mut self, metas: &[Line]) -> Result<(), Fault> {
        metas.chunks(LINES).try_for_each(|lines| {
            disk::settle(self.volume, self.index, lines)?;
            self.write(lines)
        })
    }

    fn may_go(&self, mut gone: Vec<Path>, so_far: &SoFar) -> Result<Vec<Path>, Fault> {
        if so_far.holds == Holds::Everything {
            return Ok(Vec::new());
        }
        if so_far.holds == Holds::Databases {
            let mut others = Vec::new();
            for path in gone {
                if !self.index.get(&path)?.is_some_and(|row| row.entry.is_database()) {
                    others.push(path);
                }
            }
            gone = others;
        }
        if so_far.holds_strangers {
            gone = not_strange(gone, self.volume, self.index)?;
        }
        Ok(gone)
    }

    /// Deletes objects whose paths are gone.
    pub(crate) fn bury(&mut self) -> Result<(), Fault> {
        loop {
            let tombs = self.index.tombs(LINES)?;
            if tombs.is_empty() {
                return Ok(());
            }
            self.bucket.rclone.make_ready();
            self.lease.confirm(self.bucket)?;
            let (bucket, lease) = (self.bucket, self.lease);
            let buried = parallel::each(tombs, UPLOADERS, |path| {
                let deleted = lease.confirm(bucket).and_then(|()| bucket.rclone.delete(&path.object()));
                (path, deleted)
            });
            let mut fault = None;
            let mut lines = Vec::new();
            for (path, deleted) in buried {
                match deleted {
                    Ok(()) => {
                        let instead = self.index.get(&path)?;
                        lines.push(Line { path: path.clone(), word: Word::Deleted });
                        // The object is gone; the directory or link in its place is not.
                        lines.extend(instead.map(|row| Line { path, word: Word::Is(row.entry) }));
                    }
                    Err(why) => fault = Some(why),
                }
            }
            self.write(&lines)?;
            if let Some(fault) = fault {
                return Err(fault);
            }
        }
    }

    fn merge(&mut self) -> Result<(), Fault> {
        self.lease.confirm_just_now(self.bucket)?;
        self.chain.merge(self.bucket, self.index, self.lease.epoch())
    }

    /// Into the manifest, and then into the index.
    fn write(&mut self, lines: &[Line]) -> Result<(), Fault> {
        if lines.is_empty() {
            return Ok(());
        }
        self.lease.confirm_just_now(self.bucket)?;
        self.chain.append(self.bucket, self.index, self.lease.epoch(), lines)
    }
}

/// A file whose object has arrived, or may have.
struct Sent {
    path: Path,
    entry: Entry,
    known: Known,
}

/// Those of which can be told what has become of them: of others, what could not be sent may be all there is.
fn not_strange(gone: Vec<Path>, volume: &Volume, index: &Index) -> Result<Vec<Path>, Fault> {
    let top = File::open(&volume.upper)?;
    let mut known = Vec::new();
    for path in gone {
        let is_file = index.get(&path)?.is_some_and(|row| row.entry.is_file());
        let has_fate = |handle: &Handle| handle.fate(&top) != Fate::Unknown;
        if !is_file || index.handle(&path)?.as_ref().is_some_and(has_fate) {
            known.push(path);
        }
    }
    Ok(known)
}

/// A copy, and what has to arrive before it.
struct ToSend {
    staged: Staged,
    rank: usize,
    after: Option<Path>,
}

/// Whether the bucket has its content.
fn is_same(was: Option<&Row>, now: &Entry) -> bool {
    was.is_some_and(|row| !row.unsure && row.bad.is_none() && row.entry.same_content(now))
}

fn changed(was: Option<&Row>, now: &Entry) -> bool {
    was.is_none_or(|row| {
        let mut old = row.entry.clone();
        if old.is_database() {
            old.mtime_ns = now.mtime_ns;
        }
        old != *now
    })
}

fn removals_in(lines: &[Line]) -> u64 {
    lines.iter().filter(|line| line.word == Word::Gone).count() as u64
}

/// What a step of a round comes to.
enum Left {
    /// Its end. What is for the next step is still to be done.
    Nothing(Work),
    /// The end of its time.
    Some(Work),
}

#[cfg(test)]
mod tests;
