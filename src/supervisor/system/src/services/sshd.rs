use crate::entry::Entry;
use crate::gates;
use cvm_machine::description::{Prepare, Service};
use cvm_protocol::keeper::Leftovers;
use cvm_protocol::paths;

/// It never gives up: operators find out through it what is wrong.
pub(crate) fn entry(port: u16) -> Entry {
    Entry::without_channel(Service {
        needs: &[gates::SSH],
        prepare: Some(Prepare::FreePort(port)),
        // Last: whoever watches a shutdown watches it through this.
        stop_order: 9,
        leftovers: Leftovers::Leave,
        says_started: Some("SSH daemon started."),
        required: true,
        ..Service::new("sshd", "SSH for operators", &["/usr/sbin/sshd", "-D", "-e", "-f", paths::SSHD_CONFIG])
    })
}
