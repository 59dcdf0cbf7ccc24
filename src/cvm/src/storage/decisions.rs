//! Orders that cannot be taken back, and the question that comes before them.

use super::{follow, status};
use crate::args::StorageDecideArgs;
use crate::failure::{Exit, Failure};
use crate::prompt;
use crate::text::clean;
use cvm_protocol::storage::{Ask, StorageStatus};

pub(super) fn forget(args: &StorageDecideArgs) -> Result<Exit, Failure> {
    let paths = named(args);
    let seen = seen("storage forget", args.yes, |status| {
        let mut lines =
            vec!["These files are given up, and their objects in the bucket are deleted:".to_owned()];
        lines.extend(paths.iter().map(|path| about(status, path)));
        lines
            .push("Good objects that are put back into the bucket would bring them back instead.".to_owned());
        lines.push("Delete them?".to_owned());
        lines
    })?;
    follow::run("forget", Ask::Forget { paths, seen }, None)
}

pub(super) fn keep(args: &StorageDecideArgs) -> Result<Exit, Failure> {
    let paths = named(args);
    let seen = seen("storage keep", args.yes, |status| {
        let mut lines = vec!["These files are taken as they are now, and count as good:".to_owned()];
        lines.extend(paths.iter().map(|path| about(status, path)));
        lines.push("Have you compared them with what they should be?".to_owned());
        lines
    })?;
    follow::run("keep", Ask::Keep { paths, seen }, None)
}

pub(super) fn accept_older(yes: bool) -> Result<Exit, Failure> {
    let seen = seen("storage accept-older", yes, |status| {
        let mut lines = refused(status);
        lines
            .push("Data that the bucket lacks stays lost, and a tree on the volume is set aside.".to_owned());
        lines.push(
            "Have you looked at the bucket, and shall this machine go on with its contents?".to_owned(),
        );
        lines
    })?;
    follow::run("accept-older", Ask::AcceptOlder { seen }, None)
}

pub(super) fn adopt(yes: bool) -> Result<Exit, Failure> {
    let seen = seen("storage adopt", yes, |status| {
        let mut lines = refused(status);
        lines.push(format!(
            "Everything below {}/{} becomes this machine's state, unchecked: anybody who could write there may have \
             chosen it.",
            status.bucket, status.prefix
        ));
        lines.push("Do you know that it is yours as it is, and shall this machine take it over?".to_owned());
        lines
    })?;
    follow::run("adopt", Ask::Adopt { seen }, None)
}

/// For operators and scripts that know the old command.
pub(super) fn accept_is_gone() -> Failure {
    let cause = "there is no such command any more: it meant four things, one of which deletes";
    Failure::new(Exit::Usage, "storage accept", cause).hint(
        "`cvm storage forget PATH...` deletes, `cvm storage keep PATH...` does not, `cvm storage accept-older` and \
         `cvm storage adopt` are about the whole bucket; `cvm storage status` says which one helps",
    )
}

/// The paths in the form in which incidents name them.
fn named(args: &StorageDecideArgs) -> Vec<String> {
    let below = |path: &String| path.strip_prefix("/data/").unwrap_or(path).trim_matches('/').to_owned();
    args.paths.iter().map(below).collect()
}

fn about(status: &StorageStatus, path: &str) -> String {
    let incident = status.incidents.iter().find(|incident| incident.path == path);
    let what = incident.map_or("no incident names it, so this will be refused", |i| i.what.as_str());
    format!("  {path}: {what}")
}

fn refused(status: &StorageStatus) -> Vec<String> {
    status.why.iter().map(|why| format!("{}: {why}", status.phase)).collect()
}

/// Confirms an order, and returns the name of the fault that the operator has seen; none if nobody was asked.
fn seen(
    what: &str,
    yes: bool,
    question: impl FnOnce(&StorageStatus) -> Vec<String>,
) -> Result<Option<String>, Failure> {
    if yes { Ok(None) } else { confirmed(what, question).map(|status| status.wrong) }
}

pub(super) fn takeover(yes: bool) -> Result<Exit, Failure> {
    if !yes {
        confirmed("storage takeover", |status| {
            let who = status.held_by.as_deref().unwrap_or("no other instance that this one knows of");
            vec![
                format!("The bucket is held by: {who}"),
                "If that machine still runs, it stops writing, and changes that it has not pushed are lost."
                    .to_owned(),
                "Shall this machine take the bucket now?".to_owned(),
            ]
        })?;
    }
    follow::run("takeover", Ask::Takeover, None)
}

/// Asks for a confirmation; the last line of `question` is the question itself. Returns the status that
/// the operator has seen.
fn confirmed(
    what: &str,
    question: impl FnOnce(&StorageStatus) -> Vec<String>,
) -> Result<StorageStatus, Failure> {
    prompt::require_terminal(what)?;
    // Fails before the question if there is no worker that could carry out the order.
    let (_, status) = status::ask()?;
    let lines: Vec<String> = question(&status).iter().map(|line| clean(line)).collect();
    prompt::confirm(what, &lines.join("\n"))?;
    Ok(*status)
}
