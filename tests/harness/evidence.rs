//! Where a secret may have been left: files, and the memory of a process.

use crate::Machine;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

pub fn contains(bytes: &[u8], text: impl AsRef<[u8]>) -> bool {
    let text = text.as_ref();
    bytes.windows(text.len()).any(|window| window == text)
}

/// Every regular file below a directory.
pub fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let (mut found, mut open) = (Vec::new(), vec![dir.to_owned()]);
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            let Ok(kind) = entry.file_type() else { continue };
            if kind.is_dir() {
                open.push(entry.path());
            } else if kind.is_file() {
                let bytes = std::fs::read(entry.path()).unwrap_or_default();
                found.push((entry.path().display().to_string(), bytes));
            }
        }
    }
    found
}

/// Asserts that none of these is in what process 1 has in memory.
#[track_caller]
pub fn assert_process_1_has_forgotten(machine: &Machine, secrets: &[impl AsRef<[u8]>]) {
    assert_has_forgotten(machine.pid(), secrets);
}

/// The same of any process, by its pid outside.
#[track_caller]
pub fn assert_has_forgotten(pid: nix::unistd::Pid, secrets: &[impl AsRef<[u8]>]) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("root may read it");
    let mut memory = File::open(format!("/proc/{pid}/mem")).expect("root may read it");
    let mut looked_at = 0;
    for line in maps.lines().filter(|l| l.split(' ').nth(1).is_some_and(|mode| mode.starts_with('r'))) {
        let Some((from, to)) = line.split(' ').next().and_then(|r| r.split_once('-')) else { continue };
        let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16)) else {
            continue;
        };
        let mut bytes = vec![0; usize::try_from(to - from).expect("a mapping fits")];
        if memory.seek(SeekFrom::Start(from)).is_err() || memory.read_exact(&mut bytes).is_err() {
            // Kernel pages such as vvar cannot be read by anyone.
            continue;
        }
        looked_at += bytes.len();
        for (number, secret) in secrets.iter().enumerate() {
            assert!(!contains(&bytes, secret), "secret {number} is in {line}");
        }
    }
    assert!(looked_at > 100 * 1024, "only {looked_at} bytes of memory were readable");
}
