//! `cvm logs`: the files that keepers write, listed, shown from the end, and followed.
//!
//! Works without the supervisor: when it is gone, its last words are what one wants to read.
//!
//! Refuses names that are no file names, and to obey control sequences on a terminal: the
//! text comes from programs that an agent may have talked into anything.
//! May import: `args`, `look`, `out`, `sink`, `storage` (for earlier boots), `table`, `trouble`,
//! `words`, and its own rooms.

mod boots;
mod follow;
mod list;
mod tail;

use crate::args::LogsArgs;
use crate::look::Look;
use crate::out;
use crate::sink::Sink;
use crate::trouble::{Exit, Trouble};
use crate::words;
use std::fs::File;
use std::path::{Path, PathBuf};

pub(crate) fn run(args: &LogsArgs) -> Result<Exit, Trouble> {
    if args.boots {
        return boots::list();
    }
    if let Some(boot) = args.boot {
        return boots::show(boot, args.service.as_deref(), args.lines);
    }
    let look = Look::of_stdout();
    let Some(service) = &args.service else {
        out::print(&list::page(&args.directory, words::now_ms(), look)?)?;
        return Ok(Exit::Good);
    };
    let log = Log::find(&args.directory, service)?;
    let mut sink = Sink::new(look.terminal);
    let mut current = tail::show(&log, args.lines, &mut sink)?;
    sink.flush()?;
    if args.follow {
        follow::go(&log, &mut current, &mut sink)?;
    }
    Ok(Exit::Good)
}

/// The two files of one log.
pub(crate) struct Log {
    pub name: String,
    pub directory: PathBuf,
}

impl Log {
    fn find(directory: &Path, name: &str) -> Result<Self, Trouble> {
        let log = Self { name: name.to_owned(), directory: directory.to_owned() };
        let is_name =
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        if is_name && (log.path().exists() || log.old_path().exists()) {
            return Ok(log);
        }
        let known = list::names(directory)?;
        let hint = if known.is_empty() {
            format!("there are no logs in {}", directory.display())
        } else {
            format!("there are: {}", known.join(", "))
        };
        Err(Trouble::new(Exit::Usage, format!("logs {name}"), "there is no log of that name").hint(hint))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.name))
    }

    pub(crate) fn old_path(&self) -> PathBuf {
        self.directory.join(format!("{}.log.1", self.name))
    }

    /// The file, or None while there is none: between two files, or before the first line.
    pub(crate) fn open(path: &Path) -> Result<Option<File>, Trouble> {
        match File::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(path, &error)),
        }
    }
}

/// The newest time at the end of any log.
pub(crate) fn newest_stamp(directory: &Path) -> Option<String> {
    let logs = list::names(directory).ok()?;
    logs.iter().filter_map(|name| list::last_stamp(&directory.join(format!("{name}.log")))).max()
}

pub(crate) fn unreadable(path: &Path, error: &std::io::Error) -> Trouble {
    let hint = match error.kind() {
        std::io::ErrorKind::PermissionDenied => "the logs are root's: log in as root, or put sudo before it",
        std::io::ErrorKind::NotFound => "run it inside the VM, or name a copy with --directory",
        _ => "`cvm doctor` looks at the disk",
    };
    Trouble::new(Exit::Bad, format!("logs: {}", path.display()), words::of_io(error)).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_is_told_the_known_ones_and_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["gateway.log", "gateway.log.1", "sshd.log.1", "notes.txt"] {
            std::fs::write(dir.path().join(name), "x\n").unwrap();
        }
        for name in ["gatway", "../gateway", "", "a/b", "gateway.log"] {
            let trouble = Log::find(dir.path(), name).err().unwrap();
            assert!(trouble.to_string().contains("there are: gateway, sshd"), "{trouble}");
        }
        assert!(Log::find(dir.path(), "sshd").is_ok());
    }
}
