//! What the bucket has is on the disk first. What only the kernel's memory has is gone when the power
//! goes, and the next boot would push the older state of the disk over the newer one in the bucket.
//!
//! ```text
//! before a file is looked at    its content: a page that is written out is clean, and the next store
//!                               to it changes the file's times, also a store through a mapping
//! before an intent is written   content once more, the log or journal of a database, names and looks
//! before a removal is written   the directories from which something is gone
//! ```
//!
//! Many files are written out with the whole volume, a few one by one. May import: `copying`, `entry`,
//! `fault`, `index`, `manifest`, `volume`.

use crate::copying;
use crate::entry::{Kind, Path};
use crate::fault::Fault;
use crate::index::Index;
use crate::manifest::{Line, Word};
use crate::volume::{self, Volume, Within};
use std::collections::BTreeSet;
use std::fs::File;

/// So many files are written out one by one; more of them with the whole volume.
pub(crate) const ONE_BY_ONE: usize = 16;

/// The log of a database, and the journal: `SQLite` does not always write them out when it commits.
const BESIDE: [&[u8]; 2] = [b"-wal", b"-journal"];

/// All that the kernel has in memory of the volume's file system.
pub(crate) fn write_out_everything(volume: &Volume) -> Result<(), Fault> {
    Ok(nix::unistd::syncfs(File::open(&volume.upper)?)?)
}

/// The content of one file, if there is one.
pub(crate) fn write_out(volume: &Volume, path: &Path) -> Result<(), Fault> {
    match copying::open(&volume.upper, path, |file| file.sync_all()) {
        Ok(Some(written)) => Ok(written?),
        // One that is copied just now is written out by who copies it; and what cannot be opened, nobody
        // sends.
        Ok(None) | Err(_) => Ok(()),
    }
}

/// All that these lines say is on the disk when this returns. What is gone or replaced meanwhile is the
/// next scan's.
pub(crate) fn settle(volume: &Volume, index: &Index, lines: &[Line]) -> Result<(), Fault> {
    if lines.len() > ONE_BY_ONE {
        return write_out_everything(volume);
    }
    let mut directories = BTreeSet::new();
    for Line { path, word } in lines {
        if let Word::Is(entry) | Word::WillBe(entry) = word {
            match entry.kind {
                Kind::File { database, .. } => {
                    write_out(volume, path)?;
                    if database {
                        write_out_what_is_beside(volume, path)?;
                    }
                }
                Kind::Directory => _ = directories.insert(Some(path.clone())),
                // All there is to it is in its directory.
                Kind::Symlink { .. } => {}
            }
        }
        // A name is in a directory whose own name may be as new.
        let mut above = path.parent();
        directories.insert(above.clone());
        while let Some(dir) = above {
            let is_told = index.get(&dir)?.is_some_and(|row| row.entry.kind == Kind::Directory);
            above = dir.parent();
            if is_told {
                break;
            }
            directories.insert(above.clone());
        }
    }
    for dir in directories {
        if let Ok(dir) = Within::open(&volume.upper, dir.as_ref()).and_then(|dir| File::open(dir.itself())) {
            dir.sync_all()?;
        }
    }
    Ok(())
}

fn write_out_what_is_beside(volume: &Volume, database: &Path) -> Result<(), Fault> {
    for suffix in BESIDE {
        let name = Path::new(&[database.as_bytes(), suffix].concat());
        // No locks of SQLite's are on them that closing one would drop.
        if let Some(Ok(file)) = name.map(|name| volume::open_below(&volume.upper, &name)) {
            file.sync_all()?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Entry;

    #[test]
    fn what_is_not_there_or_no_file_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let index = Index::open(&volume.own.join("index")).unwrap();
        std::fs::create_dir(dir.path().join("d")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("d/pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let kind = |database| Kind::File { size: 1, sha: None, database };
        let is = |kind| Word::Is(Entry { kind, mode: 0, uid: 0, gid: 0, mtime_ns: 0, link: None });
        for (name, word) in [
            ("d/pipe", is(kind(false))),
            ("d/gone", is(kind(true))),
            ("d/gone", Word::Gone),
            ("no/where/at/all", Word::Gone),
            ("d", is(Kind::Directory)),
        ] {
            let line = Line { path: Path::new(name.as_bytes()).unwrap(), word };
            assert_eq!(settle(&volume, &index, &[line]), Ok(()), "{name}");
        }
    }
}
