//! The client's status, and its reports to PID 1: the only file that writes to the report pipe.
//!
//! Status and notes are public, so no word of a message, no name of a chat and no secret is in them.

use crate::clock::now_ms;
use cvm_protocol::json_lines;
use cvm_protocol::mux::{MuxReport, MuxStatus};
use cvm_protocol::report::Level;
use cvm_sys::descriptor;
use std::fs::File;
use std::io::Write as _;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

const REPORT_PIPE: i32 = 3;
/// Between two reports while something changes all the time.
const REPORT_EVERY: Duration = Duration::from_secs(1);

pub(crate) struct StatusReporter {
    status: Mutex<MuxStatus>,
    changed: Notify,
    pipe: Mutex<Option<File>>,
}

impl StatusReporter {
    /// Reports on the pipe that PID 1 has left on descriptor 3; none if there is no such descriptor.
    pub(crate) fn inherited() -> Option<Self> {
        let pipe = descriptor::inherited(REPORT_PIPE).ok()?;
        Some(Self::new(MuxStatus::default(), Some(File::from(pipe))))
    }

    pub(crate) fn new(status: MuxStatus, pipe: Option<File>) -> Self {
        Self { status: Mutex::new(status), changed: Notify::new(), pipe: Mutex::new(pipe) }
    }

    fn status(&self) -> MutexGuard<'_, MuxStatus> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut MuxStatus)) {
        change(&mut self.status());
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
        self.update(|status| {
            status.last_error = Some(why);
            status.last_error_at_ms = Some(now_ms());
        });
    }

    fn report(&self, report: &MuxReport) {
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipe) = pipe.as_mut() {
            // A pipe that nobody reads means that PID 1 is gone, and this process with it.
            let _ = pipe.write_all(&json_lines::line(report));
        }
    }

    /// Reports the status whenever it has changed.
    pub(crate) async fn report_changes(&self) {
        let mut reported = None;
        loop {
            let status = self.status().clone();
            if reported.as_ref() != Some(&status) {
                self.report(&MuxReport::State(Box::new(status.clone())));
                reported = Some(status);
                tokio::time::sleep(REPORT_EVERY).await;
            }
            self.changed.notified().await;
        }
    }
}
