//! An answer split into messages that a channel takes, at places where a reader would turn the page.
//!
//! The pieces put together are the text again. Only white space at the ends of a message is left out, and
//! a code block that is cut is closed and opened again.

use unicode_segmentation::UnicodeSegmentation as _;

/// What channels take in one message, in UTF-16 code units, as their servers and clients count.
pub(crate) fn limit_of(channel: &str) -> usize {
    match channel {
        "telegram" | "whatsapp" => 4096,
        // Discord's limit, and the one for channels that are not known.
        _ => 2000,
    }
}

const FENCE: &str = "```";
/// Units that a message keeps free to close a code block, and to open it again with its language.
const FENCE_ROOM: usize = 48;
/// A longer word after a fence is no language.
const LANGUAGE_MAX: usize = 24;

/// The messages of an answer. An answer of white space has none.
pub(crate) fn messages(text: &str, limit: usize) -> Vec<String> {
    let fenced = text.contains(FENCE) && limit > 4 * FENCE_ROOM;
    let cuts = cut(text, if fenced { limit - FENCE_ROOM } else { limit });
    if !fenced || cuts.len() < 2 {
        return cuts.into_iter().map(trimmed).filter(|t| !t.is_empty()).map(str::to_owned).collect();
    }
    let mut open: Option<String> = None;
    let mut all = Vec::with_capacity(cuts.len());
    for piece in cuts {
        let before = open.clone();
        open = piece.lines().fold(open, open_block_after);
        let inside = trimmed(piece);
        if inside.is_empty() {
            continue;
        }
        let mut message = before.map_or_else(String::new, |language| format!("{FENCE}{language}\n"));
        message.push_str(inside);
        if open.is_some() {
            message.push('\n');
            message.push_str(FENCE);
        }
        all.push(message);
    }
    all
}

/// The language of the code block that is open after a line, given the one that was open before it.
fn open_block_after(open: Option<String>, line: &str) -> Option<String> {
    let Some(rest) = line.trim_start().strip_prefix(FENCE) else { return open };
    // A fence may have more than three marks.
    let language = rest.trim_start_matches('`').trim();
    match open {
        Some(_) if language.is_empty() => None,
        None if language.contains('`') => None,
        None if language.len() > LANGUAGE_MAX => Some(String::new()),
        None => Some(language.to_owned()),
        open => open,
    }
}

/// Without line breaks before the text, whose indentation means something, and white space behind it.
fn trimmed(text: &str) -> &str {
    text.trim_start_matches(['\n', '\r']).trim_end()
}

fn units(text: &str) -> usize {
    text.chars().map(char::len_utf16).sum()
}

/// Pieces of at most `limit` units; put together they are the text.
fn cut(text: &str, limit: usize) -> Vec<&str> {
    let limit = limit.max(2);
    let mut pieces = Vec::new();
    let mut rest = text;
    loop {
        let window = window(rest, limit);
        if window.len() == rest.len() {
            break;
        }
        let (piece, after) = rest.split_at(cut_at(window));
        pieces.push(piece);
        rest = after;
    }
    if !rest.is_empty() {
        pieces.push(rest);
    }
    pieces
}

/// As much of the beginning as fits, in characters as readers see them. A first character that is too
/// large in itself is cut between code points.
fn window(text: &str, limit: usize) -> &str {
    // Every byte is at most one unit.
    if text.len() <= limit {
        return text;
    }
    let mut used = 0;
    for (at, grapheme) in text.grapheme_indices(true) {
        let size = units(grapheme);
        if used + size > limit {
            return if at == 0 { code_points(text, limit) } else { text.get(..at).unwrap_or(text) };
        }
        used += size;
    }
    text
}

fn code_points(text: &str, limit: usize) -> &str {
    let mut used = 0;
    let too_much = text.char_indices().find(|(_, one)| {
        used += one.len_utf16();
        used > limit
    });
    too_much.and_then(|(at, _)| text.get(..at)).unwrap_or(text)
}

/// Where to cut a full window: behind the last paragraph, line, sentence or word that leaves it more
/// than half full; otherwise behind its last word; otherwise at its end.
fn cut_at(window: &str) -> usize {
    const BREAKS: [&[&str]; 4] =
        [&["\n\n"], &["\n"], &[". ", "! ", "? ", "… ", "。", "！", "？"], &[" ", "\t", "\u{3000}"]];
    let half = window.len() / 2;
    let last = |breaks: &[&str]| {
        breaks.iter().filter_map(|b| window.rfind(b).map(|at| at + b.len())).max().unwrap_or(0)
    };
    BREAKS
        .iter()
        .map(|breaks| last(breaks))
        .find(|at| *at > half)
        .or_else(|| BREAKS.iter().rev().map(|breaks| last(breaks)).find(|at| *at > 0))
        .unwrap_or(window.len())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_short_answer_is_one_message_and_an_empty_one_none() {
        assert_eq!(messages("Hello.\n", 4096), ["Hello."]);
        assert!(messages(" \n\n ", 4096).is_empty());
        assert_eq!(messages(&"x".repeat(4096), 4096).len(), 1);
        assert_eq!(messages(&"x".repeat(4097), 4096).len(), 2);
        // Each of these characters is two units.
        assert_eq!(messages(&"😀".repeat(2048), 4096).len(), 1);
        assert_eq!(messages(&"😀".repeat(2049), 4096).len(), 2);
    }

    #[test]
    fn paragraphs_go_before_lines_lines_before_sentences_sentences_before_words() {
        let at = |text: &str| messages(text, 20);
        assert_eq!(at("one two three\n\nfour five six"), ["one two three", "four five six"]);
        assert_eq!(at("one two three\nfour five six"), ["one two three", "four five six"]);
        assert_eq!(at("One two three. Four five"), ["One two three.", "Four five"]);
        assert_eq!(at("one two three four five"), ["one two three four", "five"]);
        assert_eq!(at("abcdefghijklmnopqrstuvw"), ["abcdefghijklmnopqrst", "uvw"]);
    }

    #[test]
    fn what_readers_see_as_one_character_stays_whole() {
        let family = "👨‍👩‍👧‍👦";
        let text = family.repeat(3);
        for message in messages(&text, 24) {
            assert_eq!(message.replace(family, ""), "");
        }
    }

    #[test]
    fn a_code_block_that_is_cut_is_closed_and_opened_again() {
        let code = "let x = 1;\n".repeat(60);
        let parts = messages(&format!("See:\n```rust\n{code}```\nDone."), 400);
        assert!(parts.len() > 1);
        for part in &parts {
            assert_eq!(part.matches(FENCE).count() % 2, 0, "{part}");
            assert!(units(part) <= 400);
        }
        assert!(parts[1].starts_with("```rust\n"));
    }

    #[test]
    fn a_line_that_begins_with_code_opens_no_block_and_one_inside_closes_none() {
        let prose = "one two three\n".repeat(60);
        for part in messages(&format!("```x``` is code\n{prose}"), 400).iter().skip(1) {
            assert!(!part.contains(FENCE), "{part}");
        }
        let parts = messages(&format!("```sh\n```rust is no end\n{prose}```\nDone."), 400);
        assert!(parts.len() > 2 && parts[1].starts_with("```sh\n"), "{parts:?}");
    }

    proptest! {
        #[test]
        fn no_text_is_lost_and_no_piece_is_too_long(text in "(\\PC|[ \n.]|👨‍👩‍👧|e\u{301}){0,300}", limit in 2usize..80) {
            let pieces = cut(&text, limit);
            prop_assert_eq!(pieces.concat(), text.as_str());
            prop_assert!(pieces.iter().all(|p| units(p) <= limit && !p.is_empty()));
        }

        #[test]
        fn no_message_is_too_long_whatever_the_fences(text in "(```[a-z]{0,30}\n|[a-z]{1,30}[ \n]|\n){0,200}", limit in 200usize..500) {
            for message in messages(&text, limit) {
                prop_assert!(units(&message) <= limit, "{}", message);
            }
        }
    }
}
