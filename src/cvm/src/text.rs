//! Text for people: cleaned of everything that could steer a terminal, measured, and wrapped.
//!
//! Much of what this program shows was written by others (a service's last output, a file name
//! that the agent chose). Such text goes to a terminal only through [`clean`] or [`for_terminal`].

use textwrap::{Options, WordSeparator, WordSplitter, WrapAlgorithm};
use unicode_width::UnicodeWidthStr as _;

/// The text as one line without control characters.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => ' ',
            c if is_steering(c) => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// Control characters, and the characters that reverse the direction of writing.
fn is_steering(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A line of a log as a terminal may see it: colours pass, every other control sequence is shown
/// instead of obeyed.
pub(crate) fn for_terminal(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut shown = String::with_capacity(text.len());
    let mut rest = text.as_ref();
    while let Some(c) = rest.chars().next() {
        if let Some(length) = colour_sequence(rest) {
            shown.push_str(&rest[..length]);
            rest = &rest[length..];
            continue;
        }
        rest = &rest[c.len_utf8()..];
        match c {
            '\n' | '\t' => shown.push(c),
            // The caret form of `cat -v`.
            c if c.is_ascii_control() => shown.extend(['^', char::from((c as u8) ^ 0x40)]),
            c if is_steering(c) => shown.push('\u{fffd}'),
            c => shown.push(c),
        }
    }
    shown
}

/// The length of `ESC [ digits and semicolons m` at the start of `text`.
fn colour_sequence(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\x1b[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    parameters[end..].starts_with('m').then_some(end + 3)
}

/// The number of columns that a text takes on a terminal.
pub(crate) fn width(text: &str) -> usize {
    text.width()
}

/// Lines of at most `width` columns, broken between words where that is possible.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let options = Options::new(width.max(1))
        .word_separator(WordSeparator::AsciiSpace)
        .word_splitter(WordSplitter::NoHyphenation)
        .wrap_algorithm(WrapAlgorithm::FirstFit);
    textwrap::wrap(text, options).into_iter().map(Into::into).collect()
}

/// An error of the operating system without Rust's "(os error 2)".
pub(crate) fn io_error(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_survives_cleaning() {
        assert_eq!(clean("a\x1b]0;title\x07b\nc\u{202e}d"), "a\u{fffd}]0;title\u{fffd}b c\u{fffd}d");
    }

    #[test]
    fn a_log_line_keeps_its_colours_and_no_other_control_sequence() {
        assert_eq!(for_terminal(b"\x1b[1;31mred\x1b[0m\t\xff"), "\x1b[1;31mred\x1b[0m\t\u{fffd}");
        assert_eq!(for_terminal(b"\x1b[2J\x1b]52;c;eA==\x07\r\x1b["), "^[[2J^[]52;c;eA==^G^M^[[");
    }

    #[test]
    fn wrapping_never_exceeds_the_width_and_loses_nothing() {
        let text = "die Überprüfung von /data/a-very-long-path-without-any-space ist zu Ende";
        for width in 1..60 {
            let lines = wrap(text, width);
            assert!(lines.iter().all(|l| super::width(l) <= width), "{width}: {lines:?}");
            let squeezed = |s: &str| s.replace(' ', "");
            assert_eq!(squeezed(&lines.concat()), squeezed(text));
        }
        assert_eq!(wrap("", 10), [""]);
    }

    #[test]
    fn a_wide_character_takes_two_columns() {
        assert_eq!(
            (width("größe"), width("日本"), wrap("日本語", 4)),
            (5, 4, vec!["日本".into(), "語".into()])
        );
    }

    #[test]
    fn errors_are_shown_without_numbers() {
        assert_eq!(io_error(&std::io::Error::from_raw_os_error(2)), "No such file or directory");
        assert_eq!(io_error(&std::io::Error::other("odd")), "odd");
    }
}
