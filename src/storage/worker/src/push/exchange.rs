//! What takes the place of something else, with the removals that make room for it.

use super::removals_in;
use super::work::Rest;
use crate::entry::Path;
use crate::fault::Fault;
use crate::index::{Index, Known};
use crate::manifest::{Line, Word};
use crate::order::ToRead;
use crate::rules;
use crate::volume::Volume;
use crate::way::Way;
use cvm_sys::file_handle::Fate;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;

/// What goes so that something else has room.
#[derive(Default)]
pub(super) struct Exchange {
    /// What may go. A file that is nowhere but in what takes its place may only go with that.
    pub(super) going: HashMap<Path, Option<Path>>,
    /// Directories and links that come.
    pub(super) instead: BTreeMap<Path, Line>,
    pub(super) arrived: HashSet<Path>,
    pub(super) gone: HashSet<Path>,
}

impl Exchange {
    pub(super) fn may_go(&self, row: &Path, also: &HashSet<Path>) -> bool {
        match self.going.get(row) {
            None => false,
            Some(None) => true,
            Some(Some(with)) => also.contains(with) || self.arrived.contains(with),
        }
    }

    /// Those that have room, if all of them arrive.
    pub(super) fn allowed(
        &self,
        batch: Vec<ToRead>,
        index: &Index,
        rest: &mut Rest,
    ) -> Result<Vec<ToRead>, Fault> {
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
    pub(super) fn with_what_goes(
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
pub(super) struct Living<'a> {
    pub(super) volume: &'a Volume,
    pub(super) index: &'a Index,
    pub(super) prefix: &'a str,
}

impl Living<'_> {
    /// What may go, and what has to arrive before: one of `late`, which takes its place. Noted are old
    /// and present names of what may not go, if they can be looked at.
    pub(super) fn left_out(
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
