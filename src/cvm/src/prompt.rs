//! Questions on the terminal: for a confirmation, and for a secret that is not shown while it is typed.
//!
//! A terminal that is left without echo is a trap, and restoring it after Ctrl-C would need a signal
//! handler. So Ctrl-C becomes an ordinary character that ends the line, and is recognised here.

use crate::failure::{Exit, Failure};
use crate::text;
use nix::sys::termios::{LocalFlags, SetArg, SpecialCharacterIndices, Termios, tcgetattr, tcsetattr};
use std::io::{BufRead as _, IsTerminal as _, Read, Stdin, Write as _};
use zeroize::Zeroizing;

const CTRL_C: u8 = 0x03;
const CTRL_BACKSLASH: u8 = 0x1c;
/// The answer to a question is a word.
const ANSWER_MAX: u64 = 256;
/// The kernel's limit for one line.
const LINE_MAX: usize = 4096;

/// Fails where nobody can answer a question; a script says `--yes`.
pub(crate) fn require_terminal(what: &str) -> Result<(), Failure> {
    if std::io::stdin().is_terminal() {
        return Ok(());
    }
    let cause = "it cannot be taken back, and nobody is here to confirm it";
    Err(Failure::new(Exit::Usage, what, cause).hint("where there is no terminal, give --yes"))
}

/// Asks a question that only `yes` confirms.
pub(crate) fn confirm(what: &str, question: &str) -> Result<(), Failure> {
    require_terminal(what)?;
    let _ = write!(std::io::stderr().lock(), "{question} (yes/no) ");
    let mut answer = String::new();
    let read = std::io::stdin().lock().take(ANSWER_MAX).read_line(&mut answer);
    if read.is_ok() && means_yes(&answer) {
        return Ok(());
    }
    Err(Failure::new(Exit::Bad, what, "not confirmed; nothing was done"))
}

fn means_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "yes" | "y")
}

/// Asks for a secret, and returns the line with its line break.
pub(crate) fn secret(question: &str) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let failure = |cause: String| Failure::new(Exit::Usage, "asking for a secret", cause);
    let stdin = std::io::stdin();
    let hidden = Hidden::on(&stdin).map_err(|e| failure(e.desc().to_owned()))?;
    // On standard error, because standard output may be a file for what is derived.
    let _ = write!(std::io::stderr().lock(), "{question}");
    let line = read_line(&mut stdin.lock());
    drop(hidden);
    let _ = writeln!(std::io::stderr().lock());
    let line = line.map_err(|e| failure(text::io_error(&e)))?;
    match line.last() {
        Some(&(CTRL_C | CTRL_BACKSLASH)) => Err(Failure::silent(Exit::Interrupted)),
        _ => Ok(line),
    }
}

fn read_line(from: &mut impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    let mut line = Zeroizing::new(Vec::with_capacity(LINE_MAX + 1));
    let mut byte = [0u8];
    while line.len() < LINE_MAX && from.read(&mut byte)? == 1 {
        line.push(byte[0]);
        if matches!(byte[0], b'\n' | CTRL_C | CTRL_BACKSLASH) {
            break;
        }
    }
    Ok(line)
}

/// A terminal without echo, until this is dropped.
struct Hidden<'s> {
    stdin: &'s Stdin,
    before: Termios,
}

impl<'s> Hidden<'s> {
    fn on(stdin: &'s Stdin) -> nix::Result<Self> {
        let before = tcgetattr(stdin)?;
        let mut quiet = before.clone();
        quiet.local_flags.remove(LocalFlags::ECHO | LocalFlags::ISIG);
        quiet.control_chars[SpecialCharacterIndices::VEOL as usize] = CTRL_C;
        quiet.control_chars[SpecialCharacterIndices::VEOL2 as usize] = CTRL_BACKSLASH;
        tcsetattr(stdin, SetArg::TCSAFLUSH, &quiet)?;
        Ok(Self { stdin, before })
    }
}

impl Drop for Hidden<'_> {
    fn drop(&mut self) {
        // A terminal that is gone needs no echo.
        let _ = tcsetattr(self.stdin, SetArg::TCSAFLUSH, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_yes_means_yes() {
        for yes in ["yes\n", "y\n", " YES \r\n"] {
            assert!(means_yes(yes));
        }
        for no in ["", "\n", "no\n", "yes please\n", "ye\n", "ja\n"] {
            assert!(!means_yes(no), "{no:?}");
        }
    }

    #[test]
    fn a_line_ends_at_its_break_at_ctrl_c_and_at_the_end_of_input() {
        let read = |bytes: &[u8]| read_line(&mut &bytes[..]).unwrap().to_vec();
        assert_eq!(read(b"key\nmore"), b"key\n");
        assert_eq!(read(b"ke\x03y"), b"ke\x03");
        assert_eq!(read(b"key"), b"key");
        assert_eq!(read(&[b'x'; 9999]).len(), LINE_MAX);
    }
}
