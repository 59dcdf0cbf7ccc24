use crate::entry::Entry;
use crate::gates;
use cvm_machine::description::{Prepare, Service};
use cvm_protocol::keeper::Leftovers;
use cvm_protocol::paths;

/// sshd is restarted for ever, because operators need it to find out what is wrong.
pub(crate) fn entry(port: u16) -> Entry {
    Entry::without_channel(Service {
        needs: &[gates::SSH],
        prepare: Some(Prepare::FreePort(port)),
        // Last, because operators watch a shutdown over SSH.
        stop_order: 9,
        leftovers: Leftovers::Leave,
        says_started: Some("SSH daemon started."),
        required: true,
        ..Service::new("sshd", "SSH for operators", &["/usr/sbin/sshd", "-D", "-e", "-f", paths::SSHD_CONFIG])
    })
}
