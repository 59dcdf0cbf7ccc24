use crate::entry::Entry;
use crate::gates;
use crate::services::gateway;
use cvm_machine::backoff::Backoff;
use cvm_machine::description::{Courtesy, Environment, Prepare, Service};
use cvm_protocol::keeper::Probe;
use cvm_protocol::paths;
use std::time::Duration;

/// In a container that is not privileged the kernel's settings are read-only. dockerd cannot turn IPv6 off there, and
/// without this variable it would then start no container.
const ALLOW_IPV6: (&str, &str) = ("DOCKER_ALLOW_IPV6_ON_IPV4_INTERFACE", "1");

/// How long dockerd waits for the gateway, which is ready after about 8 s on two idle cores, and later if dockerd
/// starts beside it. If the gateway takes longer, for a migration or a restore, the agent still gets its containers.
const WAITS_AT_MOST: Duration = Duration::from_mins(1);

pub(crate) fn entry() -> Entry {
    Entry::without_channel(Service {
        // So it starts no containers of a volume that belongs to somebody else.
        needs: &[gates::VOLUME],
        // The directory with an iptables that works on this kernel.
        environment: Environment {
            path_first: Some(paths::DOCKERD_BIN),
            variables: &[ALLOW_IPV6],
            ..Environment::default()
        },
        prepare: Some(Prepare::Dockerd),
        backoff: Backoff::seconds(5, 300, 600),
        stop_order: 5,
        // As long as dockerd waits for its containers. It would take 5 s more for cleaning up, which is not needed:
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
