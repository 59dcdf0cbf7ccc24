//! `make bench`: what the supervisor costs, each figure beside its peers in the same run.
//!
//! Medians of at least 15 rounds (5 for the image, whose rounds are long), rounds of all contestants
//! interleaved, so that a noisy host is noisy for everybody. A table for people, `target/bench/core.json`, `mux.json`,
//! `image.json` and `storage.json` for machines. Nothing here fails because of a number.
//! `cvm-bench core|mux|image|lag|commits|files|restore|many` measures a part.
//!
//! With `make bench BESIDE=COMMIT`, figures of the supervisor and the storage stand beside what that
//! commit's binaries did in the same run, rounds of both in turn where a figure has rounds.

mod contestants;
mod figures;
mod image;
mod mux;
mod storage;

use figures::{Figure, Table, of_each_build};
use std::path::Path;

/// Rounds of each figure; the median of fewer would be luck.
const ROUNDS: usize = 15;

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("cvm-bench: throw-away machines need root");
        return;
    }
    let wanted = std::env::args().nth(1);
    let wants = |part: &str| wanted.as_deref().is_none_or(|w| w == part);
    if wants("core") {
        let mut table = Table::default();
        step(&mut table, "boot: exec of process 1 to exec of the gateway, dockerd on", figures::boot);
        step(&mut table, "orphans: 10,000 of them, start to end", figures::orphans);
        step(&mut table, "restart: death of a service to its new exec, delay 0", figures::restart);
        step(&mut table, "memory and wake-ups of process 1, idle", figures::idle);
        finish(&table, "core");
    }
    if wants("mux") {
        let mut table = Table::default();
        step(&mut table, "mux: 200 events a second for a minute", mux::deliveries);
        finish(&table, "mux");
    }
    if wants("image") {
        let mut table = Table::default();
        step(&mut table, "image: docker run to the real gateway", image::boot);
        // Figures of an earlier run must not look like this one's.
        if !table.figures.is_empty() {
            finish(&table, "image");
        }
    }
    let mut table = Table::default();
    if wants("lag") {
        step(&mut table, "lag: from a commit to the bucket", storage::lag);
    }
    if wants("commits") {
        step(&mut table, "commits on /data and elsewhere", || of_each_build(storage::transactions));
    }
    if wants("files") {
        step(&mut table, "10,000 files: push, start, idle", || of_each_build(storage::of_ten_thousand_files));
    }
    if wants("restore") {
        step(&mut table, "10,000 files: restore", || of_each_build(storage::restore));
    }
    if wants("many") {
        let name = "100,000 files: push, start, idle (half an hour)";
        step(&mut table, name, || of_each_build(storage::of_a_hundred_thousand_files));
    }
    if !table.figures.is_empty() {
        finish(&table, "storage");
    }
}

fn finish(table: &Table, name: &str) {
    table.print();
    let path = cvm_harness::machine::repository().join(format!("target/bench/{name}.json"));
    match table.save(&path) {
        Ok(()) => println!("\nWritten to {}", shown(&path)),
        Err(error) => eprintln!("cvm-bench: {}: {error}", path.display()),
    }
}

fn step(table: &mut Table, name: &str, measure: impl Fn() -> Vec<Figure>) {
    eprintln!("== {name}");
    table.figures.extend(measure());
}

fn shown(path: &Path) -> String {
    path.strip_prefix(cvm_harness::machine::repository()).unwrap_or(path).display().to_string()
}
