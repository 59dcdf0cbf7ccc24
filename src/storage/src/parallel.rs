//! The same work on many things at once, in threads that end before the call does.
//!
//! Imports nothing of ours.

use std::sync::{Mutex, PoisonError};

/// Does `work` on each item, `most` at a time, and yields what came of it in no order.
pub(crate) fn each<T: Send, R: Send>(items: Vec<T>, most: usize, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    if items.len() <= 1 {
        return items.into_iter().map(work).collect();
    }
    let threads = most.min(items.len());
    let items = Mutex::new(items.into_iter());
    let results = Mutex::new(Vec::new());
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(item) = next() {
                    let result = work(item);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}
