//! What services report: notes for the boot log, gates, facts for the status, and their last word.

use super::{Action, Machine, ServiceId, ServiceRecord};
use crate::moment::Moment;
use crate::service::Run;
use cvm_protocol::fact::{Fact, Value};
use cvm_protocol::report::{Level, ServiceReport};
use std::time::Duration;

/// Notes of a service that are said at once, and how long one more takes to earn: a service that faces the
/// network must not drown the boot log. Errors have an allowance of their own.
const NOTES_AT_ONCE: u32 = 100;
const ERRORS_AT_ONCE: u32 = 300;
const NOTE_EVERY: Duration = Duration::from_secs(1);
/// More than this is no short list.
const FACTS_MAX: usize = 64;
const FACT_CHARS: usize = 2_000;

/// What a service said last that it leaves undone.
#[derive(Debug)]
pub(super) enum LastWord {
    Unsaid,
    AllDone,
    /// In a sentence.
    Missing(String),
}

/// How many notes a service may still have said.
#[derive(Debug)]
pub(super) struct NoteAllowance {
    most: u32,
    left: u32,
    since: Moment,
    dropped: u32,
}

impl NoteAllowance {
    pub(super) fn of_notes() -> Self {
        Self::of(NOTES_AT_ONCE)
    }

    pub(super) fn of_errors() -> Self {
        Self::of(ERRORS_AT_ONCE)
    }

    fn of(most: u32) -> Self {
        Self { most, left: most, since: Moment::default(), dropped: 0 }
    }

    /// Whether one more note may be said now, and how many were dropped before it.
    fn take(&mut self, now: Moment) -> Option<u32> {
        let earned = now.since(self.since).as_secs() / NOTE_EVERY.as_secs();
        if earned > 0 {
            let earned = u32::try_from(earned).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(earned).min(self.most);
            self.since = now;
        }
        let Some(left) = self.left.checked_sub(1) else {
            self.dropped = self.dropped.saturating_add(1);
            return None;
        };
        self.left = left;
        Some(std::mem::take(&mut self.dropped))
    }
}

/// A service may hand on what a server said, and a server must not write lines into our log.
pub(super) fn one_line(text: &str) -> String {
    text.replace(char::is_control, " ")
}

fn too_many(service: &str, dropped: u32) -> Option<Action> {
    let text = format!("{service}: {dropped} notes were dropped: too many at once");
    (dropped > 0).then_some(Action::Say(Level::Warn, text))
}

fn short(text: &str) -> String {
    one_line(text).chars().take(FACT_CHARS).collect()
}

/// Facts that cannot break a page, however they came about.
fn tidied(facts: Vec<Fact>) -> Vec<Fact> {
    let tidy = |fact: Fact| Fact {
        label: short(&fact.label),
        value: match fact.value {
            Value::Text(text) => Value::Text(short(&text)),
            other => other,
        },
        remedy: fact.remedy.as_deref().map(short),
        ..fact
    };
    facts.into_iter().take(FACTS_MAX).map(tidy).collect()
}

impl Machine {
    pub(super) fn on_report(
        &mut self,
        id: ServiceId,
        run: Run,
        report: ServiceReport,
        now: Moment,
        out: &mut Vec<Action>,
    ) {
        let Some(record) = self.services.get_mut(id.0).filter(|s| s.unit.run() == Some(run)) else { return };
        match report {
            ServiceReport::Note { level, text } => {
                let allowance = if level == Level::Error { &mut record.errors } else { &mut record.notes };
                let Some(dropped) = allowance.take(now) else { return };
                out.extend(too_many(record.service.name, dropped));
                out.push(Action::Say(level, one_line(&text)));
            }
            ServiceReport::Status { facts } => record.facts = tidied(facts),
            ServiceReport::Drained { missing } => {
                record.last_word = match missing {
                    Some(missing) => LastWord::Missing(one_line(&missing)),
                    None => LastWord::AllDone,
                };
            }
            ServiceReport::Gate { gate, state } => {
                let index =
                    self.gates_of(id).into_iter().find(|i| self.name_at(*i).is_some_and(|n| n.0 == gate));
                if let Some(index) = index {
                    self.on_gate(id, index, state, now, out);
                }
            }
        }
    }

    /// Says how many notes were dropped, once one more might be said.
    pub(super) fn say_dropped_notes(&mut self, now: Moment, out: &mut Vec<Action>) {
        for record in &mut self.services {
            for allowance in [&mut record.notes, &mut record.errors] {
                if allowance.dropped > 0
                    && let Some(dropped) = allowance.take(now)
                {
                    out.extend(too_many(record.service.name, dropped));
                }
            }
        }
    }

    /// What services leave undone at the end, a sentence each. A service that said nothing and never opened a gate
    /// had nothing to do.
    pub(super) fn left_undone(&self) -> Vec<String> {
        let undone = |record: &ServiceRecord| match &record.last_word {
            LastWord::AllDone => None,
            LastWord::Missing(missing) => Some(missing.clone()),
            LastWord::Unsaid => {
                record.service.must_drain.filter(|_| record.has_opened_a_gate).map(str::to_owned)
            }
        };
        self.services.iter().filter_map(undone).collect()
    }
}
