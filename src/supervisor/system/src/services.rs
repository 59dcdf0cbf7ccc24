//! The services, as data. Adding one is adding an entry to [`services`].
//!
//! What differs between services is written here and nowhere else; what is the same for all of them is in
//! `cvm_machine::service`.

use crate::config::{Config, Docker, S3, Seconds, Storage};
use cvm_machine::backoff::Backoff;
use cvm_machine::description::{Environment, Prepare, Service, Ties};
use cvm_machine::plan::StepName;
use cvm_machine::service::Liveness;
use cvm_protocol::keeper::{AGENT_LIMITS, Leftovers, Probe};
use cvm_protocol::mux::{MUX_CLIENT, MUX_INBOUND_PORT};
use cvm_protocol::paths;
use cvm_protocol::storage::STORAGE_WORKER;
use std::time::Duration;

/// What a stop of the storage worker may take beyond `S3_DRAIN_TIMEOUT`, at whose end the worker itself
/// says what is missing and ends.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);
/// Starts of 17 minutes were seen, with hundreds of agents or a migration. One that still gives no answer
/// after this long is in a loop.
const GATEWAY_START: Duration = Duration::from_hours(1);
/// It opens one small database. A disk that is slower than this is not one that messages are safe on.
const MUX_START: Duration = Duration::from_mins(1);
const MUX_SILENCE: Duration = Duration::from_mins(1);

/// All services of this configuration, in the order in which `status` shows them.
pub fn services(config: &Config) -> Vec<Service> {
    let mut all = vec![sshd(config.ssh.port.get())];
    if config.docker == Docker::On {
        all.push(dockerd());
    }
    if let Storage::S3(s3) = &config.storage {
        all.push(standin());
        all.push(storage(s3));
    }
    all.push(gateway(config));
    if config.mux.is_some() {
        all.push(mux(config));
    }
    all
}

fn sshd(port: u16) -> Service {
    Service {
        name: "sshd",
        what: "SSH for operators",
        argv: words(&["/usr/sbin/sshd", "-D", "-e", "-f", paths::SSHD_CONFIG]),
        ties: Ties::None,
        user: "root".into(),
        environment: Environment::Plain,
        directory: "/",
        needs: &[StepName::Ssh],
        prepare: Some(Prepare::FreePort(port)),
        repair: None,
        // Operators wait for this one: it comes back fast, and never gives up.
        backoff: Backoff::seconds(1, 30, 60),
        // Last: whoever watches a shutdown watches it through this.
        stop_order: 9,
        grace: Duration::from_secs(2),
        leftovers: Leftovers::Leave,
        liveness: None,
        startup: None,
        readiness: None,
        oom_score_adj: 0,
        limits: None,
        says_started: Some("SSH daemon started."),
        says_ready: None,
        required: true,
    }
}

fn dockerd() -> Service {
    Service {
        name: "dockerd",
        what: "containers for the agent",
        argv: words(&["/usr/sbin/dockerd", "--config-file", paths::DOCKERD_CONFIG]),
        ties: Ties::None,
        user: "root".into(),
        environment: Environment::Dockerd,
        directory: "/",
        // After sshd, because everything is. Of a volume that is somebody else's it starts no containers.
        needs: &[StepName::Volume],
        prepare: Some(Prepare::Dockerd),
        repair: None,
        backoff: Backoff::seconds(5, 300, 600),
        stop_order: 5,
        // As long as dockerd gives its containers. It would take 5 s more for itself, which it does not need:
        // its stale files are removed before each start.
        grace: Duration::from_secs(10),
        leftovers: Leftovers::Kill,
        liveness: None,
        startup: None,
        readiness: Some(Probe::UnixHttp { socket: paths::DOCKER_SOCKET.into(), path: "/_ping".into() }),
        oom_score_adj: 100,
        limits: None,
        says_started: None,
        says_ready: Some("Docker daemon ready."),
        required: false,
    }
}

fn standin() -> Service {
    Service {
        name: "standin",
        what: "answers for the bucket mount if its server dies",
        argv: words(&["cvm-standin"]),
        ties: Ties::None,
        user: "root".into(),
        environment: Environment::Plain,
        directory: "/",
        needs: &[],
        prepare: None,
        repair: None,
        backoff: Backoff::seconds(1, 30, 60),
        // Outlives the server that it stands in for.
        stop_order: 8,
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
    }
}

fn storage(s3: &S3) -> Service {
    Service {
        name: STORAGE_WORKER,
        what: "the encrypted bucket",
        argv: words(&["cvm-storage"]),
        ties: Ties::Storage,
        user: "root".into(),
        // Nothing of the user's: a variable such as AWS_CA_BUNDLE would change what rclone does.
        environment: Environment::Storage,
        directory: "/",
        // To a bucket of a stranger's it would push what is on the volume.
        needs: &[StepName::Volume],
        prepare: None,
        repair: None,
        backoff: Backoff::seconds(1, 30, 60),
        // After all that write into the tree.
        stop_order: 7,
        // It ends its own push in time.
        grace: Duration::from_secs(u64::from(s3.drain_s.get())) + DRAIN_MARGIN,
        leftovers: Leftovers::Kill,
        liveness: None,
        startup: None,
        readiness: None,
        oom_score_adj: 0,
        limits: None,
        says_started: None,
        says_ready: None,
        required: true,
    }
}

fn gateway(config: &Config) -> Service {
    let settings = &config.gateway;
    let (port, restart) = (settings.port.get(), settings.restart);
    let seconds = |s: Seconds| Duration::from_secs(u64::from(s.get()));
    let http = |path: &str| Probe::Http { port, path: path.into() };
    let openclaw = [paths::NODE, paths::OPENCLAW];
    // Without --force: the port is free, see `prepare`, and in a container whose IPv6 is turned off
    // that would take it for busy.
    let run = ["gateway", "run", "--bind", "lan", "--port", &port.to_string()];
    let repair = ["doctor", "--fix", "--yes", "--non-interactive"];
    Service {
        name: "gateway",
        what: "the OpenClaw gateway",
        argv: words(&[&openclaw[..], &run[..]].concat()),
        ties: Ties::None,
        user: settings.user.as_str().into(),
        environment: Environment::Gateway,
        directory: paths::STATE,
        needs: &[StepName::State],
        prepare: Some(Prepare::FreePort(port)),
        repair: Some(words(&[&openclaw[..], &repair[..]].concat())),
        backoff: Backoff::seconds(
            u64::from(restart.delay_s),
            u64::from(restart.max_delay_s),
            u64::from(restart.reset_after_s),
        ),
        stop_order: 1,
        grace: seconds(settings.stop_timeout_s),
        leftovers: Leftovers::Kill,
        liveness: Some((
            Liveness {
                start: seconds(settings.start_timeout_s),
                start_at_most: GATEWAY_START.max(seconds(settings.start_timeout_s)),
                silence: seconds(settings.liveness_timeout_s),
            },
            http("/healthz"),
        )),
        startup: Some(http("/startupz")),
        readiness: Some(http("/readyz")),
        // The largest process by far, and the one that comes back without loss.
        oom_score_adj: 300,
        limits: Some(AGENT_LIMITS),
        says_started: None,
        says_ready: None,
        required: true,
    }
}

fn mux(config: &Config) -> Service {
    let (settings, restart) = (&config.gateway, config.gateway.restart);
    let health = Probe::Http { port: MUX_INBOUND_PORT, path: "/healthz".into() };
    Service {
        name: MUX_CLIENT,
        what: "the mux client",
        argv: words(&["cvm-mux"]),
        ties: Ties::Mux,
        // For as long as it takes to open its directory: see `mux::MUX_UID`.
        user: "root".into(),
        environment: Environment::Plain,
        directory: "/",
        needs: &[StepName::State],
        prepare: Some(Prepare::FreePort(MUX_INBOUND_PORT)),
        repair: None,
        backoff: Backoff::seconds(
            u64::from(restart.delay_s),
            u64::from(restart.max_delay_s),
            u64::from(restart.reset_after_s),
        ),
        // With the gateway: what that still answers on its way down is still sent.
        stop_order: 1,
        grace: Duration::from_secs(u64::from(settings.stop_timeout_s.get())),
        leftovers: Leftovers::Kill,
        liveness: Some((
            Liveness { start: MUX_START, start_at_most: MUX_START, silence: MUX_SILENCE },
            health.clone(),
        )),
        startup: None,
        readiness: Some(health),
        // Small, and what it was doing is done again.
        oom_score_adj: 100,
        limits: None,
        says_started: None,
        says_ready: None,
        required: true,
    }
}

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|w| (*w).to_owned()).collect()
}
