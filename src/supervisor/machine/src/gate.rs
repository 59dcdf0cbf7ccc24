//! A gate: a condition that one opens and others need.
//!
//! A boot step's task opens the gate of the step's name when it succeeds. A service opens and closes the gates that
//! it provides, by report. Whoever needs a gate runs only while it is open.

/// The name of a gate, which is the name of the boot step that `cvm status` shows for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GateName(pub &'static str);

/// A gate that a service opens and closes.
#[derive(Debug, Clone)]
pub struct Provides {
    pub gate: GateName,
    /// The gate and the service in the words of a sentence: "the storage", "the storage worker".
    pub called: &'static str,
    pub by: &'static str,
    /// What it means that the service cannot tell how the gate is, while the gate stays open: "Nothing is
    /// replicated".
    pub in_doubt: &'static str,
    /// Said when the waiting for the gate begins.
    pub says: Option<String>,
}
