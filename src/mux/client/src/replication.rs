//! Whether the bucket has what the queue has, as the storage worker says.
//!
//! All who wait share one question: what was committed before it was asked is in the bucket when it is
//! answered.

use crate::clock::now_ms;
use crate::status::StatusReporter;
use cvm_protocol::json_lines;
use cvm_protocol::storage::{ANSWER_MAX, Answer, Ask, Question, VERSION};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::watch;

const RETRY_AFTER: Duration = Duration::from_millis(500);
/// The worker gives a sign of life every 10 s.
const SILENCE_MAX: Duration = Duration::from_secs(30);

pub(crate) struct Replication {
    socket: String,
    /// The queue's file, relative to /data.
    path: String,
    wait_max: Duration,
    status: Arc<StatusReporter>,
    /// Number of the last commit that somebody waits for, and of the last that is in the bucket.
    wanted: watch::Sender<u64>,
    replicated: watch::Sender<u64>,
}

impl Replication {
    pub(crate) fn new(socket: String, path: String, wait_max: Duration, status: Arc<StatusReporter>) -> Self {
        let (wanted, replicated) = (watch::Sender::new(0), watch::Sender::new(0));
        Self { socket, path, wait_max, status, wanted, replicated }
    }

    /// Whether the bucket has all that is committed now before the time is over. If not, it is counted.
    pub(crate) async fn wait(&self) -> bool {
        let mut replicated = self.replicated.subscribe();
        let mut mine = 0;
        self.wanted.send_modify(|wanted| {
            *wanted += 1;
            mine = *wanted;
        });
        let waiting = replicated.wait_for(|replicated| *replicated >= mine);
        let in_time = matches!(tokio::time::timeout(self.wait_max, waiting).await, Ok(Ok(_)));
        if !in_time {
            self.status.update(|status| {
                status.unreplicated_acks += 1;
                status.last_unreplicated_ack_at_ms = Some(now_ms());
            });
        }
        in_time
    }

    /// Asks the worker for as long as somebody waits.
    pub(crate) async fn keep(&self) {
        let mut wanted = self.wanted.subscribe();
        let mut is_told = false;
        loop {
            let replicated = *self.replicated.borrow();
            let Ok(asked) = wanted.wait_for(|wanted| *wanted > replicated).await.map(|w| *w) else { return };
            match self.ask().await {
                Ok(()) => {
                    is_told = false;
                    self.replicated.send_replace(asked);
                }
                Err(why) => {
                    if !std::mem::replace(&mut is_told, true) {
                        self.status.failed(format!(
                            "the storage worker does not say that the queue is in the bucket: {why}; `cvm storage status`"
                        ));
                    }
                    tokio::time::sleep(RETRY_AFTER).await;
                }
            }
        }
    }

    async fn ask(&self) -> Result<(), String> {
        let text = |e: std::io::Error| e.to_string();
        let stream = UnixStream::connect(&self.socket).await.map_err(text)?;
        let (read, mut write) = stream.into_split();
        let question = Question { v: VERSION, verb: Ask::Committed { path: self.path.clone() } };
        write.write_all(&json_lines::line(&question)).await.map_err(text)?;
        let mut reader = BufReader::new(read);
        loop {
            let mut line = Vec::new();
            let mut one = (&mut reader).take(ANSWER_MAX as u64);
            match tokio::time::timeout(SILENCE_MAX, one.read_until(b'\n', &mut line)).await {
                Err(_) => return Err("it is silent".to_owned()),
                Ok(Err(error)) => return Err(text(error)),
                Ok(Ok(0)) => return Err("it hung up".to_owned()),
                Ok(Ok(_)) => {}
            }
            match serde_json::from_slice(&line) {
                Ok(Answer::Done { good: true, .. }) => return Ok(()),
                Ok(Answer::Done { .. }) => return Err("the queue is not there yet".to_owned()),
                Ok(Answer::Refused { .. }) => return Err("it refuses to say".to_owned()),
                Ok(_) => {}
                Err(_) => return Err("its answer is not understood".to_owned()),
            }
        }
    }
}
