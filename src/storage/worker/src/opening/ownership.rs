//! Whose bucket it is, and whether this volume's past is the bucket's.

use super::{Held, Pause, Said};
use crate::bucket::{Bucket, Survey};
use crate::desk::Desk;
use crate::fault::Fault;
use crate::index::Index;
use crate::mount;
use crate::owner::{self, Verdict, uptime};
use crate::s3::When;
use crate::volume::Volume;
use cvm_protocol::storage::WorkerPhase;
use std::path::Path as FsPath;
use std::time::Duration;

/// Sessions of this volume's whose epoch may be in the record without ever having come to a tree:
/// written down before the bucket is taken, so that a try that fails is not mistaken for another
/// owner, for whom the volume's tree would be set aside.
pub(super) struct Tried(Vec<String>);

impl Tried {
    pub(super) fn read(index: &Index) -> Result<Self, Fault> {
        let text = index.meta("tried")?.unwrap_or_default();
        Ok(Self(text.split_whitespace().map(str::to_owned).collect()))
    }

    pub(super) fn includes(&self, record: &owner::Record) -> bool {
        self.0.contains(&record.session)
    }

    /// The next try, beside the one that the record is of.
    pub(super) fn and(self, record: Option<&owner::Record>, held: &Held) -> Result<(), Fault> {
        let last = record.filter(|record| self.includes(record)).map(|record| record.session.as_str());
        let both: Vec<&str> = last.into_iter().chain([held.me.session.as_str()]).collect();
        held.index.set_meta("tried", &both.join(" "))
    }
}

pub(super) struct Before {
    pub(super) record: Option<owner::Record>,
    /// On what our own record depends.
    pub(super) when: When,
    pub(super) epoch: u64,
    pub(super) read_at: Duration,
    /// The operator did not want to wait.
    pub(super) forced: bool,
}

/// A bucket that this volume has written to, and that has no manifest any more.
pub(super) fn still_there(held: &Held, survey: Survey, word: Said<'_>) -> Result<(), Fault> {
    let known = held.index.head()?.generation;
    if survey == Survey::Managed || known == 0 {
        return Ok(());
    }
    word.accepted
        .or_refuse(format!("the bucket holds nothing of what this volume has written (generation {known})"))
}

/// Objects with an owner and without a manifest: an adoption of our own goes on, anything else is
/// for the operator to judge.
pub(super) fn without_manifest(
    survey: Survey,
    before: &Before,
    held: &Held,
    word: Said<'_>,
) -> Result<Survey, Fault> {
    let ours = before.record.as_ref().is_some_and(|r| r.instance == held.me.instance);
    match survey {
        Survey::Bereft if ours => Ok(Survey::Unmanaged),
        Survey::Bereft if word.adopt => Ok(Survey::Unmanaged),
        Survey::Bereft => {
            let why = "the bucket holds objects and the record of an owner, and their manifest is gone";
            Err(Fault::unadopted(why))
        }
        other => Ok(other),
    }
}

/// The record with what a write of ours depends on. One that is not authentic is written over if
/// the operator has accepted that.
pub(super) fn record(bucket: &Bucket, word: Said<'_>) -> Result<(Option<owner::Record>, When), Fault> {
    Ok(match owner::read(bucket) {
        Err(fault) if word.accepted.includes(&fault) => (None, When::Always),
        other => match other? {
            None => (None, When::Absent),
            Some((record, etag)) => (Some(record), etag.map_or(When::Always, When::Unchanged)),
        },
    })
}

pub(super) fn wait_for_it(
    bucket: &Bucket,
    desk: &Desk,
    held: &Held,
    known: u64,
    beat: Duration,
    word: Said<'_>,
    pause: Pause<'_>,
) -> Result<Before, Fault> {
    let mut seen: Option<(Option<owner::Record>, Duration)> = None;
    let mut forced = word.takeover;
    loop {
        let (record, when) = record(bucket, word)?;
        owner::refuse_older(record.as_ref(), &held.me).inspect_err(|_| {
            close_door(&held.volume, record.as_ref().map_or(0, |record| record.owner_epoch));
        })?;
        let read_at = uptime();
        let since = match &seen {
            Some((old, since)) if *old == record => *since,
            _ => read_at,
        };
        seen = Some((record.clone(), since));
        let unchanged = read_at.saturating_sub(since);
        let judged = |unchanged| owner::judge(record.as_ref(), &held.me, known, unchanged, beat);
        let free = judged(unchanged);
        let verdict = if forced { judged(Duration::MAX) } else { free.clone() };
        if let Verdict::Take(epoch) = verdict {
            desk.held_by(None);
            return Ok(Before { record, when, epoch, read_at, forced: free == Verdict::Held });
        }
        let patience = owner::stale_after(record.as_ref(), beat);
        desk.waits(held_words(record.as_ref(), patience));
        desk.held_by(record.map(|r| owner::short(&r.instance).to_owned()));
        let left = patience.saturating_sub(unchanged);
        forced |= pause(left.min(beat / 4).max(Duration::from_millis(200)))?;
    }
}

/// An environment that is void has opened SSH on a volume that did not know it: its keys are taken away,
/// and the volume knows from now on.
fn close_door(volume: &Volume, epoch: u32) {
    use cvm_protocol::volume::{Found, MEMORIES, Memory};
    let tell = || -> std::io::Result<()> {
        match std::fs::remove_file(cvm_protocol::paths::AUTHORIZED_KEYS) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let paths = MEMORIES.map(|name| volume.own.with_file_name(name));
        let Some(Found::Memory(memory)) =
            Found::in_files(&paths.each_ref().map(|path| std::fs::read(path).ok()))
        else {
            return Err(std::io::Error::other("the volume does not say whose it is"));
        };
        let memory = serde_json::to_vec(&Memory { epoch: epoch.max(memory.epoch), ..memory })?;
        for path in paths {
            let draft = path.with_added_extension("cvm-new");
            std::fs::write(&draft, &memory)?;
            std::fs::File::open(&draft)?.sync_all()?;
            std::fs::rename(&draft, &path)?;
        }
        Ok(())
    };
    if let Err(error) = tell() {
        tracing::error!("keys of an environment that is void could not be taken away: {error}");
    }
}

fn held_words(record: Option<&owner::Record>, patience: Duration) -> String {
    let (who, gone) = match record {
        Some(record) => {
            (format!("instance {} owns the bucket", owner::short(&record.instance)), "that has said nothing")
        }
        None => ("the ownership record has vanished from the bucket".to_owned(), "nobody has written it"),
    };
    format!(
        "{who}; it is taken over when {gone} for {} s. If you know that no other instance runs: `cvm storage takeover`",
        patience.as_secs()
    )
}

/// Whether this volume has written more than it knows of: somebody has put an older state of it back.
/// It always knows of all segments but the last, whose answer a crash may have cut off.
pub(super) fn is_behind(held: &Held, (epoch, written): (u64, u64), ours: u64) -> Result<bool, Fault> {
    Ok(epoch == ours && written > held.index.head()?.generation + 1)
}

/// Whether what is on the volume belongs to what is in the bucket. `another`: others were there since;
/// `unknown`: who has no index of the bucket has nothing to do with it.
pub(super) fn past(
    desk: &Desk,
    held: Held,
    survey: Survey,
    another: bool,
    unknown: bool,
) -> Result<Held, Fault> {
    let known = held.index.head()?;
    let empty = held.volume.is_empty()?;
    if survey != Survey::Managed {
        if known.generation > 0 {
            held.index.clear()?;
        }
        if !empty && survey == Survey::Empty {
            desk.warn(
                "The bucket is empty and the volume is not: the state on the volume goes into the bucket",
            );
        }
    }
    let strange = match survey {
        Survey::Empty => false,
        Survey::Managed => another || known.generation == 0 && unknown,
        // Objects that are to be adopted are nobody's.
        Survey::Unmanaged | Survey::Bereft => another || !empty,
    };
    if !strange {
        return Ok(held);
    }
    let volume = if empty { held.volume } else { put_aside(desk, &held.index)? };
    held.index.clear()?;
    Ok(Held { volume, ..held })
}

/// A copy of this machine owns the bucket under this one's names: from now on this is another instance,
/// and the tree on its volume has another past than whatever the bucket will hold.
pub(super) fn part_from_the_copy(desk: &Desk, index: &Index) -> Result<(), Fault> {
    let name = owner::random_name()?;
    desk.warn(format!(
        "A copy of this machine owns the bucket: both were resumed from one snapshot. This one is instance {} from now on, and what is on its volume is not pushed",
        owner::short(&name)
    ));
    index.becomes_another_instance(&name)
}

/// A tree that is not to be merged with the bucket's. Yields the volume without it.
pub(super) fn put_aside(desk: &Desk, index: &Index) -> Result<Volume, Fault> {
    // Whoever stands on it hears of it first.
    desk.not_ready(WorkerPhase::Opening, "the volume holds a state with another past".to_owned(), true);
    let name = format!("epoch-{}-{}", index.own_epoch()?.unwrap_or(0), crate::chain::now_ms());
    mount::clear()?;
    // With the overlay gone, the volume is at /data again, wherever it was found.
    let volume = Volume::plain(FsPath::new(cvm_protocol::paths::DATA))?;
    volume.set_aside(&name)?;
    desk.warn(format!(
        "The volume holds a state with another past than the bucket's; it is set aside in .cvm/storage/aside/{name} on the volume and neither merged nor pushed"
    ));
    Ok(volume)
}
