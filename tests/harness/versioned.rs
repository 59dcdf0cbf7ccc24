//! Files and links that say which version of themselves they are, and whether they are whole.

use crate::dice::Dice;
use sha2::{Digest as _, Sha256};
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

/// Makes what a path lies in.
pub fn make_room(path: &Path) {
    fs::create_dir_all(path.parent().expect("a name below")).expect("a directory can be made");
}

/// Puts a file in place as one step.
pub fn write(file: &Path, version: u64, dice: &mut Dice) {
    let length = dice.up_to(30_000);
    let mut body = Vec::new();
    while (body.len() as u64) < length {
        body.extend_from_slice(&dice.up_to(u64::MAX).to_le_bytes());
    }
    let part = file.with_extension("part");
    make_room(file);
    let mut bytes = format!("{version} {} {}\n", body.len(), sum_of(&body)).into_bytes();
    bytes.extend(body);
    fs::write(&part, bytes).expect("a file can be written");
    fs::set_permissions(&part, Permissions::from_mode(mode_of(version))).expect("a mode can be set");
    fs::rename(part, file).expect("a file can be renamed");
}

/// Puts a link in place as one step.
pub fn point(link: &Path, version: u64) {
    let part = link.with_extension("part");
    make_room(link);
    symlink(version.to_string(), &part).expect("a link can be made");
    fs::rename(part, link).expect("a link can be renamed");
}

/// -1 where nothing is. The half of a version, or one with the mode of another, is an error.
pub fn version_of(path: &Path) -> Result<i64, String> {
    let wrong = |what: &str| format!("{} {what}", path.display());
    let metadata = match path.symlink_metadata() {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(-1),
        other => other.map_err(|error| wrong(&error.to_string()))?,
    };
    let number = |text: &str| text.parse::<u64>().map_err(|_| wrong("says no version"));
    let version = if metadata.is_symlink() {
        number(&fs::read_link(path).map_err(|error| wrong(&error.to_string()))?.to_string_lossy())?
    } else {
        let bytes = fs::read(path).map_err(|error| wrong(&error.to_string()))?;
        let torn = || wrong(&format!("is torn ({} bytes)", bytes.len()));
        let end = bytes.iter().position(|b| *b == b'\n').ok_or_else(torn)?;
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let body = &bytes[end + 1..];
        let version = match head.split(' ').collect::<Vec<_>>().as_slice() {
            [version, length, told] if *told == sum_of(body) && length.parse() == Ok(body.len()) => {
                number(version)?
            }
            _ => return Err(torn()),
        };
        let mode = metadata.permissions().mode() & 0o7777;
        if mode != mode_of(version) {
            return Err(wrong(&format!("is version {version} with the mode of another, {mode:o}")));
        }
        version
    };
    i64::try_from(version).map_err(|_| wrong("says no version"))
}

fn mode_of(version: u64) -> u32 {
    0o600 | u32::try_from(version % 64).unwrap_or_default()
}

fn sum_of(body: &[u8]) -> String {
    Sha256::digest(body).iter().fold(String::new(), |text, b| text + &format!("{b:02x}"))
}
