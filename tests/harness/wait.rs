//! Waiting for a condition, never for a time; and for one's turn.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Between two looks: this at least, and [`SHARE`] times as long as the last one took, so that a look
/// which runs a program leaves the processor to what it waits for.
const PAUSE: Duration = Duration::from_millis(5);
const SHARE: u32 = 4;
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

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
        let began = Instant::now();
        let found = look();
        if found.is_some() || Instant::now() >= deadline {
            return found;
        }
        std::thread::sleep((SHARE * began.elapsed()).clamp(PAUSE, LONGEST_PAUSE));
    }
}

/// For tests that go one after the other. Each holds its turn to its end.
#[derive(Default)]
pub struct Turns(Mutex<()>);

impl Turns {
    pub const fn new() -> Self {
        Self(Mutex::new(()))
    }

    pub fn take(&self) -> MutexGuard<'_, ()> {
        lock(&self.0)
    }
}

/// Whatever became of those who held it before.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
