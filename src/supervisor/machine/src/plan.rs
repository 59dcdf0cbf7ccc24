//! What a machine is made of: boot steps and services, of which each can start once what it needs is there.

use crate::backoff::Backoff;
use crate::description::Service;
use crate::gate::{GateName, Provides};
use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

/// What the failure of a step means for the boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weight {
    /// What needs it waits, status says why, and the step is tried again.
    Required,
    /// A warning; only what needs it directly goes without.
    Degradable,
}

/// Who opens the gate of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Work {
    /// A process that does its work and ends.
    Task,
    /// A service, which may close the gate again.
    Service {
        name: &'static str,
        /// The gate and the service in the words of a sentence: "the storage", "the storage worker".
        called: &'static str,
        by: &'static str,
        /// What it means that the service cannot tell how the gate is, while the gate stays open.
        in_doubt: &'static str,
        /// Said when the waiting begins.
        says: Option<String>,
    },
}

/// A boot step: a gate, and how it is opened.
#[derive(Debug, Clone)]
pub struct Step {
    pub name: GateName,
    /// Steps that must have ended before, however.
    pub after: &'static [GateName],
    /// Gates that must be open before.
    pub needs: &'static [GateName],
    /// No service starts before this step has ended, however.
    pub before_services: bool,
    /// None: as long as it takes.
    pub deadline: Option<Duration>,
    pub weight: Weight,
    pub work: Work,
    /// The line of the boot log that operators look for.
    pub says: Option<&'static str>,
}

/// Waits between tries of a step: soon at first, since most causes are a disk or a mount
/// that is late, and then no rarer than an operator's patience.
pub const STEP_BACKOFF: Backoff = Backoff::seconds(2, 60, 600);

/// Steps and services of which each can start once what it needs is there. Nothing else can be built.
#[derive(Debug, Clone)]
pub struct Plan {
    steps: Vec<Step>,
    services: Vec<Service>,
}

/// Why steps and services make no plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unplannable {
    /// Two services, or two steps or gates, of one name.
    Twice(&'static str),
    /// Needed, and nobody opens it.
    NobodyOpens { gate: GateName, needed_by: &'static str },
    /// Each of these waits for another of them.
    Circle(Vec<&'static str>),
}

impl fmt::Display for Unplannable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Twice(name) => write!(f, "two of one plan are called {name}"),
            Self::NobodyOpens { gate, needed_by } => {
                write!(f, "{needed_by} needs the gate {}, which nobody opens", gate.0)
            }
            Self::Circle(names) => write!(f, "each of these waits for another of them: {}", names.join(", ")),
        }
    }
}

impl Plan {
    /// Of boot steps that are tasks, in the order in which they may begin, and of services, in the order in
    /// which `cvm status` shows them.
    pub fn new(tasks: Vec<Step>, services: Vec<Service>) -> Result<Self, Unplannable> {
        let mut steps = tasks;
        for service in &services {
            for provided in &service.provides {
                let first_use = steps.iter().position(|step| step.needs.contains(&provided.gate));
                steps.insert(first_use.unwrap_or(steps.len()), step_of(service, provided));
            }
        }
        let plan = Self { steps, services };
        plan.check_names()?;
        plan.check_circles()?;
        Ok(plan)
    }

    pub(crate) fn into_parts(self) -> (Vec<Step>, Vec<Service>) {
        (self.steps, self.services)
    }

    fn check_names(&self) -> Result<(), Unplannable> {
        let mut gates = BTreeSet::new();
        let mut services = BTreeSet::new();
        let twice = self.steps.iter().find(|step| !gates.insert(step.name)).map(|step| step.name.0);
        let twice = twice.or_else(|| self.services.iter().find(|s| !services.insert(s.name)).map(|s| s.name));
        if let Some(name) = twice {
            return Err(Unplannable::Twice(name));
        }
        let of_steps =
            self.steps.iter().flat_map(|s| s.needs.iter().chain(s.after).map(|gate| (*gate, s.name.0)));
        let of_services = self.services.iter().flat_map(|s| s.needs.iter().map(|gate| (*gate, s.name)));
        match of_steps.chain(of_services).find(|(gate, _)| !gates.contains(gate)) {
            Some((gate, needed_by)) => Err(Unplannable::NobodyOpens { gate, needed_by }),
            None => Ok(()),
        }
    }

    /// Takes away, again and again, whatever waits for nothing that is left. What is left at the end waits for
    /// itself.
    fn check_circles(&self) -> Result<(), Unplannable> {
        let first: Vec<GateName> = self.steps.iter().filter(|s| s.before_services).map(|s| s.name).collect();
        let mut steps: Vec<&Step> = self.steps.iter().collect();
        let mut services: Vec<&Service> = self.services.iter().collect();
        loop {
            let left = steps.len() + services.len();
            let gates: BTreeSet<GateName> = steps.iter().map(|s| s.name).collect();
            let names: BTreeSet<&str> = services.iter().map(|s| s.name).collect();
            let waits = |needs: &[GateName]| needs.iter().any(|gate| gates.contains(gate));
            steps.retain(|step| {
                let provider = matches!(step.work, Work::Service { name, .. } if names.contains(name));
                provider || waits(step.needs) || waits(step.after)
            });
            services.retain(|service| waits(service.needs) || waits(&first));
            match steps.len() + services.len() {
                0 => return Ok(()),
                same if same == left => break,
                _ => {}
            }
        }
        let names = services.iter().map(|s| s.name).chain(steps.iter().map(|s| s.name.0));
        Err(Unplannable::Circle(names.collect()))
    }
}

/// A provided gate can open once its service can run.
fn step_of(service: &Service, provided: &Provides) -> Step {
    Step {
        name: provided.gate,
        after: &[],
        needs: service.needs,
        before_services: false,
        // A restore takes as long as the state is large, and a bucket may be away for days.
        deadline: None,
        weight: if service.required { Weight::Required } else { Weight::Degradable },
        work: Work::Service {
            name: service.name,
            called: provided.called,
            by: provided.by,
            in_doubt: provided.in_doubt,
            says: provided.says.clone(),
        },
        says: None,
    }
}
