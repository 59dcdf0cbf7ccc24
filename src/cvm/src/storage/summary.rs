//! The storage in a line or two: is everything in the bucket?

use super::client::{Client, Patience};
use crate::style::{Style, Tone};
use crate::table::labelled;
use crate::units::{count, precise_span, size};
use cvm_protocol::storage::{Answer, Ask, Mode, StorageStatus, WorkerPhase};
use std::time::Duration;

/// The rest of a page waits for this answer.
const TIME: Duration = Duration::from_secs(1);

/// The worker's answer to the question for its status.
pub(crate) enum WorkerAnswer {
    Status(Box<StorageStatus>),
    /// Why there is none.
    None(String),
}

impl WorkerAnswer {
    pub(crate) fn ask() -> Self {
        let asked = Client::ask("storage status", Ask::Status, Patience::short(TIME));
        match asked.and_then(Client::only_answer) {
            Ok((_, Answer::Status(status))) => Self::Status(status),
            Ok(_) => Self::None("the storage worker answers another question".to_owned()),
            Err(failure) => Self::None(failure.cause),
        }
    }
}

/// Is everything in the bucket?
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum InBucket {
    Yes,
    /// The changes that are not.
    No(String),
    /// Why the worker does not know.
    Unknown(String),
}

pub(crate) fn in_bucket(status: &StorageStatus) -> InBucket {
    if status.pending_files > 0 {
        let files = count(status.pending_files, "file", "files");
        return InBucket::No(format!("{files} ({})", size(status.pending_bytes)));
    }
    match (status.oldest_unreplicated_ms, status.phase) {
        (Some(_), _) => InBucket::No("changes of unknown size".to_owned()),
        (None, WorkerPhase::Ready | WorkerPhase::Draining) => InBucket::Yes,
        (None, WorkerPhase::Unknown) => InBucket::Unknown("not known".to_owned()),
        (None, phase) => InBucket::Unknown(format!("not known while the worker is {}", activity(phase))),
    }
}

/// A phase as the activity of the worker.
fn activity(phase: WorkerPhase) -> &'static str {
    match phase {
        WorkerPhase::Opening => "opening the bucket",
        WorkerPhase::Waiting => "waiting for the bucket",
        other => other.as_str(),
    }
}

/// `fuse mount`, `sync: no /dev/fuse`.
pub(crate) fn described_mode(status: &StorageStatus) -> Option<String> {
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
pub(crate) fn first_lines(status: &StorageStatus, style: Style) -> String {
    let mode = described_mode(status).unwrap_or_else(|| status.phase.to_string());
    let label = crate::text::clean(&format!("S3 bucket {} ({mode})", status.bucket));
    let oldest = status.oldest_unreplicated_ms.map(|ms| format!(", oldest change {} ago", precise_span(ms)));
    let (mut answer, mut tone) = match in_bucket(status) {
        InBucket::Yes if !status.incidents.is_empty() => {
            ("everything is in the bucket except for the incidents".to_owned(), Tone::Caution)
        }
        InBucket::Yes => ("everything is in the bucket".to_owned(), Tone::Good),
        InBucket::No(what) => {
            let tone = if status.phase == WorkerPhase::Ready { Tone::Plain } else { Tone::Caution };
            (format!("{what} not yet in the bucket{}", oldest.unwrap_or_default()), tone)
        }
        InBucket::Unknown(why) => (why, Tone::Caution),
    };
    if matches!(status.phase, WorkerPhase::Fenced | WorkerPhase::Refused) {
        tone = Tone::Bad;
        if let Some(why) = &status.why {
            answer = format!("{}: {why}; {answer}", status.phase);
        }
    }
    let mut text = labelled(&label, &answer, tone, 0, style);
    if !status.incidents.is_empty() {
        let number = count(status.incidents.len() as u64, "incident", "incidents");
        text += &labelled("S3 storage", &format!("{number}: see `cvm storage status`"), Tone::Bad, 0, style);
    }
    text
}

/// The first lines of `cvm status` where the worker does not answer.
pub(crate) fn first_lines_without(cause: &str, style: Style) -> String {
    let answer = format!("nothing is known about the bucket: {cause}");
    labelled("S3 storage", &answer, Tone::Bad, 0, style)
}

#[cfg(test)]
mod tests {
    use super::super::samples;
    use super::*;

    fn lines_of(status: &StorageStatus) -> String {
        first_lines(status, Style::plain(200))
    }

    #[test]
    fn the_first_line_says_whether_everything_is_in_the_bucket() {
        assert_eq!(
            lines_of(&samples::good()),
            "S3 bucket agent-state (fuse mount): everything is in the bucket\n"
        );
        assert_eq!(
            lines_of(&samples::pending()),
            "S3 bucket agent-state (sync: /dev/fuse is not there): 3 files (12.0 KiB) not yet in the bucket, \
             oldest change 1.2 s ago\n"
        );
        let uncounted = StorageStatus { pending_files: 0, pending_bytes: 0, ..samples::pending() };
        assert!(lines_of(&uncounted).contains("changes of unknown size not yet in the bucket, oldest"));
        let opening = StorageStatus { phase: WorkerPhase::Opening, mode: None, ..samples::good() };
        assert_eq!(
            lines_of(&opening),
            "S3 bucket agent-state (opening): not known while the worker is opening the bucket\n"
        );
    }

    #[test]
    fn a_fault_is_shown_with_the_place_to_look_at() {
        let text = lines_of(&samples::troubled());
        assert!(text.starts_with("S3 bucket agent-state (fuse mount): fenced: "), "{text}");
        assert!(text.ends_with("S3 storage: 2 incidents: see `cvm storage status`\n"), "{text}");
        assert!(first_lines_without("nobody listens", Style::plain(80)).contains("nothing is known"));
    }

    #[test]
    fn a_phase_that_this_version_does_not_know_claims_nothing() {
        let odd = StorageStatus { phase: WorkerPhase::Unknown, ..samples::good() };
        assert!(matches!(in_bucket(&odd), InBucket::Unknown(_)));
        assert!(matches!(in_bucket(&StorageStatus::default()), InBucket::Unknown(_)));
    }
}
