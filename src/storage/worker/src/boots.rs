//! Last words: the logs of the last boots and how each ended, kept in the bucket so that they outlive
//! the machine.
//!
//! Refuses to keep more than the end of a log, and more than some boots; and to believe the clock:
//! the boot that is now comes after all that the bucket knows of.
//! May import: `bucket`, `chain` (its clock), `fault`.

use crate::bucket::Bucket;
use crate::chain::now_ms;
use crate::fault::Fault;
use crate::s3::When;
use cvm_protocol::paths;
use cvm_sys::process_stat::Process;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

const DIRECTORY: &str = "boots";
/// Of each log; the end is what tells.
const TAIL: u64 = 512 * 1024;
const BOOTS_MAX: usize = 5;

/// Beside the logs of a boot, and none of them: how it ended.
const END: &str = "end";

/// Which boot of the machine this is. Every worker that the machine starts goes by one name, or a
/// worker that dies again and again would put the boots before it out of the bucket.
pub(crate) struct This {
    /// Where the machine keeps it, and by what it is known to be of this boot.
    note: PathBuf,
    stamp: String,
    name: Mutex<Name>,
}

struct Name {
    text: String,
    /// It comes after all that the bucket knows of.
    compared: bool,
}

/// Orders boots by when they started.
fn name(started_ms: u64) -> String {
    format!("{started_ms:015}")
}

impl This {
    pub(crate) fn new() -> Self {
        // Process 1 and the kernel below it: together they are one boot of one machine.
        let kernel = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let started = Process::of(1).map(|process| process.started.to_string()).unwrap_or_default();
        Self::at(&Path::new(paths::RUN).join("boot"), format!("{}/{started}", kernel.trim()), now_ms())
    }

    fn at(note: &Path, stamp: String, now_ms: u64) -> Self {
        let noted = fs::read_to_string(note).unwrap_or_default();
        let noted = noted.trim_end().split_once(' ').filter(|(of, _)| *of == stamp);
        let name = noted.map_or_else(
            || Name { text: name(now_ms), compared: false },
            |(_, text)| Name { text: text.to_owned(), compared: true },
        );
        Self { note: note.to_owned(), stamp, name: Mutex::new(name) }
    }

    /// Its name among those in the bucket.
    fn among<'a>(&self, others: impl Iterator<Item = &'a str>) -> String {
        let mut name = self.name.lock().unwrap_or_else(PoisonError::into_inner);
        if !name.compared {
            // The clock was set back since: dates are wrong then, and the order is not.
            if let Some(newest) = others.max().filter(|newest| *newest >= name.text.as_str()) {
                name.text = self::name(newest.parse::<u64>().unwrap_or(0) + 1);
            }
            name.compared = true;
            if let Err(error) = fs::write(&self.note, format!("{} {}\n", self.stamp, name.text)) {
                tracing::warn!("{} is not written: {error}", self.note.display());
            }
        }
        name.text.clone()
    }
}

/// The logs of this boot, and how much of them is in the bucket.
pub(crate) struct Boots {
    this: Arc<This>,
    sent: HashMap<String, (u64, i64)>,
    /// Since a look at what else is in the bucket.
    name: Option<String>,
}

/// A log with something that is not in the bucket, as it looks.
pub(crate) struct Grown {
    log: String,
    file: PathBuf,
    look: (u64, i64),
}

impl Boots {
    pub(crate) fn new(this: Arc<This>) -> Self {
        Self { this, sent: HashMap::new(), name: None }
    }

    /// What has grown since it was last sent, which costs no request to find out.
    pub(crate) fn grown(&self) -> Vec<Grown> {
        let Ok(entries) = fs::read_dir(paths::LOGS) else { return Vec::new() };
        let grown = entries.flatten().filter_map(|entry| {
            let log = entry.file_name().to_string_lossy().strip_suffix(".log")?.to_owned();
            let metadata = entry.metadata().ok()?;
            let look = (metadata.len(), metadata.mtime());
            let news = metadata.len() > 0 && self.sent.get(&log) != Some(&look);
            news.then(|| Grown { log, file: entry.path(), look })
        });
        grown.collect()
    }

    pub(crate) fn send(&mut self, bucket: &Bucket, grown: Vec<Grown>) -> Result<(), Fault> {
        let name = self.name(bucket)?;
        for Grown { log, file, look } in grown {
            let mut file = File::open(file)?;
            file.seek(SeekFrom::Start(look.0.saturating_sub(TAIL)))?;
            let mut bytes = Vec::new();
            file.take(TAIL).read_to_end(&mut bytes)?;
            bucket.write(&format!("{DIRECTORY}/{name}/{log}"), &bytes, &When::Always)?;
            self.sent.insert(log, look);
        }
        Ok(())
    }

    /// Where this boot's end is told, once its name has been compared.
    pub(crate) fn end(&self) -> Option<String> {
        self.name.as_ref().map(|name| format!("{DIRECTORY}/{name}/{END}"))
    }

    /// With the first look at the bucket, what is older than the last boots goes.
    fn name(&mut self, bucket: &Bucket) -> Result<String, Fault> {
        if let Some(name) = &self.name {
            return Ok(name.clone());
        }
        let all = list(bucket)?;
        let name = self.this.among(all.keys().map(String::as_str));
        // A worker before this one has ended in order, and the boot goes on.
        if all.get(&name).is_some_and(|logs| logs.iter().any(|log| log == END)) {
            bucket.delete(&format!("{DIRECTORY}/{name}/{END}"))?;
        }
        for (boot, logs) in old(&all, &name) {
            for log in logs {
                bucket.delete(&format!("{DIRECTORY}/{boot}/{log}"))?;
            }
        }
        Ok(self.name.insert(name).clone())
    }
}

/// What makes room for the boot that is now.
fn old<'a>(all: &'a Logs, this: &'a str) -> impl Iterator<Item = (&'a String, &'a Vec<String>)> {
    all.iter().rev().filter(move |(boot, _)| *boot != this).skip(BOOTS_MAX - 1)
}

/// By the names of boots.
type Logs = BTreeMap<String, Vec<String>>;

fn list(bucket: &Bucket) -> Result<Logs, Fault> {
    let mut logs = Logs::new();
    for (name, _) in bucket.list(DIRECTORY)? {
        if let Some((boot, log)) = name.split_once('/') {
            logs.entry(boot.to_owned()).or_default().push(log.to_owned());
        }
    }
    Ok(logs)
}

/// A boot that the bucket has something of.
pub(crate) struct Boot {
    pub(crate) name: String,
    pub(crate) logs: Vec<String>,
    has_end: bool,
}

impl Boot {
    /// By the clock that it had.
    pub(crate) fn started_ms(&self) -> u64 {
        self.name.parse().unwrap_or(0)
    }

    pub(crate) fn end(&self, bucket: &Bucket) -> Result<String, Fault> {
        let said = match if self.has_end { read(bucket, &self.name, END) } else { Ok(None) } {
            // The other boots are told all the same.
            Err(Fault::Suspicious(why)) => Some(why),
            said => said?.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()),
        };
        Ok(said.unwrap_or_else(|| {
            "without a last word: lost, or stopped when the bucket was not its own or did not answer"
                .to_owned()
        }))
    }
}

/// The boots before this one, the newest first.
pub(crate) fn before(bucket: &Bucket, this: &This) -> Result<Vec<Boot>, Fault> {
    let mut all = list(bucket)?;
    all.remove(&this.among(all.keys().map(String::as_str)));
    let boots = all.into_iter().rev().map(|(name, mut logs)| {
        logs.sort_unstable();
        let has_end = logs.iter().any(|log| log == END);
        logs.retain(|log| log != END);
        Boot { name, logs, has_end }
    });
    Ok(boots.collect())
}

/// One log of one boot.
pub(crate) fn read(bucket: &Bucket, boot: &str, log: &str) -> Result<Option<Vec<u8>>, Fault> {
    Ok(bucket.read(&format!("{DIRECTORY}/{boot}/{log}"))?.map(|(bytes, _)| bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(dir: &tempfile::TempDir, stamp: &str, now_ms: u64) -> This {
        This::at(&dir.path().join("boot"), stamp.to_owned(), now_ms)
    }

    fn logs(boots: &[&str]) -> Logs {
        boots.iter().map(|boot| ((*boot).to_owned(), vec!["supervisor".to_owned()])).collect()
    }

    #[test]
    fn a_boot_is_the_last_one_whatever_the_clock_says() {
        let dir = tempfile::tempdir().unwrap();
        let earlier = [name(5000), name(90_000)];
        let this = of(&dir, "one", 7000);
        assert_eq!(this.among(earlier.iter().map(String::as_str)), name(90_001));
        assert_eq!(this.among(std::iter::empty()), name(90_001), "it is asked once");
        assert_eq!(of(&dir, "two", 100_000).among(earlier.iter().map(String::as_str)), name(100_000));
    }

    #[test]
    fn every_worker_of_a_boot_goes_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(of(&dir, "one", 7000).among(std::iter::empty()), name(7000));
        let own = name(7000);
        assert_eq!(of(&dir, "one", 9000).among(std::iter::once(own.as_str())), own);
        assert_eq!(of(&dir, "two", 9000).among(std::iter::once(own.as_str())), name(9000));
    }

    #[test]
    fn what_makes_room_is_the_oldest_and_never_this_boot() {
        let all = logs(&["1", "2", "3", "4", "5", "6"]);
        let gone = |this: &str| old(&all, this).map(|(boot, _)| boot.clone()).collect::<Vec<_>>();
        assert_eq!(gone("7"), ["2", "1"]);
        assert_eq!(gone("6"), ["1"]);
        assert_eq!(gone("1"), ["2"], "a worker that comes again keeps what its boot has said");
    }
}
