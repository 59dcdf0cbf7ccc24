//! `cvm status`: the supervisor's snapshot for people and for machines, once or again and again.
//!
//! In S3 mode the page begins with an answer of the storage worker, which has little time to give it;
//! the JSON is the supervisor's alone.

mod page;
#[cfg(test)]
pub(crate) mod samples;

use crate::args::StatusArgs;
use crate::control_socket::{self, Snapshot};
use crate::failure::{Exit, Failure};
use crate::json;
use crate::stdout;
use crate::storage::WorkerAnswer;
use crate::style::Style;
use crate::units;
use crate::watch::watch;
use cvm_protocol::status::StorageMode;

pub(crate) fn run(args: &StatusArgs) -> Result<Exit, Failure> {
    if let Some(pause) = args.watch {
        return watch(pause, args.json, |style| {
            let snapshot = control_socket::status()?;
            Ok(if args.json { snapshot.json + "\n" } else { page(&snapshot, style) })
        });
    }
    let snapshot = control_socket::status()?;
    let style = Style::of_stdout();
    let text = if args.json { json::shown(&snapshot.json, style) } else { page(&snapshot, style) };
    stdout::print(&text)?;
    Ok(if snapshot.status.healthy { Exit::Good } else { Exit::Bad })
}

fn page(snapshot: &Snapshot, style: Style) -> String {
    let has_worker = snapshot.status.storage.mode == StorageMode::S3;
    let worker = has_worker.then(WorkerAnswer::ask);
    page::page(&snapshot.status, worker.as_ref(), units::now_ms(), style)
}
