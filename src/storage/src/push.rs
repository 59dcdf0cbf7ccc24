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
//! Refuses to write when the lease does not confirm it. May import: `bucket`, `chain`, `entry`,
//! `fault`, `index`, `manifest`, `owner`, `parallel`, `rules`, `scan`, `stage`, `volume`.

use crate::bucket::Bucket;
use crate::chain::Chain;
use crate::entry::{Entry, Path};
use crate::fault::Fault;
use crate::index::{Index, Known, Row};
use crate::manifest::{Line, Word};
use crate::owner::Lease;
use crate::parallel;
use crate::rules;
use crate::scan::Change;
use crate::stage::{self, Outcome, Staged};
use crate::volume::{self, Volume};
use cvm_process::handle::Fate;
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::ffi::OsStrExt as _;

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
    /// Told after every batch: files and bytes that are left.
    pub(crate) progress: &'a dyn Fn(u64, u64),
}

/// A file to be read, whether it is a database, and what it was.
type Read = (Path, bool, Option<Box<Row>>);

/// What a round could not do.
#[derive(Debug, Default)]
pub(crate) struct Rest {
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
    /// Files that were not where the scan looked, by their old names and by those of now: both have
    /// to be looked at again.
    pub(crate) elsewhere: Vec<Path>,
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
    /// `unread` was moved and cannot be had: until it can, nothing may go that it may be.
    pub(crate) fn round(&mut self, changes: Vec<Change>, unread: Vec<(Path, String)>) -> Rest {
        let mut rest = Rest::default();
        for (path, why) in unread {
            rest.wait(path, why, Holds::Everything);
        }
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
            volume::look(&path.below(&self.volume.upper))
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
            .and_then(|gone| {
                let living = Living { volume: self.volume, index: self.index, prefix: &self.bucket.prefix };
                living.left_out(gone, &instead, &mut rest.elsewhere)
            })
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
        let (mut to_send, mut lines) = (Vec::new(), Vec::new());
        let mut known: Vec<(Path, Known)> = Vec::new();
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
                Ok(()) => done.push(staged),
                Err(why) => {
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
            let here = self.name_of(&name);
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

    /// The kernel knows none for what has several, or is moved at this very moment.
    fn name_of(&self, whole: &[u8]) -> Option<Path> {
        let name = whole.strip_prefix(self.volume.upper.as_os_str().as_bytes())?;
        Path::new(name.strip_prefix(b"/")?)
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
