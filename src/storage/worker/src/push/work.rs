//! What a round has to do, and what is left of it.

use crate::database::Remark;
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::index::Index;
use crate::manifest::{Line, Word};
use crate::order::{self, Passed, ToRead};
use crate::scan::Change;
use crate::volume::{self, Volume};
use crate::way::Way;
use cvm_sys::file_handle::Handle;
use std::collections::{HashMap, HashSet};

/// What a round, or what is left of it, has to do.
#[derive(Debug, Default)]
pub(crate) struct Work {
    /// In their order.
    pub(super) reads: Vec<ToRead>,
    pub(super) passed: Vec<Passed>,
    /// Directories that were links: what is new below them comes after.
    pub(super) opening: Vec<Line>,
    pub(super) metas: Vec<Line>,
    /// Those of them that take the place of something else.
    pub(super) instead: Vec<Line>,
    pub(super) gone: Vec<Path>,
    /// Of the slices before.
    pub(super) so_far: SoFar,
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
                Change::Read { path, database, was, handle } => {
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
        let paths: HashMap<&Path, &Option<Handle>> =
            newer.reads.iter().map(|read| (&read.path, &read.handle)).collect();
        if !paths.is_empty() {
            self.reads.retain(|read| {
                let now = paths.get(&read.path);
                // Another has its name: it lives on under one that may have been looked at before.
                let seen = read.handle.clone().filter(|_| now.is_some_and(|now| **now != read.handle));
                self.so_far.moved.extend(seen);
                now.is_none()
            });
            for lines in [&mut self.opening, &mut self.metas, &mut self.instead] {
                lines.retain(|line| !paths.contains_key(&line.path));
            }
            self.gone.retain(|path| !paths.contains_key(path));
        }
    }

    pub(super) fn leave_out(&mut self, path: &Path) -> bool {
        let before = self.reads.len();
        self.reads.retain(|read| read.path != *path);
        self.reads.len() < before
    }
}

/// What the beginning of a round means for the rest of it.
#[derive(Debug, Clone, Default)]
pub(super) struct SoFar {
    /// What was not there any more when it was to be read.
    pub(super) moved: HashSet<Handle>,
    /// The same, and nobody can say what it was.
    pub(super) lost_sight: bool,
    pub(super) moving: bool,
    /// What may have been moved to a name that the bucket does not have yet.
    pub(super) holds: Holds,
    /// What has failed again and again may have been too: what is known by its handle is not it.
    pub(super) holds_strangers: bool,
    /// What could not be sent, and what waits for it.
    pub(super) unsent: HashSet<Path>,
    /// What has to wait only because others have not arrived.
    pub(super) behind: HashSet<Path>,
}

impl SoFar {
    /// For what has to arrive before it.
    pub(super) fn lets_wait(&self, rank: usize, after: Option<&Path>) -> bool {
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
    /// What is wrong with databases that go up all the same.
    pub(crate) remarks: Vec<(Path, Remark)>,
    /// Files that were not where the scan looked, by their old names and by those of now: both have
    /// to be looked at again.
    pub(crate) elsewhere: Vec<Path>,
    /// What waits for removals that had to wait.
    pub(crate) blocked: Vec<Path>,
    /// What was not there any more when it was to be read.
    pub(crate) vanished: Vec<Path>,
    pub(super) so_far: SoFar,
}

/// Which removals have to wait for what is still to come.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Holds {
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

    /// What was seen may be in the bucket under no name yet, whatever it is called now.
    pub(crate) fn missed(&self) -> bool {
        self.so_far.lost_sight || self.so_far.moving || !self.so_far.moved.is_empty()
    }

    /// It has to wait, and only because others have not arrived.
    pub(crate) fn is_behind(&self, path: &Path) -> bool {
        self.so_far.behind.contains(path)
    }

    /// Of what was missed, what is known by its handle, and whether there is more.
    pub(crate) fn missing(&self) -> (&HashSet<Handle>, bool) {
        (&self.so_far.moved, self.so_far.lost_sight)
    }

    /// It was seen, as what this handle says, and is not there now.
    pub(super) fn vanishes(&mut self, path: Path, handle: Option<Handle>, holds: Holds, insists: bool) {
        self.vanished.push(path);
        self.so_far.lost_sight |= handle.is_none();
        self.so_far.moved.extend(handle);
        if holds != Holds::Nothing && !insists {
            self.so_far.moving = true;
            self.so_far.holds = Holds::Everything;
        }
    }

    /// It counts as a removal that is put off: when that is over, so is this.
    pub(super) fn block(&mut self, path: &Path) {
        self.removals += 1;
        self.blocked.push(path.clone());
    }

    pub(super) fn wait(&mut self, path: Path, why: String, holds: Holds) {
        self.later.push((path, why));
        self.so_far.holds = self.so_far.holds.max(holds);
    }

    /// So does what comes after it.
    pub(super) fn follows(&mut self, path: Path) {
        self.so_far.unsent.insert(path.clone());
        self.waits_for_its_name(path);
    }

    pub(super) fn waits_for_its_name(&mut self, path: Path) {
        let why = "the bucket does not have what was here before under its new name yet";
        self.so_far.behind.insert(path.clone());
        self.wait(path, why.to_owned(), Holds::Nothing);
    }

    /// What had the name is at another that no scan has met.
    pub(super) fn is_passed(&mut self, path: Path, now_at: Path) {
        self.so_far.moving = true;
        self.elsewhere.extend([now_at, path.clone()]);
        self.waits_for_its_name(path);
    }
}
