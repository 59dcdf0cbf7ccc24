//! Defects of the supervisor itself. A panic is caught, and its place in the source is kept for
//! the log: the default hook would write it to standard error, which may be a pipe that is full.
//!
//! The words of a panic are left out. They may quote what the supervisor was working on.

use std::cell::{Cell, RefCell};
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    /// How many calls of [`caught`] this thread is in.
    static DEPTH: Cell<u32> = const { Cell::new(0) };
    static PLACE: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs `work`. When it panics, the error is the place.
pub(crate) fn caught<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(remember_places);
    DEPTH.set(DEPTH.get() + 1);
    let outcome = catch_unwind(AssertUnwindSafe(work));
    DEPTH.set(DEPTH.get() - 1);
    outcome.map_err(|_| PLACE.take().unwrap_or_else(|| "an unknown place".to_owned()))
}

fn remember_places() {
    let default = take_hook();
    set_hook(Box::new(move |panic| {
        if DEPTH.get() == 0 {
            return default(panic);
        }
        let place = panic.location().map(|at| format!("{}:{}", at.file(), at.line()));
        PLACE.replace(place);
    }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_told_by_its_place_and_not_by_its_words() {
        let place = caught(|| panic!("a secret")).unwrap_err();
        assert!(place.starts_with("src/supervisor/init/src/defect.rs:"), "{place}");
        assert_eq!(caught(|| 4711), Ok(4711));
    }

    #[test]
    fn a_panic_inside_another_catch_is_told_once() {
        let outer = caught(|| caught(|| panic!("inside")).is_err());
        assert_eq!(outer, Ok(true));
        assert!(PLACE.take().is_none());
    }
}
