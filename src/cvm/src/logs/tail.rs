//! The last lines of a log, over the border between the old file and the current one.
//!
//! Reads backwards in blocks: a log of 10 MiB costs as little as its end.
//! May import: `args`, `sink`, `trouble`, and `super`.

use super::{Log, unreadable};
use crate::args::Lines;
use crate::sink::Sink;
use crate::trouble::Trouble;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;

const BLOCK: u64 = 64 * 1024;

/// Shows the end of the log, and yields the current file, read to where it ended just now.
pub(crate) fn show(log: &Log, lines: Lines, sink: &mut Sink) -> Result<Option<File>, Trouble> {
    // Opened before the old one: if they are exchanged between the two, nothing is seen twice
    // but the current file, which then is the old one, and that is noticed below.
    let mut current = Log::open(&log.path())?;
    let old = Log::open(&log.old_path())?.filter(|old| !current.as_ref().is_some_and(|c| is_same(c, old)));
    let (start, missing) = match (&current, lines) {
        (Some(file), Lines::Last(n)) => start_of_last(file, n).map_err(|e| unreadable(&log.path(), &e))?,
        (_, Lines::All) => (0, usize::MAX),
        (None, Lines::Last(n)) => (0, n),
    };
    if let Some(mut old) = old
        && missing > 0
    {
        let from = match lines {
            Lines::All => 0,
            Lines::Last(_) => start_of_last(&old, missing).map_err(|e| unreadable(&log.old_path(), &e))?.0,
        };
        copy(&mut old, from, sink).map_err(|e| e.trouble(log))?;
    }
    if let Some(file) = &mut current {
        copy(file, start, sink).map_err(|e| e.trouble(log))?;
    }
    Ok(current)
}

pub(crate) fn is_same(a: &File, b: &File) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

/// Where the last `wanted` lines begin, and how many the file lacks of them. A last line
/// without a line break counts.
fn start_of_last(file: &File, wanted: usize) -> std::io::Result<(u64, usize)> {
    let length = file.metadata()?.len();
    if wanted == 0 {
        return Ok((length, 0));
    }
    let mut found = 0;
    let mut end = length;
    let mut block = vec![0; usize::try_from(BLOCK).unwrap_or(usize::MAX)];
    while end > 0 {
        let begin = end.saturating_sub(BLOCK);
        let piece = &mut block[..usize::try_from(end - begin).unwrap_or(usize::MAX)];
        file.read_exact_at(piece, begin)?;
        for (i, byte) in (begin..).zip(piece.iter()).collect::<Vec<_>>().into_iter().rev() {
            // The very last line break ends a line; it does not begin one.
            if *byte == b'\n' && i + 1 < length {
                found += 1;
                if found == wanted {
                    return Ok((i + 1, 0));
                }
            }
        }
        end = begin;
    }
    let lines = if length == 0 { 0 } else { found + 1 };
    Ok((0, wanted - lines))
}

/// Which side of a copy failed.
pub(crate) enum CopyError {
    Reading(std::io::Error),
    Writing(Trouble),
}

impl CopyError {
    pub(crate) fn trouble(self, log: &Log) -> Trouble {
        match self {
            Self::Reading(error) => unreadable(&log.path(), &error),
            Self::Writing(trouble) => trouble,
        }
    }
}

fn copy(file: &mut File, from: u64, sink: &mut Sink) -> Result<(), CopyError> {
    file.seek(SeekFrom::Start(from)).map_err(CopyError::Reading)?;
    copy_rest(file, sink)
}

/// Everything from where the file stands to its end.
pub(crate) fn copy_rest(file: &mut File, sink: &mut Sink) -> Result<(), CopyError> {
    let mut bytes = [0u8; 16 * 1024];
    loop {
        match file.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(n) => sink.write(&bytes[..n]).map_err(CopyError::Writing)?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(CopyError::Reading(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::tests::Heard;

    fn shown(old: Option<&str>, current: Option<&str>, lines: Lines) -> String {
        let dir = tempfile::tempdir().unwrap();
        let log = Log { name: "s".into(), directory: dir.path().to_owned() };
        for (path, text) in [(log.old_path(), old), (log.path(), current)] {
            if let Some(text) = text {
                std::fs::write(path, text).unwrap();
            }
        }
        let heard = Heard::default();
        show(&log, lines, &mut heard.sink(false)).unwrap();
        heard.text()
    }

    #[test]
    fn the_last_lines_reach_back_into_the_old_file_only_when_they_must() {
        let of = |n| shown(Some("1\n2\n3\n"), Some("4\n5\n"), Lines::Last(n));
        assert_eq!(
            [0, 1, 2, 3, 5, 9].map(of),
            ["", "5\n", "4\n5\n", "3\n4\n5\n", "1\n2\n3\n4\n5\n", "1\n2\n3\n4\n5\n"]
        );
        assert_eq!(shown(Some("1\n2\n"), Some("3\n"), Lines::All), "1\n2\n3\n");
    }

    #[test]
    fn either_file_may_be_missing_or_empty() {
        assert_eq!(shown(Some("1\n2\n"), None, Lines::Last(1)), "2\n");
        assert_eq!(shown(Some("1\n2\n"), Some(""), Lines::Last(1)), "2\n");
        assert_eq!(shown(None, Some("1\n2"), Lines::Last(1)), "2");
        assert_eq!(shown(None, Some("\n\n"), Lines::Last(1)), "\n");
        assert_eq!(shown(None, None, Lines::All), "");
    }

    #[test]
    fn lines_are_counted_over_the_borders_of_blocks() {
        let long = "x".repeat(100_000);
        let text = format!("first\n{long}\n{long}\nlast\n");
        assert_eq!(shown(None, Some(&text), Lines::Last(3)), format!("{long}\n{long}\nlast\n"));
        let exact = format!("{}\nb\n", "a".repeat(65_536 - 3));
        for n in 1..4 {
            let expected = if n == 1 { "b\n" } else { &exact };
            assert_eq!(shown(None, Some(&exact), Lines::Last(n)), expected);
        }
    }
}
