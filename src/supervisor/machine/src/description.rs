//! How a service is described: everything in which one differs from another.

use crate::backoff::Backoff;
use crate::plan::StepName;
use crate::service::{Liveness, Rules};
use cvm_protocol::keeper::{Leftovers, Limits, Probe};
use std::time::Duration;

/// Repairing a configuration may migrate databases.
const REPAIR_DEADLINE: Duration = Duration::from_mins(5);

/// Trying iptables and mounting a test overlay takes a fraction of this.
const PREPARE_DEADLINE: Duration = Duration::from_mins(1);

#[derive(Debug, Clone)]
pub struct Service {
    pub name: &'static str,
    /// One line for people.
    pub what: &'static str,
    /// A program without a slash is one of this build's own binaries.
    pub argv: Vec<String>,
    pub ties: Ties,
    /// The account it runs as.
    pub user: String,
    pub environment: Environment,
    pub directory: &'static str,
    /// Boot steps without which it cannot run.
    pub needs: &'static [StepName],
    /// A task that runs before each start.
    pub prepare: Option<Prepare>,
    /// What to run once when it exits with 78.
    pub repair: Option<Vec<String>>,
    pub backoff: Backoff,
    /// Services of a lower number are stopped first.
    pub stop_order: u8,
    pub grace: Duration,
    pub leftovers: Leftovers,
    pub liveness: Option<(Liveness, Probe)>,
    /// Says yes once the start is over.
    pub startup: Option<Probe>,
    pub readiness: Option<Probe>,
    /// Higher is killed earlier when memory runs out. PID 1 and sshd stay at 0.
    pub oom_score_adj: i16,
    /// What the kernel refuses it and all that it starts.
    pub limits: Option<Limits>,
    /// Lines of the boot log that operators look for.
    pub says_started: Option<&'static str>,
    pub says_ready: Option<&'static str>,
    /// Whether the machine counts as healthy without it.
    pub required: bool,
}

/// Which variables a service gets. None gets the supervisor's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Environment {
    /// PATH, HOME and LANG.
    Plain,
    /// Plain, with limits for the Go in it: its collector lets twice the memory in use grow otherwise.
    Storage,
    /// Plain, with the iptables that works first in PATH.
    Dockerd,
    /// Plain, what the user passes through, and the gateway's own switches.
    Gateway,
}

/// Work before each start, done by `cvm-task`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prepare {
    /// Remove stale pid files; find an iptables backend and a storage driver that work.
    Dockerd,
    /// End whoever holds this port. Nothing to do when nobody does.
    FreePort(u16),
}

/// What a service and PID 1 say to each other besides signals and probes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ties {
    None,
    /// The bucket's specification on standard input, reports on descriptor 3, and the order to
    /// end as end of file on descriptor 4: see `cvm_protocol::storage`.
    Storage,
    /// Its specification on standard input, reports on descriptor 3: see `cvm_protocol::mux`.
    Mux,
}

impl Ties {
    /// Whether it is handed a specification, and says on descriptor 3 how it stands.
    pub fn speaks(self) -> bool {
        self != Self::None
    }
}

impl Service {
    /// What the state machine needs to know of it.
    pub fn rules(&self) -> Rules {
        Rules {
            backoff: self.backoff,
            grace: self.grace,
            prepare: self.prepare.map(|_| PREPARE_DEADLINE),
            repair: self.repair.as_ref().map(|_| REPAIR_DEADLINE),
            liveness: self.liveness.as_ref().map(|(limits, _)| *limits),
            has_startup: self.startup.is_some(),
            has_readiness: self.readiness.is_some(),
        }
    }
}
