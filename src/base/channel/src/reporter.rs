//! The reports of a service.

use cvm_protocol::fact::Fact;
use cvm_protocol::json_lines::line;
use cvm_protocol::report::{GateState, Level, ServiceReport};
use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, PoisonError};

pub struct Reporter {
    pipe: Mutex<Option<File>>,
    /// PID 1 hears of changes, not of each try.
    facts: Mutex<Option<Vec<Fact>>>,
}

impl Reporter {
    pub fn new(pipe: OwnedFd) -> Self {
        Self { pipe: Mutex::new(Some(File::from(pipe))), facts: Mutex::default() }
    }

    /// A reporter without a pipe, for tests of what reports.
    pub fn nowhere() -> Self {
        Self { pipe: Mutex::default(), facts: Mutex::default() }
    }

    /// A line for the boot log, and for the service's own.
    pub fn note(&self, level: Level, text: impl Into<String>) {
        let text = text.into();
        match level {
            Level::Error => tracing::error!("{text}"),
            Level::Warn => tracing::warn!("{text}"),
            Level::Info | Level::Debug => tracing::info!("{text}"),
        }
        self.send(&ServiceReport::Note { level, text });
    }

    pub fn gate(&self, gate: &str, state: GateState) {
        self.send(&ServiceReport::Gate { gate: gate.to_owned(), state });
    }

    /// How the service stands. Nothing is sent when nothing has changed.
    pub fn status(&self, facts: Vec<Fact>) {
        let mut last = self.facts.lock().unwrap_or_else(PoisonError::into_inner);
        if last.as_ref() != Some(&facts) {
            self.send(&ServiceReport::Status { facts: facts.clone() });
            *last = Some(facts);
        }
    }

    /// The last word: what is left undone, in a sentence.
    pub fn drained(&self, missing: Option<String>) {
        self.send(&ServiceReport::Drained { missing });
    }

    fn send(&self, report: &ServiceReport) {
        let mut pipe = self.pipe.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipe) = pipe.as_mut() {
            // Nobody to report to: PID 1 is gone, and the lifeline says so too.
            let _ = pipe.write_all(&line(report));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;

    #[test]
    fn what_has_not_changed_is_not_said_again() {
        let (ours, theirs) = cvm_sys::descriptor::pipe().unwrap();
        let reporter = Reporter::new(theirs);
        for n in [1, 1, 2] {
            reporter.status(vec![Fact::text("number", n.to_string())]);
        }
        reporter.drained(None);
        drop(reporter);
        let mut text = String::new();
        File::from(ours).read_to_string(&mut text).unwrap();
        let reports: Vec<ServiceReport> =
            text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let status = |n: &str| ServiceReport::Status { facts: vec![Fact::text("number", n)] };
        assert_eq!(reports, [status("1"), status("2"), ServiceReport::Drained { missing: None }]);
    }
}
