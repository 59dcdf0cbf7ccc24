//! A service reports its state as a short list of labelled facts, so that a program can show them without knowing the
//! service.

use serde::{Deserialize, Serialize};

/// One thing worth knowing about a service. Safe to be public.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fact {
    /// The meaning of the value for people, in a word or two, such as `registered`.
    pub label: String,
    pub value: Value,
    #[serde(default)]
    pub severity: Severity,
    /// What an operator can do if the severity is not `Ok`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

/// The value of a fact. A time is an absolute one, in milliseconds since 1970, so that a fact that only grows older
/// needs no second report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Value {
    Text(String),
    Count(u64),
    Bytes(u64),
    Flag(bool),
    /// The fact is true since `at_ms`, and becomes a warning once it is older than `late_ms`.
    Since {
        at_ms: u64,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        late_ms: Option<u64>,
    },
    /// The fact is true until `at_ms`, and is bad afterwards.
    Until {
        at_ms: u64,
    },
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    #[default]
    Ok,
    Warning,
    Bad,
}

impl Fact {
    pub fn new(label: &str, value: Value) -> Self {
        Self { label: label.to_owned(), value, severity: Severity::Ok, remedy: None }
    }

    pub fn text(label: &str, text: impl Into<String>) -> Self {
        Self::new(label, Value::Text(text.into()))
    }

    #[must_use]
    pub fn warns(self, remedy: Option<&str>) -> Self {
        Self { severity: Severity::Warning, remedy: remedy.map(str::to_owned), ..self }
    }

    #[must_use]
    pub fn is_bad(self, remedy: Option<&str>) -> Self {
        Self { severity: Severity::Bad, remedy: remedy.map(str::to_owned), ..self }
    }

    /// The severity at a moment: a fact that lasts too long, or is over, gets worse without a second report.
    pub fn severity_at(&self, now_ms: u64) -> Severity {
        let by_time = match self.value {
            Value::Since { at_ms, late_ms: Some(late_ms) } if now_ms.saturating_sub(at_ms) >= late_ms => {
                Severity::Warning
            }
            Value::Until { at_ms } if now_ms >= at_ms => Severity::Bad,
            _ => Severity::Ok,
        };
        self.severity.max(by_time)
    }
}

/// The text of the fact with this label, for a program that knows the service.
pub fn text_of<'a>(facts: &'a [Fact], label: &str) -> Option<&'a str> {
    facts.iter().find(|fact| fact.label == label).and_then(|fact| match &fact.value {
        Value::Text(text) => Some(text.as_str()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_too_long_becomes_a_warning_and_what_is_over_becomes_bad() {
        let since = Fact::new("oldest", Value::Since { at_ms: 1_000, late_ms: Some(500) });
        assert_eq!([1_499, 1_500].map(|now| since.severity_at(now)), [Severity::Ok, Severity::Warning]);
        let until = Fact::new("registered", Value::Until { at_ms: 1_000 }).warns(None);
        assert_eq!([999, 1_000].map(|now| until.severity_at(now)), [Severity::Warning, Severity::Bad]);
        let always = Fact::new("oldest", Value::Since { at_ms: 1_000, late_ms: None });
        assert_eq!(always.severity_at(u64::MAX), Severity::Ok);
    }

    #[test]
    fn a_fact_on_the_wire_says_what_kind_of_value_it_has() {
        let text = r#"{"label":"mode","value":{"text":"fuse"},"severity":"ok"}"#;
        assert_eq!(serde_json::to_string(&Fact::text("mode", "fuse")).unwrap(), text);
        assert_eq!(serde_json::from_str::<Fact>(text).unwrap(), Fact::text("mode", "fuse"));
    }
}
