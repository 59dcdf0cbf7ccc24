//! One writer: the ownership record, and the rules by which it changes hands.
//!
//! ```text
//! absent, released, or our own dead session's      -> take it with the next epoch
//! held, and unchanged for three beats               -> take it with the next epoch
//! held                                             -> wait
//! absent, and yet others have written              -> as if it were held: they may still be there
//! ours, and somebody else's now                    -> we are fenced: write nothing more
//! ```
//!
//! A server that writes on condition decides atomically. One that does not (the condition is tried
//! on our own record, where it cannot hurt) gets a second look after a pause: of two that wrote at
//! the same moment, one finds its own record and goes on, the other finds the other's and waits.
//!
//! Time is only ever measured, never compared with another machine's, and never written into the
//! record: spans of `CLOCK_BOOTTIME`, which nobody can set and which goes on while a machine sleeps.
//! A wall clock that jumps changes nothing here; how long a record was unchanged is an argument of
//! [`judge`], and the tests below are those of the clock.
//!
//! Refuses to write a record that is not authenticated, and to believe one.
//! May import: `bucket`, `fault`, `manifest`, `s3`.

use crate::bucket::Bucket;
use crate::fault::Fault;
use crate::manifest::Digest;
use crate::s3::When;
use serde::{Deserialize, Serialize};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const NAME: &str = "owner";
/// Beats without a change after which an owner counts as gone.
const STALE_BEATS: u32 = 3;
/// Between our writing and our second look, where the server has no conditions.
const SETTLE: Duration = Duration::from_millis(600);
/// For how long the bucket's last word that it is ours is believed, if beats are not even shorter.
const FRESH: Duration = Duration::from_secs(5);

/// Who we are, for as long as this worker lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Me {
    /// Of the volume.
    pub(crate) instance: String,
    /// Of this worker.
    pub(crate) session: String,
    /// This kernel's boot and the lock on this volume: whoever holds that lock here knows that
    /// no earlier worker of this place is alive.
    pub(crate) place: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) epoch: u64,
    pub(crate) instance: String,
    pub(crate) session: String,
    place: String,
    /// Counts renewals, so that each writes something new.
    beat: u64,
    /// Seconds between two of them: whoever beats faster must not be the more impatient.
    #[serde(default)]
    beat_s: u64,
    released: bool,
    /// How far its owner had come with the manifest: whoever finds less lacks the end of it.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub(crate) generation: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde wants it
fn is_nothing(generation: &u64) -> bool {
    *generation == 0
}

#[derive(Serialize, Deserialize)]
struct Signed {
    record: Record,
    tag: Digest,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may be taken, with this epoch.
    Take(u64),
    /// It is somebody's.
    Held,
}

/// After how long without a change an owner counts as gone.
pub(crate) fn stale_after(record: Option<&Record>, beat: Duration) -> Duration {
    beat.max(Duration::from_secs(record.map_or(0, |r| r.beat_s))) * STALE_BEATS
}

/// Whether the record may be taken now. `known_epoch` is the latest that this volume or the
/// manifest speaks of. `unchanged` is how long we have seen this very record.
pub(crate) fn judge(
    record: Option<&Record>,
    me: &Me,
    known_epoch: u64,
    unchanged: Duration,
    beat: Duration,
) -> Verdict {
    let stale = unchanged >= stale_after(record, beat);
    let Some(record) = record else {
        let nobody_ever = known_epoch == 0;
        return if nobody_ever || stale { Verdict::Take(known_epoch + 1) } else { Verdict::Held };
    };
    let next = record.epoch.max(known_epoch) + 1;
    let our_own = record.instance == me.instance && record.place == me.place;
    if record.released || our_own || stale { Verdict::Take(next) } else { Verdict::Held }
}

/// Time that also passes while the machine sleeps.
pub(crate) fn uptime() -> Duration {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME);
    now.map_or(Duration::ZERO, Duration::from)
}

pub(crate) fn read(bucket: &Bucket) -> Result<Option<(Record, Option<String>)>, Fault> {
    let Some((bytes, etag)) = bucket.read(NAME)? else { return Ok(None) };
    let suspicious = || {
        Fault::Suspicious(
            "the ownership record in the bucket was not written by an instance of this MASTER_KEY".to_owned(),
        )
    };
    let signed: Signed = serde_json::from_slice(&bytes).map_err(|_| suspicious())?;
    if tag(bucket, &signed.record) != signed.tag {
        return Err(suspicious());
    }
    Ok(Some((signed.record, etag)))
}

fn tag(bucket: &Bucket, record: &Record) -> Digest {
    bucket.key.tag("owner", &[&serde_json::to_vec(record).unwrap_or_default()])
}

fn write(bucket: &Bucket, record: &Record, when: &When) -> Result<Option<String>, Fault> {
    let signed = Signed { record: record.clone(), tag: tag(bucket, record) };
    bucket.write(NAME, &serde_json::to_vec(&signed).unwrap_or_default(), when)
}

/// The right to write.
pub(crate) struct Lease {
    me: Me,
    beat: Duration,
    state: Mutex<State>,
}

struct State {
    record: Record,
    etag: Option<String>,
    conditional: bool,
    /// When the question was asked to which the bucket last said that it is ours: a machine may
    /// stand still for any time between its answer and our reading it.
    confirmed: Duration,
    /// A renewal writes at every second beat and looks at the others.
    looked: bool,
    settled: bool,
    lost: Option<String>,
}

impl Lease {
    /// Takes the record that was read, if nobody else does in the same moment.
    pub(crate) fn take(
        bucket: &Bucket,
        me: &Me,
        when: &When,
        epoch: u64,
        generation: u64,
        beat: Duration,
    ) -> Result<Self, Fault> {
        let record = Record {
            epoch,
            instance: me.instance.clone(),
            session: me.session.clone(),
            place: me.place.clone(),
            beat: 0,
            beat_s: beat.as_secs(),
            released: false,
            generation,
        };
        let asked = uptime();
        let etag = match write(bucket, &record, when) {
            Err(Fault::NotImplemented) => write(bucket, &record, &When::Always)?,
            other => other?,
        };
        // A server that knows conditions refuses this one; another writes the same record again.
        let (conditional, etag) = match write(bucket, &record, &When::Absent) {
            Err(Fault::Conflict) => (true, etag),
            Err(Fault::NotImplemented) => (false, etag),
            Ok(etag) => (false, etag),
            Err(fault) => return Err(fault),
        };
        let state = State {
            record,
            etag,
            conditional,
            confirmed: asked,
            looked: false,
            settled: conditional,
            lost: None,
        };
        Ok(Self { me: me.clone(), beat, state: Mutex::new(state) })
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.state().record.epoch
    }

    /// Said by the next renewal.
    pub(crate) fn has_come_to(&self, generation: u64) {
        self.state().record.generation = generation;
    }

    /// How long others may go on in good faith, because they have not seen our record yet. `forced`:
    /// nobody waited for the last owner to fall silent. `read`: when the record was free to take.
    pub(crate) fn doubt(&self, forced: bool, read: Duration) -> Option<Duration> {
        let late = !self.state().conditional && uptime().saturating_sub(read) > SETTLE / 2;
        (forced || late).then(|| fresh(self.beat) + SETTLE)
    }

    /// Waits out the moment in which another instance may have written over our record. Nothing
    /// is written, and no gateway started, before this has said yes.
    pub(crate) fn settle(&self, bucket: &Bucket, taken: Duration) -> Result<(), Fault> {
        if self.state().settled {
            return Ok(());
        }
        std::thread::sleep((taken + SETTLE).saturating_sub(uptime()));
        self.look(bucket)?;
        self.state().settled = true;
        Ok(())
    }

    /// Whether we may write: known from a moment ago, or asked now.
    pub(crate) fn confirm(&self, bucket: &Bucket) -> Result<(), Fault> {
        let fresh = {
            let state = self.state();
            if let Some(why) = &state.lost {
                return Err(Fault::Fenced(why.clone()));
            }
            uptime().saturating_sub(state.confirmed) < fresh(self.beat)
        };
        if fresh { Ok(()) } else { self.look(bucket) }
    }

    /// One beat: keeps the record fresh for others, and sees whether it is still ours.
    pub(crate) fn renew(&self, bucket: &Bucket) -> Result<(), Fault> {
        let (record, when) = {
            let mut state = self.state();
            if let Some(why) = &state.lost {
                return Err(Fault::Fenced(why.clone()));
            }
            let late = uptime().saturating_sub(state.confirmed) > self.beat * 3 / 2;
            if !state.conditional && (late || !state.looked) {
                state.looked = true;
                drop(state);
                return self.look(bucket);
            }
            state.looked = false;
            let mut record = state.record.clone();
            record.beat += 1;
            let when = match (&state.etag, state.conditional) {
                (Some(etag), true) => When::Unchanged(etag.clone()),
                _ => When::Always,
            };
            (record, when)
        };
        let asked = uptime();
        match write(bucket, &record, &when) {
            Ok(etag) => {
                let mut state = self.state();
                (state.record.beat, state.etag, state.confirmed) = (record.beat, etag, asked);
                Ok(())
            }
            // Ours with an answer that got lost, or somebody else's: the record itself says.
            Err(Fault::Conflict) => self.look(bucket),
            Err(fault) => Err(fault),
        }
    }

    /// Reads the record, and gives up for ever if it is somebody else's.
    pub(crate) fn look(&self, bucket: &Bucket) -> Result<(), Fault> {
        let asked = uptime();
        let found = read(bucket)?;
        let mut state = self.state();
        let Some((record, etag)) = found else {
            let why = "the ownership record has vanished from the bucket".to_owned();
            state.lost = Some(why.clone());
            return Err(Fault::Fenced(why));
        };
        if record.session == self.me.session && record.epoch == state.record.epoch {
            (state.etag, state.confirmed) = (etag, asked);
            state.record.beat = state.record.beat.max(record.beat);
            return Ok(());
        }
        let why =
            format!("instance {} owns the bucket now (epoch {})", short(&record.instance), record.epoch);
        state.lost = Some(why.clone());
        Err(Fault::Fenced(why))
    }

    /// Gives the bucket to whoever comes next.
    pub(crate) fn release(&self, bucket: &Bucket) -> Result<(), Fault> {
        self.look(bucket)?;
        let (record, when) = {
            let state = self.state();
            let mut record = state.record.clone();
            record.released = true;
            record.beat += 1;
            let when = state.etag.clone().filter(|_| state.conditional).map_or(When::Always, When::Unchanged);
            (record, when)
        };
        write(bucket, &record, &when).map(drop)
    }
}

fn fresh(beat: Duration) -> Duration {
    FRESH.min(beat * 3 / 2)
}

/// One that nobody else has.
pub(crate) fn random_name() -> Result<String, Fault> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes).map_err(|_| Fault::other("the kernel gives no random numbers"))?;
    Ok(u128::from_le_bytes(bytes)).map(|number| format!("{number:032x}"))
}

/// Enough of a random name for people.
pub(crate) fn short(name: &str) -> &str {
    name.get(..8).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEAT: Duration = Duration::from_secs(60);

    fn me() -> Me {
        Me { instance: "volume".into(), session: "worker".into(), place: "here".into() }
    }

    fn record(instance: &str, place: &str, released: bool) -> Record {
        Record {
            epoch: 7,
            instance: instance.into(),
            session: "x".into(),
            place: place.into(),
            beat: 1,
            beat_s: 0,
            released,
            generation: 0,
        }
    }

    #[test]
    fn who_may_take_the_bucket() {
        let judged = |record: Option<Record>, unchanged| {
            judge(record.as_ref(), &me(), 3, Duration::from_secs(unchanged), BEAT)
        };
        // Somebody has written with epoch 3, and may still be there.
        assert_eq!(judged(None, 179), Verdict::Held);
        assert_eq!(judged(None, 180), Verdict::Take(4));
        assert_eq!(judge(None, &me(), 0, Duration::ZERO, BEAT), Verdict::Take(1));
        assert_eq!(judged(Some(record("other", "there", true)), 0), Verdict::Take(8));
        assert_eq!(judged(Some(record("other", "there", false)), 0), Verdict::Held);
        assert_eq!(judged(Some(record("other", "there", false)), 179), Verdict::Held);
        assert_eq!(judged(Some(record("other", "there", false)), 180), Verdict::Take(8));
        // Our own volume after a crash on the same kernel: the lock says that nobody else is alive.
        assert_eq!(judged(Some(record("volume", "here", false)), 0), Verdict::Take(8));
        // Whoever beats once in five minutes is not gone after three of ours.
        let slow = Record { beat_s: 300, ..record("other", "there", false) };
        assert_eq!(judged(Some(slow.clone()), 899), Verdict::Held);
        assert_eq!(judged(Some(slow), 900), Verdict::Take(8));
        // A copy of our volume on another machine is somebody else.
        assert_eq!(judged(Some(record("volume", "there", false)), 0), Verdict::Held);
    }
}
