//! What the storage costs and how far behind the bucket is, with Garage as the server and with
//! 0 and 20 ms of added latency; each figure beside its peer in the same run.

use crate::contestants::with_user;
use crate::figures::{Figure, of_each_build};
use cvm_harness::judge::PREFIX;
use cvm_harness::machine::{CRYPT_PASSWORD, CRYPT_SALT};
use cvm_harness::tools::Rclone;
use cvm_harness::{Builder, Cloud, Machine, Proxy, storage, until};
use rusqlite::Connection;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const LONG: Duration = Duration::from_mins(30);
const FEWER: usize = 10_000;
const LATENCY: Duration = Duration::from_millis(20);
const GIB: usize = 1 << 30;
const DATABASES: usize = 10;
const DATABASE: usize = 2 << 20;
/// Of an idle worker; longer than the time between two full scans.
const IDLE: Duration = Duration::from_secs(360);

struct Bed {
    cloud: Cloud,
    /// The same server for programs of this machine.
    outside: Proxy,
}

impl Bed {
    fn new() -> Self {
        let cloud = Cloud::new();
        let outside = Proxy::start(cloud.garage.address());
        Self { cloud, outside }
    }

    fn machine(&self) -> Builder {
        with_user(self.cloud.machine())
    }

    fn latency(&self, latency: Duration) {
        for proxy in [&self.cloud.proxy, &self.outside] {
            proxy.heal();
            if !latency.is_zero() {
                proxy.latency(latency);
            }
        }
    }

    fn rclone(&self) -> Rclone {
        let garage = &self.cloud.garage;
        let bucket = garage.s3().at(self.outside.address()).bucket(garage.bucket());
        Rclone::new(&bucket, PREFIX, CRYPT_PASSWORD, CRYPT_SALT)
    }
}

fn wait(machine: &Machine, what: &str, ready: impl Fn(&serde_json::Value) -> bool) {
    until(&format!("{what}; it said {}", machine.output()), LONG, || ready(&storage(machine)).then_some(()));
}

fn figure(
    what: &'static str,
    who: &str,
    unit: &'static str,
    values: Vec<f64>,
    target: &'static str,
) -> Figure {
    // A part takes long, and what it has found so far is worth something if it ends early.
    eprintln!("   {what}, {who}: {values:.2?} {unit}");
    Figure::new(what, who, unit, values, target)
}

/// A tree of `files` files, a gibibyte in all, with databases among them.
fn fill(root: &Path, files: usize) {
    let size = (GIB - DATABASES * DATABASE) / files;
    // Incompressible, and different everywhere: xorshift.
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = vec![0u8; size];
    for number in 0..files {
        let dir = root.join(format!("openclaw/workspace/d{:03}", number % 250));
        if number < 250 {
            fs::create_dir_all(&dir).expect("room on the disk");
        }
        for chunk in bytes.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            chunk.copy_from_slice(&state.to_le_bytes()[..chunk.len()]);
        }
        fs::write(dir.join(format!("file-{number}")), &bytes).expect("room on the disk");
    }
    for number in 0..DATABASES {
        let dir = root.join(format!("openclaw/agents/a{number}/agent"));
        fs::create_dir_all(&dir).expect("room on the disk");
        database(&dir.join("openclaw-agent.sqlite"));
    }
    own(&root.join("openclaw"));
}

fn own(path: &Path) {
    let _ = std::process::Command::new("chown").args(["-R", "990:990"]).arg(path).status();
}

fn database(file: &Path) {
    let db = Connection::open(file).expect("a database");
    db.execute_batch(
        "PRAGMA journal_mode=WAL; CREATE TABLE filler(x BLOB); CREATE TABLE t(n INTEGER PRIMARY KEY);",
    )
    .expect("tables");
    for _ in 0..(DATABASE / 4096) {
        db.execute("INSERT INTO filler VALUES (randomblob(3900))", []).expect("a row");
    }
}

fn worker_memory(machine: &Machine, field: &str) -> f64 {
    let Some(worker) = machine.find("cvm-storage").filter(|p| p.name == "cvm-storage") else {
        return f64::NAN;
    };
    let text = machine.read(&format!("/proc/{}/status", worker.pid));
    let line = text.lines().find(|l| l.starts_with(field)).unwrap_or_default();
    line.split_whitespace().nth(1).and_then(|n| n.parse::<f64>().ok()).unwrap_or(f64::NAN) / 1024.0
}

fn storage_step_ms(machine: &Machine) -> f64 {
    machine.service_in("gateway", &["ready"]);
    storage_step_done(machine).unwrap_or(f64::NAN)
}

/// How many milliseconds it took.
fn storage_step_done(machine: &Machine) -> Option<f64> {
    let status = machine.status();
    let steps = status["boot"].as_array().cloned().unwrap_or_default();
    let step = steps.iter().find(|s| s["name"] == "storage" && s["state"] == "done")?;
    step["took_ms"].as_f64()
}

/// Push, start, and nothing to do.
pub(crate) fn of_ten_thousand_files() -> Vec<Figure> {
    of_files(FEWER, "10k files")
}

/// The same of more.
pub(crate) fn of_a_hundred_thousand_files() -> Vec<Figure> {
    of_files(10 * FEWER, "100k files")
}

/// Full restore in sync mode, beside `rclone copy` with its defaults.
pub(crate) fn restore() -> Vec<Figure> {
    let bed = Bed::new();
    push(&bed, FEWER, "10k files");
    restores(&bed, "10k files")
}

fn push(bed: &Bed, files: usize, label: &str) -> Vec<Figure> {
    let builder = bed.machine();
    fill(&builder.scratch().join("data"), files);
    eprintln!("   pushing {files} files");
    let mut machine = builder.start();
    let began = Instant::now();
    wait(&machine, "all is pushed", |s| {
        s["phase"] == "ready" && s["pending_files"] == 0 && s["files"].as_u64() >= Some(files as u64)
    });
    let figures = vec![
        figure("push, 1 GiB", label, "s", vec![began.elapsed().as_secs_f64()], ""),
        figure("memory while pushing (peak)", label, "MiB", vec![worker_memory(&machine, "VmHWM")], "250"),
    ];
    assert_eq!(machine.stop(), 0);
    figures
}

fn of_files(files: usize, label: &str) -> Vec<Figure> {
    let bed = Bed::new();
    let mut figures = push(&bed, files, label);
    for latency in [Duration::ZERO, LATENCY] {
        bed.latency(latency);
        let (mut starts, mut hydrated) = (Vec::new(), Vec::new());
        for round in 0..3 {
            let mut machine = bed.machine().start();
            starts.push(storage_step_ms(&machine) / 1000.0);
            say_steps(&machine);
            if round == 2 && files == FEWER && !latency.is_zero() {
                let began = Instant::now();
                wait(&machine, "all is hydrated", |s| s["independent"] == true);
                hydrated.push(began.elapsed().as_secs_f64());
            }
            machine.stop();
        }
        let what = if latency.is_zero() {
            "FUSE: start to gateway may start"
        } else {
            "FUSE: the same, 20 ms latency"
        };
        let target = match (latency.is_zero(), files) {
            (true, FEWER) => "1",
            (true, _) => "2x of 10k",
            _ => "",
        };
        figures.push(figure(what, label, "s", starts, target));
        if !hydrated.is_empty() {
            figures.push(figure("FUSE: hydrated, 20 ms latency", label, "s", hydrated, ""));
        }
    }
    bed.latency(Duration::ZERO);
    figures.extend(idle(&bed, label));
    figures
}

fn say_steps(machine: &Machine) {
    let log = machine.read("/var/log/openclaw-cvm/storage.log");
    for line in log.lines().filter(|line| line.contains("ready after")) {
        eprintln!("{line}");
    }
}

/// One before and one after the peer, so that neither has the machine in a better hour.
fn restores(bed: &Bed, label: &str) -> Vec<Figure> {
    bed.latency(LATENCY);
    let (before, memory) = sync_restore(bed);
    let scratch = tempfile::tempdir().expect("a directory");
    let began = Instant::now();
    bed.rclone().ok(&["copy", "crypt:", &scratch.path().display().to_string(), "--exclude", "/.cvm/**"]);
    let rclone = began.elapsed().as_secs_f64();
    let (after, _) = sync_restore(bed);
    let ours = vec![before, after];
    let times = ours.iter().map(|ours| rclone / ours).collect();
    let what = "full restore, 20 ms latency";
    vec![
        figure(what, &format!("sync mode, {label}"), "s", ours, "1/5 of rclone"),
        figure("memory while restoring (peak)", label, "MiB", vec![memory], ""),
        figure(what, "rclone copy", "s", vec![rclone], ""),
        figure("full restore, times faster", "rclone / sync", "x", times, "5"),
    ]
}

/// How long it takes, and the memory it needs.
fn sync_restore(bed: &Bed) -> (f64, f64) {
    let mut machine = bed.machine().without_fuse().start();
    let took = until("the restore is done", LONG, || storage_step_done(&machine));
    say_steps(&machine);
    let memory = worker_memory(&machine, "VmHWM");
    machine.stop();
    (took / 1000.0, memory)
}

/// Nothing changes any more.
fn idle(bed: &Bed, label: &str) -> Vec<Figure> {
    let mut machine = bed.machine().environment("S3_HEARTBEAT", "60").start();
    machine.service_in("gateway", &["ready"]);
    let began = Instant::now();
    wait(&machine, "all is hydrated and quiet", |s| s["independent"] == true && s["pending_files"] == 0);
    let hydrated = began.elapsed().as_secs_f64();
    // What its own logs of the boot are goes up with the first minute.
    std::thread::sleep(Duration::from_secs(70));
    bed.cloud.proxy.clear_log();
    let ticks = || {
        let worker = machine.find("cvm-storage").map_or(0, |p| p.pid);
        let text = machine.read(&format!("/proc/{worker}/stat"));
        let fields: Vec<f64> = text
            .rsplit(')')
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .filter_map(|f| f.parse().ok())
            .collect();
        fields.get(10).copied().unwrap_or(0.0) + fields.get(11).copied().unwrap_or(0.0)
    };
    let before = ticks();
    eprintln!("   idle for {} s", IDLE.as_secs());
    std::thread::sleep(IDLE);
    let cpu = (ticks() - before) / IDLE.as_secs_f64();
    let log = bed.cloud.proxy.log();
    let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
    for entry in &log {
        *kinds.entry(format!("{} {}", entry.method, entry.path)).or_default() += 1;
    }
    for (kind, times) in kinds {
        eprintln!("   {times} times {kind}");
    }
    let requests = f64::from(u32::try_from(log.len()).unwrap_or(u32::MAX)) * 60.0 / IDLE.as_secs_f64();
    let memory = worker_memory(&machine, "VmRSS");
    // In order: the next one would wait three of its heartbeats.
    machine.stop();
    vec![
        figure("FUSE: then hydrated after", label, "s", vec![hydrated], ""),
        figure("memory, idle", label, "MiB", vec![memory], "80"),
        figure("processor, idle", label, "%", vec![cpu], "1"),
        figure("requests, idle", label, "/min", vec![requests], "1"),
    ]
}

/// A machine whose tree was mounted from the bucket, and has come up.
fn hydrated(bed: &Bed) -> Machine {
    let builder = bed.machine();
    let top = builder.scratch().join("data/openclaw");
    let dir = top.join("workspace/before");
    fs::create_dir_all(&dir).expect("room on the disk");
    for number in 0..500 {
        fs::write(dir.join(number.to_string()), number.to_string()).expect("room on the disk");
    }
    own(&top);
    let mut machine = builder.start();
    wait(&machine, "all is pushed", |s| s["phase"] == "ready" && s["files"].as_u64() >= Some(500));
    assert_eq!(machine.stop(), 0);
    let machine = bed.machine().start();
    machine.service_in("gateway", &["ready"]);
    wait(&machine, "independent", |s| s["independent"] == true);
    machine
}

/// From a commit, or a write, to what can be had from the bucket.
pub(crate) fn lag() -> Vec<Figure> {
    let at = |latency: Duration| {
        let bed = Bed::new();
        let machine = hydrated(&bed);
        bed.latency(latency);
        bed.cloud.proxy.clear_log();
        let who = if latency.is_zero() { "0 ms" } else { "20 ms" };
        vec![
            figure("commit to restorable, p99", who, "s", vec![p99(database_lag(&machine))], "2"),
            figure("small file to bucket, p99", who, "s", vec![p99(file_lag(&machine))], "2"),
        ]
    };
    [Duration::ZERO, LATENCY].into_iter().flat_map(|latency| of_each_build(|| at(latency))).collect()
}

/// All but one in a hundred are below it.
fn p99(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let index = (values.len() * 99).div_ceil(100).saturating_sub(1);
    values.get(index).copied().unwrap_or(f64::NAN)
}

/// Ten transactions a second for half a minute; each is there when a copy of the object has it.
fn database_lag(machine: &Machine) -> Vec<f64> {
    let file = Path::new("/data/openclaw/lag.sqlite");
    machine.inside(|| {
        database(file);
        own(file);
    });
    let began = Instant::now();
    let commits = std::sync::Mutex::new(Vec::new());
    let seen = std::sync::Mutex::new(vec![0.0f64; 400]);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            machine.inside(|| {
                let db = Connection::open(file).expect("a database");
                for n in 1..=300 {
                    db.execute("INSERT INTO t VALUES (?)", [n]).expect("a commit");
                    commits.lock().expect("no panic").push(began.elapsed().as_secs_f64());
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        });
        let scratch = tempfile::tempdir().expect("a directory");
        let copy = scratch.path().join("copy");
        let mut known = 0;
        while known < 300 && began.elapsed() < LONG {
            let output = machine.exec(&["cvm", "storage", "get", "openclaw/lag.sqlite", "-o", "-"]);
            let at = began.elapsed().as_secs_f64();
            if !output.status.success() || fs::write(&copy, &output.stdout).is_err() {
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
            let newest: i64 = Connection::open(&copy)
                .and_then(|db| db.query_row("SELECT coalesce(max(n), 0) FROM t", [], |r| r.get(0)))
                .unwrap_or(0);
            let newest = usize::try_from(newest).unwrap_or(0);
            for n in known + 1..=newest {
                if let Some(slot) = seen.lock().expect("no panic").get_mut(n) {
                    *slot = at;
                }
            }
            known = known.max(newest);
        }
    });
    let (commits, seen) = (commits.into_inner().expect("no panic"), seen.into_inner().expect("no panic"));
    commits.iter().zip(seen.iter().skip(1)).map(|(commit, seen)| seen - commit).collect()
}

fn file_lag(machine: &Machine) -> Vec<f64> {
    let file = machine.path("/data/openclaw/small.txt");
    (0..30)
        .map(|n| {
            fs::write(&file, format!("version {n}")).expect("a write");
            own(&file);
            let began = Instant::now();
            until("the new version is in the bucket", LONG, || {
                let output = machine.exec(&["cvm", "storage", "get", "openclaw/small.txt", "-o", "-"]);
                (output.stdout == format!("version {n}").as_bytes()).then(|| began.elapsed().as_secs_f64())
            })
        })
        .collect()
}

/// Transactions with fsync on /data, on the disk below, and on a plain rclone mount.
pub(crate) fn transactions() -> Vec<Figure> {
    let bed = Bed::new();
    let machine = hydrated(&bed);
    let plain = tempfile::Builder::new().prefix("cvm-bench-").tempdir().expect("a directory");
    let mount = PlainMount::new(&bed);
    let (mut ours, mut disk, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..14 {
        let mut on_disk = || disk.push(commits_a_second(&plain.path().join(format!("d{round}"))));
        let mut on_ours = || {
            ours.push(machine.inside(|| commits_a_second(Path::new(&format!("/data/openclaw/d{round}")))));
        };
        // Who comes after the mount has what it left to do beside it.
        if round % 2 == 0 {
            on_disk();
            on_ours();
        } else {
            on_ours();
            on_disk();
        }
        theirs.extend(mount.as_ref().map(|m| commits_a_second(&m.point.join(format!("d{round}")))));
    }
    let ratio = ours.iter().zip(&disk).map(|(a, b)| a / b).collect();
    vec![
        figure("SQLite commits with fsync", "/data", "/s", ours, ""),
        figure("SQLite commits with fsync", "bare disk", "/s", disk, ""),
        figure("SQLite commits with fsync", "rclone mount", "/s", theirs, ""),
        figure("SQLite commits, /data to disk", "ratio", "", ratio, "0.95"),
    ]
}

fn commits_a_second(file: &Path) -> f64 {
    let Ok(db) = Connection::open(file) else { return f64::NAN };
    if db.execute_batch("PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE t(x)").is_err() {
        return f64::NAN;
    }
    let began = Instant::now();
    let mut count = 0;
    while began.elapsed() < Duration::from_secs(2) {
        if db.execute("INSERT INTO t VALUES (randomblob(100))", []).is_err() {
            return f64::NAN;
        }
        count += 1;
    }
    f64::from(count) / began.elapsed().as_secs_f64()
}

/// What the old documentation prescribed: rclone's own mount, with a write cache.
struct PlainMount {
    point: PathBuf,
    child: std::process::Child,
    _scratch: tempfile::TempDir,
    _rclone: Rclone,
}

impl PlainMount {
    fn new(bed: &Bed) -> Option<Self> {
        let scratch = tempfile::tempdir().ok()?;
        let point = scratch.path().join("mount");
        fs::create_dir(&point).ok()?;
        let rclone = bed.rclone();
        let cache = scratch.path().join("cache").display().to_string();
        let words = [
            "mount",
            "crypt:plain",
            &point.display().to_string(),
            "--vfs-cache-mode",
            "writes",
            "--cache-dir",
            &cache,
        ];
        let child = cvm_harness::tools::rclone(&words, &rclone.configuration()).spawn().ok()?;
        let this = Self { point: point.clone(), child, _scratch: scratch, _rclone: rclone };
        let mounted = || {
            fs::read_to_string("/proc/self/mounts").unwrap_or_default().contains(&point.display().to_string())
        };
        until("rclone has mounted", LONG, || mounted().then_some(()));
        Some(this)
    }
}

impl Drop for PlainMount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("fusermount3").arg("-uz").arg(&self.point).status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
