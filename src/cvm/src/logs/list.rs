//! The list of logs: the size of each, and the time of its last line.

use crate::style::{Style, Tone};
use crate::table::{self, Cell, Column, NONE, Row, STAYS};
use crate::units::{size, span};
use std::collections::BTreeSet;
use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::UNIX_EPOCH;

/// The bytes at the end of a file in which the last line is searched.
const END: u64 = 8 * 1024;
/// `2026-11-20T23:59:59.999Z`
const STAMP_LEN: usize = 24;

/// Names of all logs, sorted.
pub(crate) fn names(directory: &Path) -> std::io::Result<Vec<String>> {
    let entries = std::fs::read_dir(directory)?;
    let mut names = BTreeSet::new();
    for entry in entries.flatten() {
        let file = entry.file_name();
        let Some(file) = file.to_str() else { continue };
        if let Some(name) = file.strip_suffix(".log").or_else(|| file.strip_suffix(".log.1")) {
            names.insert(name.to_owned());
        }
    }
    Ok(names.into_iter().collect())
}

pub(crate) fn page(directory: &Path, now_ms: u64, style: Style) -> std::io::Result<String> {
    const COLUMNS: [Column; 4] = [
        Column { title: "LOG", right: false, keep: STAYS },
        Column { title: "SIZE", right: true, keep: 3 },
        Column { title: "AGO", right: true, keep: 2 },
        Column { title: "LAST LINE", right: false, keep: 1 },
    ];
    let names = names(directory)?;
    if names.is_empty() {
        return Ok(format!("There are no logs in {}.\n", directory.display()));
    }
    let rows: Vec<Row> = names.iter().map(|name| row(directory, name, now_ms)).collect();
    Ok(table::render(&COLUMNS, &rows, style))
}

fn row(directory: &Path, name: &str, now_ms: u64) -> Row {
    let path = directory.join(format!("{name}.log"));
    let old = directory.join(format!("{name}.log.1"));
    let data: Vec<Metadata> = [&path, &old].iter().filter_map(|p| p.metadata().ok()).collect();
    let written = data.iter().filter_map(|m| m.modified().ok()).max();
    let written_ms = written
        .and_then(|t| t.duration_since(UNIX_EPOCH).ok())
        .and_then(|d| u64::try_from(d.as_millis()).ok());
    let stamp = last_stamp(&path).or_else(|| last_stamp(&old));
    Row {
        cells: vec![
            Cell::new(name, Tone::Strong),
            Cell::plain(&size(data.iter().map(Metadata::len).sum())),
            Cell::plain(&written_ms.map_or(NONE.to_owned(), |ms| span(now_ms.saturating_sub(ms)))),
            Cell::plain(stamp.as_deref().unwrap_or(NONE)),
        ],
        below: Vec::new(),
    }
}

/// The time of the last line that has one. The text of the line stays out, so that a list of logs may be
/// pasted in public.
fn last_stamp(path: &Path) -> Option<String> {
    let mut file = File::open(path).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(END))).ok()?;
    let mut end = Vec::new();
    file.take(END).read_to_end(&mut end).ok()?;
    let stamp = |line: &[u8]| {
        let text = std::str::from_utf8(line.get(..STAMP_LEN)?).ok()?;
        is_stamp(text).then(|| text.to_owned())
    };
    end.split(|b| *b == b'\n').rev().find_map(stamp)
}

/// The newest time in the last lines of all logs.
pub(crate) fn newest_stamp(directory: &Path) -> Option<String> {
    let logs = names(directory).ok()?;
    logs.iter().filter_map(|name| last_stamp(&directory.join(format!("{name}.log")))).max()
}

fn is_stamp(text: &str) -> bool {
    let shape = "0000-00-00T00:00:00.000Z";
    text.len() == shape.len()
        && text.chars().zip(shape.chars()).all(|(c, s)| if s == '0' { c.is_ascii_digit() } else { c == s })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_log_is_listed_with_the_time_of_its_last_stamped_line() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        write("gateway.log", "2026-11-20T23:59:58.000Z a\n2026-11-20T23:59:59.999Z b\nno stamp secret\n");
        write("gateway.log.1", &"x".repeat(2048));
        write("sshd.log", "");
        write("sshd.log.1", "2026-11-19T00:00:00.000Z old\n");
        let page = page(dir.path(), 0, Style::plain(100)).unwrap();
        let expected = "\
LOG         SIZE   AGO  LAST LINE
gateway  2.0 KiB  0 ms  2026-11-20T23:59:59.999Z
sshd        29 B  0 ms  2026-11-19T00:00:00.000Z
";
        assert_eq!(page, expected);
    }

    #[test]
    fn the_newest_time_is_that_of_any_log() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(newest_stamp(dir.path()), None);
        for (name, stamp) in [("a", "2026-11-19T00:00:00.000Z"), ("b", "2026-11-20T23:59:58.000Z")] {
            std::fs::write(dir.path().join(format!("{name}.log")), format!("{stamp} text\n")).unwrap();
        }
        assert_eq!(newest_stamp(dir.path()).as_deref(), Some("2026-11-20T23:59:58.000Z"));
    }
}
