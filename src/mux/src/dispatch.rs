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
/// Events larger than this go one at a time.
const HEAVY: usize = 512 * 1024;
/// Between two tries of a gateway that is away: soon, since it usually restarts.
const GATEWAY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));
/// Between two tries of a run that failed.
const FAILED: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// A run that goes on failing for this long would hold up its chat for ever.
const FAILING_MAX: Duration = Duration::from_secs(15 * 60);
/// A refusal may be a moment's: a configuration that is being written, say.
const REFUSALS_MAX: u32 = 3;
const SENDING: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
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

    /// An event that is in the queue.
    pub(crate) fn push(self: &Arc<Self>, seq: i64, session: String, size: u64) {
        self.depth.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(size, Ordering::Relaxed);
        self.changed.notify_one();
        let mut sessions = self.sessions();
        if let Some(open) = sessions.get_mut(&session) {
            open.insert(seq, size);
            return;
        }
        sessions.insert(session.clone(), BTreeMap::from([(seq, size)]));
        drop(sessions);
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
        loop {
            let Some(open) = self.insist(|| self.queue.load(seq)).await? else { return Ok(()) };
            if open.answered {
                return self.send(seq, &open).await;
            }
            match self.answer(seq, open).await? {
                Answer::Text(text, channel) => {
                    let parts = split::messages(&text, split::limit_of(&channel));
                    self.insist(|| self.queue.answered(seq, parts.clone())).await?;
                }
                Answer::None(outcome) => {
                    self.desk.change(|board| board.ignored += 1);
                    return self.end(seq, outcome).await;
                }
            }
        }
    }

    async fn end(&self, seq: i64, outcome: String) -> Result<(), Stopping> {
        tracing::info!("event {seq}: {outcome}");
        self.insist(|| self.queue.done(seq, outcome.clone())).await
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

    async fn answer(&self, seq: i64, first: Open) -> Result<Answer, Stopping> {
        let mut away = Backoff::new(GATEWAY.0, GATEWAY.1);
        let mut failing = Backoff::new(FAILED.0, FAILED.1);
        let (mut failing_since, mut refusals) = (None, 0);
        let mut open = Some(first);
        loop {
            // The words are not held while they wait.
            let now = match open.take() {
                Some(open) => open,
                None => match self.insist(|| self.queue.load(seq)).await? {
                    Some(open) => open,
                    None => return Ok(Answer::None("done before".to_owned())),
                },
            };
            let (session, channel) = (now.session.clone(), now.channel.clone());
            let heavy = now.body.len() > HEAVY;
            let outcome = match self.ask(now, heavy).await? {
                Asked::Outcome(outcome) => outcome,
                Asked::Nothing(why) => return Ok(Answer::None(why)),
            };
            let say = |text: &str| Answer::Text(text.to_owned(), channel.clone());
            let wait = match outcome {
                gateway::Outcome::Answer(text) => {
                    self.desk.change(|board| board.gateway_error = None);
                    return Ok(Answer::Text(text, channel));
                }
                gateway::Outcome::Silence => {
                    self.desk.change(|board| board.gateway_error = None);
                    return Ok(Answer::None("the agent says nothing".to_owned()));
                }
                gateway::Outcome::Later(why) => {
                    self.desk.change(|board| board.gateway_error = Some(why));
                    away.next()
                }
                gateway::Outcome::Failed(why) => {
                    let since = *failing_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > FAILING_MAX {
                        self.desk.failed(format!("event {seq} was given up: {why}"));
                        self.desk.change(|board| board.refused += 1);
                        return Ok(say(NOT_ANSWERED));
                    }
                    self.desk.change(|board| board.gateway_error = Some(why));
                    failing.next()
                }
                gateway::Outcome::Refused(why) => {
                    refusals += 1;
                    if refusals >= REFUSALS_MAX {
                        self.desk
                            .failed(format!("event {seq} was given up: the gateway refuses it with {why}"));
                        self.desk.change(|board| board.refused += 1);
                        return Ok(say(NOT_TAKEN));
                    }
                    failing.next()
                }
            };
            drop(session);
            self.pause(wait).await?;
        }
    }

    /// One try.
    async fn ask(&self, open: Open, heavy: bool) -> Result<Asked, Stopping> {
        let message = match Message::read(&open.body) {
            Ok(message) => message,
            Err(at) => return Ok(Asked::Nothing(format!("ignored: it is no message, {at}"))),
        };
        if !message.for_us {
            return Ok(Asked::Nothing("ignored: a group that did not mention us".to_owned()));
        }
        let with_attachments = !message.attachments.is_empty();
        if message.text.is_empty() && !with_attachments {
            return Ok(Asked::Nothing("ignored: it is empty".to_owned()));
        }
        let Ok(_slot) = self.slots.acquire().await else { return Err(Stopping) };
        if self.is_stopping() {
            return Err(Stopping);
        }
        let room =
            if heavy || with_attachments { Arc::clone(&self.heavy).acquire_owned().await.ok() } else { None };
        let Message { mut text, attachments, .. } = message;
        let (pictures, lines) = attachments::gather(attachments, &self.http, &self.registration).await;
        for line in lines {
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&line);
        }
        let body = gateway::question(&text, &pictures);
        drop(pictures);
        let Open { session, channel, body: received, .. } = open;
        drop(received);
        let asking = self.gateway.ask(&session, &channel, body, room);
        tokio::select! {
            outcome = asking => Ok(Asked::Outcome(outcome)),
            () = self.outbound.type_on(&channel, &session) => Err(Stopping),
        }
    }

    // === The answer ===

    async fn send(&self, seq: i64, open: &Open) -> Result<(), Stopping> {
        let message = Message::read(&open.body).unwrap_or_default();
        let mut outcome = "answered".to_owned();
        for (number, text) in &open.parts {
            let part = Part {
                event: &open.id,
                number: *number,
                channel: &open.channel,
                session: &open.session,
                text,
                message: &message,
            };
            match self.send_part(&part).await? {
                outbound::Outcome::Refused(why) => {
                    self.desk.failed(format!("the mux-server refuses the answer to event {seq}: {why}"));
                    self.desk.change(|board| board.refused += 1);
                    return self.end(seq, format!("refused: {why}")).await;
                }
                outbound::Outcome::AnsweredBefore => {
                    "answered before, in other words".clone_into(&mut outcome);
                }
                outbound::Outcome::Sent | outbound::Outcome::Unknown(..) => {}
            }
            self.insist(|| self.queue.sent(seq, *number)).await?;
        }
        self.desk.change(|board| board.answered += 1);
        self.end(seq, outcome).await
    }

    /// Until the outcome is known.
    async fn send_part(&self, part: &Part<'_>) -> Result<outbound::Outcome, Stopping> {
        let mut backoff = Backoff::new(SENDING.0, SENDING.1);
        loop {
            // One that is under way gets its time: see `main`.
            let pass = tokio::select! {
                pass = self.registration.pass() => pass,
                () = self.stopped() => return Err(Stopping),
            };
            let outcome = self.outbound.send(part, pass).await;
            match outcome {
                outbound::Outcome::Unknown(why, after) => {
                    self.desk.failed(format!("{why}; it is tried again"));
                    self.pause(backoff.next().max(after.unwrap_or_default())).await?;
                }
                known => return Ok(known),
            }
        }
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

enum Answer {
    Text(String, String),
    /// With the reason, for the record.
    None(String),
}

enum Asked {
    Outcome(gateway::Outcome),
    Nothing(String),
}
