//! The style of what is printed, by where it goes: width, height, colour.
//!
//! Colours appear on a terminal only, and never when `NO_COLOR` is set (no-color.org) or the terminal
//! is dumb. Callers name the meaning of a text, and this file knows the colour.

use std::io::IsTerminal;
use std::os::fd::AsFd;
use terminal_size::{Height, Width};

/// Where no terminal tells its width: what fits into a mail or an issue.
const WIDTH_ELSEWHERE: usize = 100;
/// A table is not readable in less.
const WIDTH_MIN: usize = 30;

#[derive(Debug, Clone, Copy)]
pub(crate) struct Style {
    pub width: usize,
    /// None: a page may have any number of lines.
    pub height: Option<usize>,
    pub colour: bool,
    pub is_terminal: bool,
}

/// The meaning of a piece of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Caution,
    Bad,
    Quiet,
    Strong,
}

impl Style {
    pub(crate) fn of_stdout() -> Self {
        Self::of(&std::io::stdout())
    }

    pub(crate) fn of_stderr() -> Self {
        Self::of(&std::io::stderr())
    }

    fn of(stream: &(impl IsTerminal + AsFd)) -> Self {
        let is_terminal = stream.is_terminal();
        let size = if is_terminal { terminal_size::terminal_size_of(stream) } else { None };
        let (width, height) = match size {
            // A terminal on a serial line reports 0.
            Some((Width(w), Height(h))) if w > 0 => (usize::from(w), (h > 0).then_some(usize::from(h))),
            _ => (WIDTH_ELSEWHERE, None),
        };
        Self { width: width.max(WIDTH_MIN), height, colour: is_terminal && wants_colour(), is_terminal }
    }

    #[cfg(test)]
    pub(crate) fn plain(width: usize) -> Self {
        Self { width, height: None, colour: false, is_terminal: false }
    }

    pub(crate) fn paint(self, text: &str, tone: Tone) -> String {
        let code = match tone {
            Tone::Plain => "",
            Tone::Good => "32",
            Tone::Caution => "33",
            Tone::Bad => "1;31",
            Tone::Quiet => "2",
            Tone::Strong => "1",
        };
        if !self.colour || code.is_empty() || text.is_empty() {
            return text.to_owned();
        }
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

/// Whether the user's environment allows colours on a terminal.
pub(crate) fn wants_colour() -> bool {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    set("NO_COLOR").is_none() && set("TERM").is_none_or(|term| term != "dumb")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colour_is_added_only_where_it_is_wanted() {
        let plain = Style::plain(80);
        assert_eq!(plain.paint("x", Tone::Bad), "x");
        let coloured = Style { colour: true, ..plain };
        assert_eq!(coloured.paint("x", Tone::Bad), "\x1b[1;31mx\x1b[0m");
        assert_eq!(coloured.paint("x", Tone::Plain), "x");
    }
}
