//! The figures, and the table they go into.

use crate::ROUNDS;
use crate::contestants::{self, product, script, supervisors};
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Machine, until};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Idle time over which wake-ups are counted, for all contestants at once.
const WINDOW: Duration = Duration::from_secs(4);
/// What the 10,000 orphans are.
const ORPHANS: &str = "10000";

/// One row.
pub(crate) struct Figure {
    pub(crate) what: &'static str,
    pub(crate) who: String,
    pub(crate) unit: &'static str,
    pub(crate) values: Vec<f64>,
    pub(crate) target: &'static str,
}

#[derive(Default)]
pub(crate) struct Table {
    pub(crate) figures: Vec<Figure>,
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

impl Table {
    pub(crate) fn print(&self) {
        println!(
            "\n{:<34} {:<14} {:>10} {:>10} {:>10}  {:<6} {:>3}  target",
            "figure", "who", "median", "least", "most", "unit", "n"
        );
        let mut last = "";
        for f in &self.figures {
            let what = if f.what == last { "" } else { f.what };
            last = f.what;
            let lowest = f.values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = f.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            println!(
                "{what:<34} {:<14} {:>10.2} {lowest:>10.2} {most:>10.2}  {:<6} {:>3}  {}",
                f.who,
                median(&f.values),
                f.unit,
                f.values.len(),
                f.target
            );
        }
    }

    /// What was measured before, and is not in this table, stays.
    pub(crate) fn save(&self, path: &Path) -> std::io::Result<()> {
        let is_new = |row: &serde_json::Value| {
            self.figures.iter().any(|f| row["figure"] == f.what && row["who"] == f.who.as_str())
        };
        let before = fs::read(path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let mut rows: Vec<serde_json::Value> = before.unwrap_or_default();
        rows.retain(|row| !is_new(row));
        let fresh = self.figures.iter().map(|f| {
            serde_json::json!({
                "figure": f.what, "who": f.who, "unit": f.unit, "median": median(&f.values),
                "rounds": f.values.len(), "values": f.values, "target": f.target,
            })
        });
        rows.extend(fresh);
        fs::create_dir_all(path.parent().unwrap_or(Path::new(".")))?;
        fs::write(path, serde_json::to_string_pretty(&rows)? + "\n")
    }
}

/// The microseconds that `cvm-victim stamp` wrote, oldest first.
fn stamps(text: &str) -> Vec<f64> {
    text.lines().filter_map(|l| l.parse().ok()).collect()
}

fn now_us() -> f64 {
    let t =
        nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).expect("there is a monotonic clock");
    Duration::from(t).as_secs_f64() * 1e6
}

/// Waits for the `nth` stamp (from 0) in a file inside.
fn nth_stamp(machine: &Machine, file: &str, nth: usize) -> f64 {
    until(&format!("stamp {nth} in {file}; {}", machine.output()), PATIENCE, || {
        stamps(&machine.read(file)).get(nth).copied()
    })
}

pub(crate) fn boot() -> Vec<Figure> {
    let boot_of = |machine: &Machine| {
        let began = nth_stamp(machine, "/tmp/began", 0);
        (nth_stamp(machine, "/data/openclaw/executed", 0) - began) / 1000.0
    };
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        eprint!("\r   round {}/{ROUNDS}", round + 1);
        let machine = product().start();
        ours.push(boot_of(&machine));
        drop(machine);
        let machine = script().start();
        theirs.push(boot_of(&machine));
    }
    eprintln!();
    let what = "boot to exec of the gateway";
    vec![
        Figure { what, who: "cvm-init".into(), unit: "ms", values: ours, target: "<= 30" },
        Figure { what, who: "shell script".into(), unit: "ms", values: theirs, target: "" },
    ]
}

pub(crate) fn orphans() -> Vec<Figure> {
    let inits = contestants::small_inits();
    let mut values: Vec<Vec<f64>> = vec![Vec::new(); inits.len()];
    for round in 0..ROUNDS {
        eprint!("\r   round {}/{ROUNDS}", round + 1);
        for ((_, words), values) in inits.iter().zip(&mut values) {
            let mut command: Vec<&str> = words.iter().map(String::as_str).collect();
            command.extend(["cvm-victim", "orphans", ORPHANS]);
            let mut machine = contestants::bare(&command).start();
            let began = Instant::now();
            machine.wait();
            values.push(began.elapsed().as_secs_f64() * 1e3);
        }
    }
    eprintln!();
    inits
        .iter()
        .zip(values)
        .map(|((name, _), values)| {
            let target = if *name == "cvm-init --" { "<= tini" } else { "" };
            Figure { what: "10,000 orphans", who: (*name).into(), unit: "ms", values, target }
        })
        .collect()
}

/// From SIGKILL of the gateway's stub to the first instruction of the next one, beside a bare
/// fork and exec of the same program.
pub(crate) fn restart() -> Vec<Figure> {
    let machine = product().environment("ENABLE_DOCKER", "0").start();
    let stub = cvm_harness::machine::binaries().join("cvm-victim");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let file = scratch.path().join("stamp");
    let (mut ours, mut bare) = (Vec::new(), Vec::new());
    nth_stamp(&machine, "/data/openclaw/executed", 0);
    for round in 0..2 * ROUNDS {
        let victim = until("the gateway's stub runs", PATIENCE, || {
            machine.processes().into_iter().find(|p| p.arguments.starts_with(cvm_blueprint::paths::NODE))
        });
        let outside = machine.outside(victim.pid.into());
        let began = now_us();
        let _ = nix::sys::signal::kill(outside, nix::sys::signal::Signal::SIGKILL);
        ours.push((nth_stamp(&machine, "/data/openclaw/executed", round + 1) - began) / 1000.0);
        let began = now_us();
        let status = std::process::Command::new(&stub).arg("stamp").arg(&file).status();
        assert!(status.is_ok_and(|s| s.success()));
        let stamp =
            stamps(&fs::read_to_string(&file).unwrap_or_default()).last().copied().unwrap_or(f64::NAN);
        bare.push((stamp - began) / 1000.0);
    }
    let what = "death of a service to its new exec";
    vec![
        Figure { what, who: "cvm-init".into(), unit: "ms", values: ours, target: "<= bare + 5" },
        Figure { what, who: "bare fork+exec".into(), unit: "ms", values: bare, target: "" },
    ]
}

/// Memory and wake-ups of all contestants, idle beside each other.
pub(crate) fn idle() -> Vec<Figure> {
    let all: Vec<(&str, Machine)> =
        supervisors().into_iter().filter_map(|c| Some((c.name, (c.start)()?))).collect();
    if let Some((_, ours)) = all.first() {
        ours.service_in("gateway", &["ready"]);
        ours.service_in("dockerd", &["ready"]);
    }
    // Whatever a start leaves to do is done before the first window.
    std::thread::sleep(Duration::from_secs(5));
    let mut rss = vec![Vec::new(); all.len()];
    let mut pss = vec![Vec::new(); all.len()];
    let mut wakes = vec![Vec::new(); all.len()];
    for round in 0..ROUNDS {
        eprint!("\r   round {}/{ROUNDS}", round + 1);
        let before: Vec<f64> = all.iter().map(|(_, m)| switches(m)).collect();
        let began = Instant::now();
        std::thread::sleep(WINDOW);
        let seconds = began.elapsed().as_secs_f64();
        for (n, (_, machine)) in all.iter().enumerate() {
            wakes[n].push((switches(machine) - before[n]) / seconds);
            rss[n].push(rollup(machine.pid(), "Rss:"));
            pss[n].push(rollup(machine.pid(), "Pss:"));
        }
    }
    eprintln!();
    let peak: Vec<Vec<f64>> = all.iter().map(|(_, m)| vec![status_kib(m.pid(), "VmHWM:")]).collect();
    let mut figures = Vec::new();
    let rows = [
        ("RSS of process 1, idle", "KiB", "<= 4096", rss),
        ("PSS of process 1, idle", "KiB", "", pss),
        ("peak RSS of process 1", "KiB", "", peak),
        ("wake-ups of process 1, idle", "1/s", "< 1", wakes),
    ];
    for (what, unit, ours, columns) in rows {
        for ((who, _), values) in all.iter().zip(columns) {
            let target = if *who == "cvm-init" { ours } else { "" };
            figures.push(Figure { what, who: (*who).into(), unit, values, target });
        }
    }
    figures
}

fn switches(machine: &Machine) -> f64 {
    let status = fs::read_to_string(format!("/proc/{}/status", machine.pid())).unwrap_or_default();
    status.lines().filter(|l| l.contains("ctxt_switches")).filter_map(number).sum()
}

/// Memory of a process, in KiB.
pub(crate) fn rollup(pid: nix::unistd::Pid, key: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    text.lines().find(|l| l.starts_with(key)).and_then(number).unwrap_or(f64::NAN)
}

pub(crate) fn status_kib(pid: nix::unistd::Pid, key: &str) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    text.lines().find(|l| l.starts_with(key)).and_then(number).unwrap_or(f64::NAN)
}

fn number(line: &str) -> Option<f64> {
    line.split_ascii_whitespace().nth(1)?.parse().ok()
}
