//! What has been tried with one event since the program started, and when it is tried again.

use crate::backoff::Backoff;
use std::time::{Duration, Instant};

/// The body of a large event has more bytes than this.
const LARGE_BYTES: u64 = 256 * 1024;
/// A run that goes on failing for this long would hold up its chat for ever.
const FAILING_MAX: Duration = Duration::from_secs(15 * 60);
/// At least so many runs must have failed: the gateway may have been away in between.
const FAILURES_MIN: u32 = 3;
/// A refusal may be of a moment in which a configuration is written.
const REFUSALS_MAX: u32 = 3;
/// An answer at which the mux-server has failed for this long will not be taken.
const UNSENDABLE: Duration = Duration::from_secs(24 * 3600);

pub(crate) struct Attempts {
    /// The event is large or has attachments.
    pub(crate) is_heavy: bool,
    /// The gateway was away at the last try.
    pub(crate) was_away: bool,
    /// The gateway has refused the pictures.
    pub(crate) without_pictures: bool,
    pub(crate) failures: u32,
    failing_since: Option<Instant>,
    refusals: u32,
    unsent_since: Option<Instant>,
    away: Backoff,
    failing: Backoff,
    sending: Backoff,
}

pub(crate) fn is_large(size: u64) -> bool {
    size > LARGE_BYTES
}

/// A gateway that is away usually restarts, and is back soon.
pub(crate) fn until_gateway_is_back() -> Backoff {
    Backoff::new(Duration::from_millis(500), Duration::from_secs(5))
}

impl Attempts {
    pub(crate) fn new(is_heavy: bool) -> Self {
        Self {
            is_heavy,
            was_away: false,
            without_pictures: false,
            failures: 0,
            failing_since: None,
            refusals: 0,
            unsent_since: None,
            away: until_gateway_is_back(),
            failing: Backoff::new(Duration::from_secs(2), Duration::from_secs(60)),
            sending: Backoff::of_contract(),
        }
    }

    /// The gateway was away. Asking again costs more for a heavy event.
    pub(crate) fn wait_for_gateway(&mut self) -> Duration {
        if self.is_heavy { self.failing.next() } else { self.away.next() }
    }

    /// A run has failed. None when it has failed for good.
    pub(crate) fn wait_after_failure(&mut self) -> Option<Duration> {
        self.failures += 1;
        let since = *self.failing_since.get_or_insert_with(Instant::now);
        let for_good = self.failures >= FAILURES_MIN && since.elapsed() >= FAILING_MAX;
        (!for_good).then(|| self.failing.next())
    }

    /// The gateway has refused the message. None when it has done so for good.
    pub(crate) fn wait_after_refusal(&mut self) -> Option<Duration> {
        self.refusals += 1;
        (self.refusals < REFUSALS_MAX).then(|| self.failing.next())
    }

    /// Nobody knows whether a part has arrived.
    pub(crate) fn wait_to_send(&mut self, at_least: Option<Duration>) -> Duration {
        self.sending.next().max(at_least.unwrap_or_default())
    }

    /// The mux-server has failed at a part. None when it has done so for too long.
    pub(crate) fn wait_after_unsent(&mut self, at_least: Option<Duration>, now: Instant) -> Option<Duration> {
        let since = *self.unsent_since.get_or_insert(now);
        (now.duration_since(since) < UNSENDABLE).then(|| self.wait_to_send(at_least))
    }

    pub(crate) fn has_sent(&mut self) {
        self.unsent_since = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_mux_server_fails_at_is_tried_for_a_day() {
        let (mut attempts, now) = (Attempts::new(false), Instant::now());
        assert!(attempts.wait_after_unsent(None, now).is_some());
        assert!(attempts.wait_after_unsent(None, now + UNSENDABLE / 2).is_some());
        assert!(attempts.wait_after_unsent(None, now + UNSENDABLE).is_none());
        attempts.has_sent();
        assert!(attempts.wait_after_unsent(None, now + 2 * UNSENDABLE).is_some());
    }

    #[test]
    fn a_run_that_failed_a_few_times_in_a_short_time_is_tried_again() {
        let mut attempts = Attempts::new(false);
        for _ in 0..10 {
            assert!(attempts.wait_after_failure().is_some());
        }
        attempts.failing_since = Instant::now().checked_sub(FAILING_MAX);
        assert!(attempts.wait_after_failure().is_none());
        // The gateway may have been away for all that time.
        attempts.failures = 1;
        assert!(attempts.wait_after_failure().is_some());
    }
}
