//! Gives the gateway the device identity that is derived from `MASTER_KEY`, while its state holds none.
//!
//! The gateway keeps its identity in `state/openclaw.sqlite`. While there is no such file it
//! imports `identity/device.json` at its start; once there is, that file makes it refuse to start,
//! so the row is put in instead. An identity that differs from the derived one may be paired already,
//! so a remark tells of it and it is never changed.

use super::bootstrap;
use super::database::{self, Found};
use crate::files::{Dir, FileResult, Kind, Owner};
use crate::report::{Failure, Outcome, Report};
use cvm_secrets::keys::DeviceSeed;
use cvm_secrets::secret::Secret;
use serde_json::Value;
use std::ffi::OsStr;
use std::time::SystemTime;

const DIRECTORY: &str = "identity";
const FILE: &str = "device.json";
/// The gateway renames the file while it imports it; one that was killed then goes on with these.
const CLAIMED: [&str; 2] = ["device.json.doctor-importing", "device.json.native-importing"];
/// The gateway's own limit for this file.
const FILE_MAX: usize = 131_072;
const TOPIC: &str = "device identity";

pub(crate) fn settle(own: &Dir, state: &Dir, seed: &[u8], owner: Owner, report: &mut Report) -> Outcome<()> {
    let seed: &[u8; 32] =
        seed.try_into().map_err(|_| Failure::for_good("the device seed has not 32 bytes: this is a bug"))?;
    let seed = DeviceSeed::from_bytes(seed);
    match find(own, state, &seed)? {
        Found::None => write(state, &seed, owner),
        Found::NoRow => insert(state, &seed, owner, report),
        Found::NoTable => {
            report.remark(
                TOPIC,
                "the state's database is there and has no place for a device, so none is put in: was it made by \
                 another version of the gateway? The gateway will have a device of its own making",
            );
            Ok(())
        }
        Found::Id(id) if id == seed.device_id() => Ok(()),
        Found::Id(id) => {
            report.remark(
                TOPIC,
                &format!(
                    "the state's device is {}, the device of MASTER_KEY is {}. The state's counts: was MASTER_KEY \
                     changed, or the volume taken from another instance?",
                    short(&id),
                    short(&seed.device_id())
                ),
            );
            Ok(())
        }
        Found::Unclear(why) => {
            report.remark(
                TOPIC,
                &format!(
                    "whether the state holds a device identity cannot be told ({why}), so none is written"
                ),
            );
            Ok(())
        }
    }
}

fn find(own: &Dir, state: &Dir, seed: &DeviceSeed) -> FileResult<Found> {
    // The database first: the gateway uses what it holds, whatever file lies beside it.
    match database::device(own, state)? {
        Found::None => in_file(state),
        Found::NoRow => Ok(match in_file(state)? {
            // A first start that was killed before it came to the import.
            Found::Id(id) if id == seed.device_id() => Found::NoRow,
            Found::None => Found::NoRow,
            found => found,
        }),
        found => Ok(found),
    }
}

fn in_file(state: &Dir) -> FileResult<Found> {
    if !state.has(DIRECTORY)? {
        return Ok(Found::None);
    }
    let unclear = |what: &str| Ok(Found::Unclear(what.to_owned()));
    let Ok(directory) = state.sub(OsStr::new(DIRECTORY)) else {
        return unclear("identity/ is not a directory");
    };
    for name in CLAIMED {
        if directory.has(name)? {
            return unclear(
                "the gateway was interrupted while it imported one; it goes on at its next start",
            );
        }
    }
    match directory.read(FILE, FILE_MAX) {
        Ok(None) => Ok(Found::None),
        Ok(Some(bytes)) => {
            let id = serde_json::from_slice::<Value>(&bytes)
                .ok()
                .and_then(|file| file.get("deviceId")?.as_str().map(str::to_owned));
            Ok(id.map_or_else(|| Found::Unclear(format!("{DIRECTORY}/{FILE} is not understood")), Found::Id))
        }
        Err(error) => unclear(&error.to_string()),
    }
}

fn write(state: &Dir, seed: &DeviceSeed, owner: Owner) -> Outcome<()> {
    let directory = state.ensure_sub(OsStr::new(DIRECTORY), 0o700, Some(owner))?;
    directory.create(OsStr::new(FILE), legacy(seed).expose(), Kind::kept_by(owner))?;
    Ok(())
}

/// Puts the device into the database and leaves no file. That fails only by something that the agent did, and a
/// gateway with a device of its own making is better than none.
fn insert(state: &Dir, seed: &DeviceSeed, owner: Owner, report: &mut Report) -> Outcome<()> {
    if let Err(why) = database::insert_device(state, legacy(seed).expose(), owner) {
        let text =
            format!("the state's database holds no device, and the derived one cannot be put in ({why})");
        report.remark(TOPIC, &text);
        return Ok(());
    }
    report.info("The state's database held no device identity; the derived one was put in.");
    if state.has(DIRECTORY)? {
        state.sub(OsStr::new(DIRECTORY))?.remove(OsStr::new(FILE))?;
    }
    Ok(())
}

/// The text of the file that the gateway imports.
fn legacy(seed: &DeviceSeed) -> Secret {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    bootstrap::device_identity_json(seed, u64::try_from(now.as_millis()).unwrap_or(0))
}

/// Enough of an id to tell two apart. Ids are public, but nobody reads 64 digits.
fn short(id: &str) -> String {
    id.chars().filter(char::is_ascii_hexdigit).take(12).collect::<String>() + "…"
}

#[cfg(test)]
mod tests;
