//! `CLOCK_BOOTTIME`, which goes on while the machine sleeps and cannot be set.

use nix::time::{ClockId, clock_gettime};
use std::ops::Add;
use std::time::Duration;

/// A moment since this kernel began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootTime(Duration);

impl BootTime {
    pub fn now() -> Self {
        // Fails only if the kernel does not have this clock.
        let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map(Duration::from);
        Self(now.unwrap_or_default())
    }

    pub const fn since_the_kernel_began(span: Duration) -> Self {
        Self(span)
    }

    /// How long ago `earlier` was; zero when it lies ahead.
    pub fn saturating_duration_since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl Add<Duration> for BootTime {
    type Output = Self;

    /// Saturates: a deadline too far away to write down is never due.
    fn add(self, span: Duration) -> Self {
        Self(self.0.saturating_add(span))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_on_and_a_deadline_too_far_away_is_never_due() {
        let now = BootTime::now();
        assert!(BootTime::now() >= now && now > BootTime::since_the_kernel_began(Duration::ZERO));
        assert!(now + Duration::MAX > now);
    }
}
