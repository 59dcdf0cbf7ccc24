//! A role decides which tasks and services run in a machine.

mod gateway;

use crate::config::Config;
use crate::entry::{Entry, Specifications};
use cvm_machine::plan::{Plan, Step, Unplannable};
use cvm_secrets::keys::KeyRing;

/// Everything that a role is made from.
pub struct Given<'a> {
    pub config: &'a Config,
    /// The keys derived from `MASTER_KEY`, if it is set.
    pub keys: Option<&'a KeyRing>,
    /// The epoch of the proven owner, or 0.
    pub owner_epoch: u32,
    /// Whether the file [`cvm_protocol::paths::PRELOAD`] exists.
    pub has_preload: bool,
}

/// The plan of a machine in which a gateway runs, and the specifications of its services.
pub fn gateway(given: &Given<'_>) -> Result<(Plan, Specifications), Unplannable> {
    plan_of(gateway::tasks(given.config), gateway::services(given))
}

/// Makes the plan of any role from its boot steps and services.
pub fn plan_of(tasks: Vec<Step>, entries: Vec<Entry>) -> Result<(Plan, Specifications), Unplannable> {
    let mut specifications = Vec::new();
    let mut services = Vec::new();
    for Entry { service, specification } in entries {
        specifications.extend(specification.map(|line| (service.name, line)));
        services.push(service);
    }
    Ok((Plan::new(tasks, services)?, specifications))
}
