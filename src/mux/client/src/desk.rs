//! How the client stands, and the one way out for it: reports to PID 1.
//!
//! Refuses a word of a message, a name of a chat, and a secret: what is said here is public.
//! May import: nothing of this crate.

use cvm_protocol::json_lines;
use cvm_protocol::mux::{MuxReport, MuxStatus};
use cvm_protocol::report::Level;
use std::fs::File;
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::Notify;

/// Between two reports while something changes all the time.
const BETWEEN: Duration = Duration::from_secs(1);

pub(crate) struct Desk {
    board: Mutex<MuxStatus>,
    changed: Notify,
    reports: Mutex<Option<File>>,
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

impl Desk {
    pub(crate) fn new(board: MuxStatus, reports: Option<File>) -> Self {
        Self { board: Mutex::new(board), changed: Notify::new(), reports: Mutex::new(reports) }
    }

    fn board(&self) -> MutexGuard<'_, MuxStatus> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut MuxStatus)) {
        change(&mut self.board());
        self.changed.notify_one();
    }

    /// A line for the boot log.
    pub(crate) fn note(&self, level: Level, text: impl Into<String>) {
        let text = text.into();
        match level {
            Level::Error => tracing::error!("{text}"),
            Level::Warn => tracing::warn!("{text}"),
            Level::Info | Level::Debug => tracing::info!("{text}"),
        }
        self.report(&MuxReport::Note { level, text });
    }

    /// Something that did not work, and what to do.
    pub(crate) fn failed(&self, why: impl Into<String>) {
        let why = why.into();
        tracing::warn!("{why}");
        self.change(|board| {
            board.last_error = Some(why);
            board.last_error_at_ms = Some(now_ms());
        });
    }

    fn report(&self, report: &MuxReport) {
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipe) = reports.as_mut() {
            // Nobody to report to: PID 1 is gone, and we with it.
            let _ = pipe.write_all(&json_lines::line(report));
        }
    }

    /// Tells PID 1 whenever something has changed.
    pub(crate) async fn speak(&self) {
        let mut said = None;
        loop {
            let board = self.board().clone();
            if said.as_ref() != Some(&board) {
                self.report(&MuxReport::State(Box::new(board.clone())));
                said = Some(board);
                tokio::time::sleep(BETWEEN).await;
            }
            self.changed.notified().await;
        }
    }
}
