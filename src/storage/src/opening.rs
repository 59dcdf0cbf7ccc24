//! From a specification to a tree: the bucket is looked at, owned, read and compared with what the
//! volume knows, and the tree is put together in one of the two modes.
//!
//! ```text
//! survey -> ownership -> is this volume's past the bucket's? -> manifest -> mount or download -> tree
//! ```
//!
//! Every way out that is not a tree leaves the bucket as it was, but for the ownership record.
//! Refuses to merge two histories: a volume with another past is set aside.
//! May import: everything but `push` and `worker`.

use crate::bucket::{Bucket, Survey};
use crate::chain::{Chain, Loaded};
use crate::desk::{Desk, Open};
use crate::entry::{Entry, Kind, Path};
use crate::fault::{Accepted, Fault};
use crate::fetch::{self, Fetcher, Got, Wanted};
use crate::index::{Index, Known, Row, Sign};
use crate::manifest::{Head, Line, Word};
use crate::mount::{self, NoMount, StandIn};
use crate::owner::{self, Lease, Me, Verdict, uptime};
use crate::rclone::MountModes;
use crate::s3::When;
use crate::scan::{Found, Scanner};
use crate::volume::{self, Volume, Within};
use crate::{hydrate, moved, rules, scan};
use cvm_blueprint::storage::{Mode, Progress, StorageSpec};
use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path as FsPath;
use std::time::Duration;

/// The largest file that is fetched before the gateway starts only because of where it lies.
const EARLY_MAX: u64 = 4 << 20;

/// What the operator has said, for one try.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Said<'a> {
    pub(crate) accepted: &'a Accepted,
    pub(crate) takeover: bool,
}

/// The volume, held by this worker alone.
pub(crate) struct Held {
    pub(crate) volume: Volume,
    pub(crate) index: Index,
    pub(crate) me: Me,
    _lock: nix::fcntl::Flock<File>,
}

/// A tree that is good.
pub(crate) struct Ready {
    pub(crate) open: std::sync::Arc<Open>,
    pub(crate) lease: std::sync::Arc<Lease>,
    pub(crate) chain: Chain,
    pub(crate) mode: Mode,
    pub(crate) reason: Option<String>,
    pub(crate) stand_in: Option<StandIn>,
    /// As long as it is held, no other worker touches this volume.
    pub(crate) _lock: nix::fcntl::Flock<File>,
}

/// What is asked of the caller while a boot waits for another owner: true ends the wait.
pub(crate) type Pause<'a> = &'a mut dyn FnMut(Duration) -> Result<bool, Fault>;

/// The gateway's user on this machine, or what it will be when it is made: that comes after us.
pub(crate) fn uid_gid(user: &str) -> (u32, u32) {
    use cvm_blueprint::accounts::{Account, GATEWAY_ID};
    if user == "root" {
        return (0, 0);
    }
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    Account::find(&read("/etc/passwd"), &read("/etc/group"), user)
        .map_or((GATEWAY_ID, GATEWAY_ID), |account| (account.uid, account.gid))
}

/// The volume where it is now: at /data, or beside it when an overlay already hides it.
pub(crate) fn hold_volume(data: &FsPath) -> Result<Held, Fault> {
    let hidden = FsPath::new(cvm_blueprint::paths::VOLUME);
    let root = if mount::is_mount(cvm_blueprint::paths::VOLUME) { hidden } else { data };
    let volume = Volume::plain(root)?;
    let file = File::options().create(true).truncate(false).write(true).open(volume.own.join("lock"))?;
    let inode = file.metadata()?;
    let lock = nix::fcntl::Flock::lock(file, nix::fcntl::FlockArg::LockExclusiveNonblock)
        .map_err(|_| Fault::Fenced("another storage worker holds this volume".to_owned()))?;
    let index = Index::open(&volume.own.join("index"))?;
    let instance = if let Some(instance) = index.meta("instance")? {
        instance
    } else {
        let instance = owner::random_name()?;
        index.set_meta("instance", &instance)?;
        instance
    };
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let place = format!("{}/{}/{}", boot.trim(), inode.dev(), inode.ino());
    Ok(Held { volume, index, me: Me { instance, session: owner::random_name()?, place }, _lock: lock })
}

/// The tree that an earlier worker has left on the volume, and what of it the bucket does not have:
/// as far as is known without the bucket.
pub(crate) fn left_behind(prefix: &str) -> Result<Option<(Volume, Found)>, Fault> {
    use cvm_blueprint::paths::{DATA, VOLUME};
    if ![VOLUME, DATA].iter().any(|root| FsPath::new(root).join(".cvm/storage/index").exists()) {
        return Ok(None);
    }
    let Held { volume, index, _lock: lock, .. } = hold_volume(FsPath::new(DATA))?;
    let in_layer = fs::read_dir(volume.own.join("upper"))?
        .any(|entry| entry.is_ok_and(|entry| !Volume::is_ours(entry.file_name().as_bytes())));
    let volume = if in_layer { volume.overlaid(FsPath::new(DATA)) } else { volume };
    let made = if in_layer { "lowered" } else { "restored" };
    let is_ours = index.meta(made)?.is_some() || index.meta("independent")?.is_some();
    if !is_ours || index.head()?.generation == 0 {
        return Ok(None);
    }
    let found = Scanner::new(&volume, &index, prefix, &HashSet::new()).full()?;
    drop(lock);
    Ok(Some((volume, found)))
}

/// The whole way. `pause` is called while another instance owns the bucket.
pub(crate) fn open(
    spec: &StorageSpec,
    desk: &Desk,
    word: Said<'_>,
    pause: Pause<'_>,
) -> Result<Ready, Fault> {
    desk.phase("opening");
    let bucket = Bucket::new(spec)?;
    desk.did("rclone");
    let survey = bucket.survey()?;
    desk.did("bucket");
    let held = hold_volume(FsPath::new(cvm_blueprint::paths::DATA))?;
    held.volume.clear_staging_but_parts()?;
    let ours = held.index.own_epoch()?.unwrap_or(0);
    still_there(&held, survey, word)?;
    // Before the record is read: what is written after it has an epoch that it knows.
    let newest = if survey == Survey::Managed { Chain::newest(&bucket)? } else { (0, 0) };
    let known = ours.max(newest.0);
    let beat = Duration::from_secs(u64::from(spec.heartbeat_s.max(1)));
    let before = wait_for_it(&bucket, desk, &held.me, known, beat, word, &mut *pause)?;
    let tried = Tried::read(&held.index)?;
    let owned_by_others = before.record.as_ref().is_some_and(|r| r.epoch > ours && !tried.includes(r));
    if let Some(record) = before.record.as_ref().filter(|r| r.epoch < known) {
        word.accepted.or_refuse(format!(
            "the ownership record is older than what its owners have done: epoch {} in the record, {known} was reached",
            record.epoch
        ))?;
    }
    let survey = without_manifest(survey, &before, &held, word)?;
    // The record may be gone; what its owners wrote has their epochs.
    let met = ours.max(held.index.number("met")?);
    let another = owned_by_others || newest.0 > met || is_behind(&held, newest, ours)?;
    // All that the bucket has may be of ours, and the answer to it lost.
    let unknown = ours == 0 || newest != (ours, 1);
    let held = past(desk, held, survey, another, unknown)?;
    tried.and(before.record.as_ref(), &held)?;
    let taken = uptime();
    let reached = before.record.as_ref().map_or(0, |record| record.generation);
    let lease = Lease::take(&bucket, &held.me, &before.when, before.epoch, reached, beat)?;
    if let Some(doubt) = lease.doubt(before.forced, before.read_at) {
        let until = uptime() + doubt;
        // Who succeeds itself on a busy machine takes its tree from nobody.
        if before.record.as_ref().is_none_or(|record| record.instance != held.me.instance) {
            desk.waits("the last owner gets a moment to see that it has a successor".to_owned());
        }
        while uptime() < until {
            pause(until.saturating_sub(uptime()))?;
        }
        lease.look(&bucket)?;
    }
    desk.identity(&held.me.instance, lease.epoch());
    desk.did("ownership");
    let ready = tree(spec, desk, bucket, held, lease, survey, word, taken, reached, newest.0);
    if ready.is_err() {
        desk.opened(None);
    }
    ready
}

/// Sessions of this volume's whose epoch may be in the record without ever having come to a tree:
/// written down before the bucket is taken, so that a try that fails is not mistaken for another
/// owner, for whom the volume's tree would be set aside.
struct Tried(Vec<String>);

impl Tried {
    fn read(index: &Index) -> Result<Self, Fault> {
        let text = index.meta("tried")?.unwrap_or_default();
        Ok(Self(text.split_whitespace().map(str::to_owned).collect()))
    }

    fn includes(&self, record: &owner::Record) -> bool {
        self.0.contains(&record.session)
    }

    /// The next try, beside the one that the record is of.
    fn and(self, record: Option<&owner::Record>, held: &Held) -> Result<(), Fault> {
        let last = record.filter(|record| self.includes(record)).map(|record| record.session.as_str());
        let both: Vec<&str> = last.into_iter().chain([held.me.session.as_str()]).collect();
        held.index.set_meta("tried", &both.join(" "))
    }
}

struct Before {
    record: Option<owner::Record>,
    /// On what our own record depends.
    when: When,
    epoch: u64,
    read_at: Duration,
    /// The operator did not want to wait.
    forced: bool,
}

/// A bucket that this volume has written to, and that has no manifest any more.
fn still_there(held: &Held, survey: Survey, word: Said<'_>) -> Result<(), Fault> {
    let known = held.index.head()?.generation;
    if survey == Survey::Managed || known == 0 {
        return Ok(());
    }
    word.accepted
        .or_refuse(format!("the bucket holds nothing of what this volume has written (generation {known})"))
}

/// Objects with an owner and without a manifest: an adoption of our own goes on, anything else is
/// for the operator to judge.
fn without_manifest(survey: Survey, before: &Before, held: &Held, word: Said<'_>) -> Result<Survey, Fault> {
    let ours = before.record.as_ref().is_some_and(|r| r.instance == held.me.instance);
    match survey {
        Survey::Bereft if ours => Ok(Survey::Unmanaged),
        Survey::Bereft => {
            let why = "the bucket holds objects and the record of an owner, and their manifest is gone";
            word.accepted.or_refuse(why.to_owned()).map(|()| Survey::Unmanaged)
        }
        other => Ok(other),
    }
}

/// The record with what a write of ours depends on. One that is not authentic is written over if
/// the operator has accepted that.
fn record(bucket: &Bucket, word: Said<'_>) -> Result<(Option<owner::Record>, When), Fault> {
    Ok(match owner::read(bucket) {
        Err(fault) if word.accepted.includes(&fault) => (None, When::Always),
        other => match other? {
            None => (None, When::Absent),
            Some((record, etag)) => (Some(record), etag.map_or(When::Always, When::Unchanged)),
        },
    })
}

fn wait_for_it(
    bucket: &Bucket,
    desk: &Desk,
    me: &Me,
    known: u64,
    beat: Duration,
    word: Said<'_>,
    pause: Pause<'_>,
) -> Result<Before, Fault> {
    let mut seen: Option<(Option<owner::Record>, Duration)> = None;
    let mut forced = word.takeover;
    loop {
        let (record, when) = record(bucket, word)?;
        let read_at = uptime();
        let since = match &seen {
            Some((old, since)) if *old == record => *since,
            _ => read_at,
        };
        seen = Some((record.clone(), since));
        let unchanged = read_at.saturating_sub(since);
        let judged = |unchanged| owner::judge(record.as_ref(), me, known, unchanged, beat);
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
fn is_behind(held: &Held, (epoch, written): (u64, u64), ours: u64) -> Result<bool, Fault> {
    Ok(epoch == ours && written > held.index.head()?.generation + 1)
}

/// Whether what is on the volume belongs to what is in the bucket. `another`: others were there since;
/// `unknown`: who has no index of the bucket has nothing to do with it.
fn past(desk: &Desk, held: Held, survey: Survey, another: bool, unknown: bool) -> Result<Held, Fault> {
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

/// A tree that is not to be merged with the bucket's. Yields the volume without it.
fn put_aside(desk: &Desk, index: &Index) -> Result<Volume, Fault> {
    // Whoever stands on it hears of it first.
    desk.not_ready("opening", "the volume holds a state with another past".to_owned(), true);
    let name = format!("epoch-{}-{}", index.own_epoch()?.unwrap_or(0), crate::chain::now_ms());
    mount::clear()?;
    // With the overlay gone, the volume is at /data again, wherever it was found.
    let volume = Volume::plain(FsPath::new(cvm_blueprint::paths::DATA))?;
    volume.set_aside(&name)?;
    desk.warn(format!(
        "The volume holds a state with another past than the bucket's; it is set aside in .cvm/storage/aside/{name} on the volume and neither merged nor pushed"
    ));
    Ok(volume)
}

#[allow(clippy::too_many_arguments)] // each is one thing that the way here has made sure of
fn tree(
    spec: &StorageSpec,
    desk: &Desk,
    bucket: Bucket,
    held: Held,
    lease: Lease,
    survey: Survey,
    word: Said<'_>,
    taken: Duration,
    reached: u64,
    newest: u64,
) -> Result<Ready, Fault> {
    let owner = uid_gid(&spec.user);
    let anchor = spec.anchor.as_deref().and_then(Head::parse_anchor);
    let Held { volume, index, _lock: lock, .. } = held;
    if anchor.is_some() && survey != Survey::Managed {
        word.accepted.or_refuse("STATE_ANCHOR is given, and the bucket has no manifest".to_owned())?;
    }
    let loaded = match survey {
        Survey::Managed => Chain::load(&bucket, &index, owner, anchor, word.accepted)?,
        _ => Loaded { chain: Chain::empty(owner), intents: Vec::new(), continued: false, is_cut: false },
    };
    let Loaded { mut chain, intents, continued, is_cut } = loaded;
    if is_cut {
        index.set_meta("cut", &reached.to_string())?;
    }
    // Who has accepted a manifest that is not all there has accepted that this try's is not.
    if survey == Survey::Managed && chain.head.generation < reached && index.number("cut")? != reached {
        word.accepted.or_refuse(format!(
            "the end of the manifest is missing: it is at generation {}, and its last owner had come to {reached}",
            chain.head.generation
        ))?;
    }
    // An earlier try may have come as far as the index, and not as far as here.
    let continued = continued && !index.is_of_another_tree()?;
    if survey == Survey::Managed && !continued && !volume.is_empty()? {
        put_aside(desk, &index)?;
    }
    index.has_its_tree()?;
    // The volume has no past that is older than this.
    index.set_meta("met", &newest.to_string())?;
    let nothing_left = survey == Survey::Managed && chain.head.generation == 0;
    let adopted = survey == Survey::Unmanaged || nothing_left;
    if adopted {
        adopt(&bucket, &index, &mut chain, desk, owner, &lease, taken)?;
    }
    desk.did("manifest");
    // What still holds is found again.
    desk.forget_incidents();
    desk.head(chain.head, index.totals()?);
    let alive = continued && mount::overlay_is_alive() && index.meta("independent")?.is_some();
    let stands = if alive {
        let volume = volume.overlaid(FsPath::new(cvm_blueprint::paths::DATA));
        Stands { volume, mode: Mode::Fuse, reason: None, stand_in: None }
    } else {
        let counted_on = continued && index.meta("independent")?.is_some();
        if counted_on && mount::overlay_is_there() && mount::is_first_to_find_it_dead() {
            return Err(Fault::Tree);
        }
        let made = Making { desk, bucket: &bucket, index: &index, intents: &intents, continued, owner };
        made.stand(adopted, word.accepted)?
    };
    desk.did("tree");
    settle(&lease, &bucket, &index, taken)?;
    if !alive {
        keep_promises(&mut chain, &bucket, &index, &lease, &intents)?;
    }
    desk.did("still ours");
    Ok(Ready {
        open: opened(desk, bucket, index, stands.volume),
        lease: lease.into(),
        chain,
        mode: stands.mode,
        reason: stands.reason,
        stand_in: stands.stand_in,
        _lock: lock,
    })
}

/// A tree at /data, and how it came to be.
struct Stands {
    volume: Volume,
    mode: Mode,
    /// Why it is not the better mode.
    reason: Option<String>,
    stand_in: Option<StandIn>,
}

/// What a tree is made from.
struct Making<'a> {
    desk: &'a Desk,
    bucket: &'a Bucket,
    index: &'a Index,
    intents: &'a [Line],
    /// The volume goes on where it was.
    continued: bool,
    owner: (u32, u32),
}

impl Making<'_> {
    fn stand(&self, adopted: bool, accepted: &Accepted) -> Result<Stands, Fault> {
        if !mount::may_open_by_handle() {
            self.desk.warn(
                "CAP_DAC_READ_SEARCH is missing: where a renamed file went is known by two scans in a row only. \
                 Set `cap_add: [DAC_READ_SEARCH]` for it in docker-compose.yml",
            );
        }
        mount::clear()?;
        let volume = Volume::plain(FsPath::new(cvm_blueprint::paths::DATA))?;
        let possible = if adopted {
            Err(NoMount("a bucket without a manifest is read in full, once".to_owned()))
        } else {
            mount::possible()
        };
        let NoMount(reason) = match possible.and_then(|()| self.by_mount(&volume, accepted)) {
            Ok(outcome) => return outcome,
            Err(no) => no,
        };
        self.desk.info("FUSE mount failed, falling back to sync mode.");
        self.desk.info(format!("Reason: {reason}"));
        mount::clear()?;
        let volume = Volume::plain(FsPath::new(cvm_blueprint::paths::DATA))?;
        let bad = self.by_download(&volume)?;
        judge(self.desk, self.index, &bad, accepted)?;
        self.index.set_meta("restored", "1")?;
        let _ = fs::remove_dir_all(volume.own.join("staging/parts"));
        if adopted {
            old_databases(self.desk, &volume)?;
        }
        Ok(Stands { volume, mode: Mode::Sync, reason: Some(reason), stand_in: None })
    }
}

/// Names what the bucket does not have right. Without what the gateway reads while it starts it
/// would make it anew, and that would take the place of what was lost: then the operator is asked,
/// and what he accepts is given up.
fn judge(desk: &Desk, index: &Index, bad: &[(Path, String)], accepted: &Accepted) -> Result<(), Fault> {
    let (mut vital, mut others) = (Vec::new(), Vec::new());
    for (path, why) in bad {
        let database = index.get(path)?.is_some_and(|row| row.entry.is_database());
        let needed = database || rules::is_read_at_start(path);
        if needed { &mut vital } else { &mut others }.push((path, why));
    }
    let given_up = |(path, why): &(&Path, &String)| accepted.includes_file(&path.to_string(), why);
    let refused = vital.iter().filter(|file| !given_up(file));
    // First what is refused: only what is named can be accepted.
    for (path, why) in refused.clone().chain(&others) {
        desk.incident(&path.to_string(), why, hydrate::REMEDY);
    }
    let good = refused.count() == 0;
    let paths: Vec<Path> = vital.into_iter().map(|(path, _)| path.clone()).collect();
    for path in &paths {
        index.set_bad(path, None)?;
    }
    // Looked at again by the next try; of what is accepted, nothing is anywhere.
    index.set_lower(&paths, !good)?;
    if good {
        return Ok(());
    }
    Err(Fault::Suspicious(format!(
        "{} files that the gateway reads while it starts are missing or damaged in the bucket; `cvm storage status` names them",
        paths.len()
    )))
}

/// What became of the promises of a worker that died, for those who read the manifest next.
fn keep_promises(
    chain: &mut Chain,
    bucket: &Bucket,
    index: &Index,
    lease: &Lease,
    intents: &[Line],
) -> Result<(), Fault> {
    let paths: std::collections::BTreeSet<&Path> = intents.iter().map(|line| &line.path).collect();
    let mut lines = Vec::new();
    for path in paths {
        let word = match index.get(path)? {
            None => Word::Gone,
            // Not fetched, because this volume has it: it is pushed again.
            Some(row) if row.unsure || row.bad.is_some() => continue,
            Some(row) => Word::Is(row.entry),
        };
        lines.push(Line { path: path.clone(), word });
    }
    if lines.is_empty() {
        return Ok(());
    }
    chain.append(bucket, index, lease.epoch(), &lines)
}

fn settle(lease: &Lease, bucket: &Bucket, index: &Index, taken: Duration) -> Result<(), Fault> {
    lease.settle(bucket, taken)?;
    index.set_meta("epoch", &lease.epoch().to_string())
}

fn opened(desk: &Desk, bucket: Bucket, index: Index, volume: Volume) -> std::sync::Arc<Open> {
    let open = std::sync::Arc::new(Open { bucket, index, volume, boot: desk.boot.clone() });
    if let Err(fault) = hydrate::once_more(&open, desk) {
        desk.failed(&fault, None);
    }
    desk.opened(Some(std::sync::Arc::clone(&open)));
    open
}

/// A bucket that something older wrote: its listing becomes the first manifest.
fn adopt(
    bucket: &Bucket,
    index: &Index,
    chain: &mut Chain,
    desk: &Desk,
    owner: (u32, u32),
    lease: &Lease,
    taken: Duration,
) -> Result<(), Fault> {
    let listed = bucket.rclone.list_all(true)?;
    desk.warn(format!(
        "The bucket has no manifest: {} objects of an older version are adopted as they are. What they were before cannot be checked",
        listed.len()
    ));
    settle(lease, bucket, index, taken)?;
    let mut lines: Vec<Line> = Vec::new();
    let mut directories = std::collections::BTreeSet::new();
    for object in listed {
        let Some(path) = Path::new(object.name.as_bytes()) else { continue };
        let mut above = path.parent();
        while let Some(dir) = above {
            above = dir.parent();
            directories.insert(dir);
        }
        let kind = Kind::File { size: object.size, sha: None, database: false };
        let entry =
            Entry { kind, mode: 0o600, uid: owner.0, gid: owner.1, mtime_ns: object.mtime_ns, link: None };
        lines.push(Line { path, word: Word::Is(entry) });
    }
    let now = i64::try_from(crate::chain::now_ms()).unwrap_or(0).saturating_mul(1_000_000);
    let directory = |path| Line {
        path,
        word: Word::Is(Entry {
            kind: Kind::Directory,
            mode: 0o700,
            uid: owner.0,
            gid: owner.1,
            mtime_ns: now,
            link: None,
        }),
    };
    lines.extend(directories.into_iter().map(directory));
    // One segment: half of an adoption must not look like all of it.
    chain.append(bucket, index, lease.epoch(), &lines)
}

/// The old sync mode kept databases apart. Each goes to where it belongs, unless one is there.
fn old_databases(desk: &Desk, volume: &Volume) -> Result<(), Fault> {
    let Ok(entries) = fs::read_dir(volume.tree.join("sqlite")) else { return Ok(()) };
    for entry in entries.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(agent) = name.strip_suffix("-memory.db").filter(|a| !a.is_empty()) else { continue };
        let home = volume.tree.join("openclaw/agents").join(agent);
        let to = home.join("memory.db");
        if to.symlink_metadata().is_ok() {
            continue;
        }
        fs::create_dir_all(&home)?;
        let part = home.join(".memory.db.part");
        fs::copy(entry.path(), &part)?;
        let owner = entry.metadata()?;
        for path in [&home, &part] {
            std::os::unix::fs::lchown(path, Some(owner.uid()), Some(owner.gid()))?;
        }
        fs::rename(part, to)?;
        desk.info("A database that the old sync mode kept apart was taken to its agent");
    }
    Ok(())
}

/// What each path may become besides what it is.
type Intended = HashMap<Path, Vec<Entry>>;

fn intended(intents: &[Line]) -> Intended {
    let mut intended = Intended::new();
    for line in intents {
        if let Word::WillBe(entry) = &line.word {
            intended.entry(line.path.clone()).or_default().push(entry.clone());
        }
    }
    intended
}

fn wanted(path: &Path, row: &Row, intended: &Intended) -> Wanted {
    let mut may_be = vec![row.entry.clone()];
    may_be.extend(intended.get(path).into_iter().flatten().cloned());
    Wanted { path: path.clone(), may_be }
}

// === FUSE mode ===

impl Making<'_> {
    /// Refusals of the mount are a reason for the other mode; faults of the tree are not.
    fn by_mount(&self, plain: &Volume, accepted: &Accepted) -> Result<Result<Stands, Fault>, NoMount> {
        let Self { desk, bucket, index, intents, continued, owner } = *self;
        let no = |fault: Fault| NoMount(fault.to_string());
        desk.info("Attempting FUSE mount...");
        mount::bind_volume()?;
        let volume = Volume::plain(FsPath::new(cvm_blueprint::paths::VOLUME)).map_err(no)?;
        let overlaid = volume.overlaid(&plain.tree);
        // What a boot in sync mode, or a local one, left at the top of the volume is the upper layer.
        let upper_was_empty = fs::read_dir(&overlaid.upper).is_ok_and(|mut entries| entries.next().is_none());
        let at_top = Volume::move_tree(&volume.root, &overlaid.upper).map_err(no)?;
        mount::hide_reserved(&overlaid).map_err(no)?;
        // A tree at the top that was only half restored is not the whole one.
        let whole = at_top > 0 && continued && index.meta("restored").map_err(no)?.is_some();
        let independent = index.meta("independent").map_err(no)?.is_some() || whole;
        if independent || index.totals().map_err(no)?.files == 0 {
            index.set_all_lower(false).map_err(no)?;
            index.set_meta("independent", "1").map_err(no)?;
            mount::overlay(&overlaid, None)?;
            desk.info("The volume holds the whole tree; no mount of the bucket is needed");
            return Ok(Ok(Stands { volume: overlaid, mode: Mode::Fuse, reason: None, stand_in: None }));
        }
        if at_top > 0 && continued {
            // A restore in sync mode did not come to its end.
            index.set_unseen_lower().map_err(no)?;
            index.set_meta("lowered", "1").map_err(no)?;
        } else if !continued || upper_was_empty || index.meta("lowered").map_err(no)?.is_none() {
            // Remembered apart: a worker that died before this must not take what it had not even
            // looked at for removed.
            index.set_all_lower(true).map_err(no)?;
            index.set_meta("lowered", "1").map_err(no)?;
        }
        desk.did("volume");
        let layer = Layer::lay(desk, index, &overlaid, intents, owner).map_err(no)?;
        desk.did("layer");
        // One waits for the bucket, the other for the kernel.
        let (mounted, bad) = std::thread::scope(|scope| {
            let mounting = scope.spawn(|| mount::mount_bucket(&bucket.rclone, &layer.names, &layer.modes));
            let bad = layer.fetch(desk, bucket, index, &overlaid);
            let mounted = mounting.join();
            (mounted.unwrap_or_else(|panic| std::panic::resume_unwind(panic)), bad)
        });
        let bad = bad.map_err(no)?;
        desk.did("first files");
        if let Err(fault) = judge(desk, index, &bad, accepted) {
            mount::unmount_bucket().map_err(no)?;
            return Ok(Err(fault));
        }
        mounted?;
        forget_origins(&overlaid.upper).map_err(no)?;
        mount::overlay(&overlaid, Some(cvm_blueprint::paths::BUCKET_MOUNT))?;
        desk.info("rclone FUSE mount ready at /data");
        let stand_in = match StandIn::hand_over(&overlaid) {
            Ok(stand_in) => Some(stand_in),
            Err(fault) => {
                desk.warn(format!("Nobody stands in for the mount if this worker dies: {fault}"));
                None
            }
        };
        Ok(Ok(Stands { volume: overlaid, mode: Mode::Fuse, reason: None, stand_in }))
    }
}

/// By these marks overlayfs finds the file below that one above was copied from, by a number that
/// the mount gave it. An earlier mount's numbers are other files' now: two files above would be
/// taken for copies of one, and the second could not be opened (ESTALE). Empty means unknown.
fn forget_origins(top: &FsPath) -> Result<(), Fault> {
    const ORIGIN: &std::ffi::CStr = c"trusted.overlay.origin";
    let mut to_do = vec![top.to_owned()];
    while let Some(dir) = to_do.pop() {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            // Nothing of ours is that deep.
            if volume::is_too_long(&path) {
                continue;
            }
            let Some(stat) = volume::look(&path)? else { continue };
            // Links and whiteouts: nobody opens them twice.
            if !matches!(volume::kind_of(&stat), libc::S_IFREG | libc::S_IFDIR) {
                continue;
            }
            if volume::mark(&path, ORIGIN).is_some_and(|handle| !handle.is_empty()) {
                volume::set_mark(&path, ORIGIN, b"")?;
            }
            if volume::kind_of(&stat) == libc::S_IFDIR {
                to_do.push(path);
            }
        }
    }
    Ok(())
}

/// The modes that most files have, so that few need a correction.
fn usual_modes<'a>(lower: impl Iterator<Item = &'a Row>) -> (u32, u32) {
    let mut counts: HashMap<(bool, u32), u32> = HashMap::new();
    for row in lower {
        *counts.entry((row.entry.is_file(), row.entry.mode)).or_default() += 1;
    }
    let most = |files: bool, usual: u32| {
        counts
            .iter()
            .filter(|((f, _), _)| *f == files)
            .max_by_key(|(_, n)| **n)
            .map_or(usual, |((_, mode), _)| *mode)
    };
    (most(true, 0o600), most(false, 0o700))
}

/// Everything that must not wait for the mount, as far as it is in the upper layer before there is
/// one, and what the mount is to show.
struct Layer {
    /// What is fetched and checked before the gateway starts.
    early: Vec<Wanted>,
    /// Directories and links, and those of them that are made here.
    above: Vec<Path>,
    skeleton: Vec<(Path, Entry)>,
    /// Files of several names.
    linked: Vec<(Path, Entry)>,
    names: Vec<u8>,
    modes: MountModes,
}

impl Layer {
    fn lay(
        desk: &Desk,
        index: &Index,
        volume: &Volume,
        intents: &[Line],
        owner: (u32, u32),
    ) -> Result<Self, Fault> {
        let (rows, astray) = index.standing()?;
        // Of these nothing is anywhere: the scan takes them for what they are.
        index.set_lower(&astray, false)?;
        let intended = intended(intents);
        let laid = index.meta("laid")?.is_some();
        if !laid {
            make_way(desk, volume, &rows)?;
        }
        let lower = || rows.iter().filter(|(_, row)| row.lower);
        let (file, directory) = usual_modes(lower().map(|(_, row)| row));
        let modes = MountModes { uid: owner.0, gid: owner.1, file, directory };
        let has_usual = |entry: &Entry| (entry.mode, entry.uid, entry.gid) == (file, owner.0, owner.1);
        let of_several_names =
            |(path, row): &(Path, Row)| row.entry.link.is_some().then(|| (path.clone(), row.entry.clone()));
        let linked = rows.iter().filter_map(of_several_names).collect();
        let mut this = Self {
            early: Vec::new(),
            above: Vec::new(),
            skeleton: Vec::new(),
            linked,
            names: Vec::new(),
            modes,
        };
        let mut stubs = Vec::new();
        let mut upper = Upper::new(volume);
        for (path, row) in lower() {
            let place = if row.bad.is_some() { Place::Hidden } else { upper.place(path)? };
            if !row.entry.is_file() {
                if place != Place::Hidden {
                    if !laid || place == Place::Free {
                        // Those of a restore that was killed too: they are dressed when all is in them.
                        this.skeleton.push((path.clone(), row.entry.clone()));
                    }
                    this.above.push(path.clone());
                }
                continue;
            }
            let is_wanted = match place {
                // Removed or moved on this volume before: the scan says which.
                Place::Hidden => false,
                Place::Taken => !laid && !is_as_said(&volume.upper, path, row)?,
                Place::Free => true,
            };
            if is_wanted && is_early(path, row, &intended) {
                this.early.push(wanted(path, row, &intended));
                continue;
            }
            if is_wanted && !has_usual(&row.entry) {
                stubs.push((path, &row.entry));
            }
            if path.is_plain() {
                this.names.extend_from_slice(path.as_bytes());
                this.names.push(b'\n');
            }
        }
        fetch::skeleton(&this.skeleton, &volume.upper)?;
        for (path, entry) in stubs {
            stub(&volume.upper, path, entry)?;
        }
        Ok(this)
    }

    /// Yields what the bucket does not have right.
    fn fetch(
        &self,
        desk: &Desk,
        bucket: &Bucket,
        index: &Index,
        volume: &Volume,
    ) -> Result<Vec<(Path, String)>, Fault> {
        let bad = early_files(desk, bucket, index, volume, self.early.clone())?;
        // Their data is where it is; the manifest says the rest.
        index.set_lower(&self.above, false)?;
        let there = |(path, _): &&(Path, Entry)| path.below(&volume.upper).exists();
        let linked: Vec<_> = self.linked.iter().filter(there).cloned().collect();
        fetch::finish(&linked, &volume.upper, &volume.staging())?;
        fetch::dress_directories(&self.skeleton, &volume.upper)?;
        index.set_meta("laid", "1")?;
        Ok(bad)
    }
}

/// Whether a file has to be there, and checked, before the gateway starts.
fn is_early(path: &Path, row: &Row, intended: &Intended) -> bool {
    row.entry.is_database()
        || (rules::is_read_at_start(path) && row.entry.size() <= EARLY_MAX)
        || row.entry.size() == 0
        || row.entry.link.is_some()
        || !path.is_plain()
        || intended.contains_key(path)
        || row.entry.sha().is_none()
}

fn early_files(
    desk: &Desk,
    bucket: &Bucket,
    index: &Index,
    volume: &Volume,
    early: Vec<Wanted>,
) -> Result<Vec<(Path, String)>, Fault> {
    let (total, bytes_total) = fetch::total(&early);
    let progress = |files: u64, bytes: u64| {
        desk.progress(Some(Progress {
            what: "fetching what the gateway reads first".to_owned(),
            files_done: files,
            files_total: total,
            bytes_done: bytes,
            bytes_total,
        }));
    };
    let parts = volume.own.join("staging/parts");
    let fetcher = Fetcher { bucket, whole: index.totals()?, parts: parts.clone(), progress: &progress };
    let got = fetcher.files(early, &volume.upper)?;
    desk.progress(None);
    desk.did("fetch");
    fetch::settle_on_disk(&volume.own)?;
    desk.did("disk");
    let bad = take_over(index, volume, got)?;
    // Of a restore that was killed too: the rest comes through the mount.
    let _ = fs::remove_dir_all(parts);
    Ok(bad)
}

/// A restore that did not come to its end may have made directories where something else belongs, and
/// the other way round. They are nobody's yet, and are set aside all the same.
fn make_way(desk: &Desk, volume: &Volume, rows: &[(Path, Row)]) -> Result<(), Fault> {
    let mut upper = Upper::new(volume);
    let aside = volume.own.join("aside").join(format!("in-the-way-{}", crate::chain::now_ms()));
    let mut moved = 0u64;
    for (path, row) in rows {
        if upper.place(path)? != Place::Taken {
            continue;
        }
        let Ok(parent) = Within::open(&volume.upper, path.parent().as_ref()) else { continue };
        let at = parent.name(path.name());
        let Some(stat) = volume::look(&at)?.filter(|stat| !volume::is_whiteout(stat)) else { continue };
        if (volume::kind_of(&stat) == libc::S_IFDIR) != (row.entry.kind == Kind::Directory) {
            fs::create_dir_all(&aside)?;
            moved += 1;
            fs::rename(&at, aside.join(moved.to_string()))?;
        }
    }
    if moved > 0 {
        desk.warn(format!(
            "{moved} files or directories that an unfinished restore left in the way of others are set aside in {}",
            aside.display()
        ));
    }
    Ok(())
}

/// What was fetched is known by its looks from now on; what is bad is remembered as that.
fn take_over(index: &Index, volume: &Volume, got: Vec<Got>) -> Result<Vec<(Path, String)>, Fault> {
    let (mut lines, mut known, mut bad) = (Vec::new(), Vec::new(), Vec::new());
    for one in got {
        match one {
            Got::Good(path, entry) => {
                let at = path.below(&volume.upper);
                // One that was adopted as a plain file has to be looked at as what it is, log included.
                let unknown = !entry.is_database() && crate::database::has_magic(&at);
                if let Some(stat) = volume::look(&at)?.filter(|_| !unknown) {
                    known.push((path.clone(), scan::known_by(&at, &stat, entry.is_database())));
                }
                lines.push(Line { path, word: Word::Is(entry) });
            }
            // We died between the promise and the deed: nothing was lost that anybody had.
            Got::Bad(path, _) if index.get(&path)?.is_some_and(|row| row.promised) => index.forget(&path)?,
            Got::Bad(path, why) => bad.push((path, why)),
            Got::Later(_, fault) => return Err(fault),
        }
    }
    index.apply(&lines, None)?;
    index.set_known(&known)?;
    for (path, why) in &bad {
        index.set_bad(path, Some(why))?;
        index.set_lower(std::slice::from_ref(path), false)?;
    }
    Ok(bad)
}

/// Whether what a boot left that did not get as far as a gateway is whole: the power may have gone.
fn is_as_said(root: &FsPath, path: &Path, row: &Row) -> Result<bool, Fault> {
    let at = path.below(root);
    let Some(sha) = row.entry.sha() else { return Ok(true) };
    // A stub of ours has no content that could be wrong.
    Ok(volume::mark(&at, c"trusted.overlay.metacopy").is_some()
        || crate::stage::hash(&at)? == (row.entry.size(), sha))
}

/// A file of which only mode, owner and times are above, as overlayfs itself would make it.
fn stub(upper: &FsPath, path: &Path, entry: &Entry) -> Result<(), Fault> {
    let parent = Within::make(upper, path.parent().as_ref())?;
    let at = parent.name(path.name());
    let file = File::options().write(true).create_new(true).open(&at)?;
    file.set_len(entry.size())?;
    volume::set_mark(&at, c"trusted.overlay.metacopy", b"")?;
    volume::dress(&at, entry)
}

/// What the upper layer has at a path of the lower one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Free,
    Taken,
    /// Whatever is below there is not seen.
    Hidden,
}

/// The upper layer, of which no directory is looked at twice.
struct Upper<'a> {
    volume: &'a Volume,
    known: HashMap<Path, Place>,
}

impl<'a> Upper<'a> {
    fn new(volume: &'a Volume) -> Self {
        Self { volume, known: HashMap::new() }
    }

    fn place(&mut self, path: &Path) -> Result<Place, Fault> {
        match path.parent().map_or(Ok(Place::Taken), |parent| self.of_directory(&parent))? {
            Place::Taken => {}
            // Nothing is in what is not there.
            other => return Ok(other),
        }
        Ok(match volume::look(&path.below(&self.volume.upper))? {
            None => Place::Free,
            Some(stat) if volume::is_whiteout(&stat) => Place::Hidden,
            Some(_) => Place::Taken,
        })
    }

    /// What it is to those in it.
    fn of_directory(&mut self, dir: &Path) -> Result<Place, Fault> {
        if let Some(known) = self.known.get(dir) {
            return Ok(*known);
        }
        let place = match self.place(dir)? {
            Place::Taken if self.shows_nothing_below(dir)? => Place::Hidden,
            other => other,
        };
        self.known.insert(dir.clone(), place);
        Ok(place)
    }

    fn shows_nothing_below(&self, dir: &Path) -> Result<bool, Fault> {
        let at = dir.below(&self.volume.upper);
        let is_directory = volume::look(&at)?.is_some_and(|stat| volume::kind_of(&stat) == libc::S_IFDIR);
        Ok(!is_directory || volume::mark(&at, c"trusted.overlay.opaque").is_some_and(|v| v == b"y"))
    }
}

// === Sync mode ===

impl Making<'_> {
    /// Yields what the bucket does not have right.
    fn by_download(&self, volume: &Volume) -> Result<Vec<(Path, String)>, Fault> {
        let Self { desk, bucket, index, intents, continued, .. } = *self;
        desk.phase("restoring");
        let times = flatten(bucket, index, volume)?;
        let laid = index.meta("laid")?.is_some();
        let ((rows, _), intended) = (index.standing()?, intended(intents));
        if !laid {
            make_way(desk, volume, &rows)?;
        }
        // Once it has all been here, what is not there was removed.
        let whole = continued && index.meta("restored")?.is_some();
        let missing: Vec<&(Path, Row)> = rows
            .iter()
            .filter(|(_, row)| row.bad.is_none() && row.sign.is_none() && (row.lower || !whole))
            .collect();
        let (mut files, mut skeleton) = (Vec::new(), Vec::new());
        for (path, row) in missing {
            let there = volume::look(&path.below(&volume.tree))?.is_some();
            if row.entry.is_file() {
                if !there || !laid && !is_as_said(&volume.tree, path, row)? {
                    files.push(wanted(path, row, &intended));
                }
            } else if !laid || row.lower && !there {
                // Those of a restore that was killed too: filling them has changed their times.
                skeleton.push((path.clone(), row.entry.clone()));
            }
        }
        let (total, bytes_total) = fetch::total(&files);
        if total > 0 {
            desk.info(format!(
                "Restoring {total} files ({bytes_total} bytes) from the bucket before the gateway starts"
            ));
        }
        let progress = |done: u64, bytes: u64| {
            desk.progress(Some(Progress {
                what: "restoring from the bucket".to_owned(),
                files_done: done.min(total),
                files_total: total,
                bytes_done: bytes.min(bytes_total),
                bytes_total,
            }));
        };
        fetch::skeleton(&skeleton, &volume.tree)?;
        let parts = volume.own.join("staging/parts");
        let fetcher = Fetcher { bucket, whole: index.totals()?, parts, progress: &progress };
        let got = fetcher.files(files, &volume.tree)?;
        desk.progress(None);
        let restored: Vec<(Path, Entry)> = got
            .iter()
            .filter_map(|g| match g {
                Got::Good(path, entry) => Some((path.clone(), entry.clone())),
                _ => None,
            })
            .chain(skeleton)
            .collect();
        fetch::finish(&restored, &volume.tree, &volume.staging())?;
        for (path, time) in times {
            // What is gone meanwhile has no time.
            let _ = volume::set_mtime(&path.below(&volume.tree), time);
        }
        fetch::settle_on_disk(&volume.own)?;
        let bad = take_over(index, volume, got)?;
        index.set_all_lower(false)?;
        index.set_meta("laid", "1")?;
        Ok(bad)
    }
}

/// Makes a plain tree of an upper layer: what it hides is gone, what it holds is at the top. Yields
/// the times of its directories, which change while files are put into them.
fn flatten(bucket: &Bucket, index: &Index, volume: &Volume) -> Result<Vec<(Path, i64)>, Fault> {
    let upper = volume.own.join("upper");
    if fs::read_dir(&upper)?.next().is_none() {
        return Ok(Vec::new());
    }
    let layered = Volume { upper: upper.clone(), overlay: true, ..Volume::plain(&volume.root)? };
    let mut times = Vec::new();
    moved::times(&upper, None, &mut times)?;
    moved::bring_up(bucket, index, &layered)?;
    let mut layers = Upper::new(&layered);
    let mut gone = Vec::new();
    for (path, row) in index.all()? {
        if row.sign.is_none() && layers.place(&path)? == Place::Hidden {
            gone.push(path);
        }
    }
    // Not lower any more, and not there: the next scan takes them for what they are.
    index.set_lower(&gone, false)?;
    let unlike_any = Known { sign: Sign { size: 0, mtime_ns: 0, change: 0 }, handle: None };
    let known: Vec<_> = gone.into_iter().map(|path| (path, unlike_any.clone())).collect();
    index.set_known(&known)?;
    strip(&upper)?;
    let _ = fs::remove_dir_all(upper.join(".cvm"));
    Volume::move_tree(&upper, &volume.root)?;
    Ok(times)
}

/// Removes what only overlayfs understands. A file whose data is only below is fetched again.
fn strip(top: &FsPath) -> Result<(), Fault> {
    let (mut directories, mut next) = (vec![top.to_owned()], 0);
    while let Some(dir) = directories.get(next).cloned() {
        next += 1;
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if volume::is_too_long(&path) {
                continue;
            }
            let Some(stat) = volume::look(&path)? else { continue };
            if volume::is_whiteout(&stat) || volume::mark(&path, c"trusted.overlay.metacopy").is_some() {
                fs::remove_file(&path)?;
            } else if volume::kind_of(&stat) == libc::S_IFDIR {
                directories.push(path);
            }
        }
    }
    // Those inside first: a boot that goes on here still needs what is said of those above.
    directories.iter().skip(1).rev().for_each(|dir| volume::remove_marks(dir));
    Ok(())
}
