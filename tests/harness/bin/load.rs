//! Loads that write down what they did, in a place that outlives the machine: before it is done and
//! after. The clock is the host's, which is the same in every machine on it.

use cvm_harness::dice::Dice;
use cvm_harness::sqlite::{TABLE, sum_of};
use rusqlite::Connection;
use sha2::{Digest, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) fn now_us() -> i64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| t.tv_sec() * 1_000_000 + t.tv_nsec() / 1000)
}

/// One line at a time, each in one write: what was killed has written all of a line or nothing.
struct Log(File);

impl Log {
    fn open(file: &str) -> Self {
        Self(OpenOptions::new().create(true).append(true).open(file).expect("the log's place is there"))
    }

    fn say(&mut self, words: &str) {
        let line = format!("{} {words}\n", now_us());
        self.0.write_all(line.as_bytes()).expect("the log has room");
    }
}

/// `begin ID`, then a line for each path: `is PATH VERSION` or `gone PATH`; and `end ID`.
pub(crate) fn files(dir: &str, log: &str, seed: i32) {
    let (dir, mut log) = (PathBuf::from(dir), Log::open(log));
    fs::create_dir_all(&dir).expect("a directory can be made");
    let mut dice = Dice(u64::from(seed.unsigned_abs()) * 2 + 0x9e37_79b9);
    let mut there: Vec<String> = Vec::new();
    for id in 1u64.. {
        let pick = usize::try_from(dice.up_to(there.len().max(1) as u64)).unwrap_or(0);
        let name = format!("d{}/f{id}", dice.up_to(8));
        match dice.up_to(10) {
            0..=3 => {
                log.say(&format!("is {id} {name} {id}"));
                write(&dir.join(&name), id, &mut dice);
                there.push(name);
            }
            4..=6 if !there.is_empty() => {
                log.say(&format!("is {id} {} {id}", there[pick]));
                write(&dir.join(&there[pick]), id, &mut dice);
            }
            7..=8 if !there.is_empty() => {
                let old = std::mem::replace(&mut there[pick], name.clone());
                log.say(&format!("moved {id} {old} {name}"));
                fs::create_dir_all(dir.join(&name).parent().expect("a name below")).expect("a directory");
                fs::rename(dir.join(&old), dir.join(&name)).expect("a file can be renamed");
            }
            _ if !there.is_empty() => {
                let old = there.swap_remove(pick);
                log.say(&format!("gone {id} {old}"));
                fs::remove_file(dir.join(&old)).expect("a file can be removed");
            }
            _ => continue,
        }
        log.say(&format!("end {id}"));
        std::thread::sleep(Duration::from_millis(dice.up_to(40)));
    }
}

/// A file that says which it is and whether it is whole, put in place as one step.
fn write(file: &Path, version: u64, dice: &mut Dice) {
    let length = dice.up_to(30_000);
    let mut body = Vec::new();
    while (body.len() as u64) < length {
        body.extend_from_slice(&dice.up_to(u64::MAX).to_le_bytes());
    }
    let sum = Sha256::digest(&body).iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
    let part = file.with_extension("part");
    fs::create_dir_all(file.parent().expect("a name below")).expect("a directory can be made");
    let mut bytes = format!("{version} {} {sum}\n", body.len()).into_bytes();
    bytes.extend(body);
    fs::write(&part, bytes).expect("a file can be written");
    fs::rename(part, file).expect("a file can be renamed");
}

fn open(database: &str) -> Connection {
    if let Some(parent) = Path::new(database).parent() {
        fs::create_dir_all(parent).expect("a directory can be made");
    }
    let db = Connection::open(database).expect("a database can be opened");
    db.busy_timeout(Duration::from_secs(20)).expect("a timeout can be set");
    db
}

/// `begin N`, `end N MICROSECONDS`.
pub(crate) fn rows(database: &str, mode: &str, every_ms: i32, log: &str) {
    let (mut db, mut log) = (open(database), Log::open(log));
    db.execute_batch(&format!("PRAGMA journal_mode = {mode}; {TABLE}")).expect("a table can be made");
    let writer = std::process::id().to_string();
    loop {
        let began = now_us();
        // Several write: the number is chosen inside of the transaction.
        let n = (|| {
            let transaction = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
            let n: i64 = transaction.query_row("SELECT coalesce(max(n), 0) + 1 FROM t", [], |r| r.get(0))?;
            log.say(&format!("begin {n}"));
            transaction.execute("INSERT INTO t VALUES (?, ?, ?)", (n, &writer, sum_of(n)))?;
            transaction.commit()?;
            Ok::<i64, rusqlite::Error>(n)
        })();
        match n {
            Ok(n) => log.say(&format!("end {n} {}", now_us() - began)),
            Err(error) => log.say(&format!("error {error}")),
        }
        std::thread::sleep(Duration::from_millis(u64::from(every_ms.unsigned_abs())));
    }
}

pub(crate) fn sql(database: &str, sql: &str) {
    let db = open(database);
    if let Err(error) = db.execute_batch(sql) {
        println!("error: {error}");
    }
    println!("done");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
        let _ = db.is_autocommit();
    }
}
