//! One round of pushing: from what a scan found to a bucket that has it.
//!
//! ```text
//! for each batch:  copies and hashes -> intents into the manifest -> objects -> entries into the manifest
//! at the end:      removals into the manifest -> objects deleted
//! ```
//!
//! Removals come last, so that what was moved is there under its new name before it goes under its
//! old one: a file that lives on under a name that the bucket does not have yet keeps its old one,
//! however fast it moves. A batch that fails half way leaves intents behind, and its files are pushed again.
//!
//! A round that is long is made in slices: between two of them the worker reads its orders, and what
//! databases have committed meanwhile goes up before the rest.
//!
//! Refuses to write when the lease does not confirm it. May import: `bucket`, `chain`, `entry`,
//! `fault`, `index`, `manifest`, `order`, `owner`, `parallel`, `rules`, `scan`, `stage`, `volume`.

use crate::bucket::Bucket;
use crate::chain::Chain;
use crate::entry::{Entry, Path};
use crate::fault::Fault;
use crate::index::{Index, Known, Row};
use crate::manifest::{Line, Word};
use crate::order::{self, Passed, ToRead, Unread};
use crate::owner::{Lease, uptime};
use crate::parallel;
use crate::rules;
use crate::scan::Change;
use crate::stage::{self, Outcome, Staged};
use crate::volume::{self, Volume};
use cvm_process::handle::Fate;
use std::collections::HashSet;
use std::fs::File;
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
    metas: Vec<Line>,
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
        for change in changes {
            match change {
                Change::Read { path, database, was } => {
                    this.reads.push(ToRead { size: size(&path), path, database, was, rank: 0 });
                }
                Change::Meta { path, entry } => this.metas.push(Line { path, word: Word::Is(entry) }),
                Change::Gone { path } => this.gone.push(path),
            }
        }
        this.passed = order::order(&mut this.reads, volume, index, prefix)?;
        Ok(this)
    }

    pub(crate) fn files(&self) -> impl Iterator<Item = &Path> {
        self.reads.iter().map(|read| &read.path)
    }

    /// What is newer than we are is known of these.
    pub(crate) fn forget(&mut self, newer: &Self) {
        let paths: HashSet<&Path> = newer.files().collect();
        if !paths.is_empty() {
            self.reads.retain(|read| !paths.contains(&read.path));
            self.metas.retain(|line| !paths.contains(&line.path));
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
#[derive(Debug, Clone, Copy, Default)]
struct SoFar {
    moving: bool,
    /// What may have been moved to a name that the bucket does not have yet.
    holds: Holds,
    /// Something could not be sent.
    unsent: bool,
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
    /// To be looked at once more, for their times are too fresh to tell one change from the next.
    pub(crate) young: Vec<Path>,
    /// Files that were not where the scan looked, by their old names and by those of now: both have
    /// to be looked at again.
    pub(crate) elsewhere: Vec<Path>,
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

    fn wait(&mut self, path: Path, why: String, holds: Holds) {
        self.later.push((path, why));
        self.so_far.holds = self.so_far.holds.max(holds);
    }
}

const NOT_YET: &str = "the bucket does not have what was here before under its new name yet";

impl Pusher<'_> {
    /// One slice. `urgent` is what comes first, and then at least one batch of its own. `unread` was
    /// moved and cannot be had: until it can, nothing may go that it may be.
    pub(crate) fn round(&mut self, mut work: Work, urgent: Work, unread: Vec<Unread>) -> Rest {
        let mut rest = Rest { removals: work.gone.len() as u64, so_far: work.so_far, ..Rest::default() };
        for Unread { path, data_at, why } in unread {
            if let Some(old) = data_at.filter(|old| work.leave_out(old)) {
                rest.wait(old, NOT_YET.to_owned(), Holds::Nothing);
            }
            rest.wait(path, why, Holds::Everything);
        }
        for Passed { path, now_at } in std::mem::take(&mut work.passed) {
            if !self.insists && work.leave_out(&path) {
                rest.so_far.moving = true;
                rest.elsewhere.extend([now_at, path.clone()]);
                rest.wait(path, NOT_YET.to_owned(), Holds::Nothing);
            }
        }
        let Work { reads, metas, gone, .. } = work;
        let bytes = reads.iter().map(|read| read.size).sum();
        let begun = self
            .files(urgent.reads, Duration::MAX, (reads.len() as u64, bytes), &mut rest)
            .and_then(|_| self.files(reads, self.until, (0, 0), &mut rest));
        let outcome = match begun {
            Ok(reads) if !reads.is_empty() => {
                rest.left = Some(Work { reads, metas, gone, so_far: rest.so_far, ..Work::default() });
                return rest;
            }
            other => other.map(drop),
        };
        // What stands where a file was comes after the file's removal, which would take it along.
        let leaving: HashSet<&Path> = gone.iter().collect();
        let (instead, metas): (Vec<_>, Vec<_>) =
            metas.into_iter().partition(|line| leaving.contains(&line.path));
        let outcome = outcome
            .and_then(|()| self.metas(&metas))
            .and_then(|()| self.may_go(gone, rest.so_far.holds))
            .and_then(|gone| {
                let living = Living { volume: self.volume, index: self.index, prefix: &self.bucket.prefix };
                living.left_out(gone, &instead, &mut rest.elsewhere)
            })
            .and_then(|gone| self.removals(&gone, &instead, &mut rest));
        let outcome = outcome.and_then(|()| if self.chain.wants_merging() { self.merge() } else { Ok(()) });
        rest.fault = outcome.err();
        rest
    }

    /// Yields those that are left when the time is over. `after` are files and bytes that come later.
    fn files(
        &mut self,
        reads: Vec<ToRead>,
        until: Duration,
        after: (u64, u64),
        rest: &mut Rest,
    ) -> Result<Vec<ToRead>, Fault> {
        let mut left: u64 = after.1 + reads.iter().map(|read| read.size).sum::<u64>();
        let mut files = after.0 + reads.len() as u64;
        let mut queue = reads.into_iter().peekable();
        while let Some(rank) = queue.peek().map(|read| read.rank) {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while let Some(read) = queue
                .next_if(|read| read.rank == rank && (batch.is_empty() || bytes + read.size <= BATCH_BYTES))
            {
                bytes += read.size;
                batch.push(read);
                if batch.len() == BATCH_FILES {
                    break;
                }
            }
            let count = batch.len() as u64;
            if rank > 0 && (rest.so_far.unsent || rest.so_far.moving) {
                for read in batch {
                    rest.wait(read.path, NOT_YET.to_owned(), Holds::Nothing);
                }
            } else {
                self.batch(batch, rest)?;
            }
            (left, files) = (left.saturating_sub(bytes), files.saturating_sub(count));
            (self.progress)(files, left);
            if uptime() >= until {
                break;
            }
        }
        Ok(queue.collect())
    }

    fn batch(&mut self, batch: Vec<ToRead>, rest: &mut Rest) -> Result<(), Fault> {
        let volume = self.volume;
        let numbered: Vec<_> = batch.into_iter().enumerate().collect();
        let staged = parallel::each_apart(numbered, STAGERS, |(number, read)| {
            let was_database = read.was.as_ref().is_some_and(|row| row.entry.is_database());
            let name = format!("push-{number}");
            let outcome = stage::stage(volume, &read.path, read.database, was_database, name);
            (read, outcome)
        });
        let (mut to_send, mut lines) = (Vec::new(), Vec::new());
        let mut known: Vec<(Path, Known)> = Vec::new();
        for (ToRead { path, database, was, .. }, outcome) in staged {
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
                        self.discard(&staged.name);
                        known.push((path.clone(), staged.known));
                        lines.extend(
                            changed(was.as_deref(), &staged.entry)
                                .then_some(Line { path, word: Word::Is(staged.entry) }),
                        );
                    } else {
                        to_send.push(staged);
                    }
                }
                Ok(Outcome::Vanished) => rest.moves(held, self.insists),
                Ok(Outcome::Later(why)) => rest.wait(path, why, held),
                Ok(Outcome::Damaged(why)) => rest.damaged.push((path, why)),
                Err(Fault::Missing) => rest.moves(held, self.insists),
                Err(fault) => rest.wait(path, fault.to_string(), held),
            }
        }
        let sent = self.send(to_send, rest)?;
        for staged in sent {
            known.push((staged.path.clone(), staged.known));
            lines.push(Line { path: staged.path, word: Word::Is(staged.entry) });
        }
        self.settle_on_disk(&lines)?;
        self.write(&lines)?;
        self.index.set_known(&known)
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

    /// Intents, then the objects. Yields those that have arrived.
    fn send(&mut self, to_send: Vec<Staged>, rest: &mut Rest) -> Result<Vec<Staged>, Fault> {
        if to_send.is_empty() {
            return Ok(Vec::new());
        }
        let intents: Vec<Line> = to_send
            .iter()
            .map(|s| Line { path: s.path.clone(), word: Word::WillBe(s.entry.clone()) })
            .collect();
        self.write(&intents)?;
        let (bucket, lease, staging) = (self.bucket, self.lease, self.volume.staging());
        // Of a bucket that does not answer nothing more is asked: each would wait as long as the first.
        let silent = std::sync::OnceLock::new();
        let sent = parallel::each(to_send, UPLOADERS, |staged| {
            if let Some(fault) = silent.get().cloned() {
                return (staged, Err(fault));
            }
            // Asked for each: between two of them this machine may have slept, and been succeeded.
            let sent = lease
                .confirm(bucket)
                .and_then(|()| bucket.rclone.upload(&staging, &staged.name, &staged.path.object()));
            if let Err(fault @ Fault::Unreachable(_)) = &sent {
                let _ = silent.set(fault.clone());
            }
            (staged, sent)
        });
        let mut fault = None;
        let mut done = Vec::new();
        for (staged, sent) in sent {
            self.discard(&staged.name);
            match sent {
                Ok(()) => done.push(staged),
                Err(why) => {
                    rest.so_far.unsent = true;
                    rest.wait(staged.path, why.to_string(), Holds::Everything);
                    fault = Some(why);
                }
            }
        }
        // The entries of what did arrive are written all the same.
        match fault {
            Some(fault) if done.is_empty() => Err(fault),
            _ => Ok(done),
        }
    }

    fn metas(&mut self, metas: &[Line]) -> Result<(), Fault> {
        metas.chunks(LINES).try_for_each(|lines| self.write(lines))
    }

    fn may_go(&self, gone: Vec<Path>, holds: Holds) -> Result<Vec<Path>, Fault> {
        match holds {
            Holds::Nothing => Ok(gone),
            Holds::Everything => Ok(Vec::new()),
            Holds::Databases => {
                let mut others = Vec::new();
                for path in gone {
                    if !self.index.get(&path)?.is_some_and(|row| row.entry.is_database()) {
                        others.push(path);
                    }
                }
                Ok(others)
            }
        }
    }

    fn removals(&mut self, gone: &[Path], instead: &[Line], rest: &mut Rest) -> Result<(), Fault> {
        for paths in gone.chunks(LINES) {
            let lines: Vec<Line> =
                paths.iter().map(|path| Line { path: path.clone(), word: Word::Gone }).collect();
            self.write(&lines)?;
            rest.removals = rest.removals.saturating_sub(paths.len() as u64);
        }
        self.metas(instead)?;
        if self.may_delete { self.bury() } else { Ok(()) }
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

    fn discard(&self, name: &str) {
        // What stays is swept with the staging area at the next start.
        let _ = std::fs::remove_file(self.volume.staging().join(name));
    }
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

/// A scan may miss what is renamed without end, under every name it ever has. But a file that the
/// bucket holds under a name of old is known by its handle: as long as it lives, and the bucket has
/// it under no other name that stays, the old one stays.
struct Living<'a> {
    volume: &'a Volume,
    index: &'a Index,
    prefix: &'a str,
}

impl Living<'_> {
    /// What may go. Noted are old and present names of what may not, if they can be looked at.
    fn left_out(
        &self,
        gone: Vec<Path>,
        instead: &[Line],
        elsewhere: &mut Vec<Path>,
    ) -> Result<Vec<Path>, Fault> {
        let top = File::open(&self.volume.upper)?;
        let leaving: HashSet<&Path> = gone.iter().collect();
        // Where something else stands already, nothing can stay.
        let replaced: HashSet<&Path> = instead.iter().map(|line| &line.path).collect();
        let mut kept = HashSet::new();
        for path in gone.iter().filter(|path| !replaced.contains(path)) {
            let Some(handle) = self.index.handle(path)? else { continue };
            let Fate::Lives(name) = handle.fate(&top) else { continue };
            let here = self.volume.path_of(&name);
            let has_another = || -> Result<bool, Fault> {
                Ok(self.index.settled_as(&handle)?.iter().any(|other| !leaving.contains(other)))
            };
            if here.as_ref().is_some_and(rules::may_stay_out) || has_another()? {
                continue;
            }
            // A name that the bucket cannot have is not asked for again at once.
            let here = here.filter(|here| rules::too_long(self.prefix, here).is_none());
            elsewhere.extend(here.map(|here| [here, path.clone()]).into_iter().flatten());
            kept.insert(path.clone());
        }
        if kept.is_empty() {
            return Ok(gone);
        }
        // The directories of what stays, stay.
        let stays =
            |path: &Path| kept.contains(path) || kept.iter().any(|file| file.starts_with(path.as_bytes()));
        Ok(gone.into_iter().filter(|path| !stays(path)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Kind;
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

        fn moves(&self, from: &str, to: &str) {
            fs::rename(self.at(from), self.at(to)).unwrap();
        }

        /// What a round that found nothing but these removals would remove, and look at again.
        fn removes(&self, gone: &[&str]) -> (Vec<String>, Vec<String>) {
            let living = Living { volume: &self.volume, index: &self.index, prefix: "p" };
            let mut elsewhere = Vec::new();
            let gone = gone.iter().map(|name| path(name)).collect();
            let goes = living.left_out(gone, &[], &mut elsewhere).unwrap();
            let text = |all: Vec<Path>| all.iter().map(ToString::to_string).collect();
            (text(goes), text(elsewhere))
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
        let fetched = HashSet::new();
        let found = scan::Scanner::new(&tree.volume, &tree.index, "p", &fetched).full().unwrap();
        let work = Work::of(found.changes, &tree.volume, &tree.index, "p").unwrap();
        let files: Vec<String> = work.files().map(ToString::to_string).collect();
        assert_eq!(files, ["log.2", "log.1", "log"]);
        assert!(work.passed.is_empty());
        // The scan has not met the oldest: what takes its name waits for it.
        let found = scan::Scanner::new(&tree.volume, &tree.index, "p", &fetched).full().unwrap();
        let met = found.changes.into_iter().filter(|c| *c.path() != path("log.2")).collect();
        let work = Work::of(met, &tree.volume, &tree.index, "p").unwrap();
        let passed: Vec<_> = work.passed.iter().map(|p| (p.path.to_string(), p.now_at.to_string())).collect();
        assert_eq!(passed, [("log.1".to_owned(), "log.2".to_owned())]);
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
