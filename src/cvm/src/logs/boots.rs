//! The logs of earlier boots, also of machines that are gone: the storage worker reads them from the
//! bucket.

use crate::args::Lines;
use crate::failure::{Exit, Failure};
use crate::safe_output::SafeOutput;
use crate::storage::{Client, Patience, decoded, print_to_the_end, to_the_end};
use crate::style::Style;
use cvm_protocol::storage::{Answer, Ask};
use std::collections::VecDeque;

/// The log that shows how a machine ended.
const USUAL: &str = "supervisor";

pub(super) fn list() -> Result<Exit, Failure> {
    print_to_the_end(Client::ask("logs --boots", Ask::Boots, Patience::working(None))?)
}

pub(super) fn show(boot: i32, log: Option<&str>, lines: Lines) -> Result<Exit, Failure> {
    let log = log.unwrap_or(USUAL).to_owned();
    let what = format!("logs --boot {boot} {log}");
    let client = Client::ask(&what, Ask::BootLog { boot, log }, Patience::working(None))?;
    let mut output = SafeOutput::new(Style::of_stdout().is_terminal);
    let mut kept = Kept::new(lines);
    let mut feed = |bytes: &[u8]| match &mut kept {
        Some(kept) => {
            kept.add(bytes);
            Ok(())
        }
        None => output.write(bytes),
    };
    to_the_end(client, |answer| match answer {
        Answer::Line { text } => Some(feed((text + "\n").as_bytes())),
        Answer::Data { base64 } => Some(decoded(&what, &base64).and_then(|bytes| feed(&bytes))),
        _ => None,
    })?;
    for line in kept.into_iter().flat_map(|k| k.lines) {
        output.write(&line)?;
    }
    output.finish()?;
    Ok(Exit::Good)
}

/// The last lines of a text that arrives in pieces.
struct Kept {
    most: usize,
    lines: VecDeque<Vec<u8>>,
}

impl Kept {
    /// None if all lines are wanted, because then they are printed as they arrive.
    fn new(lines: Lines) -> Option<Self> {
        match lines {
            Lines::All => None,
            Lines::Last(most) => Some(Self { most, lines: VecDeque::new() }),
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        if self.most == 0 {
            return;
        }
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            match self.lines.back_mut() {
                Some(last) if !last.ends_with(b"\n") => last.extend_from_slice(piece),
                _ => self.lines.push_back(piece.to_vec()),
            }
            if self.lines.len() > self.most {
                self.lines.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_kept_however_they_are_cut() {
        let of = |most, pieces: &[&str]| {
            let mut kept = Kept::new(Lines::Last(most)).unwrap();
            for piece in pieces {
                kept.add(piece.as_bytes());
            }
            String::from_utf8(kept.lines.into_iter().flatten().collect()).unwrap()
        };
        assert_eq!(of(2, &["a\nb\nc\n"]), "b\nc\n");
        assert_eq!(of(2, &["a\nb", "b\nc", "", "c\nd"]), "cc\nd");
        assert_eq!(of(9, &["a\n"]), "a\n");
        assert_eq!(of(0, &["a\n", "b"]), "");
        assert!(Kept::new(Lines::All).is_none());
    }
}
