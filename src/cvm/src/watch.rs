//! `--watch`: a page again and again, until an operator interrupts it or its reader has left.
//!
//! It goes on while the supervisor or the worker is away, because that is what one watches for.

use crate::failure::{Exit, Failure};
use crate::stdout;
use crate::style::Style;
use crate::units::now_ms;
use cvm_protocol::time::rfc3339;
use std::time::Duration;

/// Shows what `frame` returns, every `pause`. With `json` each frame is one line without a time.
pub(crate) fn watch(
    pause: Duration,
    json: bool,
    mut frame: impl FnMut(Style) -> Result<String, Failure>,
) -> Result<Exit, Failure> {
    loop {
        let style = Style::of_stdout();
        let text = match frame(style) {
            Ok(line) if json => line,
            // JSON too, because the reader parses every line.
            Err(failure) if json => format!("{}\n", serde_json::json!({ "error": failure.cause })),
            Ok(page) => stamped(&page, style, pause),
            Err(failure) => stamped(&failure.to_string(), style, pause),
        };
        stdout::print(&if style.is_terminal && !json { redrawn(&text, style) } else { text })?;
        std::thread::sleep(pause);
    }
}

fn stamped(page: &str, style: Style, pause: Duration) -> String {
    let now = rfc3339(now_ms());
    if style.is_terminal {
        format!("{now}, every {} s; Ctrl-C ends it\n\n{page}", pause.as_secs_f32())
    } else {
        format!("-- {now}\n{page}\n")
    }
}

/// From the top left; each line is cleared to its end and then the rest of the screen, so nothing
/// flickers. A page that is longer than the screen would scroll, so its end is cut off.
fn redrawn(frame: &str, style: Style) -> String {
    let lines: Vec<&str> = frame.lines().collect();
    let room = style.height.unwrap_or(usize::MAX).saturating_sub(1).max(1);
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
        let style = Style { height: Some(4), is_terminal: true, ..Style::plain(80) };
        assert_eq!(redrawn("a\nb\n", style), "\x1b[Ha\x1b[K\nb\x1b[K\n\x1b[J");
        let long = redrawn("1\n2\n3\n4\n5\n", style);
        assert_eq!(long, "\x1b[H1\x1b[K\n2\x1b[K\n... 3 more lines\x1b[K\n\x1b[J");
    }
}
