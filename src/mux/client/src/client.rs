//! The mux client put together: what runs, and how it stops.

use crate::address::ServerAddress;
use crate::delivery_auth::DeliveryAuth;
use crate::dispatch::Dispatcher;
use crate::gateway::Gateway;
use crate::http_client::HttpClient;
use crate::inbound::InboundServer;
use crate::outbound::Outbound;
use crate::queue::Queue;
use crate::registration::{Identity, Registration};
use crate::replication::Replication;
use crate::status::{MuxStatus, StatusReporter};
use crate::tasks::Tasks;
use crate::upkeep;
use crate::work_context::WorkContext;
use cvm_channel::Channel;
use cvm_protocol::mux::MuxSpec;
use cvm_protocol::paths;
use cvm_protocol::report::Level;
use cvm_secrets::base64_bytes::PackedBytes;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::watch;
use zeroize::Zeroizing;

const QUEUE_FILE: &str = "queue.sqlite";
const BACKLOG: u32 = 512;
/// Of the time for a stop, what the queue itself needs.
const STOP_MARGIN: Duration = Duration::from_secs(5);

/// Runs until PID 1 asks it to end. An error is the task that has ended before, or what cannot be set up.
pub(crate) async fn run(spec: MuxSpec, channel: Channel) -> Result<(), String> {
    let Channel { reports, lifeline } = channel;
    let (stop, mut stopping) = watch::channel(false);
    std::thread::spawn(move || {
        lifeline.wait();
        let _ = stop.send(true);
    });
    let drain = Duration::from_secs(u64::from(spec.drain_s)).saturating_sub(STOP_MARGIN);
    let status = Arc::new(StatusReporter::new(MuxStatus::default(), reports));
    let (mut tasks, mut server, dispatcher) = start(spec, Arc::clone(&status), stopping.clone()).await?;
    let ended = tokio::select! {
        // The server ends on a stop, so a stop is looked for first.
        biased;
        _ = stopping.changed() => None,
        task = tasks.ended() => Some(task),
        task = server.ended() => Some(task),
    };
    if let Some(task) = ended {
        let why = format!("{task} of the mux client has ended: this is a bug; it starts again");
        status.note(Level::Error, &why);
        return Err(why);
    }
    // No new event comes in. What the gateway is about to answer is still answered, while there is time.
    let finished = async { tokio::join!(server.ended(), dispatcher.sessions().finished()) };
    let _ = tokio::time::timeout(drain, finished).await;
    tasks.shutdown().await;
    // Work that still runs holds the queue and is not waited for: it may be ended at any moment.
    Ok(())
}

/// Starts all tasks: those of the client, and the inbound server, which ends by itself on a stop.
async fn start(
    spec: MuxSpec,
    status: Arc<StatusReporter>,
    stopping: watch::Receiver<bool>,
) -> Result<(Tasks, Tasks, Arc<Dispatcher>), String> {
    status.update(|status| {
        status.base_url.clone_from(&spec.base_url);
        status.inbound_url.clone_from(&spec.inbound_url);
        status.device_id.clone_from(&spec.device_id);
    });
    let path = Path::new(&spec.directory).join(QUEUE_FILE);
    let (queue, threads) = Queue::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let server = ServerAddress::parse(&spec.base_url)?;
    let http = Arc::new(HttpClient::new(server.is_https(), true)?);
    let identity = Identity { server, inbound_url: spec.inbound_url, device_id: spec.device_id };
    let register_key = text(&spec.register_key, "the register key")?;
    let gateway = Gateway::new(spec.gateway_port, text(&spec.gateway_token, "the gateway's token")?)?;
    let auth = Arc::new(DeliveryAuth::new(identity.clone(), Arc::clone(&http), Arc::clone(&status)));
    let registration =
        Arc::new(Registration::new(identity, register_key, Arc::clone(&http), Arc::clone(&status)));
    let context = WorkContext::new(queue.clone(), Arc::clone(&status), stopping.clone());
    let outbound = Outbound { http, registration: Arc::clone(&registration) };
    let dispatcher = Arc::new(Dispatcher::new(context, gateway, outbound));
    let wait_max = Duration::from_secs(u64::from(spec.ack_wait_s));
    let replication = spec.replication.filter(|_| !wait_max.is_zero()).map(|socket| {
        // The storage worker names files relative to /data.
        let path = path.strip_prefix(paths::DATA).unwrap_or(&path).to_string_lossy().into_owned();
        Arc::new(Replication::new(socket, path, wait_max, Arc::clone(&status)))
    });
    let listener = listen(spec.port)?;
    let left = dispatcher.resume().await.map_err(|e| e.to_string())?;
    if left > 0 {
        status.note(Level::Info, format!("{left} events of an earlier run go on"));
    }
    let inbound = Arc::new(InboundServer::new(
        Arc::clone(&auth),
        queue.clone(),
        Arc::clone(&dispatcher),
        replication.clone(),
        Arc::clone(&status),
    ));
    let (mut tasks, mut serving) = (Tasks::default(), Tasks::default());
    serving.spawn("the inbound server", inbound.serve(listener, stopping));
    let sessions = Arc::clone(dispatcher.sessions());
    let reporter = Arc::clone(&status);
    tasks.spawn("the reports", async move { reporter.report_changes().await });
    tasks.spawn("the registration", async move { registration.keep().await });
    tasks.spawn("the look at the mux-server's keys", async move { auth.keep_keys().await });
    tasks.spawn("the upkeep of the queue", async move { upkeep::keep(&queue, &sessions, &status).await });
    tasks.spawn("the queue", async move { threads.ended().await });
    if let Some(replication) = replication {
        tasks.spawn("the question what is in the bucket", async move { replication.keep().await });
    }
    Ok((tasks, serving, dispatcher))
}

fn text(packed: &PackedBytes, what: &str) -> Result<Zeroizing<String>, String> {
    let bytes = packed.unpack().ok_or_else(|| format!("{what} did not arrive whole: this is a bug"))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| format!("{what} is not text"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// On all addresses of both families, or of IPv4 where there is no IPv6.
fn listen(port: u16) -> Result<TcpListener, String> {
    let on = |address: IpAddr| {
        let socket = if address.is_ipv6() { TcpSocket::new_v6() } else { TcpSocket::new_v4() }?;
        socket.set_reuseaddr(true)?;
        socket.bind((address, port).into())?;
        socket.listen(BACKLOG)
    };
    on(Ipv6Addr::UNSPECIFIED.into())
        .or_else(|_: std::io::Error| on(Ipv4Addr::UNSPECIFIED.into()))
        .map_err(|e| format!("listening on port {port}: {e}"))
}
