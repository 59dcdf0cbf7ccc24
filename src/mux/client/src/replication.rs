//! Whether the bucket has what the queue has, as the storage worker says.
//!
//! Everybody who waits shares one question: what was committed before it was asked is in the bucket
//! when it is answered. Refuses to know what a bucket is. May import: `desk`.

use crate::desk::{Desk, now_ms};
use cvm_protocol::json_lines;
use cvm_protocol::storage::{ANSWER_MAX, Answer, Ask, Question, VERSION};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::watch;

const AGAIN: Duration = Duration::from_millis(500);
/// The worker gives a sign of life every 10 s.
const SILENCE: Duration = Duration::from_secs(30);

pub(crate) struct Replication {
    socket: String,
    /// The database, relative to /data.
    path: String,
    most: Duration,
    desk: Arc<Desk>,
    /// Number of the last commit that somebody waits for, and of the last that is in the bucket.
    wanted: watch::Sender<u64>,
    safe: watch::Sender<u64>,
}

impl Replication {
    pub(crate) fn new(socket: String, path: String, most: Duration, desk: Arc<Desk>) -> Self {
        Self { socket, path, most, desk, wanted: watch::Sender::new(0), safe: watch::Sender::new(0) }
    }

    /// Whether the bucket has what is committed now, before the patience is over; if not, it is counted.
    pub(crate) async fn wait(&self) -> bool {
        let mut safe = self.safe.subscribe();
        let mut mine = 0;
        self.wanted.send_modify(|wanted| {
            *wanted += 1;
            mine = *wanted;
        });
        let in_time =
            matches!(tokio::time::timeout(self.most, safe.wait_for(|safe| *safe >= mine)).await, Ok(Ok(_)));
        if !in_time {
            self.desk.change(|board| {
                board.unreplicated_acks += 1;
                board.last_unreplicated_ack_at_ms = Some(now_ms());
            });
        }
        in_time
    }

    pub(crate) async fn keep(&self) {
        let mut wanted = self.wanted.subscribe();
        let mut said = false;
        loop {
            let safe = *self.safe.borrow();
            let Ok(asked) = wanted.wait_for(|wanted| *wanted > safe).await.map(|w| *w) else { return };
            match self.ask().await {
                Ok(()) => {
                    said = false;
                    self.safe.send_replace(asked);
                }
                Err(why) => {
                    if !std::mem::replace(&mut said, true) {
                        self.desk.failed(format!(
                            "the storage worker does not say that the queue is in the bucket: {why}; `cvm storage status`"
                        ));
                    }
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
    }

    async fn ask(&self) -> Result<(), String> {
        let words = |e: std::io::Error| e.to_string();
        let stream = UnixStream::connect(&self.socket).await.map_err(words)?;
        let (read, mut write) = stream.into_split();
        let question = Question { v: VERSION, verb: Ask::Committed { path: self.path.clone() } };
        write.write_all(&json_lines::line(&question)).await.map_err(words)?;
        let mut reader = BufReader::new(read);
        loop {
            let mut line = Vec::new();
            let mut one = (&mut reader).take(ANSWER_MAX as u64);
            match tokio::time::timeout(SILENCE, one.read_until(b'\n', &mut line)).await {
                Err(_) => return Err("it is silent".to_owned()),
                Ok(Err(error)) => return Err(words(error)),
                Ok(Ok(0)) => return Err("it hung up".to_owned()),
                Ok(Ok(_)) => {}
            }
            match serde_json::from_slice(&line) {
                Ok(Answer::Done { good: true, .. }) => return Ok(()),
                Ok(Answer::Done { .. }) => return Err("it is not there yet".to_owned()),
                Ok(Answer::Refused { .. }) => return Err("it refuses to say".to_owned()),
                Ok(_) => {}
                Err(_) => return Err("its answer is not understood".to_owned()),
            }
        }
    }
}
