//! The messages between the supervisor, the storage worker and the operator.
//!
//! * PID 1 to `cvm-storage`: [`StorageSpec`], in a sealed memfd on standard input. It is the only message with bucket
//!   credentials and crypt passwords.
//! * `cvm` to `cvm-storage`: one [`Question`] line on the socket at [`paths::STORAGE_SOCKET`],
//!   answered by [`Answer`] lines, the last of which is `done`, `status` or `refused`.
//!
//! Only the specification holds secrets, and they are wiped when it is dropped.
//!
//! [`paths::STORAGE_SOCKET`]: crate::paths::STORAGE_SOCKET

use crate::word_enum::word_enum;
use cvm_secrets::base64_bytes::PackedBytes;
use serde::{Deserialize, Serialize};

/// The name of the service, which is the storage worker.
pub const STORAGE_WORKER: &str = "storage";
/// The gate that the storage worker opens while the tree at /data is the bucket's.
pub const STORAGE_GATE: &str = "storage";

/// The version of the protocol between `cvm` and the storage worker.
pub const VERSION: u32 = 1;
/// The most bytes of a question, which is a verb and perhaps paths.
pub const QUESTION_MAX: usize = 16 * 1024;
/// The most bytes of one line of an answer: a piece of a file, or one entry.
pub const ANSWER_MAX: usize = 128 * 1024;

/// Everything that the storage worker has to know.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageSpec {
    pub bucket: String,
    pub prefix: String,
    pub region: String,
    /// The S3 provider as rclone names it.
    pub provider: String,
    pub endpoint: Option<String>,
    pub access_key_id: PackedBytes,
    pub secret_access_key: PackedBytes,
    pub session_token: Option<PackedBytes>,
    pub crypt: CryptSpec,
    /// The key that authenticates the manifest and the ownership record.
    pub manifest_key: PackedBytes,
    /// The gateway's user, who owns most of the files.
    pub user: String,
    /// `GENERATION:DIGEST:STATE`: a bucket with an older state is refused. An anchor of an older version lacks `:STATE`.
    pub anchor: Option<String>,
    /// Whether a bucket that cannot be checked is taken over as it is.
    pub adopt: bool,
    /// The epoch of the proven owner. If the ownership record has a higher one, this environment is refused.
    pub owner_epoch: u32,
    pub heartbeat_s: u32,
    pub drain_s: u32,
    /// The seconds between restore drills; with 0 only an operator starts one.
    pub drill_s: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "form")]
pub enum CryptSpec {
    /// Password and salt in clear text.
    Clear { password: PackedBytes, salt: PackedBytes },
    /// Password and salt in rclone's obscured form, as the user gave them.
    Obscured { password: PackedBytes, salt: PackedBytes },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    Fuse,
    Sync,
}

impl Mode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Fuse => "fuse",
            Self::Sync => "sync",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    pub v: u32,
    #[serde(flatten)]
    pub verb: Ask,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "kebab-case")]
pub enum Ask {
    Status,
    /// Pushes everything that is pending, until the bucket equals the tree.
    Flush,
    /// Waits until the bucket has the present content of this file, whose path is relative to /data.
    Committed {
        path: String,
    },
    /// Lists the entries of the manifest below a path; "" is everything.
    List {
        path: String,
    },
    /// Reads one file from the bucket, and checks its content.
    Get {
        path: String,
    },
    /// Compares tree and bucket; `deep` reads every object back.
    Verify {
        deep: bool,
    },
    /// Runs a restore drill now.
    Drill,
    /// Gives up files of which the bucket has no good copy: they are removed from the manifest and the bucket.
    Forget {
        /// The paths as the incidents show them.
        paths: Vec<String>,
        /// The [`StorageStatus::wrong`] that the operator has seen: if it has changed, the request is refused.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<String>,
    },
    /// Accepts the present content of files that were damaged in the bucket and have been written to since.
    Keep {
        paths: Vec<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<String>,
    },
    /// Goes on with a manifest that is older than expected, or has a gap.
    AcceptOlder {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<String>,
    },
    /// Takes over a bucket that cannot be checked.
    Adopt {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<String>,
    },
    /// Takes the bucket now, without waiting until the other instance's heartbeat is stale.
    Takeover,
    /// Lists the logs of earlier boots.
    Boots,
    /// Reads one log of an earlier boot.
    BootLog {
        /// -1 is the boot before this one.
        boot: i32,
        log: String,
    },
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    Progress(Progress),
    /// One line of a list, for people.
    Line {
        text: String,
    },
    Entry(Entry),
    /// A piece of a file, in base64.
    Data {
        base64: String,
    },
    Status(Box<StorageStatus>),
    /// The request was carried out. `good` is false if its result is bad, such as damage that was found.
    Done {
        text: String,
        good: bool,
    },
    Refused {
        why: String,
    },
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub what: String,
    pub files_done: u64,
    pub files_total: u64,
    pub bytes_done: u64,
    pub bytes_total: u64,
}

word_enum! {
    pub enum EntryKind {
        File = "file",
        /// A SQLite database, of which a consistent copy is kept.
        Database = "database",
        Directory = "directory",
        Symlink = "symlink",
    }
}

/// One path of the manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Relative to /data; bytes that are no UTF-8 are shown as U+FFFD.
    pub path: String,
    pub kind: EntryKind,
    pub size: u64,
    pub mode: u32,
    pub mtime_ms: i64,
}

word_enum! {
    /// The phase of the storage worker.
    pub enum WorkerPhase {
        Opening = "opening",
        /// Another instance holds the bucket.
        Waiting = "waiting",
        Restoring = "restoring",
        Ready = "ready",
        /// Another instance has taken the bucket over from this one.
        Fenced = "fenced",
        /// An operator has to decide.
        Refused = "refused",
        Draining = "draining",
    }
}

/// Everything an operator may ask about the state of the storage.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StorageStatus {
    pub phase: WorkerPhase,
    /// Why the storage is not ready, with the remedy.
    pub why: Option<String>,
    pub mode: Option<Mode>,
    /// Why the mode is not the better one.
    pub reason: Option<String>,
    pub bucket: String,
    pub prefix: String,
    pub instance: String,
    pub epoch: u64,
    /// The other instance that holds the bucket, if there is one.
    pub held_by: Option<String>,
    pub generation: u64,
    /// The anchor of the present state, for the variable `STATE_ANCHOR`.
    pub anchor: Option<String>,
    /// The random name of the state in this bucket, which stays the same as long as the state exists.
    pub state: Option<String>,
    pub oldest_unreplicated_ms: Option<u64>,
    pub pending_files: u64,
    pub pending_bytes: u64,
    pub last_push_ago_ms: Option<u64>,
    /// The running restore or hydration.
    pub progress: Option<Progress>,
    /// Whether the tree no longer depends on the mount.
    pub independent: bool,
    pub incidents: Vec<Incident>,
    /// Identifies the faults that an operator could accept now; it changes when they change.
    pub wrong: Option<String>,
    pub last_error: Option<String>,
    pub last_error_ago_ms: Option<u64>,
    pub retry_in_ms: Option<u64>,
    pub drill: Option<Drill>,
    pub files: u64,
    pub bytes: u64,
    /// How many requests this worker has made since it started.
    pub requests: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub up_ms: u64,
}

/// A fault that an operator has to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incident {
    pub path: String,
    pub what: String,
    /// What to do.
    pub remedy: String,
    pub since_ms_ago: u64,
}

/// The result of the last restore drill.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drill {
    pub ago_ms: u64,
    pub good: bool,
    pub files: u64,
    pub databases: u64,
    pub text: String,
}
