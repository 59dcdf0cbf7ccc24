//! `cvm-mux`: the mux client. It stands between the mux-server, which holds the bots, and the stock
//! gateway, which knows nothing of it, and loses no message between the two.
//!
//! ```text
//! cvm-mux          the client: PID 1 starts it, with a specification on standard input and reports on
//!                  descriptor 3
//! cvm-mux pair     one question to the mux-server's operator interface, for `cvm pair`
//! ```
//!
//! ```text
//! mux-server ──> inbound ──> queue ──> dispatch ──> gateway
//!     ^             │ token             │  └─> attachments
//!     │             └ replication       └──> split ──> outbound ──> mux-server
//!     └── register, keys                 desk: what is said of it all
//! ```
//!
//! It may be killed at any moment. What it has acknowledged is in the queue, on the volume, and with
//! a bucket in that too. When a part of it ends that others depend on, it ends with a reason, and the
//! supervisor starts it again.
//!
//! Begins as root, to open its directory, and goes on as nobody else is: the agent, which runs as
//! the gateway's user, must reach neither this memory nor the queue.
//!
//! Refuses: arguments and an environment with secrets, and to put a word of a message into a report.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![deny(clippy::unreachable, clippy::todo, clippy::unimplemented)]
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing))]

mod attachments;
mod backoff;
mod desk;
mod dispatch;
mod event;
mod gateway;
mod http;
mod inbound;
mod keychain;
mod mention;
mod outbound;
mod pair;
mod queue;
mod register;
mod replication;
mod sessions;
mod split;
mod token;

use cvm_protocol::mux::{MuxSpec, MuxStatus};
use cvm_protocol::report::Level;
use cvm_secrets::base64_bytes::PackedBytes;
use cvm_sys::{descriptor, memfd};
use desk::Desk;
use nix::unistd::{Gid, Uid};
use register::{Registration, Server};
use serde::de::DeserializeOwned;
use std::collections::HashMap;
use std::fmt::Write as _;
use std::fs::{DirBuilder, File};
use std::io::{Seek as _, SeekFrom};
use std::net::{Ipv6Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use zeroize::Zeroizing;

const SPEC_MAX: usize = 64 * 1024;
const USAGE: u8 = 64;
const QUEUE: &str = "queue.sqlite";
/// A path of the manifest is relative to this.
const DATA: &str = cvm_protocol::paths::DATA;
const BACKLOG: u32 = 512;
/// Kept of the time for a stop, for the queue itself.
const STOP_MARGIN: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    cvm_sys::private::keep_private();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .init();
    // The text of a panic may quote anything, so only its place is said.
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!("a bug, at {place}");
    }));
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    match arguments.as_slice() {
        [] => serve(),
        [verb] if verb == "pair" => ask_for_pairing(),
        _ => {
            eprintln!("cvm-mux is started by cvm-init and by `cvm pair`");
            ExitCode::from(USAGE)
        }
    }
}

/// Standard input, from its beginning: a run before us may have read the same file.
fn spec<T: DeserializeOwned>() -> Result<T, String> {
    let broken = "the specification for cvm-mux is not understood: all binaries must come from one image";
    let mut input = File::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?);
    let _ = input.seek(SeekFrom::Start(0));
    let bytes = memfd::read_all(input.into(), SPEC_MAX).map_err(|e| e.to_string())?;
    let nothing = File::open("/dev/null").map_err(|e| e.to_string())?;
    nix::unistd::dup2_stdin(nothing).map_err(|e| e.to_string())?;
    // The text of the error may quote the input: not said.
    serde_json::from_slice(bytes.trim_ascii_end()).map_err(|_| broken.to_owned())
}

fn runtime() -> Result<tokio::runtime::Runtime, String> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        // Names are looked up there, and nothing else.
        .max_blocking_threads(2)
        .thread_stack_size(256 * 1024)
        .build()
        .map_err(|e| format!("no runtime: {e}"))
}

fn ask_for_pairing() -> ExitCode {
    let outcome = spec().and_then(|spec| runtime()?.block_on(pair::pair(spec)));
    match outcome {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> ExitCode {
    let Ok(reports) = descriptor::inherited(3) else {
        eprintln!("cvm-mux is started by cvm-init: reports on descriptor 3");
        return ExitCode::from(USAGE);
    };
    let outcome = spec::<MuxSpec>().and_then(|spec| {
        prepare(&spec)?;
        runtime()?.block_on(run(spec, File::from(reports)))
    });
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            tracing::error!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// As root: the directory, which is ours alone; then as nobody.
fn prepare(spec: &MuxSpec) -> Result<(), String> {
    let dir = Path::new(&spec.directory);
    let fail = |what: &str, e: std::io::Error| format!("{what} {}: {e}", dir.display());
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(fail("making", e)),
        _ => {}
    }
    let about = std::fs::symlink_metadata(dir).map_err(|e| fail("looking at", e))?;
    if !about.is_dir() {
        return Err(format!("{} is not a directory; move it away", dir.display()));
    }
    if !Uid::effective().is_root() {
        return Ok(());
    }
    if about.uid() != spec.uid {
        own(dir, spec.uid).map_err(|e| fail("taking over", e))?;
    }
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(|e| fail("closing", e))?;
    let (uid, gid) = (Uid::from_raw(spec.uid), Gid::from_raw(spec.uid));
    nix::unistd::setgroups(&[])
        .and_then(|()| nix::unistd::setresgid(gid, gid, gid))
        .and_then(|()| nix::unistd::setresuid(uid, uid, uid))
        .map_err(|e| format!("giving up root's rights: {}", e.desc()))?;
    // Changing the user has made this process undumpable anyway; to be sure of it.
    let _ = nix::sys::prctl::set_dumpable(false);
    Ok(())
}

/// The directory and what lies in it, after a restore by another user's hand.
fn own(dir: &Path, uid: u32) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        std::os::unix::fs::lchown(entry?.path(), Some(uid), Some(uid))?;
    }
    std::os::unix::fs::lchown(dir, Some(uid), Some(uid))
}

fn text(packed: &PackedBytes, what: &str) -> Result<Zeroizing<String>, String> {
    let bytes = packed.unpack().ok_or_else(|| format!("{what} did not arrive whole: this is a bug"))?;
    let text = std::str::from_utf8(&bytes).map_err(|_| format!("{what} is not text"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// All addresses, of both families where there are both.
fn listen(port: u16) -> Result<TcpListener, String> {
    let fail = |e: std::io::Error| format!("listening on port {port}: {e}");
    let both = || -> std::io::Result<TcpListener> {
        let socket = TcpSocket::new_v6()?;
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)))?;
        socket.listen(BACKLOG)
    };
    let one = || -> std::io::Result<TcpListener> {
        let socket = TcpSocket::new_v4()?;
        socket.set_reuseaddr(true)?;
        socket.bind(SocketAddr::from(([0, 0, 0, 0], port)))?;
        socket.listen(BACKLOG)
    };
    both().or_else(|_| one()).map_err(fail)
}

async fn run(spec: MuxSpec, reports: File) -> Result<(), String> {
    let board = MuxStatus {
        base_url: spec.base_url.clone(),
        inbound_url: spec.inbound_url.clone(),
        device_id: spec.device_id.clone(),
        ..MuxStatus::default()
    };
    let desk = Arc::new(Desk::new(board, Some(reports)));
    let path = Path::new(&spec.directory).join(QUEUE);
    let (queue, threads) = queue::Queue::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
    let http = Arc::new(http::Http::new(spec.base_url.starts_with("https:"), true)?);
    let server = Server {
        base_url: spec.base_url.clone(),
        register_key: text(&spec.register_key, "the register key")?,
        inbound_url: spec.inbound_url.clone(),
        device_id: spec.device_id.clone(),
    };
    let gateway =
        gateway::Gateway::new(spec.gateway_port, text(&spec.gateway_token, "the gateway's token")?)?;
    let registration = Arc::new(Registration::new(server, Arc::clone(&http), Arc::clone(&desk)));
    let (stop, stopping) = watch::channel(false);
    let dispatch = Arc::new(dispatch::Dispatch::new(
        queue.clone(),
        Arc::clone(&desk),
        gateway,
        http,
        Arc::clone(&registration),
        stopping.clone(),
    ));
    let patience = Duration::from_secs(u64::from(spec.ack_wait_s));
    let replication = spec.replication.clone().filter(|_| !patience.is_zero()).map(|socket| {
        let path = path.strip_prefix(DATA).unwrap_or(&path).to_string_lossy().into_owned();
        Arc::new(replication::Replication::new(socket, path, patience, Arc::clone(&desk)))
    });
    let mut terminate = signal(SignalKind::terminate()).map_err(|e| e.to_string())?;
    let listener = listen(spec.port)?;
    let left = dispatch.resume().await.map_err(|e| e.to_string())?;
    if left > 0 {
        desk.note(Level::Info, format!("{left} events of an earlier run go on"));
    }
    let mut parts = Parts::default();
    let (a, b, c, d) =
        (Arc::clone(&desk), Arc::clone(&registration), Arc::clone(&registration), Arc::clone(&dispatch));
    parts.spawn("the reports", async move { a.speak().await });
    parts.spawn("the registration", async move { b.keep().await });
    parts.spawn("the look at the mux-server's keys", async move { c.keep_keys().await });
    parts.spawn("the care of the queue", async move { d.look_after().await });
    parts.spawn("the queue", async move { threads.ended().await });
    if let Some(replication) = replication.clone() {
        parts.spawn("the question what is in the bucket", async move { replication.keep().await });
    }
    let door = Arc::new(inbound::Door::new(
        registration,
        queue.clone(),
        Arc::clone(&dispatch),
        replication,
        Arc::clone(&desk),
    ));
    let mut serving = Parts::default();
    serving.spawn("the door", inbound::serve(Arc::clone(&door), listener, stopping));
    let ended = tokio::select! {
        _ = terminate.recv() => None,
        part = parts.ended() => Some(part),
        part = serving.ended() => Some(part),
    };
    if let Some(part) = ended {
        let why = format!("{part} of the mux client has ended: this is a bug; it starts again");
        desk.note(Level::Error, &why);
        return Err(why);
    }
    // Nothing new comes in; what the gateway is about to answer is still answered, while there is time.
    let _ = stop.send(true);
    let time = Duration::from_secs(u64::from(spec.drain_s)).saturating_sub(STOP_MARGIN);
    let _ = tokio::time::timeout(time, async { tokio::join!(serving.ended(), dispatch.rest()) }).await;
    parts.all.shutdown().await;
    // What still runs holds the queue, and is not waited for: it may be ended at any moment.
    Ok(())
}

/// What runs for as long as this program does.
#[derive(Default)]
struct Parts {
    all: JoinSet<()>,
    names: HashMap<tokio::task::Id, &'static str>,
}

impl Parts {
    fn spawn(&mut self, name: &'static str, part: impl Future<Output = ()> + Send + 'static) {
        let id = self.all.spawn(part).id();
        self.names.insert(id, name);
    }

    /// Waits for the end of one of them, by itself or by a panic, and yields its name.
    async fn ended(&mut self) -> &'static str {
        let id = match self.all.join_next_with_id().await {
            Some(Ok((id, ()))) => Some(id),
            Some(Err(error)) => Some(error.id()),
            None => None,
        };
        id.and_then(|id| self.names.get(&id)).copied().unwrap_or("a part")
    }
}

fn hex<'a>(bytes: impl Iterator<Item = &'a u8>) -> String {
    bytes.fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // a String takes all
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_ends_or_panics_is_named() {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            let mut parts = Parts::default();
            parts.spawn("one that stays", std::future::pending());
            parts.spawn("one that ends", std::future::ready(()));
            assert_eq!(parts.ended().await, "one that ends");
            parts.spawn("one that panics", async { panic!("a bug") });
            assert_eq!(parts.ended().await, "one that panics");
        });
    }
}
