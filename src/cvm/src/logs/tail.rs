//! The last lines of a log, across the border between the old file and the current one. Files are read
//! backwards in blocks, so the length of a log does not matter.

use super::file::{Log, unreadable};
use crate::args::Lines;
use crate::failure::Failure;
use crate::safe_output::SafeOutput;
use memchr::memrchr_iter;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt as _;

const BLOCK: u64 = 64 * 1024;

/// Shows the end of the log, and returns the current file, read to its end.
pub(crate) fn show(log: &Log, lines: Lines, output: &mut SafeOutput) -> Result<Option<File>, Failure> {
    // Opened before the old file: if the log rotates between the two, the old file is the same one, which
    // the filter notices.
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
        copy(&mut old, from, output).map_err(|e| e.into_failure(log))?;
    }
    if let Some(file) = &mut current {
        copy(file, start, output).map_err(|e| e.into_failure(log))?;
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

/// The position where the last `wanted` lines begin, and how many of them the file lacks. A last line
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
        for next in memrchr_iter(b'\n', piece).map(|at| begin + at as u64 + 1) {
            // The very last line break ends a line and begins none.
            if next < length {
                found += 1;
                if found == wanted {
                    return Ok((next, 0));
                }
            }
        }
        end = begin;
    }
    let lines = if length == 0 { 0 } else { found + 1 };
    Ok((0, wanted - lines))
}

/// The side of a copy that failed.
pub(crate) enum CopyError {
    Reading(std::io::Error),
    Writing(Failure),
}

impl CopyError {
    pub(crate) fn into_failure(self, log: &Log) -> Failure {
        match self {
            Self::Reading(error) => unreadable(&log.path(), &error),
            Self::Writing(failure) => failure,
        }
    }
}

fn copy(file: &mut File, from: u64, output: &mut SafeOutput) -> Result<(), CopyError> {
    file.seek(SeekFrom::Start(from)).map_err(CopyError::Reading)?;
    copy_rest(file, output)
}

/// Copies the file from its position to its end.
pub(crate) fn copy_rest(file: &mut File, output: &mut SafeOutput) -> Result<(), CopyError> {
    let mut bytes = [0u8; 16 * 1024];
    loop {
        match file.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(n) => output.write(&bytes[..n]).map_err(CopyError::Writing)?,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(CopyError::Reading(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safe_output::tests::Written;

    fn shown(old: Option<&str>, current: Option<&str>, lines: Lines) -> String {
        let dir = tempfile::tempdir().unwrap();
        let log = Log { name: "s".into(), directory: dir.path().to_owned() };
        for (path, text) in [(log.old_path(), old), (log.path(), current)] {
            if let Some(text) = text {
                std::fs::write(path, text).unwrap();
            }
        }
        let written = Written::default();
        show(&log, lines, &mut written.output(false)).unwrap();
        written.text()
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
    fn lines_are_counted_across_the_borders_of_blocks() {
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
