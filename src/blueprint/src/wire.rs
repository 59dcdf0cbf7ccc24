//! The words between processes, all of them: one JSON object a line, with a size limit.
//!
//! * PID 1 to a keeper: [`KeeperSpec`], in a sealed memfd on standard input.
//! * a keeper to PID 1: [`KeeperReport`] lines on an inherited pipe.
//! * PID 1 to `cvm-step`: [`Task`], in a sealed memfd on standard input.
//! * `cvm-step` to PID 1: [`TaskReport`], on the same pipe as its keeper.
//! * operator to PID 1: [`Request`] on the control socket, answered by [`Response`].
//!
//! The first four stay inside one build, since one image carries all the binaries; the last
//! is versioned.
//!
//! Refuses lines over their limit and anything it does not know, with words for the sender.
//! May import: `ending`, `packed`, `service`, `status`, `supervise`, `volume`.

use crate::ending::End;
pub use crate::packed::{PackedBytes, PackedEnvironment};
use crate::service::{Leftovers, Limits, Probe};
use crate::status::Status;
use crate::supervise::Level;
use crate::volume::Claim;
use serde::{Deserialize, Serialize};
use std::fmt;
use zeroize::Zeroizing;

/// Version of the control protocol. It grows when an old `cvm` could misread an answer.
pub const VERSION: u32 = 1;
/// A request is a verb and a name.
pub const REQUEST_MAX: usize = 4 * 1024;
/// A report of a keeper or a step; a step may carry notes for the boot log.
pub const REPORT_MAX: usize = 64 * 1024;

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
    pub input: Input,
    /// Whether the main process gets the report pipe as file descriptor 3.
    pub passes_report: bool,
    pub stop: Stop,
    pub log: Log,
    pub liveness: Option<ProbeSpec>,
    pub startup: Option<ProbeSpec>,
    pub readiness: Option<ProbeSpec>,
}

/// What the main process reads on standard input.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Input {
    Nothing,
    Bytes(PackedBytes),
    /// What the keeper was given as file descriptor 4. All runs share its position.
    Descriptor,
}

/// How the main process is asked to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stop {
    /// SIGTERM.
    Signal,
    /// End of file on its file descriptor 4, which never says anything else: for a program whose
    /// runtime takes signals for itself. The report pipe is its descriptor 3.
    Lifeline,
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

/// One step's work, with all it needs to know.
#[derive(Serialize, Deserialize)]
#[serde(tag = "task", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Task {
    Ssh {
        port: u16,
        /// None: keep a random one on the volume.
        seed: Option<PackedBytes>,
        /// Whether a key that is added at `/root/.ssh` later counts at once.
        trust_host_keys: bool,
    },
    /// See whose volume it is, and let the owners of the keys in.
    Volume {
        claim: Claim,
        /// Of the environment.
        extra_keys: String,
        /// Whether the keys mounted at `/root/.ssh` count too.
        trust_host_keys: bool,
    },
    Home {
        user: String,
        docker: DockerUse,
    },
    State(StateTask),
    DockerPrepare,
    FreePort {
        port: u16,
        /// Whose it is.
        service: String,
    },
    /// End what a killed keeper left behind.
    Sweep {
        run: String,
        /// End only whoever listens on this port; the rest of the run is somebody's work.
        listens_on: Option<u16>,
    },
}

/// What the gateway's user has to do with docker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DockerUse {
    /// It may use it: it is in the group.
    Allowed,
    None,
    /// As `None`, but because the default has changed: who has containers is told.
    NoneByDefault,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateTask {
    pub user: String,
    pub port: u16,
    pub redpill: bool,
    /// The user's own openclaw.json.
    pub config: Option<PackedBytes>,
    /// Path to text, as JSON.
    pub workspace: Option<PackedBytes>,
    pub device_seed: Option<PackedBytes>,
    /// None: keep a random one on the volume and report it.
    pub token: Option<PackedBytes>,
}

/// What a step tells PID 1. No line, or a broken one, is a failure.
#[derive(Serialize, Deserialize)]
#[serde(tag = "report", rename_all = "kebab-case")]
pub enum TaskReport {
    Done {
        notes: Vec<Note>,
        facts: Facts,
    },
    Failed {
        notes: Vec<Note>,
        why: String,
        /// Whether trying again can help.
        retry: bool,
    },
}

/// A line for the boot log. Safe to be public.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    pub level: Level,
    pub text: String,
}

/// What a step found out that others need.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Facts {
    /// The random gateway token, when there is no `MASTER_KEY`.
    pub token: Option<PackedBytes>,
    /// Fingerprint of the SSH host key.
    pub host_key: Option<String>,
    /// A standing remark for `status`, by topic.
    pub remarks: Vec<Remark>,
}

/// Something an operator should know as long as it is true.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Remark {
    pub topic: String,
    pub text: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    pub v: u32,
    #[serde(flatten)]
    pub verb: Verb,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Verb {
    Status,
    Start {
        service: String,
    },
    Stop {
        service: String,
    },
    Restart {
        service: String,
    },
    /// What `openclaw` needs to talk to the gateway as the gateway's own user.
    GatewayAccess,
}

#[derive(Serialize, Deserialize)]
pub struct Response {
    pub v: u32,
    #[serde(flatten)]
    pub body: Body,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Body {
    Status(Box<Status>),
    /// The order was taken; `status` shows what comes of it.
    Taken,
    GatewayAccess {
        user: String,
        environment: PackedEnvironment,
    },
    Refused {
        why: String,
    },
}

/// Why a request was not understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadRequest {
    TooLong,
    NotUnderstood,
    Version(u32),
}

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::TooLong => write!(f, "a request has at most {REQUEST_MAX} bytes and ends with a newline"),
            Self::NotUnderstood => f.write_str("this is not a request; `cvm --help` lists what can be asked"),
            Self::Version(theirs) => write!(
                f,
                "this supervisor speaks version {VERSION} of the control protocol, not {theirs}; use the `cvm` of the same image"
            ),
        }
    }
}

impl Request {
    /// Reads one line, without its newline.
    pub fn parse(line: &[u8]) -> Result<Self, BadRequest> {
        #[derive(Deserialize)]
        struct Head {
            v: u32,
        }
        if line.len() > REQUEST_MAX {
            return Err(BadRequest::TooLong);
        }
        // The version first: a newer request is told so, whatever else it says.
        let head: Head = serde_json::from_slice(line).map_err(|_| BadRequest::NotUnderstood)?;
        if head.v != VERSION {
            return Err(BadRequest::Version(head.v));
        }
        serde_json::from_slice(line).map_err(|_| BadRequest::NotUnderstood)
    }
}

/// One message as a line. Wiped by the caller when it carries secrets: written into a buffer
/// of its size, because one that grows would leave pieces of them behind.
pub fn line<T: Serialize>(message: &T) -> Zeroizing<Vec<u8>> {
    // Nothing here has a map with keys that are not strings, the only thing serde_json refuses.
    let mut size = Size(0);
    let _ = serde_json::to_writer(&mut size, message);
    let mut bytes = Zeroizing::new(Vec::with_capacity(size.0 + 1));
    let _ = serde_json::to_writer(&mut *bytes, message);
    bytes.push(b'\n');
    bytes
}

/// Counts what is written.
struct Size(usize);

impl std::io::Write for Size {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_newer_request_is_told_the_version_and_not_that_it_is_garbage() {
        let line = br#"{"v":2,"verb":"levitate","how":"high"}"#;
        assert_eq!(Request::parse(line), Err(BadRequest::Version(2)));
    }

    #[test]
    fn a_request_reads_back_as_it_was_written() {
        let request = Request { v: VERSION, verb: Verb::Restart { service: "gateway".into() } };
        let bytes = line(&request);
        assert_eq!(Request::parse(bytes.trim_ascii_end()), Ok(request));
    }

    #[test]
    fn a_line_is_written_into_a_buffer_that_never_grew() {
        let packed = PackedBytes::pack(&[7; 5_000]);
        let bytes = line(&packed);
        assert_eq!(bytes.len(), bytes.capacity());
        assert_eq!(bytes.trim_ascii_end(), serde_json::to_vec(&packed).unwrap());
    }

    #[test]
    fn a_request_over_the_limit_is_refused_before_it_is_read() {
        assert_eq!(Request::parse(&vec![b' '; REQUEST_MAX + 1]), Err(BadRequest::TooLong));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_request_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Request::parse(&bytes);
        }
    }
}
