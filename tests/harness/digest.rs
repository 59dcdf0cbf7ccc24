//! What two trees must have in common to be the same.

use crate::s3::hex;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{self, File, Metadata};
use std::io::{Read, Result};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// One line for each path below `dir`, in the order of their bytes: type, mode, owner, group,
/// size, time of change in nanoseconds, content or target, and the first of the paths that
/// share a hard-linked file. Names in `excluding` are left out at the top, and for their sake
/// the time of `dir` itself.
#[track_caller]
pub fn digest(dir: &Path, excluding: &[&str]) -> Vec<String> {
    let mut paths = vec![PathBuf::new()];
    collect(dir, Path::new(""), excluding, &mut paths).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    paths.sort_by(|a, b| a.as_os_str().as_bytes().cmp(b.as_os_str().as_bytes()));
    let mut first_of = HashMap::new();
    paths
        .iter()
        .map(|path| {
            let full = dir.join(path);
            line(path, &full, &mut first_of).unwrap_or_else(|e| panic!("{}: {e}", full.display()))
        })
        .collect()
}

/// What is in one and not in the other, as `diff` would show it; empty when they are the same.
pub fn difference(before: &[String], after: &[String]) -> String {
    let only = |these: &[String], those: &[String], sign: char| -> Vec<String> {
        let those: std::collections::HashSet<_> = those.iter().collect();
        these.iter().filter(|l| !those.contains(l)).map(|l| format!("{sign} {l}")).collect()
    };
    [only(before, after, '-'), only(after, before, '+')].concat().join("\n")
}

fn collect(dir: &Path, below: &Path, excluding: &[&str], into: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir.join(below))? {
        let entry = entry?;
        if excluding.iter().any(|name| entry.file_name() == *name) {
            continue;
        }
        let path = below.join(entry.file_name());
        into.push(path.clone());
        if entry.file_type()?.is_dir() {
            collect(dir, &path, &[], into)?;
        }
    }
    Ok(())
}

fn line(path: &Path, full: &Path, first_of: &mut HashMap<(u64, u64), String>) -> Result<String> {
    // An empty path at its end would ask for a directory.
    let about = if path.as_os_str().is_empty() { fs::metadata(full)? } else { fs::symlink_metadata(full)? };
    let name = path.as_os_str().as_bytes().escape_ascii().to_string();
    let (kind, size, content) = kind(full, &about)?;
    let mut line = format!(
        "\"{name}\" {kind} {:o} {}:{} {size}",
        about.mode() & 0o1777,
        owner(about.uid()),
        owner(about.gid())
    );
    if !path.as_os_str().is_empty() {
        let _ = write!(line, " {}.{:09}", about.mtime(), about.mtime_nsec());
    }
    line += &content;
    if !about.is_dir() && about.nlink() > 1 {
        let first = first_of.entry((about.dev(), about.ino())).or_insert_with(|| name.clone());
        if *first != name {
            let _ = write!(line, " same as \"{first}\"");
        }
    }
    Ok(line)
}

/// As a restore gives it: what is neither the agent's nor a user's of its containers becomes the agent's.
fn owner(id: u32) -> u32 {
    use cvm_protocol::accounts::{CONTAINER_IDS, GATEWAY_ID};
    if CONTAINER_IDS.contains(&id) { id } else { GATEWAY_ID }
}

/// A word for the type, the size where it means something, and the content.
fn kind(full: &Path, about: &Metadata) -> Result<(&'static str, u64, String)> {
    let kind = about.file_type();
    Ok(if kind.is_symlink() {
        let target = fs::read_link(full)?;
        ("link", about.size(), format!(" -> \"{}\"", target.as_os_str().as_bytes().escape_ascii()))
    } else if kind.is_dir() {
        ("directory", 0, String::new())
    } else if kind.is_file() {
        ("file", about.size(), format!(" {}", content(full)?))
    } else if kind.is_fifo() {
        ("pipe", 0, String::new())
    } else if kind.is_socket() {
        ("socket", 0, String::new())
    } else {
        let kind = if kind.is_char_device() { "character-device" } else { "block-device" };
        (kind, 0, format!(" {:x}", about.rdev()))
    })
}

fn content(path: &Path) -> Result<String> {
    let (mut file, mut hash, mut part) = (File::open(path)?, Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut part)? {
            0 => return Ok(hex(&hash.finalize())),
            n => hash.update(part.get(..n).unwrap_or_default()),
        }
    }
}
