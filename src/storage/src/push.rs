//! One round of pushing: from what a scan found to a bucket that has it.
//!
//! ```text
//! for each batch:  copies and hashes -> intents into the manifest -> objects -> entries into the manifest
//! at the end:      removals into the manifest -> objects deleted
//! ```
//!
//! Removals come last, so that what was moved is there under its new name before it goes under its
//! old one. A batch that fails half way leaves intents behind, and its files are pushed again.
//!
//! Refuses to write when the lease does not confirm it. May import: `bucket`, `chain`, `entry`,
//! `fault`, `index`, `manifest`, `owner`, `parallel`, `scan`, `stage`, `volume`.

use crate::bucket::Bucket;
use crate::chain::Chain;
use crate::entry::{Entry, Path};
use crate::fault::Fault;
use crate::index::{Index, Row};
use crate::manifest::{Line, Word};
use crate::owner::Lease;
use crate::parallel;
use crate::scan::Change;
use crate::stage::{self, Outcome, Staged};
use crate::volume::Volume;
use std::collections::HashSet;

/// A batch is as large as a loss of half its work is cheap.
const BATCH_FILES: usize = 400;
const BATCH_BYTES: u64 = 128 << 20;
/// Copies made at once: the disk's and the processor's business.
const STAGERS: usize = 2;
/// Uploads at once: the latency's business.
const UPLOADERS: usize = 16;
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
    /// Told after every batch: files and bytes that are left.
    pub(crate) progress: &'a dyn Fn(u64, u64),
}

/// A file to be read, whether it is a database, and what it was.
type Read = (Path, bool, Option<Box<Row>>);

/// What a round could not do.
#[derive(Debug, Default)]
pub(crate) struct Rest {
    pub(crate) pushed_files: u64,
    pub(crate) pushed_bytes: u64,
    /// To be tried again soon.
    pub(crate) later: Vec<(Path, String)>,
    /// Not before somebody mends it.
    pub(crate) damaged: Vec<(Path, String)>,
    pub(crate) fault: Option<Fault>,
    /// Removals that were put off.
    pub(crate) removals: u64,
    /// To be looked at once more, for their times are too fresh to tell one change from the next.
    pub(crate) young: Vec<Path>,
    /// Something new vanished before it could be read: it may have moved on to another name, and
    /// what is gone may be it under an older one.
    pub(crate) moving: bool,
    /// What may have been moved to a name that the bucket does not have yet.
    holds: Holds,
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
    fn moves(&mut self, holds: Holds, insists: bool) {
        if holds != Holds::Nothing && !insists {
            self.moving = true;
            self.holds = Holds::Everything;
        }
    }

    fn wait(&mut self, path: Path, why: String, holds: Holds) {
        self.later.push((path, why));
        self.holds = self.holds.max(holds);
    }
}

impl Pusher<'_> {
    pub(crate) fn round(&mut self, changes: Vec<Change>) -> Rest {
        let mut rest = Rest::default();
        let (mut reads, mut metas, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for change in changes {
            match change {
                Change::Read { path, database, was } => reads.push((path, database, was)),
                Change::Meta { path, entry } => metas.push(Line { path, word: Word::Is(entry) }),
                Change::Gone { path } => gone.push(path),
            }
        }
        rest.removals = gone.len() as u64;
        // What stands where a file was comes after the file's removal, which would take it along.
        let leaving: HashSet<&Path> = gone.iter().collect();
        let (instead, metas): (Vec<_>, Vec<_>) =
            metas.into_iter().partition(|line| leaving.contains(&line.path));
        // Databases first, and then what is small: most of what is lost is lost soonest.
        let size = |path: &Path| {
            crate::volume::look(&path.below(&self.volume.upper))
                .ok()
                .flatten()
                .map_or(0, |s| crate::scan::size_of(&s))
        };
        let mut sized: Vec<_> = reads.into_iter().map(|read| (size(&read.0), read)).collect();
        sized.sort_by_key(|(size, (_, database, _))| (!database, *size));
        let outcome = self
            .files(sized, &mut rest)
            .and_then(|()| self.metas(&metas))
            .and_then(|()| self.may_go(gone, rest.holds))
            .and_then(|gone| self.removals(&gone, &instead, &mut rest));
        let outcome = outcome.and_then(|()| if self.chain.wants_merging() { self.merge() } else { Ok(()) });
        rest.fault = outcome.err();
        rest
    }

    fn files(&mut self, sized: Vec<(u64, Read)>, rest: &mut Rest) -> Result<(), Fault> {
        let mut left: u64 = sized.iter().map(|(size, _)| size).sum();
        let mut files = sized.len() as u64;
        let mut queue = sized.into_iter().peekable();
        while queue.peek().is_some() {
            let (mut batch, mut bytes) = (Vec::new(), 0);
            while let Some((size, read)) =
                queue.next_if(|(size, _)| batch.is_empty() || bytes + size <= BATCH_BYTES)
            {
                bytes += size;
                batch.push(read);
                if batch.len() == BATCH_FILES {
                    break;
                }
            }
            let count = batch.len() as u64;
            self.batch(batch, rest)?;
            (left, files) = (left.saturating_sub(bytes), files.saturating_sub(count));
            (self.progress)(files, left);
        }
        Ok(())
    }

    fn batch(&mut self, batch: Vec<Read>, rest: &mut Rest) -> Result<(), Fault> {
        let volume = self.volume;
        let numbered: Vec<_> = batch.into_iter().enumerate().collect();
        let staged = parallel::each_apart(numbered, STAGERS, |(number, (path, database, was))| {
            let was_database = was.as_ref().is_some_and(|row| row.entry.is_database());
            let outcome = stage::stage(volume, &path, database, was_database, format!("push-{number}"));
            (path, database, was, outcome)
        });
        let (mut to_send, mut lines, mut signs) = (Vec::new(), Vec::new(), Vec::new());
        for (path, database, was, outcome) in staged {
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
                        signs.push((path.clone(), staged.sign));
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
        for (staged, object_is_there) in sent {
            if object_is_there {
                rest.pushed_files += 1;
                rest.pushed_bytes += staged.entry.size();
                signs.push((staged.path.clone(), staged.sign));
                lines.push(Line { path: staged.path, word: Word::Is(staged.entry) });
            }
        }
        self.write(&lines)?;
        self.index.set_signs(&signs)
    }

    /// Intents, then the objects.
    fn send(&mut self, to_send: Vec<Staged>, rest: &mut Rest) -> Result<Vec<(Staged, bool)>, Fault> {
        if to_send.is_empty() {
            return Ok(Vec::new());
        }
        let intents: Vec<Line> = to_send
            .iter()
            .map(|s| Line { path: s.path.clone(), word: Word::WillBe(s.entry.clone()) })
            .collect();
        self.write(&intents)?;
        let (bucket, lease, staging) = (self.bucket, self.lease, self.volume.staging());
        let sent = parallel::each(to_send, UPLOADERS, |staged| {
            // Asked for each: between two of them this machine may have slept, and been succeeded.
            let sent = lease
                .confirm(bucket)
                .and_then(|()| bucket.rclone.upload(&staging, &staged.name, &staged.path.object()));
            (staged, sent)
        });
        let mut fault = None;
        let mut done = Vec::new();
        for (staged, sent) in sent {
            self.discard(&staged.name);
            match sent {
                Ok(()) => done.push((staged, true)),
                Err(why) => {
                    rest.wait(staged.path.clone(), why.to_string(), Holds::Everything);
                    done.push((staged, false));
                    fault = Some(why);
                }
            }
        }
        // The entries of what did arrive are written all the same.
        if done.iter().all(|(_, sent)| !sent)
            && let Some(fault) = fault
        {
            return Err(fault);
        }
        Ok(done)
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
        let head = self.chain.append(self.bucket, self.lease.epoch(), lines)?;
        self.index.apply(lines, Some(head))
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
