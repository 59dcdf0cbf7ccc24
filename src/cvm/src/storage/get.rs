//! `cvm storage get`: one file, straight from the bucket.
//!
//! The file is written under another name and gets its own when all of it has arrived and is good, so
//! that a file of the wanted name is never half of one. Bytes that are no text do not go to a terminal
//! unless the operator insists.

use super::client::{Client, Patience};
use super::follow::to_the_end;
use crate::args::StorageGetArgs;
use crate::failure::{Exit, Failure};
use crate::safe_output::SafeOutput;
use crate::stdout;
use crate::style::Style;
use crate::text;
use crate::units::size;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use cvm_protocol::storage::{Answer, Ask};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

const WHAT: &str = "storage get";

pub(super) fn run(args: &StorageGetArgs) -> Result<Exit, Failure> {
    let verb = Ask::Get { path: args.path.clone() };
    let ask = || Client::ask(WHAT, verb, Patience::working(None));
    match args.output.as_deref() {
        Some(file) if file != Path::new("-") => to_file(file, ask),
        wanted => to_stdout(wanted.is_some(), ask),
    }
}

fn to_stdout(raw: bool, ask: impl FnOnce() -> Result<Client, Failure>) -> Result<Exit, Failure> {
    let careful = Style::of_stdout().is_terminal && !raw;
    let mut output = SafeOutput::new(careful);
    let mut first = true;
    to_the_end(ask()?, |answer| {
        take(answer, |bytes| {
            if careful && !is_text(bytes, first) {
                let hint = "name a file with -o FILE; or -o - if you mean it";
                return Err(Failure::new(Exit::Bad, WHAT, "this is no text for a terminal").hint(hint));
            }
            first = false;
            output.write(bytes)
        })
    })?;
    output.finish()?;
    Ok(Exit::Good)
}

fn to_file(file: &Path, ask: impl FnOnce() -> Result<Client, Failure>) -> Result<Exit, Failure> {
    let mut target = Target::open(file)?;
    to_the_end(ask()?, |answer| take(answer, |bytes| target.write(bytes)))?;
    let written = target.written;
    target.keep()?;
    stdout::print(&format!("{}: {}\n", text::clean(&file.to_string_lossy()), size(written)))?;
    Ok(Exit::Good)
}

fn take(answer: Answer, to: impl FnOnce(&[u8]) -> Result<(), Failure>) -> Option<Result<(), Failure>> {
    match answer {
        Answer::Data { base64 } => Some(decoded(WHAT, &base64).and_then(|bytes| to(&bytes))),
        _ => None,
    }
}

pub(crate) fn decoded(what: &str, base64: &str) -> Result<Vec<u8>, Failure> {
    BASE64_STANDARD.decode(base64).map_err(|_| super::client::unexpected_answer(what))
}

/// Whether a piece of a file looks like text. Only the first piece is checked closely, because the
/// output is made harmless anyway. A piece may end within a character.
fn is_text(piece: &[u8], first: bool) -> bool {
    let cut = |error: std::str::Utf8Error| error.error_len().is_none();
    !piece.contains(&0) && (!first || std::str::from_utf8(piece).map_or_else(cut, |_| true))
}

/// A file that is being written.
struct Target {
    /// The path as messages show it.
    shown: String,
    file: File,
    written: u64,
    /// The path of the part and the path of the whole; None for a pipe or a device, which is written in place.
    rename: Option<(PathBuf, PathBuf)>,
}

impl Target {
    fn open(wanted: &Path) -> Result<Self, Failure> {
        let shown = wanted.to_string_lossy().into_owned();
        let failure = |error: std::io::Error| of_file(&shown, &error);
        // A link is followed, so that its target is replaced and not the link.
        let place = wanted.canonicalize().unwrap_or_else(|_| wanted.to_owned());
        if let Ok(data) = place.metadata() {
            if data.is_dir() {
                let hint = "name a file, not a directory";
                return Err(Failure::new(Exit::Usage, what_of(&shown), "it is a directory").hint(hint));
            }
            if !data.is_file() {
                // A pipe or a device cannot be replaced, only written to.
                let file = OpenOptions::new().write(true).open(&place).map_err(failure)?;
                return Ok(Self { shown, file, written: 0, rename: None });
            }
        }
        let name = place.file_name().unwrap_or_default().to_string_lossy();
        let part = place.with_file_name(format!(".{name}.{}.part", std::process::id()));
        // The agent's files are private, whatever the umask says.
        let file =
            OpenOptions::new().write(true).create_new(true).mode(0o600).open(&part).map_err(failure)?;
        Ok(Self { shown, file, written: 0, rename: Some((part, place)) })
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        self.file.write_all(bytes).map_err(|e| of_file(&self.shown, &e))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn keep(mut self) -> Result<(), Failure> {
        if let Some((part, place)) = &self.rename {
            let renamed = self.file.sync_all().and_then(|()| std::fs::rename(part, place));
            renamed.map_err(|e| of_file(&self.shown, &e))?;
        }
        self.rename = None;
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        if let Some((part, _)) = &self.rename {
            let _ = std::fs::remove_file(part);
        }
    }
}

fn what_of(file: &str) -> String {
    format!("{WHAT}: {file}")
}

fn of_file(file: &str, error: &std::io::Error) -> Failure {
    Failure::new(Exit::Bad, what_of(file), text::io_error(error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let entries = std::fs::read_dir(directory).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_file_gets_its_name_when_all_of_it_has_arrived() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = dir.path().join("notes.md");
        std::fs::write(&wanted, "old").unwrap();
        let mut target = Target::open(&wanted).unwrap();
        target.write(b"half").unwrap();
        assert_eq!(std::fs::read(&wanted).unwrap(), b"old");
        drop(target);
        assert_eq!(names(dir.path()), ["notes.md"], "nothing is left behind");
        let mut target = Target::open(&wanted).unwrap();
        target.write(b"whole").unwrap();
        target.keep().unwrap();
        assert_eq!((std::fs::read(&wanted).unwrap(), names(dir.path()).len()), (b"whole".to_vec(), 1));
    }

    #[test]
    fn only_a_regular_file_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Target::open(dir.path()).is_err());
        let mut target = Target::open(Path::new("/dev/null")).unwrap();
        target.write(b"gone").unwrap();
        target.keep().unwrap();
        assert!(!Path::new("/dev/null").metadata().unwrap().is_file());
        let (link, file) = (dir.path().join("link"), dir.path().join("file"));
        std::fs::write(&file, "old").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let mut target = Target::open(&link).unwrap();
        target.write(b"new").unwrap();
        target.keep().unwrap();
        assert!(link.is_symlink() && std::fs::read(&file).unwrap() == b"new");
    }

    #[test]
    fn text_is_recognised_also_when_a_character_is_cut() {
        assert!(is_text("größe\t\n".as_bytes(), true) && is_text(b"", true));
        assert!(is_text(&"ö".as_bytes()[..1], true), "a character may continue in the next piece");
        assert!(is_text(&"ö".as_bytes()[1..], false));
        assert!(!is_text(b"SQLite format 3\0", true) && !is_text(b"\0", false));
        assert!(!is_text(b"\xff\xfeabc", true));
    }
}
