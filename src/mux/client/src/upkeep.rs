//! The upkeep of the queue: its figures for the status, and its size.

use crate::clock::now_ms;
use crate::queue::Queue;
use crate::sessions::Sessions;
use crate::status::StatusReporter;
use std::time::{Duration, Instant};

/// Between two looks while something changes all the time.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const PRUNE_EVERY: Duration = Duration::from_secs(3600);

pub(crate) async fn keep(queue: &Queue, sessions: &Sessions, status: &StatusReporter) {
    let mut pruned: Option<Instant> = None;
    loop {
        if pruned.is_none_or(|at| at.elapsed() >= PRUNE_EVERY) {
            pruned = Some(Instant::now());
            if let Err(failure) = queue.prune(now_ms()).await {
                status.failed(failure.to_string());
            }
        }
        while let Ok(true) = queue.shrink().await {}
        if let Ok(depth) = queue.depth().await {
            status.update(|status| {
                (status.waiting, status.to_send) = (depth.waiting, depth.answered);
                status.oldest_at_ms = depth.oldest_ms;
            });
        }
        tokio::time::sleep(LOOK_EVERY).await;
        let _ = tokio::time::timeout(PRUNE_EVERY, sessions.changed()).await;
    }
}
