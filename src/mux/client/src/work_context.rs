//! What every step of the work on an event needs: queue, status, patience, and the order to stop.

use crate::backoff::Backoff;
use crate::queue::{Failure, Queue};
use crate::status::{MuxStatus, StatusReporter};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit as Slot, Semaphore, watch};

/// Why the work on an event does not go on in this run of the program.
pub(crate) enum Halt {
    Stopping,
    /// The queue cannot load or store the event, and never will.
    Damaged(Failure),
}

/// What follows a step.
pub(crate) enum Next {
    Done,
    Now,
    After(Duration),
}

pub(crate) struct WorkContext {
    pub(crate) queue: Queue,
    pub(crate) status: Arc<StatusReporter>,
    /// For events that are large or have attachments: one at a time is in memory, until it has been sent.
    pub(crate) heavy: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
}

impl WorkContext {
    pub(crate) fn new(queue: Queue, status: Arc<StatusReporter>, stopping: watch::Receiver<bool>) -> Self {
        Self { queue, status, heavy: Arc::new(Semaphore::new(1)), stopping }
    }

    pub(crate) fn is_stopping(&self) -> bool {
        *self.stopping.borrow()
    }

    pub(crate) async fn stopped(&self) {
        // An error means that the sender is gone, and the program with it.
        drop(self.stopping.clone().wait_for(|stop| *stop).await);
    }

    pub(crate) async fn pause(&self, span: Duration) -> Result<(), Halt> {
        tokio::select! {
            () = tokio::time::sleep(span) => Ok(()),
            () = self.stopped() => Err(Halt::Stopping),
        }
    }

    /// Waits for a slot. Nothing of the event is in memory meanwhile.
    pub(crate) async fn slot(&self, slots: &Arc<Semaphore>) -> Result<Slot, Halt> {
        let slot = Arc::clone(slots).acquire_owned().await.map_err(|_| Halt::Stopping)?;
        if self.is_stopping() { Err(Halt::Stopping) } else { Ok(slot) }
    }

    /// Tries until the queue has done it, unless the file is damaged.
    pub(crate) async fn insist<T, F: Future<Output = Result<T, Failure>>>(
        &self,
        work: impl Fn() -> F,
    ) -> Result<T, Halt> {
        let mut backoff = Backoff::of_contract();
        loop {
            match work().await {
                Ok(value) => return Ok(value),
                Err(failure) if failure.is_damage() => return Err(Halt::Damaged(failure)),
                Err(failure) => self.status.failed(failure.to_string()),
            }
            self.pause(backoff.next()).await?;
        }
    }

    pub(crate) async fn finish(&self, seq: i64, id: &str, outcome: &str) -> Result<Next, Halt> {
        tracing::info!("event {seq} ({}): {outcome}", id.replace(char::is_control, " "));
        self.insist(|| self.queue.done(seq, outcome.to_owned())).await?;
        Ok(Next::Done)
    }

    /// Reports an event that ends without the answer that somebody expects.
    pub(crate) fn count_refused(&self, why: String) {
        self.status.failed(why);
        self.status.update(MuxStatus::count_refused);
    }
}
