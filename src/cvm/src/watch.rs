//! A page again and again, until somebody interrupts it or nobody reads any more.
//!
//! Refuses to end because the other side is away: that is what one watches for.
//! May import: `look`, `out`, `trouble`, `words`.

use crate::look::Look;
use crate::out;
use crate::trouble::{Exit, Trouble};
use crate::words::now_ms;
use cvm_protocol::time::rfc3339;
use std::time::Duration;

/// Shows what `frame` yields, every `pause`. `json`: a line each, neither stamped nor redrawn.
pub(crate) fn watch(
    pause: Duration,
    json: bool,
    mut frame: impl FnMut(Look) -> Result<String, Trouble>,
) -> Result<Exit, Trouble> {
    loop {
        let look = Look::of_stdout();
        let text = match frame(look) {
            Ok(line) if json => line,
            // A line of JSON too, or the reader of the lines would choke on it.
            Err(trouble) if json => format!("{}\n", serde_json::json!({ "error": trouble.cause })),
            Ok(page) => stamped(&page, look, pause),
            Err(trouble) => stamped(&trouble.to_string(), look, pause),
        };
        out::print(&if look.terminal && !json { redrawn(&text, look) } else { text })?;
        std::thread::sleep(pause);
    }
}

fn stamped(page: &str, look: Look, pause: Duration) -> String {
    let now = rfc3339(now_ms());
    if look.terminal {
        format!("{now}, every {} s; Ctrl-C ends it\n\n{page}", pause.as_secs_f32())
    } else {
        format!("-- {now}\n{page}\n")
    }
}

/// From the top left, each line cleared to its end and then the rest of the screen: nothing
/// flickers. What is longer than the screen would scroll it away, so it is cut, and said.
fn redrawn(frame: &str, look: Look) -> String {
    let lines: Vec<&str> = frame.lines().collect();
    let room = look.height.unwrap_or(usize::MAX).saturating_sub(1).max(1);
    let cut = lines.len() > room;
    let shown = if cut { room - 1 } else { lines.len() };
    let mut text = String::from("\x1b[H");
    for line in &lines[..shown] {
        text += line;
        text += "\x1b[K\n";
    }
    if cut {
        text.extend(["... ", &(lines.len() - shown).to_string(), " more lines\x1b[K\n"]);
    }
    text + "\x1b[J"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redrawn_page_never_scrolls() {
        let look = Look { height: Some(4), terminal: true, ..Look::plain(80) };
        assert_eq!(redrawn("a\nb\n", look), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        let long = redrawn("1\n2\n3\n4\n5\n", look);
        assert_eq!(long, "\x1b[H1\x1b[K\n2\x1b[K\n... 3 more lines\x1b[K\n\x1b[J");
    }
}
