//! The role `gateway` runs an OpenClaw gateway, with its storage, sshd, dockerd and mux client.

use super::Given;
use crate::config::{Config, Docker, Storage};
use crate::entry::Entry;
use crate::services::{dockerd, gateway, mux, sshd, standin, storage};
use crate::{gates, tasks};
use cvm_machine::plan::Step;

/// The boot steps, in the order in which they may begin.
pub(super) fn tasks(config: &Config) -> Vec<Step> {
    let tree = match config.storage {
        Storage::S3(_) => &[gates::STORAGE],
        Storage::Local => &[gates::VOLUME],
    };
    vec![tasks::ssh(), tasks::volume(), tasks::home(tree), tasks::state()]
}

/// The services, in the order in which `cvm status` shows them.
pub(super) fn services(given: &Given<'_>) -> Vec<Entry> {
    let Given { config, keys, owner_epoch, has_preload } = *given;
    let mut all = vec![sshd::entry(config.ssh.port.get())];
    if config.docker == Docker::On {
        all.push(dockerd::entry());
    }
    let has_bucket = matches!(config.storage, Storage::S3(_));
    if let Storage::S3(s3) = &config.storage {
        all.push(standin::entry());
        all.push(storage::entry(s3, keys, config.gateway.user.as_str(), owner_epoch));
    }
    all.push(gateway::entry(config, has_preload));
    if let Some(settings) = &config.mux {
        all.push(mux::entry(config, settings, keys, has_bucket));
    }
    all
}
