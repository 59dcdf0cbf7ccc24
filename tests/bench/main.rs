//! `make bench`: what the supervisor costs, each figure beside its peers in the same run.
//!
//! Medians of at least 15 rounds, rounds of all contestants interleaved, so that a noisy host
//! is noisy for everybody. A table for people, `target/bench/core.json` for machines. Nothing
//! here fails because of a number.

mod contestants;
mod figures;

use figures::{Figure, Table};
use std::path::Path;

/// Rounds of each figure; the median of fewer would be luck.
const ROUNDS: usize = 15;

fn main() {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("cvm-bench: throw-away machines need root");
        return;
    }
    let mut table = Table::default();
    step(&mut table, "boot: exec of process 1 to exec of the gateway, dockerd on", figures::boot);
    step(&mut table, "orphans: 10,000 of them, start to end", figures::orphans);
    step(&mut table, "restart: death of a service to its new exec, delay 0", figures::restart);
    step(&mut table, "memory and wake-ups of process 1, idle", figures::idle);
    table.print();
    let path = cvm_harness::machine::repository().join("target/bench/core.json");
    match table.save(&path) {
        Ok(()) => println!("\nWritten to {}", shown(&path)),
        Err(error) => eprintln!("cvm-bench: {}: {error}", path.display()),
    }
}

fn step(table: &mut Table, name: &str, measure: fn() -> Vec<Figure>) {
    eprintln!("== {name}");
    table.figures.extend(measure());
}

fn shown(path: &Path) -> String {
    path.strip_prefix(cvm_harness::machine::repository()).unwrap_or(path).display().to_string()
}
