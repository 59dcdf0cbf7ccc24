//! The clock by which services are judged. It stands still while the machine does: a machine that was paused, or
//! put to sleep and woken, restarts nothing because of the time that nobody had.

use crate::moment::Moment;
use std::time::Duration;

/// A wait that ends this much later than it should shows that this process, and with it the machine, stood still.
/// A machine that is merely busy wakes within moments.
const STOOD_STILL: Duration = Duration::from_secs(5);

/// All arguments are spans since this process began, on a clock that goes on while the machine sleeps.
#[derive(Debug, Default)]
pub struct AwakeClock {
    /// The time that does not count.
    stood_still: Duration,
    /// Since when an operator has it stand still.
    frozen: Option<Duration>,
}

impl AwakeClock {
    pub fn moment(&self, now: Duration) -> Moment {
        let awake = self.frozen.unwrap_or(now).saturating_sub(self.stood_still);
        Moment::from_millis(u64::try_from(awake.as_millis()).unwrap_or(u64::MAX))
    }

    /// When a moment comes; none while the clock is frozen.
    pub fn due(&self, moment: Moment) -> Option<Duration> {
        let awake = Duration::from_millis(moment.as_millis());
        self.frozen.is_none().then(|| awake.saturating_add(self.stood_still))
    }

    /// A wait that should have ended at `due` has ended. Returns the pause, if there was one.
    pub fn woke(&mut self, due: Option<Duration>, now: Duration) -> Option<Duration> {
        let late = now.saturating_sub(due.filter(|_| self.frozen.is_none())?);
        if late < STOOD_STILL {
            return None;
        }
        self.stood_still += late;
        Some(late)
    }

    /// Before a pause that is known: from now on no time passes.
    pub fn freeze(&mut self, now: Duration) {
        self.frozen.get_or_insert(now);
    }

    /// Returns how long it was frozen, if it was.
    pub fn thaw(&mut self, now: Duration) -> Option<Duration> {
        let pause = now.saturating_sub(self.frozen.take()?);
        self.stood_still += pause;
        Some(pause)
    }

    pub fn is_frozen(&self) -> bool {
        self.frozen.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_pause_that_nobody_announced_is_noticed_by_a_wait_that_ends_late_and_does_not_count() {
        let mut clock = AwakeClock::default();
        assert_eq!(clock.woke(Some(s(10)), s(14)), None, "a busy machine");
        assert_eq!(clock.moment(s(14)), Moment::from_millis(14_000));
        assert_eq!(clock.woke(Some(s(20)), s(3_620)), Some(s(3_600)));
        assert_eq!(clock.moment(s(3_621)), Moment::from_millis(21_000));
        assert_eq!(clock.due(Moment::from_millis(30_000)), Some(s(3_630)), "ten seconds after the pause");
        assert_eq!(clock.woke(None, s(9_000)), None, "nothing was due, so nothing was missed");
    }

    #[test]
    fn while_it_is_frozen_no_time_passes_and_nothing_is_due() {
        let mut clock = AwakeClock::default();
        clock.freeze(s(10));
        clock.freeze(s(20));
        assert_eq!(
            (clock.moment(s(1_000)), clock.due(Moment::from_millis(0))),
            (Moment::from_millis(10_000), None)
        );
        assert_eq!(clock.woke(Some(s(11)), s(1_000)), None, "the pause is counted once");
        assert_eq!(clock.thaw(s(1_010)), Some(s(1_000)));
        assert_eq!(clock.moment(s(1_011)), Moment::from_millis(11_000));
        assert_eq!(clock.thaw(s(1_012)), None);
    }

    proptest! {
        #[test]
        fn it_never_goes_back_and_agrees_with_what_is_due(steps in proptest::collection::vec((0u64..100, 0u8..4), 0..50)) {
            let mut clock = AwakeClock::default();
            let (mut now, mut last) = (Duration::ZERO, Moment::default());
            for (seconds, what) in steps {
                let before = now;
                now += s(seconds);
                match what {
                    0 => clock.freeze(now),
                    1 => drop(clock.thaw(now)),
                    2 => drop(clock.woke(Some(before), now)),
                    _ => {}
                }
                let moment = clock.moment(now);
                prop_assert!(moment >= last, "{moment:?} after {last:?}");
                last = moment;
                if let Some(due) = clock.due(moment) {
                    prop_assert_eq!(clock.moment(due), moment);
                }
            }
        }
    }
}
