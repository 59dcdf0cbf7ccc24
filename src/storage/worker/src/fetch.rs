//! From the bucket to a directory: objects are fetched, checked against the manifest, and only
//! then put in their place with everything that the manifest says of them.
//!
//! Used by the full restore, by what the gateway needs before it starts, by drills, and by
//! `cvm storage restore`. A restore that was killed goes on with what it had fetched.
//!
//! Refuses to put anything unverified anywhere, and to follow a link of the tree's.
//! May import: `bucket`, `entry`, `fault`, `index`, `manifest`, `parallel`, `rclone`, `stage`, `volume`.

use crate::bucket::Bucket;
use crate::entry::{Entry, Kind, Path};
use crate::fault::Fault;
use crate::index::Totals;
use crate::manifest::Digest;
use crate::rclone::Rclone;
use crate::volume::{self, Within};
use crate::{parallel, stage};
use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path as FsPath, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Downloads at once. Small files cost a round trip each and little else.
const PARALLEL: u32 = 64;
/// Below this many files one request for each is cheaper than listing the whole bucket.
pub(crate) const FEW: usize = 200;
/// Files hashed at once.
pub(crate) const CHECKERS: usize = 4;
/// Between two looks at what has come.
const LOOK: Duration = Duration::from_millis(250);

/// One path with all that its object may be: the settled entry first, then the intended one.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    pub(crate) path: Path,
    pub(crate) may_be: Vec<Entry>,
}

impl Wanted {
    /// What the manifest says.
    fn size(&self) -> u64 {
        self.may_be.first().map_or(0, Entry::size)
    }
}

/// What became of one file.
#[derive(Debug)]
pub(crate) enum Got {
    /// It is in its place, and is this.
    Good(Path, Entry),
    /// The bucket does not have it as the manifest says.
    Bad(Path, String),
    /// It could not be had now.
    Later(Path, Fault),
}

/// How many files, and how many bytes.
pub(crate) fn total<'a>(wanted: impl IntoIterator<Item = &'a Wanted>) -> (u64, u64) {
    wanted.into_iter().map(Wanted::size).fold((0, 0), |(files, bytes), size| (files + 1, bytes + size))
}

/// Files and bytes that are in their places.
#[derive(Default)]
struct Done {
    files: AtomicU64,
    bytes: AtomicU64,
}

impl Done {
    /// And this one.
    fn and(&self, wanted: &Wanted) -> (u64, u64) {
        self.files.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(wanted.size(), Ordering::Relaxed);
        self.so_far()
    }

    fn so_far(&self) -> (u64, u64) {
        (self.files.load(Ordering::Relaxed), self.bytes.load(Ordering::Relaxed))
    }
}

/// Whether rclone's own listing has it under its name, and it is there under that when it is whole.
fn comes_in_bulk(wanted: &Wanted) -> bool {
    wanted.path.is_plain() && !wanted.path.name().ends_with(b".rclonelink")
}

/// Whether these are so many of all that the rest may come along: nobody has to be told names then.
fn is_nearly((files, bytes): (u64, u64), all: Totals) -> bool {
    files >= most(all.files) && bytes >= most(all.bytes)
}

fn most(of: u64) -> u64 {
    of - of / 10
}

/// What is wrong with an object that cannot be had, as far as trying again cannot help.
pub(crate) fn lost(fault: &Fault) -> Option<&'static str> {
    match fault {
        Fault::Missing => Some("its object is missing from the bucket"),
        Fault::WrongKey(_) => Some("its object does not decrypt: it was damaged or replaced"),
        _ => None,
    }
}

pub(crate) struct Fetcher<'a> {
    pub(crate) bucket: &'a Bucket,
    /// All that the bucket has.
    pub(crate) whole: Totals,
    /// Where parts lie while they are fetched; on the same volume as the target.
    pub(crate) parts: PathBuf,
    /// Told what is done: files and bytes.
    pub(crate) progress: &'a (dyn Fn(u64, u64) + Sync),
}

impl Fetcher<'_> {
    /// The same as [`Self::files`], when nothing else is done until they are there.
    pub(crate) fn files_in_haste(&self, wanted: Vec<Wanted>, root: &FsPath) -> Result<Vec<Got>, Fault> {
        Rclone::in_haste(|| self.files(wanted, root))
    }

    /// Fetches all of these files into place below `root`.
    pub(crate) fn files(&self, wanted: Vec<Wanted>, root: &FsPath) -> Result<Vec<Got>, Fault> {
        let (empty, wanted): (Vec<_>, Vec<_>) =
            wanted.into_iter().partition(|w| w.may_be.iter().all(|e| e.size() == 0 && e.sha().is_some()));
        fs::create_dir_all(root)?;
        let done = Done::default();
        let mut got = Vec::new();
        for wanted in empty {
            got.push(place_empty(&wanted, root));
            done.and(&wanted);
        }
        fs::create_dir_all(&self.parts)?;
        let (plain, odd): (Vec<_>, Vec<_>) = wanted.into_iter().partition(comes_in_bulk);
        let (mut few, many) =
            if plain.len() > FEW { (odd, plain) } else { ([odd, plain].concat(), Vec::new()) };
        if !many.is_empty() {
            few.extend(self.bulk(many, root, &done, &mut got)?);
        }
        let numbered: Vec<_> = few.into_iter().enumerate().collect();
        got.extend(parallel::each(numbered, PARALLEL as usize / 2, |(number, wanted)| {
            let part = self.parts.join(format!("one-{number}"));
            let got = self.single(&wanted, &part, root);
            let (files, bytes) = done.and(&wanted);
            (self.progress)(files, bytes);
            got
        }));
        Ok(got)
    }

    /// These in one call of rclone's, which lists the bucket and fetches many at a time; what has come
    /// is checked and put in place while the rest comes. Yields those that are to be fetched once more,
    /// alone: why they did not come, or not as they should be, is not known.
    fn bulk(
        &self,
        wanted: Vec<Wanted>,
        root: &FsPath,
        done: &Done,
        got: &mut Vec<Got>,
    ) -> Result<Vec<Wanted>, Fault> {
        let bulk = self.parts.join("bulk");
        fs::create_dir_all(&bulk)?;
        let mut awaited: HashMap<PathBuf, Wanted> =
            wanted.into_iter().map(|one| (one.path.below(&bulk), one)).collect();
        let mut again = Vec::new();
        let mut put_in_place = |awaited: &mut HashMap<PathBuf, Wanted>, come: Vec<PathBuf>| {
            let come = come.into_iter().filter_map(|part| awaited.remove_entry(&part)).collect();
            for (wanted, placed) in parallel::each(come, CHECKERS, |(part, wanted)| {
                let placed = place(&wanted, &part, root);
                if placed.is_ok() {
                    done.and(&wanted);
                } else {
                    let _ = fs::remove_file(&part);
                }
                (wanted, placed)
            }) {
                match placed {
                    Ok(entry) => got.push(Got::Good(wanted.path, entry)),
                    Err(_) => again.push(wanted),
                }
            }
        };
        // What an earlier try has fetched need not be fetched again, if it shows whether it is whole.
        let is_told = |wanted: &Wanted| wanted.may_be.iter().all(|entry| entry.sha().is_some());
        let (come, others): (Vec<_>, Vec<_>) =
            files_below(&bulk)?.into_iter().partition(|part| awaited.get(part).is_some_and(is_told));
        others.iter().try_for_each(fs::remove_file)?;
        put_in_place(&mut awaited, come);
        let left: Vec<&Wanted> = awaited.values().collect();
        let all = is_nearly(total(left.iter().copied()), self.whole);
        let names = if all { None } else { Some(self.name(&left)?) };
        let before = Rclone::transferred();
        let whole = std::thread::scope(|scope| -> Result<_, Fault> {
            let rclone = scope.spawn(|| self.bucket.rclone.download_many(names.as_deref(), &bulk, PARALLEL));
            loop {
                let (is_all, began) = (rclone.is_finished(), Instant::now());
                let come = files_below(&bulk)?;
                let looked = began.elapsed();
                put_in_place(&mut awaited, come);
                if is_all {
                    break;
                }
                let (files, bytes) = done.so_far();
                // A large file is on its way for long.
                (self.progress)(files, bytes.max(Rclone::transferred().saturating_sub(before)));
                std::thread::sleep(LOOK.max(looked));
            }
            Ok(rclone.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
        again.extend(awaited.into_values());
        match whole {
            // What is missing or damaged shows when each file is fetched alone; what is unreachable
            // is unreachable for all of them.
            Err(
                fault @ (Fault::Unreachable(_)
                | Fault::Denied(_)
                | Fault::Tls(_)
                | Fault::Disk(_)
                | Fault::NoBucket),
            ) if !again.is_empty() => Err(fault),
            _ => Ok(again),
        }
    }

    /// A list of them for rclone.
    fn name(&self, wanted: &[&Wanted]) -> Result<PathBuf, Fault> {
        let mut lines = Vec::new();
        for one in wanted {
            lines.extend_from_slice(one.path.as_bytes());
            lines.push(b'\n');
        }
        let names = self.parts.join("names");
        fs::write(&names, lines)?;
        Ok(names)
    }

    fn single(&self, wanted: &Wanted, part: &FsPath, root: &FsPath) -> Got {
        let _ = fs::remove_file(part);
        let name = part.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match self.bucket.rclone.download(&wanted.path.object(), &self.parts, &name) {
            Ok(()) => {}
            Err(fault) => {
                return match lost(&fault) {
                    Some(why) => Got::Bad(wanted.path.clone(), why.to_owned()),
                    None => Got::Later(wanted.path.clone(), fault),
                };
            }
        }
        match place(wanted, part, root) {
            Ok(entry) => Got::Good(wanted.path.clone(), entry),
            Err(Fault::Suspicious(why)) => {
                let _ = fs::remove_file(part);
                Got::Bad(wanted.path.clone(), why)
            }
            Err(fault) => Got::Later(wanted.path.clone(), fault),
        }
    }
}

/// What has been fetched survives a loss of power from here on. Before it is known as that: a file
/// that comes back cut or empty would be taken for a change.
pub(crate) fn settle_on_disk(root: &FsPath) -> Result<(), Fault> {
    Ok(nix::unistd::syncfs(fs::File::open(root)?)?)
}

/// Into its place, if it is what it should be.
fn place(wanted: &Wanted, part: &FsPath, root: &FsPath) -> Result<Entry, Fault> {
    let (size, sha) = stage::hash(part)?;
    let entry = verified(wanted, size, sha)?;
    let parent = Within::make(root, wanted.path.parent().as_ref())?;
    let to = parent.name(wanted.path.name());
    fs::rename(part, &to)?;
    volume::dress(&to, &entry)?;
    Ok(entry)
}

/// Which of its possible entries a fetched object is.
pub(crate) fn verified(wanted: &Wanted, size: u64, sha: Digest) -> Result<Entry, Fault> {
    for entry in &wanted.may_be {
        match entry.kind {
            Kind::File { size: s, sha: Some(expected), .. } if s == size && expected == sha => {
                return Ok(entry.clone());
            }
            // Adopted: whatever decrypts is what it was.
            Kind::File { sha: None, database, .. } => {
                let kind = Kind::File { size, sha: Some(sha), database };
                return Ok(Entry { kind, ..entry.clone() });
            }
            _ => {}
        }
    }
    Err(Fault::Suspicious(unlike(size, wanted.size())))
}

/// What is wrong with an object that has this size, and is not what it should be.
pub(crate) fn unlike(size: u64, expected: u64) -> String {
    if size == expected {
        "its object has other content than the manifest says: replaced, swapped, or an older version"
            .to_owned()
    } else {
        format!(
            "its object has {size} bytes, the manifest says {expected}: cut, replaced, swapped, or an older version"
        )
    }
}

fn place_empty(wanted: &Wanted, root: &FsPath) -> Got {
    let Some(entry) = wanted.may_be.first() else {
        return Got::Bad(wanted.path.clone(), "the manifest has no entry for it".to_owned());
    };
    let place = || -> Result<(), Fault> {
        let parent = Within::make(root, wanted.path.parent().as_ref())?;
        let to = parent.name(wanted.path.name());
        let _ = fs::remove_file(&to);
        fs::OpenOptions::new().write(true).create_new(true).open(&to)?;
        volume::dress(&to, entry)
    };
    match place() {
        Ok(()) => Got::Good(wanted.path.clone(), entry.clone()),
        Err(fault) => Got::Later(wanted.path.clone(), fault),
    }
}

/// All files in a directory of ours in which another may be writing.
fn files_below(top: &FsPath) -> Result<Vec<PathBuf>, Fault> {
    let (mut files, mut directories) = (Vec::new(), vec![top.to_owned()]);
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(entry.path()),
                Ok(_) => files.push(entry.path()),
                // It has another name by now.
                Err(_) => {}
            }
        }
    }
    Ok(files)
}

/// Directories and symbolic links, which are nowhere but in the manifest. Directories get their
/// final looks by [`finish`], because filling them changes their times.
pub(crate) fn skeleton(entries: &[(Path, Entry)], root: &FsPath) -> Result<(), Fault> {
    for (path, entry) in entries {
        match &entry.kind {
            Kind::Directory => drop(Within::make(root, Some(path))?),
            Kind::Symlink { target } => {
                let parent = Within::make(root, path.parent().as_ref())?;
                let at = parent.name(path.name());
                let _ = fs::remove_file(&at);
                std::os::unix::fs::symlink(std::ffi::OsStr::from_bytes(target), &at)?;
                volume::dress(&at, entry)?;
            }
            Kind::File { .. } => {}
        }
    }
    Ok(())
}

/// Joins what was one file under several names, and dresses the directories, the deepest first. `parts`
/// is ours and on the same volume: in the tree any name may be the agent's.
pub(crate) fn finish(entries: &[(Path, Entry)], root: &FsPath, parts: &FsPath) -> Result<(), Fault> {
    let mut groups: HashMap<u64, Vec<&Path>> = HashMap::new();
    for (path, entry) in entries {
        if let (Some(link), Kind::File { .. }) = (entry.link, &entry.kind) {
            groups.entry(link).or_default().push(path);
        }
    }
    for paths in groups.values() {
        // What did not come back, or cannot be read by a plain user, is joined with nothing.
        let mut there = paths.iter().filter_map(|path| {
            let parent = Within::open(root, path.parent().as_ref()).ok()?;
            let content = stage::hash(&parent.name(path.name())).ok()?;
            Some((path, parent, content))
        });
        let Some((first, from, one)) = there.next() else { continue };
        for (path, to, _) in there.filter(|(_, _, other)| *other == one) {
            // Both are whole: that they are one file is all that can be lost.
            if let Err(error) = join(&from.name(first.name()), &to.name(path.name()), parts) {
                tracing::warn!("not joined with {first}, which is the same file: {path}: {error}");
            }
        }
    }
    dress_directories(entries, root)
}

fn join(one: &FsPath, other: &FsPath, parts: &FsPath) -> std::io::Result<()> {
    fs::create_dir_all(parts)?;
    let link = parts.join("link");
    let _ = fs::remove_file(&link);
    fs::hard_link(one, &link)?;
    fs::rename(&link, other)?;
    // Where they are one already, it is still there, a name too many.
    match fs::remove_file(link) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

pub(crate) fn dress_directories(entries: &[(Path, Entry)], root: &FsPath) -> Result<(), Fault> {
    let mut directories: Vec<_> = entries.iter().filter(|(_, e)| e.kind == Kind::Directory).collect();
    directories.sort_by_key(|(path, _)| std::cmp::Reverse(path.as_bytes().split(|b| *b == b'/').count()));
    for (path, entry) in directories {
        volume::dress(&Within::open(root, Some(path))?.itself(), entry)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(sizes: &[u64]) -> (u64, u64) {
        (sizes.len() as u64, sizes.iter().sum())
    }

    #[test]
    fn no_name_of_the_agents_is_in_the_way_of_files_that_are_one() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let [root, parts] = ["tree", "parts"].map(|name| dir.path().join(name));
        fs::create_dir_all(root.join("x")).unwrap();
        fs::create_dir(&parts).unwrap();
        // As a restore that was killed has left it.
        fs::write(parts.join("link"), "another").unwrap();
        let mut entries = Vec::new();
        for (name, link) in
            [("a", Some(1)), ("b", Some(1)), (".cvm-link", None), ("c", Some(2)), ("d", Some(2))]
        {
            fs::write(root.join("x").join(name), "12").unwrap();
            let kind = Kind::File { size: 2, sha: None, database: false };
            let entry = Entry { kind, mode: 0o600, uid: 0, gid: 0, mtime_ns: 0, link };
            entries.push((Path::new(format!("x/{name}").as_bytes()).unwrap(), entry));
        }
        fs::write(root.join("x/d"), "34").unwrap();
        finish(&entries, &root, &parts).unwrap();
        let number = |name: &str| fs::metadata(root.join("x").join(name)).unwrap().ino();
        assert_eq!(number("a"), number("b"));
        assert!(number("c") != number("d") && number(".cvm-link") != number("a"));
        assert_eq!(fs::read_dir(root.join("x")).unwrap().count(), 5);
        // Once more, as after a restore that was killed: no name of ours stays.
        finish(&entries, &root, &parts).unwrap();
        assert_eq!(number("a"), number("b"));
        assert_eq!(fs::read_dir(&parts).unwrap().count(), 0);
        // Where nothing can be joined, everything is there all the same.
        fs::remove_file(root.join("x/b")).unwrap();
        fs::write(root.join("x/b"), "12").unwrap();
        finish(&entries, &root, std::path::Path::new("/proc/none")).unwrap();
        assert!(number("a") != number("b"));
    }

    #[test]
    fn the_whole_bucket_comes_only_when_nearly_all_of_it_is_wanted() {
        let all = Totals { files: 20, bytes: 2000 };
        assert!(is_nearly(sum(&[100; 20]), all));
        assert!(is_nearly(sum(&[100; 18]), all));
        assert!(!is_nearly(sum(&[100; 17]), all));
        assert!(!is_nearly(sum(&[1; 19]), all), "one large file is the rest");
        assert!(!is_nearly(sum(&[2000]), all), "all but one small ones are the rest");
    }
}
