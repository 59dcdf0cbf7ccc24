//! Orders that cannot be taken back, and the question that comes before them.
//!
//! Refuses to ask where nobody can answer: a script has to say `--yes`. May import: `trouble`,
//! `words`, `follow`, `page`.

use super::{follow, page};
use crate::trouble::{Exit, Trouble};
use crate::words::{clean, count};
use cvm_blueprint::storage::{Ask, StorageStatus};
use std::io::{BufRead as _, IsTerminal as _, Read as _, Write as _};

/// An answer is a word.
const ANSWER_MAX: u64 = 256;

pub(super) fn accept(yes: bool) -> Result<Exit, Trouble> {
    let mut seen = None;
    if !yes {
        let status = confirmed("storage accept", |status| {
            let mut lines: Vec<String> =
                status.why.iter().map(|why| format!("{}: {why}", status.phase)).collect();
            lines.push(count(status.incidents.len() as u64, "incident", "incidents"));
            lines.extend(status.incidents.iter().map(|i| format!("  {}: {}", i.path, i.what)));
            lines.push(
                "This goes on with what the bucket has, as it is, and what it lacks stays lost.".to_owned(),
            );
            lines.push("Have you looked at all of it, and shall this machine go on?".to_owned());
            lines
        })?;
        seen = status.wrong;
    }
    follow::run("accept", Ask::Accept { seen }, None)
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
