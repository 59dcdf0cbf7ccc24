use crate::config::{Config, Gateway, Mux};
use crate::entry::Entry;
use crate::gates;
use cvm_machine::description::{Prepare, Service};
use cvm_machine::service::Liveness;
use cvm_protocol::accounts::MUX_UID;
use cvm_protocol::keeper::Probe;
use cvm_protocol::mux::{MUX_CLIENT, MUX_INBOUND_PORT, MuxSpec};
use cvm_protocol::paths;
use cvm_secrets::base64_bytes::PackedBytes;
use cvm_secrets::keys::KeyRing;
use std::time::Duration;

/// The mux client opens one small database. On a slower disk than this, messages are not safe.
const START: Duration = Duration::from_mins(1);
const SILENCE: Duration = Duration::from_mins(1);

pub(crate) fn entry(config: &Config, mux: &Mux, keys: Option<&KeyRing>, has_bucket: bool) -> Entry {
    let gateway = &config.gateway;
    let health = Probe::Http { port: MUX_INBOUND_PORT, path: "/healthz".into() };
    let service = Service {
        has_channel: true,
        // The mux client starts as root to open its directory, and then becomes `MUX_UID`.
        needs: &[gates::STATE],
        prepare: Some(Prepare::FreePort(MUX_INBOUND_PORT)),
        backoff: gateway.restart.backoff(),
        // The mux client stops together with the gateway, and still sends the gateway's last answers.
        grace: Duration::from_secs(u64::from(gateway.stop_timeout_s.get())),
        liveness: Some((Liveness { start: START, start_at_most: START, silence: SILENCE }, health.clone())),
        readiness: Some(health),
        // The process is small, and its interrupted work is repeated.
        oom_score_adj: 100,
        required: true,
        ..Service::new(MUX_CLIENT, "the mux client", &["cvm-mux"])
    };
    Entry::with_specification(
        service,
        keys.map(|keys| specification(mux, gateway, keys, has_bucket)).as_ref(),
    )
}

fn specification(mux: &Mux, gateway: &Gateway, keys: &KeyRing, has_bucket: bool) -> MuxSpec {
    MuxSpec {
        base_url: mux.base_url.as_str().to_owned(),
        register_key: PackedBytes::pack(mux.register_key.expose()),
        inbound_url: mux.inbound_url.as_str().to_owned(),
        device_id: keys.device_seed.device_id(),
        port: MUX_INBOUND_PORT,
        gateway_port: gateway.port.get(),
        gateway_token: PackedBytes::pack(keys.gateway_token.expose().as_bytes()),
        directory: paths::MUX_STATE.to_owned(),
        replication: has_bucket.then(|| paths::REPLICATION_SOCKET.to_owned()),
        ack_wait_s: mux.ack_wait_s.get(),
        drain_s: gateway.stop_timeout_s.get(),
        uid: MUX_UID,
    }
}
