//! Room services: the facts that services report, whatever services they are.

use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::sources;
use crate::facts::shown;
use crate::text::clean;
use crate::units::{count, now_ms};
use cvm_protocol::fact::{Fact, Severity};
use cvm_protocol::status::Service;

pub(crate) fn check(checks: &mut Checks<'_>) {
    let Some(status) = sources::status() else {
        return checks.add("facts", skip("only the supervisor knows the services"));
    };
    let now = now_ms();
    for service in status.services.iter().filter(|service| !service.facts.is_empty()) {
        for (check, outcome) in findings(service, now) {
            checks.add(&check, outcome);
        }
    }
}

/// A finding for each fact that needs attention, or one for all that do not.
fn findings(service: &Service, now_ms: u64) -> Vec<(String, Outcome)> {
    let name = clean(&service.name);
    let attention = |fact: &&Fact| fact.severity_at(now_ms) > Severity::Ok;
    let found: Vec<_> =
        service.facts.iter().filter(attention).map(|fact| finding(&name, fact, now_ms)).collect();
    if !found.is_empty() {
        return found;
    }
    let facts = count(service.facts.len() as u64, "fact", "facts");
    vec![(name, ok(format!("it reports {facts}, none of which needs attention")))]
}

fn finding(name: &str, fact: &Fact, now_ms: u64) -> (String, Outcome) {
    let found = shown(&fact.value, now_ms);
    let remedy = fact.remedy.as_deref().map_or_else(|| format!("`cvm logs {name}` shows more"), clean);
    let outcome = match fact.severity_at(now_ms) {
        Severity::Bad => fail(found, remedy),
        Severity::Warning | Severity::Ok => warn(found, remedy),
    };
    (format!("{name}: {}", clean(&fact.label)), outcome)
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::status::samples::service;
    use cvm_protocol::fact::Value;
    use cvm_protocol::status::ServiceState;

    #[test]
    fn a_fact_that_needs_attention_is_a_finding_with_a_remedy_and_the_rest_is_one_finding() {
        let of = |facts| findings(&Service { facts, ..service("toy", ServiceState::Ready) }, 1_000);
        let good = of(vec![Fact::text("mode", "fast"), Fact::new("queue", Value::Count(0))]);
        assert_eq!((good.len(), good[0].1.verdict), (1, Verdict::Ok));
        let since = Fact::new("oldest", Value::Since { at_ms: 0, late_ms: Some(1_000) });
        let bad =
            of(vec![Fact::text("mode", "fast"), since, Fact::text("token", "none").is_bad(Some("ask"))]);
        let verdicts: Vec<_> = bad.iter().map(|(check, found)| (check.as_str(), found.verdict)).collect();
        assert_eq!(verdicts, [("toy: oldest", Verdict::Warn), ("toy: token", Verdict::Fail)]);
        assert_eq!(bad[1].1.remedy.as_deref(), Some("ask"));
    }
}
