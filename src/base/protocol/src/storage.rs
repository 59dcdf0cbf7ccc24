//! The messages between the supervisor, the storage worker and the operator.
//!
//! * PID 1 to `cvm-storage`: [`StorageSpec`], in a sealed memfd on standard input. The only place
//!   where bucket credentials and crypt passwords travel.
//! * operator to `cvm-storage`: one [`Question`] line on the socket at [`paths::STORAGE_SOCKET`],
//!   answered by [`Answer`] lines, the last of which is `done`, `status` or `refused`.
//!
//! A secret is wiped when it is dropped, and stands in nothing but the specification.
//!
//! [`paths::STORAGE_SOCKET`]: crate::paths::STORAGE_SOCKET

use crate::word_enum::word_enum;
use cvm_secrets::base64_bytes::PackedBytes;
use serde::{Deserialize, Serialize};

/// The name of the service: the worker.
pub const STORAGE_WORKER: &str = "storage";
/// The gate that the worker opens while the tree at /data is the bucket's.
pub const STORAGE_GATE: &str = "storage";

/// Version of the operator's protocol.
pub const VERSION: u32 = 1;
/// A question is a verb and some paths.
pub const QUESTION_MAX: usize = 16 * 1024;
/// One line of an answer: a piece of a file, or one entry.
pub const ANSWER_MAX: usize = 128 * 1024;

/// All that the storage worker needs to know.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StorageSpec {
    pub bucket: String,
    pub prefix: String,
    pub region: String,
    /// As rclone names it.
    pub provider: String,
    pub endpoint: Option<String>,
    pub access_key_id: PackedBytes,
    pub secret_access_key: PackedBytes,
    pub session_token: Option<PackedBytes>,
    pub crypt: CryptSpec,
    /// Authenticates the manifest and the ownership record.
    pub manifest_key: PackedBytes,
    /// Whose files most of them are.
    pub user: String,
    /// `GENERATION:DIGEST:STATE` below which a bucket is refused; without `:STATE` of an older version.
    pub anchor: Option<String>,
    /// What nobody can check is taken over as it is.
    pub adopt: bool,
    /// Of a proven owner; an ownership record with a higher one refuses this environment.
    pub owner_epoch: u32,
    pub heartbeat_s: u32,
    pub drain_s: u32,
    /// 0: never by itself.
    pub drill_s: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "form")]
pub enum CryptSpec {
    /// Password and salt as they are.
    Clear { password: PackedBytes, salt: PackedBytes },
    /// In rclone's obscured form, as the user gave them.
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
    /// Push everything that is pending; done when the bucket is equal to the tree.
    Flush,
    /// Done when the bucket has what this one file, relative to /data, holds now.
    Committed {
        path: String,
    },
    /// What the bucket holds below a path, from the manifest. "" is everything.
    List {
        path: String,
    },
    /// One file's bytes straight from the bucket, checked.
    Get {
        path: String,
    },
    /// Compares tree and bucket; `deep` reads every object back.
    Verify {
        deep: bool,
    },
    /// A restore drill now.
    Drill,
    /// Give files up that the bucket does not have right: they go from the manifest and the bucket.
    Forget {
        /// As the incidents name them.
        paths: Vec<String>,
        /// [`StorageStatus::wrong`] as the operator has seen it.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<String>,
    },
    /// Take files as they are that were written to while what they began as was wrong.
    Keep {
        paths: Vec<String>,
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<String>,
    },
    /// Go on with a manifest that is older than it should be, or has a gap.
    AcceptOlder {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<String>,
    },
    /// Take over a bucket that cannot be checked.
    Adopt {
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seen: Option<String>,
    },
    /// Do not wait for another instance's heartbeat to go stale.
    Takeover,
    /// Logs of earlier boots: which there are, or one file of one.
    Boots,
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
    /// A line of a list, for people.
    Line {
        text: String,
    },
    Entry(Entry),
    /// A piece of a file, base64.
    Data {
        base64: String,
    },
    Status(Box<StorageStatus>),
    /// The end of what went well. `good` is false when the answer is bad news.
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
        /// A file that is kept consistent.
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
    /// Of the storage worker.
    pub enum WorkerPhase {
        Opening = "opening",
        /// Another instance has the bucket.
        Waiting = "waiting",
        Restoring = "restoring",
        Ready = "ready",
        /// Another instance has taken the bucket.
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
    /// Why it is not ready, with the remedy.
    pub why: Option<String>,
    pub mode: Option<Mode>,
    /// Why not the better mode.
    pub reason: Option<String>,
    pub bucket: String,
    pub prefix: String,
    pub instance: String,
    pub epoch: u64,
    /// Who else holds the bucket, when somebody does.
    pub held_by: Option<String>,
    pub generation: u64,
    /// To be given as `STATE_ANCHOR`.
    pub anchor: Option<String>,
    /// A random name of what is kept here, for as long as it is kept.
    pub state: Option<String>,
    pub oldest_unreplicated_ms: Option<u64>,
    pub pending_files: u64,
    pub pending_bytes: u64,
    pub last_push_ago_ms: Option<u64>,
    /// The running restore or hydration.
    pub progress: Option<Progress>,
    /// Whether nothing depends on the mount any more.
    pub independent: bool,
    pub incidents: Vec<Incident>,
    /// A name for what could be accepted now, which changes with it.
    pub wrong: Option<String>,
    pub last_error: Option<String>,
    pub last_error_ago_ms: Option<u64>,
    pub retry_in_ms: Option<u64>,
    pub drill: Option<Drill>,
    pub files: u64,
    pub bytes: u64,
    /// Since this worker started.
    pub requests: u64,
    pub bytes_up: u64,
    pub bytes_down: u64,
    pub up_ms: u64,
}

/// Something an operator has to look at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Incident {
    pub path: String,
    pub what: String,
    /// What to do.
    pub remedy: String,
    pub since_ms_ago: u64,
}

/// What the last restore drill found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drill {
    pub ago_ms: u64,
    pub good: bool,
    pub files: u64,
    pub databases: u64,
    pub text: String,
}
