//! The figures, and the table they go into.

use crate::ROUNDS;
use crate::contestants::{self, builds, product, script, supervisors};
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Machine, until};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Idle time over which wake-ups are counted, for all contestants at once.
const WINDOW: Duration = Duration::from_secs(4);
/// How [`contestants::small_inits`] calls ours.
const OUR_SMALL_INIT: &str = "cvm-init --";
/// What the 10,000 orphans are.
const ORPHANS: &str = "10000";

/// One row.
pub(crate) struct Figure {
    pub(crate) what: &'static str,
    pub(crate) who: String,
    pub(crate) unit: &'static str,
    pub(crate) values: Vec<f64>,
    /// The same of the commit that this one is measured beside.
    pub(crate) beside: Vec<f64>,
    pub(crate) target: &'static str,
}

impl Figure {
    pub(crate) fn new(
        what: &'static str,
        who: impl Into<String>,
        unit: &'static str,
        values: Vec<f64>,
        target: &'static str,
    ) -> Self {
        Self { what, who: who.into(), unit, values, beside: Vec::new(), target }
    }

    /// Ours: values of each of [`builds`].
    fn ours(
        what: &'static str,
        who: &'static str,
        unit: &'static str,
        values: Vec<Vec<f64>>,
        target: &'static str,
    ) -> Self {
        let mut values = values.into_iter();
        let this = values.next().unwrap_or_default();
        Self { beside: values.next().unwrap_or_default(), ..Self::new(what, who, unit, this, target) }
    }
}

/// What `measure` finds of each of [`builds`], one after the other, beside each other.
pub(crate) fn of_each_build(measure: impl Fn() -> Vec<Figure>) -> Vec<Figure> {
    let mut found = builds().iter().map(|build| {
        if let Some(name) = &build.name {
            eprintln!("   the same at {name}");
        }
        build.chosen(&measure)
    });
    let mut figures = found.next().unwrap_or_default();
    for other in found.flatten() {
        let same = figures.iter_mut().find(|f| f.what == other.what && f.who == other.who);
        if let Some(figure) = same {
            figure.beside = other.values;
        }
    }
    figures
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
        let beside = builds().iter().find_map(|build| build.name.as_ref());
        let beside = beside.map(|name| format!("at {name}"));
        println!(
            "\n{:<34} {:<14} {:>10} {:>10} {:>10}  {:<6} {:>3} {:>10}  target",
            "figure",
            "who",
            "median",
            "least",
            "most",
            "unit",
            "n",
            beside.as_deref().unwrap_or_default()
        );
        let mut last = "";
        for f in &self.figures {
            let what = if f.what == last { "" } else { f.what };
            last = f.what;
            let lowest = f.values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = f.values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let beside = (!f.beside.is_empty()).then(|| format!("{:.2}", median(&f.beside)));
            println!(
                "{what:<34} {:<14} {:>10.2} {lowest:>10.2} {most:>10.2}  {:<6} {:>3} {:>10}  {}",
                f.who,
                median(&f.values),
                f.unit,
                f.values.len(),
                beside.unwrap_or_default(),
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
        let commit = builds().iter().find_map(|build| build.name.as_ref());
        let fresh = self.figures.iter().map(|f| {
            let mut row = serde_json::json!({
                "figure": f.what, "who": f.who, "unit": f.unit, "median": median(&f.values),
                "rounds": f.values.len(), "values": f.values, "target": f.target,
            });
            if !f.beside.is_empty() {
                row["beside"] =
                    serde_json::json!({ "commit": commit, "median": median(&f.beside), "values": f.beside });
            }
            row
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
    let (mut ours, mut theirs) = (vec![Vec::new(); builds().len()], Vec::new());
    for round in 0..ROUNDS {
        eprint!("\r   round {}/{ROUNDS}", round + 1);
        for (build, ours) in builds().iter().zip(&mut ours) {
            let machine = build.chosen(|| product().start());
            ours.push(boot_of(&machine));
        }
        let machine = script().start();
        theirs.push(boot_of(&machine));
    }
    eprintln!();
    let what = "boot to exec of the gateway";
    vec![
        Figure::ours(what, "cvm-init", "ms", ours, "<= 30"),
        Figure::new(what, "shell script", "ms", theirs, ""),
    ]
}

pub(crate) fn orphans() -> Vec<Figure> {
    let inits = contestants::small_inits();
    let mut values = vec![vec![Vec::new(); builds().len()]; inits.len()];
    for round in 0..ROUNDS {
        eprint!("\r   round {}/{ROUNDS}", round + 1);
        for ((name, words), values) in inits.iter().zip(&mut values) {
            let mut command: Vec<&str> = words.iter().map(String::as_str).collect();
            command.extend(["cvm-victim", "orphans", ORPHANS]);
            // The peers are no better for another commit of ours.
            let count = if *name == OUR_SMALL_INIT { builds().len() } else { 1 };
            for (build, values) in builds().iter().zip(values).take(count) {
                let mut machine = build.chosen(|| contestants::bare(&command).start());
                let began = Instant::now();
                machine.wait();
                values.push(began.elapsed().as_secs_f64() * 1e3);
            }
        }
    }
    eprintln!();
    inits
        .iter()
        .zip(values)
        .map(|((name, _), values)| {
            let target = if *name == OUR_SMALL_INIT { "<= tini" } else { "" };
            Figure::ours("10,000 orphans", name, "ms", values, target)
        })
        .collect()
}

/// From SIGKILL of the gateway's stub to the first instruction of the next one, beside a bare
/// fork and exec of the same program.
pub(crate) fn restart() -> Vec<Figure> {
    let start = || product().environment("ENABLE_DOCKER", "0").start();
    let machines: Vec<Machine> = builds().iter().map(|build| build.chosen(start)).collect();
    let stub = cvm_harness::machine::binaries().join("cvm-victim");
    let scratch = tempfile::tempdir().expect("a temporary directory");
    let file = scratch.path().join("stamp");
    let (mut ours, mut bare) = (vec![Vec::new(); machines.len()], Vec::new());
    for machine in &machines {
        nth_stamp(machine, "/data/openclaw/executed", 0);
    }
    for round in 0..2 * ROUNDS {
        for (machine, ours) in machines.iter().zip(&mut ours) {
            let victim = until("the gateway's stub runs", PATIENCE, || {
                let is_stub = |arguments: &str| arguments.starts_with(cvm_protocol::paths::NODE);
                machine.processes().into_iter().find(|p| is_stub(&p.arguments))
            });
            let outside = machine.outside(victim.pid.into());
            let began = now_us();
            let _ = nix::sys::signal::kill(outside, nix::sys::signal::Signal::SIGKILL);
            ours.push((nth_stamp(machine, "/data/openclaw/executed", round + 1) - began) / 1000.0);
        }
        let began = now_us();
        let status = std::process::Command::new(&stub).arg("stamp").arg(&file).status();
        assert!(status.is_ok_and(|s| s.success()));
        let stamp =
            stamps(&fs::read_to_string(&file).unwrap_or_default()).last().copied().unwrap_or(f64::NAN);
        bare.push((stamp - began) / 1000.0);
    }
    let what = "death of a service to its new exec";
    vec![
        Figure::ours(what, "cvm-init", "ms", ours, "<= bare + 5"),
        Figure::new(what, "bare fork+exec", "ms", bare, ""),
    ]
}

/// Memory and wake-ups of all contestants, idle beside each other.
pub(crate) fn idle() -> Vec<Figure> {
    let all: Vec<(&str, Machine)> =
        supervisors().into_iter().filter_map(|c| Some((c.name, c.start()?))).collect();
    for (_, ours) in all.iter().filter(|(name, _)| *name == "cvm-init") {
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
        let mut columns = columns.into_iter();
        let of_builds: Vec<Vec<f64>> = columns.by_ref().take(builds().len()).collect();
        figures.push(Figure::ours(what, "cvm-init", unit, of_builds, ours));
        let peers = all.iter().skip(builds().len()).zip(columns);
        figures.extend(peers.map(|((who, _), values)| Figure::new(what, *who, unit, values, "")));
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
