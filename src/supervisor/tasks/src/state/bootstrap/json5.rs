//! Finds a few values in a JSON5 text, and remembers nothing else of it.
//!
//! Written by hand, because the crates for JSON5 build a whole tree of strings that nobody
//! wipes (an `openclaw.json` is full of keys), limit neither depth nor size, and refuse the
//! whole text for one oddity that the gateway's own reader takes. This one walks the text once,
//! in memory that its depth alone decides.
//!
//! Refuses: to panic, to nest deeper than [`DEPTH_MAX`], to read more than [`TEXT_BYTES_MAX`],
//! and to correct a text: what is not JSON5 is nothing.

use std::collections::BTreeMap;

use cvm_secrets::secret::Secret;

/// Real configurations are some ten levels deep.
const DEPTH_MAX: usize = 64;
/// Real configurations are some kilobytes long.
const TEXT_BYTES_MAX: usize = 4 * 1024 * 1024;

/// A value that is neither an object nor an array.
pub(super) enum Scalar {
    /// A string, unescaped.
    Text(Secret),
    /// A number, `true`, `false` or `null`, as it was written.
    Word(String),
}

/// The values at the wanted paths. `None` is an object or an array.
pub(super) struct Found(BTreeMap<&'static str, Option<Scalar>>);

impl Found {
    pub(super) fn scalar(&self, path: &str) -> Option<&Scalar> {
        self.0.get(path)?.as_ref()
    }

    pub(super) fn has(&self, path: &str) -> bool {
        self.0.contains_key(path)
    }
}

/// Looks for object members at `wanted` (keys joined with dots; keys with dots are never
/// wanted). The last of two members with one name counts, as in JavaScript. `None` is a text
/// that is not JSON5.
pub(super) fn find(text: &str, wanted: &[&'static str]) -> Option<Found> {
    if text.len() > TEXT_BYTES_MAX {
        return None;
    }
    let mut reader = Reader { rest: text, wanted, found: BTreeMap::new(), path: Vec::new(), in_array: 0 };
    reader.blank()?;
    reader.value(0)?;
    reader.blank()?;
    reader.rest.is_empty().then_some(Found(reader.found))
}

struct Reader<'t, 'w> {
    rest: &'t str,
    wanted: &'w [&'static str],
    found: BTreeMap<&'static str, Option<Scalar>>,
    /// Keys from the root to here.
    path: Vec<String>,
    /// How many arrays we are in: nothing below one is ever wanted.
    in_array: usize,
}

/// Every method answers `None` for "this is not JSON5".
impl Reader<'_, '_> {
    fn value(&mut self, depth: usize) -> Option<()> {
        if depth > DEPTH_MAX {
            return None;
        }
        let place = self.place();
        self.forget();
        match self.peek()? {
            '{' => {
                self.note(place, None);
                self.members(depth, '}', Self::member)
            }
            '[' => {
                self.note(place, None);
                self.in_array += 1;
                let done = self.members(depth, ']', Self::value);
                self.in_array -= 1;
                done
            }
            '"' | '\'' => {
                let text = self.string(place.is_some())?;
                self.note(place, Some(Scalar::Text(text)));
                Some(())
            }
            _ => {
                let word = self.word()?;
                self.note(place, Some(Scalar::Word(word)));
                Some(())
            }
        }
    }

    /// What stands between two brackets, with commas in between and perhaps one at the end.
    fn members(&mut self, depth: usize, close: char, one: fn(&mut Self, usize) -> Option<()>) -> Option<()> {
        self.skip_char();
        loop {
            self.blank()?;
            if self.take(close) {
                return Some(());
            }
            one(self, depth + 1)?;
            self.blank()?;
            if !self.take(',') && self.peek()? != close {
                return None;
            }
        }
    }

    fn member(&mut self, depth: usize) -> Option<()> {
        let key = match self.peek()? {
            '"' | '\'' => self.string(true)?.expose_str()?.to_owned(),
            _ => self.identifier()?,
        };
        self.blank()?;
        if !self.take(':') {
            return None;
        }
        self.blank()?;
        self.path.push(key);
        let done = self.value(depth);
        self.path.pop();
        done
    }

    /// The wanted path that we stand at.
    fn place(&self) -> Option<&'static str> {
        if self.in_array > 0 {
            return None;
        }
        let here = |path: &&&'static str| path.split('.').eq(self.path.iter().map(String::as_str));
        self.wanted.iter().find(here).copied()
    }

    /// A second member with one name replaces the first with all that is below it.
    fn forget(&mut self) {
        if self.in_array > 0 {
            return;
        }
        let path = &self.path;
        self.found.retain(|found, _| {
            let mut keys = found.split('.');
            !path.iter().all(|key| keys.next() == Some(key))
        });
    }

    fn note(&mut self, place: Option<&'static str>, value: Option<Scalar>) {
        if let Some(place) = place {
            self.found.insert(place, value);
        }
    }

    /// A string with its quotes; its content only where someone wants it.
    fn string(&mut self, keep: bool) -> Option<Secret> {
        let quote = self.next()?;
        let mut end = None;
        let mut before = None;
        for (at, character) in self.rest.char_indices() {
            before = match (before, character) {
                // The line feed of a continued line that ends in "\r\n".
                (Some('\\'), '\r') => Some('\r'),
                (Some('\r'), '\n') | (Some('\\'), _) => None,
                (_, '\\') => Some('\\'),
                // JSON5 allows U+2028 and U+2029 in strings, but no plain line break.
                (_, '\n' | '\r') => return None,
                (_, character) if character == quote => {
                    end = Some(at);
                    break;
                }
                _ => None,
            };
        }
        let (inside, rest) = self.rest.split_at(end?);
        self.rest = rest;
        self.skip_char();
        if keep { unescaped(inside) } else { Some(Secret::copy_of(b"")) }
    }

    /// An unquoted key. Generous about which letters it takes: the gateway is stricter.
    fn identifier(&mut self) -> Option<String> {
        let in_name =
            |c: char| c.is_alphanumeric() || matches!(c, '$' | '_' | '\\' | '\u{200c}' | '\u{200d}');
        let end = self.rest.find(|c| !in_name(c)).unwrap_or(self.rest.len());
        let (name, rest) = self.rest.split_at(end);
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        self.rest = rest;
        if !name.contains('\\') {
            return Some(name.to_owned());
        }
        Some(unescaped(name)?.expose_str()?.to_owned())
    }

    /// A number or a literal. What it means is for whoever wanted it.
    fn word(&mut self) -> Option<String> {
        let in_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.');
        let end = self.rest.find(|c| !in_word(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        let unsigned = word.strip_prefix(['+', '-']).unwrap_or(word);
        let hex = unsigned.strip_prefix("0x").or_else(|| unsigned.strip_prefix("0X"));
        let known = match hex {
            Some(digits) => !digits.is_empty() && digits.chars().all(|c| c.is_ascii_hexdigit()),
            None => {
                matches!(word, "true" | "false" | "null")
                    || matches!(unsigned, "Infinity" | "NaN")
                    || (unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.')
                        && unsigned.parse::<f64>().is_ok())
            }
        };
        match hex {
            _ if !known => None,
            // As a decimal number, so that a reader needs to know one form only.
            Some(digits) => Some(u64::from_str_radix(digits, 16).ok()?.to_string()),
            None => Some(word.to_owned()),
        }
    }

    /// White space and comments. `None` is a comment that does not end.
    fn blank(&mut self) -> Option<()> {
        loop {
            self.rest = self.rest.trim_start_matches(|c: char| c.is_whitespace() || c == '\u{feff}');
            if let Some(comment) = self.rest.strip_prefix("//") {
                let end = comment.find(['\n', '\r', '\u{2028}', '\u{2029}']);
                self.rest = &comment[end.unwrap_or(comment.len())..];
            } else if let Some(comment) = self.rest.strip_prefix("/*") {
                self.rest = comment.split_once("*/")?.1;
            } else {
                return Some(());
            }
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn next(&mut self) -> Option<char> {
        let mut characters = self.rest.chars();
        let next = characters.next()?;
        self.rest = characters.as_str();
        Some(next)
    }

    fn skip_char(&mut self) {
        let _ = self.next();
    }

    fn take(&mut self, wanted: char) -> bool {
        let there = self.peek() == Some(wanted);
        if there {
            self.skip_char();
        }
        there
    }
}

/// The content of a string without its escapes, which never make it longer.
fn unescaped(text: &str) -> Option<Secret> {
    let mut written = 0;
    let mut valid = true;
    let room = Secret::filled(text.len(), |room| {
        let mut characters = text.chars();
        while let Some(character) = characters.next() {
            let character = if character == '\\' { escape(&mut characters) } else { Some(Some(character)) };
            match character {
                Some(Some(character)) => written += character.encode_utf8(&mut room[written..]).len(),
                Some(None) => {}
                None => {
                    valid = false;
                    return;
                }
            }
        }
    });
    valid.then(|| Secret::copy_of(&room.expose()[..written]))
}

/// One escape after its backslash: a character, nothing (a continued line), or a mistake.
#[expect(clippy::option_option, reason = "a mistake and a continued line are different things")]
fn escape(characters: &mut std::str::Chars<'_>) -> Option<Option<char>> {
    let plain = match characters.next()? {
        'b' => '\u{8}',
        'f' => '\u{c}',
        'n' => '\n',
        'r' => '\r',
        't' => '\t',
        'v' => '\u{b}',
        '0' => '\0',
        '\r' => {
            let mut ahead = characters.clone();
            if ahead.next() == Some('\n') {
                *characters = ahead;
            }
            return Some(None);
        }
        '\n' | '\u{2028}' | '\u{2029}' => return Some(None),
        'x' => char::from_u32(hex(characters, 2)?)?,
        'u' => {
            let unit = hex(characters, 4)?;
            return utf16(unit, characters).map(Some);
        }
        other => other,
    };
    Some(Some(plain))
}

/// A character beyond the first 65,536 comes as two escapes. Half of one, which JavaScript
/// allows and Rust does not, becomes the replacement character.
fn utf16(unit: u32, characters: &mut std::str::Chars<'_>) -> Option<char> {
    if !(0xd800..0xdc00).contains(&unit) {
        return Some(char::from_u32(unit).unwrap_or(char::REPLACEMENT_CHARACTER));
    }
    let mut ahead = characters.clone();
    if ahead.next() == Some('\\') && ahead.next() == Some('u') {
        let low = hex(&mut ahead, 4)?;
        if (0xdc00..0xe000).contains(&low) {
            *characters = ahead;
            return char::from_u32(0x10000 + ((unit - 0xd800) << 10) + (low - 0xdc00));
        }
    }
    Some(char::REPLACEMENT_CHARACTER)
}

fn hex(characters: &mut std::str::Chars<'_>, digits: usize) -> Option<u32> {
    let mut value = 0;
    for _ in 0..digits {
        value = value * 16 + characters.next()?.to_digit(16)?;
    }
    Some(value)
}
