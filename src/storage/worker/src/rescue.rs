//! `cvm-storage restore DIR`: the whole state into an empty directory, on any machine.
//!
//! Refuses a directory that is not empty, and to touch the bucket: ownership stays where it is.
//! May import: `bucket`, `chain`, `fault`, `fetch`, `index`, `opening`, `owner`, `volume`.

use crate::bucket::{Bucket, Survey};
use crate::chain::{Chain, Loaded};
use crate::entry::{Entry, Path};
use crate::fault::{Accepted, Fault};
use crate::fetch::{self, Fetcher, Got, Wanted};
use crate::index::Index;
use crate::manifest::{Anchor, Word};
use crate::{opening, owner, volume};
use cvm_protocol::storage::StorageSpec;
use std::io::{IsTerminal as _, Write as _};
use std::path::Path as FsPath;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Wide enough to see it move, and to leave room beside it on 80 columns.
const BAR: usize = 24;

/// What to do about it here, where no worker runs that could be told to accept it.
pub(crate) fn say(fault: &Fault) -> String {
    let remedy = match fault {
        Fault::Suspicious(_) => {
            "look at the bucket and its versions; `cvm storage restore --accept` restores what the manifest names"
        }
        Fault::Unadopted { .. } => {
            "if you know that it is the one you mean, `cvm storage restore --accept` restores it"
        }
        other => other.remedy(),
    };
    format!("{fault}; {remedy}")
}

/// How many files did not come back. Who accepts what is wrong with the manifest is told what it is.
pub(crate) fn restore(spec: &StorageSpec, to: &FsPath, accept: bool) -> Result<u64, Fault> {
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
    let (index, loaded) = load(spec, &bucket, &scratch, accept).inspect_err(|_| {
        // The next try is to find the directory empty.
        let _ = std::fs::remove_dir_all(&scratch);
    })?;
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
    let got = fetcher.files_in_haste(wanted, to)?;
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

/// The manifest, of which nothing is missing that its last owner had written.
fn load(
    spec: &StorageSpec,
    bucket: &Bucket,
    scratch: &FsPath,
    accept: bool,
) -> Result<(Index, Loaded), Fault> {
    let whose = opening::uid_gid(&spec.user);
    let anchor = spec.anchor.as_deref().and_then(Anchor::parse);
    let mut accepted = Accepted::default();
    let mut attempt = 0_u32;
    loop {
        let loaded = || {
            let index = Index::open(&scratch.join(format!("index-{attempt}")))?;
            // First: an owner that writes meanwhile has then come no further than what is read.
            let reached = match owner::read(bucket) {
                Err(fault) if accepted.includes(&fault) => 0,
                record => record?.map_or(0, |(record, _)| record.generation),
            };
            let loaded = Chain::load(bucket, &index, whose, anchor.clone(), &accepted, accept)?;
            loaded.chain.lacks(reached).map_or(Ok(()), |why| accepted.or_refuse(why))?;
            Ok((index, loaded))
        };
        match loaded() {
            Err(fault @ Fault::Suspicious(_)) if accept && !accepted.includes(&fault) => {
                eprintln!("{fault}: accepted");
                accepted.refusal(&fault);
                attempt += 1;
            }
            other => return other,
        }
    }
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
        print!("\r\x1b[K{}  {line}", bar(if bytes == 0 { (done, files) } else { (had, bytes) }));
        let _ = std::io::stdout().flush();
    } else {
        println!("{line}");
    }
}

fn bar((done, of): (u64, u64)) -> String {
    let full = u128::from(done.min(of)) * BAR as u128 / u128::from(of.max(1));
    let full = usize::try_from(full).unwrap_or(BAR);
    format!("[{}{}]", "=".repeat(full), " ".repeat(BAR - full))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_is_as_full_as_it_is_done_and_never_longer() {
        let full = |done, of| bar((done, of)).matches('=').count();
        assert_eq!([full(0, 8), full(4, 8), full(8, 8), full(9, 8)], [0, BAR / 2, BAR, BAR]);
        assert_eq!([full(0, 0), full(u64::MAX, u64::MAX)], [0, BAR]);
        assert_eq!(bar((1, 3)).len(), BAR + 2);
    }
}
