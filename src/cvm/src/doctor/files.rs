//! Room files: do all files of the gateway's state belong to the gateway? A file that root wrote (with a
//! plain `node ... openclaw.mjs` in a root shell, for example) stops the gateway at its next start.

use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::sources;
use crate::text;
use crate::units;
use cvm_protocol::paths::STATE;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Less than the limit of a check, so that a large state gets a partial answer.
const TIME: Duration = Duration::from_secs(3);
/// How many files a finding names.
const EXAMPLES_MAX: usize = 3;

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.run(STATE, || {
        let Some(access) = sources::gateway_access() else {
            return skip("only the supervisor knows the gateway's user");
        };
        let Some(account) = sources::account(&access.user) else {
            return fail(
                format!("there is no user {}", access.user),
                "the boot step `home` makes it: `cvm status` shows why it did not",
            );
        };
        judge(&walk(Path::new(STATE), account.uid, Instant::now() + TIME), &access.user)
    });
}

#[derive(Default)]
struct Walk {
    seen: u64,
    foreign: u64,
    examples: Vec<PathBuf>,
    /// The walk ended at its time limit.
    cut: bool,
    error: Option<String>,
}

/// Counts the files of `root`, without following links or leaving its file system.
fn walk(root: &Path, uid: u32, until: Instant) -> Walk {
    let mut found = Walk::default();
    let device = match root.symlink_metadata() {
        Ok(data) => data.dev(),
        Err(error) => return Walk { error: Some(text::io_error(&error)), ..found },
    };
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        if Instant::now() >= until {
            found.cut = true;
            break;
        }
        // A file that disappears meanwhile is no finding.
        let Ok(data) = path.symlink_metadata() else { continue };
        found.seen += 1;
        if data.uid() != uid {
            found.foreign += 1;
            if found.examples.len() < EXAMPLES_MAX {
                found.examples.push(path.clone());
            }
        }
        if data.is_dir() && data.dev() == device {
            let Ok(entries) = std::fs::read_dir(&path) else { continue };
            waiting.extend(entries.flatten().map(|entry| entry.path()));
        }
    }
    found
}

fn judge(walk: &Walk, user: &str) -> Outcome {
    if let Some(error) = &walk.error {
        return fail(error.clone(), "the boot step `state` makes it: `cvm status` shows why it did not");
    }
    let seen = units::count(walk.seen, "file", "files");
    let seen = if walk.cut { format!("{seen} (the walk ended at its time limit)") } else { seen };
    if walk.foreign == 0 {
        return ok(format!("{seen}, all of {user}"));
    }
    let examples: Vec<String> = walk.examples.iter().map(|p| text::clean(&p.to_string_lossy())).collect();
    warn(
        format!("{} of {seen} are not {user}'s, such as {}", walk.foreign, examples.join(", ")),
        format!("`chown -hR {user}: {STATE}`, then `cvm restart gateway`; use `openclaw`, not node, as root"),
    )
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn files_of_others_are_counted_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let uid = dir.path().metadata().unwrap().uid();
        std::fs::create_dir(dir.path().join("sub")).unwrap();
        std::fs::write(dir.path().join("sub/file"), "").unwrap();
        std::os::unix::fs::symlink("/", dir.path().join("link")).unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        let mine = walk(dir.path(), uid, until);
        assert_eq!((mine.seen, mine.foreign, mine.cut), (4, 0, false));
        assert_eq!(judge(&mine, "me").verdict, Verdict::Ok);
        let theirs = walk(dir.path(), uid + 1, until);
        assert_eq!((theirs.foreign, theirs.examples.len()), (4, 3));
        let outcome = judge(&theirs, "openclaw");
        assert_eq!(outcome.verdict, Verdict::Warn);
        assert!(outcome.remedy.unwrap().starts_with("`chown -hR openclaw: /data/openclaw`"));
    }

    #[test]
    fn a_large_tree_gets_a_partial_answer_and_an_absent_one_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        assert!(judge(&walk(dir.path(), 0, Instant::now()), "me").found.contains("time limit"));
        let absent = walk(&dir.path().join("no"), 0, Instant::now());
        assert_eq!(judge(&absent, "me").verdict, Verdict::Fail);
    }
}
