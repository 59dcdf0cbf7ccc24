//! The two files of one log: the current one, and the old one that a rotation leaves.

use super::list;
use crate::failure::{Exit, Failure};
use crate::text;
use std::fs::File;
use std::path::{Path, PathBuf};

pub(crate) struct Log {
    pub name: String,
    pub directory: PathBuf,
}

impl Log {
    pub(crate) fn find(directory: &Path, name: &str) -> Result<Self, Failure> {
        let log = Self { name: name.to_owned(), directory: directory.to_owned() };
        let is_name =
            !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_".contains(&b));
        if is_name && (log.path().exists() || log.old_path().exists()) {
            return Ok(log);
        }
        let known = list::names(directory).map_err(|e| unreadable(directory, &e))?;
        let hint = if known.is_empty() {
            format!("there are no logs in {}", directory.display())
        } else {
            format!("there are: {}", known.join(", "))
        };
        Err(Failure::new(Exit::Usage, format!("logs {name}"), "there is no log of that name").hint(hint))
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.join(format!("{}.log", self.name))
    }

    pub(crate) fn old_path(&self) -> PathBuf {
        self.directory.join(format!("{}.log.1", self.name))
    }

    /// The file, or None while there is none: during a rotation, or before the first line.
    pub(crate) fn open(path: &Path) -> Result<Option<File>, Failure> {
        match File::open(path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(unreadable(path, &error)),
        }
    }
}

pub(crate) fn unreadable(path: &Path, error: &std::io::Error) -> Failure {
    let hint = match error.kind() {
        std::io::ErrorKind::PermissionDenied => "the logs are root's: log in as root, or put sudo before it",
        std::io::ErrorKind::NotFound => "run it inside the VM, or name a copy with --directory",
        _ => "`cvm doctor` looks at the disk",
    };
    Failure::new(Exit::Bad, format!("logs: {}", path.display()), text::io_error(error)).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_fails_with_the_known_ones_and_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["gateway.log", "gateway.log.1", "sshd.log.1", "notes.txt"] {
            std::fs::write(dir.path().join(name), "x\n").unwrap();
        }
        for name in ["gatway", "../gateway", "", "a/b", "gateway.log"] {
            let failure = Log::find(dir.path(), name).err().unwrap();
            assert!(failure.to_string().contains("there are: gateway, sshd"), "{failure}");
        }
        assert!(Log::find(dir.path(), "sshd").is_ok());
    }

    #[test]
    fn a_missing_directory_fails_with_a_remedy() {
        let failure = Log::find(Path::new("/no/such/place"), "sshd").err().unwrap();
        assert!(failure.to_string().contains("--directory"), "{failure}");
    }
}
