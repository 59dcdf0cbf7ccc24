//! Whether one state of a database on this volume is an earlier one than another of the same file.
//!
//! ```text
//! the same log          it only grows: an earlier state has fewer committed frames, and nothing behind them
//! another log           each one that follows in the same file has the next number
//! no log                the counter in the file's header is lower, and so is the time of its last change
//! ```
//!
//! Nothing is earlier whose file has changed since the other state: somebody has put it there, or a log was
//! written back into it.
//!
//! What is not proven to be earlier is not.

use crate::copying;
use crate::entry::Path;
use crate::volume;
use cvm_sqlite_log::{self as sqlite_log, Behind, Next};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, BufReader, ErrorKind};
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path as FsPath;

/// Where a database's file counts its changes.
const COUNTER: u64 = 24;

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
    /// Behind its frames the file ends, or has never been written. A log that is begun anew is written over
    /// the one before, and a cut in the middle of that leaves frames of both.
    ends_in_nothing: bool,
}

impl State {
    /// Nothing, where that is not clear.
    pub(crate) fn of(top: &FsPath, path: &Path) -> Option<Self> {
        let read = |file: File| {
            let stat = file.metadata().ok()?;
            let changed = stat.ctime().saturating_mul(1_000_000_000).saturating_add(stat.ctime_nsec());
            // One that has only begun has a log and no header.
            let mut counter = [0; 4];
            let has_header = file.read_exact_at(&mut counter, COUNTER).is_ok();
            Some((changed, if has_header { u32::from_be_bytes(counter) } else { 0 }))
        };
        let (changed, counter) = copying::open(top, path, read).ok()???;
        Some(Self { changed, counter, log: Log::of(top, path).ok()? })
    }

    /// When the database's file has changed.
    pub(crate) fn changed(&self) -> i64 {
        self.changed
    }

    pub(crate) fn without_log(self) -> Self {
        Self { log: None, ..self }
    }

    pub(crate) fn is_earlier_than(&self, then: &Self) -> bool {
        if self.changed > then.changed {
            return false;
        }
        match (self.log, then.log) {
            (Some(now), Some(then)) => now.is_earlier_than(&then),
            // It may hold what came later.
            (Some(_), None) => false,
            (None, _) => self.changed < then.changed && is_before(self.counter, then.counter),
        }
    }
}

fn is_before(now: u32, then: u32) -> bool {
    now != then && then.wrapping_sub(now) < u32::MAX / 2
}

impl Log {
    fn of(top: &FsPath, database: &Path) -> io::Result<Option<Self>> {
        let path = Path::new(&[database.as_bytes(), b"-wal"].concat()).ok_or(ErrorKind::InvalidInput)?;
        let file = match volume::open_below(top, &path) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if file.metadata()?.len() == 0 {
            return Ok(None);
        }
        let mut log = sqlite_log::Log::open(BufReader::new(file))?.ok_or(ErrorKind::InvalidData)?;
        let (mut frames, mut committed) = (0, 0);
        let behind = loop {
            match log.next_frame()? {
                Next::End(behind) => break behind,
                Next::Frame(frame) => {
                    frames += 1;
                    committed = if frame.commits { frames } else { committed };
                }
            }
        };
        Ok(Some(Self {
            number: log.number(),
            salts: log.salts(),
            frames: committed,
            ends_in_nothing: behind == Behind::Nothing,
        }))
    }

    fn is_earlier_than(&self, then: &Self) -> bool {
        let later = then.number.wrapping_sub(self.number);
        if later == 0 {
            return self.salts == then.salts && self.frames < then.frames && self.ends_in_nothing;
        }
        // The first of the salts is counted up with the number.
        later < u32::MAX / 2 && then.salts[0].wrapping_sub(self.salts[0]) == later
    }
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
    /// With its header.
    const FRAME: usize = 24 + 4096;

    #[test]
    fn fewer_frames_of_the_same_log_are_an_earlier_state_where_nothing_is_behind_them() {
        let bench = Bench::new(WAL);
        bench.row();
        let early = bench.state();
        bench.row();
        let late = bench.state();
        assert!(
            early.is_earlier_than(&late) && !late.is_earlier_than(&early) && !late.is_earlier_than(&late)
        );
        bench.on_disk("cut");
        let log = bench.dir.path().join("cut-wal");
        let cut = || State { changed: late.changed, ..bench.of("cut") };
        assert_eq!(cut().log, late.log);
        // A frame that something else was written over need not be lost: all of it may be in the database.
        let whole = fs::read(&log).unwrap();
        let last = whole.len() - 1;
        let mut bytes = whole.clone();
        bytes[last] ^= 1;
        fs::write(&log, &bytes).unwrap();
        assert!(cut().log.unwrap().frames < late.log.unwrap().frames && !cut().is_earlier_than(&late));
        // One that was never written, or is cut off, is lost.
        bytes[last + 1 - FRAME..].fill(0);
        fs::write(&log, &bytes).unwrap();
        assert!(cut().is_earlier_than(&late));
        fs::write(&log, &whole[..last]).unwrap();
        assert!(cut().is_earlier_than(&late));
        // What is no log says nothing.
        fs::write(&log, [7; 64]).unwrap();
        assert_eq!(State::of(bench.dir.path(), &Path::new(b"cut").unwrap()), None);
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
        let back = State { changed: next.changed, ..before };
        assert!(back.is_earlier_than(&next), "{before:?} {next:?}");
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
    fn without_a_log_both_the_counter_and_the_time_are_earlier_or_nothing_is() {
        let bench = Bench::new("PRAGMA journal_mode=DELETE");
        bench.row();
        let early = bench.state();
        bench.row();
        let late = bench.state();
        let back = State { changed: late.changed - 1, ..early };
        assert!(back.is_earlier_than(&late) && !late.is_earlier_than(&back));
        for unclear in [
            State { changed: late.changed, ..early },
            State { changed: late.changed + 1, ..early },
            State { changed: late.changed - 1, ..late },
        ] {
            assert!(!unclear.is_earlier_than(&late), "{unclear:?}");
        }
        // A log that was not there then may hold what came later.
        let wal = Bench::new(WAL).state();
        assert!(!State { log: wal.log, ..back }.is_earlier_than(&late));
    }

    #[test]
    fn an_index_of_the_log_that_the_power_left_behind_says_nothing() {
        let bench = Bench::new(WAL);
        let beside = |suffix: &str| bench.dir.path().join(format!("db{suffix}"));
        for _ in 0..100 {
            bench.row();
        }
        let left_behind = fs::read(beside("-shm")).unwrap();
        for _ in 0..50 {
            bench.row();
        }
        let pushed = bench.state();
        for _ in 0..10 {
            bench.row();
        }
        bench.on_disk("cut");
        fs::write(bench.dir.path().join("cut-shm"), left_behind).unwrap();
        let now = State { changed: pushed.changed, ..bench.of("cut") };
        assert!(!now.is_earlier_than(&pushed), "{now:?} {pushed:?}");
    }

    #[test]
    fn a_log_that_shows_to_be_later_is_later_whatever_the_times_say() {
        let bench = Bench::new(WAL);
        bench.row();
        let before = bench.state();
        bench.db.query_row("PRAGMA wal_checkpoint(RESTART)", [], |_| Ok(())).unwrap();
        bench.row();
        for changed in [before.changed, before.changed - 1] {
            assert!(!State { changed, ..bench.state() }.is_earlier_than(&before));
        }
    }

    #[test]
    fn one_that_was_written_to_since_is_believed_however_old_its_content_is() {
        for pragmas in ["PRAGMA journal_mode=DELETE", WAL] {
            let bench = Bench::new(pragmas);
            bench.row();
            bench.on_disk("backup");
            bench.row();
            let pushed = bench.state();
            let backup = bench.dir.path().join("backup");
            while bench.of("backup").changed <= pushed.changed {
                fs::write(&backup, fs::read(&backup).unwrap()).unwrap();
            }
            let mut now = bench.of("backup");
            assert!(!now.is_earlier_than(&pushed), "{pragmas}");
            now.changed = pushed.changed - 1;
            assert!(now.is_earlier_than(&pushed), "{pragmas}: by its time alone it is believed");
        }
    }
}
