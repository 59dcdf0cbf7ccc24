//! How long to wait before the next try: first wait, doubling, a cap, and the run that
//! earns a fresh start.
//!
//! One with a first wait above its cap cannot be built.

use std::time::Duration;

/// A checked restart policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    reset_after: Duration,
}

impl Backoff {
    /// `None` when the first wait is longer than the cap.
    pub const fn new(first: Duration, cap: Duration, reset_after: Duration) -> Option<Self> {
        if first.as_nanos() > cap.as_nanos() {
            return None;
        }
        Some(Self { first, cap, reset_after })
    }

    /// The same in whole seconds, for tables. A first wait above the cap is cut to it.
    pub const fn seconds(first: u64, cap: u64, reset_after: u64) -> Self {
        let first = if first > cap { cap } else { first };
        Self {
            first: Duration::from_secs(first),
            cap: Duration::from_secs(cap),
            reset_after: Duration::from_secs(reset_after),
        }
    }

    /// The wait after `failures` failures in a row, counted from one.
    pub fn wait(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.first.saturating_mul(1 << doublings).min(self.cap)
    }

    /// Whether a run of this length was healthy enough to forget the failures before it.
    pub fn forgives(&self, run: Duration) -> bool {
        run >= self.reset_after
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_documented_defaults_wait_5_10_20_40_60_60() {
        let b = Backoff::seconds(5, 60, 600);
        let waits: Vec<u64> = (1..=6).map(|n| b.wait(n).as_secs()).collect();
        assert_eq!(waits, [5, 10, 20, 40, 60, 60]);
    }

    #[test]
    fn a_run_of_exactly_reset_after_is_forgiven_and_one_millisecond_less_is_not() {
        let b = Backoff::seconds(5, 60, 600);
        assert!(b.forgives(Duration::from_secs(600)));
        assert!(!b.forgives(Duration::from_millis(599_999)));
    }

    #[test]
    fn a_first_wait_above_the_cap_cannot_be_built() {
        assert!(Backoff::new(Duration::from_secs(2), Duration::from_secs(1), Duration::ZERO).is_none());
    }

    proptest! {
        #[test]
        fn waits_stay_within_their_bounds_and_never_shrink(first in 0u64..1000, more in 0u64..100_000, n in 1u32..10_000) {
            let b = Backoff::seconds(first, first + more, 1);
            prop_assert!(b.wait(n) >= Duration::from_secs(first));
            prop_assert!(b.wait(n) <= Duration::from_secs(first + more));
            prop_assert!(b.wait(n + 1) >= b.wait(n));
        }
    }
}
