//! The progress of a long operation, on standard error: on a terminal one line with a bar that changes,
//! elsewhere a new line every few seconds.
//!
//! By hand, because `indicatif` prints nothing where there is no terminal, and cuts a line that is too
//! long instead of leaving its least important part out: it would replace the smaller half of this file
//! and bring four crates.

use crate::style::{Style, Tone};
use crate::text::{clean, width, wrap};
use crate::units::{count, size};
use cvm_protocol::storage::Progress;
use std::io::Write as _;
use std::time::{Duration, Instant};

/// Between two lines where there is no terminal.
const PAUSE: Duration = Duration::from_secs(5);
/// Between two updates of the line on a terminal.
const REDRAW: Duration = Duration::from_millis(100);
const BAR_MIN: usize = 10;
const BAR_MAX: usize = 40;

pub(crate) struct ProgressLine {
    style: Style,
    /// The last line, and when it was shown.
    shown: String,
    at: Option<Instant>,
}

impl ProgressLine {
    pub(crate) fn new() -> Self {
        Self { style: Style::of_stderr(), shown: String::new(), at: None }
    }

    pub(crate) fn show(&mut self, progress: &Progress) {
        if let Some(text) = self.next(progress, Instant::now()) {
            // A lost line of progress is no loss.
            let _ = std::io::stderr().lock().write_all(text.as_bytes());
        }
    }

    /// Clears the terminal's line, before anything else is written.
    pub(crate) fn clear(&mut self) {
        if self.style.is_terminal && !self.shown.is_empty() {
            let _ = std::io::stderr().lock().write_all(b"\r\x1b[K");
            self.shown.clear();
        }
    }

    fn next(&mut self, progress: &Progress, now: Instant) -> Option<String> {
        let pause = if self.style.is_terminal { REDRAW } else { PAUSE };
        if self.at.is_some_and(|at| now.duration_since(at) < pause) {
            return None;
        }
        let line = if self.style.is_terminal {
            // The last column stays free: a cursor behind it would wrap.
            line(progress, self.style.width.saturating_sub(1), self.style)
        } else {
            parts(progress).join("  ")
        };
        if line == self.shown {
            return None;
        }
        self.at = Some(now);
        self.shown.clone_from(&line);
        Some(if self.style.is_terminal { format!("\r{line}\x1b[K") } else { line + "\n" })
    }
}

/// The per cent that are done, of the bytes or else of the files, if the total is known.
pub(crate) fn share(progress: &Progress) -> Option<u64> {
    let (done, total) = match (progress.bytes_total, progress.files_total) {
        (0, 0) => return None,
        (0, files) => (progress.files_done, files),
        (bytes, _) => (progress.bytes_done, bytes),
    };
    u64::try_from(u128::from(done.min(total)) * 100 / u128::from(total)).ok()
}

/// The operation, the per cent, the files, the bytes: the most important part first.
fn parts(progress: &Progress) -> Vec<String> {
    let mut parts = vec![clean(&progress.what)];
    parts.extend(share(progress).map(|n| format!("{n} %")));
    if progress.files_total > 0 || progress.files_done > 0 {
        parts.push(match progress.files_total {
            0 => count(progress.files_done, "file", "files"),
            total => format!("{} of {}", progress.files_done, count(total, "file", "files")),
        });
    }
    if progress.bytes_total > 0 || progress.bytes_done > 0 {
        parts.push(match progress.bytes_total {
            0 => size(progress.bytes_done),
            total => format!("{} of {}", size(progress.bytes_done), size(total)),
        });
    }
    parts
}

/// One line of at most `columns`: the parts that fit, and a bar in the columns that are left.
fn line(progress: &Progress, columns: usize, style: Style) -> String {
    let mut parts = parts(progress);
    let taken = |parts: &[String]| parts.iter().map(|part| width(part) + 2).sum::<usize>().saturating_sub(2);
    while parts.len() > 1 && taken(&parts) > columns {
        parts.pop();
    }
    if taken(&parts) > columns {
        return if columns == 0 { String::new() } else { wrap(&parts[0], columns).swap_remove(0) };
    }
    // Two brackets, and two blanks before the bar.
    let left = columns.saturating_sub(taken(&parts) + 4).min(BAR_MAX);
    let Some(share) = share(progress).filter(|_| left >= BAR_MIN) else { return parts.join("  ") };
    let full = usize::try_from(share).unwrap_or(0) * left / 100;
    let done = style.paint(&"=".repeat(full), Tone::Good);
    let bar = format!("[{done}{}]", " ".repeat(left - full));
    parts.insert(1, bar);
    parts.join("  ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(files_done: u64, bytes_done: u64) -> Progress {
        Progress { what: "hashing".into(), files_done, files_total: 5_000, bytes_done, bytes_total: 4096 }
    }

    #[test]
    fn the_line_holds_the_parts_that_fit() {
        let of = |room| line(&at(1_200, 1024), room, Style::plain(80));
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
            for columns in 0..200 {
                let text = line(progress, columns, Style::plain(80));
                assert!(width(&text) <= columns, "{columns}: {text}");
            }
        }
    }

    #[test]
    fn the_share_is_of_the_bytes_if_their_total_is_known() {
        assert_eq!(share(&at(5_000, 1024)), Some(25));
        assert_eq!(share(&Progress { bytes_total: 0, ..at(2_500, 0) }), Some(50));
        assert_eq!(share(&Progress::default()), None);
        assert_eq!(share(&at(9_999, 9_999)), Some(100), "more than the total counts as the total");
    }

    #[test]
    fn elsewhere_lines_come_seldom_and_never_twice() {
        let mut progress_line = ProgressLine { style: Style::plain(80), shown: String::new(), at: None };
        let began = Instant::now();
        assert!(progress_line.next(&at(0, 0), began).is_some());
        assert!(progress_line.next(&at(1, 0), began + PAUSE / 2).is_none());
        let line = progress_line.next(&at(2, 0), began + PAUSE).unwrap();
        assert_eq!(line, "hashing  0 %  2 of 5000 files  0 B of 4.0 KiB\n");
        assert!(progress_line.next(&at(2, 0), began + PAUSE * 3).is_none());
    }

    #[test]
    fn on_a_terminal_the_line_is_written_anew_and_coloured_only_where_that_is_wanted() {
        let style = Style { is_terminal: true, ..Style::plain(60) };
        let mut progress_line = ProgressLine { style, shown: String::new(), at: None };
        let now = Instant::now();
        let text = progress_line.next(&at(1, 1024), now).unwrap();
        assert!(text.starts_with("\rhashing") && text.ends_with("\x1b[K") && !text.contains("\x1b[32m"));
        assert!(progress_line.next(&at(2, 1024), now + REDRAW / 2).is_none());
        assert!(progress_line.next(&at(1, 1024), now + REDRAW).is_none(), "the line is the same");
        assert!(progress_line.next(&at(2, 1024), now + REDRAW).is_some());
        let coloured = line(&at(1, 1024), 79, Style { colour: true, ..style });
        assert!(coloured.contains("\x1b[32m"), "{coloured:?}");
    }
}
