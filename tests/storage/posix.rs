//! /data in FUSE mode is a file system like the disk below it.

use cvm_harness::machine::repository;
use cvm_harness::{Builder, Cloud, Machine, difference, digest, flush, independent};
use std::collections::BTreeSet;

const SETTINGS: &str = "\
[features]
posix_fallocate = {}
rename_ctime = {}
utime_now = {}
utimensat = {}
[dummy_auth]
entries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"], [\"bin\", \"bin\"]]
[settings]
naptime = 0.01
allow_remount = false
";

fn with_judges(cloud: &Cloud) -> Builder {
    let posix = repository().join("target/posix/bin");
    assert!(posix.exists(), "{} is missing: run `tests/setup test` first", posix.display());
    cloud.machine().bind(&posix, "/opt/posix").file("/opt/settings.toml", SETTINGS, 0o644)
}

/// A machine whose tree lies over a bucket with something in it.
fn over_a_bucket(cloud: &Cloud) -> Machine {
    let mut first = with_judges(cloud).ready();
    first.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace && seq 1000 > /data/openclaw/workspace/file"]);
    flush(&first);
    assert_eq!(first.stop(), 0);
    let machine = with_judges(cloud).ready();
    independent(&machine);
    machine
}

/// The cases that make a character device 0:0, each of a kind and with `::char` at its end. That is how
/// overlayfs writes down that something is gone, so it makes none for others.
const DEVICES: &str = "\
chmod: change_perm enotdir_component failed_chmod_unchanged_ctime update_ctime
chown: enotdir_component lchown::enotdir_component
link: changed_ctime_success eexist_dest_exists enotdir_component_either remove_link share_metadata unchanged_ctime_fails
mkdir: eexist_file_exists enotdir_component
mkfifo: eexist_file_exists enotdir_component
mknod: eexist_file_exists enotdir_comp_char_block enotdir_component privileged::eexist_file_exists
open: eexist_file_exists
rename: changed_ctime_success eexist_enotempty_to_non_empty eisdir_to_dir_from_not_dir enotdir_component_either enotdir_from_dir_to_not_dir preserve_metadata to_multiply_linked
rmdir: eexist_enotempty_non_empty_dir enotdir_component
symlink: create_symlink eexist_file_exists enotdir_component
truncate: enotdir_component
unlink: enotdir_component remove_type update_ctime_success update_mtime_ctime_success_folder
utimensat: changes_timestamps
";

/// overlayfs has no entry in the table by which the C library guesses how many links a file may have.
const LINKS: &str = "link::link_count_max";

/// The cases that pass in a directory.
fn passing(machine: &Machine, directory: &str) -> BTreeSet<String> {
    machine.ok(&["mkdir", "-p", "-m", "755", directory]);
    let output = machine.exec(&["/opt/posix/pjdfstest", "-c", "/opt/settings.toml", "-p", directory]);
    let text = String::from_utf8_lossy(&output.stdout);
    let passed = text.lines().filter(|l| l.ends_with(" ok"));
    passed.filter_map(|l| l.split_whitespace().next()).map(str::to_owned).collect()
}

#[test]
fn no_case_of_pjdfstest_fails_on_data_that_passes_on_the_disk_below() {
    let cloud = Cloud::new();
    let machine = over_a_bucket(&cloud);
    let below = passing(&machine, "/run/openclaw-cvm/volume/.cvm/posix");
    let here = passing(&machine, "/data/openclaw/workspace/posix");
    assert!(below.len() > 300, "only {} cases pass on the disk", below.len());
    // It makes all others.
    for words in [&["mknod", "/data/zero", "c", "0", "0"][..], &["mknod", "/data/one", "c", "1", "3"]] {
        assert_eq!(machine.exec(words).status.success(), words[1] == "/data/one", "{words:?}");
    }
    let devices = DEVICES.lines().filter_map(|line| line.split_once(": "));
    let devices = devices.flat_map(|(kind, cases)| cases.split(' ').map(move |case| (kind, case)));
    let mut by_nature: BTreeSet<String> =
        devices.map(|(kind, case)| format!("{kind}::{case}::char")).collect();
    by_nature.insert(LINKS.to_owned());
    let ours: Vec<&String> = below.difference(&here).filter(|case| !by_nature.contains(*case)).collect();
    assert!(ours.is_empty(), "on the disk these pass: {ours:#?}");
}

#[test]
fn fsx_finds_no_fault_and_what_it_wrote_survives_the_loss() {
    let cloud = Cloud::new();
    let mut machine = over_a_bucket(&cloud);
    for seed in ["1", "2", "3"] {
        let file = format!("/data/openclaw/workspace/fsx-{seed}");
        machine.ok(&["/opt/posix/fsx", "-q", "-S", seed, "-N", "3000", "-P", "/tmp", &file]);
    }
    flush(&machine);
    let before = digest(&machine.path("/data"), &[".cvm", "lost+found"]);
    machine.destroy();
    drop(machine);
    let machine = with_judges(&cloud).ready();
    independent(&machine);
    assert_eq!(difference(&before, &digest(&machine.path("/data"), &[".cvm", "lost+found"])), "");
}
