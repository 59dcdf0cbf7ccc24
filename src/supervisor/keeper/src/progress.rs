//! Signs of work during a service's start: whether its processes use the processor or a disk.

use cvm_sys::clock::BootTime;
use cvm_sys::process_work::{self, Work};
use std::time::Duration;

/// The pause between two looks, each of which walks through /proc.
const BETWEEN_LOOKS: Duration = Duration::from_secs(5);
/// A process that only waits wakes up for timers now and then; one that works takes more than this share
/// of a processor.
const IDLE_SHARE: u32 = 100;

pub(crate) struct Progress {
    seen: Work,
    at: BootTime,
}

impl Progress {
    pub(crate) fn new(now: BootTime) -> Self {
        Self { seen: Work::default(), at: now }
    }

    pub(crate) fn deadline(&self) -> BootTime {
        self.at + BETWEEN_LOOKS
    }

    /// Looks if the pause is over, and returns whether there was work since the look before.
    pub(crate) fn turn(&mut self, now: BootTime) -> bool {
        if now < self.deadline() {
            return false;
        }
        let (before, span) = (
            std::mem::replace(&mut self.seen, process_work::below()),
            now.saturating_duration_since(self.at),
        );
        self.at = now;
        has_worked(before, self.seen, span)
    }
}

fn has_worked(before: Work, after: Work, span: Duration) -> bool {
    let processor = after.processor.saturating_sub(before.processor);
    processor > span / IDLE_SHARE || after.disk_bytes > before.disk_bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hundredth_of_a_processor_is_idleness_and_any_byte_on_a_disk_is_work() {
        let ms = Duration::from_millis;
        let work = |processor, disk_bytes| Work { processor: ms(processor), disk_bytes };
        let before = work(1000, 4096);
        assert!(!has_worked(before, work(1050, 4096), ms(5000)));
        assert!(has_worked(before, work(1060, 4096), ms(5000)));
        assert!(has_worked(before, work(1000, 8192), ms(5000)));
        assert!(!has_worked(before, work(10, 0), ms(5000)), "one of its processes has ended");
    }
}
