//! Last words: the logs of the last boots, kept in the bucket so that they outlive the machine.
//!
//! Refuses to keep more than the end of a log, and more than some boots.
//! May import: `bucket`, `fault`.

use crate::bucket::Bucket;
use crate::fault::Fault;
use crate::s3::When;
use cvm_blueprint::paths;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

const DIRECTORY: &str = "boots";
/// Of each log; the end is what tells.
const TAIL: u64 = 512 * 1024;
const BOOTS_MAX: usize = 5;

/// The logs of this boot, and how much of them is in the bucket.
pub(crate) struct Boots {
    this: String,
    sent: HashMap<String, (u64, i64)>,
    pruned: bool,
}

/// A log with something that is not in the bucket, as it looks.
pub(crate) struct Grown {
    log: String,
    file: PathBuf,
    look: (u64, i64),
}

/// Names a boot by when it started, and orders it among the others.
pub(crate) fn name(started_ms: u64) -> String {
    format!("{started_ms:015}")
}

impl Boots {
    pub(crate) fn new(this: String) -> Self {
        Self { this, sent: HashMap::new(), pruned: false }
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
        for Grown { log, file, look } in grown {
            let mut file = File::open(file)?;
            file.seek(SeekFrom::Start(look.0.saturating_sub(TAIL)))?;
            let mut bytes = Vec::new();
            file.take(TAIL).read_to_end(&mut bytes)?;
            bucket.write(&format!("{DIRECTORY}/{}/{log}", self.this), &bytes, &When::Always)?;
            self.sent.insert(log, look);
        }
        if !self.pruned {
            Self::prune(bucket)?;
            self.pruned = true;
        }
        Ok(())
    }

    /// Deletes what is older than the last boots.
    fn prune(bucket: &Bucket) -> Result<(), Fault> {
        let all = list(bucket)?;
        let mut boots: Vec<&str> = all.iter().filter_map(|n| n.split('/').next()).collect();
        boots.sort_unstable();
        boots.dedup();
        let old = boots.len().saturating_sub(BOOTS_MAX);
        for name in all.iter().filter(|n| boots.iter().take(old).any(|b| n.starts_with(b))) {
            bucket.delete(&format!("{DIRECTORY}/{name}"))?;
        }
        Ok(())
    }
}

fn list(bucket: &Bucket) -> Result<Vec<String>, Fault> {
    Ok(bucket.list(DIRECTORY)?.into_iter().map(|(name, _)| name).collect())
}

/// The boots before this one, the newest first: when each started, and its logs.
pub(crate) fn before(bucket: &Bucket, this: &str) -> Result<Vec<(String, Vec<String>)>, Fault> {
    let mut boots: Vec<(String, Vec<String>)> = Vec::new();
    let mut all = list(bucket)?;
    all.sort_unstable_by(|a, b| b.cmp(a));
    for name in all {
        let Some((boot, log)) = name.split_once('/') else { continue };
        if boot >= this {
            continue;
        }
        match boots.last_mut() {
            Some((last, logs)) if last == boot => logs.push(log.to_owned()),
            _ => boots.push((boot.to_owned(), vec![log.to_owned()])),
        }
    }
    Ok(boots)
}

/// One log of one boot.
pub(crate) fn read(bucket: &Bucket, boot: &str, log: &str) -> Result<Option<Vec<u8>>, Fault> {
    Ok(bucket.read(&format!("{DIRECTORY}/{boot}/{log}"))?.map(|(bytes, _)| bytes))
}
