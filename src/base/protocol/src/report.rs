//! What every program may say to PID 1: lines for the boot log.

use serde::{Deserialize, Serialize};

/// A report of a keeper or a step; a step may carry notes for the boot log.
pub const REPORT_MAX: usize = 64 * 1024;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    Error,
    Warn,
    Info,
    Debug,
}

/// A line for the boot log. Safe to be public.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub level: Level,
    pub text: String,
}
