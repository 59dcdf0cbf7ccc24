//! Answers of a storage worker for tests, written by hand.

use cvm_protocol::storage::{Drill, Incident, Mode, Progress, StorageStatus, WorkerPhase};

pub(crate) fn good() -> StorageStatus {
    StorageStatus {
        phase: WorkerPhase::Ready,
        mode: Some(Mode::Fuse),
        bucket: "agent-state".into(),
        prefix: "openclaw-data".into(),
        instance: "7f3a91c2".into(),
        epoch: 5,
        generation: 812,
        anchor: Some("812:9c41f0aa".into()),
        last_push_ago_ms: Some(12_000),
        independent: true,
        drill: Some(Drill {
            ago_ms: 660_000,
            good: true,
            files: 120,
            databases: 3,
            text: "no difference".into(),
        }),
        files: 4_211,
        bytes: 2_469_606_195,
        requests: 1_440,
        bytes_up: 2_097_152,
        bytes_down: 3_221_225_472,
        up_ms: 10_800_000,
        ..StorageStatus::default()
    }
}

pub(crate) fn pending() -> StorageStatus {
    StorageStatus {
        mode: Some(Mode::Sync),
        reason: Some("/dev/fuse is not there".into()),
        oldest_unreplicated_ms: Some(1_240),
        pending_files: 3,
        pending_bytes: 12_288,
        ..good()
    }
}

/// Another instance took the bucket, and two files have incidents.
pub(crate) fn troubled() -> StorageStatus {
    let incident = |path: &str, what: &str| Incident {
        path: path.into(),
        what: what.into(),
        remedy: "`cvm storage verify --deep`, then `cvm storage keep PATH`".into(),
        since_ms_ago: 61_000,
    };
    StorageStatus {
        phase: WorkerPhase::Fenced,
        why: Some("instance b81d holds epoch 6; end one of the two".into()),
        held_by: Some("b81d, epoch 6".into()),
        progress: Some(Progress {
            what: "hydrating".into(),
            files_done: 1_200,
            files_total: 5_000,
            bytes_done: 1 << 30,
            bytes_total: 1 << 32,
        }),
        independent: false,
        oldest_unreplicated_ms: Some(95_000),
        pending_files: 1,
        pending_bytes: 512,
        incidents: vec![
            incident("openclaw/agents/main/memory.db", "the object was replaced: its hash is another one"),
            incident("openclaw/\u{1b}[2Jnotes.md", "the object is missing"),
        ],
        last_error: Some("PUT: 503 SlowDown".into()),
        last_error_ago_ms: Some(4_000),
        retry_in_ms: Some(9_000),
        drill: Some(Drill {
            ago_ms: 90_000_000,
            good: false,
            files: 9,
            databases: 1,
            text: "memory.db: 3 pages differ".into(),
        }),
        ..good()
    }
}
