//! The agent's part in the work on an event: the question to the gateway, and what follows its outcome.

use crate::attachments::{self, Picture};
use crate::attempts::{Attempts, until_gateway_is_back};
use crate::gateway::{self, AskOutcome, Gateway};
use crate::message::{Attachment, Message};
use crate::outbound::Outbound;
use crate::queue::OpenEvent;
use crate::replies::Reply;
use crate::work_context::{Halt, Next, WorkContext};
use bytes::Bytes;
use std::ops::ControlFlow::{self, Break, Continue};
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Questions at the same time. The gateway has a limit of its own; this one keeps it from a thousand
/// questions at once.
const SLOTS: usize = 16;

/// Said to the chat in the place of an answer, since silence would be worse.
const NOT_TAKEN: &str = "Sorry, this message could not be handled.";
const NOT_ANSWERED: &str = "Sorry, no answer could be made to this message. Please try again later.";

pub(crate) struct Agent {
    context: Arc<WorkContext>,
    gateway: Gateway,
    outbound: Arc<Outbound>,
    slots: Arc<Semaphore>,
}

struct Question {
    reply: Reply,
    body: Bytes,
    has_pictures: bool,
    slot: OwnedSemaphorePermit,
}

impl Agent {
    pub(crate) fn new(context: Arc<WorkContext>, gateway: Gateway, outbound: Arc<Outbound>) -> Self {
        Self { context, gateway, outbound, slots: Arc::new(Semaphore::new(SLOTS)) }
    }

    /// Asks the agent once about an event. A reply comes with the text that becomes its parts.
    pub(crate) async fn ask(
        &self,
        seq: i64,
        attempts: &mut Attempts,
    ) -> Result<ControlFlow<Next, (Reply, String)>, Halt> {
        if attempts.is_heavy && attempts.was_away {
            self.wait_for_gateway().await?;
        }
        let Question { reply, body, has_pictures, slot } = match self.prepare(seq, attempts).await? {
            Continue(question) => question,
            Break(next) => return Ok(Break(next)),
        };
        let outcome = tokio::select! {
            outcome = self.gateway.ask(&reply.session, &reply.channel, body) => outcome,
            never = self.outbound.show_typing(&reply.channel, &reply.session) => match never {},
        };
        drop(slot);
        self.judge(seq, reply, outcome, has_pictures, attempts).await
    }

    async fn wait_for_gateway(&self) -> Result<(), Halt> {
        let mut backoff = until_gateway_is_back();
        while !self.gateway.is_ready().await {
            self.context.pause(backoff.next()).await?;
        }
        Ok(())
    }

    /// Loads an event and makes a question of it, unless there is nothing to ask, or not yet. A heavy event
    /// waits for its turn before it waits for a slot, so that a picture which cannot be fetched holds up no
    /// other chat.
    async fn prepare(&self, seq: i64, attempts: &mut Attempts) -> Result<ControlFlow<Next, Question>, Halt> {
        let (mut slot, mut memory) = (None, None);
        if attempts.is_heavy {
            memory = Some(self.context.slot(&self.context.heavy).await?);
        } else {
            slot = Some(self.context.slot(&self.slots).await?);
        }
        let Some(event) = self.context.insist(|| self.context.queue.load(seq)).await? else {
            return Ok(Break(Next::Done));
        };
        let mut message = match Message::read(&event.body) {
            Ok(message) => message,
            Err(place) => return self.unreadable(seq, &event.id, &place).await.map(Break),
        };
        if let Some(why) = reason_to_ignore(&message) {
            return self.ignore(seq, &event.id, why).await.map(Break);
        }
        let given = std::mem::take(&mut message.attachments);
        let Some((pictures, lines)) = self.pictures(given, attempts).await? else {
            return Ok(Break(Next::Now));
        };
        for line in lines {
            if !message.text.is_empty() {
                message.text.push('\n');
            }
            message.text.push_str(&line);
        }
        let body = gateway::question(&event.session, &message.text, &pictures, memory);
        let has_pictures = !pictures.is_empty();
        drop(pictures);
        let message = message.address();
        let OpenEvent { id, session, channel, body: received, .. } = event;
        drop(received);
        let reply = Reply { id, session, channel, message, parts: Vec::new() };
        let slot = match slot {
            Some(slot) => slot,
            None => self.context.slot(&self.slots).await?,
        };
        Ok(Continue(Question { reply, body, has_pictures, slot }))
    }

    /// Pictures, and lines about what is left out. None when the event has to wait for its turn as a
    /// heavy one.
    async fn pictures<'a>(
        &self,
        given: Vec<Attachment<'a>>,
        attempts: &mut Attempts,
    ) -> Result<Option<(Vec<Picture<'a>>, Vec<String>)>, Halt> {
        if attempts.without_pictures {
            return Ok(Some((Vec::new(), attachments::not_taken(&given))));
        }
        if given.is_empty() {
            return Ok(Some((Vec::new(), Vec::new())));
        }
        if !std::mem::replace(&mut attempts.is_heavy, true) {
            return Ok(None);
        }
        tokio::select! {
            gathered = attachments::gather(given, &self.outbound.http, &self.outbound.registration) => {
                Ok(Some(gathered))
            }
            () = self.context.stopped() => Err(Halt::Stopping),
        }
    }

    async fn judge(
        &self,
        seq: i64,
        reply: Reply,
        outcome: AskOutcome,
        has_pictures: bool,
        attempts: &mut Attempts,
    ) -> Result<ControlFlow<Next, (Reply, String)>, Halt> {
        let again = |wait| Ok(Break(Next::After(wait)));
        attempts.was_away = matches!(outcome, AskOutcome::Later(_));
        let text = match outcome {
            AskOutcome::Answer(text) => text,
            AskOutcome::Silence => {
                self.gateway_error(None);
                return self.ignore(seq, &reply.id, "the agent says nothing").await.map(Break);
            }
            AskOutcome::Later(why) => {
                self.gateway_error(Some(why));
                return again(attempts.wait_for_gateway());
            }
            AskOutcome::Failed(why) => {
                if let Some(wait) = attempts.wait_after_failure() {
                    self.gateway_error(Some(why));
                    return again(wait);
                }
                self.give_up(&format!("event {seq}: {why}, {} times", attempts.failures));
                NOT_ANSWERED.to_owned()
            }
            AskOutcome::Refused(400 | 413, _) if has_pictures => {
                attempts.without_pictures = true;
                return Ok(Break(Next::Now));
            }
            AskOutcome::Refused(_, why) => {
                if let Some(wait) = attempts.wait_after_refusal() {
                    return again(wait);
                }
                self.give_up(&format!("event {seq}: the gateway refuses it with {why}"));
                NOT_TAKEN.to_owned()
            }
        };
        self.gateway_error(None);
        Ok(Continue((reply, text)))
    }

    fn gateway_error(&self, error: Option<String>) {
        self.context.status.update(|status| status.gateway_error = error);
    }

    fn give_up(&self, why: &str) {
        self.context.count_refused(format!("given up, and the chat was told: {why}; `cvm logs gateway`"));
    }

    async fn ignore(&self, seq: i64, id: &str, why: &str) -> Result<Next, Halt> {
        self.context.status.update(|status| status.ignored += 1);
        self.context.finish(seq, id, why).await
    }

    async fn unreadable(&self, seq: i64, id: &str, place: &str) -> Result<Next, Halt> {
        self.context.count_refused(format!("event {seq} is no message that can be read, {place}"));
        self.context.finish(seq, id, "refused: it is no message").await
    }
}

fn reason_to_ignore(message: &Message<'_>) -> Option<&'static str> {
    if !message.for_us {
        Some("ignored: a message in a group that does not speak to the bot")
    } else if message.text.is_empty() && message.attachments.is_empty() {
        Some("ignored: the message is empty")
    } else {
        None
    }
}
