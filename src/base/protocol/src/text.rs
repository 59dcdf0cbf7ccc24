//! Makes a text from outside safe to show in a message.

/// The most characters of a text from outside that a message shows.
const SHOWN_CHARS_MAX: usize = 40;

/// The beginning of a text from outside, with every character escaped that could break a line or colour a terminal.
pub fn shown(text: &str) -> String {
    let mut escaped: String = text.chars().take(SHOWN_CHARS_MAX).flat_map(escape).collect();
    if text.chars().nth(SHOWN_CHARS_MAX).is_some() {
        escaped.push_str("...");
    }
    escaped
}

fn escape(character: char) -> impl Iterator<Item = char> {
    let printable = character == ' ' || character.is_ascii_graphic() || character.is_alphanumeric();
    let (plain, escaped) =
        if printable { (Some(character), None) } else { (None, Some(character.escape_default())) };
    plain.into_iter().chain(escaped.into_iter().flatten())
}
