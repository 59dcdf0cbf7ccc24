//! `cvm storage ls`: the files of the bucket from its manifest. Each line is printed as it arrives, because
//! there may be millions.

use super::client::{Client, Patience};
use super::follow::to_the_end;
use crate::args::StorageLsArgs;
use crate::failure::{Exit, Failure};
use crate::stdout;
use crate::style::{Style, Tone};
use crate::text::clean;
use crate::units::size;
use cvm_protocol::storage::{Answer, Ask, Entry, EntryKind};
use cvm_protocol::time::rfc3339;
use std::io::Write as _;

pub(super) fn run(args: &StorageLsArgs) -> Result<Exit, Failure> {
    let verb = Ask::List { path: args.path.clone().unwrap_or_default() };
    let client = Client::ask("storage ls", verb, Patience::working(None))?;
    let style = Style::of_stdout();
    let mut out = stdout::buffered();
    to_the_end(client, |answer| match answer {
        Answer::Entry(entry) => {
            let line = if args.json { json(&entry) } else { line(&entry, style) };
            Some(out.write_all(line.as_bytes()).map_err(|e| Failure::output(&e)))
        }
        _ => None,
    })?;
    out.flush().map_err(|e| Failure::output(&e))?;
    Ok(Exit::Good)
}

fn json(entry: &Entry) -> String {
    serde_json::to_string(entry).unwrap_or_default() + "\n"
}

/// A line like that of `ls -l`, with `D` for a database.
fn line(entry: &Entry, style: Style) -> String {
    let (kind, size) = match entry.kind {
        EntryKind::File => ('-', size(entry.size)),
        EntryKind::Database => ('D', size(entry.size)),
        EntryKind::Directory => ('d', "-".into()),
        EntryKind::Symlink => ('l', "-".into()),
        EntryKind::Unknown => ('?', "-".into()),
    };
    let mtime = u64::try_from(entry.mtime_ms).map_or_else(|_| "before 1970".into(), rfc3339);
    let tone = if entry.kind == EntryKind::Directory { Tone::Strong } else { Tone::Plain };
    let path = style.paint(&clean(&entry.path), tone);
    format!("{kind}{}  {size:>9}  {mtime:<24}  {path}\n", permissions(entry.mode))
}

/// `rwxr-x---`, with the bits for set-id and sticky where `ls` shows them.
fn permissions(mode: u32) -> String {
    let mut text = String::with_capacity(9);
    for (shift, special, letter) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
        let bits = mode >> shift;
        text.push(if bits & 4 != 0 { 'r' } else { '-' });
        text.push(if bits & 2 != 0 { 'w' } else { '-' });
        text.push(match (bits & 1 != 0, mode & special != 0) {
            (true, true) => letter,
            (false, true) => letter.to_ascii_uppercase(),
            (true, false) => 'x',
            (false, false) => '-',
        });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(kind: EntryKind, path: &str) -> Entry {
        Entry { path: path.into(), kind, size: 12_345, mode: 0o100_640, mtime_ms: 1_795_000_000_000 }
    }

    #[test]
    fn a_line_is_like_one_of_ls() {
        let style = Style::plain(80);
        assert_eq!(
            line(&entry(EntryKind::File, "openclaw/a\u{1b}b"), style),
            "-rw-r-----   12.0 KiB  2026-11-18T11:06:40.000Z  openclaw/a\u{fffd}b\n"
        );
        assert!(line(&entry(EntryKind::Database, "m.db"), style).starts_with("Drw-r-----   12.0 KiB"));
        assert!(line(&entry(EntryKind::Directory, "d"), style).starts_with("drw-r-----          -  2026"));
        let old = Entry { mtime_ms: -1, ..entry(EntryKind::Symlink, "l") };
        assert!(line(&old, style).contains("-  before 1970               l\n"), "{}", line(&old, style));
    }

    #[test]
    fn every_bit_of_a_mode_is_shown() {
        let told = [0o755, 0o4755, 0o2644, 0o1777, 0o1000, 0].map(permissions);
        assert_eq!(told, ["rwxr-xr-x", "rwsr-xr-x", "rw-r-Sr--", "rwxrwxrwt", "--------T", "---------"]);
    }

    #[test]
    fn json_is_one_object_a_line() {
        let text = json(&entry(EntryKind::File, "a\nb"));
        assert_eq!(text.lines().count(), 1);
        assert_eq!(serde_json::from_str::<Entry>(&text).unwrap(), entry(EntryKind::File, "a\nb"));
    }
}
