//! What the gateway finds when it starts: its configuration, workspace files, device identity,
//! and the token that it will ask for.
//!
//! All of it is written once, at the beginning. A file that exists counts, whatever it says; where it differs
//! from what the keys say, a remark tells of it and nothing is changed.
//!
//! No file is overwritten and no link of the agent's is followed. A state that a newer gateway has written is refused.

mod bootstrap;
mod config;
mod database;
mod identity;
mod schema;
mod token;
mod workspace;

use crate::files::{Dir, Kind, Owner};
use crate::report::{Failure, Outcome, Report};
use crate::root_dir::RootDir;
use cvm_protocol::accounts::Account;
use cvm_protocol::paths;
use cvm_protocol::task::StateTask;
use cvm_secrets::base64_bytes::PackedBytes;
use zeroize::Zeroizing;

/// On the volume, beside the state and out of the agent's reach: how far the first boot came.
const FIRST_BOOT: &str = "first-boot";
const BEGUN: &[u8] = b"begun\n";
const DONE: &[u8] = b"done\n";
const MARK_MAX: usize = 64;

pub(crate) fn prepare(root_dir: &RootDir, task: &StateTask, report: &mut Report) -> Outcome<()> {
    let owner = owner_of(root_dir, &task.user)?;
    let own = Dir::ensure(&root_dir.at(paths::OWN_STATE), 0o700, None)?;
    let state = Dir::open(&root_dir.at(paths::STATE))?;
    schema::check(root_dir, &state)?;
    let token = token::settle(&own, task.token.as_ref(), report)?;
    if is_first_boot(&own, &state)? {
        // In this order, so that a boot that is killed here is still the first: files, then the
        // configuration, then the mark.
        if let Some(files) = &task.workspace {
            workspace::write(&state, &unpack(files, "workspace files")?, owner, report)?;
        }
        config::write(&state, task, owner, report)?;
        own.write(FIRST_BOOT, DONE, Kind::KEPT)?;
    } else {
        // A configuration that was deleted since comes back; the workspace files do not.
        config::write(&state, task, owner, report)?;
    }
    config::inspect(&state, task, &token, report);
    if let Some(seed) = &task.device_seed {
        identity::settle(&own, &state, &unpack(seed, "device seed")?, owner, report)?;
    }
    Ok(())
}

fn owner_of(root_dir: &RootDir, user: &str) -> Outcome<Owner> {
    let text = |path| std::fs::read(root_dir.at(path)).map(|b| String::from_utf8_lossy(&b).into_owned());
    let (passwd, group) = (text("/etc/passwd").unwrap_or_default(), text("/etc/group").unwrap_or_default());
    match Account::find(&passwd, &group, user) {
        Some(account) => Ok(Owner { uid: account.uid, gid: account.gid }),
        None => Err(Failure::again(format!("there is no user {user}; the step before this one makes it"))),
    }
}

fn unpack(bytes: &PackedBytes, what: &str) -> Outcome<Zeroizing<Vec<u8>>> {
    bytes.unpack().ok_or_else(|| Failure::for_good(format!("the {what} did not arrive whole: this is a bug")))
}

/// Whether this volume's first boot is still to be done, or to be finished.
///
/// A volume without a configuration has not been booted. The mark says so before anything is
/// written, because the configuration itself is written before the end; and it stays, because a
/// configuration deleted years later makes no first boot.
fn is_first_boot(own: &Dir, state: &Dir) -> Outcome<bool> {
    match own.read(FIRST_BOOT, MARK_MAX)? {
        Some(mark) => Ok(mark.as_slice() != DONE),
        None if state.has(config::NAME)? => Ok(false),
        None => {
            own.write(FIRST_BOOT, BEGUN, Kind::KEPT)?;
            Ok(true)
        }
    }
}

#[cfg(test)]
mod tests;
