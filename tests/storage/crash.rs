//! What S3 mode promises when something ends before its time: a transaction, a machine, the worker,
//! its stand-in, the network, or the patience of whoever stops it.
//!
//! `CVM_SOAK=1` makes more rounds of what is random here. Moments are chosen by a seed.

use cvm_harness::chat::{MODEL_PORT, local_model};
use cvm_harness::dice::Dice;
use cvm_harness::machine::PATIENCE;
use cvm_harness::sqlite::examine_bytes;
use cvm_harness::tools::Rclone;
use cvm_harness::versioned::version_of;
use cvm_harness::{
    Builder, Chat, Cloud, Fault, Machine, Rule, Said, difference, digest, flush, independent,
    restore_by_hand, storage, until,
};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Of `MASTER_KEY`, which all machines here have: see tests/vectors/keys.json.
const PASSWORD: &str = "jrq/5kUcKRy6NqQbM7C5bnpMnrR6+7d/aALQruAzhwk=";
const SALT: &str = "2kBa0tfg6UdY4fDnCeiDgqjrmnPuS/z8j0BDoG0BGvA=";
const TOKEN: &str = "zAFTUuSdbC5aQssqJbETwS5oEdhBGc5O";
const DEVICE: &str = "b82578d246fd5ff53bb0eb91da774cb27faa3612290a5966f36e4c2b61af1ea3";
const USER: u32 = cvm_protocol::accounts::GATEWAY_ID;
/// For what takes many round trips on a machine that does much else.
const LONG: Duration = Duration::from_secs(120);

/// Two processors, and machines with many threads: one story at a time.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn soak() -> bool {
    std::env::var_os("CVM_SOAK").is_some()
}

fn judge(cloud: &Cloud) -> Rclone {
    Rclone::new(&cloud.garage.s3().bucket(cloud.garage.bucket()), "openclaw-data", PASSWORD, SALT)
}

/// Taken over soon when it is lost.
fn hasty(cloud: &Cloud) -> Builder {
    cloud.machine().environment("S3_HEARTBEAT", "1")
}

/// All that the gateway has; what else is in /data comes with this host's home directory.
fn state(machine: &Machine) -> Vec<String> {
    digest(&machine.path("/data/openclaw"), &[])
}

fn no_incidents(machine: &Machine) {
    let incidents = &storage(machine)["incidents"];
    assert_eq!(incidents.as_array().map(Vec::len), Some(0), "{incidents:#}\n{}", logs(machine));
}

fn logs(machine: &Machine) -> String {
    format!("{}\n{}", machine.output(), machine.read("/var/log/openclaw-cvm/storage.log"))
}

fn now_us() -> i64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| t.tv_sec() * 1_000_000 + t.tv_nsec() / 1000)
}

/// A program inside that goes on until it is dropped or its machine ends.
struct Running(Child);

impl Running {
    fn start(machine: &Machine, words: &[&str]) -> Self {
        let mut command = machine.command(words);
        command.stdout(Stdio::piped());
        Self(command.spawn().expect("nsenter runs"))
    }

    fn as_gateway(machine: &Machine, words: &[&str]) -> Self {
        let id = USER.to_string();
        let me = ["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups", "--"];
        Self::start(machine, &[&me[..], words].concat())
    }

    #[track_caller]
    fn says(&mut self, word: &str) {
        let mut line = String::new();
        let out = self.0.stdout.take().expect("it is piped");
        BufReader::new(out).read_line(&mut line).expect("it writes text");
        assert_eq!(line.trim(), word);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // nsenter forks into the machine, and what it started there does not die of its death.
        let me = self.0.id().to_string();
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
            let parent = stat.rsplit_once(") ").and_then(|(_, rest)| rest.split(' ').nth(1));
            if parent == Some(&me)
                && let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok())
            {
                let pid = nix::unistd::Pid::from_raw(pid);
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The last row that was committed before now, as its writers noted it.
fn committed(log: &Path, before: i64) -> i64 {
    entries(log)
        .iter()
        .filter(|(at, words)| *at < before && words[0] == "end")
        .map(|(_, w)| number(&w[1]))
        .max()
        .unwrap_or(0)
}

fn number(text: &str) -> i64 {
    text.parse().expect("a number")
}

fn entries(log: &Path) -> Vec<(i64, Vec<String>)> {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines()
        .map(|line| {
            let mut words = line.split(' ').map(str::to_owned);
            (number(&words.next().unwrap_or_default()), words.collect())
        })
        .collect()
}

#[track_caller]
fn in_the_bucket(rclone: &Rclone, path: &str) -> i64 {
    examine_bytes(&rclone.ok(&["cat", &format!("crypt:{path}")]))
        .unwrap_or_else(|why| panic!("{path}: {why}"))
}

fn names(rclone: &Rclone) -> BTreeSet<String> {
    let listed = rclone.ok(&["lsf", "-R", "--files-only", "crypt:"]);
    String::from_utf8_lossy(&listed).lines().map(str::to_owned).collect()
}

fn own(machine: &Machine, path: &str) {
    machine.ok(&["sh", "-c", &format!("mkdir -p '{path}' && chown -R {USER}:{USER} /data/openclaw")]);
}

#[test]
fn every_database_in_the_bucket_opens_at_any_moment_and_has_what_was_flushed() {
    let _turn = turn();
    let cloud = Cloud::new();
    let outside = tempfile::tempdir().expect("a temporary directory");
    fs::set_permissions(outside.path(), std::os::unix::fs::PermissionsExt::from_mode(0o777))
        .expect("it is ours");
    let machine = cloud.machine().bind(outside.path(), "/outside").start();
    machine.service_in("gateway", &["ready"]);
    own(&machine, "/data/openclaw/agents/deep/er");
    let modes = ["wal", "delete", "truncate", "persist"];
    let place = |mode: &str| format!("openclaw/agents/deep/er/{mode} base.bin");
    let mut writers = Vec::new();
    for (index, mode) in modes.iter().chain(&modes[..2]).enumerate() {
        let (db, log) = (format!("/data/{}", place(mode)), format!("/outside/{mode}"));
        let every = (50 + index * 10).to_string();
        writers.push(Running::as_gateway(&machine, &["cvm-victim", "rows", &db, mode, &every, &log]));
    }
    let log = |mode: &str| outside.path().join(mode);
    until("all of them write", PATIENCE, || {
        modes.iter().all(|mode| committed(&log(mode), i64::MAX) > 3).then_some(())
    });
    let rclone = judge(&cloud);
    flush(&machine);
    for _ in 0..if soak() { 60 } else { 4 } {
        let before = now_us();
        flush(&machine);
        for mode in modes {
            let (rows, promised) = (in_the_bucket(&rclone, &place(mode)), committed(&log(mode), before));
            assert!(rows >= promised, "{mode}: {rows} rows, {promised} were committed before the flush");
        }
        // And while nobody asks.
        let got = machine.exec(&["cvm", "storage", "get", &place("wal")]);
        assert!(got.status.success(), "{}", String::from_utf8_lossy(&got.stderr));
        examine_bytes(&got.stdout).expect("what is fetched is whole");
        for mode in modes {
            in_the_bucket(&rclone, &place(mode));
        }
    }
    let listed = names(&rclone);
    let logs_of_databases: Vec<_> =
        listed.iter().filter(|n| ["-wal", "-shm", "-journal"].iter().any(|s| n.ends_with(s))).collect();
    assert_eq!(logs_of_databases, Vec::<&String>::new());
    for entry in fs::read_dir(machine.path("/data/openclaw/agents/deep/er")).expect("it is there").flatten() {
        if let Ok(stat) = entry.metadata() {
            assert_eq!(stat.uid(), USER, "{} belongs to somebody else", entry.path().display());
        }
    }
    for mode in modes {
        let all = entries(&log(mode));
        let slowest = all.iter().filter(|(_, w)| w[0] == "end").map(|(_, w)| number(&w[2])).max();
        eprintln!(
            "{mode}: {} rows, the slowest commit took {} ms",
            committed(&log(mode), i64::MAX),
            slowest.unwrap_or(0) / 1000
        );
        assert!(all.iter().all(|(_, w)| w[0] != "error"), "{mode}: a writer was kept out for 20 s");
    }
    no_incidents(&machine);
}

/// A flush says so, and why.
#[track_caller]
fn not_all_there(machine: &Machine, why: &[&str]) {
    let told = machine.exec(&["cvm", "storage", "flush"]);
    let words = String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned();
    assert_eq!(told.status.code(), Some(1), "{words}");
    assert!(why.iter().all(|why| words.contains(why)), "{words}");
}

const MAKE: &str = "CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, w TEXT, sum INTEGER)";
const ROW: &str = "INSERT INTO t VALUES ((SELECT coalesce(max(n), 0) + 1 FROM t), 'x', 5)";

/// Where the gateway may make them, and who looks at them in the bucket.
fn machine_for_databases(cloud: &Cloud) -> (Machine, Rclone) {
    let machine = cloud.machine().start();
    machine.service_in("gateway", &["ready"]);
    own(&machine, "/data/openclaw/x");
    (machine, judge(cloud))
}

fn place(name: &str) -> String {
    format!("/data/openclaw/x/{name}")
}

/// In a database of the bucket that is whole.
fn rows(rclone: &Rclone, name: &str) -> i64 {
    let bytes = rclone.ok(&["cat", &format!("crypt:openclaw/x/{name}")]);
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), bytes).expect("it has room");
    let db = rusqlite::Connection::open(file.path()).expect("it opens");
    let check = db.query_row("PRAGMA integrity_check", [], |r| r.get::<_, String>(0));
    assert_eq!(check.as_deref(), Ok("ok"));
    db.query_row("SELECT count(*) FROM t", [], |r| r.get(0)).expect("the table is there")
}

#[test]
fn what_can_happen_to_a_database_happens_in_the_bucket_too() {
    let _turn = turn();
    let cloud = Cloud::new();
    let (machine, rclone) = machine_for_databases(&cloud);
    let (make, row) = (MAKE, ROW);
    let rows = |name: &str| rows(&rclone, name);
    // Written once, never checkpointed, never closed; and one whose transaction stays open.
    let quiet = format!("PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0; {make}; {row}; {row};");
    let mut held = Running::as_gateway(&machine, &["cvm-victim", "sql", &place("quiet"), &quiet]);
    held.says("done");
    let mut open = Running::as_gateway(
        &machine,
        &[
            "cvm-victim",
            "sql",
            &place("open"),
            &format!("PRAGMA journal_mode=wal; {make}; {row}; BEGIN; {row};"),
        ],
    );
    open.says("done");
    let look = |name: &str| {
        let m = fs::metadata(machine.path(&place(name))).expect("it is there");
        (m.len(), m.mtime(), m.mtime_nsec())
    };
    let before = (look("quiet"), look("quiet-wal"));
    flush(&machine);
    flush(&machine);
    assert_eq!((rows("quiet"), rows("open")), (2, 1));
    assert_eq!((look("quiet"), look("quiet-wal")), before, "a snapshot must not write a writer's log back");

    // Locked: everything else goes on, and it is pushed when it is free again.
    let exclusive = format!("{make}; {row}; PRAGMA locking_mode=EXCLUSIVE; BEGIN EXCLUSIVE; {row};");
    let mut locked = Running::as_gateway(&machine, &["cvm-victim", "sql", &place("locked"), &exclusive]);
    locked.says("done");
    machine.ok(&["sh", "-c", "echo goes on > /data/openclaw/x/beside"]);
    until("a file goes up beside a locked database", PATIENCE, || {
        names(&rclone).contains("openclaw/x/beside").then_some(())
    });
    machine.ok(&["rm", "/data/openclaw/x/beside"]);
    until("and goes", PATIENCE, || (!names(&rclone).contains("openclaw/x/beside")).then_some(()));
    not_all_there(&machine, &["openclaw/x/locked"]);
    // Longer than between any two tries.
    until("its age is that of its change", PATIENCE, || {
        storage(&machine)["oldest_unreplicated_ms"].as_u64().filter(|ms| *ms > 12_500).map(drop)
    });
    drop(locked);
    until("it is pushed when it is free", PATIENCE, || {
        names(&rclone).contains("openclaw/x/locked").then_some(())
    });
    flush(&machine);
    assert_eq!(rows("locked"), 1);

    // Replaced by another one.
    let replace = format!("cp {0} {1}.new && mv {1}.new {1}", place("locked"), place("replaced"));
    machine.ok(&["sh", "-c", &replace]);
    flush(&machine);
    assert_eq!(rows("replaced"), 1);

    // Damaged in place, in its middle and at its head; repaired; deleted.
    for (name, from) in [("locked", "4096"), ("replaced", "0")] {
        let good = fs::read(machine.path(&place(name))).expect("it is there");
        machine.ok(&[
            "sh",
            "-c",
            &format!(
                "yes bad | head -c 4096 | dd of={} bs=1 seek={from} conv=notrunc status=none",
                place(name)
            ),
        ]);
        until("it is an incident", PATIENCE, || {
            let all = storage(&machine)["incidents"].as_array().cloned().unwrap_or_default();
            all.iter().any(|i| i["path"] == format!("openclaw/x/{name}")).then_some(())
        });
        machine.ok(&["sh", "-c", "echo more > /data/elsewhere"]);
        not_all_there(&machine, &[name, "damaged"]);
        assert_eq!(storage(&machine)["incidents"].as_array().map(Vec::len), Some(1), "{}", logs(&machine));
        assert_eq!(rows(name), 1, "the bucket keeps the last good one");
        fs::write(machine.path(&place(name)), good).expect("it can be repaired");
        until("the incident is over", PATIENCE, || {
            (storage(&machine)["incidents"].as_array().map(Vec::len) == Some(0)).then_some(())
        });
    }
    // What is no database takes the name of one.
    machine.ok(&["sh", "-ec", &format!("echo text > {0}.new; mv {0}.new {0}", place("locked"))]);
    flush(&machine);
    assert_eq!(rclone.ok(&["cat", "crypt:openclaw/x/locked"]), b"text\n");
    machine.ok(&["rm", &place("replaced")]);
    until("it is gone", PATIENCE, || (!names(&rclone).contains("openclaw/x/replaced")).then_some(()));
}

#[test]
fn a_database_that_is_exchanged_or_only_begun_is_never_half_in_the_bucket() {
    let _turn = turn();
    let cloud = Cloud::new();
    let (machine, rclone) = machine_for_databases(&cloud);
    let (make, row) = (MAKE, ROW);
    let rows = |name: &str| rows(&rclone, name);
    let first = format!("PRAGMA journal_mode=wal; PRAGMA wal_autocheckpoint=0; {make}; {row};");
    let mut before = Running::as_gateway(&machine, &["cvm-victim", "sql", &place("exchanged"), &first]);
    before.says("done");
    flush(&machine);
    assert_eq!(rows("exchanged"), 1);
    let other = format!("{make}; {row}; {row}; {row};");
    Running::as_gateway(&machine, &["cvm-victim", "sql", &place("other"), &other]).says("done");
    machine.ok(&["mv", &place("other"), &place("exchanged")]);
    drop(before);
    machine.ok(&["rm", "-f", &place("exchanged-wal"), &place("exchanged-shm")]);
    flush(&machine);
    assert_eq!(rows("exchanged"), 3);
    assert!(!names(&rclone).contains("openclaw/x/other"));

    // Being created, by somebody who takes his time: all there is of it is in its journal.
    let slowly = format!("PRAGMA journal_mode=delete; PRAGMA cache_size=1; BEGIN IMMEDIATE; {make}; {row};");
    let mut creating = Running::as_gateway(&machine, &["cvm-victim", "sql", &place("slow"), &slowly]);
    creating.says("done");
    assert!(machine.path(&place("slow-journal")).exists(), "it is in the middle of it");
    machine.ok(&["sh", "-c", "echo goes on > /data/openclaw/x/beside"]);
    until("a file goes up beside it", PATIENCE, || {
        names(&rclone).contains("openclaw/x/beside").then_some(())
    });
    let of_it: Vec<String> = names(&rclone).into_iter().filter(|name| name.contains("/slow")).collect();
    for name in of_it {
        assert_eq!(name, "openclaw/x/slow");
        assert_eq!(rclone.ok(&["cat", &format!("crypt:{name}")]), b"", "nothing is committed yet");
    }
    drop(creating);
    let done = format!("{make}; {row};");
    Running::as_gateway(&machine, &["cvm-victim", "sql", &place("slow"), &done]).says("done");
    flush(&machine);
    assert_eq!(rows("slow"), 1);
}

// === Machines that are lost ===

/// Every state that a path had, in order, and when each was certain. -1 is nothing.
#[derive(Default)]
struct History(Vec<(Option<i64>, i64)>);

/// One file under all names that it had, with all versions, until it was removed.
struct Life {
    made: Option<i64>,
    names: BTreeSet<String>,
    versions: BTreeSet<i64>,
}

/// What a load has noted.
#[derive(Default)]
struct Oracle {
    paths: BTreeMap<String, History>,
    files: Vec<Life>,
}

impl Oracle {
    fn read(log: &Path) -> Self {
        let all = entries(log);
        let ends: BTreeMap<&str, i64> =
            all.iter().filter(|(_, w)| w[0] == "end").map(|(at, w)| (w[1].as_str(), *at)).collect();
        let mut this = Self::default();
        let mut now: BTreeMap<String, (i64, Life)> = BTreeMap::new();
        for (_, words) in &all {
            let end = words.get(1).and_then(|id| ends.get(id.as_str()).copied());
            match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
                ["is", _, path, version] => {
                    let version = number(version);
                    this.becomes(path, end, version);
                    let new =
                        || (version, Life { made: end, names: BTreeSet::new(), versions: BTreeSet::new() });
                    let (current, life) = now.entry((*path).to_owned()).or_insert_with(new);
                    *current = version;
                    life.names.insert((*path).to_owned());
                    life.versions.insert(version);
                }
                ["gone", _, path] => {
                    this.becomes(path, end, -1);
                    now.remove(*path);
                }
                ["moved", _, old, new] => {
                    let (version, mut life) = now.remove(*old).expect("what is moved was there");
                    this.becomes(new, end, version);
                    this.becomes(old, end, -1);
                    life.names.insert((*new).to_owned());
                    now.insert((*new).to_owned(), (version, life));
                }
                _ => {}
            }
        }
        this.files = now.into_values().map(|(_, life)| life).collect();
        this
    }

    fn becomes(&mut self, path: &str, when: Option<i64>, version: i64) {
        self.paths.entry(path.to_owned()).or_default().0.push((when, version));
    }

    /// What is wrong with a directory in which everything certain before `flushed` must be.
    fn compare(&self, dir: &Path, flushed: i64) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut found = BTreeMap::new();
        for (path, history) in &self.paths {
            let may_be = history.may_be(flushed);
            match version_of(&dir.join(path)) {
                Ok(version) => {
                    if !may_be.contains(&version) {
                        wrong.push(format!("{path} is {version} and may be {may_be:?}"));
                    }
                    found.insert(path, version);
                }
                Err(why) => wrong.push(why),
            }
        }
        // A file that was moved may be under both names, and never under none.
        for file in self.files.iter().filter(|file| file.made.is_some_and(|at| at < flushed)) {
            let somewhere = file
                .names
                .iter()
                .any(|name| found.get(name).is_some_and(|version| file.versions.contains(version)));
            if !somewhere {
                wrong.push(format!("one file is under none of its names: {:?}", file.names));
            }
        }
        wrong
    }
}

impl History {
    /// The last state that was certain by then, and any later one.
    fn may_be(&self, flushed: i64) -> BTreeSet<i64> {
        let certain = self.0.iter().rposition(|(end, _)| end.is_some_and(|at| at < flushed));
        let later = self.0.iter().skip(certain.unwrap_or(0)).map(|(_, version)| *version);
        later.chain(certain.is_none().then_some(-1)).collect()
    }
}

/// A load in a machine, and what it notes outside of it.
struct Load {
    life: usize,
    programs: Vec<Running>,
}

impl Load {
    const BASES: [&str; 2] = ["wal", "delete"];

    fn start(machine: &Machine, life: usize, seed: u64) -> Self {
        let (dir, log, seed) = (
            format!("/data/openclaw/workspace/load/{life}"),
            format!("/outside/{life}-files"),
            seed.to_string(),
        );
        let mut programs = vec![Running::start(machine, &["cvm-victim", "load", &dir, &log, &seed])];
        for (index, mode) in Self::BASES.iter().enumerate() {
            let (db, log) =
                (format!("/data/openclaw/agents/{mode}/agent/a.sqlite"), format!("/outside/{life}-{mode}"));
            let every = (50 + 50 * index).to_string();
            programs.push(Running::start(machine, &["cvm-victim", "rows", &db, mode, &every, &log]));
        }
        Self { life, programs }
    }

    /// What is wrong with what came back, given that all was said to be there of `flushed`; yields
    /// the age in milliseconds of the oldest transaction that is missing, for each database.
    fn compare(&self, machine: &Machine, outside: &Path, flushed: i64, lost: i64) -> Vec<i64> {
        let dir = machine.path(&format!("/data/openclaw/workspace/load/{}", self.life));
        let wrong = Oracle::read(&outside.join(format!("{}-files", self.life))).compare(&dir, flushed);
        assert!(wrong.is_empty(), "life {}, flushed at {flushed}: {wrong:#?}\n{}", self.life, logs(machine));
        Self::BASES
            .iter()
            .map(|mode| {
                let log = outside.join(format!("{}-{mode}", self.life));
                let db = machine.path(&format!("/data/openclaw/agents/{mode}/agent/a.sqlite"));
                // Lost before it was first pushed.
                // SQLite would resolve the link to the machine's root; nobody writes to it yet, so its
                // bytes are all of it.
                let rows = fs::read(&db).map_or(Ok(0), |bytes| examine_bytes(&bytes));
                let rows = rows.unwrap_or_else(|why| panic!("{why}\n{}", logs(machine)));
                let promised = committed(&log, flushed);
                assert!(rows >= promised, "{mode}: {rows} rows of {promised} that were flushed");
                let missing = entries(&log).into_iter().find(|(_, w)| w[0] == "end" && number(&w[1]) > rows);
                missing.map_or(0, |(at, _)| (lost - at).max(0) / 1000)
            })
            .collect()
    }
}

/// What the worker has called in the bucket before the machine is lost: its word, not a span of time.
struct Told {
    /// All that ended before then.
    certain: i64,
    generation: u64,
    /// Rows of each database.
    rows: Vec<i64>,
}

impl Told {
    fn now(machine: &Machine, certain: i64) -> Self {
        let status = storage(machine);
        assert_eq!(status["phase"], "ready", "{status:#}");
        let generation = status["generation"].as_u64().expect("a number");
        let rows = Load::BASES.iter().map(|mode| {
            let got =
                machine.exec(&["cvm", "storage", "get", &format!("openclaw/agents/{mode}/agent/a.sqlite")]);
            // It may not have been pushed yet.
            let got = got.status.success().then_some(got.stdout);
            got.map_or(0, |bytes| examine_bytes(&bytes).unwrap_or_else(|why| panic!("{mode}: {why}")))
        });
        Self { certain, generation, rows: rows.collect() }
    }

    /// The next machine has it all.
    fn holds(&self, machine: &Machine) {
        let generation = storage(machine)["generation"].as_u64().expect("a number");
        assert!(generation >= self.generation, "generation {generation} of {}", self.generation);
        for (mode, told) in Load::BASES.iter().zip(&self.rows) {
            let db = machine.path(&format!("/data/openclaw/agents/{mode}/agent/a.sqlite"));
            let rows = fs::read(&db).map_or(Ok(0), |bytes| examine_bytes(&bytes));
            assert!(rows.as_ref().is_ok_and(|rows| rows >= told), "{mode}: {rows:?} of {told} rows");
        }
    }
}

/// Nobody asks for it: a file is written after all others, and when the bucket has that, and status says
/// that nothing is pending, it has the others too.
fn comes_to_be_there(machine: &Machine, life: usize) -> i64 {
    let written = now_us();
    let last = format!("openclaw/workspace/last-{life}");
    machine.ok(&["sh", "-c", &format!("echo {life} > /data/{last}")]);
    until("the bucket has what was written last, and nothing is pending", LONG, || {
        let has = machine.exec(&["cvm", "storage", "ls", &last]).status.success();
        let status = storage(machine);
        let says = status["pending_files"] == 0 && status["oldest_unreplicated_ms"].is_null();
        (has && says).then_some(())
    });
    written
}

#[test]
fn a_machine_lost_at_any_moment_comes_back_whole() {
    let _turn = turn();
    let cloud = Cloud::new();
    let outside = tempfile::tempdir().expect("a temporary directory");
    let lives = if soak() { 50 } else { 6 };
    let mut dice = Dice(0xc0ff_ee00_0000_0001);
    let mut last: Option<(Load, Told, i64)> = None;
    let mut lags = Vec::new();
    let mut older: Vec<Vec<String>> = Vec::new();
    for life in 0..=lives {
        let machine = hasty(&cloud).bind(outside.path(), "/outside").start();
        machine.service_in("gateway", &["ready"]);
        no_incidents(&machine);
        if let Some((load, told, lost)) = last.take() {
            told.holds(&machine);
            lags.extend(load.compare(&machine, outside.path(), told.certain, lost));
        }
        // Nobody touches what earlier lives have left. A file has another time for a moment while its
        // data comes up, so they are looked at when all has; other lives are lost before it has.
        if life % 2 == 0 {
            independent(&machine);
            let top = machine.path("/data/openclaw/workspace/load");
            let of = |life: usize| digest(&top.join(life.to_string()), &[]);
            for (number, before) in older.iter().enumerate() {
                assert_eq!(difference(before, &of(number)), "", "life {number} in life {life}");
            }
            older.extend((older.len()..life).map(of));
        }
        if life == lives {
            no_incidents(&machine);
            break;
        }
        let mut load = Load::start(&machine, life, dice.up_to(1 << 20));
        let mut certain = 0;
        dice.pause(Duration::from_secs(2));
        if life % 3 == 2 {
            load.programs.clear();
            certain = comes_to_be_there(&machine, life);
        } else {
            for _ in 0..=dice.up_to(2) {
                let began = now_us();
                flush(&machine);
                certain = began;
                dice.pause(Duration::from_millis(700));
            }
            dice.pause(Duration::from_millis(1500));
        }
        no_incidents(&machine);
        let told = Told::now(&machine, certain);
        let end = now_us();
        let mut machine = machine;
        machine.destroy();
        last = Some((load, told, end));
    }
    lags.sort_unstable();
    eprintln!("{lives} machines lost; oldest lost transaction in ms: {lags:?}");
}

// === The worker and its stand-in ===

/// Kills it and waits until it is another one.
fn kill(machine: &Machine, program: &str) {
    let Some(old) = machine.find(program) else { return };
    machine.kill(old.pid.into(), "KILL");
    until(&format!("{program} is dead"), PATIENCE, || {
        machine.processes().iter().all(|p| p.pid != old.pid || p.state == 'Z').then_some(())
    });
}

fn gateway(machine: &Machine) -> i64 {
    machine.service_in("gateway", &["ready"])["pid"].as_i64().expect("a running gateway has a pid")
}

/// Waits until the worker has a tree again, without its backoff.
#[track_caller]
fn tree(machine: &Machine) {
    until("the worker is up", LONG, || {
        let state = machine.service("storage")["state"].clone();
        if state == "waiting" {
            machine.exec(&["cvm", "start", "storage", "--no-wait"]);
        }
        (state == "up" || state == "ready").then_some(())
    });
    until("the worker has its tree", LONG, || (storage(machine)["phase"] == "ready").then_some(()));
}

/// A state in the bucket with more files than are fetched before the gateway starts.
fn filled(cloud: &Cloud, files: u32) -> Vec<String> {
    let mut machine = hasty(cloud).start();
    machine.service_in("gateway", &["ready"]);
    let script = format!(
        "mkdir -p /data/openclaw/workspace/many; cd /data/openclaw/workspace/many; for i in $(seq {files}); do echo $i > $i; done"
    );
    machine.ok(&["sh", "-c", &script]);
    flush(&machine);
    let before = state(&machine);
    assert_eq!(machine.stop(), 0, "{}", logs(&machine));
    before
}

#[test]
fn a_worker_killed_before_all_is_fetched_costs_the_gateway_a_restart_and_nothing_else() {
    let _turn = turn();
    let cloud = Cloud::new();
    let rounds = if soak() { 30 } else { 4 };
    let files = 100 * rounds;
    let before = filled(&cloud, files);
    cloud.proxy.latency(Duration::from_millis(200));
    let mut dice = Dice(0xc0ff_ee00_0000_0002);
    let machine = hasty(&cloud).start();
    let mut killed = 0;
    for round in 0..rounds {
        let old = gateway(&machine);
        machine.ok(&["sh", "-c", &format!("echo {round} > /data/openclaw/workspace/new-{round}")]);
        dice.pause(Duration::from_millis(600));
        if storage(&machine)["independent"] == true {
            break;
        }
        kill(&machine, "cvm-storage");
        until("the gateway stands on another tree", LONG, || {
            let gateway = machine.service("gateway");
            (gateway["state"] == "ready" && gateway["pid"] != old).then_some(())
        });
        killed += 1;
    }
    assert!(killed >= rounds / 2, "all was fetched after {killed} kills");
    cloud.proxy.heal();
    tree(&machine);
    independent(&machine);
    no_incidents(&machine);
    let many =
        |lines: Vec<String>| lines.into_iter().filter(|l| l.contains("workspace/many/")).collect::<Vec<_>>();
    assert_eq!(difference(&many(before), &many(state(&machine))), "");
    flush(&machine);
    let rclone = judge(&cloud);
    assert_eq!(rclone.ok(&["cat", "crypt:openclaw/workspace/new-0"]), b"0\n");
    assert_eq!(names(&rclone).iter().filter(|n| n.contains("/many/")).count(), files as usize);
}

#[test]
fn a_worker_killed_later_is_not_missed() {
    let _turn = turn();
    let cloud = Cloud::new();
    drop(filled(&cloud, 20));
    let outside = tempfile::tempdir().expect("a temporary directory");
    let mut dice = Dice(0xc0ff_ee00_0000_0003);
    let machine = hasty(&cloud).bind(outside.path(), "/outside").start();
    let pid = gateway(&machine);
    independent(&machine);
    let load = Load::start(&machine, 0, 7);
    for round in 0..if soak() { 100 } else { 8 } {
        dice.pause(Duration::from_millis(1500));
        kill(&machine, "cvm-storage");
        let file = format!("/data/openclaw/workspace/meanwhile-{round}");
        machine.ok(&[
            "sh",
            "-c",
            &format!(
                "echo {round} > {file}.part && mv {file}.part {file} && cat /data/openclaw/workspace/many/1"
            ),
        ]);
        assert_eq!(machine.service("gateway")["pid"], pid, "{}", logs(&machine));
        tree(&machine);
    }
    let began = now_us();
    flush(&machine);
    no_incidents(&machine);
    let rclone = judge(&cloud);
    assert_eq!(rclone.ok(&["cat", "crypt:openclaw/workspace/meanwhile-1"]), b"1\n");
    let mut machine = machine;
    machine.destroy();
    let machine = hasty(&cloud).start();
    machine.service_in("gateway", &["ready"]);
    load.compare(&machine, outside.path(), began, now_us());
    no_incidents(&machine);
}

/// Content and names of all files, as the bucket has them in the eyes of stock rclone.
fn stock(rclone: &Rclone, below: &str) -> BTreeMap<String, Vec<u8>> {
    let all = names(rclone).into_iter().filter(|name| name.starts_with(below));
    all.map(|name| (name.clone(), rclone.ok(&["cat", &format!("crypt:{name}")]))).collect()
}

const BEFORE: &str = "set -e; mkdir -p /data/openclaw/workspace; cd /data/openclaw/workspace; rm -rf w; mkdir -p w/from w/stays
for i in 1 2 3; do echo old $i > w/$i; echo $i > w/from/$i; done; cvm storage flush";

/// A change of every kind at once: what is written, what takes a name, what moves, what goes.
const CHANGES: &str = "set -e; cd /data/openclaw/workspace/w
echo new > 1.part; mv 1.part 1; rm 2; mv from to; echo more > 4; mv 3 stays/3; ln -s 1 link";

#[test]
fn a_worker_killed_at_any_write_of_a_push_loses_nothing_and_leaves_no_half() {
    let _turn = turn();
    let cloud = Cloud::new();
    let rclone = judge(&cloud);
    // Nothing else writes meanwhile.
    let machine = cloud.machine().environment("S3_HEARTBEAT", "600").start();
    let pid = gateway(&machine);
    independent(&machine);
    for fault in [Fault::Hang, Fault::NoResponse] {
        let mut writes = 0;
        loop {
            machine.ok(&["sh", "-c", BEFORE]);
            writes += 1;
            cloud.proxy.clear_log();
            cloud.proxy.add(Rule::new(fault).method("PUT").every(writes).times(1));
            machine.ok(&["sh", "-c", CHANGES]);
            let mut flush = machine.command(&["cvm", "storage", "flush"]);
            flush.stdout(Stdio::null()).stderr(Stdio::null());
            let mut flush = flush.spawn().expect("nsenter runs");
            let hit = until("a write goes wrong, or none is left", LONG, || {
                let hit = cloud.proxy.log().iter().any(|entry| entry.fault.is_some());
                (hit || flush.try_wait().expect("it is our child").is_some()).then_some(hit)
            });
            if hit {
                kill(&machine, "cvm-storage");
            }
            drop(flush.wait());
            cloud.proxy.heal();
            // Whatever had come so far: each file is an old one or a new one, or goes while we look.
            for (name, content) in stock(&rclone, "openclaw/workspace/w/") {
                let text = String::from_utf8_lossy(&content).into_owned();
                let known = ["", "old 1", "old 2", "old 3", "1", "2", "3", "new", "more"];
                assert!(known.contains(&text.trim_end()), "{name} is {text:?} at write {writes}");
            }
            tree(&machine);
            self::flush(&machine);
            machine.ok(&["cvm", "storage", "verify", "--deep"]);
            no_incidents(&machine);
            assert_eq!(machine.service("gateway")["pid"], pid, "{}", logs(&machine));
            let found: Vec<_> = stock(&rclone, "openclaw/workspace/w/").into_iter().collect();
            let wanted = [
                ("1", "new"),
                ("4", "more"),
                ("stays/3", "old 3"),
                ("to/1", "1"),
                ("to/2", "2"),
                ("to/3", "3"),
            ];
            let wanted = wanted.map(|(name, text)| {
                (format!("openclaw/workspace/w/{name}"), format!("{text}\n").into_bytes())
            });
            assert_eq!(found, wanted, "write {writes} and {fault:?}");
            if !hit {
                break;
            }
        }
        assert!(writes > 4, "only {writes} writes were met");
    }
    let output = restore_by_hand(&cloud, &machine, &[], "/tmp/whole");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let workspace = |lines: Vec<String>| -> Vec<String> {
        lines.into_iter().filter(|line| line.starts_with("\"workspace/")).collect()
    };
    let restored = workspace(digest(&machine.path("/tmp/whole/openclaw"), &[]));
    assert_eq!(difference(&workspace(state(&machine)), &restored), "");
    assert!(restored.iter().any(|line| line.contains("w/link")), "{restored:#?}");
}

/// Nothing begins and nothing goes on, and the worker dies of something else.
fn kill_in_an_outage(cloud: &Cloud, machine: &Machine) {
    cloud.proxy.refuse(true);
    cloud.proxy.cut();
    kill(machine, "cvm-storage");
    until("the next worker finds no bucket", LONG, || {
        if machine.service("storage")["state"] == "waiting" {
            machine.exec(&["cvm", "start", "storage", "--no-wait"]);
        }
        let status = storage(machine);
        (status["phase"] == "opening" && !status["why"].is_null()).then_some(())
    });
}

#[test]
fn a_worker_killed_in_an_outage_is_not_missed_where_the_tree_is_whole() {
    let _turn = turn();
    for fuse in [true, false] {
        let cloud = Cloud::new();
        let mut machine = hasty(&cloud);
        machine = if fuse { machine } else { machine.without_fuse() };
        let mut machine = machine.start();
        let pid = gateway(&machine);
        independent(&machine);
        flush(&machine);
        let write = |machine: &Machine, name: &str| {
            machine.ok(&[
                "sh",
                "-c",
                &format!(
                    "mkdir -p /data/openclaw/workspace && echo {name} > /data/openclaw/workspace/{name}"
                ),
            ]);
        };
        kill_in_an_outage(&cloud, &machine);
        write(&machine, "meanwhile");
        machine.line("Nothing is replicated: ");
        assert_eq!(gateway(&machine), pid, "{}", logs(&machine));
        cloud.proxy.refuse(false);
        tree(&machine);
        flush(&machine);
        assert_eq!(judge(&cloud).ok(&["cat", "crypt:openclaw/workspace/meanwhile"]), b"meanwhile\n");
        assert_eq!(gateway(&machine), pid, "{}", logs(&machine));
        no_incidents(&machine);

        // A worker that has had no bucket knows all the same what is missing there.
        kill_in_an_outage(&cloud, &machine);
        write(&machine, "late");
        assert_eq!(machine.stop(), 75, "{}", logs(&machine));
        let output = machine.output();
        let last = output.lines().last().unwrap_or_default();
        assert!(last.contains("Not everything is in the bucket: 1 files, 5 bytes"), "{output}");
    }
}

#[track_caller]
fn the_tree_is_whole_and_can_be_written(machine: &Machine, before: &[String]) {
    let words = "echo new > /data/openclaw/workspace/new && cat /data/openclaw/workspace/many/*";
    machine.ok(&["sh", "-c", words]);
    flush(machine);
    no_incidents(machine);
    let changed = difference(before, &state(machine));
    assert!(!changed.contains("many/"), "{changed}");
}

#[test]
fn a_stand_in_killed_alone_is_succeeded_by_one_that_knows_as_much() {
    let _turn = turn();
    let cloud = Cloud::new();
    drop(filled(&cloud, 50));
    let machine = hasty(&cloud).start();
    let pid = gateway(&machine);
    independent(&machine);
    kill(&machine, "cvm-standin");
    machine.line("The stand-in for the mount was told again");
    kill(&machine, "cvm-storage");
    machine.ok(&[
        "sh",
        "-c",
        "echo new > /data/openclaw/workspace/new && cat /data/openclaw/workspace/many/*",
    ]);
    tree(&machine);
    assert_eq!(machine.service("gateway")["pid"], pid, "{}", logs(&machine));
    flush(&machine);
    no_incidents(&machine);
}

#[test]
fn a_stand_in_killed_after_its_worker_costs_a_restart_and_nothing_else() {
    let _turn = turn();
    let cloud = Cloud::new();
    let before = filled(&cloud, 50);
    let machine = hasty(&cloud).start();
    let pid = gateway(&machine);
    independent(&machine);
    kill(&machine, "cvm-storage");
    tree(&machine);
    assert_eq!(machine.service("gateway")["pid"], pid);
    kill(&machine, "cvm-standin");
    until("the gateway stands on a tree that was rebuilt", LONG, || {
        let gateway = machine.service("gateway");
        (gateway["state"] == "ready" && gateway["pid"] != pid).then_some(())
    });
    tree(&machine);
    the_tree_is_whole_and_can_be_written(&machine, &before);
}

#[test]
fn worker_and_stand_in_killed_together_leave_a_gateway_that_runs_on_the_whole_tree() {
    let _turn = turn();
    let cloud = Cloud::new();
    let before = filled(&cloud, 50);
    let machine = hasty(&cloud).start();
    machine.service_in("gateway", &["ready"]);
    independent(&machine);
    let pids: Vec<String> = ["cvm-storage", "cvm-standin"]
        .iter()
        .filter_map(|name| machine.find(name))
        .map(|p| p.pid.to_string())
        .collect();
    machine.ok(&["kill", "-KILL", &pids[0], &pids[1]]);
    until("the worker has its tree, and the gateway is well", LONG, || {
        let other = machine.find("cvm-storage").is_some_and(|p| p.pid.to_string() != pids[0]);
        let well = storage(&machine)["phase"] == "ready" && machine.service("gateway")["state"] == "ready";
        (other && well).then_some(())
    });
    the_tree_is_whole_and_can_be_written(&machine, &before);
}

// === The end, in order ===

#[test]
fn a_stop_pushes_what_is_pending_and_gives_the_bucket_away() {
    let _turn = turn();
    let cloud = Cloud::new();
    // Sixty seconds between beats: a machine that had to wait for a dead one would wait for minutes.
    let mut machine = cloud.machine().start();
    machine.service_in("gateway", &["ready"]);
    machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace && cd /data/openclaw/workspace || exit; for i in $(seq 500); do echo $i > $i; done; mkdir sub; mv 1 sub/one; rm 2"]);
    let before = state(&machine);
    assert_eq!(machine.stop(), 0, "{}", logs(&machine));
    drop(machine);
    let machine = cloud.machine().start();
    machine.service_in("gateway", &["ready"]);
    independent(&machine);
    assert_eq!(difference(&before, &state(&machine)), "");
    assert!(!machine.output().contains("owns the bucket"), "{}", machine.output());
}

#[test]
fn a_stop_without_a_bucket_ends_in_its_time_and_says_what_is_missing() {
    let _turn = turn();
    for (hangs, is_pushing) in [(false, false), (true, false), (true, true)] {
        let cloud = Cloud::new();
        let mut machine = hasty(&cloud).environment("S3_DRAIN_TIMEOUT", "2").start();
        machine.service_in("gateway", &["ready"]);
        flush(&machine);
        if hangs {
            cloud.proxy.fault(Fault::Hang);
        } else {
            cloud.proxy.refuse(true);
        }
        machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace && cd /data/openclaw/workspace || exit; for i in 1 2 3 4 5 6 7; do echo $i > late-$i; done"]);
        if !hangs {
            let told = machine.exec(&["cvm", "storage", "flush"]);
            let words = String::from_utf8_lossy(&[told.stdout, told.stderr].concat()).into_owned();
            assert_eq!(told.status.code(), Some(1), "{words}");
            assert!(words.contains("Not everything is in the bucket"), "{words}");
        }
        if is_pushing {
            until("a push hangs", PATIENCE, || {
                cloud
                    .proxy
                    .log()
                    .iter()
                    // The first request of a push asks whether the bucket is still ours.
                    .any(|e| e.fault == Some(Fault::Hang))
                    .then_some(())
            });
        }
        let began = Instant::now();
        assert_eq!(machine.stop(), 75, "{}", logs(&machine));
        let took = began.elapsed();
        assert!(took < Duration::from_secs(12), "it took {took:?}, hanging: {hangs}, pushing: {is_pushing}");
        let output = machine.output();
        let last = output.lines().last().unwrap_or_default();
        assert!(last.contains("Not everything is in the bucket: 7 files"), "{output}");
        cloud.proxy.heal();
        // A machine that was stopped, on the same volume: it pushes what it kept.
        let machine = machine.again(|b| b);
        machine.service_in("gateway", &["ready"]);
        flush(&machine);
        let rclone = judge(&cloud);
        assert_eq!(names(&rclone).iter().filter(|n| n.contains("/late-")).count(), 7);
        no_incidents(&machine);
    }
}

#[test]
fn a_stop_does_not_wait_for_a_name_that_cannot_be_there() {
    let _turn = turn();
    let cloud = Cloud::new();
    let mut machine = hasty(&cloud).environment("S3_DRAIN_TIMEOUT", "3600").start();
    machine.service_in("gateway", &["ready"]);
    let at = "/data/openclaw/workspace";
    machine.ok(&["sh", "-ec", &format!("mkdir -p {at}; cd {at}; echo near > near")]);
    flush(&machine);
    let far = format!("{0}/{0}/{0}", "n".repeat(250));
    machine.ok(&["sh", "-ec", &format!("cd {at}; mkdir -p {far}; mv near {far}/file")]);
    not_all_there(&machine, &["cannot be in", "nnn/file"]);
    // The kernel's hint of the change that was just looked at may come late.
    until("it is not counted as pending", PATIENCE, || {
        (storage(&machine)["pending_files"] == 0).then_some(())
    });
    assert_eq!(machine.stop(), 75, "{}", logs(&machine));
    let output = machine.output();
    assert!(output.contains("Not everything is in the bucket: 1 files, 5 bytes"), "{output}");
    assert!(names(&judge(&cloud)).contains("openclaw/workspace/near"), "all that the bucket has of it");
}

#[test]
fn a_stop_leaves_out_what_the_server_refuses_and_nothing_else() {
    let _turn = turn();
    let cloud = Cloud::new();
    let mut machine = hasty(&cloud).environment("S3_DRAIN_TIMEOUT", "30").start();
    machine.service_in("gateway", &["ready"]);
    let at = "/data/openclaw/workspace";
    machine.ok(&["sh", "-ec", &format!("mkdir -p {at}; cd {at}; echo old > log; echo 1 > gone")]);
    flush(&machine);
    let rclone = judge(&cloud);
    let said = rclone.ok(&["cryptdecode", "--reverse", "crypt:", "openclaw/workspace/refused"]);
    let said = String::from_utf8_lossy(&said).into_owned();
    let key = said.split_whitespace().last().unwrap_or_default();
    cloud.proxy.add(Rule::new(Fault::Status(400)).method("PUT").path(key));
    let change = format!("cd {at}; echo no > refused; mv log log.1; echo new > log; rm gone; echo 2 > other");
    machine.ok(&["sh", "-ec", &change]);
    assert_eq!(machine.stop(), 75, "{}", logs(&machine));
    let output = machine.output();
    assert!(output.contains("Not everything is in the bucket: 1 files"), "{output}");
    let there: Vec<String> = names(&rclone).into_iter().filter(|n| n.contains("/workspace/")).collect();
    assert_eq!(there, ["log", "log.1", "other"].map(|name| format!("openclaw/workspace/{name}")));
    assert_eq!(rclone.ok(&["cat", "crypt:openclaw/workspace/log"]), b"new\n");
}

#[test]
fn a_stop_knows_that_a_mode_is_missing_in_the_bucket_and_a_name_that_cannot_be_there() {
    let _turn = turn();
    let cloud = Cloud::new();
    let mut machine = hasty(&cloud).environment("S3_DRAIN_TIMEOUT", "2").start();
    machine.service_in("gateway", &["ready"]);
    machine.ok(&["sh", "-c", "mkdir -p /data/openclaw/workspace && echo x > /data/openclaw/workspace/x"]);
    flush(&machine);
    cloud.proxy.refuse(true);
    machine.ok(&["chmod", "600", "/data/openclaw/workspace/x"]);
    assert_eq!(machine.stop(), 75, "{}", logs(&machine));
    assert!(machine.output().contains("Not everything is in the bucket: 1 files"), "{}", machine.output());
    cloud.proxy.refuse(false);
    let mut machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    flush(&machine);
    let far = format!("/data/openclaw/{0}/{0}/{0}", "n".repeat(250));
    machine.ok(&["sh", "-c", &format!("mkdir -p {far} && echo far > {far}/file")]);
    not_all_there(&machine, &["cannot be in", "nnn/file"]);
    assert_eq!(machine.stop(), 75, "{}", logs(&machine));
    let output = machine.output();
    assert!(output.contains("Not everything is in the bucket: 1 files, 4 bytes"), "{output}");
}

#[test]
fn thousands_of_changes_without_a_bucket_cost_no_memory_and_all_of_them_arrive() {
    let _turn = turn();
    let cloud = Cloud::new();
    let machine = hasty(&cloud).start();
    machine.service_in("gateway", &["ready"]);
    flush(&machine);
    let used = || -> i64 {
        let pid = machine.find("cvm-storage").expect("the worker runs").pid;
        let status = machine.read(&format!("/proc/{pid}/status"));
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("it has memory");
        number(line.trim().trim_end_matches(" kB")) / 1024
    };
    let pid = machine.find("cvm-storage").expect("the worker runs").pid;
    cloud.proxy.refuse(true);
    let rounds = if soak() { 40 } else { 4 };
    let mut memory = vec![used()];
    for round in 0..rounds {
        let script = format!(
            "mkdir -p /data/openclaw/workspace/day; cd /data/openclaw/workspace/day; for i in $(seq 1500); do echo {round} $i > $i; done; rm -f 1{round}*; mkdir -p d{round}; mv 2* d{round}/"
        );
        machine.ok(&["sh", "-c", &script]);
        memory.push(used());
    }
    let status = storage(&machine);
    assert!(status["oldest_unreplicated_ms"].as_u64().is_some(), "{status:#}");
    cloud.proxy.heal();
    until("everything is there again", LONG, || {
        machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
    });
    memory.push(used());
    eprintln!("MiB in use: {memory:?}");
    let (first, last) = (memory[1], memory[memory.len() - 2]);
    assert!(last - first < 40, "memory grows with what is pending: {memory:?}");
    assert_eq!(machine.find("cvm-storage").map(|p| p.pid), Some(pid), "the worker has survived");
    let before = state(&machine);
    let mut machine = machine;
    assert_eq!(machine.stop(), 0, "{}", logs(&machine));
    let machine = hasty(&cloud).start();
    machine.service_in("gateway", &["ready"]);
    independent(&machine);
    assert_eq!(difference(&before, &state(&machine)), "");
    no_incidents(&machine);
}

// === The real gateway ===

fn say(machine: &Machine, words: &str) -> String {
    let body =
        format!(r#"{{"model":"openclaw/default","messages":[{{"role":"user","content":"{words}"}}]}}"#);
    let bearer = format!("Authorization: Bearer {TOKEN}");
    machine.ok(&[
        "curl",
        "-sS",
        "-m",
        "120",
        "-H",
        &bearer,
        "-H",
        "Content-Type: application/json",
        "-H",
        "x-openclaw-session-key: agent:main:crash",
        "-d",
        &body,
        "http://127.0.0.1:18789/v1/chat/completions",
    ])
}

/// The device in the gateway's own database, as the bucket has it.
fn device(cloud: &Cloud) -> String {
    let bytes = judge(cloud).ok(&["cat", "crypt:openclaw/state/openclaw.sqlite"]);
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), bytes).expect("it has room");
    let db = rusqlite::Connection::open(file.path()).expect("it opens");
    let sql = "SELECT device_id FROM device_identities WHERE identity_key = 'primary'";
    db.query_row(sql, [], |row| row.get(0)).expect("the device is there")
}

#[test]
fn a_conversation_goes_on_after_its_machine_was_lost() {
    let _turn = turn();
    let cloud = Cloud::new();
    let model = Chat::start(&cloud.network, MODEL_PORT, |_, _| Said::Text("understood".to_owned()));
    let config = local_model();
    let start = || {
        let machine = Builder::product()
            .real_gateway()
            .s3(&cloud.network, &cloud.proxy.endpoint(), &cloud.garage)
            .environment("S3_HEARTBEAT", "1")
            .environment("OPENCLAW_CONFIG_B64", &config)
            .start();
        until("the gateway is ready", Duration::from_secs(240), || {
            (machine.service("gateway")["state"] == "ready").then_some(())
        });
        machine
    };
    let mut machine = start();
    let said = say(&machine, "the secret colour is heliotrope");
    assert!(said.contains("understood"), "{said}\n{}", machine.read("/var/log/openclaw-cvm/gateway.log"));
    flush(&machine);
    assert_eq!(device(&cloud), DEVICE);
    machine.destroy();
    let before = model.asked().len();
    let lost = Instant::now();
    let machine = start();
    eprintln!("from the loss to a gateway that is ready: {:?}", lost.elapsed());
    let said = say(&machine, "which colour was it");
    assert!(said.contains("understood"), "{said}");
    let asked: Vec<String> = model.asked().iter().map(|asked| asked.body.to_string()).collect();
    assert!(
        asked[before..].iter().any(|body| body.contains("which colour") && body.contains("heliotrope")),
        "the model is not told what was said before: {:#?}",
        &asked[before..]
    );
    flush(&machine);
    assert_eq!(device(&cloud), DEVICE);
    no_incidents(&machine);
}
