//! Two trees are told apart by every kind of difference.

use crate::{difference, digest};
use std::fs;
use std::fs::{File, FileTimes};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::{Duration, SystemTime};

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("sub/empty")).expect("a directory");
    fs::create_dir(at(".cvm")).expect("a directory");
    fs::write(at("sub/file"), "content").expect("a file");
    fs::write(at("other"), "content").expect("a file");
    fs::hard_link(at("other"), at("sub/linked")).expect("a hard link");
    symlink("sub/file", at("link")).expect("a link");
    for path in ["sub/empty", ".cvm", "sub/file", "other", "sub"] {
        touch(&at(path), 1_000_000_000);
    }
    dir
}

fn touch(path: &Path, nanoseconds: u64) {
    let time =
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + Duration::from_nanos(nanoseconds);
    let file = File::open(path).expect("it is there");
    file.set_times(FileTimes::new().set_modified(time)).expect("its time can be set");
}

#[test]
fn the_digest_of_the_same_tree_is_the_same() {
    if cvm_needs::lacks_root() {
        return;
    }
    let dir = tree();
    let before = digest(dir.path(), &[".cvm"]);
    fs::write(dir.path().join(".cvm/private"), "what is excluded may change").expect("a file");
    let after = digest(dir.path(), &[".cvm"]);
    assert_eq!(difference(&before, &after), "");
    assert_eq!(before, after);
    assert_eq!(before.len(), 7, "{before:#?}");
    assert!(digest(dir.path(), &[]).len() > before.len());
}

#[test]
fn the_digest_notices_every_kind_of_difference() {
    type Change = fn(&Path);
    if cvm_needs::lacks_root() {
        return;
    }
    let changes: [(&str, Change); 13] = [
        ("content of the same size", |d| {
            fs::write(d.join("sub/file"), "CONTENT").expect("a file");
            touch(&d.join("sub/file"), 1_000_000_000);
        }),
        ("a nanosecond", |d| touch(&d.join("sub/file"), 1_000_000_001)),
        ("the time of a directory", |d| touch(&d.join("sub/empty"), 0)),
        ("the mode", |d| {
            fs::set_permissions(d.join("sub/file"), PermissionsExt::from_mode(0o4755)).expect("a mode");
        }),
        ("the mode of the top", |d| {
            fs::set_permissions(d, PermissionsExt::from_mode(0o711)).expect("a mode");
        }),
        // Users of the agent's containers: all others look like the agent.
        ("the owner", |d| chown(d.join("sub/file"), Some(201_234), None).expect("an owner")),
        ("the group", |d| chown(d.join("sub"), None, Some(201_234)).expect("a group")),
        ("a file more", |d| fs::write(d.join("sub/empty/more"), "").expect("a file")),
        ("a file less", |d| fs::remove_file(d.join("sub/file")).expect("a file")),
        ("another target", |d| {
            fs::remove_file(d.join("link")).expect("a link");
            symlink("other", d.join("link")).expect("a link");
        }),
        ("a copy in place of a link", |d| {
            fs::remove_file(d.join("link")).expect("a link");
            fs::copy(d.join("sub/file"), d.join("link")).expect("a copy");
        }),
        ("a copy in place of a hard link", |d| {
            fs::remove_file(d.join("sub/linked")).expect("a file");
            fs::copy(d.join("other"), d.join("sub/linked")).expect("a copy");
            touch(&d.join("sub/linked"), 1_000_000_000);
            touch(&d.join("sub"), 1_000_000_000);
        }),
        ("a pipe in place of a file", |d| {
            fs::remove_file(d.join("sub/file")).expect("a file");
            nix::unistd::mkfifo(&d.join("sub/file"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        }),
    ];
    for (what, change) in changes {
        let dir = tree();
        let before = digest(dir.path(), &[".cvm"]);
        change(dir.path());
        let difference = difference(&before, &digest(dir.path(), &[".cvm"]));
        assert_ne!(difference, "", "{what}");
    }
}
