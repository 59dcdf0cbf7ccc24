//! What everybody in the worker knows of its state, and the two ways out for it: reports to PID 1,
//! and the answer to `cvm storage status`.
//!
//! Refuses to put a name of the agent's files into a report to PID 1, which is public.
//! May import: `boots`, `bucket`, `chain`, `fault`, `index`, `manifest`, `owner`, `steps`, `volume`.

use crate::boots::This;
use crate::bucket::Bucket;
use crate::fault::Fault;
use crate::index::{Index, Totals};
use crate::manifest::{Anchor, Digest};
use crate::owner::uptime;
use crate::steps::Steps;
use crate::volume::Volume;
use cvm_channel::Reporter;
use cvm_protocol::fact::{Fact, Value};
use cvm_protocol::report::{GateState, Level};
use cvm_protocol::storage::{
    Drill, Incident, Mode, Progress, STORAGE_GATE, StorageSpec, StorageStatus, WorkerPhase,
};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// More than this nobody reads; others are named when some of these are settled.
const INCIDENTS_MAX: usize = 200;

/// The bucket and the volume, once they are open.
pub(crate) struct Open {
    pub(crate) bucket: Bucket,
    pub(crate) index: Index,
    pub(crate) volume: Volume,
    /// Among those whose logs are kept.
    pub(crate) boot: Arc<This>,
}

pub(crate) struct Desk {
    board: Mutex<Board>,
    reports: Reporter,
    open: Mutex<Option<Arc<Open>>>,
    steps: Mutex<Steps>,
    began: Duration,
    pub(crate) boot: Arc<This>,
}

#[derive(Default)]
struct Board {
    status: StorageStatus,
    /// Since when, on the clock that also counts sleep.
    oldest: Option<Duration>,
    last_push: Option<Duration>,
    last_error: Option<Duration>,
    retry_at: Option<Duration>,
    drilled_ms: Option<u64>,
    incidents: BTreeMap<String, (String, String, Duration)>,
    /// What was last said of the gate.
    gate: Option<GateState>,
}

impl Desk {
    pub(crate) fn new(spec: &StorageSpec, reports: Reporter) -> Self {
        let mut board = Board::default();
        board.status.bucket.clone_from(&spec.bucket);
        board.status.prefix.clone_from(&spec.prefix);
        board.status.phase = WorkerPhase::Opening;
        Self {
            board: Mutex::new(board),
            reports,
            open: Mutex::new(None),
            steps: Mutex::default(),
            began: uptime(),
            boot: Arc::new(This::new()),
        }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn opened(&self, open: Option<Arc<Open>>) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner) = open;
    }

    pub(crate) fn open(&self) -> Option<Arc<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// On the way to a tree.
    pub(crate) fn did(&self, step: &'static str) {
        self.steps().did(step);
    }

    /// From the beginning.
    pub(crate) fn forget_steps(&self) {
        *self.steps() = Steps::default();
    }

    pub(crate) fn say_steps(&self) {
        let words = self.steps().words();
        tracing::info!("the tree is ready after {words}");
    }

    fn steps(&self) -> MutexGuard<'_, Steps> {
        self.steps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // === To PID 1 ===

    pub(crate) fn note(&self, level: Level, text: impl Into<String>) {
        self.reports.note(level, text);
    }

    pub(crate) fn info(&self, text: impl Into<String>) {
        self.note(Level::Info, text);
    }

    pub(crate) fn warn(&self, text: impl Into<String>) {
        self.note(Level::Warn, text);
    }

    pub(crate) fn ready(&self, mode: Mode, reason: Option<String>, independent: bool) {
        {
            let status = &mut self.board().status;
            status.phase = WorkerPhase::Ready;
            (status.why, status.progress) = (None, if independent { None } else { status.progress.take() });
            (status.mode, status.reason, status.independent) = (Some(mode), reason.clone(), independent);
        }
        let mut facts = vec![Fact::text("mode", mode.as_str())];
        facts.extend(reason.map(|why| Fact::text("why not fuse", why).warns(None)));
        facts.push(Fact::new("outlives the worker", Value::Flag(independent)));
        self.reports.status(facts);
        self.say_once(&GateState::Open { outlives: independent });
    }

    /// A phase in which nothing may stand on the tree, and why.
    pub(crate) fn not_ready(&self, phase: WorkerPhase, why: String, retry: bool) {
        self.show_phase(phase, &why);
        self.reports.status(Vec::new());
        self.say_once(&GateState::Closed { why, retry });
    }

    /// The same, of a fault and with its remedy.
    pub(crate) fn refused(&self, phase: WorkerPhase, fault: &Fault) {
        self.not_ready(phase, format!("{fault}; {}", fault.remedy()), fault.may_pass());
    }

    /// The bucket cannot be asked, and nothing is known against the tree, if there is one.
    pub(crate) fn unheard(&self, phase: WorkerPhase, fault: &Fault) {
        let why = format!("{fault}; {}", fault.remedy());
        self.show_phase(phase, &why);
        if !self.board().status.independent {
            self.reports.status(Vec::new());
        }
        self.say_once(&GateState::Unknown { why });
    }

    /// Another instance has the bucket.
    pub(crate) fn waits(&self, why: String) {
        self.show_phase(WorkerPhase::Waiting, &why);
        self.reports.status(Vec::new());
        self.say_once(&GateState::Waiting { why });
    }

    fn show_phase(&self, phase: WorkerPhase, why: &str) {
        let status = &mut self.board().status;
        (status.phase, status.why) = (phase, Some(why.to_owned()));
    }

    /// PID 1 hears of changes, not of each try.
    fn say_once(&self, state: &GateState) {
        {
            let mut board = self.board();
            if board.gate.as_ref() == Some(state) {
                return;
            }
            board.gate = Some(state.clone());
        }
        match state {
            GateState::Open { outlives } => {
                tracing::info!("the tree is ready (outlives the worker: {outlives})");
            }
            GateState::Closed { why, .. } | GateState::Unknown { why } | GateState::Waiting { why } => {
                tracing::warn!("not ready: {why}");
            }
        }
        self.reports.gate(STORAGE_GATE, state.clone());
    }

    /// The last word: what the bucket does not have.
    pub(crate) fn drained(&self, files: u64, bytes: u64) {
        let missing = (files > 0).then(|| {
            format!(
                "Not everything is in the bucket: {files} files, {bytes} bytes are missing there; they are on the \
                 volume and are pushed at the next boot"
            )
        });
        self.reports.drained(missing);
    }

    // === For operators ===

    pub(crate) fn phase(&self, phase: WorkerPhase) {
        self.board().status.phase = phase;
    }

    pub(crate) fn identity(&self, instance: &str, epoch: u64) {
        let status = &mut self.board().status;
        instance.clone_into(&mut status.instance);
        (status.epoch, status.held_by) = (epoch, None);
    }

    pub(crate) fn held_by(&self, who: Option<String>) {
        self.board().status.held_by = who;
    }

    pub(crate) fn head(&self, anchor: &Anchor, totals: Totals) {
        let status = &mut self.board().status;
        status.generation = anchor.head.generation;
        status.anchor = (status.generation > 0).then(|| anchor.to_string());
        status.state.clone_from(&anchor.state);
        (status.files, status.bytes) = (totals.files, totals.bytes);
    }

    pub(crate) fn progress(&self, progress: Option<Progress>) {
        self.board().status.progress = progress;
    }

    pub(crate) fn pending(&self, files: u64, bytes: u64, oldest: Option<Duration>) {
        let mut board = self.board();
        (board.status.pending_files, board.status.pending_bytes, board.oldest) = (files, bytes, oldest);
    }

    /// Something has changed that nobody has looked at yet.
    pub(crate) fn changed(&self, since: Option<Duration>) {
        let mut board = self.board();
        board.status.pending_files = board.status.pending_files.max(1);
        board.oldest = since;
    }

    pub(crate) fn pushed(&self) {
        let mut board = self.board();
        board.last_push = Some(uptime());
        board.retry_at = None;
    }

    pub(crate) fn failed(&self, fault: &Fault, retry_in: Option<Duration>) {
        tracing::warn!("{fault}");
        let mut board = self.board();
        board.status.last_error = Some(format!("{fault}; {}", fault.remedy()));
        board.last_error = Some(uptime());
        board.retry_at = retry_in.map(|d| uptime() + d);
    }

    pub(crate) fn incident(&self, path: &str, what: &str, remedy: &str) {
        let mut board = self.board();
        let known = board.incidents.get(path).is_some_and(|(w, ..)| w == what);
        let new = !board.incidents.contains_key(path);
        if known || new && board.incidents.len() >= INCIDENTS_MAX {
            return;
        }
        tracing::error!("incident: {path}: {what}; {remedy}");
        board.incidents.insert(path.to_owned(), (what.to_owned(), remedy.to_owned(), uptime()));
        let count = board.incidents.len();
        drop(board);
        self.note(
            Level::Error,
            format!("Storage incident ({count} in all): something in the bucket or the tree needs a look; `cvm storage status` names it"),
        );
    }

    /// Takes back what no longer holds; yields whether it did.
    pub(crate) fn settled(&self, path: &str) -> bool {
        self.board().incidents.remove(path).is_some()
    }

    /// What an operator has seen of what is wrong.
    pub(crate) fn named(&self) -> Vec<(String, String)> {
        let board = self.board();
        board.incidents.iter().map(|(path, (what, ..))| (path.clone(), what.clone())).collect()
    }

    pub(crate) fn forget_incidents(&self) {
        self.board().incidents.clear();
    }

    pub(crate) fn drill(&self, drill: Drill, at_ms: u64) {
        let mut board = self.board();
        board.status.drill = Some(drill);
        board.drilled_ms = Some(at_ms);
    }

    pub(crate) fn status(&self) -> StorageStatus {
        let requests = self.open().map(|open| (open.bucket.requests(), open.bucket.s3.counts()));
        let board = self.board();
        let now = uptime();
        let ago = |at: Duration| u64::try_from(now.saturating_sub(at).as_millis()).unwrap_or(u64::MAX);
        let mut status = board.status.clone();
        status.oldest_unreplicated_ms = board.oldest.map(ago);
        status.last_push_ago_ms = board.last_push.map(ago);
        status.last_error_ago_ms = board.last_error.map(ago);
        status.retry_in_ms =
            board.retry_at.map(|at| u64::try_from(at.saturating_sub(now).as_millis()).unwrap_or(0));
        status.incidents = board
            .incidents
            .iter()
            .map(|(path, (what, remedy, since))| Incident {
                path: path.clone(),
                what: what.clone(),
                remedy: remedy.clone(),
                since_ms_ago: ago(*since),
            })
            .collect();
        status.wrong = wrong(&status);
        if let (Some(drill), Some(at)) = (status.drill.as_mut(), board.drilled_ms) {
            drill.ago_ms = crate::chain::now_ms().saturating_sub(at);
        }
        if let Some((requests, [_, up, down])) = requests {
            (status.requests, status.bytes_up, status.bytes_down) = (requests, up, down);
        }
        status.up_ms = ago(self.began);
        status
    }
}

/// A name for all that an operator could accept now: another one, when there is anything new.
fn wrong(status: &StorageStatus) -> Option<String> {
    let refused = status.why.as_ref().filter(|_| status.phase == WorkerPhase::Refused);
    if refused.is_none() && status.incidents.is_empty() {
        return None;
    }
    let named = status.incidents.iter().flat_map(|i| [i.path.as_str(), i.what.as_str()]);
    let words: Vec<&str> = refused.map(String::as_str).into_iter().chain(named).collect();
    Some(Digest(Sha256::digest(words.join("\0")).into()).to_string())
}
