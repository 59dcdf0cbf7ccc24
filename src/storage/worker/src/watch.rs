//! Hints that something has changed: inotify on every directory of the tree.
//!
//! In FUSE mode both sides of the overlay are watched: writes show on the merged tree, and that a
//! directory has come up from below shows in the upper layer only. A hint that is missed is found
//! by the next full scan; a queue that overflows asks for one.
//!
//! Refuses to look into a directory that the rules leave out, and to follow a link.
//! May import: `entry`, `fault`, `rules`, `volume`.

use crate::entry::Path;
use crate::fault::Fault;
use crate::rules;
use crate::volume::{self, Volume};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::{Mutex, PoisonError};

/// One hint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Hint {
    /// Something in this directory; "" is the top.
    Directory(Vec<u8>),
    /// Nobody knows where.
    Anywhere,
    /// From now on some changes are found by the scan only.
    NoMoreWatches,
}

/// What was hinted at since somebody has looked: each directory once, however much happens in it
/// while nobody looks.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Noted {
    pub(crate) directories: BTreeSet<Vec<u8>>,
    pub(crate) anywhere: bool,
    pub(crate) no_more_watches: bool,
}

/// From the watcher's thread to the worker's.
#[derive(Debug, Default)]
pub(crate) struct Hints(Mutex<Noted>);

impl Hints {
    /// True when somebody has to be told: what was there before has been taken.
    pub(crate) fn note(&self, hints: Vec<Hint>) -> bool {
        let mut noted = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let was_nothing = *noted == Noted::default();
        for hint in hints {
            match hint {
                Hint::Directory(dir) => drop(noted.directories.insert(dir)),
                Hint::Anywhere => noted.anywhere = true,
                Hint::NoMoreWatches => noted.no_more_watches = true,
            }
        }
        was_nothing && *noted != Noted::default()
    }

    /// Nothing, when there is nothing new.
    pub(crate) fn take(&self) -> Option<Noted> {
        let noted = std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner));
        (noted != Noted::default()).then_some(noted)
    }
}

/// Said once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Nothing,
    Now,
    Before,
}

impl Told {
    fn or_now(self) -> Self {
        if self == Self::Nothing { Self::Now } else { self }
    }
}

pub(crate) struct Watcher {
    inotify: Inotify,
    roots: Vec<std::path::PathBuf>,
    watches: HashMap<WatchDescriptor, (usize, Vec<u8>)>,
    /// The kernel had no more watches to give; said once.
    exhausted: Told,
}

fn mask() -> AddWatchFlags {
    AddWatchFlags::IN_CREATE
        | AddWatchFlags::IN_MODIFY
        | AddWatchFlags::IN_ATTRIB
        | AddWatchFlags::IN_CLOSE_WRITE
        | AddWatchFlags::IN_MOVED_FROM
        | AddWatchFlags::IN_MOVED_TO
        | AddWatchFlags::IN_DELETE
        | AddWatchFlags::IN_DONT_FOLLOW
        | AddWatchFlags::IN_ONLYDIR
}

impl Watcher {
    pub(crate) fn new(volume: &Volume) -> Result<Self, Fault> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC)?;
        let mut roots = vec![volume.upper.clone()];
        if volume.overlay {
            roots.push(volume.tree.clone());
        }
        let mut this = Self { inotify, roots, watches: HashMap::new(), exhausted: Told::Nothing };
        this.add(None, &mut Vec::new());
        Ok(this)
    }

    /// Watches a directory and all below it that is in the upper layer, and notes which those are.
    fn add(&mut self, dir: Option<&Path>, seen: &mut Vec<Hint>) {
        let mut to_add = vec![dir.cloned()];
        while let Some(dir) = to_add.pop() {
            if !dir.as_ref().is_some_and(rules::is_volatile) {
                to_add.extend(self.add_one(dir.as_ref(), seen).into_iter().map(Some));
            }
        }
    }

    /// Yields the directories in it.
    fn add_one(&mut self, dir: Option<&Path>, seen: &mut Vec<Hint>) -> Vec<Path> {
        for root in 0..self.roots.len() {
            let Some(base) = self.roots.get(root) else { continue };
            let at = dir.map_or_else(|| base.clone(), |d| d.below(base));
            match self.inotify.add_watch(&at, mask()) {
                Ok(watch) => drop(
                    self.watches.insert(watch, (root, dir.map_or_else(Vec::new, |d| d.as_bytes().to_vec()))),
                ),
                Err(nix::errno::Errno::ENOSPC) => self.exhausted = self.exhausted.or_now(),
                // Gone again, or no directory any more.
                Err(_) => {}
            }
        }
        seen.push(Hint::Directory(dir.map_or_else(Vec::new, |d| d.as_bytes().to_vec())));
        let Some(upper) = self.roots.first() else { return Vec::new() };
        let at = dir.map_or_else(|| upper.clone(), |d| d.below(upper));
        let Ok(entries) = fs::read_dir(at) else { return Vec::new() };
        let directories = entries.flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_dir()));
        directories.filter_map(|entry| Path::child(dir, entry.file_name().as_bytes())).collect()
    }

    /// Waits for hints.
    pub(crate) fn next(&mut self) -> Result<Vec<Hint>, Fault> {
        let events = match self.inotify.read_events() {
            Ok(events) => events,
            Err(nix::errno::Errno::EINTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let mut hints = Vec::new();
        if self.exhausted == Told::Now {
            self.exhausted = Told::Before;
            hints.push(Hint::NoMoreWatches);
        }
        for event in events {
            let mut seen = Vec::new();
            if let Some(hint) = self.understand(&event, &mut seen)
                && hints.last() != Some(&hint)
            {
                hints.push(hint);
            }
            // What was made in it before it was watched has told nobody.
            hints.append(&mut seen);
        }
        Ok(hints)
    }

    fn understand(&mut self, event: &InotifyEvent, seen: &mut Vec<Hint>) -> Option<Hint> {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            return Some(Hint::Anywhere);
        }
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            self.watches.remove(&event.wd);
            return None;
        }
        let (_, dir) = self.watches.get(&event.wd)?.clone();
        let name = event.name.as_ref().map(|n| n.as_bytes().to_vec());
        let path = name.and_then(|name| Path::child(Path::new(&dir).as_ref(), &name));
        if let Some(path) = &path {
            if rules::is_volatile(path) {
                return None;
            }
            let appears = event.mask.intersects(AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO);
            if appears && event.mask.contains(AddWatchFlags::IN_ISDIR) {
                self.add(Some(path), seen);
            }
            // A directory that moved away keeps its watches under a name that is not its own.
            if event.mask.contains(AddWatchFlags::IN_MOVED_FROM | AddWatchFlags::IN_ISDIR) {
                self.forget(path, seen);
            }
        } else if event.name.is_some() {
            // Ours, at the top.
            return None;
        }
        Some(Hint::Directory(dir))
    }

    fn forget(&mut self, path: &Path, seen: &mut Vec<Hint>) {
        let inside = |dir: &[u8]| {
            dir == path.as_bytes() || Path::new(dir).is_some_and(|d| d.starts_with(path.as_bytes()))
        };
        let gone: Vec<WatchDescriptor> =
            self.watches.iter().filter(|(_, (_, dir))| inside(dir)).map(|(wd, _)| *wd).collect();
        for watch in gone {
            self.watches.remove(&watch);
            let _ = self.inotify.rm_watch(watch);
        }
        // It may have moved to where its arrival was seen first; then that name is watched again.
        if volume::look(&path.below(self.roots.first().map_or(std::path::Path::new("/"), |r| r)))
            .ok()
            .flatten()
            .is_some()
        {
            self.add(Some(path), seen);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_while_nobody_looks_is_noted_once_and_told_once() {
        let hints = Hints::default();
        assert_eq!(hints.take(), None);
        assert!(!hints.note(Vec::new()));
        let of = |n: u32| vec![Hint::Directory(format!("d{}", n % 3).into_bytes())];
        let told = (0..10_000).filter(|n| hints.note(of(*n))).count();
        assert_eq!(told, 1);
        assert!(!hints.note(vec![Hint::Anywhere]));
        let noted = hints.take().unwrap();
        assert_eq!(noted.directories.len(), 3);
        assert!(noted.anywhere && !noted.no_more_watches);
        assert_eq!(hints.take(), None);
        assert!(hints.note(of(1)), "what comes later is told again");
    }
}
