//! In which order files go up.
//!
//! ```text
//! first      databases, and then what is small: most of what is lost is lost soonest
//! but        what the bucket has under one name only goes up under its new one
//!            before something else takes its old one
//! ```
//!
//! A log that is rotated, a file that is kept as a copy when a new one takes its name: if the new
//! one came first, the bucket would for a while have no copy of what it has had. Each rank is sent
//! when the ones below it have arrived. Of two files that change names with each other one has to be
//! first all the same. Many ranks may be one batch. What cannot be sent holds up what comes after it, and nothing else.
//!
//! Refuses to know what is sent and what failed: that is `push`. May import: `entry`, `fault`,
//! `index`, `rules`, `volume`.

use crate::entry::Path;
use crate::fault::Fault;
use crate::index::{Index, Row};
use crate::rules;
use crate::volume::Volume;
use cvm_sys::file_handle::{Fate, Handle};
use std::collections::HashMap;
use std::fs::File;

/// A file to be read, whether it is a database, and what it was.
#[derive(Debug)]
pub(crate) struct ToRead {
    pub(crate) path: Path,
    pub(crate) database: bool,
    pub(crate) was: Option<Box<Row>>,
    pub(crate) size: u64,
    /// 0 waits for nothing.
    pub(crate) rank: usize,
    /// The one that has to arrive before it, as far as that can be said.
    pub(crate) after: Option<Path>,
    /// Something has to go before it.
    pub(crate) late: bool,
    /// As what it was seen.
    pub(crate) handle: Option<Handle>,
}

impl ToRead {
    /// The bucket has something under this name that counts.
    pub(crate) fn replaces(&self) -> Option<&Row> {
        self.was.as_deref().filter(|row| row.entry.is_file() && !row.promised && row.bad.is_none())
    }
}

/// A file that took the name of another, which lives under one that the scan has not met.
#[derive(Debug)]
pub(crate) struct Passed {
    pub(crate) path: Path,
    pub(crate) now_at: Path,
    pub(crate) handle: Handle,
}

/// What was moved before its data came up, and cannot be had.
#[derive(Debug)]
pub(crate) struct Unread {
    pub(crate) path: Path,
    /// Where the bucket has its data.
    pub(crate) data_at: Option<Path>,
    pub(crate) why: String,
}

/// Puts them in order. Yields those that have to be looked at again first.
pub(crate) fn order(
    reads: &mut [ToRead],
    volume: &Volume,
    index: &Index,
    prefix: &str,
) -> Result<Vec<Passed>, Fault> {
    let (after, passed) = followed(reads, volume, index, prefix)?;
    let ranks = ranks(&after, |n| {
        // Its content was only in the bucket: under which new name, nobody can say.
        usize::from(reads.get(n).and_then(ToRead::replaces).is_some_and(|row| row.sign.is_none()))
    });
    let paths: Vec<Path> = reads.iter().map(|read| read.path.clone()).collect();
    for ((read, rank), after) in reads.iter_mut().zip(ranks).zip(after) {
        read.rank = rank;
        read.after = after.and_then(|n| paths.get(n).cloned());
    }
    reads.sort_by_key(|read| (read.rank, !read.database, read.size));
    Ok(passed)
}

/// For each file the one that is what it replaces.
fn followed(
    reads: &[ToRead],
    volume: &Volume,
    index: &Index,
    prefix: &str,
) -> Result<(Vec<Option<usize>>, Vec<Passed>), Fault> {
    let top = File::open(&volume.upper)?;
    let numbers: HashMap<&Path, usize> = reads.iter().zip(0..).map(|(read, n)| (&read.path, n)).collect();
    let (mut after, mut passed) = (vec![None; reads.len()], Vec::new());
    for (read, after) in reads.iter().zip(&mut after) {
        if read.replaces().is_none() {
            continue;
        }
        let Some((handle, now_at)) = moved_on(&read.path, volume, index, &top)? else { continue };
        if let Some(number) = numbers.get(&now_at) {
            *after = Some(*number);
        } else if is_all_there_is(&handle, &read.path, &now_at, index, prefix)? {
            passed.push(Passed { path: read.path.clone(), now_at, handle });
        }
    }
    Ok((after, passed))
}

/// Where the file that the bucket has under this name, and under no other, lives now.
pub(crate) fn lives_on(
    path: &Path,
    volume: &Volume,
    index: &Index,
    prefix: &str,
) -> Result<Option<Path>, Fault> {
    let top = File::open(&volume.upper)?;
    let Some((handle, now_at)) = moved_on(path, volume, index, &top)? else { return Ok(None) };
    Ok(is_all_there_is(&handle, path, &now_at, index, prefix)?.then_some(now_at))
}

/// The file that the bucket has under this name, when it has another one now.
fn moved_on(
    path: &Path,
    volume: &Volume,
    index: &Index,
    top: &File,
) -> Result<Option<(Handle, Path)>, Fault> {
    let Some(handle) = index.handle(path)? else { return Ok(None) };
    let Fate::Lives(name) = handle.fate(top) else { return Ok(None) };
    Ok(volume.path_of(&name).filter(|now_at| now_at != path).map(|now_at| (handle, now_at)))
}

/// Whether the bucket has a file only under its name of old, and can have it under its new one.
fn is_all_there_is(
    handle: &Handle,
    path: &Path,
    now_at: &Path,
    index: &Index,
    prefix: &str,
) -> Result<bool, Fault> {
    Ok(index.settled_as(handle)?.iter().all(|other| other == path)
        && !rules::may_stay_out(now_at)
        && rules::too_long(prefix, now_at).is_none())
}

/// One more than that of what comes before; those in a ring share theirs.
fn ranks(after: &[Option<usize>], least: impl Fn(usize) -> usize) -> Vec<usize> {
    let mut ranks: Vec<Option<usize>> = vec![None; after.len()];
    // From where each was come to last.
    let mut visited: Vec<Option<usize>> = vec![None; after.len()];
    for start in 0..after.len() {
        let (mut way, mut here) = (Vec::new(), Some(start));
        let known = loop {
            match here {
                None => break None,
                Some(n) => {
                    if let Some(rank) = ranks.get(n).copied().flatten() {
                        break Some(rank);
                    }
                    if visited.get_mut(n).and_then(|from| from.replace(start)) == Some(start) {
                        break Some(0);
                    }
                    way.push(n);
                }
            }
            here = here.and_then(|n| after.get(n).copied().flatten());
        };
        let mut next = known.map_or(0, |rank| rank + 1);
        for n in way.into_iter().rev() {
            let rank = next.max(least(n));
            if let Some(slot) = ranks.get_mut(n) {
                *slot = Some(rank);
            }
            next = rank + 1;
        }
    }
    ranks.into_iter().map(Option::unwrap_or_default).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_followed_has_a_lower_rank_unless_it_follows_itself() {
        let of = |after: &[Option<usize>]| ranks(after, |_| 0);
        // log -> log.1 -> log.2 -> log.3
        assert_eq!(of(&[Some(1), Some(2), Some(3), None]), [3, 2, 1, 0]);
        assert_eq!(of(&[None, Some(0), Some(0)]), [0, 1, 1]);
        // Two that change names, and one that follows them.
        let ring = of(&[Some(1), Some(0), Some(0)]);
        assert!(ring[2] > ring[0], "{ring:?}");
        assert_eq!(ranks(&[None, Some(0)], |n| usize::from(n == 0)), [1, 2]);
        let long: Vec<Option<usize>> = (1..10_000).map(Some).chain([None]).collect();
        assert!(of(&long).into_iter().eq((0..10_000).rev()));
    }
}
