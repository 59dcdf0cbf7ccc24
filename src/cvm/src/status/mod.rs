//! `cvm status`: the supervisor's snapshot for people and for machines, once or again and again.
//!
//! Refuses to interpret the snapshot beyond what it says. May import: `args`, `look`, `out`,
//! `socket`, `trouble`, `words`, and its own rooms `json`, `render`.

mod json;
mod render;
#[cfg(test)]
pub(crate) mod samples;

use crate::args::StatusArgs;
use crate::look::Look;
use crate::out;
use crate::socket::{self, Snapshot};
use crate::trouble::{Exit, Trouble};
use crate::words::now_ms;
use cvm_blueprint::time::rfc3339;
use std::time::Duration;

pub(crate) fn run(args: &StatusArgs) -> Result<Exit, Trouble> {
    if let Some(pause) = args.watch {
        return watch(args, pause);
    }
    let snapshot = socket::status()?;
    let look = Look::of_stdout();
    let text = match (args.json, look.terminal) {
        (true, true) => json::indented(&snapshot.json),
        (true, false) => snapshot.json.clone() + "\n",
        (false, _) => render::page(&snapshot.status, look),
    };
    out::print(&text)?;
    Ok(if snapshot.status.healthy { Exit::Good } else { Exit::Bad })
}

/// Until somebody interrupts it, or nobody reads any more.
fn watch(args: &StatusArgs, pause: Duration) -> Result<Exit, Trouble> {
    loop {
        let look = Look::of_stdout();
        let outcome = socket::status();
        let frame = match &outcome {
            Ok(snapshot) if args.json => snapshot.json.clone() + "\n",
            // A line of JSON too, or the reader of the lines would choke on it.
            Err(trouble) if args.json => format!("{}\n", serde_json::json!({ "error": trouble.cause })),
            Ok(snapshot) => stamped(&render::page(&snapshot.status, look), look, pause),
            Err(trouble) => stamped(&trouble.to_string(), look, pause),
        };
        out::print(&if look.terminal && !args.json { redrawn(&frame, look) } else { frame })?;
        drop::<Result<Snapshot, Trouble>>(outcome);
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
