//! The way of an event through this program, in order for each session, beside each other for
//! different ones.
//!
//! ```text
//! received ──> asked (the gateway) ──> answered (kept, in parts) ──> sent (each part) ──> done
//! ```
//!
//! Each arrow ends with a commit, and what comes after a crash begins at the last one. So the agent
//! may be asked twice, when the gateway's answer was lost with us; nothing of the first answer had
//! been sent then. The user gets one.
//!
//! Refuses to give up on what may still succeed. May import: everything before it.

use crate::attachments;
use crate::backoff::Backoff;
use crate::desk::Desk;
use crate::event::Message;
use crate::gateway::{self, Gateway};
use crate::http::Http;
use crate::outbound::{self, Outbound, Part};
use crate::queue::{Failure, Open, Queue};
use crate::register::Registration;
use crate::split;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, Semaphore, watch};

/// Runs of the agent beside each other. The gateway has its own limit; this one is against asking it
/// a thousand things at once.
const SLOTS: usize = 16;
/// Answers on their way beside each other.
const SENDERS: usize = 32;
/// Between two tries of a gateway that is away: soon, since it usually restarts.
const GATEWAY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// Between two tries of a run that failed.
const FAILED: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// A run that goes on failing for this long would hold up its chat for ever.
const FAILING_MAX: Duration = Duration::from_secs(15 * 60);
/// A refusal may be a moment's: a configuration that is being written, say.
const REFUSALS_MAX: u32 = 3;
const STATISTICS: Duration = Duration::from_secs(1);
const PRUNE: Duration = Duration::from_secs(3600);

/// Said to the chat when the agent did not answer, since silence would be worse.
const NOT_TAKEN: &str = "Sorry, this message could not be handled.";
const NOT_ANSWERED: &str = "Sorry, no answer could be made to this message. Please try again later.";

/// The machine is stopping: what is open goes on in the next life.
struct Stopping;

pub(crate) struct Dispatch {
    queue: Queue,
    desk: Arc<Desk>,
    gateway: Gateway,
    outbound: Outbound,
    http: Arc<Http>,
    registration: Arc<Registration>,
    /// What is not done of each session that has something, by number, with its size.
    sessions: Mutex<HashMap<String, BTreeMap<i64, u64>>>,
    depth: AtomicU64,
    bytes: AtomicU64,
    slots: Semaphore,
    senders: Semaphore,
    /// Messages with attachments go one at a time, until they are on their way.
    heavy: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
    running: AtomicUsize,
    at_rest: Notify,
    changed: Notify,
}

impl Dispatch {
    pub(crate) fn new(
        queue: Queue,
        desk: Arc<Desk>,
        gateway: Gateway,
        http: Arc<Http>,
        registration: Arc<Registration>,
        stopping: watch::Receiver<bool>,
    ) -> Self {
        let outbound = Outbound { http: Arc::clone(&http), registration: Arc::clone(&registration) };
        Self {
            queue,
            desk,
            gateway,
            outbound,
            http,
            registration,
            sessions: Mutex::default(),
            depth: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            slots: Semaphore::new(SLOTS),
            senders: Semaphore::new(SENDERS),
            heavy: Arc::new(Semaphore::new(1)),
            stopping,
            running: AtomicUsize::new(0),
            at_rest: Notify::new(),
            changed: Notify::new(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<String, BTreeMap<i64, u64>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn depth(&self) -> u64 {
        self.depth.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    /// An event that is in the queue. One that is here already stays where it is.
    pub(crate) fn push(self: &Arc<Self>, seq: i64, session: String, size: u64) {
        let mut sessions = self.sessions();
        let is_worked_on = sessions.contains_key(&session);
        let open = sessions.entry(session.clone()).or_default();
        if open.contains_key(&seq) {
            return;
        }
        open.insert(seq, size);
        drop(sessions);
        self.depth.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
        self.changed.notify_one();
        if is_worked_on {
            return;
        }
        self.running.fetch_add(1, Ordering::Relaxed);
        let this = Arc::clone(self);
        tokio::spawn(async move {
            this.work_through(&session).await;
            this.running.fetch_sub(1, Ordering::Relaxed);
            this.at_rest.notify_one();
        });
    }

    /// When nothing is being asked or sent any more. After the word to stop that is soon.
    pub(crate) async fn rest(&self) {
        while self.running.load(Ordering::Relaxed) > 0 {
            self.at_rest.notified().await;
        }
    }

    async fn work_through(&self, session: &str) {
        loop {
            let next = {
                let mut sessions = self.sessions();
                let next =
                    sessions.get(session).and_then(|open| open.first_key_value().map(|(k, v)| (*k, *v)));
                if next.is_none() {
                    sessions.remove(session);
                }
                next
            };
            let Some((seq, size)) = next else { return };
            if self.is_stopping() || self.process(seq).await.is_err() {
                return;
            }
            if let Some(open) = self.sessions().get_mut(session) {
                open.remove(&seq);
            }
            self.depth.fetch_sub(1, Ordering::Relaxed);
            self.bytes.fetch_sub(size, Ordering::Relaxed);
            self.changed.notify_one();
        }
    }

    async fn process(&self, seq: i64) -> Result<(), Stopping> {
        let mut tries = Tries::new();
        loop {
            let Some(answered) = self.insist(|| self.queue.is_answered(seq)).await? else { return Ok(()) };
            // What waits, waits in the queue: only what is worked on is in memory.
            let room = if answered { &self.senders } else { &self.slots };
            let Ok(permit) = room.acquire().await else { return Err(Stopping) };
            if self.is_stopping() {
                return Err(Stopping);
            }
            let Some(open) = self.insist(|| self.queue.load(seq)).await? else { return Ok(()) };
            let next = if open.answered {
                self.send(seq, &open, &mut tries).await?
            } else {
                self.answer(seq, open, &mut tries).await?
            };
            drop(permit);
            match next {
                Next::Done => return Ok(()),
                Next::Now => {}
                Next::After(span) => self.pause(span).await?,
            }
        }
    }

    async fn end(&self, seq: i64, id: &str, outcome: &str) -> Result<Next, Stopping> {
        tracing::info!("event {seq} ({}): {outcome}", id.replace(char::is_control, " "));
        self.insist(|| self.queue.done(seq, outcome.to_owned())).await?;
        Ok(Next::Done)
    }

    /// A queue that cannot be written is tried until it can: nothing else is true before.
    async fn insist<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        work: impl Fn() -> F,
    ) -> Result<T, Stopping> {
        let mut backoff = Backoff::of_contract();
        loop {
            match work().await {
                Ok(value) => return Ok(value),
                Err(failure) => self.desk.failed(failure.to_string()),
            }
            self.pause(backoff.next()).await?;
        }
    }

    async fn pause(&self, span: Duration) -> Result<(), Stopping> {
        tokio::select! {
            () = tokio::time::sleep(span) => Ok(()),
            () = self.stopped() => Err(Stopping),
        }
    }

    async fn stopped(&self) {
        // Whoever could say so being gone is a stop too.
        drop(self.stopping.clone().wait_for(|stop| *stop).await);
    }

    // === The agent ===

    /// Asks once, and keeps what comes of it.
    async fn answer(&self, seq: i64, open: Open, tries: &mut Tries) -> Result<Next, Stopping> {
        let (id, limit) = (open.id.clone(), split::limit_of(&open.channel));
        let ignored = |why: String| {
            self.desk.change(|board| board.ignored += 1);
            why
        };
        let outcome = match self.ask(open).await? {
            Asked::Outcome(outcome) => outcome,
            Asked::Nothing(why) => return self.end(seq, &id, &ignored(why)).await,
        };
        let answer = match outcome {
            gateway::Outcome::Answer(text) => {
                self.desk.change(|board| board.gateway_error = None);
                text
            }
            gateway::Outcome::Silence => {
                self.desk.change(|board| board.gateway_error = None);
                return self.end(seq, &id, &ignored("the agent says nothing".to_owned())).await;
            }
            gateway::Outcome::Later(why) => {
                self.desk.change(|board| board.gateway_error = Some(why));
                return Ok(Next::After(tries.away.next()));
            }
            gateway::Outcome::Failed(why) => {
                let since = *tries.failing_since.get_or_insert_with(Instant::now);
                if since.elapsed() < FAILING_MAX {
                    self.desk.change(|board| board.gateway_error = Some(why));
                    return Ok(Next::After(tries.failing.next()));
                }
                self.give_up(&format!("event {seq}: {why}, for {} min", FAILING_MAX.as_secs() / 60));
                NOT_ANSWERED.to_owned()
            }
            gateway::Outcome::Refused(why) => {
                tries.refusals += 1;
                if tries.refusals < REFUSALS_MAX {
                    return Ok(Next::After(tries.failing.next()));
                }
                self.give_up(&format!("event {seq}: the gateway refuses it with {why}"));
                NOT_TAKEN.to_owned()
            }
        };
        let parts = split::messages(&answer, limit);
        self.insist(|| self.queue.answered(seq, parts.clone())).await?;
        Ok(Next::Now)
    }

    /// The record of what did not end as somebody expected.
    fn give_up(&self, why: &str) {
        self.desk.failed(format!("given up, and the chat was told: {why}; `cvm logs gateway`"));
        self.desk.change(|board| board.refused += 1);
    }

    async fn ask(&self, open: Open) -> Result<Asked, Stopping> {
        let message = match Message::read(&open.body) {
            Ok(message) => message,
            Err(at) => return Ok(Asked::Nothing(format!("ignored: it is no message, {at}"))),
        };
        if !message.for_us {
            return Ok(Asked::Nothing("ignored: a group that did not mention us".to_owned()));
        }
        if message.text.is_empty() && message.attachments.is_empty() {
            return Ok(Asked::Nothing("ignored: it is empty".to_owned()));
        }
        let Message { mut text, attachments, .. } = message;
        let (body, room) = if attachments.is_empty() {
            (gateway::question(&text, &[]), None)
        } else {
            let room = Arc::clone(&self.heavy).acquire_owned().await.ok();
            let gathering = attachments::gather(attachments, &self.http, &self.registration);
            let (pictures, lines) = tokio::select! {
                gathered = gathering => gathered,
                () = self.stopped() => return Err(Stopping),
            };
            for line in lines {
                if !text.is_empty() {
                    text.push('\n');
                }
                text.push_str(&line);
            }
            (gateway::question(&text, &pictures), room)
        };
        let Open { session, channel, body: received, .. } = open;
        drop((received, text));
        let asking = self.gateway.ask(&session, &channel, body, room);
        tokio::select! {
            outcome = asking => Ok(Asked::Outcome(outcome)),
            () = self.outbound.type_on(&channel, &session) => Err(Stopping),
        }
    }

    // === The answer ===

    /// All parts, as far as it goes now.
    async fn send(&self, seq: i64, open: &Open, tries: &mut Tries) -> Result<Next, Stopping> {
        let message = Message::read(&open.body).unwrap_or_default();
        for (number, text) in &open.parts {
            let part = Part {
                event: &open.id,
                number: *number,
                channel: &open.channel,
                session: &open.session,
                text,
                message: &message,
            };
            // One that is under way gets its time: see `main`.
            let pass = tokio::select! {
                pass = self.registration.pass() => pass,
                () = self.stopped() => return Err(Stopping),
            };
            match self.outbound.send(&part, pass).await {
                outbound::Outcome::Sent => {}
                // The rest of these words would not go with those that have arrived.
                outbound::Outcome::AnsweredBefore => {
                    self.desk.change(|board| board.answered += 1);
                    return self.end(seq, &open.id, "answered before, in other words").await;
                }
                outbound::Outcome::Refused(why) => {
                    self.desk.failed(format!("the mux-server refuses the answer to event {seq}: {why}"));
                    self.desk.change(|board| board.refused += 1);
                    return self.end(seq, &open.id, &format!("refused: {why}")).await;
                }
                outbound::Outcome::Unknown(why, after) => {
                    self.desk.failed(format!("{why}; it is tried again"));
                    return Ok(Next::After(tries.sending.next().max(after.unwrap_or_default())));
                }
            }
            self.insist(|| self.queue.sent(seq, *number)).await?;
        }
        self.desk.change(|board| board.answered += 1);
        self.end(seq, &open.id, "answered").await
    }

    // === Besides ===

    /// What the last life left.
    pub(crate) async fn resume(self: &Arc<Self>) -> Result<usize, Failure> {
        let unfinished = self.queue.unfinished().await?;
        let count = unfinished.len();
        for (seq, session, size) in unfinished {
            self.push(seq, session, size);
        }
        Ok(count)
    }

    /// Keeps the figures, and the queue small.
    pub(crate) async fn look_after(&self) {
        let mut pruned: Option<Instant> = None;
        loop {
            if pruned.is_none_or(|at| at.elapsed() >= PRUNE) {
                pruned = Some(Instant::now());
                if let Err(failure) = self.queue.prune(crate::desk::now_ms()).await {
                    self.desk.failed(failure.to_string());
                }
            }
            while let Ok(true) = self.queue.shrink().await {}
            if let Ok(depth) = self.queue.depth().await {
                self.desk.change(|board| {
                    (board.waiting, board.to_send) = (depth.waiting, depth.answered);
                    board.oldest_at_ms = depth.oldest_ms;
                });
            }
            tokio::time::sleep(STATISTICS).await;
            let _ = tokio::time::timeout(PRUNE, self.changed.notified()).await;
        }
    }
}

/// What follows a try.
enum Next {
    Done,
    Now,
    After(Duration),
}

enum Asked {
    Outcome(gateway::Outcome),
    Nothing(String),
}

/// What one event has behind it in this life.
struct Tries {
    away: Backoff,
    failing: Backoff,
    sending: Backoff,
    failing_since: Option<Instant>,
    refusals: u32,
}

impl Tries {
    fn new() -> Self {
        Self {
            away: Backoff::new(GATEWAY.0, GATEWAY.1),
            failing: Backoff::new(FAILED.0, FAILED.1),
            sending: Backoff::of_contract(),
            failing_since: None,
            refusals: 0,
        }
    }
}
