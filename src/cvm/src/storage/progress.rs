//! How far a long work is: on a terminal one line with a bar that changes, elsewhere a line now
//! and then.
//!
//! On standard error, since what the work yields goes to standard output. Refuses to be wider
//! than the terminal, to write a line that says nothing new, and to fail: a lost line of
//! progress is no loss. May import: `look`, `words`.

use crate::look::{Look, Tone};
use crate::words::{clean, count, size, width};
use cvm_protocol::storage::Progress;
use std::io::Write as _;
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal.
const PAUSE: Duration = Duration::from_secs(5);
/// Between two looks of a terminal's line: faster is only more to send.
const REDRAW: Duration = Duration::from_millis(100);
const BAR_MIN: usize = 10;
const BAR_MAX: usize = 40;

pub(crate) struct Shower {
    look: Look,
    /// What stands on the terminal's line, or was the last line; and since when.
    said: String,
    at: Option<Instant>,
}

impl Shower {
    pub(crate) fn new() -> Self {
        Self { look: Look::of_stderr(), said: String::new(), at: None }
    }

    pub(crate) fn show(&mut self, progress: &Progress) {
        if let Some(text) = self.next(progress, Instant::now()) {
            let _ = std::io::stderr().lock().write_all(text.as_bytes());
        }
    }

    /// Before anything else is written.
    pub(crate) fn clear(&mut self) {
        if self.look.terminal && !self.said.is_empty() {
            let _ = std::io::stderr().lock().write_all(b"\r\x1b[K");
            self.said.clear();
        }
    }

    fn next(&mut self, progress: &Progress, now: Instant) -> Option<String> {
        let pause = if self.look.terminal { REDRAW } else { PAUSE };
        if self.at.is_some_and(|at| now.duration_since(at) < pause) {
            return None;
        }
        let line = if self.look.terminal {
            // The last column stays free: a cursor behind it would wrap.
            line(progress, self.look.width.saturating_sub(1), self.look)
        } else {
            words(progress).join("  ")
        };
        if line == self.said {
            return None;
        }
        self.at = Some(now);
        self.said.clone_from(&line);
        Some(if self.look.terminal { format!("\r{line}\x1b[K") } else { line + "\n" })
    }
}

/// Per cent done, by bytes where there are any, if it is known how much there is to do.
pub(crate) fn share(progress: &Progress) -> Option<u64> {
    let (done, total) = match (progress.bytes_total, progress.files_total) {
        (0, 0) => return None,
        (0, files) => (progress.files_done, files),
        (bytes, _) => (progress.bytes_done, bytes),
    };
    u64::try_from(u128::from(done.min(total)) * 100 / u128::from(total)).ok()
}

/// What is done, how far, in files, in bytes: the first says most.
fn words(progress: &Progress) -> Vec<String> {
    let mut words = vec![clean(&progress.what)];
    words.extend(share(progress).map(|n| format!("{n} %")));
    if progress.files_total > 0 || progress.files_done > 0 {
        words.push(match progress.files_total {
            0 => count(progress.files_done, "file", "files"),
            total => format!("{} of {}", progress.files_done, count(total, "file", "files")),
        });
    }
    if progress.bytes_total > 0 || progress.bytes_done > 0 {
        words.push(match progress.bytes_total {
            0 => size(progress.bytes_done),
            total => format!("{} of {}", size(progress.bytes_done), size(total)),
        });
    }
    words
}

/// One line of at most `room` characters. What finds no place is left out, the least telling
/// first; the bar takes what is left.
fn line(progress: &Progress, room: usize, look: Look) -> String {
    let mut words = words(progress);
    let taken = |words: &[String]| words.iter().map(|w| width(w) + 2).sum::<usize>().saturating_sub(2);
    while words.len() > 1 && taken(&words) > room {
        words.pop();
    }
    if taken(&words) > room {
        return words[0].chars().take(room).collect();
    }
    // Two brackets, and two blanks before the bar.
    let left = room.saturating_sub(taken(&words) + 4).min(BAR_MAX);
    let Some(share) = share(progress).filter(|_| left >= BAR_MIN) else { return words.join("  ") };
    let full = usize::try_from(share).unwrap_or(0) * left / 100;
    let done = look.paint(&"=".repeat(full), Tone::Good);
    let bar = format!("[{done}{}]", " ".repeat(left - full));
    words.insert(1, bar);
    words.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(files_done: u64, bytes_done: u64) -> Progress {
        Progress { what: "hashing".into(), files_done, files_total: 5_000, bytes_done, bytes_total: 4096 }
    }

    #[test]
    fn the_line_tells_what_finds_room() {
        let of = |room| line(&at(1_200, 1024), room, Look::plain(80));
        assert_eq!(of(79), "hashing  [=====                 ]  25 %  1200 of 5000 files  1.0 KiB of 4.0 KiB");
        assert_eq!(of(46), "hashing  25 %  1200 of 5000 files");
        assert_eq!(of(32), "hashing  [===            ]  25 %");
        assert_eq!(of(12), "hashing");
        assert_eq!(of(3), "has");
    }

    #[test]
    fn no_width_is_exceeded_and_no_number_breaks_it() {
        let odd = [
            Progress::default(),
            at(0, 0),
            at(u64::MAX, u64::MAX),
            Progress { what: "ä".repeat(50), ..at(1, 1) },
            Progress { bytes_total: 0, ..at(3, 3) },
            Progress { files_total: 0, bytes_total: 0, ..at(3, 3) },
        ];
        for progress in &odd {
            for room in 0..200 {
                let text = line(progress, room, Look::plain(80));
                assert!(width(&text) <= room, "{room}: {text}");
            }
        }
    }

    #[test]
    fn the_share_is_of_bytes_where_there_are_any() {
        assert_eq!(share(&at(5_000, 1024)), Some(25));
        assert_eq!(share(&Progress { bytes_total: 0, ..at(2_500, 0) }), Some(50));
        assert_eq!(share(&Progress::default()), None);
        assert_eq!(share(&at(9_999, 9_999)), Some(100), "more than all is all");
    }

    #[test]
    fn elsewhere_lines_come_seldom_and_never_twice() {
        let mut shower = Shower { look: Look::plain(80), said: String::new(), at: None };
        let began = Instant::now();
        assert!(shower.next(&at(0, 0), began).is_some());
        assert!(shower.next(&at(1, 0), began + PAUSE / 2).is_none());
        let line = shower.next(&at(2, 0), began + PAUSE).unwrap();
        assert_eq!(line, "hashing  0 %  2 of 5000 files  0 B of 4.0 KiB\n");
        assert!(shower.next(&at(2, 0), began + PAUSE * 3).is_none());
    }

    #[test]
    fn on_a_terminal_the_line_is_written_anew_and_coloured_only_where_that_is_wanted() {
        let look = Look { terminal: true, ..Look::plain(60) };
        let mut shower = Shower { look, said: String::new(), at: None };
        let now = Instant::now();
        let text = shower.next(&at(1, 1024), now).unwrap();
        assert!(text.starts_with("\rhashing") && text.ends_with("\x1b[K") && !text.contains("\x1b[32m"));
        assert!(shower.next(&at(2, 1024), now + REDRAW / 2).is_none());
        assert!(shower.next(&at(1, 1024), now + REDRAW).is_none(), "nothing new");
        assert!(shower.next(&at(2, 1024), now + REDRAW).is_some());
        let coloured = line(&at(1, 1024), 79, Look { colour: true, ..look });
        assert!(coloured.contains("\x1b[32m"), "{coloured:?}");
    }
}
