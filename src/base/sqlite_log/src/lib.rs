//! The log of a `SQLite` database in WAL mode, read without `SQLite`
//! (<https://sqlite.org/fileformat2.html#walformat>).
//!
//! Nothing is opened as a database, locked or changed, and `-shm` is not read: after a loss of power it is
//! from any moment.

use std::io::{ErrorKind, Read, Result};

const MAGIC: u32 = 0x377f_0682;
const HEADER: usize = 32;
/// Of each frame; a page follows.
const FRAME_HEADER: usize = 24;

/// A log, frame by frame.
pub struct Log<R> {
    bytes: R,
    header: [u8; HEADER],
    sum: Sum,
    frame: Vec<u8>,
}

/// A page as a transaction has left it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its number in the database; the first page is 1.
    pub page: u32,
    /// The last one of a transaction. What follows the last of these was never committed.
    pub commits: bool,
    pub content: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next<'a> {
    Frame(Frame<'a>),
    End(Behind),
}

/// What lies behind the last frame whose sum is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behind {
    /// The file ends, also in the middle of a frame, or was never written.
    Nothing,
    /// Frames of the log before this one, which is written over, or damage.
    Something,
}

impl<R: Read> Log<R> {
    /// None: this is no log.
    pub fn open(mut bytes: R) -> Result<Option<Self>> {
        let mut header = [0; HEADER];
        bytes.read_exact(&mut header)?;
        let (magic, page_size) = (word(&header, 0), word(&header, 8));
        let is_page_size = (512..=65_536).contains(&page_size) && page_size.is_power_of_two();
        let mut sum = Sum { is_big_endian: magic & 1 == 1, words: [0, 0] };
        sum.add(&header[..24]);
        if magic & !1 != MAGIC || !is_page_size || !sum.is(&header[24..]) {
            return Ok(None);
        }
        let frame = vec![0; FRAME_HEADER + usize::try_from(page_size).unwrap_or_default()];
        Ok(Some(Self { bytes, header, sum, frame }))
    }

    /// Counts the logs of one database file: each that is begun anew has the next number.
    pub fn number(&self) -> u32 {
        word(&self.header, 12)
    }

    /// The first is counted up with the number, the second is random.
    pub fn salts(&self) -> [u32; 2] {
        [word(&self.header, 16), word(&self.header, 20)]
    }

    /// Frames with other salts are those of an earlier log; one with a wrong sum was cut off.
    pub fn next_frame(&mut self) -> Result<Next<'_>> {
        match self.bytes.read_exact(&mut self.frame) {
            Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(Next::End(Behind::Nothing)),
            other => other?,
        }
        let (about, content) = self.frame.split_at(FRAME_HEADER);
        let mut sum = self.sum;
        sum.add(&about[..8]);
        sum.add(content);
        if about[8..16] != self.header[16..24] || !sum.is(&about[16..]) {
            let is_unwritten = self.frame.iter().all(|byte| *byte == 0);
            return Ok(Next::End(if is_unwritten { Behind::Nothing } else { Behind::Something }));
        }
        self.sum = sum;
        Ok(Next::Frame(Frame { page: word(about, 0), commits: word(about, 4) != 0, content }))
    }
}

/// Big-endian, as all numbers of `SQLite`'s formats are. The callers know that it is there.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_be_bytes)
}

/// The running sum of a log, over words in the byte order that the log's header names.
#[derive(Debug, Clone, Copy)]
struct Sum {
    is_big_endian: bool,
    words: [u32; 2],
}

impl Sum {
    fn add(&mut self, bytes: &[u8]) {
        let read = |word: [u8; 4]| {
            if self.is_big_endian { u32::from_be_bytes(word) } else { u32::from_le_bytes(word) }
        };
        let [mut a, mut b] = self.words;
        for &[a0, a1, a2, a3, b0, b1, b2, b3] in bytes.as_chunks().0 {
            a = a.wrapping_add(read([a0, a1, a2, a3])).wrapping_add(b);
            b = b.wrapping_add(read([b0, b1, b2, b3])).wrapping_add(a);
        }
        self.words = [a, b];
    }

    fn is(&self, written: &[u8]) -> bool {
        self.words == [word(written, 0), word(written, 4)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;

    /// The log of a database to which `sql` was said.
    fn log_of(sql: &str) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let db = Connection::open(dir.path().join("db")).unwrap();
        db.execute_batch("PRAGMA page_size=512; PRAGMA journal_mode=WAL; PRAGMA wal_autocheckpoint=0")
            .unwrap();
        db.execute_batch(sql).unwrap();
        std::fs::read(dir.path().join("db-wal")).unwrap()
    }

    /// Pages and commits, and what is behind them.
    fn read(log: &[u8]) -> (Vec<(u32, bool)>, Behind) {
        let mut log = Log::open(log).unwrap().unwrap();
        let mut frames = Vec::new();
        loop {
            match log.next_frame().unwrap() {
                Next::Frame(Frame { page, commits, content }) => {
                    assert_eq!(content.len(), 512);
                    frames.push((page, commits));
                }
                Next::End(behind) => return (frames, behind),
            }
        }
    }

    const TWO_COMMITS: &str = "CREATE TABLE t(x); INSERT INTO t VALUES (1)";

    #[test]
    fn the_frames_of_a_log_are_read_up_to_where_it_was_cut_or_damaged() {
        let log = log_of(TWO_COMMITS);
        let (all, behind) = read(&log);
        assert_eq!((&all[..], behind), (&[(1, false), (2, true), (2, true)][..], Behind::Nothing));
        for cut in HEADER..log.len() {
            let whole = (cut - HEADER) / (FRAME_HEADER + 512);
            assert_eq!(read(&log[..cut]), (all[..whole].to_vec(), Behind::Nothing), "{cut}");
            let mut damaged = log.clone();
            damaged[cut] ^= 1;
            assert_eq!(read(&damaged), (all[..whole].to_vec(), Behind::Something), "{cut}");
        }
        let unwritten = [&log[..], &[0; FRAME_HEADER + 512]].concat();
        assert_eq!(read(&unwritten), (all, Behind::Nothing));
    }

    #[test]
    fn what_is_no_log_is_told_from_one() {
        let log = log_of(TWO_COMMITS);
        for at in 0..HEADER {
            let mut damaged = log.clone();
            damaged[at] ^= 0x40;
            assert!(Log::open(&damaged[..]).unwrap().is_none(), "{at}");
        }
        assert!(Log::open(&log[..HEADER - 1]).is_err());
    }

    #[test]
    fn a_log_that_is_begun_anew_has_the_next_number_and_the_old_frames_behind_its_own() {
        let insert = "INSERT INTO t VALUES (zeroblob(5000))";
        let first = format!("CREATE TABLE t(x); {insert}");
        let number = |log: &[u8]| Log::open(log).unwrap().unwrap().number();
        let anew = log_of(&format!("{first}; PRAGMA wal_checkpoint(RESTART); INSERT INTO t VALUES (1)"));
        assert_eq!(number(&anew), number(&log_of(&first)) + 1);
        let (frames, behind) = read(&anew);
        assert_eq!((frames.len(), behind), (1, Behind::Something));
    }
}
