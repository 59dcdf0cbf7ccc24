//! How long to wait before the next try: doubled each time, up to a limit.

use std::time::Duration;

pub(crate) struct Backoff {
    next: Duration,
    most: Duration,
}

impl Backoff {
    pub(crate) fn new(first: Duration, most: Duration) -> Self {
        Self { next: first, most }
    }

    /// The contract's: 1 s doubling to 30 s.
    pub(crate) fn of_contract() -> Self {
        Self::new(Duration::from_secs(1), Duration::from_secs(30))
    }

    pub(crate) fn next(&mut self) -> Duration {
        let wait = self.next;
        self.next = (self.next * 2).min(self.most);
        jittered(wait)
    }
}

/// Between four fifths and the whole of a span, so that clients that failed together do not try together.
pub(crate) fn jittered(span: Duration) -> Duration {
    let mut byte = [0u8; 1];
    // Without random numbers it is the whole.
    let _ = getrandom::fill(&mut byte);
    let [byte] = byte;
    span.saturating_sub(span / 5 * u32::from(byte) / 255)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_their_limit() {
        let mut backoff = Backoff::of_contract();
        for wanted in [1, 2, 4, 8, 16, 30, 30] {
            let (wait, wanted) = (backoff.next(), Duration::from_secs(wanted));
            assert!(wait <= wanted && wait >= wanted * 4 / 5, "{wait:?} {wanted:?}");
        }
    }
}
