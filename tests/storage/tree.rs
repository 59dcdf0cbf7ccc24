//! The tree and the bucket stay equal, whatever is done to the tree: on new machines, on the same
//! volume, in both modes, and in the eyes of programs that know nothing of the product.

// A disk that fails under a test fails the test, and its words are the system's.
#![allow(clippy::unwrap_used)]

use cvm_harness::cloud::HEALTHY;
use cvm_harness::machine::{MASTER_KEY, PATIENCE, binaries, repository};
use cvm_harness::proxy::Entry;
use cvm_harness::tools::{Rclone, python, rclone_crypt_python, written_by_rclone_crypt_python};
use cvm_harness::{
    Builder, Cloud, Fault, Machine, Rule, difference, digest, flush, independent, restore_by_hand, storage,
    until,
};
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const WORKSPACE: &str = "/data/openclaw/workspace";

#[derive(Debug, Clone, Copy, PartialEq)]
enum Mode {
    Fuse,
    Sync,
}

use Mode::{Fuse, Sync};

impl Mode {
    /// In sync mode a file that cannot be written lies where the device should be.
    fn of(self, builder: Builder) -> Builder {
        let builder = builder.environment("S3_HEARTBEAT", "1");
        match self {
            Fuse => builder,
            Sync => builder.bind(Path::new("/etc/passwd"), "/dev/fuse:ro"),
        }
    }

    fn start(self, cloud: &Cloud) -> Machine {
        ready(self.of(cloud.machine()).start())
    }
}

fn ready(machine: Machine) -> Machine {
    machine.service_in("gateway", &["ready"]);
    machine
}

fn tree(machine: &Machine) -> Vec<String> {
    digest(&machine.path("/data/openclaw"), &[])
}

/// Loses the machine, and yields what the next one has.
fn restored(cloud: &Cloud, mut machine: Machine, mode: Mode) -> Machine {
    machine.destroy();
    drop(machine);
    let machine = mode.start(cloud);
    independent(&machine);
    machine
}

/// With everything in the bucket.
fn leave(mut machine: Machine) {
    flush(&machine);
    assert_eq!(machine.stop(), 0);
}

fn put(path: PathBuf, content: impl AsRef<[u8]>) {
    fs::create_dir_all(path.parent().expect("a path below a root")).expect("a directory");
    fs::write(path, content).expect("a file");
}

/// Files of many sizes and looks, some of which are read early and some late.
fn plant(at: &Path) {
    for n in 0..60 {
        put(at.join(format!("many/d{}/f{n}", n % 6)), format!("{n} {}", "x".repeat(n * 97)));
    }
    for name in [
        "edited",
        "appended",
        "cut",
        "renamed",
        "removed",
        "again",
        "mode",
        "owner",
        "touched",
        "becomes-directory",
        "becomes-link",
        "becomes-pipe",
    ] {
        put(at.join(name), format!("{name} as it was\n"));
    }
    for dir in ["moved", "deep/er", "gone", "becomes-file", "emptied"] {
        put(at.join(dir).join("one"), format!("one in {dir}"));
        put(at.join(dir).join("two/three"), format!("three in {dir}"));
    }
    symlink("two/three", at.join("moved/link")).expect("a link");
    put(at.join("large"), vec![7u8; 3 << 20]);
}

/// What is done to files that may be only below: the same on every tree.
fn change_old(at: &Path) {
    put(at.join("edited"), "something else");
    File::options().append(true).open(at.join("appended")).unwrap().write_all(b"and more\n").unwrap();
    File::options().write(true).open(at.join("cut")).unwrap().set_len(3).unwrap();
    fs::rename(at.join("renamed"), at.join("new-name")).unwrap();
    fs::remove_file(at.join("removed")).unwrap();
    fs::remove_file(at.join("again")).unwrap();
    put(at.join("again"), "from nothing");
    change_names(at);
    for name in ["becomes-directory", "becomes-link", "becomes-pipe"] {
        fs::remove_file(at.join(name)).unwrap();
    }
    put(at.join("becomes-directory/inside"), "of a directory");
    symlink("edited", at.join("becomes-link")).unwrap();
    nix::unistd::mkfifo(&at.join("becomes-pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    fs::remove_dir_all(at.join("becomes-file")).unwrap();
    put(at.join("becomes-file"), "was a directory");
}

/// Only what needs no content of old files.
fn change_names(at: &Path) {
    fs::rename(at.join("moved"), at.join("elsewhere")).unwrap();
    fs::rename(at.join("deep"), at.join("elsewhere/deeper")).unwrap();
    fs::rename(at.join("elsewhere/two/three"), at.join("elsewhere/two/four")).unwrap();
    fs::remove_file(at.join("elsewhere/deeper/er/one")).unwrap();
    fs::remove_dir_all(at.join("gone")).unwrap();
    fs::remove_dir_all(at.join("emptied")).unwrap();
    fs::create_dir(at.join("emptied")).unwrap();
    fs::set_permissions(at.join("mode"), fs::Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(at.join("owner"), Some(7), Some(8)).unwrap();
    let time = std::time::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    if let Ok(file) = File::options().write(true).open(at.join("touched")) {
        file.set_modified(time).unwrap();
    }
}

/// What names and kinds there can be.
fn add_new(at: &Path) {
    let at = at.join("new");
    fs::create_dir_all(at.join("empty/deep")).unwrap();
    fs::set_permissions(at.join("empty"), fs::Permissions::from_mode(0o1711)).unwrap();
    symlink("nowhere", at.join("dangling")).unwrap();
    symlink("/etc/passwd", at.join("absolute")).unwrap();
    symlink("l/".repeat(1500), at.join("long")).unwrap();
    put(at.join("linked"), "under two names");
    fs::create_dir(at.join("other")).unwrap();
    fs::hard_link(at.join("linked"), at.join("other/linked")).unwrap();
    put(at.join("zero"), "");
    let mut sparse = File::create(at.join("sparse")).unwrap();
    sparse.set_len(5 << 20).unwrap();
    sparse.write_all(b"head").unwrap();
    put(at.join("setuid"), "s");
    fs::set_permissions(at.join("setuid"), fs::Permissions::from_mode(0o4750)).unwrap();
    put(at.join("containers"), "written by a user of a container's");
    std::os::unix::fs::chown(at.join("containers"), Some(200_123), Some(200_124)).unwrap();
    drop(std::os::unix::net::UnixListener::bind(at.join("socket")).unwrap_or_else(|_| {
        // A socket's whole path is short: from here it is not.
        std::env::set_current_dir(&at).unwrap();
        std::os::unix::net::UnixListener::bind("socket").unwrap()
    }));
    put(at.join("notes"), "");
    put(at.join("notes-journal"), "a diary, not a database's");
    for name in names() {
        put(at.join("names").join(OsStr::from_bytes(&name)), &name);
        put(at.join("below").join(OsStr::from_bytes(&name)).join("in"), &name);
    }
}

fn names() -> Vec<Vec<u8>> {
    let long = "ä".repeat(127) + "x";
    let mut names: Vec<Vec<u8>> = [
        "größe",
        "gro\u{308}ße",
        "new\nline",
        " leading",
        "trailing ",
        "trailing.",
        "\"quoted'",
        "back\\slash",
        "*?[]{}#",
        "#first",
        "; semi",
        "- dash",
        "\u{201b}",
        "a\u{201b}FFb",
        "full／width",
        "\u{2400}\u{240a}",
        "tab\t",
        "\r",
        "del\u{7f}",
        "日本語",
        "👩‍👩‍👧",
        "CON",
        "~tilde",
        "$(x)`y`",
        "%41",
        "a:b",
        "x.part",
        &long,
    ]
    .iter()
    .map(|n| n.as_bytes().to_vec())
    .collect();
    names.extend([b"\xff\xfe".to_vec(), b"half\xe2\x80".to_vec(), vec![0x80; 40]]);
    names
}

/// Locks and logs of open databases are nobody's state, and a database's copy is not its bytes.
fn without_volatile(lines: Vec<String>) -> Vec<String> {
    let volatile = |l: &String| {
        l.contains(".sqlite\" file")
            || l.contains("-wal\" file")
            || l.contains("-shm\" file")
            || l.starts_with("\"tmp")
            || l.starts_with("\"cache")
    };
    lines.into_iter().filter(|l| !volatile(l)).collect()
}

fn without_specials(lines: Vec<String>) -> Vec<String> {
    lines.into_iter().filter(|l| !l.contains("\" socket ") && !l.contains("\" pipe ")).collect()
}

/// What a tree comes to that nobody replicates, and that has never been anywhere else.
fn on_a_plain_directory() -> Vec<String> {
    let top = tempfile::tempdir().unwrap();
    let at = top.path().join("workspace");
    plant(&at);
    change_old(&at);
    add_new(&at);
    workspace_but_times(&digest(top.path(), &[]))
}

/// What is below the workspace, but for when it was changed.
fn workspace_but_times(lines: &[String]) -> Vec<String> {
    let of_workspace = lines.iter().filter_map(|line| line.strip_prefix("\"workspace/")?.split_once("\" "));
    of_workspace
        .map(|(name, about)| {
            let mut words: Vec<&str> = about.splitn(6, ' ').collect();
            words.remove(4);
            format!("{name} {}", words.join(" "))
        })
        .collect()
}

fn battery(mode: Mode) {
    let cloud = Cloud::new();
    let machine = mode.start(&cloud);
    plant(&machine.path(WORKSPACE));
    flush(&machine);
    let before = tree(&machine);
    let mut machine = machine;
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    drop(machine);
    // Slow enough that most is only below while it is changed.
    cloud.proxy.latency(Duration::from_millis(60));
    let machine = mode.start(&cloud);
    let status = storage(&machine);
    if mode == Fuse {
        assert_eq!((&status["mode"], &status["independent"]), (&"fuse".into(), &false.into()), "{status:#}");
    } else {
        assert_eq!(status["mode"], "sync");
        let reason = "/dev/fuse cannot be opened (Read-only file system)";
        assert_eq!(status["reason"], reason);
        assert!(machine.output().contains("FUSE mount failed, falling back to sync mode."));
        assert!(machine.output().contains(reason));
        assert_eq!(difference(&before, &tree(&machine)), "");
    }
    let options = machine.ok(&["findmnt", "--noheadings", "--output", "OPTIONS", "/data"]);
    assert!(options.lines().last().is_some_and(|on_top| on_top.contains("nosuid,nodev")), "{options}");
    let at = machine.path(WORKSPACE);
    change_old(&at);
    add_new(&at);
    cloud.proxy.heal();
    flush(&machine);
    assert_eq!(difference(&on_a_plain_directory(), &workspace_but_times(&tree(&machine))), "");
    let expected = without_specials(tree(&machine));
    let machine = restored(&cloud, machine, mode);
    assert_eq!(difference(&expected, &tree(&machine)), "");
    let owners = |name: &str| {
        let found = fs::metadata(machine.path(WORKSPACE).join(name)).unwrap();
        (found.mode() & 0o7000, found.uid(), found.gid())
    };
    assert_eq!(owners("new/setuid"), (0, 990, 990));
    assert_eq!(owners("owner"), (0, 990, 990));
    assert_eq!(owners("new/containers"), (0, 200_123, 200_124));
    assert!(machine.ok(&["cvm", "storage", "verify", "--deep"]).contains("equal"));
}

#[test]
fn what_is_small_comes_before_what_is_large_and_the_operator_sees_how_far_it_is() {
    let cloud = Cloud::new();
    let mut machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    for n in 0..400 {
        put(at.join(format!("small/{n}")), format!("{n}"));
    }
    for n in 0..3 {
        put(at.join(format!("a-large/{n}")), vec![n; 1 << 20]);
    }
    flush(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let keys = |names: Vec<String>| names.into_iter().map(|name| key(&cloud, &name)).collect::<Vec<_>>();
    let large = keys((0..3).map(|n| format!("openclaw/workspace/a-large/{n}")).collect());
    let small = key(&cloud, "openclaw/workspace/small");
    drop(machine);
    cloud.proxy.latency(Duration::from_millis(100));
    cloud.proxy.clear_log();
    let machine = Fuse.start(&cloud);
    let seen = until("it says how far it is", PATIENCE, || {
        let progress = storage(&machine)["progress"].clone();
        let done = progress["files_done"].as_u64()?;
        (done > 0 && Some(done) < progress["files_total"].as_u64()).then_some(progress)
    });
    assert!(
        seen["files_total"].as_u64() >= Some(403) && seen["bytes_total"].as_u64() > Some(3 << 20),
        "{seen}"
    );
    independent(&machine);
    assert!(storage(&machine)["progress"].is_null());
    let asked: Vec<Entry> = cloud.proxy.log().into_iter().filter(|e| e.method == "GET").collect();
    let first = asked.iter().position(|e| large.iter().any(|key| e.path.contains(key.as_str()))).unwrap();
    let before: std::collections::HashSet<&str> =
        asked[..first].iter().map(|e| e.path.as_str()).filter(|path| path.contains(small.as_str())).collect();
    // Those that other threads have just taken may be asked for later.
    assert!(before.len() >= 400 - 12, "only {} small ones came before it", before.len());
}

#[test]
fn whatever_is_done_to_the_tree_is_restored_in_fuse_mode() {
    battery(Fuse);
}

#[test]
fn whatever_is_done_to_the_tree_is_restored_in_sync_mode() {
    battery(Sync);
}

#[test]
fn times_of_files_stay_when_their_data_comes_up_behind_the_gateway() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    plant(&machine.path(WORKSPACE));
    leave(machine);
    let data = Rule::new(Fault::Hang).method("GET").path(&key(&cloud, "openclaw/workspace/many"));
    cloud.proxy.add(data);
    let machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    let modified = |name: &str| fs::metadata(at.join(name)).unwrap().modified().unwrap();
    let before = modified("many/d1/f7");
    fs::rename(at.join("many/d1"), at.join("many/d7")).unwrap();
    let time = nix::sys::time::TimeSpec::new(1_234_567_890, 987_654_321);
    let no_links = nix::sys::stat::UtimensatFlags::NoFollowSymlink;
    nix::sys::stat::utimensat(nix::fcntl::AT_FDCWD, &at.join("many/d2/f8"), &time, &time, no_links).unwrap();
    cloud.proxy.heal();
    independent(&machine);
    flush(&machine);
    assert_eq!(modified("many/d7/f7"), before, "of a file whose directory was moved");
    let time = std::time::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    assert_eq!(modified("many/d2/f8"), time, "of one whose time was set");
    let expected = tree(&machine);
    let machine = restored(&cloud, machine, Fuse);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn a_file_is_fetched_once_to_be_checked_and_to_be_brought_up() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    plant(&machine.path(WORKSPACE));
    leave(machine);
    cloud.proxy.clear_log();
    let machine = Fuse.start(&cloud);
    independent(&machine);
    let below = key(&cloud, "openclaw/workspace/many");
    let mut fetched: BTreeMap<String, usize> = BTreeMap::new();
    for entry in cloud.proxy.log() {
        let given = matches!(entry.status, Some(200 | 206)) && entry.path.contains(&below);
        if given && entry.method == "GET" && !entry.path.contains("list-type") {
            *fetched.entry(entry.path).or_default() += 1;
        }
    }
    let files = fs::read_dir(machine.path(WORKSPACE).join("many"))
        .unwrap()
        .map(|dir| fs::read_dir(dir.unwrap().path()).unwrap().count())
        .sum::<usize>();
    assert_eq!(fetched.len(), files, "{fetched:?}");
    assert!(fetched.values().all(|times| *times == 1), "{fetched:?}");
}

/// Of a machine that has stopped. What has one of these in its path is not to be had.
fn started_without(cloud: &Cloud, machine: Machine, fault: Fault, paths: &[&str]) -> Machine {
    leave(machine);
    for path in paths {
        cloud.proxy.add(Rule::new(fault).method("GET").path(&name(cloud, path)));
    }
    Fuse.start(cloud)
}

/// The last part of it, in the bucket.
fn name(cloud: &Cloud, path: &str) -> String {
    let key = key(cloud, &format!("openclaw/workspace/{path}"));
    key.rsplit('/').next().unwrap().to_owned()
}

/// Under these names, also on a machine that has nothing but the bucket.
fn are_there(cloud: &Cloud, machine: Machine, files: &[(&str, &str)]) {
    cloud.proxy.heal();
    independent(&machine);
    flush(&machine);
    let expected = tree(&machine);
    let look = |machine: &Machine| {
        for (path, content) in files {
            let at = machine.path(WORKSPACE).join(path);
            assert_eq!(fs::read_to_string(at).ok().as_deref(), Some(*content), "{path}");
        }
    };
    look(&machine);
    let machine = restored(cloud, machine, Fuse);
    look(&machine);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn what_is_moved_to_one_name_after_another_is_kept_although_its_data_is_not_there_yet() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    for path in ["first", "second", "one/in-one", "two/in-two"] {
        put(machine.path(WORKSPACE).join(path), path);
    }
    let paths = ["second", "two/in-two", "first", "one/in-one"];
    let machine = started_without(&cloud, machine, Fault::Hang, &paths);
    let at = machine.path(WORKSPACE);
    fs::rename(at.join("first"), at.join("file")).unwrap();
    fs::rename(at.join("one"), at.join("dir")).unwrap();
    for path in &paths[2..] {
        cloud.proxy.spare(&name(&cloud, path));
    }
    flush(&machine);
    fs::rename(at.join("second"), at.join("file")).unwrap();
    fs::rename(at.join("dir"), at.join("away")).unwrap();
    fs::rename(at.join("two"), at.join("dir")).unwrap();
    let files = [("file", "second"), ("away/in-one", "one/in-one"), ("dir/in-two", "two/in-two")];
    are_there(&cloud, machine, &files);
}

#[test]
fn what_was_moved_in_an_outage_is_not_forgotten_where_another_directory_cannot_be_looked_into() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    for path in ["seen/of-seen", "unseen/of-unseen"] {
        put(machine.path(WORKSPACE).join(path), path);
    }
    let machine = started_without(&cloud, machine, Fault::Status(403), &["seen/of-seen", "unseen"]);
    let at = machine.path(WORKSPACE);
    assert_eq!(fs::read_dir(at.join("seen")).unwrap().count(), 1);
    fs::rename(at.join("seen"), at.join("to")).unwrap();
    let said = |what: &str| {
        until("the trouble is told", PATIENCE, || {
            storage(&machine)["last_error"].as_str()?.contains(what).then_some(())
        });
    };
    said("still under another name");
    fs::rename(at.join("unseen"), at.join("there")).unwrap();
    said("cannot be listed");
    are_there(&cloud, machine, &[("to/of-seen", "seen/of-seen"), ("there/of-unseen", "unseen/of-unseen")]);
}

#[test]
fn a_directory_that_is_moved_to_and_fro_while_its_files_come_up_is_all_there() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let names: Vec<String> = (0..200).map(|n| format!("to/{}/{n}", n % 10)).collect();
    for name in &names {
        put(machine.path(WORKSPACE).join(name), name);
    }
    let machine = started_without(&cloud, machine, Fault::Latency(Duration::from_millis(20)), &["to"]);
    let at = machine.path(WORKSPACE);
    let (to, fro) = (at.join("to"), at.join("fro"));
    // As long as it takes, and no longer than it can.
    for _ in 0..500 {
        fs::rename(&to, &fro).unwrap();
        std::thread::sleep(Duration::from_millis(5));
        fs::rename(&fro, &to).unwrap();
        std::thread::sleep(Duration::from_millis(5));
    }
    let files: Vec<(&str, &str)> = names.iter().map(|name| (name.as_str(), name.as_str())).collect();
    are_there(&cloud, machine, &files);
}

#[test]
fn what_is_moved_into_the_place_of_a_bad_file_is_not_taken_for_it() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    for path in ["bad", "good", "other"] {
        put(machine.path(WORKSPACE).join(path), path.repeat(100));
    }
    let [bad, other] = ["bad", "other"].map(|name| key(&cloud, &format!("openclaw/workspace/{name}")));
    let machine = started_without(&cloud, machine, Fault::Hang, &["bad", "good"]);
    let object = cloud.garage.get_raw(&other).unwrap();
    cloud.garage.put_raw(&bad, &object);
    let at = machine.path(WORKSPACE);
    fs::rename(at.join("good"), at.join("bad")).unwrap();
    let files = [("bad", &*"good".repeat(100)), ("other", &*"other".repeat(100))];
    are_there(&cloud, machine, &files);
}

/// The same without a bucket: what the two modes are measured by.
#[test]
fn whatever_is_done_to_the_tree_stays_on_the_volume_in_local_mode() {
    let machine = ready(Builder::product().fake_gateway(HEALTHY).start());
    plant(&machine.path(WORKSPACE));
    let machine = ready(machine.again(|builder| builder));
    let at = machine.path(WORKSPACE);
    change_old(&at);
    add_new(&at);
    let expected = tree(&machine);
    let machine = ready(machine.again(|builder| builder));
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

/// Whatever comes of it, the others have to stop.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn files_that_grow_or_go_while_they_are_pushed_do_not_stop_the_rest() {
    let cloud = Cloud::new();
    let machine = Sync.start(&cloud);
    let at = machine.path(WORKSPACE);
    let at = at.as_path();
    fs::create_dir_all(at).unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut log = File::create(at.join("log")).unwrap();
            for n in 0.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                log.write_all(b"a line\n").unwrap();
                let path = at.join(format!("short-lived-{}", n % 10));
                fs::write(&path, "x").unwrap();
                fs::remove_file(&path).unwrap();
            }
        });
        let _stops = Stops(&stop);
        for n in 0..5 {
            put(at.join(format!("kept-{n}")), format!("{n}"));
            flush(&machine);
        }
    });
    flush(&machine);
    let expected = tree(&machine);
    let machine = restored(&cloud, machine, Fuse);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn a_flush_ends_and_has_everything_while_files_are_written_and_renamed_without_end() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    independent(&machine);
    let at = machine.path(WORKSPACE);
    let place = |n: usize, name: &str| at.join(n.to_string()).join(name);
    // So many that what was seen has another name by the time that it is read.
    for n in 0..1500 {
        put(place(n % 50, &format!("{n}")), "stays");
    }
    let stop = AtomicBool::new(false);
    let mut flushes = Vec::new();
    // The last number that each of them has put in its place.
    let last: [AtomicU64; 5] = Default::default();
    std::thread::scope(|scope| {
        for (n, last) in last.iter().enumerate() {
            let (place, stop) = (&place, &stop);
            put(place(n, "file"), "0");
            scope.spawn(move || {
                for version in 1u64.. {
                    // Long enough to be seen under this name, and not to be read.
                    let part = place(n, &format!("part-{version}"));
                    fs::write(&part, version.to_string()).unwrap();
                    std::thread::sleep(Duration::from_millis(5));
                    fs::rename(&part, place(n, "file")).unwrap();
                    last.store(version, Ordering::Relaxed);
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                }
            });
        }
        let _stops = Stops(&stop);
        for _ in 0..3 {
            let before: Vec<u64> = last.iter().map(|last| last.load(Ordering::Relaxed)).collect();
            let output = machine.exec(&["cvm", "storage", "flush"]);
            let there: Vec<_> =
                (0..last.len()).map(|n| in_bucket(&cloud, &format!("openclaw/workspace/{n}/file"))).collect();
            flushes.push((before, output, there));
        }
    });
    for (before, output, there) in flushes {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        for (before, there) in before.into_iter().zip(there) {
            let there: u64 = there.expect("it was there all the time").parse().unwrap();
            assert!(there >= before, "{there} of {before}");
        }
    }
}

/// What the bucket has under a name, by stock rclone's reading, which tells no empty file from none.
fn in_bucket(cloud: &Cloud, name: &str) -> Option<String> {
    let text = stock_rclone(cloud).ok(&["cat", &format!("crypt:{name}")]);
    (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
}

/// Rotates a log while something fails, and yields what the bucket has of it then.
fn rotated(cloud: &Cloud, machine: &Machine, fault: Rule) -> [Option<String>; 2] {
    cloud.proxy.add(fault);
    in_workspace(machine, "mv log log.1; echo new > log; echo $$ > beside");
    // It is of the same round, and goes up.
    is_there(cloud, "beside");
    held_up(machine);
    let seen = ["log", "log.1"].map(|name| in_bucket(cloud, &format!("openclaw/workspace/{name}")));
    healed(cloud, machine);
    assert_eq!(in_bucket(cloud, "openclaw/workspace/log").as_deref(), Some("new\n"));
    assert_eq!(in_bucket(cloud, "openclaw/workspace/log.1").as_deref(), Some("old\n"));
    seen
}

#[test]
fn what_the_bucket_has_is_there_under_its_new_name_before_another_file_takes_the_old_one() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    in_workspace(&machine, "echo old > log");
    flush(&machine);
    let new_name = key(&cloud, "openclaw/workspace/log.1");
    let fault = Rule::new(Fault::Status(503)).method("PUT").path(&new_name);
    let [log, log_1] = rotated(&cloud, &machine, fault);
    assert_eq!((log.as_deref(), log_1), (Some("old\n"), None));
}

#[test]
fn files_that_are_numbered_anew_go_up_together() {
    let cloud = Cloud::new();
    let machine = Sync.start(&cloud);
    let at = machine.path(WORKSPACE);
    for n in 0..200 {
        put(at.join(n.to_string()), n.to_string());
    }
    flush(&machine);
    cloud.proxy.clear_log();
    for n in (0..200).rev() {
        fs::rename(at.join(n.to_string()), at.join((n + 1).to_string())).unwrap();
    }
    flush(&machine);
    let manifest = key(&cloud, ".cvm/manifest");
    let is_segment = |entry: &&Entry| entry.method == "PUT" && entry.path.contains(&manifest);
    let segments = cloud.proxy.log().iter().filter(is_segment).count();
    assert!(segments <= 20, "{segments} segments for 200 files");
    let said = machine.ok(&["cvm", "storage", "verify", "--deep"]);
    assert!(said.contains("equal"), "{said}");
    assert_eq!(in_bucket(&cloud, "openclaw/workspace/200").as_deref(), Some("199"));
}

#[test]
fn what_is_only_in_the_bucket_is_not_written_over_there_by_what_takes_its_name() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    in_workspace(&machine, "echo old > log");
    flush(&machine);
    drop(machine);
    // It does not come up: nobody can read it.
    let fault = Rule::new(Fault::Status(403)).method("GET").path(&key(&cloud, "openclaw/workspace/log"));
    cloud.proxy.add(fault.clone());
    let machine = Fuse.start(&cloud);
    let [log, log_1] = rotated(&cloud, &machine, fault);
    assert_eq!((log.as_deref(), log_1), (Some("old\n"), None));
}

#[test]
fn a_name_that_is_too_long_is_an_incident_until_it_is_shorter() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    let dir = at.join("l".repeat(250)).join("o".repeat(250));
    put(dir.join("n".repeat(250)), "too far");
    put(at.join("short"), "near");
    let incidents = || storage(&machine)["incidents"].as_array().cloned().unwrap_or_default();
    let told = machine.exec(&["cvm", "storage", "flush"]);
    let words = String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned();
    assert_eq!(told.status.code(), Some(1), "{words}");
    assert!(words.contains("cannot be in the bucket"), "{words}");
    assert_eq!(incidents().len(), 1, "{:#?}", incidents());
    // A change elsewhere does not end it.
    let generation = storage(&machine)["generation"].as_u64();
    put(at.join("elsewhere"), "x");
    until("the change is pushed", PATIENCE, || {
        let status = storage(&machine);
        (status["generation"].as_u64() > generation && status["pending_files"] == 0).then_some(())
    });
    assert_eq!(incidents().len(), 1, "{:#?}", incidents());
    fs::rename(dir.join("n".repeat(250)), at.join("now-short")).unwrap();
    until("the incident is over", PATIENCE, || incidents().is_empty().then_some(()));
    flush(&machine);
    assert_eq!(incidents().len(), 0);
    let expected = tree(&machine);
    let machine = restored(&cloud, machine, Sync);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

// === The same volume again ===

/// Nothing begins and nothing goes on.
fn unreachable(cloud: &Cloud) {
    cloud.proxy.refuse(true);
    cloud.proxy.cut();
}

fn reachable(cloud: &Cloud) {
    cloud.proxy.heal();
    cloud.proxy.refuse(false);
}

#[test]
fn what_was_not_pushed_is_on_the_volume_and_is_pushed_by_the_next_boot() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    plant(&machine.path(WORKSPACE));
    flush(&machine);
    unreachable(&cloud);
    change_old(&machine.path(WORKSPACE));
    let _ = fs::remove_file(machine.path(WORKSPACE).join("becomes-pipe"));
    let expected = tree(&machine);
    reachable(&cloud);
    // Killed before it could have noticed.
    unreachable(&cloud);
    let mut machine = machine;
    machine.destroy();
    reachable(&cloud);
    let machine = ready(machine.again(|builder| builder));
    assert_eq!(difference(&expected, &tree(&machine)), "");
    flush(&machine);
    let machine = restored(&cloud, machine, Sync);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

/// Lines without the times of directories: they change with what is moved.
fn timeless(lines: Vec<String>) -> Vec<String> {
    lines
        .into_iter()
        .map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            if words[1] == "directory" { words[..5].join(" ") } else { line }
        })
        .collect()
}

fn switches(hydrated: bool) {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    plant(&at);
    for n in 0..250 {
        put(at.join(format!("bulk/{n:03}")), format!("bulk {n}"));
        fs::set_permissions(at.join(format!("bulk/{n:03}")), fs::Permissions::from_mode(0o600)).unwrap();
    }
    flush(&machine);
    let model = tempfile::tempdir().unwrap();
    let copied = Command::new("cp").arg("-a").arg(format!("{}/.", at.display())).arg(model.path()).status();
    assert!(copied.unwrap().success());
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    drop(machine);
    if !hydrated {
        cloud.proxy.latency(Duration::from_millis(150));
    }
    let machine = Fuse.start(&cloud);
    if hydrated {
        independent(&machine);
    } else {
        cloud.proxy.latency(Duration::from_millis(400));
    }
    // Nothing of what follows can be pushed.
    cloud.proxy.add(Rule::new(Fault::Reset).method("PUT"));
    for at in [&machine.path(WORKSPACE), model.path()] {
        change_names(at);
        put(at.join("elsewhere/new"), "new");
        fs::set_permissions(at.join("elsewhere/new"), fs::Permissions::from_mode(0o644)).unwrap();
        let time = std::time::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        File::options().write(true).open(at.join("elsewhere/new")).unwrap().set_modified(time).unwrap();
    }
    let time = std::time::UNIX_EPOCH + Duration::new(1_234_567_890, 987_654_321);
    for at in [&machine.path(WORKSPACE), model.path()] {
        // Where its data is only below and out of reach it cannot be opened.
        let _ = fs::remove_file(at.join("touched"));
        put(at.join("touched"), "anew");
        File::options().write(true).open(at.join("touched")).unwrap().set_modified(time).unwrap();
    }
    // Looks that were changed while the data was only below, and were not pushed, are the overlay's
    // alone; without it the manifest's count again.
    let seen = |lines: Vec<String>| if hydrated { timeless(lines) } else { contents(lines) };
    let expected = seen(digest(model.path(), &[]));
    assert_eq!(storage(&machine)["independent"], hydrated);
    let mut machine = machine;
    for mode in [Sync, Fuse, Sync] {
        machine.destroy();
        reachable(&cloud);
        machine = ready(machine.again(|builder| match mode {
            Sync => builder.bind(Path::new("/etc/passwd"), "/dev/fuse:ro"),
            Fuse => builder.unbind("/dev/fuse"),
        }));
        let status = storage(&machine);
        assert_eq!(status["mode"], if mode == Fuse { "fuse" } else { "sync" }, "{status:#}");
        independent(&machine);
        let found = seen(digest(&machine.path(WORKSPACE), &[]));
        assert_eq!(difference(&expected, &found), "", "in {mode:?}");
    }
    flush(&machine);
    let machine = restored(&cloud, machine, Fuse);
    assert_eq!(difference(&expected, &seen(digest(&machine.path(WORKSPACE), &[]))), "");
}

/// Files by name, size and hash.
fn contents(lines: Vec<String>) -> Vec<String> {
    let of = |line: String| {
        let (name, rest) = line.split_once("\" file ")?;
        let words: Vec<&str> = rest.split(' ').collect();
        Some(format!("{name}\" {} {}", words.get(2)?, words.get(4)?))
    };
    lines.into_iter().filter_map(of).collect()
}

#[test]
fn the_mode_may_change_on_a_volume_that_has_everything() {
    switches(true);
}

#[test]
fn the_mode_may_change_on_a_volume_that_has_not() {
    switches(false);
}

/// A machine whose restore waits for this file.
fn begun_without(cloud: &Cloud, mode: Mode, name: &str) -> Machine {
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&key(cloud, name)));
    mode.of(cloud.machine()).start()
}

/// On a bucket that nobody can check.
fn adopts(cloud: &Cloud, mode: Mode) -> Builder {
    mode.of(cloud.machine()).environment("S3_ADOPT", "1")
}

#[test]
fn a_restore_that_was_killed_deletes_nothing_when_the_mode_changes() {
    let cloud = Cloud::new();
    let machine = Sync.start(&cloud);
    plant(&machine.path(WORKSPACE));
    let expected = tree(&machine);
    leave(machine);
    let mut machine = begun_without(&cloud, Sync, "openclaw/workspace/large");
    until("some files are there", PATIENCE, || {
        machine.data().join("openclaw/workspace/many/d0/f6").exists().then_some(())
    });
    machine.destroy();
    assert!(!machine.data().join("openclaw/workspace/large").exists());
    cloud.proxy.heal();
    let machine = ready(machine.again(|builder| builder.unbind("/dev/fuse")));
    assert_eq!(storage(&machine)["mode"], "fuse");
    independent(&machine);
    flush(&machine);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

// === What is fetched, and when ===

#[test]
fn a_restore_that_was_killed_goes_on_where_it_was_in_sync_mode() {
    let cloud = Cloud::new();
    let machine = Sync.start(&cloud);
    let at = machine.path(WORKSPACE);
    // More than are fetched one by one.
    for n in 0..300 {
        put(at.join(format!("many/{n}")), format!("{n}"));
    }
    put(at.join("one"), "under two names");
    fs::hard_link(at.join("one"), at.join("other")).unwrap();
    put(at.join("last"), "comes last");
    let expected = tree(&machine);
    leave(machine);
    let mut machine = begun_without(&cloud, Sync, "openclaw/workspace/last");
    until("all but one are there", PATIENCE, || {
        let is_there = |name: &str| machine.data().join("openclaw/workspace").join(name).exists();
        let many = (0..300).all(|n| is_there(&format!("many/{n}")));
        (many && is_there("one") && is_there("other")).then_some(())
    });
    until("the operator sees that one is missing", PATIENCE, || {
        let progress = &storage(&machine)["progress"];
        let left = progress["files_total"].as_u64()? - progress["files_done"].as_u64()?;
        (progress["what"] == "restoring from the bucket" && left == 1).then_some(())
    });
    machine.destroy();
    cloud.proxy.heal();
    cloud.proxy.clear_log();
    let machine = ready(machine.again(|builder| builder));
    assert_eq!(difference(&expected, &tree(&machine)), "");
    let fetched = |name: &str| {
        let key = key(&cloud, &format!("openclaw/workspace/{name}"));
        cloud.proxy.log().iter().any(|entry| entry.method == "GET" && entry.path.contains(&key))
    };
    assert!(fetched("last") && !fetched("many/7") && !fetched("one"));
}

#[test]
fn what_the_gateway_reads_first_is_fetched_without_what_it_does_not() {
    let cloud = Cloud::new();
    let mut machine = Fuse.start(&cloud);
    for n in 0..210 {
        put(machine.path(&format!("/data/openclaw/credentials/{n}")), format!("secret {n}"));
    }
    for n in 0..60 {
        put(machine.path(WORKSPACE).join(format!("late/{n}")), format!("late {n}"));
    }
    flush(&machine);
    let expected = tree(&machine);
    assert_eq!(machine.stop(), 0);
    drop(machine);
    // Nothing of it arrives before the gateway runs.
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&key(&cloud, "openclaw/workspace/late")));
    let machine = Fuse.start(&cloud);
    assert_eq!(storage(&machine)["independent"], false);
    assert_eq!(machine.read("/data/openclaw/credentials/209"), "secret 209");
    let mounts = machine.ok(&["cat", "/proc/mounts"]);
    assert!(mounts.lines().any(|mount| mount.contains(" fuse.rclone ")), "{mounts}");
    let parts = machine.data().join(".cvm/storage/staging/parts");
    assert!(!parts.exists(), "what was fetched lies on the volume twice");
    cloud.proxy.heal();
    independent(&machine);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn a_volume_on_which_there_can_be_no_overlay_is_kept_in_sync_mode_and_stays_where_it_is() {
    let cloud = Cloud::new();
    let disk = Disk::new(64);
    let layers = ["lower", "upper", "work", "data"].map(|name| disk.0.path().join(name));
    for layer in &layers {
        fs::create_dir(layer).unwrap();
    }
    let [lower, upper, work, data] = layers.map(|layer| layer.display().to_string());
    let options = format!("lowerdir={lower},upperdir={upper},workdir={work}");
    let none = nix::mount::MsFlags::empty();
    nix::mount::mount(Some("overlay"), data.as_str(), Some("overlay"), none, Some(options.as_str())).unwrap();
    let _below = Mounted(PathBuf::from(&data));
    let machine = Fuse.of(cloud.machine()).unbind("/data").bind(Path::new(&data), "/data");
    let machine = ready(machine.start());
    let status = storage(&machine);
    assert_eq!(status["mode"], "sync", "{status:#}");
    assert!(status["reason"].as_str().is_some_and(|why| why.contains("overlayfs cannot be mounted")));
    machine.line("overlayfs cannot be mounted");
    put(machine.path(WORKSPACE).join("file"), "kept");
    assert_eq!(fs::read(Path::new(&data).join("openclaw/workspace/file")).unwrap(), b"kept");
    flush(&machine);
    assert_eq!(in_bucket(&cloud, "openclaw/workspace/file").as_deref(), Some("kept"));
    let machine = machine.again(|builder| builder);
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.read(&format!("{WORKSPACE}/file")), "kept");
}

/// A disk of its own, of so many MiB.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new(mib: u32) -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        this.mount(nix::mount::MsFlags::empty(), mib);
        this
    }

    fn grow(&self, mib: u32) {
        self.mount(nix::mount::MsFlags::MS_REMOUNT, mib);
    }

    fn mount(&self, how: nix::mount::MsFlags, mib: u32) {
        let size = format!("mode=755,size={mib}m");
        nix::mount::mount(Some("tmpfs"), self.0.path(), Some("tmpfs"), how, Some(size.as_str())).unwrap();
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        drop(Mounted(self.0.path().to_owned()));
    }
}

/// Dropping it unmounts it.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn what_a_volume_has_no_room_for_is_said_and_not_read_until_there_is_room() {
    let cloud = Cloud::new();
    let mut machine = Fuse.start(&cloud);
    put(machine.path(WORKSPACE).join("small"), "small");
    put(machine.path(WORKSPACE).join("large"), vec![7u8; 32 << 20]);
    flush(&machine);
    let expected = tree(&machine);
    assert_eq!(machine.stop(), 0);
    drop(machine);
    let disk = Disk::new(24);
    cloud.proxy.clear_log();
    let machine = ready(Fuse.of(cloud.machine()).unbind("/data").bind(disk.0.path(), "/data").start());
    until("it is said", PATIENCE, || {
        storage(&machine)["last_error"].as_str()?.contains("No space left on device").then_some(())
    });
    assert_eq!(storage(&machine)["independent"], false);
    until("what has room is there", PATIENCE, || {
        disk.0.path().join(".cvm/storage/upper/openclaw/workspace/small").exists().then_some(())
    });
    let large = key(&cloud, "openclaw/workspace/large");
    let read = cloud.proxy.log().iter().any(|entry| entry.method == "GET" && entry.path.contains(&large));
    assert!(!read, "what cannot be kept was read");
    // Under another name it is as much only in the bucket as before, also when all names of old are done.
    machine.ok(&["sh", "-ec", &format!("cd {WORKSPACE}; mv large renamed")]);
    until("the hydrator has nothing to do", PATIENCE, || {
        storage(&machine)["progress"].is_null().then_some(())
    });
    let flushed = machine.exec(&["cvm", "storage", "flush"]);
    assert_eq!(flushed.status.code(), Some(1), "{}", String::from_utf8_lossy(&flushed.stdout));
    assert_eq!(storage(&machine)["independent"], false);
    assert!(stock_rclone(&cloud).ok(&["lsf", "crypt:openclaw/workspace"]).starts_with(b"large"));
    disk.grow(200);
    independent(&machine);
    machine.ok(&["sh", "-ec", &format!("cd {WORKSPACE}; mv renamed large")]);
    assert_eq!(difference(&timeless(expected), &timeless(tree(&machine))), "");
    flush(&machine);
}

// === In the eyes of others ===

/// What HKDF makes of the harness's `MASTER_KEY`, by another program's reckoning.
const PASSWORD: &str = "jrq/5kUcKRy6NqQbM7C5bnpMnrR6+7d/aALQruAzhwk=";
const SALT: &str = "2kBa0tfg6UdY4fDnCeiDgqjrmnPuS/z8j0BDoG0BGvA=";
const PREFIX: &str = "openclaw-data";

fn stock_rclone(cloud: &Cloud) -> Rclone {
    Rclone::new(&cloud.garage, PREFIX, PASSWORD, SALT)
}

/// Where an object lies, by stock rclone's reckoning.
fn key(cloud: &Cloud, name: &str) -> String {
    let said = stock_rclone(cloud).ok(&["cryptdecode", "--reverse", "crypt:", name]);
    let said = String::from_utf8(said).unwrap();
    format!("{PREFIX}/{}", said.split_whitespace().last().unwrap())
}

/// Files of a tree by name: content and time.
fn files(lines: &[String]) -> Vec<String> {
    lines
        .iter()
        .filter_map(|line| {
            let (name, rest) = line.rsplit_once("\" file ")?;
            let words: Vec<&str> = rest.split(' ').collect();
            Some(format!("{name} {} {} {}", words[2], words[3], words[4]))
        })
        .collect()
}

#[test]
fn stock_rclone_reads_everything_that_is_written() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    plant(&machine.path(WORKSPACE));
    add_new(&machine.path(WORKSPACE));
    for name in [
        "\u{2400}\u{240a}",
        "full／width",
        "\r",
        "new\nline",
        "tab\t",
        "del\u{7f}",
        "gro\u{308}ße",
        "\u{201b}",
        "a\u{201b}FFb",
    ] {
        // rclone's own names for these differ from the kernel's, or are one name to it.
        fs::remove_file(machine.path(WORKSPACE).join("new/names").join(name)).unwrap();
        fs::remove_dir_all(machine.path(WORKSPACE).join("new/below").join(name)).unwrap();
    }
    for name in names().iter().filter(|n| std::str::from_utf8(n).is_err()) {
        // Stock rclone writes these with their quotes, as text.
        fs::remove_file(machine.path(WORKSPACE).join("new/names").join(OsStr::from_bytes(name))).unwrap();
        fs::remove_dir_all(machine.path(WORKSPACE).join("new/below").join(OsStr::from_bytes(name))).unwrap();
    }
    flush(&machine);
    let rclone = stock_rclone(&cloud);
    let copy = tempfile::tempdir().unwrap();
    rclone.ok(&["copy", "crypt:", &copy.path().display().to_string()]);
    let (ours, theirs) = (tree(&machine), digest(&copy.path().join("openclaw"), &[]));
    assert_eq!(difference(&files(&ours), &files(&theirs)), "");
    // Its own objects are as open.
    let control: Vec<_> = walk(&copy.path().join(".cvm"));
    assert!(control.iter().any(|p| p.ends_with("owner")) && control.len() > 2, "{control:?}");
    assert!(control.iter().all(|p| fs::metadata(p).is_ok_and(|m| m.len() > 0)));
    // A program that shares no code with rclone agrees, also where there are several blocks.
    let objects: Vec<_> = cloud.garage.all_bytes().collect();
    let of_size = |least: usize, most: usize| {
        objects.iter().filter(move |(_, bytes)| (least..most).contains(&bytes.len()))
    };
    let mut judged = [0, 0];
    for (key, bytes) in of_size(0, 5000).take(12).chain(of_size(140_000, 4_000_000).take(4)) {
        let name = key.strip_prefix(PREFIX).unwrap().trim_start_matches('/');
        let (clear, content) = rclone_crypt_python(name, bytes, PASSWORD, SALT).unwrap();
        let at = copy.path().join(&clear);
        if clear.contains('\u{201b}') {
            continue;
        }
        assert!(clear.starts_with(".cvm/") || fs::read(&at).unwrap() == content, "{clear}");
        judged[usize::from(content.len() > 2 * 65536)] += 1;
    }
    assert!(judged[0] > 5 && judged[1] > 0, "{judged:?}");
}

/// The blocks of commands in `S3_STORAGE.md` that say how everything is had by hand.
fn recipes() -> Vec<String> {
    let text = fs::read_to_string(repository().join("S3_STORAGE.md")).unwrap();
    let (_, by_hand) = text.split_once("## Recover by hand").unwrap();
    let (by_hand, _) = by_hand.split_once("\n## ").unwrap();
    by_hand.split("```sh\n").skip(1).map(|rest| rest.split_once("```").unwrap().0.to_owned()).collect()
}

#[test]
fn the_recipes_for_a_recovery_by_hand_do_what_they_say() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    put(machine.path(WORKSPACE).join("notes"), "kept");
    put(machine.path("/data/openclaw/openclaw.json"), "{ }");
    flush(&machine);
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    put(at("key.txt"), format!("{MASTER_KEY}\n"));
    let [_, with_rclone, without_us, manifest, hmac] = &recipes()[..] else { panic!("other recipes") };
    let follow = |recipe: &str| {
        let path = [binaries(), repository().join("target/venv/bin"), "/usr/bin".into(), "/bin".into()];
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", recipe])
            .current_dir(scratch.path())
            .env_clear()
            .env("PATH", std::env::join_paths(path).unwrap())
            .env("MASTER_KEY_FILE", at("key.txt"))
            .env("S3_BUCKET", cloud.garage.bucket())
            .env("S3_ENDPOINT", cloud.garage.endpoint())
            .env("AWS_ACCESS_KEY_ID", cloud.garage.access_key())
            .env("AWS_SECRET_ACCESS_KEY", cloud.garage.secret_key())
            .output()
            .unwrap();
        assert!(output.status.success(), "{recipe}\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let has_come = || {
        assert_eq!(fs::read_to_string(at("state/openclaw/workspace/notes")).unwrap(), "kept");
        assert!(!at("state/.cvm").exists());
        fs::remove_dir_all(at("state")).unwrap();
    };
    let listed = follow(with_rclone);
    assert!(listed.contains("openclaw/workspace/notes"), "{listed}");
    has_come();
    fs::remove_file(at("rclone.conf")).unwrap();
    let copy = with_rclone.lines().last().unwrap();
    follow(&format!("{without_us}\n{copy}"));
    has_come();
    let said: serde_json::Value = serde_json::from_str(&follow(manifest)).unwrap();
    let sum = follow("printf '{ }' | sha256sum");
    assert_eq!(said["sha"].as_str(), sum.split_whitespace().next(), "{said}");
    // Any of them.
    let first = follow("rclone --config rclone.conf lsf openclaw:.cvm/manifest | sort | head -n 1");
    let of_first = hmac.replace("000000000000-000000000001-000001", first.trim());
    let said = follow(&format!("{without_us}\n{of_first}"));
    let sums: Vec<&str> = said.lines().filter_map(|line| line.split_whitespace().last()).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1] && sums[0].len() == 64, "{said}");
}

#[test]
fn stock_rclone_reads_the_content_of_every_name_whatever_it_calls_it() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let names = names();
    for (n, name) in names.iter().enumerate() {
        put(machine.path(WORKSPACE).join("hard").join(OsStr::from_bytes(name)), format!("{n:08}"));
    }
    flush(&machine);
    let all = stock_rclone(&cloud).ok(&["cat", "crypt:openclaw/workspace/hard"]);
    let mut contents: Vec<_> = all.chunks(8).map(String::from_utf8_lossy).collect();
    contents.sort();
    assert_eq!(contents, (0..names.len()).map(|n| format!("{n:08}")).collect::<Vec<_>>());
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.path().is_dir() { found.extend(walk(&entry.path())) } else { found.push(entry.path()) }
    }
    found
}

#[test]
fn nothing_of_names_or_contents_is_in_any_stored_byte() {
    const CANARY: &str = "Kanarienvogel";
    let cloud = Cloud::new();
    let gateway = HEALTHY.replace("exec", &format!("echo {CANARY}; exec"));
    let machine = ready(Fuse.of(cloud.machine().fake_gateway(&gateway)).start());
    let at = machine.path(WORKSPACE);
    put(at.join(CANARY).join(format!("a-{CANARY}.txt")), format!("{CANARY} ").repeat(9000));
    put(at.join("small"), CANARY);
    symlink(format!("to/{CANARY}"), at.join("link")).unwrap();
    fs::set_permissions(at.join("small"), fs::Permissions::from_mode(0o4711)).unwrap();
    let row = format!(
        "c.execute('create table t(x)'); c.execute('insert into t values(?)', ('{CANARY}',)); c.commit()"
    );
    sqlite_in(&machine, &row, &format!("{WORKSPACE}/of.sqlite"));
    // The bucket keeps the end of it.
    machine.ok(&["grep", "-q", CANARY, "/var/log/openclaw-cvm/gateway.log"]);
    flush(&machine);
    fs::rename(at.join("small"), at.join(format!("{CANARY}-2"))).unwrap();
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    let has = |bytes: &[u8]| bytes.windows(CANARY.len()).any(|w| w.eq_ignore_ascii_case(CANARY.as_bytes()));
    let mut objects = 0;
    for (key, bytes) in cloud.garage.all_bytes() {
        assert!(!has(key.as_bytes()) && !has(&bytes), "{key}");
        objects += 1;
    }
    assert!(objects > 4);
    for file in walk(cloud.garage.directory()) {
        assert!(!has(&fs::read(&file).unwrap_or_default()), "{}", file.display());
    }
}

const SQLITE: &str = "import sqlite3,sys,os\nc=sqlite3.connect(sys.argv[1])\n";

fn sqlite(program: &str, database: &Path) -> String {
    let mut python = Command::new("python3");
    let output =
        python.args(["-c", &format!("{SQLITE}{program}")]).arg(database).output().expect("python3 runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

fn sqlite_in(machine: &Machine, program: &str, database: &str) -> String {
    machine.ok(&["python3", "-c", &format!("{SQLITE}{program}"), database]).trim().to_owned()
}

/// Committed, with the log left beside it as a killed writer leaves it, and cut short.
const TORN: &str = "c.execute('pragma journal_mode=wal')
c.execute('pragma wal_autocheckpoint=0')
c.execute('create table t(x)')
for n in range(50):
    c.execute('insert into t values(?)', ('y'*500,)); c.commit()
os.truncate(sys.argv[1]+'-wal', os.path.getsize(sys.argv[1]+'-wal')-2000)
sys.stdout.flush(); os._exit(0)";

#[test]
fn what_was_adopted_is_checked_and_not_waited_for_from_the_next_machine_on() {
    let cloud = Cloud::new();
    let old = tempfile::tempdir().unwrap();
    let names = ["one", "two", "large"].map(|name| format!("openclaw/workspace/{name}"));
    for (name, content) in names.iter().zip(["1", "2", "3"]) {
        put(old.path().join(name), content.repeat(1000));
    }
    stock_rclone(&cloud).ok(&["copy", &old.path().display().to_string(), "crypt:"]);
    let mut machine = ready(adopts(&cloud, Fuse).start());
    machine.line("The manifest says of 3 adopted files what is in them");
    assert_eq!(machine.stop(), 0);
    drop(machine);
    let [one, two, large] = names.each_ref().map(|name| key(&cloud, name));
    let [first, second] = [&one, &two].map(|key| cloud.garage.object(key).unwrap());
    cloud.garage.put_raw(&one, &second.bytes);
    cloud.garage.put_raw(&two, &first.bytes);
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&large));
    let machine = Fuse.start(&cloud);
    assert_eq!(storage(&machine)["independent"], false);
    assert!(!machine.output().contains("adopted"), "{}", machine.output());
    cloud.proxy.heal();
    independent(&machine);
    let incidents = storage(&machine)["incidents"].to_string();
    assert!(incidents.contains(&names[0]) && incidents.contains(&names[1]), "{incidents}");
    assert!(!machine.path(WORKSPACE).join("one").exists(), "what was swapped is served");
    assert_eq!(machine.read(&format!("{WORKSPACE}/large")), "3".repeat(1000));
}

#[test]
fn what_was_bad_when_it_was_adopted_is_told_once_it_has_been_put_right() {
    let cloud = Cloud::new();
    let old = tempfile::tempdir().unwrap();
    for name in ["one", "two", "bad"] {
        put(old.path().join("openclaw/workspace").join(name), name);
    }
    stock_rclone(&cloud).ok(&["copy", &old.path().display().to_string(), "crypt:"]);
    let bad = key(&cloud, "openclaw/workspace/bad");
    let good = cloud.garage.get_raw(&bad).unwrap();
    cloud.garage.put_raw(&bad, &vec![0; good.len()]);
    let mut machine = ready(adopts(&cloud, Fuse).start());
    machine.line("The manifest says of 2 adopted files what is in them");
    assert_eq!(machine.stop(), 0);
    cloud.garage.put_raw(&bad, &good);
    let mut machine = ready(machine.again(|builder| builder));
    assert_eq!(machine.read(&format!("{WORKSPACE}/bad")), "bad");
    assert_eq!(machine.stop(), 0);
    let machine = ready(machine.again(|builder| builder));
    machine.line("The manifest says of 1 adopted files what is in them");
}

/// An adoption that a loss of power ends: nobody knows yet what the files have to be.
fn adoption_cut_short(mode: Mode) {
    let cloud = Cloud::new();
    let old = tempfile::tempdir().unwrap();
    put(old.path().join("openclaw/workspace/first"), "whole");
    put(old.path().join("openclaw/workspace/last"), "comes last");
    stock_rclone(&cloud).ok(&["copy", &old.path().display().to_string(), "crypt:"]);
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&key(&cloud, "openclaw/workspace/last")));
    let mut machine = adopts(&cloud, mode).start();
    let first = machine.data().join("openclaw/workspace/first");
    until("one file is there", PATIENCE, || first.exists().then_some(()));
    machine.destroy();
    // It was not on the disk yet.
    File::create(&first).unwrap();
    cloud.proxy.heal();
    let machine = ready(machine.again(|builder| builder));
    assert_eq!(machine.read(&format!("{WORKSPACE}/first")), "whole");
    assert_eq!(machine.read(&format!("{WORKSPACE}/last")), "comes last");
    flush(&machine);
    assert_eq!(in_bucket(&cloud, "openclaw/workspace/first").as_deref(), Some("whole"));
}

#[test]
fn an_adoption_that_a_loss_of_power_ends_overwrites_nothing_in_fuse_mode() {
    adoption_cut_short(Fuse);
}

#[test]
fn an_adoption_that_a_loss_of_power_ends_overwrites_nothing_in_sync_mode() {
    adoption_cut_short(Sync);
}

#[test]
fn a_bucket_of_the_old_entrypoint_is_adopted() {
    let cloud = Cloud::new();
    let old = tempfile::tempdir().unwrap();
    put(old.path().join("openclaw/openclaw.json"), "{}");
    put(old.path().join("openclaw/workspace/notes.md"), "from before");
    put(old.path().join(".config/tool/settings"), "kept");
    fs::create_dir_all(old.path().join("sqlite")).unwrap();
    sqlite(
        "c.execute('create table m(x)');c.execute('insert into m values(42)');c.commit()",
        &old.path().join("sqlite/main-memory.db"),
    );
    sqlite(TORN, &old.path().join("openclaw/workspace/x.sqlite"));
    assert!(old.path().join("openclaw/workspace/x.sqlite-wal").exists());
    let rclone = stock_rclone(&cloud);
    rclone.ok(&["copy", &old.path().display().to_string(), "crypt:"]);
    // And what was written by a program that shares no code with rclone, with more than a block in it.
    let (by_another, of_another) = ("openclaw/workspace/größer/als ein Block", "64 KiB ".repeat(10_000));
    let (name, bytes) = written_by_rclone_crypt_python(by_another, &of_another, PASSWORD, SALT);
    cloud.garage.put_raw(&format!("{PREFIX}/{name}"), &bytes);
    let machine = ready(adopts(&cloud, Fuse).start());
    assert!(
        machine.read("/var/log/openclaw-cvm/supervisor.log").contains("adopted")
            || machine.output().contains("adopted"),
        "{}",
        machine.output()
    );
    let data = machine.path("/data");
    for (path, content) in [
        ("openclaw/workspace/notes.md", "from before"),
        (".config/tool/settings", "kept"),
        (by_another, &of_another),
    ] {
        assert_eq!(fs::read_to_string(data.join(path)).unwrap(), content);
    }
    flush(&machine);
    let memory = "openclaw/agents/main/memory.db";
    let memory_at = format!("/data/{memory}");
    assert_eq!(sqlite_in(&machine, "print(c.execute('select x from m').fetchone()[0])", &memory_at), "42");
    let rows = "print(c.execute('select count(*) from t').fetchone()[0], c.execute('pragma integrity_check').fetchone()[0])";
    let mut machine = machine;
    for mode in [Fuse, Sync] {
        machine = restored(&cloud, machine, mode);
        assert!(!machine.output().contains("adopted"), "{}", machine.output());
        assert_eq!(
            sqlite_in(&machine, "print(c.execute('select x from m').fetchone()[0])", &memory_at),
            "42"
        );
        let found = sqlite_in(&machine, rows, &format!("{WORKSPACE}/x.sqlite"));
        let (count, check) = found.split_once(' ').unwrap();
        assert!(count.parse::<u32>().unwrap() >= 45 && check == "ok", "{found}");
    }
    // What the old one wrote is where it was.
    let listed = String::from_utf8(rclone.ok(&["lsf", "-R", "crypt:"])).unwrap();
    for kept in ["sqlite/main-memory.db", memory, "openclaw/openclaw.json"] {
        assert!(listed.lines().any(|l| l == kept), "{kept} in:\n{listed}");
    }
}

// === Many ===

#[test]
fn the_mode_that_most_files_have_is_restored_whatever_it_lets_others_do() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    for n in 0..200 {
        put(at.join(format!("shared/{n}")), n.to_string());
        fs::set_permissions(at.join(format!("shared/{n}")), PermissionsExt::from_mode(0o666)).unwrap();
    }
    fs::set_permissions(at.join("shared"), PermissionsExt::from_mode(0o777)).unwrap();
    flush(&machine);
    let expected = tree(&machine);
    let machine = restored(&cloud, machine, Fuse);
    assert_eq!(difference(&expected, &tree(&machine)), "");
}

#[test]
fn ten_thousand_files_are_pushed_and_restored() {
    let many = if std::env::var_os("CVM_SOAK").is_some() { 100_000 } else { 10_000 };
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    for n in 0..many {
        put(at.join(format!("many/{}/{n}", n % 97)), n.to_string());
    }
    let began = std::time::Instant::now();
    flush(&machine);
    eprintln!("{many} files pushed in {:?}", began.elapsed());
    let expected = tree(&machine);
    let mut machine = machine;
    for mode in [Fuse, Sync] {
        let began = std::time::Instant::now();
        machine = restored(&cloud, machine, mode);
        eprintln!("and restored in {mode:?} mode in {:?}", began.elapsed());
        assert_eq!(difference(&expected, &tree(&machine)), "", "{mode:?}");
    }
}

#[test]
fn a_bulk_of_files_holds_up_neither_a_commit_nor_an_order() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    let database = format!("{WORKSPACE}/state.sqlite");
    fs::create_dir_all(&at).unwrap();
    sqlite_in(&machine, "c.execute('create table t(x)'); c.commit()", &database);
    independent(&machine);
    flush(&machine);
    cloud.proxy.latency(Duration::from_millis(150));
    for n in 0..6000 {
        put(at.join(format!("many/{}/{n}", n % 97)), n.to_string());
    }
    let left = || storage(&machine)["pending_files"].as_u64().unwrap_or_default();
    until("the bulk is on its way", PATIENCE, || (left() > 3000).then_some(()));
    sqlite_in(&machine, "c.execute('insert into t values(1)'); c.commit()", &database);
    let mut stream =
        std::os::unix::net::UnixStream::connect(machine.path(cvm_protocol::paths::STORAGE_SOCKET)).unwrap();
    let committed = r#"{"v":1,"verb":"committed","path":"openclaw/workspace/state.sqlite"}"#;
    writeln!(stream, "{committed}").unwrap();
    let said = std::io::read_to_string(&stream).unwrap();
    assert!(said.trim_end().lines().last().unwrap().contains("The bucket has it"), "{said}");
    assert!(left() > 1000, "the commit has waited for the bulk: {} are left", left());
    let refused = machine.exec(&["cvm", "storage", "takeover", "--yes"]);
    assert!(String::from_utf8_lossy(&refused.stdout).contains("owns the bucket already"), "{refused:?}");
    assert!(left() > 1000, "the order has waited for the bulk: {} are left", left());
    cloud.proxy.heal();
    flush(&machine);
    // A snapshot of a database has its rows, not its bytes.
    let files = |machine: &Machine| -> Vec<String> {
        tree(machine).into_iter().filter(|line| !line.contains("state.sqlite")).collect()
    };
    let expected = files(&machine);
    let machine = restored(&cloud, machine, Sync);
    assert_eq!(difference(&expected, &files(&machine)), "");
    assert_eq!(
        sqlite_in(&machine, "print(c.execute('select count(*) from t').fetchone()[0])", &database),
        "1"
    );
}

// === What takes the place of something else ===

/// These cannot be sent; removals wait for them.
fn held(cloud: &Cloud, names: &[&str]) {
    for name in names {
        let path = key(cloud, &format!("openclaw/workspace/{name}"));
        cloud.proxy.add(Rule::new(Fault::Status(503)).method("PUT").path(&path));
    }
}

/// The same as [`in_bucket`] for what may be a directory there, which stock rclone reads in full.
fn object(cloud: &Cloud, name: &str) -> Option<String> {
    let name = format!("openclaw/workspace/{name}");
    cloud.garage.object(&key(cloud, &name)).and_then(|_| in_bucket(cloud, &name))
}

fn in_workspace(machine: &Machine, program: &str) {
    machine.ok(&["sh", "-ec", &format!("mkdir -p {WORKSPACE}; cd {WORKSPACE}; {program}")]);
}

fn is_there(cloud: &Cloud, name: &str) {
    until("it is pushed", PATIENCE, || in_bucket(cloud, &format!("openclaw/workspace/{name}")));
}

/// Waits until a round has found that it cannot do everything.
fn held_up(machine: &Machine) {
    until("something has to wait", PATIENCE, || {
        (!machine.exec(&["cvm", "storage", "flush"]).status.success()).then_some(())
    });
}

fn healed(cloud: &Cloud, machine: &Machine) {
    cloud.proxy.heal();
    until("all is pushed", PATIENCE, || {
        machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
    });
}

/// Names and objects in the bucket are those of the tree, and the next machine has it.
#[track_caller]
fn comes_back(cloud: &Cloud, machine: Machine, mode: Mode) -> Machine {
    let expected = tree(&machine);
    let said = until("no drill is running", PATIENCE, || {
        let output = machine.exec(&["cvm", "storage", "verify", "--deep"]);
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        (!said.contains("is running already")).then_some(said)
    });
    assert!(said.contains("equal") && !said.contains("does not know"), "{said}");
    let machine = restored(cloud, machine, mode);
    assert_eq!(difference(&expected, &tree(&machine)), "");
    machine
}

fn listed(machine: &Machine, name: &str) -> bool {
    let all = machine.ok(&["cvm", "storage", "ls", "openclaw/workspace"]);
    all.lines().any(|line| line.ends_with(&format!("openclaw/workspace/{name}")))
}

fn link_for_a_directory(mode: Mode) {
    let cloud = Cloud::new();
    let machine = mode.start(&cloud);
    in_workspace(&machine, "mkdir -p d e/in g; for n in d/x d/y e/x e/in/y g/x; do echo $n > $n; done");
    flush(&machine);
    held(&cloud, &["beside", "d2/x", "e2/in/y"]);
    let at = machine.path(WORKSPACE);
    put(at.join("beside"), "1");
    fs::rename(at.join("d"), at.join("d2")).unwrap();
    symlink("d2", at.join("d")).unwrap();
    fs::rename(at.join("e"), at.join("e2")).unwrap();
    put(at.join("e"), "file");
    fs::remove_dir_all(at.join("g")).unwrap();
    symlink("nowhere", at.join("g")).unwrap();
    is_there(&cloud, "d2/y");
    held_up(&machine);
    assert!(listed(&machine, "d/x") && listed(&machine, "e/in/y"), "what moved is nowhere else yet");
    assert_eq!(object(&cloud, "e"), None, "a file beside what is below it");
    healed(&cloud, &machine);
    assert!(!listed(&machine, "d/x") && !listed(&machine, "e/in/y") && !listed(&machine, "g/x"));
    in_workspace(&machine, "echo NEW > d2/x; rm d2/y");
    flush(&machine);
    let machine = comes_back(&cloud, machine, mode);
    assert_eq!(machine.read(&format!("{WORKSPACE}/d/x")), "NEW\n");
}

#[test]
fn a_link_in_place_of_a_directory_hides_nothing_that_comes_back_in_fuse_mode() {
    link_for_a_directory(Fuse);
}

#[test]
fn a_link_in_place_of_a_directory_hides_nothing_that_comes_back_in_sync_mode() {
    link_for_a_directory(Sync);
}

#[test]
fn what_replaces_a_file_waits_until_the_files_removal_does_not() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    in_workspace(&machine, "echo f > f; echo g > g; ln -s f l");
    flush(&machine);
    held(&cloud, &["beside", "f2", "g2"]);
    let at = machine.path(WORKSPACE);
    put(at.join("beside"), "1");
    fs::rename(at.join("f"), at.join("f2")).unwrap();
    fs::rename(at.join("g"), at.join("g2")).unwrap();
    fs::remove_file(at.join("l")).unwrap();
    symlink("beside", at.join("f")).unwrap();
    put(at.join("g/x"), "in\n");
    put(at.join("l/x"), "in\n");
    is_there(&cloud, "l/x");
    held_up(&machine);
    let has = |name: &str| object(&cloud, name);
    assert_eq!((has("f").as_deref(), has("g").as_deref(), has("g/x")), (Some("f\n"), Some("g\n"), None));
    healed(&cloud, &machine);
    assert_eq!((has("f"), has("g"), has("g/x").as_deref()), (None, None, Some("in\n")));
    comes_back(&cloud, machine, Sync);
}

#[test]
fn a_directory_and_a_file_of_its_own_change_places_and_the_bucket_has_the_file_all_the_time() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    in_workspace(&machine, "mkdir d; echo inner > d/x; echo outer > f");
    flush(&machine);
    held(&cloud, &["d", "f/x"]);
    let at = machine.path(WORKSPACE);
    fs::rename(at.join("d/x"), at.join("t")).unwrap();
    fs::remove_dir(at.join("d")).unwrap();
    fs::rename(at.join("t"), at.join("d")).unwrap();
    fs::rename(at.join("f"), at.join("t")).unwrap();
    fs::create_dir(at.join("f")).unwrap();
    fs::rename(at.join("t"), at.join("f/x")).unwrap();
    held_up(&machine);
    let has = |name: &str| object(&cloud, name);
    assert_eq!((has("d/x").as_deref(), has("f").as_deref()), (Some("inner\n"), Some("outer\n")));
    healed(&cloud, &machine);
    assert_eq!((has("d").as_deref(), has("f/x").as_deref()), (Some("inner\n"), Some("outer\n")));
    comes_back(&cloud, machine, Sync);
}

/// Writes lines into the manifest as an owner of the bucket would, so that it says what no worker
/// writes any more.
fn graft(cloud: &Cloud, lines: &str) {
    const PROGRAM: &str = "
import gzip, hashlib, hmac, json, sys
old, lines, new, master = sys.argv[1:]
mac = lambda key, text: hmac.new(key, text, hashlib.sha256).digest()
key = mac(mac(bytes(32), master.encode()), b'openclaw-cvm-manifest-v1\\x01')
def tag(purpose, *parts):
    return mac(key, purpose + b''.join(len(p).to_bytes(8, 'little') + p for p in parts))
last = json.loads(gzip.decompress(open(old, 'rb').read().split(b'\\n', 1)[1]).split(b'\\n')[0])
body = lines.encode()
head = tag(b'chain', bytes.fromhex(last['head']), hashlib.sha256(body).digest()).hex()
header = dict(last, to=last['to'] + 1, prev=last['head'], head=head)
header['from'] = last['to']
packed = gzip.compress(json.dumps(header).encode() + b'\\n' + body)
open(new, 'wb').write(b'openclaw-cvm-manifest 2 ' + tag(b'segment', packed).hex().encode() + b'\\n' + packed)
print('%012d-%012d-%06d' % (header['from'], header['to'], header['epoch']))
";
    let rclone = stock_rclone(cloud);
    let said = String::from_utf8(rclone.ok(&["lsf", "crypt:.cvm/manifest"])).unwrap();
    let last = said.lines().max_by_key(|name| name.split('-').nth(1).map(str::to_owned)).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| scratch.path().join(name).display().to_string());
    rclone.ok(&["copyto", &format!("crypt:.cvm/manifest/{last}"), &old]);
    let name = python(PROGRAM, &[&old, lines, &new, MASTER_KEY]);
    rclone.ok(&["copyto", &new, &format!("crypt:.cvm/manifest/{name}")]);
}

/// A bucket whose manifest has files below links, and below a file.
fn with_files_astray() -> Cloud {
    let cloud = Cloud::new();
    let mut machine = Fuse.start(&cloud);
    in_workspace(&machine, "mkdir d e g; for n in d/x d/odd d/empty e/x g/x good; do echo $n > $n; done");
    in_workspace(&machine, ": > d/empty; chmod 666 d/odd; ln -s d/x d/link; mkdir d/sub");
    flush(&machine);
    assert_eq!(machine.stop(), 0);
    let outside = "L3RtcC9vdXRzaWRl"; // /tmp/outside
    let line = |name: &str, rest: &str| {
        format!("{{\"p\":\"openclaw/workspace/{name}\",{rest},\"mode\":511,\"mt\":1700000000000000000}}\n")
    };
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    graft(
        &cloud,
        &[
            line("d", &format!("\"t\":\"l\",\"to\":\"{outside}\"")),
            line("e", "\"t\":\"l\",\"to\":\"bm93aGVyZQ==\""),
            line("g", &format!("\"t\":\"f\",\"size\":0,\"sha\":\"{empty}\"")),
        ]
        .concat(),
    );
    let nothing = tempfile::NamedTempFile::new().unwrap();
    stock_rclone(&cloud).ok(&["copyto", &nothing.path().display().to_string(), "crypt:openclaw/workspace/g"]);
    cloud
}

const OUTSIDE: &str = "/tmp/outside";

/// Nothing was written through the link.
#[track_caller]
fn untouched(machine: &Machine) {
    let mut names: Vec<_> =
        walk(&machine.path(OUTSIDE)).into_iter().filter_map(|p| p.file_name().map(OsStr::to_owned)).collect();
    names.sort();
    assert_eq!(names, ["x"]);
    assert_eq!(machine.read(&format!("{OUTSIDE}/x")), "mine");
}

fn files_astray(mode: Mode) {
    let cloud = with_files_astray();
    let machine = ready(mode.of(cloud.machine().file("/tmp/outside/x", "mine", 0o600)).start());
    independent(&machine);
    untouched(&machine);
    let at = machine.path(WORKSPACE);
    assert_eq!(fs::read_to_string(at.join("good")).unwrap(), "good\n");
    assert_eq!(fs::read_link(at.join("d")).unwrap(), Path::new(OUTSIDE));
    assert_eq!(fs::read_link(at.join("e")).unwrap(), Path::new("nowhere"));
    assert_eq!(fs::read(at.join("g")).unwrap(), b"");
    flush(&machine);
    for name in ["d/x", "d/odd", "d/sub", "e/x", "g/x"] {
        assert!(!listed(&machine, name), "{name}");
    }
    untouched(&machine);
    comes_back(&cloud, machine, mode);
}

#[test]
fn files_below_links_are_neither_restored_nor_kept_in_fuse_mode() {
    files_astray(Fuse);
}

#[test]
fn files_below_links_are_neither_restored_nor_kept_in_sync_mode() {
    files_astray(Sync);
}

#[test]
fn a_restore_by_hand_writes_nothing_outside_of_its_directory() {
    let cloud = with_files_astray();
    // On another prefix: what it restores from is nobody's.
    let elsewhere = cloud.machine().environment("S3_PREFIX", "elsewhere");
    let machine = ready(elsewhere.file("/tmp/outside/x", "mine", 0o600).start());
    let output = restore_by_hand(&cloud, &machine, &[], "/tmp/whole");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    untouched(&machine);
    let at = machine.path("/tmp/whole/openclaw/workspace");
    assert_eq!(fs::read_to_string(at.join("good")).unwrap(), "good\n");
    assert_eq!(fs::read_link(at.join("d")).unwrap(), Path::new(OUTSIDE));
}

/// Does something while a round is on its way that has `log` in it, and tells whether what had the
/// name went up before what has it now.
fn rotated_meanwhile(cloud: &Cloud, machine: &Machine, rotate: &str) {
    in_workspace(machine, "head -c 100000 /dev/zero | tr '\\0' x > log");
    independent(machine);
    flush(machine);
    cloud.proxy.latency(Duration::from_millis(150));
    // Where nothing is pushed: all of it comes in one moment, and the log, which is larger, is last.
    let (at, bulk) = (machine.path(WORKSPACE), machine.path("/data/openclaw/cache/many"));
    for n in 0..1500 {
        put(bulk.join(format!("{}/{n}", n % 97)), n.to_string());
    }
    File::options().append(true).open(at.join("log")).unwrap().write_all(b"and more").unwrap();
    fs::rename(&bulk, at.join("many")).unwrap();
    fs::remove_dir(bulk.parent().unwrap()).unwrap();
    let left = || storage(machine)["pending_files"].as_u64().unwrap_or_default();
    until("the bulk is on its way", PATIENCE, || (left() > 700).then_some(()));
    cloud.proxy.clear_log();
    in_workspace(machine, rotate);
    let keys = ["log", "log.1"].map(|name| key(cloud, &format!("openclaw/workspace/{name}")));
    let first_of = |key: &String| {
        let log = cloud.proxy.log();
        log.iter().position(|entry| {
            let path = entry.path.split('?').next().unwrap_or_default();
            entry.method == "PUT" && path.ends_with(key.as_str())
        })
    };
    until("both are sent", PATIENCE, || keys.iter().all(|key| first_of(key).is_some()).then_some(()));
    let order = (first_of(&keys[1]), first_of(&keys[0]));
    assert!(order.0 < order.1, "the log took its own name before it had another: {order:?}");
    healed(cloud, machine);
}

#[test]
fn a_log_that_is_rotated_in_a_long_round_keeps_its_name_until_it_has_another() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    rotated_meanwhile(&cloud, &machine, "mv log log.1; echo new > log");
    comes_back(&cloud, machine, Sync);
}

#[test]
fn a_database_in_place_of_a_file_is_not_so_urgent_that_the_file_is_lost() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let rotate = "mv log log.1; python3 -c \"import sqlite3; c=sqlite3.connect('log'); c.execute('create table t(x)'); c.commit()\"";
    rotated_meanwhile(&cloud, &machine, rotate);
}

// === The operator's hand ===

#[test]
fn an_operator_sees_checks_and_fetches_what_the_bucket_has() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    plant(&at);
    sqlite_in(&machine, "c.execute('create table m(x)');c.commit()", &format!("{WORKSPACE}/a.sqlite"));
    flush(&machine);
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw/workspace/many"]);
    assert_eq!(listed.lines().filter(|l| l.contains("/f")).count(), 60, "{listed}");
    assert_eq!(listed, machine.ok(&["cvm", "storage", "ls", "/data/openclaw/workspace/many"]));
    let path = "openclaw/workspace/many/d0/f6";
    assert_eq!(machine.ok(&["cvm", "storage", "get", path]), machine.read(&format!("/data/{path}")));
    assert!(!machine.exec(&["cvm", "storage", "get", "no/such"]).status.success());
    for words in [&["verify"][..], &["verify", "--deep"], &["drill"]] {
        machine.ok(&[&["cvm", "storage"], words].concat());
    }
    assert_eq!(storage(&machine)["drill"]["good"], true);
    let restore = || restore_by_hand(&cloud, &machine, &[], "/tmp/whole");
    let output = restore();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(
        difference(
            &without_volatile(tree(&machine)),
            &without_volatile(digest(&machine.path("/tmp/whole/openclaw"), &[]))
        ),
        ""
    );
    // Not over what is there.
    assert!(!restore().status.success());
    // One object less: seen by name and size. One replaced by another of its size: by content.
    let one_size = machine.read("/data/openclaw/workspace/deep/er/two/three").len();
    put(at.join("same-size"), "z".repeat(one_size));
    flush(&machine);
    let (one, two) = (
        key(&cloud, "openclaw/workspace/deep/er/two/three"),
        key(&cloud, "openclaw/workspace/moved/two/three"),
    );
    let other = cloud.garage.object(&key(&cloud, "openclaw/workspace/same-size")).unwrap();
    cloud.garage.put_object(&one, &other);
    machine.ok(&["cvm", "storage", "verify"]);
    let deep = machine.exec(&["cvm", "storage", "verify", "--deep"]);
    let said = String::from_utf8_lossy(&deep.stdout).into_owned();
    assert!(!deep.status.success() && said.contains("deep/er/two/three"), "{said}");
    cloud.garage.delete_raw(&two);
    let shallow = machine.exec(&["cvm", "storage", "verify"]);
    let said = String::from_utf8_lossy(&shallow.stdout).into_owned();
    assert!(!shallow.status.success() && said.contains("moved/two/three"), "{said}");
    // A database is read back in any case.
    sqlite_in(&machine, "c.execute('create table t(x)'); c.commit()", "/data/openclaw/workspace/verified.db");
    flush(&machine);
    let database = key(&cloud, "openclaw/workspace/verified.db");
    let mut bytes = cloud.garage.get_raw(&database).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    cloud.garage.put_raw(&database, &bytes);
    let shallow = machine.exec(&["cvm", "storage", "verify"]);
    let said = String::from_utf8_lossy(&shallow.stdout).into_owned();
    assert!(!shallow.status.success() && said.contains("verified.db"), "{said}");
}

/// Lines without owners.
fn anybodys(lines: &[String]) -> Vec<String> {
    let of = |line: &String| {
        let (name, rest) = line.split_once("\" ")?;
        let words: Vec<&str> = rest.split(' ').collect();
        Some(format!("{name} {} {}", words[..2].join(" "), words[3..].join(" ")))
    };
    lines.iter().map(|line| of(line).unwrap_or_else(|| line.clone())).collect()
}

#[test]
fn a_restore_by_a_plain_user_brings_back_everything_but_owners() {
    let cloud = Cloud::new();
    let machine = Fuse.start(&cloud);
    let at = machine.path(WORKSPACE);
    plant(&at);
    fs::remove_file(at.join("mode")).unwrap();
    put(at.join("closed/inside"), "inside");
    fs::set_permissions(at.join("closed/inside"), fs::Permissions::from_mode(0o400)).unwrap();
    fs::set_permissions(at.join("closed"), fs::Permissions::from_mode(0o500)).unwrap();
    put(at.join("borrows"), "rights");
    std::os::unix::fs::chown(at.join("borrows"), Some(7), Some(8)).unwrap();
    fs::set_permissions(at.join("borrows"), fs::Permissions::from_mode(0o6755)).unwrap();
    flush(&machine);
    let home = machine.path("/tmp/plain");
    fs::create_dir(&home).unwrap();
    std::os::unix::fs::chown(&home, Some(1234), Some(1234)).unwrap();
    let user = ["setpriv", "--reuid=1234", "--regid=1234", "--clear-groups"];
    let output = restore_by_hand(&cloud, &machine, &user, "/tmp/plain/state");
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.matches("owners come back when root restores").count(), 1, "{said}");
    let restored = machine.path("/tmp/plain/state/openclaw");
    let borrows = fs::metadata(restored.join("workspace/borrows")).unwrap();
    assert_eq!(borrows.permissions().mode() & 0o7777, 0o755, "nobody's rights are lent but the user's");
    let but_that = |lines: Vec<String>| -> Vec<String> {
        anybodys(&without_volatile(lines)).into_iter().filter(|line| !line.contains("borrows")).collect()
    };
    assert_eq!(difference(&but_that(tree(&machine)), &but_that(digest(&restored, &[]))), "");
}

#[test]
fn the_last_words_of_a_lost_machine_are_read_on_its_successor() {
    let cloud = Cloud::new();
    let machine = Fuse.of(cloud.machine()).environment("CVM_NAME_OF_A_BOOT", "first").start();
    let machine = ready(machine);
    until("its logs are in the bucket", PATIENCE, || {
        let rclone = stock_rclone(&cloud).run(&["lsf", "-R", "crypt:.cvm/boots"]);
        String::from_utf8_lossy(&rclone.stdout).contains("/supervisor").then_some(())
    });
    let first = machine.read("/var/log/openclaw-cvm/supervisor.log");
    let last_of = |log: &str| log.lines().rfind(|l| l.contains("S3 storage configured")).unwrap().to_owned();
    let first = last_of(&first);
    let machine = restored(&cloud, machine, Sync);
    let said = machine.ok(&["cvm", "logs", "--boot", "-1", "-n", "all"]);
    assert!(said.contains(&first), "{first:?} in:\n{said}");
    let own = machine.read("/var/log/openclaw-cvm/supervisor.log");
    assert!(!said.contains(&last_of(&own)), "{said}");
    let boots = machine.ok(&["cvm", "logs", "--boots"]);
    assert!(boots.contains("--boot -1") && boots.contains("without a last word: lost"), "{boots}");
}

#[test]
fn boots_are_told_with_their_ends_however_often_a_worker_dies_and_whatever_the_clock_said() {
    let cloud = Cloud::new();
    let rclone = stock_rclone(&cloud);
    let boots = || {
        let said = rclone.ok(&["lsf", "--dirs-only", "crypt:.cvm/boots"]);
        String::from_utf8_lossy(&said).lines().map(|line| line.trim_end_matches('/').to_owned()).collect()
    };
    let has_logs = |machine: &Machine, count: usize| {
        flush(machine);
        until("its logs are in the bucket", PATIENCE, || {
            let all: Vec<String> = boots();
            (all.len() == count).then_some(())
        });
    };
    let mut machine = ready(Fuse.of(cloud.machine()).start());
    has_logs(&machine, 1);
    for _ in 0..3 {
        let pid = machine.find("cvm-storage").expect("the worker runs").pid;
        machine.ok(&["kill", "-KILL", &pid.to_string()]);
        until("it is another one, with its tree", PATIENCE, || {
            machine.exec(&["cvm", "start", "storage", "--no-wait"]);
            let other = machine.find("cvm-storage").is_some_and(|p| p.pid != pid);
            (other && storage(&machine)["phase"] == "ready").then_some(())
        });
    }
    has_logs(&machine, 1);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    // The clock of the one before was years ahead.
    let first: Vec<String> = boots();
    let ahead = format!("{:015}", first[0].parse::<u64>().unwrap() + 100_000_000_000);
    rclone.ok(&["moveto", &format!("crypt:.cvm/boots/{}", first[0]), &format!("crypt:.cvm/boots/{ahead}")]);

    let mut machine = ready(Fuse.of(cloud.machine()).environment("S3_DRAIN_TIMEOUT", "30").start());
    has_logs(&machine, 2);
    assert!(boots().iter().all(|name| *name >= ahead), "{:?}", boots());
    let said = machine.ok(&["cvm", "logs", "--boots"]);
    assert!(said.contains("stopped, with everything in the bucket"), "{said}");
    let key =
        String::from_utf8_lossy(&rclone.ok(&["cryptdecode", "--reverse", "crypt:", "openclaw/refused"]))
            .split_whitespace()
            .last()
            .map(str::to_owned);
    cloud.proxy.add(Rule::new(Fault::Status(400)).method("PUT").path(&key.expect("its name there")));
    machine.ok(&["sh", "-c", "echo no > /data/openclaw/refused"]);
    assert_eq!(machine.stop(), 75, "{}", machine.output());
    cloud.proxy.heal();
    drop(machine);

    let machine = ready(Fuse.of(cloud.machine()).start());
    has_logs(&machine, 3);
    let said = machine.ok(&["cvm", "logs", "--boots"]);
    let ends: Vec<&str> =
        said.lines().filter_map(|line| line.split_once("stopped, ").map(|(_, end)| end)).collect();
    assert_eq!(ends, ["with 1 files (3 bytes) not in the bucket", "with everything in the bucket"], "{said}");
    let last = machine.ok(&["cvm", "logs", "--boot", "-1", "-n", "all"]);
    assert!(last.contains("Stopping: "), "{last}");
}

#[test]
fn drills_come_by_themselves_and_the_last_one_is_remembered() {
    let cloud = Cloud::new();
    let mut machine = ready(Fuse.of(cloud.machine()).environment("S3_DRILL_INTERVAL", "2").start());
    let drilled = |machine: &Machine| storage(machine)["drill"].clone();
    let one = until("a drill came", PATIENCE, || Some(drilled(&machine)).filter(|drill| !drill.is_null()));
    assert_eq!(one["good"], true, "{one:#}");
    // What it finds wrong is an incident, without anybody having asked.
    put(machine.path(WORKSPACE).join("notes"), "");
    sqlite_in(&machine, "c.execute('create table t(x)'); c.commit()", &format!("{WORKSPACE}/early.sqlite"));
    flush(&machine);
    let database = key(&cloud, "openclaw/workspace/early.sqlite");
    let good = cloud.garage.get_raw(&database).unwrap();
    cloud.garage.put_raw(&database, &good[..good.len() - 1]);
    until("a drill finds it", PATIENCE, || (drilled(&machine)["good"] == false).then_some(()));
    until("it was sent again, and a drill finds it good", PATIENCE, || {
        (drilled(&machine)["good"] == true).then_some(())
    });
    assert_eq!(machine.stop(), 0);
    let machine = ready(machine.again(|builder| builder.environment("S3_DRILL_INTERVAL", "86400")));
    let last = drilled(&machine);
    assert_eq!(last["good"], true, "the next boot knows of it: {last:#}");
}

#[test]
fn temporary_credentials_are_sent_with_every_request() {
    let cloud = Cloud::new();
    let token = "a/session+token=";
    let mut machine = ready(Fuse.of(cloud.machine()).environment("AWS_SESSION_TOKEN", token).start());
    plant(&machine.path(WORKSPACE));
    flush(&machine);
    machine.ok(&["cvm", "storage", "verify"]);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let log = cloud.proxy.log();
    let without: Vec<_> = log.iter().filter(|e| e.session_token.as_deref() != Some(token)).collect();
    assert!(without.is_empty() && log.len() > 20, "{} of {}: {without:#?}", without.len(), log.len());
}
