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
    frozen: Option<Freeze>,
}

/// Somebody has the clock stand still, for so long at most: whoever froze it may be gone.
#[derive(Debug, Clone, Copy)]
struct Freeze {
    since: Duration,
    until: Duration,
}

impl AwakeClock {
    pub fn moment(&self, now: Duration) -> Moment {
        let awake = self.frozen.map_or(now, |frozen| frozen.since).saturating_sub(self.stood_still);
        Moment::from_millis(u64::try_from(awake.as_millis()).unwrap_or(u64::MAX))
    }

    /// When a moment comes; none while the clock is frozen.
    pub fn due(&self, moment: Moment) -> Option<Duration> {
        let awake = Duration::from_millis(moment.as_millis());
        self.frozen.is_none().then(|| awake.saturating_add(self.stood_still))
    }

    /// A wait that began at `began` and should have ended at `due` has ended. Returns the pause, if there was one.
    ///
    /// The whole wait does not count then. When in it the pause began nobody knows, and whoever was waited for gets
    /// the time again that was left for an answer.
    pub fn woke(&mut self, began: Duration, due: Option<Duration>, now: Duration) -> Option<Duration> {
        let due = due.filter(|_| self.frozen.is_none())?;
        if now.saturating_sub(due) < STOOD_STILL {
            return None;
        }
        let pause = now.saturating_sub(began);
        self.stood_still += pause;
        Some(pause)
    }

    /// Before a pause that is known: from now on no time passes, for so long at most.
    pub fn freeze(&mut self, now: Duration, at_most: Duration) {
        self.frozen.get_or_insert(Freeze { since: now, until: now + at_most });
    }

    /// When a frozen clock goes on by itself.
    pub fn thaws_at(&self) -> Option<Duration> {
        self.frozen.map(|frozen| frozen.until)
    }

    /// Returns how long it was frozen, if it was.
    pub fn thaw(&mut self, now: Duration) -> Option<Duration> {
        let pause = now.saturating_sub(self.frozen.take()?.since);
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
        assert_eq!(clock.woke(s(9), Some(s(10)), s(14)), None, "a busy machine");
        assert_eq!(clock.moment(s(14)), Moment::from_millis(14_000));
        // It waited for something that was due in five seconds, and slept for an hour.
        assert_eq!(clock.woke(s(15), Some(s(20)), s(3_620)), Some(s(3_605)));
        assert_eq!(clock.moment(s(3_620)), Moment::from_millis(15_000));
        assert_eq!(clock.due(Moment::from_millis(20_000)), Some(s(3_625)), "five seconds after it woke");
        assert_eq!(clock.woke(s(3_630), None, s(9_000)), None, "nothing was due, so nothing was missed");
    }

    #[test]
    fn while_it_is_frozen_no_time_passes_and_nothing_is_due() {
        let mut clock = AwakeClock::default();
        clock.freeze(s(10), s(600));
        clock.freeze(s(20), s(9_000));
        assert_eq!(clock.thaws_at(), Some(s(610)), "the first word counts");
        assert_eq!(
            (clock.moment(s(500)), clock.due(Moment::from_millis(0))),
            (Moment::from_millis(10_000), None)
        );
        assert_eq!(clock.woke(s(10), Some(s(11)), s(500)), None, "the pause is counted once");
        assert_eq!(clock.thaw(s(510)), Some(s(500)));
        assert_eq!(clock.moment(s(511)), Moment::from_millis(11_000));
        assert_eq!((clock.thaw(s(512)), clock.thaws_at()), (None, None));
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
                    0 => clock.freeze(now, s(50)),
                    1 => drop(clock.thaw(now)),
                    2 => drop(clock.woke(before, Some(before), now)),
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
