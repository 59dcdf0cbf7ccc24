//! Which of two states of a database on this volume is the later one, as far as its files tell.
//!
//! ```text
//! the same log             it only grows: fewer committed frames are an earlier state
//! another log              each one that follows in the same file has the next number
//! no log any more          what was in it went into the database's file, which has changed since then
//! no log then and now      the counter in the file's header grows with each transaction
//! ```
//!
//! Refuses to write, to wait for locks, and to guess: what does not show to be earlier is not.
//! May import: `copying`, `entry`, `volume`.

use crate::copying;
use crate::entry::Path;
use crate::volume;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufReader, Read};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path as FsPath;

/// Of the log's header, of each frame's, and of the index beside it.
const HEADER: usize = 32;
const FRAME: usize = 24;
const SHARED: usize = 136;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct State {
    /// When the database's file has changed, in nanoseconds: nobody but the clock sets that.
    changed: i64,
    counter: u32,
    log: Option<Log>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Log {
    number: u32,
    salts: [u32; 2],
    /// Committed ones.
    frames: u32,
    /// All of them are in the database's file too.
    is_written_back: bool,
}

impl State {
    pub(crate) fn of(top: &FsPath, path: &Path) -> Option<Self> {
        let read = |file: File| {
            let stat = file.metadata().ok()?;
            let changed = stat.ctime().saturating_mul(1_000_000_000).saturating_add(stat.ctime_nsec());
            // One that has only begun has a log and no header.
            let mut head = [0; 28];
            let counter = file.read_exact_at(&mut head, 0).ok().and_then(|()| big(&head, 24));
            Some((changed, counter.unwrap_or(0)))
        };
        let (changed, counter) = copying::open(top, path, read).ok()???;
        Some(Self { changed, counter, log: Log::of(top, path) })
    }

    /// When the database's file has changed.
    pub(crate) fn changed(&self) -> i64 {
        self.changed
    }

    pub(crate) fn is_earlier_than(&self, then: &Self) -> bool {
        let had = then.log.filter(|log| log.frames > 0 && !log.is_written_back);
        let has = self.log.filter(|log| log.frames > 0);
        if let (Some(now), Some(then)) = (self.log, then.log) {
            let later = then.number.wrapping_sub(now.number);
            if later == 0 && now.salts == then.salts {
                return now.frames < then.frames;
            }
            // The first of the salts is counted up with the number.
            let [now_salt, then_salt] = [now.salts[0], then.salts[0]];
            if later > 0 && later < u32::MAX / 2 && then_salt.wrapping_sub(now_salt) == later {
                return true;
            }
        }
        match (had, has) {
            (Some(_), _) => self.changed <= then.changed,
            (None, None) => self.changed < then.changed || is_before(self.counter, then.counter),
            (None, Some(_)) => self.changed < then.changed,
        }
    }
}

fn is_before(now: u32, then: u32) -> bool {
    now != then && then.wrapping_sub(now) < u32::MAX / 2
}

impl Log {
    fn of(top: &FsPath, database: &Path) -> Option<Self> {
        let beside = |suffix: &[u8]| {
            let path = Path::new(&[database.as_bytes(), suffix].concat())?;
            volume::open_below(top, &path).ok()
        };
        let file = beside(b"-wal")?;
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0).ok()?;
        let (magic, number) = (big(&header, 0)?, big(&header, 12)?);
        let salts = [big(&header, 16)?, big(&header, 20)?];
        if magic & !1 != 0x377f_0682 {
            return None;
        }
        let known = beside(b"-shm").and_then(|shared| counted(&shared, salts));
        let (frames, is_written_back) = match known {
            Some((frames, written_back)) => (frames, written_back >= frames),
            None => (count(file, &header)?, false),
        };
        Some(Self { number, salts, frames, is_written_back })
    }
}

/// What the index beside a log says while the database is open: frames, and those written back.
fn counted(shared: &File, salts: [u32; 2]) -> Option<(u32, u32)> {
    let mut bytes = [0; SHARED];
    shared.read_exact_at(&mut bytes, 0).ok()?;
    let native = |at: usize| Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    // Whoever writes it writes it twice.
    let is_whole = bytes.get(..48)? == bytes.get(48..96)? && bytes.get(12) == Some(&1);
    let its_salts = [big(&bytes, 32)?, big(&bytes, 36)?];
    (is_whole && its_salts == salts).then_some((native(16)?, native(96)?))
}

/// Committed frames whose sums are right.
fn count(log: File, header: &[u8; HEADER]) -> Option<u32> {
    let is_big = big(header, 0)? & 1 == 1;
    let page = usize::try_from(big(header, 8)?).ok().filter(|size| (512..=65536).contains(size))?;
    let mut sum = summed([0, 0], header.get(..24)?, is_big);
    if sum != [big(header, 24)?, big(header, 28)?] {
        return None;
    }
    let mut log = BufReader::new(log);
    log.read_exact(&mut [0; HEADER]).ok()?;
    let mut frame = vec![0; FRAME + page];
    let (mut frames, mut committed) = (0, 0);
    while log.read_exact(&mut frame).is_ok() && frame.get(8..16) == header.get(16..24) {
        sum = summed(summed(sum, frame.get(..8)?, is_big), frame.get(FRAME..)?, is_big);
        if sum != [big(&frame, 16)?, big(&frame, 20)?] {
            break;
        }
        frames += 1;
        if big(&frame, 4)? != 0 {
            committed = frames;
        }
    }
    Some(committed)
}

/// `SQLite`'s sum of a log, in the order of bytes that the log's header names.
fn summed([mut one, mut two]: [u32; 2], bytes: &[u8], is_big: bool) -> [u32; 2] {
    let word = |bytes: &[u8]| {
        let bytes = bytes.try_into().unwrap_or_default();
        if is_big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }
    };
    for (first, second) in bytes.chunks_exact(8).map(|eight| eight.split_at(4)) {
        one = one.wrapping_add(word(first)).wrapping_add(two);
        two = two.wrapping_add(word(second)).wrapping_add(one);
    }
    [one, two]
}

fn big(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;
    use std::fs;

    /// A database, and copies of it as they were at one moment or another.
    struct Bench {
        dir: tempfile::TempDir,
        db: Connection,
    }

    impl Bench {
        fn new(pragmas: &str) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let db = Connection::open(dir.path().join("db")).unwrap();
            db.execute_batch(&format!("{pragmas}; CREATE TABLE t(x)")).unwrap();
            Self { dir, db }
        }

        fn row(&self) {
            self.db.execute("INSERT INTO t VALUES (1)", []).unwrap();
        }

        fn state(&self) -> State {
            State::of(self.dir.path(), &Path::new(b"db").unwrap()).unwrap()
        }

        /// As a disk has it, which has no index of the log.
        fn on_disk(&self, name: &str) {
            for suffix in ["", "-wal"] {
                let from = self.dir.path().join(format!("db{suffix}"));
                if from.exists() {
                    fs::copy(from, self.dir.path().join(format!("{name}{suffix}"))).unwrap();
                }
            }
        }

        fn of(&self, name: &str) -> State {
            State::of(self.dir.path(), &Path::new(name.as_bytes()).unwrap()).unwrap()
        }
    }

    const WAL: &str = "PRAGMA journal_mode=WAL; PRAGMA wal_autocheckpoint=0";

    #[test]
    fn fewer_frames_of_the_same_log_are_an_earlier_state_with_and_without_its_index() {
        let bench = Bench::new(WAL);
        bench.row();
        bench.on_disk("early");
        let early = bench.state();
        bench.row();
        let late = bench.state();
        bench.on_disk("late");
        assert!(
            early.is_earlier_than(&late) && !late.is_earlier_than(&early) && !late.is_earlier_than(&late)
        );
        assert_eq!(bench.of("late").log.unwrap().frames, late.log.unwrap().frames);
        assert!(bench.of("early").is_earlier_than(&late) && !bench.of("late").is_earlier_than(&late));
        // A frame that is torn, and those after it, are not there.
        let log = bench.dir.path().join("late-wal");
        let mut bytes = fs::read(&log).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&log, bytes).unwrap();
        assert!(bench.of("late").is_earlier_than(&late));
        // And so is a log that is gone, while the file is as it was.
        fs::remove_file(log).unwrap();
        let gone = State { changed: late.changed, ..bench.of("late") };
        assert!(gone.is_earlier_than(&late));
    }

    #[test]
    fn what_was_written_back_is_no_earlier_state_and_the_log_before_is() {
        let bench = Bench::new(WAL);
        bench.row();
        let before = bench.state();
        bench.db.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(())).unwrap();
        let written_back = bench.state();
        assert!(!written_back.is_earlier_than(&before));
        bench.row();
        let next = bench.state();
        assert!(!next.is_earlier_than(&before) && !next.is_earlier_than(&written_back));
        assert!(before.is_earlier_than(&next), "{before:?} {next:?}");
        let Bench { dir, db } = bench;
        drop(db);
        let closed = State::of(dir.path(), &Path::new(b"db").unwrap()).unwrap();
        assert!(closed.log.is_none() && !closed.is_earlier_than(&next) && !closed.is_earlier_than(&before));
        // Opened again by somebody, with a log that has nothing to do with the last one.
        let db = Connection::open(dir.path().join("db")).unwrap();
        db.execute("INSERT INTO t VALUES (2)", []).unwrap();
        let again = State::of(dir.path(), &Path::new(b"db").unwrap()).unwrap();
        for then in [before, written_back, next, closed] {
            assert!(!again.is_earlier_than(&then), "{again:?} {then:?}");
        }
    }

    #[test]
    fn without_a_log_the_counter_tells() {
        let bench = Bench::new("PRAGMA journal_mode=DELETE");
        bench.row();
        bench.on_disk("early");
        let early = bench.state();
        bench.row();
        let late = bench.state();
        assert!(early.is_earlier_than(&late) && !late.is_earlier_than(&early));
        assert!(bench.of("early").is_earlier_than(&late), "whatever the time of the file is");
    }
}
