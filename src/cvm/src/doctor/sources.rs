//! Facts about the services, for several rooms: from the supervisor, and from sshd's configuration.

use super::proc_files::read;
use crate::control_socket;
use crate::gateway_access::GatewayAccess;
use cvm_protocol::accounts::Account;
use cvm_protocol::mux::MUX_INBOUND_PORT;
use cvm_protocol::paths;
use cvm_protocol::status::{Service, Status};
use std::time::Duration;

/// For the supervisor's answer. A room asks twice at most, and both answers must fit into the time of
/// one check, or a supervisor that hangs would fail every other check of the room.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) const MUX_PORT: u16 = MUX_INBOUND_PORT;

pub(crate) fn gateway_access() -> Option<GatewayAccess> {
    GatewayAccess::ask("doctor", PATIENCE).ok()
}

pub(crate) fn status() -> Option<Status> {
    control_socket::status_within(PATIENCE).ok().map(|snapshot| snapshot.status)
}

pub(crate) fn service<'s>(status: Option<&'s Status>, name: &str) -> Option<&'s Service> {
    status?.services.iter().find(|s| s.name == name)
}

pub(crate) fn account(user: &str) -> Option<Account> {
    Account::find(&read("/etc/passwd")?, &read("/etc/group")?, user)
}

/// The configuration that the supervisor has written for sshd.
pub(crate) struct Sshd {
    pub port: u16,
    pub authorized_keys: Vec<String>,
}

pub(crate) fn sshd() -> Option<Sshd> {
    let text = read(paths::SSHD_CONFIG)?;
    let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
    Some(Sshd {
        port: value("Port")?.trim().parse().ok()?,
        authorized_keys: value("AuthorizedKeysFile")?.split_whitespace().map(str::to_owned).collect(),
    })
}
