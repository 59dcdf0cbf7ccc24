//! What runs in a machine, by its role.

mod gateway;

use crate::config::Config;
use crate::entry::{Entry, Specifications};
use cvm_machine::plan::{Plan, Step, Unplannable};
use cvm_secrets::keys::KeyRing;

/// All that a role is made from.
pub struct Given<'a> {
    pub config: &'a Config,
    /// None without `MASTER_KEY`.
    pub keys: Option<&'a KeyRing>,
    /// Of the proven owner, or 0.
    pub owner_epoch: u32,
    /// Whether there is a [`cvm_protocol::paths::PRELOAD`].
    pub has_preload: bool,
}

/// The plan of the machine in which a gateway runs, and what its services are told.
pub fn gateway(given: &Given<'_>) -> Result<(Plan, Specifications), Unplannable> {
    plan_of(gateway::tasks(given.config), gateway::services(given))
}

/// The plan of boot steps and services, whatever role they make.
pub fn plan_of(tasks: Vec<Step>, entries: Vec<Entry>) -> Result<(Plan, Specifications), Unplannable> {
    let mut specifications = Vec::new();
    let mut services = Vec::new();
    for Entry { service, specification } in entries {
        specifications.extend(specification.map(|line| (service.name, line)));
        services.push(service);
    }
    Ok((Plan::new(tasks, services)?, specifications))
}
