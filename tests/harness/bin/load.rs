//! Loads that write down what they did, in a place that outlives the machine: before it is done and
//! after. The clock is the host's, which is the same in every machine on it.

use cvm_harness::dice::Dice;
use cvm_harness::sqlite::{TABLE, sum_of};
use cvm_harness::versioned::{make_room, point, write};
use rusqlite::Connection;
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
    let mut there: Vec<(String, u64)> = Vec::new();
    let mut links: Vec<String> = Vec::new();
    for id in 1u64.. {
        let pick = usize::try_from(dice.up_to(there.len().max(1) as u64)).unwrap_or(0);
        let name = format!("d{}/f{id}", dice.up_to(8));
        match dice.up_to(14) {
            0..=3 => {
                log.say(&format!("is {id} {name} {id}"));
                write(&dir.join(&name), id, &mut dice);
                there.push((name, id));
            }
            4..=6 if !there.is_empty() => {
                log.say(&format!("is {id} {} {id}", there[pick].0));
                write(&dir.join(&there[pick].0), id, &mut dice);
                there[pick].1 = id;
            }
            7..=8 if !there.is_empty() => {
                let old = std::mem::replace(&mut there[pick].0, name.clone());
                log.say(&format!("moved {id} {old} {name}"));
                rename(&dir.join(&old), &dir.join(&name));
            }
            9 if !there.is_empty() => {
                let (other, version) = there[pick].clone();
                log.say(&format!("is {id} {name} {version}"));
                make_room(&dir.join(&name));
                fs::hard_link(dir.join(other), dir.join(&name)).expect("a file can have two names");
                there.push((name, version));
            }
            10 => {
                let name = format!("d{}/l{}", dice.up_to(8), dice.up_to(4));
                log.say(&format!("is {id} {name} {id}"));
                point(&dir.join(&name), id);
                if !links.contains(&name) {
                    links.push(name);
                }
            }
            11 if !there.is_empty() => {
                let (old, _) = there[pick].0.rsplit_once('/').expect("a name below");
                let (old, new) = (format!("{old}/"), format!("moved-{id}/"));
                let below = there.iter_mut().map(|(name, _)| name).chain(&mut links);
                let moved: Vec<(String, String)> = below
                    .filter(|name| name.starts_with(&old))
                    .map(|name| {
                        let to = name.replacen(&old, &new, 1);
                        (std::mem::replace(name, to.clone()), to)
                    })
                    .collect();
                for (old, new) in &moved {
                    log.say(&format!("moved {id} {old} {new}"));
                }
                // As mv does, where a directory cannot be moved as one.
                if fs::rename(dir.join(&old), dir.join(&new)).is_err() {
                    for (old, new) in &moved {
                        rename(&dir.join(old), &dir.join(new));
                    }
                }
            }
            12 if !links.is_empty() => {
                let old = links.remove(0);
                log.say(&format!("gone {id} {old}"));
                fs::remove_file(dir.join(&old)).expect("a link can be removed");
            }
            _ if !there.is_empty() => {
                let (old, _) = there.swap_remove(pick);
                log.say(&format!("gone {id} {old}"));
                fs::remove_file(dir.join(&old)).expect("a file can be removed");
            }
            _ => continue,
        }
        log.say(&format!("end {id}"));
        std::thread::sleep(Duration::from_millis(dice.up_to(40)));
    }
}

fn rename(old: &Path, new: &Path) {
    make_room(new);
    fs::rename(old, new).expect("a file can be renamed");
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
