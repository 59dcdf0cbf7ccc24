//! `cvm storage status`. Its first lines answer the questions of an operator at three in the morning: is
//! my data in the bucket, how old is the oldest change that is not, what do I do now.

use super::client::{Client, Patience, unexpected_answer};
use super::progress::share;
use super::summary::{InBucket, in_bucket};
use crate::args::StorageStatusArgs;
use crate::control_socket::stripped;
use crate::failure::{Exit, Failure};
use crate::json;
use crate::stdout;
use crate::style::{Style, Tone};
use crate::table::labelled;
use crate::units::{count, precise_span, size, span};
use crate::watch::watch;
use cvm_protocol::storage::{Answer, Ask, Drill, Incident, Mode, Progress, StorageStatus, WorkerPhase};
use std::time::Duration;
use zeroize::Zeroizing;

const WHAT: &str = "storage status";
const TIME: Duration = Duration::from_secs(5);
/// A change that is not in the bucket after this time is the sign of a fault.
pub(crate) const OLD_MS: u64 = 60_000;
/// The requests of a shorter time say little about a day.
const RATE_MS_MIN: u64 = 60_000;
const DAY_MS: u64 = 86_400_000;
const ENVELOPE: &str = "{\"answer\":\"status\",";

pub(super) fn run(args: &StorageStatusArgs) -> Result<Exit, Failure> {
    if let Some(pause) = args.watch {
        return watch(pause, args.json, |style| {
            let (line, status) = ask()?;
            Ok(if args.json { stripped(&line, ENVELOPE) + "\n" } else { page(&status, style) })
        });
    }
    let (line, status) = ask()?;
    let style = Style::of_stdout();
    let text = if args.json { json::shown(&stripped(&line, ENVELOPE), style) } else { page(&status, style) };
    stdout::print(&text)?;
    Ok(if is_good(&status) { Exit::Good } else { Exit::Bad })
}

/// The worker's status, and the line in which it came.
pub(super) fn ask() -> Result<(Zeroizing<Vec<u8>>, Box<StorageStatus>), Failure> {
    match Client::ask(WHAT, Ask::Status, Patience::short(TIME))?.only_answer()? {
        (line, Answer::Status(status)) => Ok((line, status)),
        _ => Err(unexpected_answer(WHAT)),
    }
}

fn is_good(status: &StorageStatus) -> bool {
    status.phase == WorkerPhase::Ready && status.incidents.is_empty()
}

fn page(status: &StorageStatus, style: Style) -> String {
    let (answer, tone) = match in_bucket(status) {
        InBucket::Yes if !status.incidents.is_empty() => {
            ("everything except for the incidents below".to_owned(), Tone::Caution)
        }
        InBucket::Yes => ("everything".to_owned(), Tone::Good),
        InBucket::No(what) => (format!("not all: {what} not yet"), Tone::Caution),
        InBucket::Unknown(why) => (why, Tone::Caution),
    };
    let (oldest, old_tone) = match status.oldest_unreplicated_ms {
        None => ("none".to_owned(), Tone::Plain),
        Some(ms) => (ago(ms), if ms < OLD_MS { Tone::Plain } else { Tone::Bad }),
    };
    let (advice, urgent) = advice(status);
    let mut text = labelled("In the bucket", &answer, tone, 0, style);
    text += &labelled("Oldest change not in it", &oldest, old_tone, 0, style);
    text += &labelled("Do now", &advice, if urgent { Tone::Bad } else { Tone::Plain }, 0, style);
    text.push('\n');
    for (label, value, tone) in details(status) {
        text += &labelled(label, &value, tone, 0, style);
    }
    if !status.incidents.is_empty() {
        text.push('\n');
        text.extend([style.paint("INCIDENTS", Tone::Strong).as_str(), "\n"]);
        text.extend(status.incidents.iter().map(|i| incident(i, style)));
    }
    text
}

/// The advice of a status, and whether it is urgent.
fn advice(status: &StorageStatus) -> (String, bool) {
    let watch = "wait: `cvm storage status --watch`";
    match status.phase {
        WorkerPhase::Ready => ready(status),
        WorkerPhase::Opening | WorkerPhase::Restoring => (watch.to_owned(), false),
        WorkerPhase::Waiting if status.held_by.is_some() => (
            "wait until the other instance lets go of the bucket or its heartbeat is stale. If its machine is \
             gone for good: `cvm storage takeover`"
                .to_owned(),
            false,
        ),
        WorkerPhase::Waiting => (watch.to_owned(), false),
        WorkerPhase::Draining => ("wait: do not destroy this machine before everything is in the bucket".to_owned(), true),
        WorkerPhase::Fenced => (
            "end one of the two instances: another one writes into the bucket, and this one must not any more. \
             `cvm storage takeover` makes this one the owner again"
                .to_owned(),
            true,
        ),
        WorkerPhase::Refused => (
            "mend the fault below, or decide about it; the gateway does not start before"
                .to_owned(),
            true,
        ),
        WorkerPhase::Unknown => ("`cvm doctor` looks for the cause".to_owned(), true),
    }
}

fn ready(status: &StorageStatus) -> (String, bool) {
    let old = status.oldest_unreplicated_ms.is_some_and(|ms| ms >= OLD_MS);
    if !status.incidents.is_empty() {
        ("look at the incidents below, each with its remedy".to_owned(), true)
    } else if old && status.last_error.is_some() {
        ("mend the last error below: the bucket does not accept changes".to_owned(), true)
    } else if old {
        ("`cvm storage flush` pushes now, and names the obstacle".to_owned(), true)
    } else if in_bucket(status) == InBucket::Yes {
        ("nothing".to_owned(), false)
    } else {
        ("nothing; it is pushed by itself. `cvm storage flush` does it at once".to_owned(), false)
    }
}

type Detail = (&'static str, String, Tone);

fn details(status: &StorageStatus) -> Vec<Detail> {
    let tone = if is_good(status) { Tone::Good } else { Tone::Caution };
    let phase = format!("{}, worker up {}", status.phase, span(status.up_ms));
    let mut details = vec![("Phase", phase, tone)];
    details.extend(status.why.clone().map(|why| ("Why", why, Tone::Bad)));
    if let Some(mode) = status.mode {
        details.push(("Mode", mode_of(mode, status), Tone::Plain));
    }
    let kept = format!("{}, {}", count(status.files, "file", "files"), size(status.bytes));
    details.push((
        "Bucket",
        format!("{}, folder {}, {kept}, generation {}", status.bucket, status.prefix, status.generation),
        Tone::Plain,
    ));
    let epoch =
        if status.epoch == 0 { "owner of nothing yet".into() } else { format!("epoch {}", status.epoch) };
    details.push(("Instance", format!("{}, {epoch}", status.instance), Tone::Plain));
    details.extend(status.held_by.clone().map(|who| ("Held by", who, Tone::Caution)));
    details.push(("Pending", pending(status), Tone::Plain));
    let pushed = status.last_push_ago_ms.map_or("never since the worker started".to_owned(), ago);
    details.push(("Last push", pushed, Tone::Plain));
    details.extend(status.progress.as_ref().map(|p| ("Progress", progress(p), Tone::Plain)));
    details.extend(status.last_error.as_ref().map(|e| ("Last error", error(e, status), Tone::Caution)));
    details.push(drill(status.drill.as_ref()));
    if let Some(anchor) = &status.anchor {
        let meaning = format!("{anchor} (a machine with STATE_ANCHOR={anchor} refuses an older bucket)");
        details.push(("Anchor", meaning, Tone::Plain));
    }
    details.push(("Requests", requests(status), Tone::Plain));
    let moved = format!("{} up, {} down", size(status.bytes_up), size(status.bytes_down));
    details.push(("Moved", moved, Tone::Plain));
    details
}

fn ago(ms: u64) -> String {
    format!("{} ago", precise_span(ms))
}

fn mode_of(mode: Mode, status: &StorageStatus) -> String {
    let mut text = match mode {
        Mode::Fuse => "fuse mount, files come as they are needed".to_owned(),
        Mode::Sync => "sync, everything was downloaded before the start".to_owned(),
    };
    if let Some(reason) = &status.reason {
        text = format!("{text} ({reason})");
    }
    match (mode, status.independent) {
        (Mode::Fuse, true) => text + "; all files have come, and nothing depends on the mount any more",
        (Mode::Fuse, false) => text + "; some files are still behind the mount",
        (Mode::Sync, _) => text,
    }
}

fn pending(status: &StorageStatus) -> String {
    format!("{}, {}", count(status.pending_files, "file", "files"), size(status.pending_bytes))
}

fn progress(progress: &Progress) -> String {
    let files = format!("{} of {}", progress.files_done, count(progress.files_total, "file", "files"));
    let bytes = format!("{} of {}", size(progress.bytes_done), size(progress.bytes_total));
    let share = share(progress).map(|n| format!(" ({n} %)")).unwrap_or_default();
    format!("{}, {files}, {bytes}{share}", progress.what)
}

fn error(error: &str, status: &StorageStatus) -> String {
    let mut text = error.to_owned();
    if let Some(ms) = status.last_error_ago_ms {
        text = format!("{text}; {}", ago(ms));
    }
    match status.retry_in_ms {
        Some(ms) => format!("{text}, tried again in {}", precise_span(ms)),
        None => text,
    }
}

fn drill(drill: Option<&Drill>) -> Detail {
    let Some(drill) = drill else {
        let none = "none yet since the worker started: `cvm storage drill` makes one";
        return ("Last drill", none.to_owned(), Tone::Plain);
    };
    let (result, tone) = if drill.good { ("good", Tone::Good) } else { ("BAD", Tone::Bad) };
    let files = count(drill.files, "file", "files");
    let databases = count(drill.databases, "database", "databases");
    let text = format!("{result}, {}: {files} and {databases} restored; {}", ago(drill.ago_ms), drill.text);
    ("Last drill", text, tone)
}

fn requests(status: &StorageStatus) -> String {
    let made = format!("{} in {}", status.requests, span(status.up_ms));
    match per_day(status.requests, status.up_ms) {
        Some(number) => format!("{made}; at this rate {number} a day"),
        None => made,
    }
}

/// The number of a whole day at this rate; none while too little time has passed.
fn per_day(number: u64, up_ms: u64) -> Option<u64> {
    let day = u128::from(number) * u128::from(DAY_MS) / u128::from(up_ms.max(1));
    (up_ms >= RATE_MS_MIN).then(|| u64::try_from(day).unwrap_or(u64::MAX))
}

fn incident(incident: &Incident, style: Style) -> String {
    let what = format!("{}; since {}", incident.what, precise_span(incident.since_ms_ago));
    let path = crate::text::clean(&incident.path);
    labelled(&path, &what, Tone::Bad, 2, style) + &labelled("do", &incident.remedy, Tone::Plain, 4, style)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{good, pending, troubled};
    use super::*;
    use crate::text::width;
    use std::path::PathBuf;

    const WIDTHS: [usize; 2] = [100, 40];

    /// After a wanted change: `CVM_WRITE_PAGES=1 cargo test -p cvm pages`, and read the difference.
    #[test]
    fn pages_are_as_they_were_promised() {
        for (name, status) in [("good", good()), ("pending", pending()), ("troubled", troubled())] {
            for width in WIDTHS {
                let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
                    .join(format!("src/storage/pages/{name}-{width}.txt"));
                let text = page(&status, Style::plain(width));
                if std::env::var_os("CVM_WRITE_PAGES").is_some() {
                    std::fs::write(&path, &text).unwrap();
                }
                let promised = std::fs::read_to_string(&path).unwrap();
                assert_eq!(text, promised, "{}:\n{text}", path.display());
            }
        }
    }

    #[test]
    fn no_width_breaks_a_page_and_no_text_in_it_steers_a_terminal() {
        for status in [good(), pending(), troubled()] {
            for columns in 30..200 {
                let text = page(&status, Style::plain(columns));
                let too_wide = text.lines().find(|line| width(line) > columns);
                assert_eq!(too_wide, None, "at {columns}");
                assert!(!text.contains('\x1b'));
            }
        }
    }

    #[test]
    fn every_phase_has_its_advice() {
        let with = |phase| StorageStatus { phase, ..good() };
        let held = StorageStatus { held_by: Some("b81d".into()), ..with(WorkerPhase::Waiting) };
        let old = StorageStatus { oldest_unreplicated_ms: Some(OLD_MS), ..pending() };
        let stuck = StorageStatus { last_error: Some("403".into()), ..old.clone() };
        let with_incidents = StorageStatus { incidents: troubled().incidents, ..good() };
        let table = [
            (good(), "nothing", false),
            (pending(), "nothing; it is pushed", false),
            (old, "`cvm storage flush` pushes now", true),
            (stuck, "mend the last error", true),
            (with_incidents, "look at the incidents", true),
            (with(WorkerPhase::Opening), "wait: ", false),
            (with(WorkerPhase::Restoring), "wait: ", false),
            (with(WorkerPhase::Waiting), "wait: ", false),
            (held, "wait until the other instance", false),
            (with(WorkerPhase::Draining), "wait: do not destroy", true),
            (with(WorkerPhase::Fenced), "end one of the two", true),
            (with(WorkerPhase::Refused), "mend the fault below", true),
            (with(WorkerPhase::Unknown), "`cvm doctor`", true),
        ];
        for (status, begins, urgent) in table {
            let (text, is_urgent) = advice(&status);
            assert!(text.starts_with(begins), "{}: {text}", status.phase);
            assert_eq!(is_urgent, urgent, "{}", status.phase);
        }
    }

    #[test]
    fn only_ready_without_incidents_is_good() {
        assert!(is_good(&good()) && is_good(&pending()));
        assert!(!is_good(&StorageStatus { incidents: troubled().incidents, ..good() }));
        for phase in [
            WorkerPhase::Opening,
            WorkerPhase::Waiting,
            WorkerPhase::Restoring,
            WorkerPhase::Fenced,
            WorkerPhase::Refused,
            WorkerPhase::Draining,
            WorkerPhase::Unknown,
        ] {
            assert!(!is_good(&StorageStatus { phase, ..good() }), "{phase}");
        }
    }

    #[test]
    fn a_rate_needs_some_time() {
        assert_eq!(per_day(1_440, 10_800_000), Some(11_520));
        assert_eq!(per_day(5, RATE_MS_MIN - 1), None);
        assert_eq!(per_day(0, DAY_MS), Some(0));
        assert_eq!(per_day(u64::MAX, RATE_MS_MIN), Some(u64::MAX));
    }
}
