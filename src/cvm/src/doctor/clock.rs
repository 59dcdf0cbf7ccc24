//! Room clock: is it right? A wrong clock breaks TLS and the signatures of S3, and a CVM gets its time from
//! a host that it does not trust.
//!
//! Three rules can be checked from inside without a second source: the time is not earlier than this
//! program, not earlier than the newest line of a log, and close to the machine's hardware clock. Only
//! adjtimex(2) tells whether the clock is synchronised, and it needs unsafe code, which is denied here.

use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::proc_files;
use crate::logs;
use crate::units;
use cvm_protocol::paths;
use cvm_protocol::time::rfc3339;
use std::path::Path;

/// 2026-11-01T00:00:00Z: this program did not exist before.
const BIRTH_MS: u64 = 1_793_491_200_000;
/// Clocks that differ by less agree well enough for TLS and S3.
const TOLERANCE_MS: u64 = 60_000;
const REMEDY: &str =
    "the time comes from the CVM's host and its time service: restart the CVM, and tell its operator";

pub(crate) fn check(checks: &mut Checks<'_>) {
    let now = units::now_ms();
    checks.run("date", || date(now));
    checks.run("never went back", || {
        let newest = logs::newest_stamp(Path::new(paths::LOGS));
        went_back(newest.as_deref(), now)
    });
    checks.run("agrees with the machine's clock", || {
        let text = proc_files::read("/sys/class/rtc/rtc0/since_epoch");
        agrees(text.and_then(|t| t.trim().parse::<u64>().ok()), units::now_ms())
    });
}

fn date(now_ms: u64) -> Outcome {
    if now_ms < BIRTH_MS {
        return fail(format!("{}: this version did not exist then", rfc3339(now_ms)), REMEDY);
    }
    ok(rfc3339(now_ms))
}

/// Both times have one format, so the order of the texts is the order of the times.
fn went_back(newest: Option<&str>, now_ms: u64) -> Outcome {
    match newest {
        Some(stamp) if *stamp > *rfc3339(now_ms + TOLERANCE_MS) => {
            warn(format!("the logs hold a line from {stamp}, which is in the future"), REMEDY)
        }
        Some(stamp) => ok(format!("the newest line of the logs is from {stamp}")),
        None => skip("there are no logs"),
    }
}

fn agrees(machine_s: Option<u64>, now_ms: u64) -> Outcome {
    let Some(machine_s) = machine_s else { return skip("the machine shows no clock") };
    let apart = machine_s.saturating_mul(1000).abs_diff(now_ms);
    if apart > TOLERANCE_MS {
        return warn(format!("they are {} apart", units::span(apart)), REMEDY);
    }
    ok("within a minute")
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_date_before_this_program_is_wrong() {
        assert!(rfc3339(BIRTH_MS).starts_with("2026-11-01T00:00:00"));
        assert_eq!(date(BIRTH_MS - 1).verdict, Verdict::Fail);
        assert_eq!(date(BIRTH_MS + 1).verdict, Verdict::Ok);
    }

    #[test]
    fn a_log_line_from_the_future_means_the_clock_went_back() {
        let at = |ms: u64| went_back(Some(&rfc3339(ms)), BIRTH_MS).verdict;
        assert_eq!(
            [at(BIRTH_MS - 5), at(BIRTH_MS + 30_000), at(BIRTH_MS + 90_000)],
            [Verdict::Ok, Verdict::Ok, Verdict::Warn]
        );
        assert_eq!(agrees(Some(BIRTH_MS / 1000 + 61), BIRTH_MS).verdict, Verdict::Warn);
        assert_eq!(agrees(Some(BIRTH_MS / 1000 - 59), BIRTH_MS).verdict, Verdict::Ok);
        assert_eq!(agrees(None, BIRTH_MS).verdict, Verdict::Skip);
    }
}
