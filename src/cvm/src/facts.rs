//! The facts that services report, as text for people. Nothing here knows a service.

use crate::style::Tone;
use crate::text::clean;
use crate::units::{size, span};
use cvm_protocol::fact::{Fact, Severity, Value};

/// The value for people.
pub(crate) fn shown(value: &Value, now_ms: u64) -> String {
    match value {
        Value::Text(text) => clean(text),
        Value::Count(count) => count.to_string(),
        Value::Bytes(bytes) => size(*bytes),
        Value::Flag(true) => "yes".to_owned(),
        Value::Flag(false) => "no".to_owned(),
        Value::Since { at_ms, .. } => format!("{} ago", span(now_ms.saturating_sub(*at_ms))),
        Value::Until { at_ms } if *at_ms > now_ms => format!("for {} more", span(at_ms - now_ms)),
        Value::Until { at_ms } => format!("no longer, since {}", span(now_ms - at_ms)),
    }
}

/// The value, with its remedy if it needs attention.
pub(crate) fn line(fact: &Fact, now_ms: u64) -> String {
    let value = shown(&fact.value, now_ms);
    match &fact.remedy {
        Some(remedy) if fact.severity_at(now_ms) > Severity::Ok => format!("{value}; {}", clean(remedy)),
        _ => value,
    }
}

pub(crate) fn tone(severity: Severity) -> Tone {
    match severity {
        Severity::Ok => Tone::Plain,
        Severity::Warning => Tone::Caution,
        Severity::Bad => Tone::Bad,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_value_is_shown_and_a_remedy_only_if_the_fact_needs_attention() {
        let now = 1_000_000;
        let values = [
            (Value::Text("a\nb".into()), clean("a\nb")),
            (Value::Count(3), "3".into()),
            (Value::Bytes(0), size(0)),
            (Value::Flag(true), "yes".into()),
            (Value::Flag(false), "no".into()),
            (Value::Since { at_ms: 940_000, late_ms: None }, format!("{} ago", span(60_000))),
            (Value::Until { at_ms: 1_060_000 }, format!("for {} more", span(60_000))),
            (Value::Until { at_ms: 940_000 }, format!("no longer, since {}", span(60_000))),
        ];
        for (value, text) in values {
            assert_eq!(shown(&value, now), text);
        }
        let fact = |late_ms| Fact {
            remedy: Some("look".into()),
            ..Fact::new("oldest", Value::Since { at_ms: 940_000, late_ms })
        };
        assert!(!line(&fact(Some(60_001)), now).contains("look"));
        assert!(line(&fact(Some(60_000)), now).ends_with("; look"));
    }
}
