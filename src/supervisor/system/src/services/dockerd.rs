use crate::entry::Entry;
use crate::gates;
use crate::services::gateway;
use cvm_machine::backoff::Backoff;
use cvm_machine::description::{Courtesy, Environment, Prepare, Service};
use cvm_protocol::keeper::Probe;
use cvm_protocol::paths;
use std::time::Duration;

/// A container that is not privileged sees the kernel's settings read-only, and dockerd would start none because
/// it cannot turn IPv6 off in it.
const ALLOW_IPV6: (&str, &str) = ("DOCKER_ALLOW_IPV6_ON_IPV4_INTERFACE", "1");

/// The gateway is ready after about 8 s on two idle cores, and dockerd would take much of them. A gateway that needs
/// longer than this, for a migration or a restore, leaves the agent without containers no longer.
const WAITS_AT_MOST: Duration = Duration::from_mins(1);

pub(crate) fn entry() -> Entry {
    Entry::without_channel(Service {
        // Of a volume that belongs to somebody else it starts no containers.
        needs: &[gates::VOLUME],
        // The iptables that works comes first in PATH.
        environment: Environment {
            path_first: Some(paths::DOCKERD_BIN),
            variables: &[ALLOW_IPV6],
            ..Environment::default()
        },
        prepare: Some(Prepare::Dockerd),
        backoff: Backoff::seconds(5, 300, 600),
        stop_order: 5,
        // As long as dockerd gives its containers. It would take 5 s more for itself, which it does not need:
        // its stale files are removed before each start.
        grace: Duration::from_secs(10),
        readiness: Some(Probe::UnixHttp { socket: paths::DOCKER_SOCKET.into(), path: "/_ping".into() }),
        oom_score_adj: 100,
        says_ready: Some("Docker daemon ready."),
        courtesy: Some(Courtesy { to: gateway::NAME, at_most: WAITS_AT_MOST }),
        ..Service::new(
            "dockerd",
            "containers for the agent",
            &["/usr/sbin/dockerd", "--config-file", paths::DOCKERD_CONFIG],
        )
    })
}
