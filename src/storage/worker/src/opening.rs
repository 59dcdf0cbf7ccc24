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

mod download;
mod layers;
mod ownership;
pub(crate) mod setback;

use crate::bucket::{Bucket, Survey};
use crate::chain::{self, Chain, LINES, Loaded};
use crate::desk::{Desk, Open};
use crate::entry::{Entry, Kind, Path};
use crate::fault::{Accepted, Fault};
use crate::fetch::Wanted;
use crate::index::{Index, Row};
use crate::manifest::{Anchor, Line, Word};
use crate::mount::{self, NoMount, StandIn};
use crate::owner::{self, Lease, Me, uptime};
use crate::scan::{Fetched, Found, Scanner};
use crate::volume::{Volume, Within};
use crate::{hydrate, rules};
use cvm_protocol::storage::{Mode, StorageSpec, WorkerPhase};
use ownership::{
    Tried, is_behind, part_from_the_copy, past, put_aside, still_there, wait_for_it, without_manifest,
};
use std::collections::HashMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path as FsPath;
use std::time::Duration;

/// What the operator has said, for one try.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Said<'a> {
    pub(crate) accepted: &'a Accepted,
    /// What cannot be checked is taken over as it is.
    pub(crate) adopt: bool,
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
    use cvm_protocol::accounts::{Account, GATEWAY_ID};
    if user == "root" {
        return (0, 0);
    }
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    Account::find(&read("/etc/passwd"), &read("/etc/group"), user)
        .map_or((GATEWAY_ID, GATEWAY_ID), |account| (account.uid, account.gid))
}

/// The volume where it is now: at /data, or beside it when an overlay already hides it.
pub(crate) fn hold_volume(data: &FsPath) -> Result<Held, Fault> {
    let hidden = FsPath::new(cvm_protocol::paths::VOLUME);
    let root = if mount::is_mount(cvm_protocol::paths::VOLUME) { hidden } else { data };
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
    let me = Me { instance, session: owner::random_name()?, place, owner_epoch: 0 };
    Ok(Held { volume, index, me, _lock: lock })
}

/// The same, if a worker has used it before.
fn hold_used_volume() -> Result<Option<Held>, Fault> {
    use cvm_protocol::paths::{DATA, VOLUME};
    let is_used = [VOLUME, DATA].iter().any(|root| FsPath::new(root).join(".cvm/storage/index").exists());
    is_used.then(|| hold_volume(FsPath::new(DATA))).transpose()
}

/// The tree that an earlier worker has left on the volume, and what of it the bucket does not have:
/// as far as is known without the bucket.
pub(crate) fn left_behind(prefix: &str) -> Result<Option<(Volume, Found)>, Fault> {
    use cvm_protocol::paths::DATA;
    let Some(Held { volume, index, _lock: lock, .. }) = hold_used_volume()? else { return Ok(None) };
    let in_layer = fs::read_dir(volume.own.join("upper"))?
        .any(|entry| entry.is_ok_and(|entry| !Volume::is_ours(entry.file_name().as_bytes())));
    let volume = if in_layer { volume.overlaid(FsPath::new(DATA)) } else { volume };
    let made = if in_layer { "lowered" } else { "restored" };
    let is_ours = index.meta(made)?.is_some() || index.meta("independent")?.is_some();
    if !is_ours || index.head()?.generation == 0 {
        return Ok(None);
    }
    let found = Scanner::new(&volume, &index, prefix, &Fetched::default()).full()?;
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
    desk.phase(WorkerPhase::Opening);
    if let Some(held) = hold_used_volume()? {
        setback::look_at_clock_of_the_waiting(&held.index, &held.me.place)?;
    }
    let bucket = Bucket::new(spec)?;
    desk.did("rclone");
    let survey = bucket.survey()?;
    desk.did("bucket");
    let mut held = hold_volume(FsPath::new(cvm_protocol::paths::DATA))?;
    held.me.owner_epoch = spec.owner_epoch;
    held.volume.clear_staging_but_parts()?;
    let ours = held.index.own_epoch()?.unwrap_or(0);
    still_there(&held, survey, word)?;
    if spec.anchor.is_some() && survey != Survey::Managed {
        word.accepted.or_refuse("STATE_ANCHOR is given, and the bucket has no manifest".to_owned())?;
    }
    if survey == Survey::Unmanaged && !(spec.adopt || word.adopt) {
        return Err(Fault::unadopted(
            "the bucket holds objects of this MASTER_KEY and no manifest: either the old entrypoint has written them, or somebody has taken the manifest away, and nobody can check them",
        ));
    }
    // Before the record is read: what is written after it has an epoch that it knows.
    let newest = if survey == Survey::Managed { Chain::newest(&bucket)? } else { (0, 0) };
    let known = ours.max(newest.0);
    let beat = Duration::from_secs(u64::from(spec.heartbeat_s.max(1)));
    let before = wait_for_it(&bucket, desk, &held, known, beat, word, &mut *pause)?;
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
    let is_unbound = before.record.as_ref().is_some_and(owner::Record::is_unbound);
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
        lease.look(&bucket).or_else(|fault| lost(desk, &held.index, &lease, fault))?;
    }
    desk.identity(&held.me.instance, lease.epoch());
    desk.did("ownership");
    let ready = tree(spec, desk, bucket, held, lease, survey, word, taken, reached, is_unbound, newest.0);
    if ready.is_err() {
        desk.opened(None);
    }
    ready
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
    is_unbound: bool,
    newest: u64,
) -> Result<Ready, Fault> {
    let owner = uid_gid(&spec.user);
    let anchor = spec.anchor.as_deref().and_then(Anchor::parse);
    let Held { volume, index, me, _lock: lock } = held;
    let loaded = match survey {
        Survey::Managed => {
            Chain::load(&bucket, &index, owner, anchor, word.accepted, spec.adopt || word.adopt)?
        }
        _ => Loaded {
            chain: Chain::empty(owner, chain::begun_anew(&bucket.prefix)?),
            intents: Vec::new(),
            continued: false,
            is_cut: false,
        },
    };
    let Loaded { mut chain, intents, continued, is_cut } = loaded;
    if is_cut {
        index.set_meta("cut", &reached.to_string())?;
    }
    // Who has accepted a manifest that is not all there has accepted that this try's is not.
    if let Some(why) = chain.lacks(reached).filter(|_| survey == Survey::Managed)
        && index.number("cut")? != reached
    {
        word.accepted.or_refuse(why)?;
    }
    if is_unbound && survey == Survey::Managed && chain.state().is_some() {
        word.accepted.or_refuse(
            "the ownership record is one of an older version, and the manifest is of a newer one: the record was set back"
                .to_owned(),
        )?;
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
    desk.head(&chain.anchor(), index.totals()?);
    let alive = continued && mount::overlay_is_alive() && index.meta("independent")?.is_some();
    if continued && !alive {
        setback::put_right(desk, &bucket, &index, &volume, &me.place, &intended(&intents))?;
    }
    let stands = if alive {
        let volume = volume.overlaid(FsPath::new(cvm_protocol::paths::DATA));
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
    settle(desk, &lease, &bucket, &index, taken)?;
    if !alive {
        keep_promises(&mut chain, &bucket, &index, &lease, &intents)?;
        tell_digests(desk, &mut chain, &bucket, &index, &lease)?;
    }
    setback::is_in_use(&index, &me.place)?;
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
        let volume = Volume::plain(FsPath::new(cvm_protocol::paths::DATA))?;
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
        let volume = Volume::plain(FsPath::new(cvm_protocol::paths::DATA))?;
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
    let left = refused.count();
    let good = left == 0;
    let paths: Vec<Path> = vital.into_iter().map(|(path, _)| path.clone()).collect();
    for path in &paths {
        index.set_bad(path, None)?;
    }
    // Looked at again by the next try; of what is accepted, nothing is anywhere.
    index.set_lower(&paths, !good)?;
    if good {
        return Ok(());
    }
    Err(Fault::Lacking(format!(
        "{left} files that the gateway reads while it starts are missing or damaged in the bucket; `cvm storage status` names them"
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

/// What adopted files are, as far as they have been read: from here on they are checked like others,
/// and need not be fetched before the gateway starts.
fn tell_digests(
    desk: &Desk,
    chain: &mut Chain,
    bucket: &Bucket,
    index: &Index,
    lease: &Lease,
) -> Result<(), Fault> {
    // One without a sign may be a database that was adopted as a plain file: a scan looks at it first.
    let is_known =
        |row: &Row| row.entry.sha().is_some() && row.sign.is_some() && !row.unsure && row.bad.is_none();
    let mut lines = Vec::new();
    for (path, row) in index.untold()?.into_iter().filter(|(_, row)| is_known(row)) {
        lines.push(Line { path, word: Word::Is(row.entry) });
    }
    for some in lines.chunks(LINES) {
        match chain.append(bucket, index, lease.epoch(), some) {
            Err(fault) if fault.is_outage() => {
                let why = "The manifest is not told yet what is in adopted files; the next start tries again";
                desk.warn(format!("{why}: {fault}"));
                return Ok(());
            }
            appended => appended?,
        }
        index.told(some)?;
    }
    if !lines.is_empty() {
        desk.info(format!("The manifest says of {} adopted files what is in them from now on", lines.len()));
    }
    Ok(())
}

/// What a fault of the lease's means for this volume.
pub(crate) fn lost<T>(desk: &Desk, index: &Index, lease: &Lease, fault: Fault) -> Result<T, Fault> {
    if lease.was_lost_to_a_copy() {
        part_from_the_copy(desk, index)?;
    }
    Err(fault)
}

fn settle(desk: &Desk, lease: &Lease, bucket: &Bucket, index: &Index, taken: Duration) -> Result<(), Fault> {
    lease.settle(bucket, taken).or_else(|fault| lost(desk, index, lease, fault))?;
    index.set_meta("epoch", &lease.epoch().to_string())
}

fn opened(desk: &Desk, bucket: Bucket, index: Index, volume: Volume) -> std::sync::Arc<Open> {
    let open = std::sync::Arc::new(Open { bucket, index, volume, boot: std::sync::Arc::clone(&desk.boot) });
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
    settle(desk, lease, bucket, index, taken)?;
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
    let now = i64::try_from(chain::now_ms()).unwrap_or(0).saturating_mul(1_000_000);
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
        let Some(home) = Path::new(format!("openclaw/agents/{agent}").as_bytes()) else { continue };
        // Its directories are the agent's to replace by links.
        let home = Within::make(&volume.tree, Some(&home))?;
        let to = home.name(b"memory.db");
        if to.symlink_metadata().is_ok() {
            continue;
        }
        let part = home.name(b".memory.db.part");
        fs::copy(entry.path(), &part)?;
        let owner = entry.metadata()?;
        for path in [home.itself(), part.clone()] {
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
