use crate::config::{Config, Seconds};
use crate::entry::Entry;
use crate::gates;
use cvm_machine::description::{Environment, Prepare, Service};
use cvm_machine::service::Liveness;
use cvm_protocol::keeper::{AGENT_LIMITS, Probe};
use cvm_protocol::paths;
use std::time::Duration;

/// Starts of 17 minutes were seen, with hundreds of agents or a migration. One that still gives no answer
/// after this long is in a loop.
const START_AT_MOST: Duration = Duration::from_hours(1);

const SWITCHES: &[(&str, &str)] = &[
    // Restarts stay in the process that is supervised.
    ("OPENCLAW_NO_RESPAWN", "1"),
    // Its doctor leaves service files alone.
    ("OPENCLAW_SERVICE_REPAIR_POLICY", "external"),
    // Neither updates itself nor manages services: both are the image's business.
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
    // Without --force: the port is free, see `prepare`, and in a container whose IPv6 is turned off
    // that would take it for busy.
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
        // The largest process by far, and the one that comes back without loss.
        oom_score_adj: 300,
        limits: Some(AGENT_LIMITS),
        required: true,
        ..Service::new(NAME, "the OpenClaw gateway", &run)
    })
}
