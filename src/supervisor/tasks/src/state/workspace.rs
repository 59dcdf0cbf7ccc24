//! Writes the user's files into the workspace, at the first boot.
//!
//! Nothing outside of the workspace is written: every path is checked here again, and no link is followed. No file
//! is replaced.

use crate::files::{Dir, FileError, Kind, Owner};
use crate::report::{self, Failure, Outcome, Report};
use nix::errno::Errno;
use serde_json::{Map, Value};
use std::ffi::OsStr;

/// Where the gateway's default configuration has it, below the state directory.
const WORKSPACE: &str = "workspace";

/// `files` is a JSON object from path to text.
pub(crate) fn write(state: &Dir, files: &[u8], owner: Owner, report: &mut Report) -> Outcome<()> {
    let files: Map<String, Value> = serde_json::from_slice(files).map_err(|_| {
        Failure::for_good("OPENCLAW_WORKSPACE_FILES_B64 is no JSON object of paths and texts")
    })?;
    let workspace = state.ensure_sub(OsStr::new(WORKSPACE), 0o700, Some(owner))?;
    let (mut written, mut kept, mut blocked) = (0, 0, 0);
    for (path, text) in &files {
        let Value::String(text) = text else {
            return Err(Failure::for_good("OPENCLAW_WORKSPACE_FILES_B64 holds something that is no text"));
        };
        match one(&workspace, path, text.as_bytes(), owner) {
            Ok(true) => written += 1,
            Ok(false) => kept += 1,
            // A link or a file where a directory belongs: it is the agent's, and stays.
            Err(Obstacle::File(error))
                if matches!(error.errno, Errno::ELOOP | Errno::ENOTDIR | Errno::EISDIR) =>
            {
                report::detail(error.to_string());
                blocked += 1;
            }
            Err(Obstacle::File(error)) => return Err(error.into()),
            Err(Obstacle::Leaves) => {
                return Err(Failure::for_good(
                    "OPENCLAW_WORKSPACE_FILES_B64 has a path that leaves the workspace; paths are relative, without ..",
                ));
            }
        }
    }
    report.info(format!("{written} files written into the workspace"));
    if kept > 0 {
        report.info(format!("{kept} files were in the workspace already and stay as they are"));
    }
    if blocked > 0 {
        report.warn(format!(
            "{blocked} files are not written: a link or a file lies where a directory of the workspace belongs"
        ));
    }
    Ok(())
}

enum Obstacle {
    Leaves,
    File(FileError),
}

impl From<FileError> for Obstacle {
    fn from(error: FileError) -> Self {
        Self::File(error)
    }
}

fn one(workspace: &Dir, path: &str, text: &[u8], owner: Owner) -> Result<bool, Obstacle> {
    let parts: Vec<&str> = path.split('/').collect();
    let stays = |part: &&str| !part.is_empty() && *part != "." && *part != ".." && !part.contains('\0');
    if !parts.iter().all(stays) {
        return Err(Obstacle::Leaves);
    }
    let Some((name, parents)) = parts.split_last() else { return Err(Obstacle::Leaves) };
    let mut deeper: Option<Dir> = None;
    for parent in parents {
        let here = deeper.as_ref().unwrap_or(workspace);
        deeper = Some(here.ensure_sub(OsStr::new(parent), 0o700, Some(owner))?);
    }
    let dir = deeper.as_ref().unwrap_or(workspace);
    Ok(dir.create(OsStr::new(name), text, Kind::kept_by(owner))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    fn me() -> Owner {
        Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
    }

    fn room() -> (tempfile::TempDir, Dir) {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open(temp.path()).unwrap();
        (temp, dir)
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn files_and_their_parents_are_private() {
        let (temp, state) = room();
        write(&state, br#"{"a/b/c.md":"text","AGENTS.md":""}"#, me(), &mut Report::default()).unwrap();
        let workspace = temp.path().join("workspace");
        assert_eq!(fs::read(workspace.join("a/b/c.md")).unwrap(), b"text");
        assert_eq!((mode(&workspace.join("a/b")), mode(&workspace.join("a/b/c.md"))), (0o700, 0o600));
        assert_eq!(mode(&workspace), 0o700);
    }

    #[test]
    fn what_is_there_stays() {
        let (temp, state) = room();
        fs::create_dir_all(temp.path().join("workspace")).unwrap();
        fs::write(temp.path().join("workspace/SOUL.md"), "mine").unwrap();
        let mut report = Report::default();
        write(&state, br#"{"SOUL.md":"theirs","b":"x"}"#, me(), &mut report).unwrap();
        assert_eq!(fs::read(temp.path().join("workspace/SOUL.md")).unwrap(), b"mine");
        assert!(report.notes.iter().any(|n| n.text.starts_with("1 files were")));
    }

    #[test]
    fn no_path_and_no_link_leads_out() {
        let (temp, state) = room();
        fs::create_dir_all(temp.path().join("workspace")).unwrap();
        fs::create_dir_all(temp.path().join("outside")).unwrap();
        symlink("../outside", temp.path().join("workspace/link")).unwrap();
        for path in ["../outside/x", "/etc/x", "a/../../outside/x", "a//b", "", ".", "a/", "a\u{0}b"] {
            let files = serde_json::to_vec(&Map::from_iter([(path.to_owned(), Value::from("x"))])).unwrap();
            let failure = write(&state, &files, me(), &mut Report::default()).unwrap_err();
            assert!(!failure.retry, "{path}");
        }
        let mut report = Report::default();
        write(&state, br#"{"link/x":"x","fine":"x"}"#, me(), &mut report).unwrap();
        assert_eq!(fs::read_dir(temp.path().join("outside")).unwrap().count(), 0);
        assert!(temp.path().join("workspace/fine").exists());
        assert!(report.notes.iter().any(|n| n.text.starts_with("1 files are not written")));
    }

    #[test]
    fn a_workspace_that_is_a_link_is_not_followed() {
        let (temp, state) = room();
        fs::create_dir_all(temp.path().join("outside")).unwrap();
        symlink("outside", temp.path().join("workspace")).unwrap();
        assert!(write(&state, br#"{"x":"x"}"#, me(), &mut Report::default()).is_err());
        assert_eq!(fs::read_dir(temp.path().join("outside")).unwrap().count(), 0);
    }
}
