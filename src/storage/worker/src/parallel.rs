//! The same work on many things at once, in threads that end before the call does.
//!
//! Work on the merged tree is done *apart*: such a thread may wait for our own mount, and so must
//! not hold what the mount is served by: see `cvm_sys::descriptor::own_table`. It has none of
//! the worker's descriptors: no index, no report to PID 1, no call of Go's.

use cvm_sys::descriptor;
use std::sync::{Mutex, PoisonError};

/// Does `work` on each item, `most` at a time, and yields what came of it in no order.
pub(crate) fn each<T: Send, R: Send>(items: Vec<T>, most: usize, work: impl Fn(T) -> R + Sync) -> Vec<R> {
    if items.len() <= 1 {
        return items.into_iter().map(work).collect();
    }
    run(items, most, || {}, work)
}

/// The same, apart.
pub(crate) fn each_apart<T: Send, R: Send>(
    items: Vec<T>,
    most: usize,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    run(items, most, set_apart, work)
}

/// One piece of work, apart.
pub(crate) fn apart<R: Send>(work: impl FnOnce() -> R + Send) -> R {
    let done = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            set_apart();
            work()
        });
        thread.join()
    });
    // Its panic is ours.
    done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// A kernel before 5.9 cannot close them all at once: then only the table is its own, and a
/// worker that is killed may have to be helped by `/sys/fs/fuse/connections`.
pub(crate) fn set_apart() {
    if let Err(error) = descriptor::own_table() {
        tracing::debug!("no table of descriptors apart: {}", error.desc());
    }
}

fn run<T: Send, R: Send>(
    items: Vec<T>,
    most: usize,
    before: impl Fn() + Sync,
    work: impl Fn(T) -> R + Sync,
) -> Vec<R> {
    let threads = most.min(items.len());
    let items = Mutex::new(items.into_iter());
    let results = Mutex::new(Vec::new());
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                before();
                while let Some(item) = next() {
                    let result = work(item);
                    results.lock().unwrap_or_else(PoisonError::into_inner).push(result);
                }
            });
        }
    });
    results.into_inner().unwrap_or_else(PoisonError::into_inner)
}
