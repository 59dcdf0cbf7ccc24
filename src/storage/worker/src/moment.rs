//! A moment by all clocks: what stops a machine or sets it back need not be seen by each of them.
//!
//! A clock that can be set only ever makes an answer older than it is: no span is longer because of one.
//! Imports nothing of ours.

use nix::time::{ClockId, clock_gettime};
use std::time::Duration;

/// By how much two clocks may drift apart in a span of seconds.
const DRIFT: Duration = Duration::from_secs(1);

#[derive(Debug, Clone, Copy)]
pub(crate) struct Moment {
    /// Also passes while the machine sleeps.
    pub(crate) uptime: Duration,
    awake: Duration,
    wall: Duration,
}

impl Moment {
    pub(crate) fn now() -> Self {
        let time = |clock| clock_gettime(clock).map_or(Duration::ZERO, Duration::from);
        Self {
            uptime: time(ClockId::CLOCK_BOOTTIME),
            awake: time(ClockId::CLOCK_MONOTONIC),
            wall: time(ClockId::CLOCK_REALTIME),
        }
    }

    /// Whether `now` is so soon after it, and no clock says that this machine stood still meanwhile.
    pub(crate) fn is_followed_by(self, now: Self, within: Duration) -> bool {
        let passed = now.uptime.saturating_sub(self.uptime);
        let agrees = |before: Duration, after: Duration| after.abs_diff(before + passed) < DRIFT;
        passed < within && agrees(self.awake, now.awake) && agrees(self.wall, now.wall)
    }

    /// What no other moment has, here or on a copy of this machine.
    pub(crate) fn bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        for (place, time) in bytes.chunks_mut(16).zip([self.uptime, self.wall]) {
            place.copy_from_slice(&time.as_nanos().to_le_bytes());
        }
        bytes
    }

    #[cfg(test)]
    pub(crate) fn earlier(self, by: Duration) -> Self {
        let [uptime, awake, wall] =
            [self.uptime, self.awake, self.wall].map(|clock| clock.saturating_sub(by));
        Self { uptime, awake, wall }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WITHIN: Duration = Duration::from_secs(5);

    #[test]
    fn a_word_is_not_believed_when_a_clock_says_that_the_machine_stood_still() {
        let at = |uptime, awake, wall| {
            let [uptime, awake, wall] = [uptime, awake, wall].map(Duration::from_secs);
            Moment { uptime, awake, wall }
        };
        let told = at(100, 90, 5000);
        let within = |now| told.is_followed_by(now, WITHIN);
        assert!(within(at(104, 94, 5004)));
        assert!(!within(at(105, 95, 5005)), "too long ago");
        assert!(!within(at(104, 91, 5004)), "it slept");
        assert!(!within(at(101, 91, 9000)), "it was resumed, and somebody has set its clock");
        assert!(!within(at(101, 91, 4000)), "or set it back");
    }
}
