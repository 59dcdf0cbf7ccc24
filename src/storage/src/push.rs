//! One round of pushing: from what a scan found to a bucket that has it.
//!
//! ```text
//! for each batch:  copies and hashes -> intents into the manifest -> objects -> entries into the manifest
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
//! Refuses to write when the lease does not confirm it. May import: `bucket`, `chain`, `entry`,
//! `fault`, `index`, `manifest`, `order`, `owner`, `parallel`, `rules`, `scan`, `stage`, `volume`, `way`.

use crate::bucket::Bucket;
use crate::chain::Chain;
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::index::{Index, Known, Row};
use crate::manifest::{Line, Word};
use crate::order::{self, Passed, ToRead, Unread};
use crate::owner::{Lease, uptime};
use crate::parallel;
use crate::rules;
use crate::scan::Change;
use crate::stage::{self, Before, Outcome, Staged};
use crate::volume::{self, Room, Volume};
use crate::way::Way;
use cvm_process::handle::{Fate, Handle};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::sync::OnceLock;
use std::time::Duration;

/// A batch is as large as a loss of half its work is cheap.
const BATCH_FILES: usize = 400;
const BATCH_BYTES: u64 = 128 << 20;
/// Copies made at once: the disk's and the processor's business.
const STAGERS: usize = 2;
/// Uploads at once: the latency's business.
const UPLOADERS: usize = 16;
/// So many files are made durable one by one; more of them with the whole volume.
const SYNCED_ALONE: usize = 16;
/// Lines in one segment of removals and changes of metadata.
const LINES: usize = 5000;

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

/// What a round, or what is left of it, has to do.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// In their order.
    reads: Vec<ToRead>,
    passed: Vec<Passed>,
    /// Directories that were links: what is new below them comes after.
    opening: Vec<Line>,
    metas: Vec<Line>,
    /// Those of them that take the place of something else.
    instead: Vec<Line>,
    gone: Vec<Path>,
    /// Of the slices before.
    so_far: SoFar,
}

impl Work {
    pub(crate) fn of(
        changes: Vec<Change>,
        volume: &Volume,
        index: &Index,
        prefix: &str,
    ) -> Result<Self, Fault> {
        let mut this = Self::default();
        let size = |path: &Path| {
            let stat = volume::look(&path.below(&volume.upper)).ok().flatten();
            stat.map_or(0, |s| crate::scan::size_of(&s))
        };
        let mut metas = Vec::new();
        for change in changes {
            match change {
                Change::Read { path, database, was } => {
                    let handle = crate::scan::handle_of(&path.below(&volume.upper));
                    let (size, rank, after, late) = (size(&path), 0, None, false);
                    this.reads.push(ToRead { path, database, was, size, rank, after, late, handle });
                }
                Change::Meta { path, entry } => metas.push((path, entry)),
                Change::Gone { path } => this.gone.push(path),
            }
        }
        // A directory and the one above it may both have said so.
        this.gone.sort();
        this.gone.dedup();
        this.passed = order::order(&mut this.reads, volume, index, prefix)?;
        this.find_room(metas, index)?;
        Ok(this)
    }

    /// Sets apart what something else stands in the way of.
    fn find_room(&mut self, mut metas: Vec<(Path, Entry)>, index: &Index) -> Result<(), Fault> {
        let mut way = Way::new(index);
        // Those above come first.
        metas.sort_by(|(one, _), (other, _)| one.cmp(other));
        for (path, entry) in metas {
            let row = index.get(&path)?;
            let was_link = row.as_ref().is_some_and(|row| matches!(row.entry.kind, Kind::Symlink { .. }));
            let opens = was_link && entry.kind == Kind::Directory;
            let is_free = way.of(&path, row.as_ref(), &entry.kind)?.is_empty();
            let line = Line { path: path.clone(), word: Word::Is(entry) };
            match (is_free, opens) {
                (true, true) => {
                    way.open(path);
                    self.opening.push(line);
                }
                (true, false) => self.metas.push(line),
                (false, _) => self.instead.push(line),
            }
        }
        for read in &mut self.reads {
            read.late = !way.of_file(&read.path, read.was.as_deref())?.is_empty();
        }
        // What follows them follows them here too.
        let first = self.reads.iter().filter(|read| read.late).map(|read| read.rank).min();
        for read in &mut self.reads {
            read.late |= first.is_some_and(|first| read.rank > first);
        }
        Ok(())
    }

    /// What waits for nothing, of these files.
    pub(crate) fn urgent(&mut self, is_one: impl Fn(&Path) -> bool) -> Self {
        let passed: HashSet<&Path> = self.passed.iter().map(|passed| &passed.path).collect();
        let is_urgent = |read: &ToRead| {
            is_one(&read.path) && read.rank == 0 && !read.late && !passed.contains(&read.path)
        };
        let (reads, others) = std::mem::take(&mut self.reads).into_iter().partition(is_urgent);
        self.reads = others;
        Self { reads, ..Self::default() }
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.reads.iter().map(|read| &read.path)
    }

    /// What is newer than we are is known of these.
    pub(crate) fn forget(&mut self, newer: &Self) {
        let paths: HashSet<&Path> = newer.files().collect();
        if !paths.is_empty() {
            self.reads.retain(|read| !paths.contains(&read.path));
            for lines in [&mut self.opening, &mut self.metas, &mut self.instead] {
                lines.retain(|line| !paths.contains(&line.path));
            }
            self.gone.retain(|path| !paths.contains(path));
        }
    }

    fn leave_out(&mut self, path: &Path) -> bool {
        let before = self.reads.len();
        self.reads.retain(|read| read.path != *path);
        self.reads.len() < before
    }
}

/// What the beginning of a round means for the rest of it.
#[derive(Debug, Clone, Default)]
struct SoFar {
    moving: bool,
    /// What may have been moved to a name that the bucket does not have yet.
    holds: Holds,
    /// What has failed again and again may have been too: what is known by its handle is not it.
    holds_strangers: bool,
    /// What could not be sent, and what waits for it.
    unsent: HashSet<Path>,
}

impl SoFar {
    /// For what has to arrive before it.
    fn lets_wait(&self, rank: usize, after: Option<&Path>) -> bool {
        // What has its name now may be any of those.
        let misses = || after.map_or(!self.unsent.is_empty(), |after| self.unsent.contains(after));
        rank > 0 && (self.moving || misses())
    }
}

/// What a round could not do.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    /// What this slice did not come to; removals are among it.
    pub(crate) left: Option<Work>,
    /// To be tried again soon.
    pub(crate) later: Vec<(Path, String)>,
    /// Not before somebody mends it.
    pub(crate) damaged: Vec<(Path, String)>,
    pub(crate) fault: Option<Fault>,
    /// Removals that were put off.
    pub(crate) removals: u64,
    /// Names of old that stay, because their files have ones now that cannot be in the bucket.
    pub(crate) stays: HashSet<Path>,
    /// To be looked at once more, for their times are too fresh to tell one change from the next.
    pub(crate) young: Vec<Path>,
    /// Files that were not where the scan looked, by their old names and by those of now: both have
    /// to be looked at again.
    pub(crate) elsewhere: Vec<Path>,
    /// What waits for removals that had to wait.
    pub(crate) blocked: Vec<Path>,
    so_far: SoFar,
}

/// Which removals have to wait for what is still to come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Holds {
    #[default]
    Nothing,
    /// A new database is locked, as one may be for ever.
    Databases,
    Everything,
}

impl Rest {
    /// Something new vanished before it could be read: it may have moved on to another name, and
    /// what is gone may be it under an older one.
    pub(crate) fn moving(&self) -> bool {
        self.so_far.moving
    }

    fn moves(&mut self, holds: Holds, insists: bool) {
        if holds != Holds::Nothing && !insists {
            self.so_far.moving = true;
            self.so_far.holds = Holds::Everything;
        }
    }

    /// It counts as a removal that is put off: when that is over, so is this.
    fn block(&mut self, path: &Path) {
        self.removals += 1;
        self.blocked.push(path.clone());
    }

    fn wait(&mut self, path: Path, why: String, holds: Holds) {
        self.later.push((path, why));
        self.so_far.holds = self.so_far.holds.max(holds);
    }

    /// So does what comes after it.
    fn follows(&mut self, path: Path) {
        self.so_far.unsent.insert(path.clone());
        self.waits_for_its_name(path);
    }

    fn waits_for_its_name(&mut self, path: Path) {
        let why = "the bucket does not have what was here before under its new name yet";
        self.wait(path, why.to_owned(), Holds::Nothing);
    }

    /// What had the name is at another that no scan has met.
    fn is_passed(&mut self, path: Path, now_at: Path) {
        self.so_far.moving = true;
        self.elsewhere.extend([now_at, path.clone()]);
        self.waits_for_its_name(path);
    }
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
        for Passed { path, now_at } in std::mem::take(&mut work.passed) {
            if !self.insists && work.leave_out(&path) {
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
        let staged = parallel::each_apart(numbered, STAGERS, |(number, read, was)| {
            let name = format!("push-{number}");
            let outcome = stage::stage(volume, &read.path, read.database, &was, room, name);
            (read, outcome)
        });
        let (mut to_send, mut lines) = (Vec::new(), Vec::new());
        let mut known: Vec<(Path, Known)> = Vec::new();
        for (read, outcome) in staged {
            let passed = match &outcome {
                Ok(Outcome::Ready(staged)) => self.passed_since(&read, staged)?,
                _ => None,
            };
            let ToRead { path, database, was, rank, after, .. } = read;
            let settled = was.as_ref().is_some_and(|row| !row.promised);
            let held = match (settled, database) {
                (true, _) => Holds::Nothing,
                (false, true) => Holds::Databases,
                (false, false) => Holds::Everything,
            };
            match outcome {
                Ok(Outcome::Ready(staged)) => {
                    rest.young.extend(staged.young.then(|| path.clone()));
                    let same = was.as_ref().is_some_and(|row| {
                        !row.unsure && row.bad.is_none() && row.entry.same_content(&staged.entry)
                    });
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
                Ok(Outcome::Vanished) => rest.moves(held, self.insists),
                Ok(Outcome::Later(why)) => self.waits(path, why, held, rest),
                Ok(Outcome::Damaged(why)) => rest.damaged.push((path, why)),
                Err(Fault::Missing) => rest.moves(held, self.insists),
                Err(fault) => self.waits(path, fault.to_string(), held, rest),
            }
        }
        let sent = self.send(to_send, rest)?;
        for Sent { path, entry, known: sign } in sent {
            known.push((path.clone(), sign));
            lines.push(Line { path, word: Word::Is(entry) });
        }
        self.settle_on_disk(&lines)?;
        let removals = match exchange {
            Some(exchange) => exchange.with_what_goes(&mut lines, &mut known, self.index, rest)?,
            None => 0,
        };
        self.write(&lines)?;
        rest.removals = rest.removals.saturating_sub(removals);
        self.index.set_known(&known)
    }

    /// Where the file that the bucket has under this name has gone since its place in the order was
    /// found: the one that is there now would take the name of what lives on.
    fn passed_since(&self, read: &ToRead, staged: &Staged) -> Result<Option<Path>, Fault> {
        if self.insists || read.replaces().is_none() || staged.known.handle == read.handle {
            return Ok(None);
        }
        order::lives_on(&read.path, self.volume, self.index, &self.bucket.prefix)
    }

    /// The volume must not be behind the bucket: after a loss of power what it lacks would be taken
    /// for removed, and go from the bucket too.
    fn settle_on_disk(&self, lines: &[Line]) -> Result<(), Fault> {
        if lines.len() > SYNCED_ALONE {
            return Ok(nix::unistd::syncfs(File::open(&self.volume.upper)?)?);
        }
        for line in lines {
            // What is gone or replaced meanwhile is the next scan's.
            if let Ok(file) = volume::open_below(&self.volume.upper, &line.path) {
                file.sync_all()?;
            }
        }
        Ok(())
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
        parallel::each(now, UPLOADERS, |staged| {
            let Staged { path, entry, known, copy, .. } = staged;
            let sent = Sent { path, entry, known };
            if let Some(fault) = silent.get().cloned() {
                return (sent, Err(fault));
            }
            // Asked for each: between two of them this machine may have slept, and been succeeded.
            let outcome = lease
                .confirm(bucket)
                .and_then(|()| bucket.rclone.upload(&staging, copy.name(), &sent.path.object()));
            if let Err(fault @ Fault::Unreachable(_)) = &outcome {
                let _ = silent.set(fault.clone());
            }
            (sent, outcome)
        })
    }

    fn metas(&mut self, metas: &[Line]) -> Result<(), Fault> {
        metas.chunks(LINES).try_for_each(|lines| self.write(lines))
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
        self.lease.confirm(self.bucket)?;
        self.chain.merge(self.bucket, self.index, self.lease.epoch())
    }

    /// Into the manifest, and then into the index.
    fn write(&mut self, lines: &[Line]) -> Result<(), Fault> {
        if lines.is_empty() {
            return Ok(());
        }
        self.lease.confirm(self.bucket)?;
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

/// What goes so that something else has room.
#[derive(Default)]
struct Exchange {
    /// What may go. A file that is nowhere but in what takes its place may only go with that.
    going: HashMap<Path, Option<Path>>,
    /// Directories and links that come.
    instead: BTreeMap<Path, Line>,
    arrived: HashSet<Path>,
    gone: HashSet<Path>,
}

impl Exchange {
    fn may_go(&self, row: &Path, also: &HashSet<Path>) -> bool {
        match self.going.get(row) {
            None => false,
            Some(None) => true,
            Some(Some(with)) => also.contains(with) || self.arrived.contains(with),
        }
    }

    /// Those that have room, if all of them arrive.
    fn allowed(&self, batch: Vec<ToRead>, index: &Index, rest: &mut Rest) -> Result<Vec<ToRead>, Fault> {
        let (way, paths) = (Way::new(index), batch.iter().map(|read| read.path.clone()).collect());
        let mut allowed = Vec::new();
        for read in batch {
            let in_the_way = way.of_file(&read.path, index.get(&read.path)?.as_ref())?;
            if in_the_way.iter().all(|row| self.may_go(row, &paths)) {
                allowed.push(read);
            } else {
                rest.block(&read.path);
            }
        }
        Ok(allowed)
    }

    /// Puts removals before the lines that need them, and leaves those out that have no room after
    /// all. Yields how many removals these are.
    fn with_what_goes(
        &mut self,
        lines: &mut Vec<Line>,
        known: &mut Vec<(Path, Known)>,
        index: &Index,
        rest: &mut Rest,
    ) -> Result<u64, Fault> {
        let way = Way::new(index);
        let arrived: HashSet<Path> = known.iter().map(|(path, _)| path.clone()).collect();
        let (mut before, mut blocked) = (Vec::new(), HashSet::new());
        for (path, _) in &*known {
            let in_the_way = way.of_file(path, index.get(path)?.as_ref())?;
            if !in_the_way.iter().all(|row| self.may_go(row, &arrived)) {
                rest.block(path);
                blocked.insert(path.clone());
                continue;
            }
            for row in in_the_way {
                if self.gone.insert(row.clone()) {
                    before.push(Line { path: row, word: Word::Gone });
                }
            }
            let mut above = path.parent();
            while let Some(dir) = above {
                above = dir.parent();
                before.extend(self.instead.remove(&dir));
            }
        }
        self.arrived.extend(arrived.into_iter().filter(|path| !blocked.contains(path)));
        known.retain(|(path, _)| !blocked.contains(path));
        lines.retain(|line| !blocked.contains(&line.path));
        // All that goes, and then what comes, those above first.
        before.sort_by(|one, other| {
            (one.word != Word::Gone, &one.path).cmp(&(other.word != Word::Gone, &other.path))
        });
        let removals = removals_in(&before);
        before.append(lines);
        *lines = before;
        Ok(removals)
    }
}

/// A scan may miss what is renamed without end, under every name it ever has. But a file that the
/// bucket holds under a name of old is known by its handle: as long as it lives, and the bucket has
/// it under no other name that stays, the old one stays.
struct Living<'a> {
    volume: &'a Volume,
    index: &'a Index,
    prefix: &'a str,
}

impl Living<'_> {
    /// What may go, and what has to arrive before: one of `late`, which takes its place. Noted are old
    /// and present names of what may not go, if they can be looked at.
    fn left_out(
        &self,
        gone: &[Path],
        instead: &BTreeMap<Path, Line>,
        late: &HashSet<Path>,
        rest: &mut Rest,
    ) -> Result<HashMap<Path, Option<Path>>, Fault> {
        let top = File::open(&self.volume.upper)?;
        let leaving: HashSet<&Path> = gone.iter().collect();
        let (mut kept, mut nameless, mut going) = (HashSet::new(), HashSet::new(), HashMap::new());
        for path in gone {
            let Some(handle) = self.index.handle(path)? else { continue };
            let Fate::Lives(name) = handle.fate(&top) else { continue };
            let here = self.volume.path_of(&name);
            let has_another = || -> Result<bool, Fault> {
                Ok(self.index.settled_as(&handle)?.iter().any(|other| !leaving.contains(other)))
            };
            if here.as_ref().is_some_and(rules::may_stay_out) || has_another()? {
                continue;
            }
            let takes_its_place =
                |here: &Path| here.starts_with(path.as_bytes()) || path.starts_with(here.as_bytes());
            if let Some(here) = here.as_ref().filter(|here| late.contains(here) && takes_its_place(here)) {
                going.insert(path.clone(), Some(here.clone()));
                continue;
            }
            // A name that the bucket cannot have is not asked for again at once.
            let too_long = here.as_ref().is_some_and(|here| rules::too_long(self.prefix, here).is_some());
            if too_long && instead.contains_key(path) {
                continue;
            }
            let here = here.filter(|_| !too_long);
            rest.elsewhere.extend(here.map(|here| [here, path.clone()]).into_iter().flatten());
            if too_long { &mut nameless } else { &mut kept }.insert(path);
        }
        // The directories of what stays, stay.
        let stay = |files: &HashSet<&Path>, path: &Path| {
            files.contains(path) || files.iter().any(|file| file.starts_with(path.as_bytes()))
        };
        for path in gone.iter().filter(|path| !stay(&kept, path)) {
            if stay(&nameless, path) {
                rest.stays.insert(path.clone());
            } else {
                going.entry(path.clone()).or_default();
            }
        }
        Ok(going)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::Digest;
    use crate::scan;
    use std::fs;

    struct Tree {
        dir: tempfile::TempDir,
        volume: Volume,
        index: Index,
    }

    fn path(text: &str) -> Path {
        Path::new(text.as_bytes()).unwrap()
    }

    impl Tree {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let volume = Volume::plain(dir.path()).unwrap();
            let index = Index::open(&volume.own.join("index")).unwrap();
            Self { dir, volume, index }
        }

        fn at(&self, name: &str) -> std::path::PathBuf {
            self.dir.path().join(name)
        }

        /// As if it had been pushed.
        fn has(&self, name: &str) {
            if !self.at(name).exists() {
                fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
                fs::write(self.at(name), name).unwrap();
            }
            let stat = volume::look(&self.at(name)).unwrap().unwrap();
            let kind = Kind::File { size: 1, sha: Some(Digest([0; 32])), database: false };
            let line = Line { path: path(name), word: Word::Is(scan::dressed(kind, &stat)) };
            self.index.apply(&[line], None).unwrap();
            self.index.set_known(&[(path(name), scan::known_by(&self.at(name), &stat, false))]).unwrap();
        }

        /// As if something that is no file had been pushed.
        fn is(&self, name: &str, kind: Kind) {
            let stat = volume::look(self.dir.path()).unwrap().unwrap();
            let line = Line { path: path(name), word: Word::Is(scan::dressed(kind, &stat)) };
            self.index.apply(&[line], None).unwrap();
        }

        fn work(&self) -> Work {
            self.work_but(&[])
        }

        /// As if the scan had not met these.
        fn work_but(&self, unmet: &[&str]) -> Work {
            let fetched = HashSet::new();
            let found = scan::Scanner::new(&self.volume, &self.index, "p", &fetched).full().unwrap();
            let mut changes = found.changes;
            changes.retain(|change| !unmet.iter().any(|name| *change.path() == path(name)));
            Work::of(changes, &self.volume, &self.index, "p").unwrap()
        }

        fn moves(&self, from: &str, to: &str) {
            fs::rename(self.at(from), self.at(to)).unwrap();
        }

        /// What a round that found nothing but these removals would remove, and look at again.
        fn removes(&self, gone: &[&str]) -> (Vec<String>, Vec<String>) {
            let living = Living { volume: &self.volume, index: &self.index, prefix: "p" };
            let mut rest = Rest::default();
            let gone: Vec<Path> = gone.iter().map(|name| path(name)).collect();
            let goes = living.left_out(&gone, &BTreeMap::new(), &HashSet::new(), &mut rest).unwrap();
            let mut goes: Vec<String> = goes.keys().map(ToString::to_string).collect();
            goes.sort();
            (goes, rest.elsewhere.iter().map(ToString::to_string).collect())
        }
    }

    fn nothing() -> (Vec<String>, Vec<String>) {
        (Vec::new(), Vec::new())
    }

    fn these(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_file_that_no_scan_has_met_on_its_way_keeps_its_old_name_until_it_is_settled() {
        let tree = Tree::new();
        tree.has("d/old");
        tree.moves("d/old", "new");
        assert_eq!(tree.removes(&["d", "d/old"]), (these(&[]), these(&["new", "d/old"])));
        tree.has("new");
        assert_eq!(tree.removes(&["d", "d/old"]), (these(&["d", "d/old"]), Vec::new()));
    }

    #[test]
    fn logs_that_are_rotated_go_up_before_others_take_their_names() {
        let tree = Tree::new();
        tree.has("log");
        tree.has("log.1");
        tree.moves("log.1", "log.2");
        tree.moves("log", "log.1");
        fs::write(tree.at("log"), "").unwrap();
        let work = tree.work();
        let files: Vec<String> = work.files().map(ToString::to_string).collect();
        assert_eq!(files, ["log.2", "log.1", "log"]);
        assert!(work.passed.is_empty());
        // The scan has not met the oldest: what takes its name waits for it.
        let work = tree.work_but(&["log.2"]);
        let passed: Vec<_> = work.passed.iter().map(|p| (p.path.to_string(), p.now_at.to_string())).collect();
        assert_eq!(passed, [("log.1".to_owned(), "log.2".to_owned())]);
    }

    #[test]
    fn what_cannot_be_sent_holds_up_what_comes_after_it_and_nothing_else() {
        let tree = Tree::new();
        for name in ["log", "log.1", "other", "other.1"] {
            tree.has(name);
        }
        for name in ["log", "other"] {
            tree.moves(&format!("{name}.1"), &format!("{name}.2"));
            tree.moves(name, &format!("{name}.1"));
            fs::write(tree.at(name), "").unwrap();
        }
        let work = tree.work();
        let so_far = SoFar { unsent: [path("log.2")].into(), ..SoFar::default() };
        let waits = work.reads.iter().filter(|read| so_far.lets_wait(read.rank, read.after.as_ref()));
        assert_eq!(waits.map(|read| read.path.to_string()).collect::<Vec<_>>(), ["log.1"]);
        // Of what comes after nobody knows what, and of what moves, it may be any.
        assert!(so_far.lets_wait(1, None) && !so_far.lets_wait(0, None));
        assert!(SoFar { moving: true, ..SoFar::default() }.lets_wait(1, Some(&path("other.2"))));
    }

    #[test]
    fn what_fails_again_and_again_keeps_only_what_it_may_be() {
        let tree = Tree::new();
        tree.has("known");
        tree.has("stranger");
        let unknown = Known {
            handle: None,
            ..scan::known_by(
                &tree.at("stranger"),
                &volume::look(&tree.at("stranger")).unwrap().unwrap(),
                false,
            )
        };
        tree.index.set_known(&[(path("stranger"), unknown)]).unwrap();
        tree.is("d", Kind::Directory);
        for name in ["known", "stranger"] {
            fs::remove_file(tree.at(name)).unwrap();
        }
        let gone = ["d", "known", "stranger"].map(path).to_vec();
        assert_eq!(not_strange(gone, &tree.volume, &tree.index).unwrap(), ["d", "known"].map(path));
    }

    #[test]
    fn a_file_whose_name_cannot_be_there_keeps_its_old_one_and_nothing_waits_for_it() {
        let tree = Tree::new();
        tree.has("d/old");
        tree.has("e/old");
        tree.has("e/moved");
        let long = ["n".repeat(250), "n".repeat(250), "n".repeat(250)].join("/");
        fs::create_dir_all(tree.at(&long)).unwrap();
        tree.moves("d/old", &format!("{long}/d"));
        tree.moves("e/old", &format!("{long}/e"));
        tree.moves("e/moved", "elsewhere");
        let living = Living { volume: &tree.volume, index: &tree.index, prefix: "p" };
        let mut rest = Rest::default();
        let gone = ["d", "d/old", "e", "e/moved", "e/old"].map(path);
        let goes = living.left_out(&gone, &BTreeMap::new(), &HashSet::new(), &mut rest).unwrap();
        assert_eq!((goes.len(), rest.stays.len()), (0, 3), "d, and both of old; what moved is on its way");
        assert_eq!(rest.elsewhere, ["elsewhere", "e/moved"].map(path));
    }

    #[test]
    fn what_was_removed_goes_and_what_was_written_over_goes_with_it() {
        let tree = Tree::new();
        tree.has("a");
        tree.has("b");
        fs::remove_file(tree.at("a")).unwrap();
        fs::write(tree.at("a.new"), "2").unwrap();
        tree.moves("a.new", "b");
        assert_eq!(tree.removes(&["a", "b"]), (these(&["a", "b"]), Vec::new()));
        assert_eq!(tree.removes(&[]), nothing());
    }

    #[test]
    fn what_has_no_room_yet_is_set_apart() {
        let tree = Tree::new();
        tree.has("d/x");
        tree.is("d", Kind::Directory);
        tree.has("e/x");
        tree.is("e", Kind::Directory);
        tree.has("f");
        tree.is("l", Kind::Symlink { target: b"d".to_vec() });
        for name in ["d", "e"] {
            fs::remove_dir_all(tree.at(name)).unwrap();
        }
        fs::remove_file(tree.at("f")).unwrap();
        fs::write(tree.at("d"), "a file now").unwrap();
        std::os::unix::fs::symlink("d", tree.at("e")).unwrap();
        for name in ["f", "l"] {
            fs::create_dir(tree.at(name)).unwrap();
            fs::write(tree.at(name).join("in"), "1").unwrap();
        }
        let work = tree.work();
        let reads = |late: bool| -> Vec<String> {
            let reads = work.reads.iter().filter(|read| read.late == late);
            let mut names: Vec<_> = reads.map(|read| read.path.to_string()).collect();
            names.sort();
            names
        };
        let names = |lines: &[Line]| lines.iter().map(|line| line.path.to_string()).collect::<Vec<_>>();
        assert_eq!((reads(true), reads(false)), (these(&["d", "f/in"]), these(&["l/in"])));
        assert_eq!((names(&work.instead), names(&work.opening)), (these(&["e", "f"]), these(&["l"])));
        assert_eq!(work.gone, [path("d/x"), path("e/x"), path("f")]);
        let mut work = work;
        let urgent = work.urgent(|_| true);
        assert_eq!(urgent.files().collect::<Vec<_>>(), [&path("l/in")]);
    }

    #[test]
    fn a_file_that_takes_the_place_of_its_own_directory_goes_up_with_its_removal() {
        let tree = Tree::new();
        tree.has("d/x");
        tree.is("d", Kind::Directory);
        tree.moves("d/x", "t");
        fs::remove_dir(tree.at("d")).unwrap();
        tree.moves("t", "d");
        let work = tree.work();
        let late: HashSet<Path> = [path("d")].into();
        let living = Living { volume: &tree.volume, index: &tree.index, prefix: "p" };
        let mut rest = Rest::default();
        let going = living.left_out(&work.gone, &BTreeMap::new(), &late, &mut rest).unwrap();
        assert_eq!(going, [(path("d/x"), Some(path("d")))].into());
        let mut exchange = Exchange { going, ..Exchange::default() };
        let allowed = exchange.allowed(work.reads, &tree.index, &mut rest).unwrap();
        assert_eq!((allowed.len(), rest.blocked.len()), (1, 0));
        // One that has not arrived takes nothing with it.
        let (mut lines, mut known) = (Vec::new(), Vec::new());
        assert_eq!(exchange.with_what_goes(&mut lines, &mut known, &tree.index, &mut rest).unwrap(), 0);
        let stat = volume::look(&tree.at("d")).unwrap().unwrap();
        known.push((path("d"), scan::known_by(&tree.at("d"), &stat, false)));
        assert_eq!(exchange.with_what_goes(&mut lines, &mut known, &tree.index, &mut rest).unwrap(), 1);
        assert_eq!(lines, [Line { path: path("d/x"), word: Word::Gone }]);
    }

    #[test]
    fn a_link_in_place_of_a_file_waits_while_the_file_lives_on_unseen() {
        let tree = Tree::new();
        tree.has("a");
        tree.moves("a", "b");
        std::os::unix::fs::symlink("b", tree.at("a")).unwrap();
        let entry = scan::dressed(
            Kind::Symlink { target: b"b".to_vec() },
            &volume::look(&tree.at("a")).unwrap().unwrap(),
        );
        let instead: BTreeMap<Path, Line> =
            [(path("a"), Line { path: path("a"), word: Word::Is(entry) })].into();
        let living = Living { volume: &tree.volume, index: &tree.index, prefix: "p" };
        let goes = || {
            let mut rest = Rest::default();
            living.left_out(&[path("a")], &instead, &HashSet::new(), &mut rest).unwrap().len()
        };
        assert_eq!(goes(), 0);
        tree.has("b");
        assert_eq!(goes(), 1);
    }

    #[test]
    fn one_of_several_names_may_go() {
        let tree = Tree::new();
        tree.has("a");
        fs::hard_link(tree.at("a"), tree.at("b")).unwrap();
        tree.has("b");
        fs::remove_file(tree.at("a")).unwrap();
        assert_eq!(tree.removes(&["a"]).0, ["a"]);
        tree.moves("b", "c");
        assert_eq!(tree.removes(&["a", "b"]).0, these(&[]), "all that the bucket has of it is these two");
    }

    #[test]
    fn what_moves_to_where_nothing_is_kept_is_given_up() {
        let tree = Tree::new();
        tree.has("openclaw/a");
        tree.has("openclaw/b");
        fs::create_dir_all(tree.at("openclaw/cache")).unwrap();
        tree.moves("openclaw/a", "openclaw/cache/a");
        tree.moves("openclaw/b", "openclaw/b-wal");
        assert_eq!(tree.removes(&["openclaw/a", "openclaw/b"]).0.len(), 2);
    }
}
