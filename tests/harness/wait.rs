//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

/// Waits until `look` yields something. Panics with `what` when it never does.
#[track_caller]
pub fn until<T>(what: &str, at_most: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + at_most;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited {at_most:?} in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
