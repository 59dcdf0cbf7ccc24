//! `cvm storage status`. The first lines answer what one wants to know at three in the morning:
//! is my data in the bucket, how old is the oldest change that is not, what do I do now.
//!
//! Refuses to read clocks and terminals below `run`. May import: `args`, `json`, `look`, `out`,
//! `socket`, `table`, `trouble`, `watch`, `words`, `client`, `glance`, `progress`.

use super::client::{Client, Patience, no_answer_fits};
use super::glance::{InBucket, in_bucket};
use super::progress::share;
use crate::args::StorageStatusArgs;
use crate::json;
use crate::look::{Look, Tone};
use crate::out;
use crate::socket::stripped;
use crate::table::labelled;
use crate::trouble::{Exit, Trouble};
use crate::watch::watch;
use crate::words::{count, fine, size, span};
use cvm_protocol::storage::{Answer, Ask, Drill, Incident, Mode, Progress, StorageStatus};
use std::time::Duration;

const WHAT: &str = "storage status";
const TIME: Duration = Duration::from_secs(5);
/// A change that is still not in the bucket after this long is a sign of trouble.
pub(crate) const OLD_MS: u64 = 60_000;
/// What a shorter life did says little about a day.
const RATE_MS_MIN: u64 = 60_000;
const DAY_MS: u64 = 86_400_000;
const ENVELOPE: &str = "{\"answer\":\"status\",";

pub(super) fn run(args: &StorageStatusArgs) -> Result<Exit, Trouble> {
    if let Some(pause) = args.watch {
        return watch(pause, args.json, |look| {
            let (line, status) = ask()?;
            Ok(if args.json { stripped(&line, ENVELOPE) + "\n" } else { page(&status, look) })
        });
    }
    let (line, status) = ask()?;
    let look = Look::of_stdout();
    let text = match (args.json, look.terminal) {
        (true, true) => json::indented(&stripped(&line, ENVELOPE)),
        (true, false) => stripped(&line, ENVELOPE) + "\n",
        (false, _) => page(&status, look),
    };
    out::print(&text)?;
    Ok(if is_good(&status) { Exit::Good } else { Exit::Bad })
}

pub(super) fn ask() -> Result<(Vec<u8>, Box<StorageStatus>), Trouble> {
    match Client::ask(WHAT, Ask::Status, Patience::short(TIME))?.only()? {
        (line, Answer::Status(status)) => Ok((line, status)),
        _ => Err(no_answer_fits(WHAT)),
    }
}

fn is_good(status: &StorageStatus) -> bool {
    status.phase == "ready" && status.incidents.is_empty()
}

fn page(status: &StorageStatus, look: Look) -> String {
    let (answer, tone) = match in_bucket(status) {
        InBucket::Yes if !status.incidents.is_empty() => {
            ("everything but what the incidents below say of it".to_owned(), Tone::Caution)
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
    let mut text = labelled("In the bucket", &answer, tone, 0, look);
    text += &labelled("Oldest change not in it", &oldest, old_tone, 0, look);
    text += &labelled("Do now", &advice, if urgent { Tone::Bad } else { Tone::Plain }, 0, look);
    text.push('\n');
    for (label, words, tone) in facts(status) {
        text += &labelled(label, &words, tone, 0, look);
    }
    if !status.incidents.is_empty() {
        text.push('\n');
        text.extend([look.paint("INCIDENTS", Tone::Strong).as_str(), "\n"]);
        text.extend(status.incidents.iter().map(|i| incident(i, look)));
    }
    text
}

/// What to do now, and whether it is urgent.
fn advice(status: &StorageStatus) -> (String, bool) {
    let watch = "wait: `cvm storage status --watch`";
    match status.phase.as_str() {
        "ready" => ready(status),
        "opening" | "restoring" => (watch.to_owned(), false),
        "waiting" if status.held_by.is_some() => (
            "wait until the other instance lets go of the bucket or its heartbeat is stale. If its machine is \
             gone for good: `cvm storage takeover`"
                .to_owned(),
            false,
        ),
        "waiting" => (watch.to_owned(), false),
        "draining" => ("wait: do not destroy this machine before everything is in the bucket".to_owned(), true),
        "fenced" => (
            "end one of the two instances: another one writes into the bucket, and this one must not any more. \
             `cvm storage takeover` makes this one the owner again"
                .to_owned(),
            true,
        ),
        "refused" => (
            "mend or decide what is said below; the gateway does not start before"
                .to_owned(),
            true,
        ),
        _ => ("`cvm doctor` looks for the cause".to_owned(), true),
    }
}

fn ready(status: &StorageStatus) -> (String, bool) {
    let old = status.oldest_unreplicated_ms.is_some_and(|ms| ms >= OLD_MS);
    if !status.incidents.is_empty() {
        ("look at the incidents below, each with its remedy".to_owned(), true)
    } else if old && status.last_error.is_some() {
        ("mend the last error below: the bucket does not take what changes".to_owned(), true)
    } else if old {
        ("`cvm storage flush` pushes now, and says what is in the way".to_owned(), true)
    } else if in_bucket(status) == InBucket::Yes {
        ("nothing".to_owned(), false)
    } else {
        ("nothing; it is pushed by itself. `cvm storage flush` does it at once".to_owned(), false)
    }
}

type Fact = (&'static str, String, Tone);

fn facts(status: &StorageStatus) -> Vec<Fact> {
    let tone = if is_good(status) { Tone::Good } else { Tone::Caution };
    let phase = format!("{}, worker up {}", status.phase, span(status.up_ms));
    let mut facts = vec![("Phase", phase, tone)];
    facts.extend(status.why.clone().map(|why| ("Why", why, Tone::Bad)));
    if let Some(mode) = status.mode {
        facts.push(("Mode", mode_of(mode, status), Tone::Plain));
    }
    let kept = format!("{}, {}", count(status.files, "file", "files"), size(status.bytes));
    facts.push((
        "Bucket",
        format!("{}, folder {}, {kept}, generation {}", status.bucket, status.prefix, status.generation),
        Tone::Plain,
    ));
    let epoch =
        if status.epoch == 0 { "owner of nothing yet".into() } else { format!("epoch {}", status.epoch) };
    facts.push(("Instance", format!("{}, {epoch}", status.instance), Tone::Plain));
    facts.extend(status.held_by.clone().map(|who| ("Held by", who, Tone::Caution)));
    facts.push(("Pending", pending(status), Tone::Plain));
    let pushed = status.last_push_ago_ms.map_or("never since the worker started".to_owned(), ago);
    facts.push(("Last push", pushed, Tone::Plain));
    facts.extend(status.progress.as_ref().map(|p| ("Progress", progress(p), Tone::Plain)));
    facts.extend(status.last_error.as_ref().map(|e| ("Last error", error(e, status), Tone::Caution)));
    facts.push(drill(status.drill.as_ref()));
    if let Some(anchor) = &status.anchor {
        let words = format!(
            "{anchor} (given to a machine as STATE_ANCHOR={anchor}, it refuses a bucket that is older than this)"
        );
        facts.push(("Anchor", words, Tone::Plain));
    }
    facts.push(("Requests", requests(status), Tone::Plain));
    let moved = format!("{} up, {} down", size(status.bytes_up), size(status.bytes_down));
    facts.push(("Moved", moved, Tone::Plain));
    facts
}

fn ago(ms: u64) -> String {
    format!("{} ago", fine(ms))
}

fn mode_of(mode: Mode, status: &StorageStatus) -> String {
    let mut words = match mode {
        Mode::Fuse => "fuse mount, files come as they are needed".to_owned(),
        Mode::Sync => "sync, everything was downloaded before the start".to_owned(),
    };
    if let Some(reason) = &status.reason {
        words = format!("{words} ({reason})");
    }
    match (mode, status.independent) {
        (Mode::Fuse, true) => words + "; all have come, nothing depends on the mount any more",
        (Mode::Fuse, false) => words + "; some are still behind the mount",
        (Mode::Sync, _) => words,
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
    let mut words = error.to_owned();
    if let Some(ms) = status.last_error_ago_ms {
        words = format!("{words}; {}", ago(ms));
    }
    match status.retry_in_ms {
        Some(ms) => format!("{words}, tried again in {}", fine(ms)),
        None => words,
    }
}

fn drill(drill: Option<&Drill>) -> Fact {
    let Some(drill) = drill else {
        let words = "none yet since the worker started: `cvm storage drill` makes one";
        return ("Last drill", words.to_owned(), Tone::Plain);
    };
    let (word, tone) = if drill.good { ("good", Tone::Good) } else { ("BAD", Tone::Bad) };
    let files = count(drill.files, "file", "files");
    let databases = count(drill.databases, "database", "databases");
    let words = format!("{word}, {}: {files} and {databases} restored; {}", ago(drill.ago_ms), drill.text);
    ("Last drill", words, tone)
}

fn requests(status: &StorageStatus) -> String {
    let made = format!("{} in {}", status.requests, span(status.up_ms));
    match per_day(status.requests, status.up_ms) {
        Some(number) => format!("{made}; at this rate {number} a day"),
        None => made,
    }
}

/// What a day would see; nothing while too little time has passed to say.
fn per_day(number: u64, up_ms: u64) -> Option<u64> {
    let day = u128::from(number) * u128::from(DAY_MS) / u128::from(up_ms.max(1));
    (up_ms >= RATE_MS_MIN).then(|| u64::try_from(day).unwrap_or(u64::MAX))
}

fn incident(incident: &Incident, look: Look) -> String {
    let what = format!("{}; since {}", incident.what, fine(incident.since_ms_ago));
    let path = crate::words::clean(&incident.path);
    labelled(&path, &what, Tone::Bad, 2, look) + &labelled("do", &incident.remedy, Tone::Plain, 4, look)
}

#[cfg(test)]
mod tests {
    use super::super::samples::{good, pending, troubled};
    use super::*;
    use crate::words::width;
    use std::path::PathBuf;

    const WIDTHS: [usize; 2] = [100, 40];

    /// After a wanted change: `CVM_WRITE_PAGES=1 cargo test -p cvm pages`, and read the difference.
    #[test]
    fn pages_are_as_they_were_promised() {
        for (name, status) in [("good", good()), ("pending", pending()), ("troubled", troubled())] {
            for width in WIDTHS {
                let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
                    .join(format!("src/storage/pages/{name}-{width}.txt"));
                let text = page(&status, Look::plain(width));
                if std::env::var_os("CVM_WRITE_PAGES").is_some() {
                    std::fs::write(&path, &text).unwrap();
                }
                let promised = std::fs::read_to_string(&path).unwrap();
                assert_eq!(text, promised, "{}:\n{text}", path.display());
            }
        }
    }

    #[test]
    fn no_width_breaks_a_page_and_nothing_in_it_steers_a_terminal() {
        for status in [good(), pending(), troubled()] {
            for columns in 30..200 {
                let text = page(&status, Look::plain(columns));
                let too_wide = text.lines().find(|line| width(line) > columns);
                assert_eq!(too_wide, None, "at {columns}");
                assert!(!text.contains('\x1b'));
            }
        }
    }

    #[test]
    fn every_phase_has_its_advice() {
        let with = |phase: &str| StorageStatus { phase: phase.into(), ..good() };
        let held = StorageStatus { held_by: Some("b81d".into()), ..with("waiting") };
        let old = StorageStatus { oldest_unreplicated_ms: Some(OLD_MS), ..pending() };
        let stuck = StorageStatus { last_error: Some("403".into()), ..old.clone() };
        let looked = StorageStatus { incidents: troubled().incidents, ..good() };
        let table = [
            (good(), "nothing", false),
            (pending(), "nothing; it is pushed", false),
            (old, "`cvm storage flush` pushes now", true),
            (stuck, "mend the last error", true),
            (looked, "look at the incidents", true),
            (with("opening"), "wait: ", false),
            (with("restoring"), "wait: ", false),
            (with("waiting"), "wait: ", false),
            (held, "wait until the other instance", false),
            (with("draining"), "wait: do not destroy", true),
            (with("fenced"), "end one of the two", true),
            (with("refused"), "mend or decide what is said below", true),
            (with("levitating"), "`cvm doctor`", true),
        ];
        for (status, begins, urgent) in table {
            let (words, is_urgent) = advice(&status);
            assert!(words.starts_with(begins), "{}: {words}", status.phase);
            assert_eq!(is_urgent, urgent, "{}", status.phase);
        }
    }

    #[test]
    fn only_ready_without_incidents_is_good() {
        assert!(is_good(&good()) && is_good(&pending()));
        assert!(!is_good(&StorageStatus { incidents: troubled().incidents, ..good() }));
        for phase in ["opening", "waiting", "restoring", "fenced", "refused", "draining", ""] {
            assert!(!is_good(&StorageStatus { phase: phase.into(), ..good() }), "{phase}");
        }
    }

    #[test]
    fn a_rate_is_told_when_there_is_one() {
        assert_eq!(per_day(1_440, 10_800_000), Some(11_520));
        assert_eq!(per_day(5, RATE_MS_MIN - 1), None);
        assert_eq!(per_day(0, DAY_MS), Some(0));
        assert_eq!(per_day(u64::MAX, RATE_MS_MIN), Some(u64::MAX));
    }
}
