//! Orders that cannot be taken back, and the question that comes before them.
//!
//! Refuses to ask where nobody can answer: a script has to say `--yes`. May import: `trouble`,
//! `words`, `follow`, `page`.

use super::{follow, page};
use crate::args::StorageDecideArgs;
use crate::trouble::{Exit, Trouble};
use crate::words::clean;
use cvm_protocol::storage::{Ask, StorageStatus};
use std::io::{BufRead as _, IsTerminal as _, Read as _, Write as _};

/// An answer is a word.
const ANSWER_MAX: u64 = 256;

pub(super) fn forget(args: &StorageDecideArgs) -> Result<Exit, Trouble> {
    let paths = named(args);
    let seen = seen("storage forget", args.yes, |status| {
        let mut lines =
            vec!["These files are given up, and what the bucket has of them is deleted:".to_owned()];
        lines.extend(paths.iter().map(|path| about(status, path)));
        lines
            .push("Good objects that are put back into the bucket would bring them back instead.".to_owned());
        lines.push("Shall they go?".to_owned());
        lines
    })?;
    follow::run("forget", Ask::Forget { paths, seen }, None)
}

pub(super) fn keep(args: &StorageDecideArgs) -> Result<Exit, Trouble> {
    let paths = named(args);
    let seen = seen("storage keep", args.yes, |status| {
        let mut lines = vec!["These files are taken as they are now, and count as good:".to_owned()];
        lines.extend(paths.iter().map(|path| about(status, path)));
        lines.push("Have you compared them with what they should be?".to_owned());
        lines
    })?;
    follow::run("keep", Ask::Keep { paths, seen }, None)
}

pub(super) fn accept_older(yes: bool) -> Result<Exit, Trouble> {
    let seen = seen("storage accept-older", yes, |status| {
        let mut lines = refused(status);
        lines.push("What the bucket lacks stays lost, and a tree on the volume is set aside.".to_owned());
        lines
            .push("Have you looked at the bucket, and shall this machine go on with what it has?".to_owned());
        lines
    })?;
    follow::run("accept-older", Ask::AcceptOlder { seen }, None)
}

pub(super) fn adopt(yes: bool) -> Result<Exit, Trouble> {
    let seen = seen("storage adopt", yes, |status| {
        let mut lines = refused(status);
        lines.push(format!(
            "Everything below {}/{} becomes this machine's state, unchecked: whoever could write there has chosen it.",
            status.bucket, status.prefix
        ));
        lines.push("Do you know that it is yours as it is, and shall this machine take it over?".to_owned());
        lines
    })?;
    follow::run("adopt", Ask::Adopt { seen }, None)
}

/// For those whose fingers, or scripts, know it.
pub(super) fn no_accept_any_more() -> Trouble {
    let cause = "there is no such command any more: it meant four things, one of which deletes";
    Trouble::new(Exit::Usage, "storage accept", cause).hint(
        "`cvm storage forget PATH...` deletes, `cvm storage keep PATH...` does not, `cvm storage accept-older` and \
         `cvm storage adopt` are about the whole bucket; `cvm storage status` says which one helps",
    )
}

/// As the incidents name them.
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

/// What was wrong when it was confirmed; nothing when nobody was asked.
fn seen(
    what: &str,
    yes: bool,
    question: impl FnOnce(&StorageStatus) -> Vec<String>,
) -> Result<Option<String>, Trouble> {
    if yes { Ok(None) } else { confirmed(what, question).map(|status| status.wrong) }
}

pub(super) fn takeover(yes: bool) -> Result<Exit, Trouble> {
    if !yes {
        confirmed("storage takeover", |status| {
            let who = status.held_by.as_deref().unwrap_or("no other instance that this one knows of");
            vec![
                format!("The bucket is held by: {who}"),
                "If that machine still runs, it stops writing, and what it has not pushed yet is lost."
                    .to_owned(),
                "Shall this machine take the bucket now?".to_owned(),
            ]
        })?;
    }
    follow::run("takeover", Ask::Takeover, None)
}

/// Asks `question`, whose last line is the question itself. Yields what it was asked of.
fn confirmed(
    what: &str,
    question: impl FnOnce(&StorageStatus) -> Vec<String>,
) -> Result<StorageStatus, Trouble> {
    let stdin = std::io::stdin();
    if !stdin.is_terminal() {
        let cause = "it cannot be taken back, and nobody is here to confirm it";
        return Err(Trouble::new(Exit::Usage, what, cause).hint("where there is no terminal, give --yes"));
    }
    // Also shows at once whether there is a worker that could do it.
    let (_, status) = page::ask()?;
    let lines: Vec<String> = question(&status).iter().map(|line| clean(line)).collect();
    let _ = write!(std::io::stderr().lock(), "{} (yes/no) ", lines.join("\n"));
    let mut answer = String::new();
    let read = stdin.lock().take(ANSWER_MAX).read_line(&mut answer);
    if read.is_ok() && means_yes(&answer) {
        return Ok(*status);
    }
    Err(Trouble::new(Exit::Bad, what, "not confirmed; nothing was done"))
}

fn means_yes(answer: &str) -> bool {
    matches!(answer.trim().to_ascii_lowercase().as_str(), "yes" | "y")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_yes_means_yes() {
        for yes in ["yes\n", "y\n", " YES \r\n"] {
            assert!(means_yes(yes));
        }
        for no in ["", "\n", "no\n", "yes please\n", "ye\n", "ja\n"] {
            assert!(!means_yes(no), "{no:?}");
        }
    }
}
