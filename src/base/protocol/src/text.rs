//! How a text from outside is shown in a message.

/// How much of a foreign text a message shows.
const SHOWN_CHARS_MAX: usize = 40;

/// A text from outside for a message: no control characters, nothing that could break a line
/// or colour a terminal, and not much of it.
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
