//! What the mux client costs: signed deliveries at a steady pace, whatever becomes of them, with a
//! gateway that answers at once and a mux-server that takes the answers.
//!
//! The pace does not wait for answers, and a latency counts from the moment at which the delivery
//! was due: a stall is paid by everyone behind it. The floor is the same pace of inserts, each made
//! durable by itself, into a database on the same disk, before and after.

use crate::contestants::with_user;
use crate::figures::{Figure, rollup, status_kib};
use cvm_harness::machine::{DEVICE_ID, MASTER_KEY, PATIENCE, RELAY, STUB_PORT};
use cvm_harness::mux::message;
use cvm_harness::{Builder, Chat, Machine, Mux, Network, Said, until};
use rusqlite::Connection;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const PER_SECOND: u32 = 200;
const LENGTH: Duration = Duration::from_secs(60);
const FLOOR_LENGTH: Duration = Duration::from_secs(15);
/// Before the minute, not counted.
const WARM_UP: Duration = Duration::from_secs(3);
const SESSIONS: usize = 50;
/// Connections of the server; more than are ever busy unless the client stalls.
const COURIERS: usize = 32;

pub(crate) fn deliveries() -> Vec<Figure> {
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let network = Network::new();
    let mux = Mux::start(&network, DEVICE_ID);
    let chat = Chat::start(&network, STUB_PORT, |asked, _| Said::Text(format!("to {}", asked.last())));
    let machine = with_user(Builder::product())
        .fake_gateway(RELAY)
        .environment("MASTER_KEY", MASTER_KEY)
        .mux(&network, &mux)
        .start();
    machine.service_in("gateway", &["ready"]);
    machine.service_in("mux", &["ready"]);
    until("the client has registered", PATIENCE, || mux.registered().then_some(()));
    let pid = machine.outside(machine.service("mux")["pid"].as_i64().expect("it runs"));
    let idle = [rollup(pid, "Rss:"), rollup(pid, "Pss:")];

    let mut floor = floor(&scratch.path().join("floor-1"), FLOOR_LENGTH);
    pace(WARM_UP, || deliver(&mux, 0));
    let base = count(WARM_UP);
    drained(&mux, &machine, base);
    eprintln!("   a minute of {PER_SECOND} events a second");
    let peak = Peak::default();
    let (took, share, used) = std::thread::scope(|scope| {
        scope.spawn(|| peak.watch(pid));
        let (began, before) = (Instant::now(), processor_seconds(pid));
        let took = pace(LENGTH, || deliver(&mux, base));
        let share = (processor_seconds(pid) - before) / began.elapsed().as_secs_f64() * 100.0;
        peak.over.store(true, Ordering::SeqCst);
        (took, share, peak.pss_kib.load(Ordering::SeqCst))
    });
    let ended = Instant::now();
    drained(&mux, &machine, base + count(LENGTH));
    let behind = ended.elapsed().as_secs_f64();
    floor.extend(self::floor(&scratch.path().join("floor-2"), FLOOR_LENGTH));

    assert_eq!(mux.sent().len(), base + count(LENGTH), "each event has one answer");
    let after = [rollup(pid, "Rss:"), rollup(pid, "Pss:")];
    let (ours, disk) = (quantiles("cvm-mux", took), quantiles("insert + fsync", floor));
    let mut figures: Vec<Figure> = ours.into_iter().zip(disk).flat_map(|(ours, disk)| [ours, disk]).collect();
    let mut one = |what, unit, value: f64| {
        let target = if what == "peak RSS" { "<= 30720" } else { "" };
        figures.push(Figure::new(what, "cvm-mux", unit, vec![value], target));
    };
    one("all answered, after the last one", "s", behind);
    one("processor, of one core", "%", share);
    one("RSS, idle", "KiB", idle[0]);
    one("PSS, idle", "KiB", idle[1]);
    one("peak RSS", "KiB", status_kib(pid, "VmHWM:"));
    #[allow(clippy::cast_precision_loss)]
    one("peak PSS", "KiB", used as f64);
    one("RSS, idle again", "KiB", after[0]);
    one("PSS, idle again", "KiB", after[1]);
    drop(machine);
    drop(chat);
    figures
}

fn count(length: Duration) -> usize {
    PER_SECOND as usize * usize::try_from(length.as_secs()).expect("short")
}

#[track_caller]
fn drained(mux: &Mux, machine: &Machine, all: usize) {
    let told = || machine.read("/var/log/openclaw-cvm/mux.log");
    until(&format!("{all} answers; there are {}\n{}", mux.sent().len(), told()), 5 * PATIENCE, || {
        (mux.sent_count() >= all).then_some(())
    });
}

/// What a worker does for the event of this number.
fn deliver(mux: &Mux, base: usize) -> impl FnMut(usize) + '_ {
    let mut courier = mux.client(PATIENCE);
    move |n| {
        let session = format!("agent:main:telegram:direct:{}", n % SESSIONS);
        let event = message("telegram", &session, base + n + 1, &format!("message {n} of a bench"));
        let status = mux.deliver_by(&mut courier, &event);
        assert!(matches!(status, Ok(200..300)), "{status:?}");
    }
}

/// Does something [`PER_SECOND`] times a second, each at its time whether or not those before it are
/// done, and yields how many milliseconds after its time each was done.
fn pace<W: FnMut(usize)>(length: Duration, worker: impl Fn() -> W + Sync) -> Vec<f64> {
    let (next, all) = (AtomicUsize::new(0), count(length));
    let began = Instant::now() + Duration::from_millis(50);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..COURIERS)
            .map(|_| {
                scope.spawn(|| {
                    let (mut work, mut took) = (worker(), Vec::new());
                    loop {
                        let n = next.fetch_add(1, Ordering::SeqCst);
                        if n >= all {
                            return took;
                        }
                        let due =
                            began + Duration::from_secs(1) / PER_SECOND * u32::try_from(n).expect("few");
                        std::thread::sleep(due.saturating_duration_since(Instant::now()));
                        work(n);
                        took.push(due.elapsed().as_secs_f64() * 1e3);
                    }
                })
            })
            .collect();
        workers.into_iter().flat_map(|w| w.join().expect("no worker panics")).collect()
    })
}

/// The least that durability costs: one writer, one insert, one fsync an event.
fn floor(file: &Path, length: Duration) -> Vec<f64> {
    let db = Connection::open(file).expect("a database");
    db.execute_batch(
        "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; CREATE TABLE t(id TEXT PRIMARY KEY, event TEXT)",
    )
    .expect("a table");
    let db = std::sync::Mutex::new(db);
    pace(length, || {
        |n| {
            let event =
                message("telegram", "agent:main:telegram:direct:1", n, "message of a bench").to_string();
            let db = db.lock().expect("no worker panics");
            db.execute("INSERT INTO t VALUES (?, ?)", (n.to_string(), event)).expect("a row");
        }
    })
}

fn quantiles(who: &str, mut took: Vec<f64>) -> [Figure; 3] {
    took.sort_by(f64::total_cmp);
    let row = |what, per_mille: usize| {
        let value = took[(took.len() - 1) * per_mille / 1000];
        let target = if who == "cvm-mux" && per_mille == 990 { "<= 50" } else { "" };
        Figure::new(what, who, "ms", vec![value], target)
    };
    [row("due to 2xx, p50", 500), row("due to 2xx, p99", 990), row("due to 2xx, most", 1000)]
}

/// User and system time of a process.
fn processor_seconds(pid: nix::unistd::Pid) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
    let ticks = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok()).unwrap_or(f64::NAN);
    // Fields 14 and 15, counted from 1; the ticks of Linux on x86-64.
    (ticks(11) + ticks(12)) / 100.0
}

/// The largest share of memory that was seen.
#[derive(Default)]
struct Peak {
    over: AtomicBool,
    pss_kib: AtomicUsize,
}

impl Peak {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    fn watch(&self, pid: nix::unistd::Pid) {
        while !self.over.load(Ordering::SeqCst) {
            self.pss_kib.fetch_max(rollup(pid, "Pss:").max(0.0) as usize, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(500));
        }
    }
}
