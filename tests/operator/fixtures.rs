//! Files of the repository.

use cvm_harness::machine::repository;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) fn read(name: &str) -> String {
    fs::read_to_string(repository().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

pub(crate) fn rust_files(dir: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![repository().join(dir)];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).expect("a source directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found
}

pub(crate) fn git(dir: &Path, words: &[&str]) {
    let who = ["-c", "user.name=n", "-c", "user.email=e"];
    let output = Command::new("git").arg("-C").arg(dir).args(who).args(words).output().expect("git runs");
    assert!(output.status.success(), "git {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}
