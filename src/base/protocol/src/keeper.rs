//! The messages between PID 1 and a keeper.
//!
//! * PID 1 to a keeper: [`KeeperSpec`], in a sealed memfd on standard input.
//! * A keeper to PID 1: [`KeeperReport`] lines, on a pipe that only this keeper writes to.

use crate::exit_status::End;
use cvm_secrets::base64_bytes::{PackedBytes, PackedEnvironment};
use serde::{Deserialize, Serialize};

/// The program that a keeper runs, and how.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeeperSpec {
    /// The name in logs and in the keeper's own command line.
    pub name: String,
    /// Identifies one run: its processes have it in their environment, as `CVM_RUN`.
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

/// The connection between the main process and PID 1, besides signals, output and probes.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Channel {
    /// Nothing: standard input is empty, and SIGTERM asks the program to end.
    None,
    /// A task: its work is on standard input, its report pipe is descriptor 3, and SIGTERM asks it to end.
    Task(PackedBytes),
    /// A service of ours. Its sealed specification is on standard input, at the position where the previous run left
    /// it. Its report pipe is descriptor 3. End of file on descriptor 4, where no byte ever comes, asks it to end. A
    /// signal cannot do that, because Go handles SIGTERM itself once it has mounted something.
    Service,
}

/// The keeper's own descriptors above standard error.
pub mod descriptors {
    /// The pipe for the keeper's own reports.
    pub const REPORTS: i32 = 3;
    /// The report pipe of the keeper's program.
    pub const OF_THE_PROGRAM: i32 = 4;
    /// The specification of a service of ours.
    pub const SPECIFICATION: i32 = 5;
}

/// Limits of a service: no core files, and so many processes of its user.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Threads count as processes.
    pub processes: u64,
}

/// The limits of the gateway and the agent. The gateway has some dozens of threads, a browser some hundreds; a fork
/// bomb takes all that it can get. Memory has no limit, because it would count reserved memory, and an idle Node
/// reserves 13 times what it uses. When memory runs out the kernel ends the gateway first, by `oom_score_adj`.
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

/// Where the output of a service goes.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// The log file. At `rotate_bytes` it becomes the one old file, and a new one begins.
    pub file: String,
    pub rotate_bytes: u64,
    /// Whether lines go to the container's standard output too.
    pub copy_to_stdout: bool,
    /// Whether those lines are JSON objects.
    pub json: bool,
}

/// A question that a service answers at almost no cost, so that its state need not be read out of its log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Probe {
    /// A GET on loopback is answered by 2xx.
    Http { port: u16, path: String },
    /// A GET on a Unix socket is answered by 2xx.
    UnixHttp { socket: String, path: String },
    /// A program listens on loopback.
    Listens { port: u16 },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProbeSpec {
    pub probe: Probe,
    /// The pause between questions while the answer is no.
    pub eager_ms: u64,
    /// The pause between questions while the answer is yes.
    pub calm_ms: u64,
    pub timeout_ms: u64,
}

/// What a keeper tells PID 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum KeeperReport {
    /// The program has been executed.
    Started {
        pid: i32,
    },
    /// The main process ended, or never started.
    MainEnded {
        end: End,
    },
    /// The whole process tree has ended. The last report of a keeper.
    TreeGone {
        end: End,
        killed: u32,
    },
    /// Whether the liveness probe got a good answer.
    Liveness {
        ok: bool,
    },
    /// The service is starting, and uses the processor or a disk.
    Works,
    /// The startup probe got its first good answer.
    StartOver,
    Readiness {
        ok: bool,
    },
    /// The parts that the service names as the reason why it is not ready. Sent when they change.
    Failing {
        parts: Vec<String>,
    },
    /// Lines of output that were dropped. Sent once for each burst.
    Dropped {
        lines: u64,
    },
}
