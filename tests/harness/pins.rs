//! The list of the least safe versions, image/least-safe.

use crate::machine::repository;
use std::fs;

/// Before `version` it `why`.
#[derive(Debug)]
pub struct LeastSafe {
    pub ecosystem: String,
    pub name: String,
    pub version: String,
    pub why: String,
}

/// All lines of the list.
#[track_caller]
pub fn least_safe() -> Vec<LeastSafe> {
    let text = fs::read_to_string(repository().join("image/least-safe")).expect("image/least-safe");
    let lines = text.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    let parse = |line: &str| {
        let [ecosystem, name, version, why] = line.splitn(4, ' ').collect::<Vec<_>>()[..] else {
            panic!("image/least-safe: `{line}` is not ecosystem, name, version, why");
        };
        let [ecosystem, name, version, why] = [ecosystem, name, version, why].map(str::to_owned);
        LeastSafe { ecosystem, name, version, why }
    };
    lines.map(parse).collect()
}
