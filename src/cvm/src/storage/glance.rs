//! What matters most about the storage, in a line or two: is everything in the bucket?
//!
//! Refuses to read clocks and terminals. May import: `look`, `table`, `words`, `client`.

use super::client::{Client, Patience};
use crate::look::{Look, Tone};
use crate::table::labelled;
use crate::words::{count, fine, size};
use cvm_protocol::storage::{Answer, Ask, Mode, StorageStatus};
use std::time::Duration;

/// What the supervisor calls the mode that has a storage worker.
pub(crate) const MODE: &str = "s3";
/// Others wait for the rest of the page.
const TIME: Duration = Duration::from_secs(1);

/// What a short look at the worker shows.
pub(crate) enum Glance {
    Seen(Box<StorageStatus>),
    /// Why it does not answer.
    Away(String),
}

impl Glance {
    pub(crate) fn take() -> Self {
        let asked = Client::ask("storage status", Ask::Status, Patience::short(TIME));
        match asked.and_then(Client::only) {
            Ok((_, Answer::Status(status))) => Self::Seen(status),
            Ok(_) => Self::Away("it answers something else".to_owned()),
            Err(trouble) => Self::Away(trouble.cause),
        }
    }
}

/// Is everything in the bucket?
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum InBucket {
    Yes,
    /// What is not.
    No(String),
    /// Why that cannot be said.
    Unknown(String),
}

pub(crate) fn in_bucket(status: &StorageStatus) -> InBucket {
    if status.pending_files > 0 {
        let files = count(status.pending_files, "file", "files");
        return InBucket::No(format!("{files} ({})", size(status.pending_bytes)));
    }
    match (status.oldest_unreplicated_ms, status.phase.as_str()) {
        (Some(_), _) => InBucket::No("changes of unknown size".to_owned()),
        (None, "ready" | "draining") => InBucket::Yes,
        (None, "") => InBucket::Unknown("not known".to_owned()),
        (None, phase) => InBucket::Unknown(format!("not known while the worker is {}", doing(phase))),
    }
}

/// A phase as one says what somebody is doing.
fn doing(phase: &str) -> &str {
    match phase {
        "opening" => "opening the bucket",
        "waiting" => "waiting for the bucket",
        other => other,
    }
}

/// `fuse mount`, `sync: no /dev/fuse`.
pub(crate) fn mode_words(status: &StorageStatus) -> Option<String> {
    let mode = match status.mode? {
        Mode::Fuse => "fuse mount",
        Mode::Sync => "sync",
    };
    Some(match &status.reason {
        Some(reason) => format!("{mode}: {reason}"),
        None => mode.to_owned(),
    })
}

/// The first lines of `cvm status`.
pub(crate) fn lead(status: &StorageStatus, look: Look) -> String {
    let mode = mode_words(status).unwrap_or_else(|| status.phase.clone());
    let label = crate::words::clean(&format!("S3 bucket {} ({mode})", status.bucket));
    let oldest = status.oldest_unreplicated_ms.map(|ms| format!(", oldest change {} ago", fine(ms)));
    let (mut words, mut tone) = match in_bucket(status) {
        InBucket::Yes if !status.incidents.is_empty() => {
            ("everything is in the bucket but for what incidents say of it".to_owned(), Tone::Caution)
        }
        InBucket::Yes => ("everything is in the bucket".to_owned(), Tone::Good),
        InBucket::No(what) => {
            let tone = if status.phase == "ready" { Tone::Plain } else { Tone::Caution };
            (format!("{what} not yet in the bucket{}", oldest.unwrap_or_default()), tone)
        }
        InBucket::Unknown(why) => (why, Tone::Caution),
    };
    if matches!(status.phase.as_str(), "fenced" | "refused") {
        tone = Tone::Bad;
        if let Some(why) = &status.why {
            words = format!("{}: {why}; {words}", status.phase);
        }
    }
    let mut text = labelled(&label, &words, tone, 0, look);
    if !status.incidents.is_empty() {
        let number = count(status.incidents.len() as u64, "incident", "incidents");
        text += &labelled("S3 storage", &format!("{number}: see `cvm storage status`"), Tone::Bad, 0, look);
    }
    text
}

pub(crate) fn lead_away(cause: &str, look: Look) -> String {
    let words = format!("nothing is known about the bucket: {cause}");
    labelled("S3 storage", &words, Tone::Bad, 0, look)
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    fn lead_of(status: &StorageStatus) -> String {
        lead(status, Look::plain(200))
    }

    #[test]
    fn the_first_line_says_whether_everything_is_in_the_bucket() {
        assert_eq!(
            lead_of(&samples::good()),
            "S3 bucket agent-state (fuse mount): everything is in the bucket\n"
        );
        assert_eq!(
            lead_of(&samples::pending()),
            "S3 bucket agent-state (sync: /dev/fuse is not there): 3 files (12.0 KiB) not yet in the bucket, \
             oldest change 1.2 s ago\n"
        );
        let uncounted = StorageStatus { pending_files: 0, pending_bytes: 0, ..samples::pending() };
        assert!(lead_of(&uncounted).contains("changes of unknown size not yet in the bucket, oldest"));
        let opening = StorageStatus { phase: "opening".into(), mode: None, ..samples::good() };
        assert_eq!(
            lead_of(&opening),
            "S3 bucket agent-state (opening): not known while the worker is opening the bucket\n"
        );
    }

    #[test]
    fn what_must_be_looked_at_is_said_with_where_to_look() {
        let text = lead_of(&samples::troubled());
        assert!(text.starts_with("S3 bucket agent-state (fuse mount): fenced: "), "{text}");
        assert!(text.ends_with("S3 storage: 2 incidents: see `cvm storage status`\n"), "{text}");
        assert!(lead_away("nobody listens", Look::plain(80)).contains("nothing is known"));
    }

    #[test]
    fn a_phase_that_this_version_does_not_know_claims_nothing() {
        let odd = StorageStatus { phase: "levitating".into(), ..samples::good() };
        assert!(matches!(in_bucket(&odd), InBucket::Unknown(_)));
        assert!(matches!(in_bucket(&StorageStatus::default()), InBucket::Unknown(_)));
    }
}
