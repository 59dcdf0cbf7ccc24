//! The messages between PID 1 and a keeper.
//!
//! * PID 1 to a keeper: [`KeeperSpec`], in a sealed memfd on standard input.
//! * a keeper to PID 1: [`KeeperReport`] lines on a pipe that is the keeper's alone.

use crate::exit_status::End;
use cvm_secrets::base64_bytes::{PackedBytes, PackedEnvironment};
use serde::{Deserialize, Serialize};

/// What a keeper has to keep.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeeperSpec {
    /// Name in logs and in the keeper's own command line.
    pub name: String,
    /// Tells the processes of one run from all others; in their environment as `CVM_RUN`.
    pub run: String,
    pub argv: Vec<String>,
    pub environment: PackedEnvironment,
    pub user: String,
    pub directory: String,
    pub leftovers: Leftovers,
    pub oom_score_adj: i16,
    pub limits: Option<Limits>,
    pub channel: Channel,
    pub log: Log,
    pub liveness: Option<ProbeSpec>,
    pub startup: Option<ProbeSpec>,
    pub readiness: Option<ProbeSpec>,
}

/// What the main process and PID 1 have between them, besides signals, output and probes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// Nothing: standard input is empty, and SIGTERM asks the program to end.
    None,
    /// A task: its work is on standard input, its report pipe is descriptor 3, and SIGTERM asks it to end.
    Task(PackedBytes),
    /// A service of ours: its sealed specification is on standard input, at whatever position a run before it left
    /// it; its report pipe is descriptor 3; and end of file on descriptor 4, which never says anything else, asks
    /// it to end. A signal would not do: Go takes SIGTERM for itself once it has mounted something.
    Service,
}

/// The keeper's own descriptors above standard error.
pub mod descriptors {
    /// The keeper's reports.
    pub const REPORTS: i32 = 3;
    /// The report pipe of the program that it keeps.
    pub const OF_THE_PROGRAM: i32 = 4;
    /// The specification of a service of ours.
    pub const SPECIFICATION: i32 = 5;
}

/// No core files, and so many processes of one user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Threads count.
    pub processes: u64,
}

/// The agent's: the gateway has some dozens of threads, a browser some hundreds, and a fork bomb all that it can
/// get. There is no limit on memory: it would count what a process reserves, and an idle Node reserves 13 times
/// what it uses. When memory runs out the kernel ends the gateway first, by `oom_score_adj`.
pub const AGENT_LIMITS: Limits = Limits { processes: 4096 };

/// What happens to processes that the main process leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Leftovers {
    /// They are part of the service and end with it.
    Kill,
    /// They are somebody's work (a login session, a tmux) and stay.
    Leave,
}

/// Where output goes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// A file that rotates at `rotate_bytes` and keeps one old one.
    pub file: String,
    pub rotate_bytes: u64,
    /// Whether lines go to the container's standard output too.
    pub copy_to_stdout: bool,
    /// Whether those lines are JSON objects.
    pub json: bool,
}

/// A question to a service that costs it nothing and needs no words from its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Probe {
    /// 2xx to GET on loopback.
    Http { port: u16, path: String },
    /// 2xx to GET on a unix socket.
    UnixHttp { socket: String, path: String },
    /// Something listens on loopback.
    Listens { port: u16 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeSpec {
    pub probe: Probe,
    /// While the answer is no.
    pub eager_ms: u64,
    /// While the answer is yes.
    pub calm_ms: u64,
    pub timeout_ms: u64,
}

/// What a keeper tells PID 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum KeeperReport {
    /// The program executes.
    Started {
        pid: i32,
    },
    /// The main process ended, or never started.
    MainEnded {
        end: End,
    },
    /// The whole tree is gone; the last words of a keeper.
    TreeGone {
        end: End,
        killed: u32,
    },
    /// An answer to the liveness probe, or none.
    Liveness {
        ok: bool,
    },
    /// During the start: it uses the processor or a disk.
    Works,
    /// The startup probe said yes; said once.
    StartOver,
    Readiness {
        ok: bool,
    },
    /// The parts that it names as the reason why it is not ready; said when they change.
    Failing {
        parts: Vec<String>,
    },
    /// Lines that had to be dropped, said once for each burst.
    Dropped {
        lines: u64,
    },
}
