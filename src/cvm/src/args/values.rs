//! Values on the command line: how each is read, and the rule that a wrong one gets as its answer.

use clap::ValueEnum;
use std::time::Duration;

/// How many lines from the end of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lines {
    All,
    Last(usize),
}

/// The shells for which there are completion scripts.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Shell {
    Bash,
    Zsh,
    Fish,
}

pub(super) fn seconds(text: &str) -> Result<Duration, String> {
    const RULE: &str = "give seconds from 0.1 to 86400";
    let given: f64 = text.parse().map_err(|_| RULE.to_owned())?;
    // NaN is in no range.
    if (0.1..=86_400.0).contains(&given) { Ok(Duration::from_secs_f64(given)) } else { Err(RULE.to_owned()) }
}

pub(super) fn lines(text: &str) -> Result<Lines, String> {
    if text == "all" {
        return Ok(Lines::All);
    }
    text.parse().map(Lines::Last).map_err(|_| "give a number of lines, or: all".to_owned())
}

pub(super) fn fingerprint(text: &str) -> Result<String, String> {
    if cvm_protocol::volume::is_fingerprint(text) {
        return Ok(text.to_owned());
    }
    Err("give 64 hex digits in lower case, as `cvm derive volume-fingerprint` prints them".to_owned())
}
