//! Every status PID 1 can leave with, one for each cause. Documented in README; tested.

/// Stopped in order.
pub(crate) const CLEAN: u8 = 0;
/// The command line is wrong (`EX_USAGE`).
pub(crate) const USAGE: u8 = 64;
/// A defect or a missing right of the supervisor's own (`EX_SOFTWARE`).
pub(crate) const INTERNAL: u8 = 70;
/// Processes were left that did not die of SIGKILL (`EX_OSERR`).
pub(crate) const ABANDONED: u8 = 71;
/// Stopped in order, but not everything is in the bucket, or nobody knows (`EX_TEMPFAIL`): the
/// next boot on the same volume pushes it.
pub(crate) const UNDRAINED: u8 = 75;
/// The configuration is wrong (`EX_CONFIG`); nothing was started.
pub(crate) const CONFIG: u8 = 78;
