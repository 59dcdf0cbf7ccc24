//! What S3 mode promises when the power goes, or the disk itself is set back: what was said to be in
//! the bucket is there after the next boot, in the tree and in the bucket.
//!
//! `CVM_SOAK=1` cuts the power more often. Moments are chosen by a seed.

use cvm_harness::dice::Dice;
use cvm_harness::sqlite::examine;
use cvm_harness::tools::Rclone;
use cvm_harness::{Cloud, Disk, Machine, flush, storage};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Of `MASTER_KEY`, which all machines here have: see tests/vectors/keys.json.
const PASSWORD: &str = "jrq/5kUcKRy6NqQbM7C5bnpMnrR6+7d/aALQruAzhwk=";
const SALT: &str = "2kBa0tfg6UdY4fDnCeiDgqjrmnPuS/z8j0BDoG0BGvA=";
const USER: u32 = cvm_blueprint::accounts::GATEWAY_ID;
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

/// Machines with many threads on two processors: one story at a time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn judge(cloud: &Cloud) -> Rclone {
    Rclone::new(&cloud.garage.s3().bucket(cloud.garage.bucket()), "openclaw-data", PASSWORD, SALT)
}

/// With this disk as its volume, and a healthy gateway.
fn boot(cloud: &Cloud, disk: &Disk) -> Machine {
    let machine = cloud.machine().unbind("/data").bind(&disk.path(), "/data").start();
    machine.service_in("gateway", &["ready"]);
    machine.ok(&["sh", "-c", &format!("mkdir -p /data/{PLACE}; chown -R {USER}:{USER} /data/openclaw")]);
    machine
}

fn logs(machine: &Machine) -> String {
    format!("{}\n{}", machine.output(), machine.read("/var/log/openclaw-cvm/storage.log"))
}

/// Programs of the gateway's user that go on until their machine ends.
struct Running(Child);

impl Running {
    fn start(machine: &Machine, words: &[&str]) -> Self {
        let id = USER.to_string();
        let me = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--"];
        let mut command = machine.command(&[&me[..], words].concat());
        Self(command.stdout(Stdio::null()).spawn().expect("nsenter runs"))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
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

    fn in_bucket(rclone: &Rclone) -> Self {
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
    let _turn = turn();
    let cloud = Cloud::new();
    let rclone = judge(&cloud);
    let mut dice = Dice(0xdead_0000_0000_0001);
    let mut disk = Disk::new(&[]);
    let cuts = if std::env::var_os("CVM_SOAK").is_some() { 40 } else { 3 };
    for cut in 0..cuts {
        let mut machine = boot(&cloud, &disk);
        // Of many changes at once the whole file system is written out: each kind has its turn alone too.
        let mut writers = Vec::new();
        if cut % 3 != 0 {
            writers.push(Running::start(&machine, &["sh", "-c", FILES]));
        }
        for (index, (name, mode)) in DATABASES.iter().enumerate().filter(|_| cut % 3 != 1) {
            let (db, every) = (format!("/data/{PLACE}/{name}"), (20 + index * 30).to_string());
            writers.push(Running::start(&machine, &["cvm-victim", "rows", &db, mode, &every, "/dev/null"]));
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
