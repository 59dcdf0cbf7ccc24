//! The client's status, and its reports to PID 1: the only file that writes to the report pipe.
//!
//! Status and notes are public, so no word of a message, no name of a chat and no secret is in them.

use crate::clock::now_ms;
use cvm_channel::Reporter;
use cvm_protocol::fact::{Fact, Value};
use cvm_protocol::mux::{DEVICE, INBOUND, SERVER};
use cvm_protocol::report::Level;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::Notify;

/// Between two reports while something changes all the time.
const REPORT_EVERY: Duration = Duration::from_secs(1);

/// A run of the agent takes minutes, and the next message of its session waits for it.
const OLD_MS: u64 = 15 * 60 * 1000;

/// The state of the mux client.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct MuxStatus {
    pub(crate) base_url: String,
    pub(crate) inbound_url: String,
    pub(crate) device_id: String,
    /// Until when the mux-server's token lives; none when there is no good one.
    pub(crate) registered_until_ms: Option<u64>,
    /// Why the last registration failed, with the remedy.
    pub(crate) register_error: Option<String>,
    /// Why the gateway did not answer the last question.
    pub(crate) gateway_error: Option<String>,
    pub(crate) last_error: Option<String>,
    pub(crate) last_error_at_ms: Option<u64>,
    /// Events that the agent has not answered yet.
    pub(crate) waiting: u64,
    /// Answers that the mux-server has not taken yet.
    pub(crate) to_send: u64,
    /// When the oldest event that is not done was accepted.
    pub(crate) oldest_at_ms: Option<u64>,
    /// Since the start of this process.
    pub(crate) accepted: u64,
    pub(crate) duplicates: u64,
    pub(crate) answered: u64,
    /// Events that ended without an answer, as they should.
    pub(crate) ignored: u64,
    /// Events that ended without the answer that somebody expected: see the log.
    pub(crate) refused: u64,
    /// Whether that is what happened last: no event has been answered since.
    pub(crate) refused_last: bool,
    /// Deliveries answered 503 because the bucket did not have them in time: the server asks again.
    pub(crate) unreplicated_acks: u64,
    pub(crate) last_unreplicated_ack_at_ms: Option<u64>,
}

impl MuxStatus {
    pub(crate) fn count_answered(&mut self) {
        self.answered += 1;
        self.refused_last = false;
    }

    pub(crate) fn count_refused(&mut self) {
        self.refused += 1;
        self.refused_last = true;
    }

    /// What `cvm status` and `cvm doctor` show.
    fn facts(&self) -> Vec<Fact> {
        let mut facts = self.registration();
        facts.extend([
            Fact::text(SERVER, &self.base_url),
            Fact::text(INBOUND, &self.inbound_url),
            Fact::text(DEVICE, &self.device_id),
        ]);
        facts.push(Fact::new("waiting for the agent", Value::Count(self.waiting)));
        facts.push(Fact::new("answers to send", Value::Count(self.to_send)));
        if let Some(at_ms) = self.oldest_at_ms.filter(|_| self.waiting + self.to_send > 0) {
            let remedy = "`cvm status` and `cvm doctor` say how the gateway is; nothing is lost meanwhile";
            let oldest = Fact::new("oldest of them", Value::Since { at_ms, late_ms: Some(OLD_MS) });
            facts.push(Fact { remedy: Some(remedy.to_owned()), ..oldest });
        }
        if let Some(why) = self.gateway_error.as_ref().filter(|_| self.waiting > 0) {
            facts.push(Fact::text("gateway", why).warns(Some("`cvm status` and `cvm doctor` say how it is")));
        }
        let counts = [
            ("accepted", self.accepted),
            ("duplicates", self.duplicates),
            ("answered", self.answered),
            ("ignored", self.ignored),
        ];
        facts.extend(counts.map(|(label, count)| Fact::new(label, Value::Count(count))));
        let refused = Fact::new("refused", Value::Count(self.refused));
        facts.push(if self.refused_last { refused.warns(Some("`cvm logs mux` says why")) } else { refused });
        if let (Some(why), Some(at_ms)) = (&self.last_error, self.last_error_at_ms) {
            facts.push(Fact::text("last error", why));
            facts.push(Fact::new("last error at", Value::Since { at_ms, late_ms: None }));
        }
        if let Some(at_ms) = self.last_unreplicated_ack_at_ms {
            let late =
                Fact::new("answered 503 because the bucket was slow", Value::Count(self.unreplicated_acks));
            let remedy = "`cvm storage status` says why the bucket is slow; nothing is lost: the mux-server keeps \
                          them and asks again";
            facts.push(late.warns(Some(remedy)));
            facts.push(Fact::new("last of these", Value::Since { at_ms, late_ms: None }));
        }
        facts
    }

    fn registration(&self) -> Vec<Fact> {
        let remedy =
            "compare MUX_BASE_URL, MUX_REGISTER_KEY and MUX_INBOUND_URL with the mux-server's operator";
        let until = self.registered_until_ms.map(|at_ms| Fact::new("registered", Value::Until { at_ms }));
        match (until, &self.register_error) {
            (Some(until), None) => vec![until],
            (Some(until), Some(why)) => {
                vec![until, Fact::text("cannot renew it", why).warns(Some(remedy))]
            }
            (None, Some(why)) => vec![Fact::text("not registered", why).is_bad(Some(remedy))],
            (None, None) => vec![Fact::text("not registered", "not yet").warns(Some("`cvm logs mux`"))],
        }
    }
}

pub(crate) struct StatusReporter {
    status: Mutex<MuxStatus>,
    changed: Notify,
    reports: Reporter,
}

impl StatusReporter {
    pub(crate) fn new(status: MuxStatus, reports: Reporter) -> Self {
        Self { status: Mutex::new(status), changed: Notify::new(), reports }
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
        self.reports.note(level, text);
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

    /// Reports the status whenever it has changed.
    pub(crate) async fn report_changes(&self) {
        loop {
            let facts = self.status().facts();
            self.reports.status(facts);
            tokio::time::sleep(REPORT_EVERY).await;
            self.changed.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_protocol::fact::Severity;

    fn severity(status: &MuxStatus, label: &str) -> Option<Severity> {
        status.facts().into_iter().find(|fact| fact.label == label).map(|fact| fact.severity_at(1_000))
    }

    #[test]
    fn a_refused_event_is_a_warning_until_one_is_answered() {
        let mut status = MuxStatus::default();
        assert_eq!(severity(&status, "refused"), Some(Severity::Ok));
        status.count_refused();
        assert_eq!(severity(&status, "refused"), Some(Severity::Warning));
        status.count_answered();
        assert_eq!(severity(&status, "refused"), Some(Severity::Ok));
    }

    #[test]
    fn a_registration_that_is_over_or_refused_is_bad_and_one_that_cannot_be_renewed_is_a_warning() {
        let mut status = MuxStatus::default();
        assert_eq!(severity(&status, "not registered"), Some(Severity::Warning), "not yet");
        status.register_error = Some("401".into());
        assert_eq!(severity(&status, "not registered"), Some(Severity::Bad));
        status.registered_until_ms = Some(2_000);
        assert_eq!(severity(&status, "registered"), Some(Severity::Ok));
        assert_eq!(severity(&status, "cannot renew it"), Some(Severity::Warning));
        status.registered_until_ms = Some(1_000);
        assert_eq!(severity(&status, "registered"), Some(Severity::Bad));
    }
}
