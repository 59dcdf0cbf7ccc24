//! The way of an event through this program, in order for each session, beside each other for
//! different ones.
//!
//! ```text
//! received ──> gathered (pictures) ──> asked (the gateway) ──> answered (kept, in parts) ──> sent (each part) ──> done
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
use crate::sessions::{Sessions, Stopping, Work};
use crate::split;
use bytes::Bytes;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch};

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
/// And for at least so many runs: the gateway may have been away in between.
const FAILURES_MIN: u32 = 3;
/// What the mux-server fails at for this long, answering each time, it will not take.
const UNSENDABLE: Duration = Duration::from_secs(24 * 3600);
/// A body of more bytes is loaded when no other one of its kind is in memory.
const LARGE: u64 = 256 * 1024;
/// A refusal may be a moment's: a configuration that is being written, say.
const REFUSALS_MAX: u32 = 3;
/// An event at which this program panics so often is given up.
const PANICS_MAX: u32 = 3;
const STATISTICS: Duration = Duration::from_secs(1);
const PRUNE: Duration = Duration::from_secs(3600);

/// Said to the chat when the agent did not answer, since silence would be worse.
const NOT_TAKEN: &str = "Sorry, this message could not be handled.";
const NOT_ANSWERED: &str = "Sorry, no answer could be made to this message. Please try again later.";

/// Why the work on an event does not go on in this life.
enum Halt {
    Stopping,
    /// The queue cannot yield or keep it, and never will.
    Damaged(Failure),
}

pub(crate) struct Dispatch {
    queue: Queue,
    desk: Arc<Desk>,
    gateway: Gateway,
    outbound: Outbound,
    http: Arc<Http>,
    registration: Arc<Registration>,
    sessions: Arc<Sessions>,
    slots: Semaphore,
    senders: Semaphore,
    /// Large messages and those with attachments go one at a time, until they are on their way. Who has
    /// a slot never waits for this, so that what cannot be fetched holds up no other chat.
    heavy: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
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
            sessions: Arc::default(),
            slots: Semaphore::new(SLOTS),
            senders: Semaphore::new(SENDERS),
            heavy: Arc::new(Semaphore::new(1)),
            stopping,
        }
    }

    /// How many events are not done.
    pub(crate) fn depth(&self) -> u64 {
        self.sessions.depth()
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.sessions.bytes()
    }

    /// An event that is in the queue. One that is here already stays where it is.
    pub(crate) fn push(self: &Arc<Self>, seq: i64, session: String, size: u64) {
        self.sessions.push(self, seq, session, size);
    }

    /// When nothing is being asked or sent any more. After the word to stop that is soon.
    pub(crate) async fn rest(&self) {
        self.sessions.rest().await;
    }

    async fn work_on(&self, seq: i64, size: u64) -> Result<(), Halt> {
        let mut tries = Tries::new(size > LARGE);
        loop {
            let Some(answered) = self.insist(|| self.queue.is_answered(seq)).await? else { return Ok(()) };
            let next = if answered {
                self.send_on(seq, size, &mut tries).await?
            } else {
                self.answer(seq, &mut tries).await?
            };
            match next {
                Next::Done => return Ok(()),
                Next::Now => {}
                Next::After(span) => self.pause(span).await?,
            }
        }
    }

    /// What waits, waits in the queue: only what is worked on is in memory.
    async fn place<'a>(&self, room: &'a Semaphore) -> Result<SemaphorePermit<'a>, Halt> {
        let permit = room.acquire().await.map_err(|_| Halt::Stopping)?;
        if self.is_stopping() { Err(Halt::Stopping) } else { Ok(permit) }
    }

    async fn alone(&self) -> Result<OwnedSemaphorePermit, Halt> {
        let permit = Arc::clone(&self.heavy).acquire_owned().await.map_err(|_| Halt::Stopping)?;
        if self.is_stopping() { Err(Halt::Stopping) } else { Ok(permit) }
    }

    async fn end(&self, seq: i64, id: &str, outcome: &str) -> Result<Next, Halt> {
        tracing::info!("event {seq} ({}): {outcome}", id.replace(char::is_control, " "));
        self.insist(|| self.queue.done(seq, outcome.to_owned())).await?;
        Ok(Next::Done)
    }

    /// A queue that cannot be written is tried until it can, unless what it holds is broken.
    async fn insist<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        work: impl Fn() -> F,
    ) -> Result<T, Halt> {
        let mut backoff = Backoff::of_contract();
        loop {
            match work().await {
                Ok(value) => return Ok(value),
                Err(failure) if failure.is_damage() => return Err(Halt::Damaged(failure)),
                Err(failure) => self.desk.failed(failure.to_string()),
            }
            self.pause(backoff.next()).await?;
        }
    }

    async fn pause(&self, span: Duration) -> Result<(), Halt> {
        tokio::select! {
            () = tokio::time::sleep(span) => Ok(()),
            () = self.stopped() => Err(Halt::Stopping),
        }
    }

    async fn stopped(&self) {
        // Whoever could say so being gone is a stop too.
        drop(self.stopping.clone().wait_for(|stop| *stop).await);
    }

    // === The agent ===

    /// Asks once, keeps what comes of it, and sends it.
    async fn answer(&self, seq: i64, tries: &mut Tries) -> Result<Next, Halt> {
        if tries.heavy && tries.was_away {
            self.gateway_is_back().await?;
        }
        let (question, slot) = match self.question(seq, tries).await? {
            Made::Whole(question, slot) => (question, slot),
            Made::Nothing(next) => return Ok(next),
        };
        let Question { mut letter, body, room, has_pictures } = *question;
        let asking = self.gateway.ask(&letter.session, &letter.channel, body, room);
        let outcome = tokio::select! {
            outcome = asking => outcome,
            () = self.outbound.type_on(&letter.channel, &letter.session) => return Err(Halt::Stopping),
        };
        drop(slot);
        tries.was_away = matches!(outcome, gateway::Outcome::Later(_));
        let is_well = || self.desk.change(|board| board.gateway_error = None);
        let answer = match outcome {
            gateway::Outcome::Answer(text) => {
                is_well();
                text
            }
            gateway::Outcome::Silence => {
                is_well();
                return self.ignore(seq, &letter.id, "the agent says nothing").await;
            }
            gateway::Outcome::Later(why) => {
                self.desk.change(|board| board.gateway_error = Some(why));
                // What it costs to ask again counts.
                let wait = if tries.heavy { &mut tries.failing } else { &mut tries.away };
                return Ok(Next::After(wait.next()));
            }
            gateway::Outcome::Failed(why) => {
                if !tries.is_failing_for_good() {
                    self.desk.change(|board| board.gateway_error = Some(why));
                    return Ok(Next::After(tries.failing.next()));
                }
                is_well();
                self.give_up(&format!("event {seq}: {why}, {} times", tries.failures));
                NOT_ANSWERED.to_owned()
            }
            gateway::Outcome::Refused(400 | 413, _) if has_pictures => {
                tries.without_pictures = true;
                return Ok(Next::Now);
            }
            gateway::Outcome::Refused(_, why) => {
                tries.refusals += 1;
                if tries.refusals < REFUSALS_MAX {
                    return Ok(Next::After(tries.failing.next()));
                }
                is_well();
                self.give_up(&format!("event {seq}: the gateway refuses it with {why}"));
                NOT_TAKEN.to_owned()
            }
        };
        let parts = split::messages(&answer, split::limit_of(&letter.channel));
        self.insist(|| self.queue.answered(seq, parts.clone())).await?;
        self.sessions.has_changed();
        letter.parts = (0..).zip(parts).collect();
        // At once, on a stop too: see `main`.
        let Ok(_permit) = self.senders.acquire().await else { return Err(Halt::Stopping) };
        self.send(seq, &letter, tries).await
    }

    /// Before much is loaded for it.
    async fn gateway_is_back(&self) -> Result<(), Halt> {
        let mut backoff = Backoff::new(GATEWAY.0, GATEWAY.1);
        while !self.gateway.is_ready().await {
            self.pause(backoff.next()).await?;
        }
        Ok(())
    }

    async fn ignore(&self, seq: i64, id: &str, why: &str) -> Result<Next, Halt> {
        self.desk.change(|board| board.ignored += 1);
        self.end(seq, id, why).await
    }

    /// The record of what did not end as somebody expected.
    fn give_up(&self, why: &str) {
        self.desk.failed(format!("given up, and the chat was told: {why}; `cvm logs gateway`"));
        self.desk.change(|board| board.refused += 1);
    }

    /// What the gateway is asked, and a slot to ask it in.
    async fn question(&self, seq: i64, tries: &mut Tries) -> Result<Made<'_>, Halt> {
        let mut slot = None;
        let mut room = None;
        if tries.heavy {
            room = Some(self.alone().await?);
        } else {
            slot = Some(self.place(&self.slots).await?);
        }
        let Some(open) = self.insist(|| self.queue.load(seq)).await? else {
            return Ok(Made::Nothing(Next::Done));
        };
        let mut message = match Message::read(&open.body) {
            Ok(message) => message,
            Err(at) => {
                self.desk.failed(format!("event {seq} is no message that can be read, {at}"));
                self.desk.change(|board| board.refused += 1);
                return self.end(seq, &open.id, "refused: it is no message").await.map(Made::Nothing);
            }
        };
        let nothing = if !message.for_us {
            Some("ignored: a group that did not mention us")
        } else if message.text.is_empty() && message.attachments.is_empty() {
            Some("ignored: it is empty")
        } else {
            None
        };
        if let Some(why) = nothing {
            return self.ignore(seq, &open.id, why).await.map(Made::Nothing);
        }
        let given = std::mem::take(&mut message.attachments);
        let (pictures, lines) = if tries.without_pictures {
            (Vec::new(), attachments::leave_out(&given))
        } else if given.is_empty() {
            (Vec::new(), Vec::new())
        } else if tries.heavy {
            tokio::select! {
                gathered = attachments::gather(given, &self.http, &self.registration) => gathered,
                () = self.stopped() => return Err(Halt::Stopping),
            }
        } else {
            tries.heavy = true;
            return Ok(Made::Nothing(Next::Now));
        };
        for line in lines {
            if !message.text.is_empty() {
                message.text.push('\n');
            }
            message.text.push_str(&line);
        }
        let body = gateway::question(&open.session, &message.text, &pictures);
        let has_pictures = !pictures.is_empty();
        drop(pictures);
        let message = message.address();
        let Open { id, session, channel, body: received, .. } = open;
        drop(received);
        let letter = Letter { id, session, channel, message, parts: Vec::new() };
        let slot = match slot {
            Some(slot) => slot,
            None => self.place(&self.slots).await?,
        };
        Ok(Made::Whole(Box::new(Question { letter, body, room, has_pictures }), slot))
    }

    // === The answer ===

    /// What was answered before.
    async fn send_on(&self, seq: i64, size: u64, tries: &mut Tries) -> Result<Next, Halt> {
        let room = if size > LARGE { Some(self.alone().await?) } else { None };
        let _permit = self.place(&self.senders).await?;
        let Some(open) = self.insist(|| self.queue.load(seq)).await? else { return Ok(Next::Done) };
        let message = Message::read(&open.body).unwrap_or_default().address();
        let Open { id, session, channel, parts, body, .. } = open;
        drop((body, room));
        self.send(seq, &Letter { id, session, channel, message, parts }, tries).await
    }

    /// All parts, as far as it goes now.
    async fn send(&self, seq: i64, letter: &Letter, tries: &mut Tries) -> Result<Next, Halt> {
        for (number, text) in &letter.parts {
            let part = Part {
                event: &letter.id,
                number: *number,
                channel: &letter.channel,
                session: &letter.session,
                text,
                message: &letter.message,
            };
            // One that is under way gets its time: see `main`.
            let pass = tokio::select! {
                biased;
                pass = self.registration.pass() => pass,
                () = self.stopped() => return Err(Halt::Stopping),
            };
            match self.outbound.send(&part, pass).await {
                outbound::Outcome::Sent => {}
                // The rest of these words would not go with those that have arrived.
                outbound::Outcome::AnsweredBefore => {
                    self.desk.change(|board| board.answered += 1);
                    return self.end(seq, &letter.id, "answered before, in other words").await;
                }
                outbound::Outcome::Refused(why) => {
                    return self.refused(seq, &letter.id, &why).await;
                }
                outbound::Outcome::Failed(why, _) if tries.is_unsendable(Instant::now()) => {
                    return self.refused(seq, &letter.id, &format!("{why}, for a day")).await;
                }
                outbound::Outcome::Failed(why, after) => {
                    tries.unsent_since.get_or_insert_with(Instant::now);
                    self.desk.failed(format!("{why}; it is tried again"));
                    return Ok(Next::After(tries.sending.next().max(after.unwrap_or_default())));
                }
                outbound::Outcome::Unknown(why, after) => {
                    self.desk.failed(format!("{why}; it is tried again"));
                    return Ok(Next::After(tries.sending.next().max(after.unwrap_or_default())));
                }
            }
            tries.unsent_since = None;
            self.insist(|| self.queue.sent(seq, *number)).await?;
        }
        self.desk.change(|board| board.answered += 1);
        self.end(seq, &letter.id, "answered").await
    }

    async fn refused(&self, seq: i64, id: &str, why: &str) -> Result<Next, Halt> {
        self.desk.failed(format!("the mux-server refuses the answer to event {seq}: {why}"));
        self.desk.change(|board| board.refused += 1);
        self.end(seq, id, &format!("refused: {why}")).await
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
            let _ = tokio::time::timeout(PRUNE, self.sessions.changed()).await;
        }
    }
}

impl Work for Dispatch {
    async fn process(&self, seq: i64, size: u64) -> Result<(), Stopping> {
        match self.work_on(seq, size).await {
            Ok(()) => Ok(()),
            Err(Halt::Stopping) => Err(Stopping),
            Err(Halt::Damaged(failure)) => {
                self.desk.failed(format!(
                    "event {seq} stays where it is, and its chat goes on without it: {failure}"
                ));
                self.desk.change(|board| board.refused += 1);
                Ok(())
            }
        }
    }

    async fn broke(&self, seq: i64, times: u32) -> Result<bool, Stopping> {
        let is_last = times >= PANICS_MAX;
        let then = if is_last { "it is given up" } else { "it is tried again" };
        self.desk.failed(format!(
            "event {seq} meets a bug of this program, {times} times; {then}; `cvm logs mux`"
        ));
        let follows = if is_last {
            self.desk.change(|board| board.refused += 1);
            self.insist(|| self.queue.done(seq, "refused: a bug".to_owned())).await
        } else {
            self.pause(FAILED.0 * times).await
        };
        match follows {
            Err(Halt::Stopping) => Err(Stopping),
            Ok(()) | Err(Halt::Damaged(_)) => Ok(is_last),
        }
    }

    fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }
}

/// What follows a try.
enum Next {
    Done,
    Now,
    After(Duration),
}

/// What goes to a chat, and where that is.
struct Letter {
    id: String,
    session: String,
    channel: String,
    message: Message<'static>,
    /// Number and text.
    parts: Vec<(i64, String)>,
}

struct Question {
    letter: Letter,
    body: Bytes,
    /// Held until a large body is on its way.
    room: Option<OwnedSemaphorePermit>,
    has_pictures: bool,
}

enum Made<'a> {
    Whole(Box<Question>, SemaphorePermit<'a>),
    /// There is nothing to ask, or not yet.
    Nothing(Next),
}

/// What one event has behind it in this life.
struct Tries {
    away: Backoff,
    failing: Backoff,
    sending: Backoff,
    failing_since: Option<Instant>,
    failures: u32,
    refusals: u32,
    unsent_since: Option<Instant>,
    /// It is large, or has attachments.
    heavy: bool,
    was_away: bool,
    without_pictures: bool,
}

impl Tries {
    fn new(heavy: bool) -> Self {
        Self {
            away: Backoff::new(GATEWAY.0, GATEWAY.1),
            failing: Backoff::new(FAILED.0, FAILED.1),
            sending: Backoff::of_contract(),
            failing_since: None,
            failures: 0,
            refusals: 0,
            unsent_since: None,
            heavy,
            was_away: false,
            without_pictures: false,
        }
    }

    /// One more run has failed.
    fn is_failing_for_good(&mut self) -> bool {
        self.failures += 1;
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        self.failures >= FAILURES_MIN && since.elapsed() >= FAILING_MAX
    }

    fn is_unsendable(&self, now: Instant) -> bool {
        self.unsent_since.is_some_and(|since| now.duration_since(since) >= UNSENDABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::{Accepted, tests::damage};
    use crate::register::Server;
    use cvm_protocol::mux::MuxStatus;

    /// A dispatch whose gateway and mux-server nobody has to ask.
    fn dispatch(queue: &Queue) -> (Arc<Dispatch>, Arc<Desk>, watch::Sender<bool>) {
        let desk = Arc::new(Desk::new(MuxStatus::default(), None));
        let http = Arc::new(Http::new(false, false).unwrap());
        let server = Server {
            base_url: "http://127.0.0.1:9".to_owned(),
            register_key: String::new().into(),
            inbound_url: String::new(),
            device_id: String::new(),
        };
        let registration = Arc::new(Registration::new(server, Arc::clone(&http), Arc::clone(&desk)));
        let gateway = Gateway::new(9, String::new().into()).unwrap();
        let (stop, stopping) = watch::channel(false);
        let dispatch = Dispatch::new(queue.clone(), Arc::clone(&desk), gateway, http, registration, stopping);
        (Arc::new(dispatch), desk, stop)
    }

    #[test]
    fn an_event_that_the_queue_cannot_yield_holds_up_no_other_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.sqlite");
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
            let (queue, _threads) = Queue::open(&path).unwrap();
            let put = async |queue: &Queue, id: &str, body: Vec<u8>| {
                queue.accept(id.into(), "s".into(), "telegram".into(), vec![body]).await.unwrap()
            };
            let long: Vec<u8> = (0..3000).flat_map(|n| format!("word{n:05} ").into_bytes()).collect();
            put(&queue, "bad", long).await;
            // There is nothing to answer to it.
            put(&queue, "empty", b"{}".to_vec()).await;
            drop(queue);
            damage(&path, b"word01500");
            let (queue, _threads) = Queue::open(&path).unwrap();
            let (dispatch, desk, _stop) = dispatch(&queue);
            assert_eq!(dispatch.resume().await.unwrap(), 2);
            dispatch.rest().await;
            assert_eq!((dispatch.depth(), dispatch.bytes()), (0, 0));
            assert_eq!(put(&queue, "empty", Vec::new()).await, Accepted::Known(None));
            assert_eq!(put(&queue, "bad", Vec::new()).await, Accepted::Known(Some((1, "s".to_owned()))));
            let (mut refused, mut said) = (0, None);
            desk.change(|board| (refused, said) = (board.refused, board.last_error.clone()));
            let said = said.unwrap();
            assert!(refused == 1 && said.contains("event 1") && said.contains("damaged"), "{refused} {said}");
        });
    }

    #[test]
    fn what_the_mux_server_fails_at_is_tried_for_a_day() {
        let (mut tries, now) = (Tries::new(false), Instant::now());
        assert!(!tries.is_unsendable(now + 2 * UNSENDABLE));
        tries.unsent_since = Some(now);
        assert!(!tries.is_unsendable(now + UNSENDABLE / 2));
        assert!(tries.is_unsendable(now + UNSENDABLE));
    }

    #[test]
    fn a_run_that_failed_a_few_times_in_a_short_time_is_tried_again() {
        let mut tries = Tries::new(false);
        for _ in 0..10 {
            assert!(!tries.is_failing_for_good());
        }
        tries.failing_since = Instant::now().checked_sub(FAILING_MAX);
        assert!(tries.is_failing_for_good());
        // The gateway may have been away for all that time.
        tries.failures = 1;
        assert!(!tries.is_failing_for_good());
    }
}
