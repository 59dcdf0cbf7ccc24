//! `cvm-storage restore DIR`: the whole state into an empty directory, on any machine.
//!
//! Refuses a directory that is not empty, and to touch the bucket: ownership stays where it is.
//! May import: `bucket`, `chain`, `fault`, `fetch`, `index`, `opening`, `volume`.

use crate::bucket::{Bucket, Survey};
use crate::chain::Chain;
use crate::entry::{Entry, Path};
use crate::fault::{Accepted, Fault};
use crate::fetch::{self, Fetcher, Got, Wanted};
use crate::index::Index;
use crate::manifest::{Head, Word};
use crate::{opening, volume};
use cvm_blueprint::storage::StorageSpec;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path as FsPath;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How many files did not come back.
pub(crate) fn restore(spec: &StorageSpec, to: &FsPath) -> Result<u64, Fault> {
    std::fs::create_dir_all(to)?;
    if std::fs::read_dir(to)?.next().is_some() {
        return Err(Fault::config(format!("{} is not empty", to.display())));
    }
    let bucket = Bucket::new(spec)?;
    match bucket.survey()? {
        Survey::Managed => {}
        Survey::Empty => {
            return Err(Fault::config("the prefix is empty: is it S3_BUCKET and S3_PREFIX of the instance?"));
        }
        Survey::Unmanaged | Survey::Bereft => {
            return Err(Fault::config(
                "the bucket has no manifest; stock rclone reads it: see S3_STORAGE.md",
            ));
        }
    }
    let scratch = to.join(".cvm-restore");
    std::fs::create_dir_all(&scratch)?;
    let index = Index::open(&scratch.join("index"))?;
    let owner = opening::uid_gid(&spec.user);
    let anchor = spec.anchor.as_deref().and_then(Head::parse_anchor);
    let loaded = Chain::load(&bucket, &index, owner, anchor, &Accepted::default())?;
    println!("Generation {} of {}/{}", loaded.chain.head.generation, spec.bucket, spec.prefix);
    let (rows, _) = index.standing()?;
    let entries: Vec<(Path, Entry)> = rows.iter().map(|(p, r)| (p.clone(), r.entry.clone())).collect();
    let wanted: Vec<Wanted> = rows
        .into_iter()
        .filter(|(_, row)| row.entry.is_file())
        .map(|(path, row)| {
            let intended = loaded.intents.iter().filter(|l| l.path == path).filter_map(|l| match &l.word {
                Word::WillBe(entry) => Some(entry.clone()),
                _ => None,
            });
            Wanted { path: path.clone(), may_be: std::iter::once(row.entry).chain(intended).collect() }
        })
        .collect();
    let (files, bytes) = fetch::total(&wanted);
    fetch::skeleton(&entries, to)?;
    let shown = Mutex::new(None);
    let progress = |done: u64, had: u64| show(&shown, done.min(files), files, had.min(bytes), bytes);
    let parts = scratch.join("parts");
    let fetcher =
        Fetcher { bucket: &bucket, whole: index.totals()?, parts: parts.clone(), progress: &progress };
    let got = fetcher.files(wanted, to)?;
    if std::io::stdout().is_terminal() {
        println!();
    }
    let (mut lost, mut promised) = (0, 0);
    let mut restored: Vec<(Path, Entry)> = entries.into_iter().filter(|(_, e)| !e.is_file()).collect();
    for one in got {
        match one {
            Got::Good(path, entry) => restored.push((path, entry)),
            // Its push was cut short: the bucket never had it.
            Got::Bad(path, _) if index.get(&path)?.is_some_and(|row| row.promised) => promised += 1,
            Got::Bad(path, why) => {
                lost += 1;
                eprintln!("{path}: {why}");
            }
            Got::Later(path, fault) => {
                lost += 1;
                eprintln!("{path}: {fault}");
            }
        }
    }
    fetch::finish(&restored, to, &parts)?;
    drop(index);
    std::fs::remove_dir_all(&scratch)?;
    if !volume::gives_away() {
        println!("All of it is yours: owners come back when root restores");
    }
    println!("{} of {files} files restored to {}", files - lost - promised, to.display());
    Ok(lost)
}

/// One line that is redrawn on a terminal, and a line every few seconds elsewhere.
fn show(shown: &Mutex<Option<Instant>>, done: u64, files: u64, had: u64, bytes: u64) {
    let terminal = std::io::stdout().is_terminal();
    let every = if terminal { Duration::from_millis(100) } else { Duration::from_secs(5) };
    let Ok(mut last) = shown.try_lock() else { return };
    if last.is_some_and(|at: Instant| at.elapsed() < every) {
        return;
    }
    *last = Some(Instant::now());
    let line = format!("{done} of {files} files, {} of {} MiB", had >> 20, bytes >> 20);
    if terminal {
        print!("\r\x1b[K{line}");
        let _ = std::io::stdout().flush();
    } else {
        println!("{line}");
    }
}
