//! The way of an event through this program: in order within a session, beside each other otherwise.
//!
//! ```text
//! received ──> prepared (pictures) ──> asked (the gateway) ──> stored (in parts) ──> sent (each part) ──> done
//! ```
//!
//! Each step ends with a commit, and after a crash the work goes on behind the last one. So the agent may
//! be asked twice, when the program died with the gateway's answer. Nothing of the first answer had been
//! sent then, and the chat gets one.

use crate::agent::Agent;
use crate::attempts::{Attempts, is_large};
use crate::gateway::Gateway;
use crate::outbound::Outbound;
use crate::queue::Failure;
use crate::replies::ReplySender;
use crate::sessions::{Sessions, Stopping, Work};
use crate::work_context::{Halt, Next, WorkContext};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

/// An event at which this program panics so often is given up.
const PANICS_MAX: u32 = 3;
/// After the first panic; longer after the next ones.
const PANIC_PAUSE: Duration = Duration::from_secs(2);

pub(crate) struct Dispatcher {
    context: Arc<WorkContext>,
    agent: Agent,
    replies: ReplySender,
    sessions: Arc<Sessions>,
}

impl Dispatcher {
    pub(crate) fn new(context: WorkContext, gateway: Gateway, outbound: Outbound) -> Self {
        let (context, outbound) = (Arc::new(context), Arc::new(outbound));
        Self {
            agent: Agent::new(Arc::clone(&context), gateway, Arc::clone(&outbound)),
            replies: ReplySender::new(Arc::clone(&context), outbound),
            sessions: Arc::default(),
            context,
        }
    }

    pub(crate) fn sessions(&self) -> &Arc<Sessions> {
        &self.sessions
    }

    /// Takes an event that is in the queue. An event that is here already keeps its place.
    pub(crate) fn push(self: &Arc<Self>, seq: i64, session: String, size: u64) {
        self.sessions.push(self, seq, session, size);
    }

    /// Takes the events that an earlier run has left, and returns how many there are.
    pub(crate) async fn resume(self: &Arc<Self>) -> Result<usize, Failure> {
        let unfinished = self.context.queue.unfinished().await?;
        let count = unfinished.len();
        for (seq, session, size) in unfinished {
            self.push(seq, session, size);
        }
        Ok(count)
    }

    async fn work_on(&self, seq: i64, size: u64) -> Result<(), Halt> {
        let mut attempts = Attempts::new(is_large(size));
        loop {
            let Some(is_answered) = self.context.insist(|| self.context.queue.is_answered(seq)).await? else {
                return Ok(());
            };
            let next = if is_answered {
                self.replies.send_stored(seq, size, &mut attempts).await?
            } else {
                self.ask_and_send(seq, &mut attempts).await?
            };
            match next {
                Next::Done => return Ok(()),
                Next::Now => {}
                Next::After(span) => self.context.pause(span).await?,
            }
        }
    }

    async fn ask_and_send(&self, seq: i64, attempts: &mut Attempts) -> Result<Next, Halt> {
        match self.agent.ask(seq, attempts).await? {
            ControlFlow::Break(next) => Ok(next),
            ControlFlow::Continue((mut reply, text)) => {
                self.replies.store(seq, &mut reply, &text).await?;
                self.sessions.notify_change();
                self.replies.send_new(seq, &reply, attempts).await
            }
        }
    }
}

impl Work for Dispatcher {
    async fn process(&self, seq: i64, size: u64) -> Result<(), Stopping> {
        match self.work_on(seq, size).await {
            Ok(()) => Ok(()),
            Err(Halt::Stopping) => Err(Stopping),
            Err(Halt::Damaged(failure)) => {
                self.context.count_refused(format!(
                    "event {seq} stays where it is, and its chat goes on without it: {failure}"
                ));
                Ok(())
            }
        }
    }

    async fn panicked(&self, seq: i64, times: u32) -> Result<bool, Stopping> {
        let is_last = times >= PANICS_MAX;
        let then = if is_last { "it is given up" } else { "it is tried again" };
        let why = format!("event {seq} meets a bug of this program, {times} times; {then}; `cvm logs mux`");
        let result = if is_last {
            self.context.count_refused(why);
            self.context.insist(|| self.context.queue.done(seq, "refused: a bug".to_owned())).await
        } else {
            self.context.status.failed(why);
            self.context.pause(PANIC_PAUSE * times).await
        };
        match result {
            Err(Halt::Stopping) => Err(Stopping),
            Ok(()) | Err(Halt::Damaged(_)) => Ok(is_last),
        }
    }

    fn is_stopping(&self) -> bool {
        self.context.is_stopping()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::ServerAddress;
    use crate::http_client::HttpClient;
    use crate::queue::{Accepted, Queue, tests::damage};
    use crate::registration::{Identity, Registration};
    use crate::status::MuxStatus;
    use crate::status::StatusReporter;
    use tokio::sync::watch;

    /// A dispatcher whose gateway and mux-server need not be asked.
    fn dispatcher(queue: &Queue) -> (Arc<Dispatcher>, Arc<StatusReporter>, watch::Sender<bool>) {
        let status = Arc::new(StatusReporter::new(MuxStatus::default(), cvm_channel::Reporter::nowhere()));
        let http = Arc::new(HttpClient::new(false, false).unwrap());
        let identity = Identity {
            server: ServerAddress::parse("http://127.0.0.1:9").unwrap(),
            inbound_url: String::new(),
            device_id: String::new(),
        };
        let registration = Arc::new(Registration::new(
            identity,
            String::new().into(),
            Arc::clone(&http),
            Arc::clone(&status),
        ));
        let gateway = Gateway::new(9, String::new().into()).unwrap();
        let (stop, stopping) = watch::channel(false);
        let context = WorkContext::new(queue.clone(), Arc::clone(&status), stopping);
        let dispatcher = Dispatcher::new(context, gateway, Outbound { http, registration });
        (Arc::new(dispatcher), status, stop)
    }

    #[test]
    fn an_event_that_the_queue_cannot_load_holds_up_no_other_one() {
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
            let (dispatcher, status, _stop) = dispatcher(&queue);
            assert_eq!(dispatcher.resume().await.unwrap(), 2);
            let sessions = dispatcher.sessions();
            sessions.finished().await;
            assert_eq!((sessions.events(), sessions.bytes()), (0, 0));
            assert_eq!(put(&queue, "empty", Vec::new()).await, Accepted::Known(None));
            assert_eq!(put(&queue, "bad", Vec::new()).await, Accepted::Known(Some((1, "s".to_owned()))));
            let (mut refused, mut said) = (0, None);
            status.update(|status| (refused, said) = (status.refused, status.last_error.clone()));
            let said = said.unwrap();
            assert!(refused == 1 && said.contains("event 1") && said.contains("damaged"), "{refused} {said}");
        });
    }
}
