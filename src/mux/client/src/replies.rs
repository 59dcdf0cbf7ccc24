//! The answer of the agent on its way to the chat: stored in parts, and each part sent.

use crate::attempts::{Attempts, is_large};
use crate::message::Message;
use crate::outbound::{Outbound, Part, SendOutcome};
use crate::queue::OpenEvent;
use crate::split_answer;
use crate::status::MuxStatus;
use crate::work_context::{Halt, Next, WorkContext};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;

/// Answers that are sent at the same time.
const SENDERS: usize = 32;

/// What goes to a chat, and to which.
pub(crate) struct Reply {
    /// Of the event that it answers.
    pub(crate) id: String,
    pub(crate) session: String,
    pub(crate) channel: String,
    /// Without what was said.
    pub(crate) message: Message<'static>,
    /// Number and text.
    pub(crate) parts: Vec<(i64, String)>,
}

pub(crate) struct ReplySender {
    context: Arc<WorkContext>,
    outbound: Arc<Outbound>,
    senders: Arc<Semaphore>,
}

impl ReplySender {
    pub(crate) fn new(context: Arc<WorkContext>, outbound: Arc<Outbound>) -> Self {
        Self { context, outbound, senders: Arc::new(Semaphore::new(SENDERS)) }
    }

    /// Stores the parts of an answer.
    pub(crate) async fn store(&self, seq: i64, reply: &mut Reply, answer: &str) -> Result<(), Halt> {
        let parts = split_answer::messages(answer, split_answer::limit_of(&reply.channel));
        self.context.insist(|| self.context.queue.answered(seq, parts.clone())).await?;
        reply.parts = (0..).zip(parts).collect();
        Ok(())
    }

    /// Sends an answer that has just been stored. It goes out while the program stops, too.
    pub(crate) async fn send_new(
        &self,
        seq: i64,
        reply: &Reply,
        attempts: &mut Attempts,
    ) -> Result<Next, Halt> {
        let Ok(_sender) = self.senders.acquire().await else { return Err(Halt::Stopping) };
        self.send(seq, reply, attempts).await
    }

    /// Sends the rest of an answer that was stored before.
    pub(crate) async fn send_stored(
        &self,
        seq: i64,
        size: u64,
        attempts: &mut Attempts,
    ) -> Result<Next, Halt> {
        let memory = if is_large(size) { Some(self.context.slot(&self.context.heavy).await?) } else { None };
        let _sender = self.context.slot(&self.senders).await?;
        let Some(event) = self.context.insist(|| self.context.queue.load(seq)).await? else {
            return Ok(Next::Done);
        };
        let message = Message::read(&event.body).unwrap_or_default().address();
        let OpenEvent { id, session, channel, parts, body, .. } = event;
        drop((body, memory));
        self.send(seq, &Reply { id, session, channel, message, parts }, attempts).await
    }

    async fn send(&self, seq: i64, reply: &Reply, attempts: &mut Attempts) -> Result<Next, Halt> {
        let status = &self.context.status;
        for (number, text) in &reply.parts {
            match self.send_part(reply, *number, text).await? {
                SendOutcome::Sent => attempts.has_sent(),
                // The rest of these words would not go with the words that have arrived.
                SendOutcome::AnsweredBefore => {
                    status.update(MuxStatus::count_answered);
                    return self.context.finish(seq, &reply.id, "another answer has arrived before").await;
                }
                SendOutcome::Refused(why) => return self.refused(seq, reply, &why).await,
                SendOutcome::Failed(why, at_least) => {
                    let Some(wait) = attempts.wait_after_unsent(at_least, Instant::now()) else {
                        return self.refused(seq, reply, &format!("{why}, for a day")).await;
                    };
                    status.failed(format!("{why}; it is tried again"));
                    return Ok(Next::After(wait));
                }
                SendOutcome::Unknown(why, at_least) => {
                    status.failed(format!("{why}; it is tried again"));
                    return Ok(Next::After(attempts.wait_to_send(at_least)));
                }
            }
            self.context.insist(|| self.context.queue.sent(seq, *number)).await?;
        }
        status.update(MuxStatus::count_answered);
        self.context.finish(seq, &reply.id, "answered").await
    }

    /// A part that is on its way is sent to its end; one that waits for a token gives way to a stop.
    async fn send_part(&self, reply: &Reply, number: i64, text: &str) -> Result<SendOutcome, Halt> {
        let Reply { id: event, session, channel, message, .. } = reply;
        let token = tokio::select! {
            biased;
            token = self.outbound.registration.token() => token,
            () = self.context.stopped() => return Err(Halt::Stopping),
        };
        let part = Part { event, number, channel, session, text, message };
        Ok(self.outbound.send(&part, token).await)
    }

    async fn refused(&self, seq: i64, reply: &Reply, why: &str) -> Result<Next, Halt> {
        self.context.count_refused(format!("the mux-server refuses the answer to event {seq}: {why}"));
        self.context.finish(seq, &reply.id, &format!("refused: {why}")).await
    }
}
