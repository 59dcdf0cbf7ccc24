//! Waiting for a condition, never for a time.

use std::time::{Duration, Instant};

/// Waits until `look` yields something. Panics with `what` when it never does.
#[track_caller]
pub fn until<T>(what: &str, at_most: Duration, look: impl FnMut() -> Option<T>) -> T {
    match before(at_most, look) {
        Some(found) => found,
        None => panic!("waited {at_most:?} in vain: {what}"),
    }
}

/// Waits until `look` yields something, for those who have more to say when it never does.
pub fn before<T>(at_most: Duration, mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let deadline = Instant::now() + at_most;
    loop {
        let found = look();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
