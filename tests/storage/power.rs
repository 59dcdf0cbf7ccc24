//! The power goes, or the disk itself is set back: what was said to be in the bucket is there after the next boot,
//! in the tree and in the bucket.
//!
//! `CVM_SOAK=1` cuts the power more often. Moments are chosen by a seed.

use crate::fixtures::TURNS;
use crate::fixtures::machines::{give_to_gateway, incidents, logs};
use crate::fixtures::programs::Running;
use cvm_harness::machine::PATIENCE;
use cvm_harness::sqlite::examine;
use cvm_harness::{Cloud, Dice, Disk, Judge, Machine, flush, rounds, storage, until};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::Duration;

const PLACE: &str = "openclaw/x";

/// One row every few milliseconds, as the gateway's databases have it.
const WAL: &str = "wal; PRAGMA synchronous = normal";

/// Files that are replaced, appended to, made and moved, without a word to the kernel about the disk.
/// What `same` says was done before it said so.
const FILES: &str = "cd /data/openclaw/x; mkdir -p done; n=$(cat same 2>/dev/null || echo 0)
while :; do
    n=$((n + 1)); echo \"this is $n\" >$n; echo $n >>log
    [ ! -e $((n - 1)) ] || mv $((n - 1)) done/
    echo $n >part; mv part same; sleep 0.3
done";

/// With this disk as its volume, and a healthy gateway.
fn boot(cloud: &Cloud, disk: &Disk) -> Machine {
    let machine = cloud.machine().unbind("/data").bind(&disk.path(), "/data").ready();
    give_to_gateway(&machine, &format!("/data/{PLACE}"));
    machine
}

/// Everything that the tree of a machine, or its bucket, has of what is written here.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct State {
    /// How many rows, for each database.
    rows: Vec<i64>,
    same: i64,
    lines: BTreeSet<i64>,
    files: BTreeSet<i64>,
}

const DATABASES: [(&str, &str); 2] = [("wal", WAL), ("delete", "delete")];

impl State {
    fn number(bytes: &[u8]) -> i64 {
        String::from_utf8_lossy(bytes).trim().parse().unwrap_or(0)
    }

    /// In a database that is whole, which may just have been begun.
    fn rows_in(file: &Path) -> i64 {
        match examine(file) {
            Ok(rows) => rows,
            Err(why) if why.ends_with("no such table: t") => 0,
            Err(why) => panic!("{why}"),
        }
    }

    /// Of all but the databases. What is torn is not there.
    fn of(at: &Path, rows: Vec<i64>) -> Self {
        let read = |name: &str| fs::read(at.join(name)).unwrap_or_default();
        let mut files = BTreeSet::new();
        for dir in [at.to_owned(), at.join("done")] {
            for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
                let text = fs::read_to_string(entry.path()).unwrap_or_default();
                if text == format!("this is {}\n", entry.file_name().display()) {
                    files.extend(entry.file_name().to_string_lossy().parse::<i64>());
                }
            }
        }
        let log = read("log");
        let lines = String::from_utf8_lossy(&log).lines().filter_map(|line| line.parse().ok()).collect();
        Self { rows, same: Self::number(&read("same")), lines, files }
    }

    fn in_tree(machine: &Machine) -> Self {
        let rows = DATABASES.map(|(name, _)| {
            let file = Path::new("/data").join(PLACE).join(name);
            machine.inside(|| if file.exists() { Self::rows_in(&file) } else { 0 })
        });
        Self::of(&machine.path(&format!("/data/{PLACE}")), rows.into())
    }

    fn in_bucket(rclone: &Judge<'_>) -> Self {
        let scratch = tempfile::tempdir().expect("a temporary directory");
        let to = scratch.path().join("all");
        rclone.ok(&["copy", &format!("crypt:{PLACE}"), &to.display().to_string()]);
        let rows = DATABASES.map(|(name, _)| {
            let file = to.join(name);
            if file.exists() { Self::rows_in(&file) } else { 0 }
        });
        Self::of(&to, rows.into())
    }

    /// What of `before` is not there.
    fn lacks(&self, before: &Self) -> Vec<String> {
        let mut lacks = Vec::new();
        for ((name, _), (now, then)) in DATABASES.iter().zip(self.rows.iter().zip(&before.rows)) {
            if now < then {
                lacks.push(format!("{name} has {now} rows of {then}"));
            }
        }
        if self.same < before.same {
            lacks.push(format!("the replaced file says {} and said {}", self.same, before.same));
        }
        let missing = |now: &BTreeSet<i64>, then: &BTreeSet<i64>, what: &str| {
            let gone: Vec<_> = then.difference(now).collect();
            (!gone.is_empty()).then(|| format!("{what} {gone:?} are missing"))
        };
        lacks.extend(missing(&self.lines, &before.lines, "lines"));
        lacks.extend(missing(&self.files, &before.files, "files"));
        lacks
    }
}

#[test]
fn what_is_in_the_bucket_is_there_after_the_power_went_at_any_moment() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let rclone = cloud.judge();
    let mut dice = Dice(0xdead_0000_0000_0001);
    let mut disk = Disk::new(&[]);
    let cuts = rounds(3, 40);
    for cut in 0..cuts {
        let mut machine = boot(&cloud, &disk);
        // Of many changes at once the whole file system is written out: each kind has its turn alone too.
        let mut writers = Vec::new();
        if cut % 3 != 0 {
            writers.push(Running::as_agent(&machine, &["sh", "-c", FILES]));
        }
        for (index, (name, mode)) in DATABASES.iter().enumerate().filter(|_| cut % 3 != 1) {
            let (db, every) = (format!("/data/{PLACE}/{name}"), (20 + index * 30).to_string());
            writers
                .push(Running::as_agent(&machine, &["cvm-victim", "rows", &db, mode, &every, "/dev/null"]));
        }
        dice.pause(Duration::from_millis(1500));
        let mut told = State::default();
        for _ in 0..2 {
            let before = State::in_tree(&machine);
            flush(&machine);
            told = before;
            dice.pause(Duration::from_millis(900));
        }
        machine.freeze();
        let after = disk.cut();
        // Process 1 does not end before those who came from outside are reaped, out there.
        drop(writers);
        machine.destroy();
        drop(machine);
        let at_the_cut = State::in_bucket(&rclone);
        assert_eq!(
            at_the_cut.lacks(&told),
            Vec::<String>::new(),
            "cut {cut}: a flush means it is in the bucket"
        );
        disk = after;
        let machine = boot(&cloud, &disk);
        for before in [&told, &at_the_cut] {
            let lacks = State::in_tree(&machine).lacks(before);
            assert_eq!(lacks, Vec::<String>::new(), "cut {cut}, in the tree:\n{}", logs(&machine));
        }
        flush(&machine);
        let lacks = State::in_bucket(&rclone).lacks(&at_the_cut);
        assert_eq!(lacks, Vec::<String>::new(), "cut {cut}, in the bucket:\n{}", logs(&machine));
        let incidents = &storage(&machine)["incidents"];
        assert_eq!(incidents.as_array().map(Vec::len), Some(0), "{incidents:#}");
    }
}

const MAKE: &str = "PRAGMA journal_mode = wal; PRAGMA synchronous = normal; PRAGMA wal_autocheckpoint = 0;
    CREATE TABLE IF NOT EXISTS t (x)";

const HUNDRED: &str = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 100) INSERT INTO t SELECT x FROM n";

/// Without a write to it: nobody else may have it open.
fn count(file: &Path) -> i64 {
    let db = rusqlite::Connection::open(file).expect("it opens");
    db.set_db_config(rusqlite::config::DbConfig::SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, true)
        .expect("it can be set");
    db.query_row("SELECT count(*) FROM t", [], |row| row.get(0)).unwrap_or(0)
}

/// Commits a hundred rows, and keeps the database open.
fn hundred_rows(machine: &Machine, name: &str, before: i64) -> Running {
    let sql = format!("{MAKE}; {HUNDRED}");
    let running = Running::as_agent(machine, &["cvm-victim", "sql", &format!("/data/{PLACE}/{name}"), &sql]);
    let file = Path::new("/data").join(PLACE).join(name);
    until("they are committed", PATIENCE, || {
        let rows = machine.inside(|| if file.exists() { count(&file) } else { 0 });
        (rows == before + 100).then_some(())
    });
    running
}

#[test]
fn what_a_disk_gives_back_older_than_the_bucket_is_set_aside_and_not_pushed() {
    const LONG_AGO: i64 = 1_700_000_000;
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let rclone = cloud.judge();
    let disk = Disk::new(&[]);
    let machine = boot(&cloud, &disk);
    let mut writers = vec![hundred_rows(&machine, "database", 0)];
    machine.ok(&["sh", "-c", &format!("cd /data/{PLACE}; mkdir d; echo old >plain; echo old >moved-on")]);
    flush(&machine);
    machine.freeze();
    let early = disk.cut();
    let mut machine = machine;
    drop(writers);
    machine.destroy();
    drop(machine);
    let machine = boot(&cloud, &early);
    let old = tempfile::tempdir().expect("a temporary directory");
    let upper = |disk: &Disk| disk.path().join(".cvm/storage/upper").join(PLACE);
    for name in ["database", "database-wal"] {
        fs::copy(upper(&early).join(name), old.path().join(name)).expect("it is there");
    }
    writers = vec![hundred_rows(&machine, "database", 100)];
    machine.ok(&[
        "sh",
        "-c",
        &format!("cd /data/{PLACE}; echo new >plain; echo new >moved-on; echo new >d/made"),
    ]);
    flush(&machine);
    // Of a database whose file has just changed, the log is remembered only after another look.
    std::thread::sleep(Duration::from_millis(200));
    flush(&machine);
    machine.freeze();
    let late = early.cut();
    let mut machine = machine;
    drop(writers);
    machine.destroy();
    drop(machine);
    for name in ["database", "database-wal"] {
        fs::write(upper(&late).join(name), fs::read(old.path().join(name)).expect("ours")).expect("room");
    }
    fs::write(upper(&late).join("plain"), "old\n").expect("room");
    fs::remove_file(upper(&late).join("d/made")).expect("it is there");
    // This one is newer than what the bucket has, by its time.
    fs::write(upper(&late).join("moved-on"), "newer\n").expect("room");
    let below = |name: &str| Path::new(".cvm/storage/upper").join(PLACE).join(name);
    for name in ["database", "plain", "d"] {
        late.set_times(&below(name), LONG_AGO);
    }
    let mut machine = boot(&cloud, &late);
    let at = machine.path(&format!("/data/{PLACE}"));
    let read = |at: &Path, name: &str| fs::read_to_string(at.join(name)).unwrap_or_default();
    let of_tree = || [read(&at, "plain"), read(&at, "d/made"), read(&at, "moved-on")];
    assert_eq!(of_tree(), ["new\n", "new\n", "newer\n"], "{}", logs(&machine));
    assert_eq!(machine.inside(|| count(&Path::new("/data").join(PLACE).join("database"))), 200);
    let named = ["d/made", "database", "plain"].map(|name| format!("{PLACE}/{name}"));
    assert_eq!(incidents(&machine), named);
    let aside = fs::read_dir(late.path().join(".cvm/storage/aside")).expect("it is there").flatten().next();
    let aside = aside.expect("nothing is deleted").path().join(PLACE);
    assert_eq!((read(&aside, "plain"), count(&aside.join("database"))), ("old\n".to_owned(), 100));
    let in_bucket = |name: &str| rclone.ok(&["cat", &format!("crypt:{PLACE}/{name}")]);
    let of_bucket =
        || ["plain", "d/made", "moved-on"].map(|name| String::from_utf8_lossy(&in_bucket(name)).into_owned());
    flush(&machine);
    assert_eq!(of_bucket(), of_tree());
    fs::write(old.path().join("copy"), in_bucket("database")).expect("room");
    assert_eq!(count(&old.path().join("copy")), 200);
    // Until an operator has looked; what is set aside stays.
    assert_eq!(incidents(&machine), named);
    for path in &named {
        machine.ok(&["cvm", "storage", "keep", "--yes", path]);
    }
    flush(&machine);
    assert_eq!(incidents(&machine), Vec::<String>::new());
    assert_eq!(read(&aside, "plain"), "old\n");
    // After an ordered stop, who puts an older file there means it.
    assert_eq!(machine.stop(), 0, "{}", logs(&machine));
    drop(machine);
    fs::write(upper(&late).join("plain"), "old\n").expect("room");
    late.set_times(&below("plain"), LONG_AGO);
    let machine = boot(&cloud, &late);
    flush(&machine);
    assert_eq!(String::from_utf8_lossy(&in_bucket("plain")), "old\n");
    assert_eq!(incidents(&machine), Vec::<String>::new());
}
