//! One writer: the ownership record, and the rules by which it changes hands.
//!
//! ```text
//! absent, released, or our own dead session's      -> take it with the next epoch
//! held, and unchanged for three beats               -> take it with the next epoch
//! held                                             -> wait
//! absent, and yet others have written              -> as if it were held: they may still be there
//! ours, and somebody else's now                    -> we are fenced: write nothing more
//! ours, and written by a copy of this machine      -> the same, and we are another instance from now on
//! of a later epoch of the owner's than ours        -> refused: our environment may have been put back
//! ```
//!
//! Two machines that were resumed from one snapshot have the same names, the same epoch and the same
//! time since boot. What they do not have in common is when they write: each record carries a mark that
//! no copy makes again, and one with a mark of ours that we have not written is a copy's.
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
//! May import: `bucket`, `fault`, `manifest`, `moment`, `s3`.

use crate::bucket::{Bucket, Found};
use crate::fault::Fault;
use crate::manifest::{Digest, ManifestKey};
use crate::moment::Moment;
use crate::s3::When;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

const NAME: &str = "owner";
/// Beats without a change after which an owner counts as gone.
const STALE_BEATS: u32 = 3;
/// Between our writing and our second look, where the server has no conditions.
const SETTLE: Duration = Duration::from_millis(600);
/// For how long the bucket's last word that it is ours is believed, if beats are not even shorter.
const FRESH: Duration = Duration::from_secs(5);
/// The same before the manifest is written to: a copy of this machine, resumed later, believes what this
/// one was told, and has written nothing else by then.
const JUST_NOW: Duration = Duration::from_millis(500);
/// Renewals whose answer was lost may still arrive: so many marks are known again.
const MARKS: usize = 64;

/// Where the record is kept.
pub(crate) trait Store {
    fn read(&self, name: &str) -> Result<Option<Found>, Fault>;
    fn write(&self, name: &str, bytes: &[u8], when: &When) -> Result<Option<String>, Fault>;
    fn key(&self) -> &ManifestKey;
    fn prefix(&self) -> &str;
}

impl Store for Bucket {
    fn read(&self, name: &str) -> Result<Option<Found>, Fault> {
        self.read(name)
    }

    fn write(&self, name: &str, bytes: &[u8], when: &When) -> Result<Option<String>, Fault> {
        self.write(name, bytes, when)
    }

    fn key(&self) -> &ManifestKey {
        &self.key
    }

    fn prefix(&self) -> &str {
        &self.prefix
    }
}

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
    /// How often the owner of this machine has made older environments void; 0 without proof.
    pub(crate) owner_epoch: u32,
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
    /// No other record has it: not even one that a copy of this machine writes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    mark: String,
    /// The highest that an owner of this bucket has had. Versions before did not write it.
    #[serde(default, skip_serializing_if = "is_first")]
    pub(crate) owner_epoch: u32,
    /// Under which it is the record. Older versions did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prefix: Option<String>,
}

impl Record {
    /// It is one of an older version.
    pub(crate) fn is_unbound(&self) -> bool {
        self.prefix.is_none()
    }
}

#[allow(clippy::trivially_copy_pass_by_ref)] // as serde wants it
fn is_first(epoch: &u32) -> bool {
    *epoch == 0
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

/// Refuses an environment from before its owner raised the epoch, whatever else it proves.
pub(crate) fn refuse_older(record: Option<&Record>, me: &Me) -> Result<(), Fault> {
    if record.is_none_or(|record| record.owner_epoch <= me.owner_epoch) {
        return Ok(());
    }
    Err(Fault::config(
        "CVM_OWNER_EPOCH is lower than one that the ownership record in the bucket has seen, so this may be an old \
         environment that somebody has put back; deploy with the epoch of your last deployment, or a higher one, and with the \
         CVM_OWNER of that epoch set: without it an epoch counts as 0",
    ))
}

/// Time that also passes while the machine sleeps.
pub(crate) fn uptime() -> Duration {
    Moment::now().uptime
}

pub(crate) fn read(bucket: &dyn Store) -> Result<Option<(Record, Option<String>)>, Fault> {
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
    if let Some(prefix) = signed.record.prefix.as_ref().filter(|prefix| *prefix != bucket.prefix()) {
        return Err(Fault::config(format!(
            "the ownership record in the bucket is that of S3_PREFIX={prefix}, and stands under no other prefix: somebody has copied it, or serves one for the other"
        )));
    }
    Ok(Some((signed.record, etag)))
}

fn tag(bucket: &dyn Store, record: &Record) -> Digest {
    bucket.key().tag("owner", &[&serde_json::to_vec(record).unwrap_or_default()])
}

fn write(bucket: &dyn Store, record: &Record, when: &When) -> Result<Option<String>, Fault> {
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
    confirmed: Moment,
    /// Of the records that we have tried to write.
    marks: VecDeque<String>,
    /// A renewal writes at every second beat and looks at the others.
    looked: bool,
    settled: bool,
    lost: Option<Lost>,
}

#[derive(Clone)]
struct Lost {
    why: String,
    /// To a copy of this machine.
    to_a_copy: bool,
}

impl State {
    fn is_held(&self) -> Result<(), Fault> {
        self.lost.as_ref().map_or(Ok(()), |lost| Err(Fault::Fenced(lost.why.clone())))
    }

    fn lose(&mut self, why: String, to_a_copy: bool) -> Fault {
        self.lost = Some(Lost { why: why.clone(), to_a_copy });
        Fault::Fenced(why)
    }

    /// The next record of ours, under a mark that is known from here on.
    fn next(&mut self) -> Result<Record, Fault> {
        let mark = random_name()?;
        self.marks.push_back(mark.clone());
        if self.marks.len() > MARKS {
            self.marks.pop_front();
        }
        Ok(Record { beat: self.record.beat + 1, mark, ..self.record.clone() })
    }
}

impl Lease {
    /// Takes the record that was read, if nobody else does in the same moment.
    pub(crate) fn take(
        bucket: &dyn Store,
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
            mark: random_name()?,
            owner_epoch: me.owner_epoch,
            prefix: Some(bucket.prefix().to_owned()),
        };
        let asked = Moment::now();
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
            marks: VecDeque::from([record.mark.clone()]),
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
    pub(crate) fn settle(&self, bucket: &dyn Store, taken: Duration) -> Result<(), Fault> {
        if self.state().settled {
            return Ok(());
        }
        std::thread::sleep((taken + SETTLE).saturating_sub(uptime()));
        self.look(bucket)?;
        self.state().settled = true;
        Ok(())
    }

    /// Whether we may write: known from some moments ago, or asked now.
    pub(crate) fn confirm(&self, bucket: &dyn Store) -> Result<(), Fault> {
        self.confirm_within(bucket, fresh(self.beat))
    }

    /// The same before the manifest is written to.
    pub(crate) fn confirm_just_now(&self, bucket: &dyn Store) -> Result<(), Fault> {
        self.confirm_within(bucket, JUST_NOW)
    }

    fn confirm_within(&self, bucket: &dyn Store, within: Duration) -> Result<(), Fault> {
        let known = {
            let state = self.state();
            state.is_held()?;
            state.confirmed.is_followed_by(Moment::now(), within)
        };
        if known { Ok(()) } else { self.look(bucket) }
    }

    /// Whether it was lost to a copy of this machine, which has all of its names.
    pub(crate) fn was_lost_to_a_copy(&self) -> bool {
        self.state().lost.as_ref().is_some_and(|lost| lost.to_a_copy)
    }

    /// One beat: keeps the record fresh for others, and sees whether it is still ours.
    pub(crate) fn renew(&self, bucket: &dyn Store) -> Result<(), Fault> {
        let (record, when) = {
            let mut state = self.state();
            state.is_held()?;
            let late = !state.confirmed.is_followed_by(Moment::now(), self.beat * 3 / 2);
            if !state.conditional && (late || !state.looked) {
                state.looked = true;
                drop(state);
                return self.look(bucket);
            }
            state.looked = false;
            let when = match (&state.etag, state.conditional) {
                (Some(etag), true) => When::Unchanged(etag.clone()),
                _ => When::Always,
            };
            (state.next()?, when)
        };
        let asked = Moment::now();
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
    pub(crate) fn look(&self, bucket: &dyn Store) -> Result<(), Fault> {
        let asked = Moment::now();
        let found = read(bucket)?;
        let mut state = self.state();
        let Some((record, etag)) = found else {
            return Err(state.lose("the ownership record has vanished from the bucket".to_owned(), false));
        };
        if record.session != self.me.session || record.epoch != state.record.epoch {
            let who = short(&record.instance);
            let why = format!("instance {who} owns the bucket now (epoch {})", record.epoch);
            return Err(state.lose(why, false));
        }
        if !state.marks.contains(&record.mark) {
            let why = "a copy of this machine owns the bucket: both were resumed from one snapshot";
            return Err(state.lose(why.to_owned(), true));
        }
        (state.etag, state.confirmed) = (etag, asked);
        state.record.beat = state.record.beat.max(record.beat);
        Ok(())
    }

    /// Gives the bucket to whoever comes next.
    pub(crate) fn release(&self, bucket: &dyn Store) -> Result<(), Fault> {
        self.look(bucket)?;
        let (record, when) = {
            let mut state = self.state();
            let record = Record { released: true, ..state.next()? };
            let when = state.etag.clone().filter(|_| state.conditional).map_or(When::Always, When::Unchanged);
            (record, when)
        };
        write(bucket, &record, &when).map(drop)
    }
}

fn fresh(beat: Duration) -> Duration {
    FRESH.min(beat * 3 / 2)
}

/// One that nobody else has. Two kernels that were resumed from one snapshot may give the same random
/// numbers; they do not come here at the same nanosecond.
pub(crate) fn random_name() -> Result<String, Fault> {
    let mut bytes = [0u8; 32];
    getrandom::fill(&mut bytes).map_err(|_| Fault::other("the kernel gives no random numbers"))?;
    let digest = Sha256::new().chain_update(bytes).chain_update(Moment::now().bytes()).finalize();
    let mut name = Digest(digest.into()).to_string();
    name.truncate(32);
    Ok(name)
}

/// Enough of a random name for people.
pub(crate) fn short(name: &str) -> &str {
    name.get(..8).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    const BEAT: Duration = Duration::from_secs(60);

    fn me() -> Me {
        Me { instance: "volume".into(), session: "worker".into(), place: "here".into(), owner_epoch: 0 }
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
            mark: String::new(),
            owner_epoch: 0,
            prefix: None,
        }
    }

    /// One object, on a server that knows conditions or does not.
    struct Fake {
        key: ManifestKey,
        prefix: &'static str,
        conditional: bool,
        object: Mutex<Option<(Vec<u8>, u64)>>,
        reads: AtomicUsize,
    }

    impl Fake {
        fn new(conditional: bool) -> Self {
            let key = ManifestKey::new(zeroize::Zeroizing::new(vec![7; 32]));
            Self { key, prefix: "one", conditional, object: Mutex::default(), reads: AtomicUsize::new(0) }
        }

        fn reads(&self) -> usize {
            self.reads.swap(0, Ordering::Relaxed)
        }
    }

    impl Store for Fake {
        fn read(&self, _: &str) -> Result<Option<Found>, Fault> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            let object = self.object.lock().unwrap().clone();
            Ok(object.map(|(bytes, number)| (bytes, Some(number.to_string()))))
        }

        fn write(&self, _: &str, bytes: &[u8], when: &When) -> Result<Option<String>, Fault> {
            let mut object = self.object.lock().unwrap();
            let number = object.as_ref().map_or(0, |(_, number)| *number);
            let holds = match when {
                When::Always => true,
                When::Absent => object.is_none(),
                When::Unchanged(etag) => *etag == number.to_string(),
            };
            if self.conditional && !holds {
                return Err(Fault::Conflict);
            }
            *object = Some((bytes.to_vec(), number + 1));
            Ok(Some((number + 1).to_string()))
        }

        fn key(&self) -> &ManifestKey {
            &self.key
        }

        fn prefix(&self) -> &str {
            self.prefix
        }
    }

    impl Lease {
        fn of(fake: &Fake) -> Self {
            Self::take(fake, &me(), &When::Always, 1, 0, BEAT).unwrap()
        }

        /// As two machines have it that were resumed from one snapshot.
        fn copied(&self) -> Self {
            let state = self.state();
            let (record, etag, marks) = (state.record.clone(), state.etag.clone(), state.marks.clone());
            let State { conditional, confirmed, looked, settled, .. } = *state;
            let lost = state.lost.clone();
            let state = State { record, etag, conditional, confirmed, marks, looked, settled, lost };
            Self { me: self.me.clone(), beat: self.beat, state: Mutex::new(state) }
        }

        /// The bucket's last word is older than any that is believed.
        fn ages(&self) {
            self.ages_by(FRESH);
        }

        fn ages_by(&self, by: Duration) {
            let mut state = self.state();
            state.confirmed = state.confirmed.earlier(by);
        }

        /// Until a beat has written, which every second one does.
        fn beats(&self, fake: &Fake) -> Result<(), Fault> {
            self.renew(fake).and_then(|()| self.renew(fake))
        }
    }

    #[test]
    fn of_two_machines_that_were_resumed_from_one_snapshot_one_writes() {
        for conditional in [true, false] {
            let fake = Fake::new(conditional);
            let one = Lease::of(&fake);
            one.beats(&fake).unwrap();
            let other = one.copied();
            one.beats(&fake).unwrap();
            // It beats before it writes, or writes before it beats.
            let also = other.copied();
            other.ages();
            for said in [other.confirm(&fake), also.beats(&fake)] {
                assert!(matches!(said, Err(Fault::Fenced(_))), "{said:?}, conditional: {conditional}");
            }
            assert!(other.was_lost_to_a_copy() && also.was_lost_to_a_copy());
            assert!(matches!(other.confirm_just_now(&fake), Err(Fault::Fenced(_))), "for ever");
            // And the first one does not notice.
            one.ages();
            one.confirm(&fake).unwrap();
            one.beats(&fake).unwrap();
            assert!(!one.was_lost_to_a_copy());
        }
    }

    #[test]
    fn of_two_copies_that_have_beaten_as_often_one_writes() {
        let fake = Fake::new(false);
        let one = Lease::of(&fake);
        let other = one.copied();
        // Neither looks: both write the same beat of the same session.
        for lease in [&one, &other] {
            lease.state().looked = true;
            lease.renew(&fake).unwrap();
        }
        for lease in [&one, &other] {
            lease.ages();
        }
        other.confirm(&fake).unwrap();
        assert!(matches!(one.confirm(&fake), Err(Fault::Fenced(_))) && one.was_lost_to_a_copy());
    }

    #[test]
    fn an_answer_that_got_lost_makes_nobody_a_copy() {
        for conditional in [true, false] {
            let fake = Fake::new(conditional);
            let lease = Lease::of(&fake);
            let lost = lease.state().next().unwrap();
            write(&fake, &lost, &When::Always).unwrap();
            lease.ages();
            lease.confirm(&fake).unwrap();
            lease.beats(&fake).unwrap();
            // It is carried out once more, after others.
            write(&fake, &lost, &When::Always).unwrap();
            lease.ages();
            lease.confirm(&fake).unwrap();
            lease.release(&fake).unwrap();
            assert!(read(&fake).unwrap().is_some_and(|(record, _)| record.released));
        }
    }

    #[test]
    fn the_manifest_is_written_on_a_word_of_this_moment_and_objects_on_one_of_some_moments_ago() {
        let fake = Fake::new(false);
        let lease = Lease::of(&fake);
        lease.look(&fake).unwrap();
        fake.reads();
        lease.confirm(&fake).unwrap();
        lease.confirm_just_now(&fake).unwrap();
        assert_eq!(fake.reads(), 0);
        lease.ages_by(JUST_NOW);
        lease.confirm(&fake).unwrap();
        assert_eq!(fake.reads(), 0);
        lease.confirm_just_now(&fake).unwrap();
        assert_eq!(fake.reads(), 1);
    }

    #[test]
    fn an_epoch_below_the_records_is_refused_and_the_first_one_is_not_written() {
        let of = |owner_epoch| Record { owner_epoch, ..record("other", "there", true) };
        let mine = |owner_epoch| Me { owner_epoch, ..me() };
        assert!(refuse_older(None, &mine(0)).is_ok());
        for (theirs, ours, good) in [(0, 0, true), (2, 2, true), (2, 3, true), (2, 1, false), (1, 0, false)] {
            assert_eq!(refuse_older(Some(&of(theirs)), &mine(ours)).is_ok(), good, "{theirs} {ours}");
        }
        let refused = refuse_older(Some(&of(2)), &mine(1)).unwrap_err();
        assert!(!refused.may_pass() && !refused.to_string().contains('2'), "{refused}");
        assert!(refused.to_string().contains("CVM_OWNER of that epoch"), "{refused}");
        // The tag is over these bytes: a version before reads and writes the same.
        let text = serde_json::to_string(&of(0)).unwrap();
        assert!(!text.contains("owner_epoch"), "{text}");
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), of(0));
        let text = serde_json::to_string(&of(2)).unwrap();
        assert_eq!(serde_json::from_str::<Record>(&text).unwrap(), of(2));
    }

    #[test]
    fn a_record_stands_under_no_other_prefix_than_its_own() {
        let mut fake = Fake::new(true);
        let lease = Lease::of(&fake);
        assert!(read(&fake).unwrap().is_some_and(|(record, _)| !record.is_unbound()));
        fake.prefix = "two";
        assert!(matches!(read(&fake), Err(Fault::Config(why)) if why.contains("S3_PREFIX=one")));
        assert!(matches!(lease.look(&fake), Err(Fault::Config(_))));
        // One of an older version says nothing of it, and so stands under any.
        write(&fake, &record("other", "there", true), &When::Always).unwrap();
        assert!(read(&fake).unwrap().is_some_and(|(record, _)| record.is_unbound()));
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
