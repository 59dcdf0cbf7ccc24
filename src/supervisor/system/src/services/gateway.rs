use crate::config::{Config, Seconds};
use crate::entry::Entry;
use crate::gates;
use cvm_machine::description::{Environment, Prepare, Service};
use cvm_machine::service::Liveness;
use cvm_protocol::keeper::{AGENT_LIMITS, Probe};
use cvm_protocol::paths;
use std::time::Duration;

/// Starts of 17 minutes were seen, with hundreds of agents or a migration. A gateway that does not answer after this
/// time is in a loop.
const START_AT_MOST: Duration = Duration::from_hours(1);

const SWITCHES: &[(&str, &str)] = &[
    // The gateway restarts itself inside of the supervised process.
    ("OPENCLAW_NO_RESPAWN", "1"),
    // The gateway's doctor leaves service files alone.
    ("OPENCLAW_SERVICE_REPAIR_POLICY", "external"),
    // The gateway neither updates itself nor manages services: the image does both.
    ("OPENCLAW_SUPERVISOR_MODE", "external"),
    ("OPENCLAW_DISABLE_BONJOUR", "1"),
    ("OPENCLAW_STATE_DIR", paths::STATE),
    ("OPENCLAW_CONFIG_PATH", "/data/openclaw/openclaw.json"),
];

pub(crate) const NAME: &str = "gateway";

pub(crate) fn entry(config: &Config, has_preload: bool) -> Entry {
    let settings = &config.gateway;
    let port = settings.port.get();
    let seconds = |s: Seconds| Duration::from_secs(u64::from(s.get()));
    let http = |path: &str| Probe::Http { port, path: path.into() };
    // Without --force: `prepare` has freed the port already, and --force would believe it busy in a container whose
    // IPv6 is turned off.
    let port_word = port.to_string();
    let mut run = vec![paths::NODE];
    if has_preload {
        run.extend(["--require", paths::PRELOAD]);
    }
    run.extend([paths::OPENCLAW, "gateway", "run", "--bind", "lan", "--port", &port_word]);
    let repair = [paths::NODE, paths::OPENCLAW, "doctor", "--fix", "--yes", "--non-interactive"];
    Entry::without_channel(Service {
        user: settings.user.as_str().into(),
        environment: Environment { variables: SWITCHES, of_the_gateway: true, ..Environment::default() },
        directory: paths::STATE,
        needs: &[gates::STATE],
        prepare: Some(Prepare::FreePort(port)),
        repair: Some(repair.map(str::to_owned).into()),
        backoff: settings.restart.backoff(),
        grace: seconds(settings.stop_timeout_s),
        liveness: Some((
            Liveness {
                start: seconds(settings.start_timeout_s),
                start_at_most: START_AT_MOST.max(seconds(settings.start_timeout_s)),
                silence: seconds(settings.liveness_timeout_s),
            },
            http("/healthz"),
        )),
        startup: Some(http("/startupz")),
        readiness: Some(http("/readyz")),
        // The largest process by far, and its restart loses nothing.
        oom_score_adj: 300,
        limits: Some(AGENT_LIMITS),
        required: true,
        ..Service::new(NAME, "the OpenClaw gateway", &run)
    })
}
