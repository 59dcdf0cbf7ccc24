//! What would come back from the bucket: `verify`, and restore drills.
//!
//! Runs beside the worker's loop, so that what the gateway writes meanwhile is pushed as ever. What
//! a push changes under a review is no finding: it is looked at again as what it has become.
//!
//! What is wrong in the bucket and good in the tree is sent again: the worker is told. An outage is
//! no finding.
//!
//! Refuses to write to the bucket, and to run twice at once. May import: `database`, `desk`,
//! `entry`, `fault`, `fetch`, `hydrate` (its remedy), `index`, `scan`, `volume`, `worker` (its orders).

use crate::chain::now_ms;
use crate::database;
use crate::desk::{Desk, Open};
use crate::entry::{Entry, Path};
use crate::fault::Fault;
use crate::fetch::{self, Fetcher, Got, Wanted};
use crate::hydrate;
use crate::index::Row;
use crate::scan::{Change, Fetched, Scanner};
use crate::volume::{self, Room};
use crate::worker::Order;
use cvm_protocol::storage::{Answer, Drill, Progress};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use tokio::sync::mpsc::UnboundedSender;

/// Files of a drill besides every database, and what is too large for one.
const SAMPLE: usize = 50;
const SAMPLE_BYTES: u64 = 64 << 20;
/// So much lies on the volume at once, or one file that is larger.
const PORTION_BYTES: u64 = 256 << 20;
/// Looks at a file that is pushed anew each time that it is looked at.
const TRIES: u32 = 5;
/// Of what the tree has good.
const AGAIN: &str = "; it is sent again from the tree";
const MENDED: &str = "nothing to do here: this goes when it has been sent";

/// Who asked, if anybody did.
type Asker = Option<UnboundedSender<Answer>>;

pub(crate) struct Review {
    pub(crate) open: Arc<Open>,
    pub(crate) desk: Arc<Desk>,
    pub(crate) sender: Sender<Order>,
}

/// What was read back.
#[derive(Default)]
struct ReadBack {
    wrong: Vec<(Path, String)>,
    /// Why some could not be read, which says nothing about them.
    fault: Option<Fault>,
    /// What there was no room for.
    skipped: HashSet<Path>,
}

impl ReadBack {
    /// In words, if there is any.
    fn left_out(&self) -> String {
        match self.skipped.len() {
            0 => String::new(),
            n => format!("; {n} were left out, for which the volume has no room"),
        }
    }
}

impl Review {
    /// Compares tree, manifest and bucket; `deep` reads everything back.
    pub(crate) fn verify(
        &self,
        fetched: &Fetched,
        deep: bool,
        to: &UnboundedSender<Answer>,
    ) -> Result<(String, bool), Fault> {
        let open = &self.open;
        let mut wrong = 0u64;
        let mut say = |text: String| {
            wrong += 1;
            let _ = to.send(Answer::Line { text });
        };
        let found = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, fetched).full()?;
        for path in found.changes.iter().map(Change::path).chain(&found.to_fetch) {
            say(format!("{path}: the tree differs from the bucket (not pushed yet)"));
        }
        let before = self.files()?;
        let mut known = self.objects(&before)?;
        let listed: HashMap<String, u64> = open
            .bucket
            .rclone
            .list_all(false)?
            .into_iter()
            .filter(|l| !l.name.starts_with(".cvm/"))
            .map(|l| (l.name, l.size))
            .collect();
        let after = self.files()?;
        known.extend(self.objects(&after)?);
        for (path, row) in before.iter().filter(|(path, row)| after.get(*path) == Some(*row) && !row.unsure) {
            let why = match listed.get(&path.object()) {
                None => "its object is missing from the bucket".to_owned(),
                Some(size) if *size != row.entry.size() => {
                    format!("its object has {size} bytes, the manifest says {}", row.entry.size())
                }
                Some(_) => continue,
            };
            let again = self.has_good(path)?;
            say(format!("{path}: {why}{}", if again { AGAIN } else { "" }));
            if again {
                self.send_again(path)?;
            }
        }
        for name in listed.keys().filter(|name| !known.contains(*name)) {
            let _ = to.send(Answer::Line {
                text: format!("{name}: an object that the manifest does not know; it is ignored"),
            });
        }
        let files = after.len();
        let rows: Vec<_> =
            after.into_iter().filter(|(_, row)| !row.unsure && (deep || row.entry.is_database())).collect();
        let to_read = rows.len();
        let read = self.read_back(rows, &Some(to.clone()))?;
        let left_out = read.left_out();
        let read_back = to_read - read.skipped.len();
        for (path, why) in read.wrong {
            let again = self.has_good(&path)?;
            say(format!("{path}: {why}{}", if again { AGAIN } else { "" }));
            if again {
                self.send_again(&path)?;
            }
        }
        if let Some(fault) = read.fault {
            return Err(fault);
        }
        let how = if deep {
            format!("compared, {read_back} of them read back and checked")
        } else {
            format!("compared by name and size, {read_back} databases of them read back and checked")
        };
        Ok(if wrong == 0 {
            (format!("Tree and bucket are equal: {files} files {how}{left_out}"), true)
        } else {
            (format!("{wrong} differences in {files} files {how}{left_out}"), false)
        })
    }

    /// Whether the tree has this file, as the bucket should have it or newer.
    fn has_good(&self, path: &Path) -> Result<bool, Fault> {
        let Some(row) = self.open.index.get(path)? else { return Ok(false) };
        let stat = volume::look(&path.below(&self.open.volume.upper))?;
        let there = stat.is_some_and(|stat| volume::kind_of(&stat) == libc::S_IFREG);
        Ok(there && row.entry.is_file() && !row.lower && row.bad.is_none())
    }

    fn send_again(&self, path: &Path) -> Result<(), Fault> {
        self.open.index.set_unsure(path)?;
        // A worker that is gone finds it at its next start.
        let _ = self.sender.send(Order::SendAgain(path.clone()));
        Ok(())
    }

    fn files(&self) -> Result<HashMap<Path, Row>, Fault> {
        let mut rows = self.open.index.all()?;
        rows.retain(|(_, row)| row.entry.is_file());
        Ok(rows.into_iter().collect())
    }

    /// Names of objects that are there for a reason.
    fn objects(&self, files: &HashMap<Path, Row>) -> Result<HashSet<String>, Fault> {
        let buried = self.open.index.tombs(usize::MAX)?;
        Ok(files.keys().chain(&buried).map(Path::object).collect())
    }

    /// Restores every database and a sample of the rest to a place of their own, and checks them.
    pub(crate) fn drill(&self, to: &Asker) -> Result<(String, bool), Fault> {
        let (databases, mut others): (Vec<_>, Vec<_>) = self
            .files()?
            .into_iter()
            .filter(|(_, row)| row.bad.is_none() && !row.unsure)
            .partition(|(_, row)| row.entry.is_database());
        others.retain(|(_, row)| row.entry.size() <= SAMPLE_BYTES);
        let of_databases: HashSet<Path> = databases.iter().map(|(path, _)| path.clone()).collect();
        let mut picked = databases;
        for _ in 0..SAMPLE.min(others.len()) {
            let mut bytes = [0u8; 8];
            getrandom::fill(&mut bytes).map_err(|_| Fault::other("the kernel gives no random numbers"))?;
            let at = usize::try_from(u64::from_le_bytes(bytes) % others.len() as u64).unwrap_or(0);
            picked.push(others.swap_remove(at));
        }
        let files = picked.len();
        let read = match self.read_back(picked, to) {
            Ok(read) => read,
            Err(fault) => ReadBack { fault: Some(fault), ..ReadBack::default() },
        };
        let left_out = read.left_out();
        let ReadBack { wrong, fault, skipped } = read;
        let files = (files - skipped.len()) as u64;
        let databases = of_databases.difference(&skipped).count() as u64;
        for (path, why) in &wrong {
            let again = self.has_good(path)?;
            let (more, remedy) = if again { (AGAIN, MENDED) } else { ("", hydrate::REMEDY) };
            let what = format!("a restore drill found: {why}{more}");
            self.desk.incident(&path.to_string(), &what, remedy);
            if again {
                self.send_again(path)?;
            }
        }
        let (text, good) = if let Some(fault) = fault {
            (format!("the drill could not be done: {fault}"), false)
        } else if wrong.is_empty() {
            // Nothing is shown where there was room for nothing, and of no database that was left out.
            let shows = of_databases.is_disjoint(&skipped) && (files > 0 || skipped.is_empty());
            (format!("{files} files restored and checked, {databases} databases among them{left_out}"), shows)
        } else {
            (format!("{} of {files} files did not come back as they should{left_out}", wrong.len()), false)
        };
        let drill = Drill { ago_ms: 0, good, files, databases, text: text.clone() };
        let at = now_ms();
        let index = &self.open.index;
        index.set_meta("drilled", &at.to_string())?;
        index.set_meta("drill", &serde_json::to_string(&drill).unwrap_or_default())?;
        self.desk.drill(drill, at);
        Ok((text, good))
    }

    /// What is wrong with these.
    fn read_back(&self, mut rows: Vec<(Path, Row)>, to: &Asker) -> Result<ReadBack, Fault> {
        let mut all = ReadBack::default();
        for attempt in 1..=TRIES {
            let was: HashMap<Path, Row> = rows.iter().cloned().collect();
            rows = Vec::new();
            let read = self.read_once(&was, to)?;
            for (path, why) in read.wrong {
                let now = self.open.index.get(&path)?;
                match now {
                    Some(now) if was.get(&path) == Some(&now) => all.wrong.push((path, why)),
                    // Being pushed now, or gone.
                    Some(now) if !now.unsure && attempt < TRIES => rows.push((path, now)),
                    _ => {}
                }
            }
            all.fault = read.fault;
            all.skipped.extend(read.skipped);
            if rows.is_empty() || all.fault.is_some() {
                break;
            }
        }
        Ok(all)
    }

    /// Fetches into a scratch directory, checks, and throws away.
    fn read_once(&self, rows: &HashMap<Path, Row>, to: &Asker) -> Result<ReadBack, Fault> {
        let open = &self.open;
        let scratch = open.volume.staging().join("drill");
        let _ = std::fs::remove_dir_all(&scratch);
        std::fs::create_dir_all(&scratch)?;
        let wanted: Vec<Wanted> = rows
            .iter()
            .map(|(path, row)| Wanted { path: path.clone(), may_be: vec![row.entry.clone()] })
            .collect();
        let (files_total, bytes_total) = fetch::total(&wanted);
        let (mut files_done, mut bytes_done) = (0, 0);
        let say = |files_done: u64, bytes_done: u64| {
            if let Some(to) = to {
                let what = "reading back".to_owned();
                let progress = Progress { what, files_done, files_total, bytes_done, bytes_total };
                let _ = to.send(Answer::Progress(progress));
            }
        };
        let parts = scratch.join("parts");
        let whole = open.index.totals()?;
        let fetcher = Fetcher { bucket: &open.bucket, whole, parts, progress: &|_, _| {} };
        let tree = scratch.join("tree");
        let mut read = ReadBack::default();
        for wanted in portions(wanted) {
            let (files, bytes) = fetch::total(&wanted);
            let (wanted, skipped) = fitting(wanted, open.volume.room()?);
            read.skipped.extend(skipped);
            for one in fetcher.files(wanted, &tree)? {
                match one {
                    Got::Good(path, entry) if entry.is_database() => {
                        if let Err(why) = database::check(&path.below(&tree)) {
                            read.wrong.push((path, why));
                        }
                    }
                    Got::Good(..) => {}
                    Got::Bad(path, why) => read.wrong.push((path, why)),
                    Got::Later(_, fault) => read.fault = Some(fault),
                }
            }
            let _ = std::fs::remove_dir_all(&tree);
            (files_done, bytes_done) = (files_done + files, bytes_done + bytes);
            say(files_done, bytes_done);
        }
        let _ = std::fs::remove_dir_all(&scratch);
        Ok(read)
    }
}

/// What is looked at together: a review must not fill the disk, however large the bucket is.
fn portions(wanted: Vec<Wanted>) -> Vec<Vec<Wanted>> {
    let mut portions: Vec<Vec<Wanted>> = Vec::new();
    let mut bytes = 0;
    for one in wanted {
        let size = one.may_be.first().map_or(0, Entry::size);
        let last = portions.last_mut();
        if let Some(last) = last.filter(|l| l.len() < fetch::FEW && bytes + size <= PORTION_BYTES) {
            last.push(one);
        } else {
            bytes = 0;
            portions.push(vec![one]);
        }
        bytes += size;
    }
    portions
}

/// Those that fit on the volume together, and the others.
fn fitting(wanted: Vec<Wanted>, room: Room) -> (Vec<Wanted>, Vec<Path>) {
    let mut left = room.to_spare();
    let (mut fit, mut skipped) = (Vec::new(), Vec::new());
    for one in wanted {
        let size = one.may_be.first().map_or(0, Entry::size);
        if size <= left {
            left -= size;
            fit.push(one);
        } else {
            skipped.push(one.path);
        }
    }
    (fit, skipped)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Kind;

    fn one(size: u64) -> Wanted {
        let kind = Kind::File { size, sha: None, database: false };
        let entry = Entry { kind, mode: 0o600, uid: 0, gid: 0, mtime_ns: 0, link: None };
        Wanted { path: Path::new(size.to_string().as_bytes()).expect("a path"), may_be: vec![entry] }
    }

    #[test]
    fn a_review_leaves_room_on_the_volume_for_others() {
        let sizes = |free, whole| -> Vec<u64> {
            let (fit, skipped) = fitting([60, 50, 30, 0].map(one).into(), Room { free, whole });
            assert_eq!(fit.len() + skipped.len(), 4);
            fit.iter().map(|one| fetch::total(std::slice::from_ref(one)).1).collect()
        };
        assert_eq!(sizes(240, 1000), [60, 50, 30, 0]);
        assert_eq!(sizes(239, 1000), [60, 50, 0], "a tenth stays free");
        assert_eq!(sizes(150, 1000), [50, 0]);
        assert_eq!(sizes(0, 1000), [0]);
        let large = 256 << 20;
        assert_eq!(sizes(large + 140, u64::MAX), [60, 50, 30, 0], "a large disk needs no tenth");
        assert_eq!(sizes(large + 30, u64::MAX), [30, 0]);
    }

    #[test]
    fn a_review_keeps_little_on_the_volume_at_once() {
        let lengths = |sizes: &[u64]| -> Vec<usize> {
            portions(sizes.iter().map(|size| one(*size)).collect()).iter().map(Vec::len).collect()
        };
        assert_eq!(lengths(&[]), Vec::<usize>::new());
        assert_eq!(lengths(&vec![1; fetch::FEW + 1]), [fetch::FEW, 1]);
        assert_eq!(lengths(&[PORTION_BYTES, 1, PORTION_BYTES * 2, PORTION_BYTES - 1, 1]), [1, 1, 1, 2]);
    }
}
