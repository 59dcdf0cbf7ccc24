//! Runs a foreign program to its end and returns what it printed.
//!
//! PATH is not searched, our environment is not handed down, and of what a program prints only the beginning is
//! kept. There is no time limit here: PID 1 holds the deadline of the whole
//! task and ends it with everything that it started.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Bytes of a program's output that are kept: enough for the sentence that matters.
const WORDS_MAX: usize = 300;
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

pub(crate) struct Ended {
    pub(crate) ok: bool,
    pub(crate) out: String,
    /// Standard error, shortened.
    pub(crate) complaint: String,
}

/// Runs `program` with `input` on its standard input. The input is small: it fits a pipe.
pub(crate) fn run(program: &Path, arguments: &[&str], input: &str) -> io::Result<Ended> {
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        // Messages in English, whatever the image's language.
        .env("LC_ALL", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading its input has printed why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    Ok(Ended {
        ok: output.status.success(),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        complaint: complaint.trim().chars().take(WORDS_MAX).collect(),
    })
}

/// Like [`run`]: `Err` in words, whichever way the program failed.
pub(crate) fn must(program: &Path, arguments: &[&str], input: &str) -> Result<String, String> {
    let name = program.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    match run(program, arguments, input) {
        Ok(ended) if ended.ok => Ok(ended.out),
        Ok(ended) if ended.complaint.is_empty() => Err(format!("{name} failed without a word")),
        Ok(ended) => Err(format!("{name}: {}", ended.complaint)),
        Err(error) => Err(format!("{name} cannot be run: {error}")),
    }
}

/// The first of `candidates` that is an executable file.
pub(crate) fn find(candidates: impl IntoIterator<Item = PathBuf>) -> Option<PathBuf> {
    candidates.into_iter().find(|path| is_executable(path))
}

pub(crate) fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::metadata(path).is_ok_and(|m| m.is_file() && m.permissions().mode() & 0o111 != 0)
}

/// Whether the program's file has this word in it: the way to ask what it knows without running
/// it, which takes ten times as long.
pub(crate) fn mentions(program: &Path, word: &[u8]) -> bool {
    let Ok(mut file) = std::fs::File::open(program) else { return false };
    // By pieces that overlap, because memory that is touched for the first time costs more than
    // the reading.
    let mut piece = vec![0; 64 * 1024];
    let mut kept = 0;
    loop {
        let count = match piece.get_mut(kept..).map(|room| file.read(room)) {
            Some(Ok(count)) if count > 0 => count,
            _ => return false,
        };
        let filled = kept + count;
        if piece.get(..filled).is_some_and(|text| contains(text, word)) {
            return true;
        }
        kept = word.len().saturating_sub(1).min(filled);
        piece.copy_within(filled - kept..filled, 0);
    }
}

/// Horspool's search: it looks at every n-th byte, where n is the length of the word.
fn contains(text: &[u8], word: &[u8]) -> bool {
    let Some((last, head)) = word.split_last() else { return true };
    let skip_of = |byte: u8| head.iter().rev().position(|b| *b == byte).map_or(word.len(), |at| at + 1);
    let skips: Vec<usize> = (0..=u8::MAX).map(skip_of).collect();
    let mut end = head.len();
    while let Some(byte) = text.get(end) {
        if byte == last && text[..=end].ends_with(word) {
            return true;
        }
        end += skips[usize::from(*byte)];
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_program_is_quoted_and_an_absent_one_is_named() {
        let sh = Path::new("/bin/sh");
        assert_eq!(must(sh, &["-c", "cat"], "in").unwrap(), "in");
        assert_eq!(must(sh, &["-c", "echo no table >&2; exit 3"], "").unwrap_err(), "sh: no table");
        assert!(must(Path::new("/nowhere/tool"), &[], "").unwrap_err().starts_with("tool cannot be run"));
    }

    #[test]
    fn a_word_is_found_wherever_it_lies_and_only_there() {
        for text in ["word", "aword", "worword", "wordw", "xxxxxxxxxxword", "w\0o\0wwwword"] {
            assert!(contains(text.as_bytes(), b"word"), "{text}");
        }
        for text in ["", "wor", "wo rd", "drow", "worworwor"] {
            assert!(!contains(text.as_bytes(), b"word"), "{text}");
        }
        assert!(contains(b"aab", b"ab") && contains(b"abab", b"bab") && !contains(b"aaaa", b"ba"));
    }

    #[test]
    fn a_word_across_two_pieces_of_a_program_is_found() {
        let temp = tempfile::tempdir().unwrap();
        let program = temp.path().join("program");
        for at in [0, 64 * 1024 - 2, 64 * 1024, 200_000] {
            let mut bytes = vec![b'w'; 300_000];
            bytes[at..at + 4].copy_from_slice(b"word");
            std::fs::write(&program, &bytes).unwrap();
            assert!(mentions(&program, b"word"), "{at}");
            assert!(!mentions(&program, b"words"), "{at}");
        }
        assert!(!mentions(&temp.path().join("absent"), b"word"));
    }

    #[test]
    fn a_program_does_not_inherit_our_environment() {
        let names = must(Path::new("/usr/bin/env"), &[], "").unwrap();
        assert_eq!(names.lines().count(), 2, "{names}");
    }
}
