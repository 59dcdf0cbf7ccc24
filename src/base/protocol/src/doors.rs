//! A door is a protection that is on by default and that this configuration turns off.
//!
//! One list serves the boot log, `cvm-init --check`, `cvm status` and `cvm doctor`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A protection that is off, and how to turn it on again. Holds no value of a secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Door {
    /// The setting that opens the door, such as `ENABLE_DOCKER=1`.
    pub name: String,
    /// What somebody can do as long as the door is open.
    pub risk: String,
    /// How to close the door.
    pub remedy: String,
}

impl Door {
    pub fn new(name: &str, risk: impl Into<String>, remedy: &str) -> Self {
        Self { name: name.to_owned(), risk: risk.into(), remedy: remedy.to_owned() }
    }
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Open door: {}: {} (to shut it: {})", self.name, self.risk, self.remedy)
    }
}
