//! How a service is described: everything in which one differs from another.

use crate::backoff::Backoff;
use crate::gate::{GateName, Provides};
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
    /// Whether it is a program of ours, with a sealed specification, a report pipe and a lifeline.
    pub has_channel: bool,
    /// The account it runs as.
    pub user: String,
    pub environment: Environment,
    pub directory: &'static str,
    /// Gates without which it cannot run.
    pub needs: &'static [GateName],
    /// Gates that it opens and closes.
    pub provides: Vec<Provides>,
    /// The last word of a machine in which this service ended without a last word of its own. None: it leaves
    /// nothing undone.
    pub must_drain: Option<&'static str>,
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
    pub courtesy: Option<Courtesy>,
}

/// The first start of a service waits while another one starts, which needs the processors more. It depends on the
/// other in nothing: the wait ends when the other is ready, when its start fails, and after a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Courtesy {
    pub to: &'static str,
    /// Counted from the boot.
    pub at_most: Duration,
}

/// Which variables a service gets, beside PATH, HOME, USER and LANG. None gets the supervisor's own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Environment {
    /// Searched before the rest of PATH.
    pub path_first: Option<&'static str>,
    pub variables: &'static [(&'static str, &'static str)],
    /// Also what the user passes through, and the gateway's token.
    pub of_the_gateway: bool,
}

/// Work before each start, done by `cvm-task`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Prepare {
    /// Remove stale pid files; find an iptables backend and a storage driver that work.
    Dockerd,
    /// End whoever holds this port. Nothing to do when nobody does.
    FreePort(u16),
}

impl Service {
    /// One that runs as root, needs nothing, is not required, comes back soon for ever, and ends with all that it
    /// has started.
    pub fn new(name: &'static str, what: &'static str, argv: &[&str]) -> Self {
        Self {
            name,
            what,
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            has_channel: false,
            user: "root".into(),
            environment: Environment::default(),
            directory: "/",
            needs: &[],
            provides: Vec::new(),
            must_drain: None,
            prepare: None,
            repair: None,
            backoff: Backoff::seconds(1, 30, 60),
            stop_order: 1,
            grace: Duration::from_secs(2),
            leftovers: Leftovers::Kill,
            liveness: None,
            startup: None,
            readiness: None,
            oom_score_adj: 0,
            limits: None,
            says_started: None,
            says_ready: None,
            required: false,
            courtesy: None,
        }
    }

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
