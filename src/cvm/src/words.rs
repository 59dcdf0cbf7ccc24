//! Text for people: cleaned of what could steer a terminal, wrapped to a width, with sizes and
//! spans in words.
//!
//! Much of what is shown here came from elsewhere (a service's last words, a file name the
//! agent chose), so nothing goes to a terminal unless it passed [`clean`] or [`for_terminal`].
//!
//! Refuses to measure in bytes: a width is a number of characters. May import: nothing of ours.

use cvm_protocol::time;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// One line without control characters.
pub(crate) fn clean(text: &str) -> String {
    text.chars()
        .map(|c| match c {
            '\n' | '\t' => ' ',
            c if is_steering(c) => '\u{fffd}',
            c => c,
        })
        .collect()
}

/// Control characters, and those that turn the direction of writing around.
fn is_steering(c: char) -> bool {
    c.is_control() || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A line of a log as a terminal may see it: colours pass, everything else that could steer the
/// terminal is shown instead of obeyed.
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

/// Length of `ESC [ digits and semicolons m` at the start of `text`.
fn colour_sequence(text: &str) -> Option<usize> {
    let parameters = text.strip_prefix("\x1b[")?;
    let end = parameters.find(|c: char| !c.is_ascii_digit() && c != ';')?;
    parameters[end..].starts_with('m').then_some(end + 3)
}

/// Columns a text takes. Wide scripts take more than this; their tables are uneven, not wrong.
pub(crate) fn width(text: &str) -> usize {
    text.chars().count()
}

/// Lines of at most `width` characters, broken between words where that is possible.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let limit = width.max(1);
    let mut lines = Vec::new();
    let mut line = String::new();
    let mut used = 0;
    for word in text.split_whitespace() {
        let length = self::width(word);
        if used > 0 && used + 1 + length > limit {
            lines.push(std::mem::take(&mut line));
            used = 0;
        }
        if used > 0 {
            line.push(' ');
            used += 1;
        }
        for c in word.chars() {
            if used == limit {
                lines.push(std::mem::take(&mut line));
                used = 0;
            }
            line.push(c);
            used += 1;
        }
    }
    if used > 0 || lines.is_empty() {
        lines.push(line);
    }
    lines
}

/// Bytes in the largest unit that leaves a whole number in front of the point.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    if bytes < 1024 {
        return format!("{bytes} B");
    }
    let mut tenths = u128::from(bytes) * 10 / 1024;
    let mut unit = UNITS[0];
    for larger in &UNITS[1..] {
        if tenths < 10_240 {
            break;
        }
        tenths /= 1024;
        unit = larger;
    }
    if tenths >= 1000 {
        format!("{} {unit}", tenths / 10)
    } else {
        format!("{}.{} {unit}", tenths / 10, tenths % 10)
    }
}

/// A span given in milliseconds, as people say it.
pub(crate) fn span(ms: u64) -> String {
    time::words(Duration::from_millis(ms))
}

/// A span of which tenths of a second matter.
pub(crate) fn fine(ms: u64) -> String {
    match ms {
        0..1000 => format!("{ms} ms"),
        1000..60_000 => format!("{}.{} s", ms / 1000, ms % 1000 / 100),
        _ => span(ms),
    }
}

/// `1 line`, `2 lines`.
pub(crate) fn count(number: u64, one: &str, many: &str) -> String {
    format!("{number} {}", if number == 1 { one } else { many })
}

/// An error of the operating system without Rust's "(os error 2)".
pub(crate) fn of_io(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_steers_a_terminal_survives_cleaning() {
        assert_eq!(clean("a\x1b]0;title\x07b\nc\u{202e}d"), "a\u{fffd}]0;title\u{fffd}b c\u{fffd}d");
    }

    #[test]
    fn a_log_line_keeps_its_colours_and_nothing_else_that_steers() {
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
    fn sizes_read_as_people_say_them() {
        let told = [0, 1023, 1024, 1536, 10 * 1024 * 1024, 345 << 30, u64::MAX].map(size);
        assert_eq!(told, ["0 B", "1023 B", "1.0 KiB", "1.5 KiB", "10.0 MiB", "345 GiB", "16383 PiB"]);
    }

    #[test]
    fn errors_are_told_without_numbers() {
        assert_eq!(of_io(&std::io::Error::from_raw_os_error(2)), "No such file or directory");
        assert_eq!(of_io(&std::io::Error::other("odd")), "odd");
    }
}
