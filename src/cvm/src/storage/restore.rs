//! `cvm storage restore`: everything from the bucket into an empty directory, on any machine that has
//! `MASTER_KEY` and the credentials.
//!
//! Checks the whole configuration with the supervisor's own code, and becomes `cvm-storage`, which reads
//! the keys from a sealed memory file: they are in no argument and in no environment of it.

use crate::failure::{Exit, Failure, mistakes, warn};
use crate::input;
use crate::sibling;
use crate::text;
use cvm_protocol::storage::StorageSpec;
use cvm_secrets::keys::KeyRing;
use cvm_system::config::{Config, Storage};
use cvm_system::env::Environment;
use cvm_system::storage_specification;
use std::io::ErrorKind;
use std::os::unix::process::CommandExt as _;
use std::path::Path;

const WHAT: &str = "storage restore";
const PROGRAM: &str = "cvm-storage";

/// Does not return when it succeeds.
pub(super) fn run(to: &Path, accept: bool) -> Result<Exit, Failure> {
    let directory =
        std::path::absolute(to).map_err(|e| Failure::new(Exit::Usage, WHAT, text::io_error(&e)))?;
    check_empty(&directory)?;
    sibling::path(WHAT, PROGRAM)?;
    let spec = specification(&input::environment())?;
    let (program, mut command) = sibling::command(WHAT, PROGRAM, &spec)?;
    drop(spec);
    command.arg("restore").arg(&directory).args(accept.then_some("accept"));
    // It replaces this process, so that signals and the exit status are its own. `exec` also gives
    // SIGPIPE its default action back, and wipes the memory of this process.
    Err(sibling::failed(WHAT, &program, &command.exec()))
}

fn check_empty(directory: &Path) -> Result<(), Failure> {
    let refused = |cause: &str, hint: &str| {
        Err(Failure::new(Exit::Usage, format!("{WHAT}: {}", directory.display()), cause).hint(hint))
    };
    let hint = "name a directory that is empty or not there yet; nothing is ever merged or overwritten";
    match std::fs::read_dir(directory) {
        Ok(mut entries) => match entries.next() {
            None => Ok(()),
            Some(_) => refused("it is not empty", hint),
        },
        Err(error) if error.kind() == ErrorKind::NotFound && !directory.is_symlink() => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => refused("it is not a directory", hint),
        Err(error) => refused(&text::io_error(&error), hint),
    }
}

/// The worker's specification, from the variables that the VM has.
fn specification(environment: &Environment) -> Result<StorageSpec, Failure> {
    let (config, warnings) = Config::parse_elsewhere(environment)
        .map_err(|problems| mistakes(WHAT, &problems, "nothing was started"))?;
    for warning in warnings {
        warn(&warning.to_string());
    }
    let (Storage::S3(s3), Some(master)) = (&config.storage, &config.master_key) else {
        let hint = "set S3_BUCKET, MASTER_KEY and the credentials as they are set for the VM";
        return Err(Failure::new(Exit::Usage, WHAT, "S3_BUCKET is not set, so there is no bucket").hint(hint));
    };
    Ok(storage_specification(s3, &KeyRing::derive(master), config.gateway.user.as_str(), 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restore_needs_an_empty_or_absent_directory() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        assert!(check_empty(dir.path()).is_ok() && check_empty(&at("absent/too")).is_ok());
        std::fs::write(at("file"), "x").unwrap();
        std::os::unix::fs::symlink("/no/such/place", at("dangling")).unwrap();
        let cause = |path: &Path| check_empty(path).unwrap_err().cause;
        assert_eq!(cause(dir.path()), "it is not empty");
        assert_eq!(cause(&at("file")), "it is not a directory");
        assert!(check_empty(&at("dangling")).is_err());
    }
}
