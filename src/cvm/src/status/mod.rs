//! `cvm status`: the supervisor's snapshot for people and for machines, once or again and again.
//!
//! In S3 mode the page begins with what the storage worker says, which is asked for it and has
//! little time to answer; the JSON is the supervisor's alone.
//!
//! Refuses to interpret the snapshot beyond what it says. May import: `args`, `json`, `look`,
//! `out`, `socket`, `storage`, `trouble`, `watch`, `words`, and its own room `render`.

mod render;
#[cfg(test)]
pub(crate) mod samples;

use crate::args::StatusArgs;
use crate::json;
use crate::look::Look;
use crate::out;
use crate::socket::{self, Snapshot};
use crate::storage::{self, Glance};
use crate::trouble::{Exit, Trouble};
use crate::watch::watch;
use crate::words;

pub(crate) fn run(args: &StatusArgs) -> Result<Exit, Trouble> {
    if let Some(pause) = args.watch {
        return watch(pause, args.json, |look| Ok(shown(&socket::status()?, args.json, look)));
    }
    let snapshot = socket::status()?;
    let look = Look::of_stdout();
    let text = match (args.json, look.terminal) {
        (true, true) => json::indented(&snapshot.json),
        _ => shown(&snapshot, args.json, look),
    };
    out::print(&text)?;
    Ok(if snapshot.status.healthy { Exit::Good } else { Exit::Bad })
}

fn shown(snapshot: &Snapshot, json: bool, look: Look) -> String {
    if json {
        return snapshot.json.clone() + "\n";
    }
    let has_worker = snapshot.status.storage.mode == storage::MODE;
    let glance = has_worker.then(Glance::take);
    render::page(&snapshot.status, glance.as_ref(), words::now_ms(), look)
}
