//! Files that change while they are pushed, and many of them.

use crate::fixtures::files::{WORKSPACE, put};
use crate::fixtures::machines::{restored, tree};
use crate::fixtures::programs::sqlite_in;
use cvm_harness::Mode::{Fuse, Sync};
use cvm_harness::machine::PATIENCE;
use cvm_harness::proxy::Entry;
use cvm_harness::{Cloud, Machine, difference, flush, independent, rounds, storage, until};
use std::fs::{self, File};
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

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
    let machine = cloud.machine().ready();
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
            let there: Vec<_> = (0..last.len())
                .map(|n| cloud.judge().text(&format!("openclaw/workspace/{n}/file")))
                .collect();
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
    let manifest = cloud.judge().key(".cvm/manifest");
    let is_segment = |entry: &&Entry| entry.method == "PUT" && entry.path.contains(&manifest);
    let segments = cloud.proxy.log().iter().filter(is_segment).count();
    assert!(segments <= 20, "{segments} segments for 200 files");
    let said = machine.ok(&["cvm", "storage", "verify", "--deep"]);
    assert!(said.contains("equal"), "{said}");
    assert_eq!(cloud.judge().text("openclaw/workspace/200").as_deref(), Some("199"));
}

#[test]
fn ten_thousand_files_are_pushed_and_restored() {
    let many = rounds(10_000, 100_000);
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
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
    let machine = cloud.machine().ready();
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
