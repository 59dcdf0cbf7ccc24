//! Writes spans and moments for people and logs.
//!
//! Written by hand: PID 1 needs only a moment for each line of its log. The crate `jiff` consists mostly of time
//! zones, parsing and calendars. The words for spans are our own.

use std::time::Duration;

/// A span in the words people use: `8 s`, `2 min 5 s`, `3 h 12 min`, `4 d 1 h`.
pub fn words(span: Duration) -> String {
    let s = span.as_secs();
    match s {
        0 => format!("{} ms", span.as_millis()),
        1..60 => format!("{s} s"),
        60..3600 if s.is_multiple_of(60) => format!("{} min", s / 60),
        60..3600 => format!("{} min {} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {} min", s / 3600, s % 3600 / 60),
        _ => format!("{} d {} h", s / 86_400, s % 86_400 / 3600),
    }
}

/// A moment of the wall clock, given in milliseconds since 1970, in UTC and in the form of RFC 3339.
pub fn rfc3339(unix_ms: u64) -> String {
    let (days, ms) = (unix_ms / 86_400_000, unix_ms % 86_400_000);
    let (year, month, day) = civil(days);
    let (h, m, s) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{:03}Z", ms % 1000)
}

/// Days since 1970 as a date of the Gregorian calendar. Years are counted from March, so that
/// the leap day is a year's last and every month has its length from one formula.
fn civil(days: u64) -> (u64, u64, u64) {
    let days = days + 719_468; // since 0000-03-01
    let (era, of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let day_of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_right_around_leap_days_and_centuries() {
        let told = [0, 951_782_400_000, 1_709_164_800_123, 1_795_219_199_999, 4_107_542_400_000].map(rfc3339);
        assert_eq!(
            told,
            [
                "1970-01-01T00:00:00.000Z",
                "2000-02-29T00:00:00.000Z",
                "2024-02-29T00:00:00.123Z",
                "2026-11-20T23:59:59.999Z",
                "2100-03-01T00:00:00.000Z",
            ]
        );
    }

    #[test]
    fn spans_read_as_people_say_them() {
        let told = [0, 59, 60, 125, 7_320, 90_000].map(|s| words(Duration::from_secs(s)));
        assert_eq!(told, ["0 ms", "59 s", "1 min", "2 min 5 s", "2 h 2 min", "1 d 1 h"]);
    }
}
