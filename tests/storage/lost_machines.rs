//! Machines that are lost at any moment: the next one has all that the worker had called in the bucket.
//!
//! `CVM_SOAK=1` loses more of them. Moments are chosen by a seed.

use crate::fixtures::TURNS;
use crate::fixtures::load::Load;
use crate::fixtures::machines::no_incidents;
use crate::fixtures::programs::now_us;
use cvm_harness::machine::PATIENCE;
use cvm_harness::sqlite::examine_bytes;
use cvm_harness::{Cloud, Dice, Machine, difference, digest, flush, independent, rounds, storage, until};
use std::fs;
use std::time::Duration;

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
fn written_last_and_pushed(machine: &Machine, life: usize) -> i64 {
    let written = now_us();
    let last = format!("openclaw/workspace/last-{life}");
    machine.ok(&["sh", "-c", &format!("echo {life} > /data/{last}")]);
    until("the bucket has what was written last, and nothing is pending", PATIENCE, || {
        let has = machine.exec(&["cvm", "storage", "ls", &last]).status.success();
        let status = storage(machine);
        let says = status["pending_files"] == 0 && status["oldest_unreplicated_ms"].is_null();
        (has && says).then_some(())
    });
    written
}

#[test]
fn a_machine_lost_at_any_moment_comes_back_whole() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let outside = tempfile::tempdir().expect("a temporary directory");
    let lives = rounds(6, 50);
    let mut dice = Dice(0xc0ff_ee00_0000_0001);
    let mut last: Option<(Load, Told, i64)> = None;
    let mut lags = Vec::new();
    let mut older: Vec<Vec<String>> = Vec::new();
    for life in 0..=lives {
        let machine = cloud.machine().bind(outside.path(), "/outside").ready();
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
            certain = written_last_and_pushed(&machine, life);
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
