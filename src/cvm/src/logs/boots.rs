//! Logs of boots that are over, also of machines that are gone: the storage worker has them from
//! the bucket.
//!
//! May import: `args`, `look`, `sink`, `storage`, `trouble`.

use crate::args::Lines;
use crate::look::Look;
use crate::sink::Sink;
use crate::storage::{Client, Patience, decoded, print_to_the_end, to_the_end};
use crate::trouble::{Exit, Trouble};
use cvm_protocol::storage::{Answer, Ask};
use std::collections::VecDeque;

/// What one wants to read of a machine that is gone: how it ended.
const USUAL: &str = "supervisor";

pub(super) fn list() -> Result<Exit, Trouble> {
    print_to_the_end(Client::ask("logs --boots", Ask::Boots, Patience::working(None))?)
}

pub(super) fn show(boot: i32, log: Option<&str>, lines: Lines) -> Result<Exit, Trouble> {
    let log = log.unwrap_or(USUAL).to_owned();
    let what = format!("logs --boot {boot} {log}");
    let client = Client::ask(&what, Ask::BootLog { boot, log }, Patience::working(None))?;
    let mut sink = Sink::new(Look::of_stdout().terminal);
    let mut kept = Kept::new(lines);
    let mut feed = |bytes: &[u8]| match &mut kept {
        Some(kept) => {
            kept.add(bytes);
            Ok(())
        }
        None => sink.write(bytes),
    };
    to_the_end(client, |answer| match answer {
        Answer::Line { text } => Some(feed((text + "\n").as_bytes())),
        Answer::Data { base64 } => Some(decoded(&what, &base64).and_then(|bytes| feed(&bytes))),
        _ => None,
    })?;
    for line in kept.into_iter().flat_map(|k| k.lines) {
        sink.write(&line)?;
    }
    sink.finish()?;
    Ok(Exit::Good)
}

/// The last lines of what comes in pieces.
struct Kept {
    most: usize,
    lines: VecDeque<Vec<u8>>,
}

impl Kept {
    /// None: everything is wanted, so nothing has to be kept.
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
