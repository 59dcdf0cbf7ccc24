//! The end of a worker that is told to stop: since when it is, and who leaves in its place when the
//! time is over and the network still holds its threads.
//!
//! Refuses to wait for anybody. May import: `desk`, `entry`, `owner` (its
//! clock), `scan`, `volume`.

use crate::desk::Desk;
use crate::entry::{Kind, Path};
use crate::owner::uptime;
use crate::scan::{Change, Fetched, Found, Scanner};
use crate::volume::{self, Volume};
use std::collections::HashSet;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// What the last request may take beyond its time.
const GRACE: Duration = Duration::from_secs(1);

const LAST_WORDS: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(crate) struct Ending {
    /// How long it may take.
    time: Duration,
    told: OnceLock<Duration>,
    /// The bucket has everything; what is left is courtesy.
    all_there: AtomicBool,
}

impl Ending {
    pub(crate) fn new(time: Duration) -> Self {
        Self { time, told: OnceLock::new(), all_there: AtomicBool::new(false) }
    }

    /// When its time is over, which begins when this is first asked.
    pub(crate) fn until(&self) -> Duration {
        *self.told.get_or_init(uptime) + self.time
    }

    /// The same for whoever has something to say when it is over.
    pub(crate) fn until_the_last_words(&self) -> Duration {
        self.until().saturating_sub((self.time / 10).min(LAST_WORDS))
    }

    pub(crate) fn all_is_there(&self) {
        self.all_there.store(true, Ordering::Relaxed);
    }

    /// Says what is missing when the time is over, and ends the process. Whoever has no tree yet is
    /// left to who waits for the process.
    pub(crate) fn enforce(&self, desk: &Desk) {
        std::thread::sleep((self.until() + GRACE).saturating_sub(uptime()));
        let all_there = self.all_there.load(Ordering::Relaxed);
        if all_there {
            desk.drained(0, 0);
        } else {
            let Some(open) = desk.open() else { return };
            let fetched = Fetched::default();
            let scanned = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, &fetched).full();
            let (files, bytes) = scanned.map_or((1, 0), |found| missing(&open.volume, &found));
            desk.drained(files.max(1), bytes);
        }
        #[allow(clippy::exit)] // the other threads wait for the network; dying loses nothing
        std::process::exit(if all_there { 0 } else { i32::from(crate::UNDRAINED) });
    }
}

/// What the bucket does not have as it is, what is in its files, and its names for the log. The
/// times of directories are no loss beside that of files.
pub(crate) fn missing(volume: &Volume, found: &Found) -> (u64, u64) {
    let of_directory = |c: &Change| matches!(c, Change::Meta { entry, .. } if entry.kind == Kind::Directory);
    let impossible = found.impossible.iter().map(|(path, _)| path);
    let of_files = found.changes.iter().filter(|c| !of_directory(c)).map(Change::path);
    let mut all: Vec<&Path> = of_files.chain(impossible).collect();
    if all.is_empty() {
        all = found.changes.iter().map(Change::path).collect();
    }
    let meta: HashSet<&Path> =
        found.changes.iter().filter(|c| matches!(c, Change::Meta { .. })).map(Change::path).collect();
    let bytes = all
        .iter()
        .filter(|path| !meta.contains(*path))
        .filter_map(|path| volume::look(&path.below(&volume.upper)).ok().flatten())
        .map(|s| crate::scan::size_of(&s))
        .sum();
    for path in all.iter().take(100) {
        tracing::warn!("not in the bucket: {path}");
    }
    (all.len() as u64, bytes)
}
