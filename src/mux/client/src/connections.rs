//! The limit of connections. A stranger, who has shown no good token yet, makes room for the next one.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

const CONNECTIONS_MAX: usize = 512;

#[derive(Default)]
pub(crate) struct ConnectionLimit {
    next: AtomicU64,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    count: usize,
    /// In the order in which they came.
    strangers: BTreeMap<u64, Arc<Notify>>,
}

/// One connection, which counts until it is dropped.
pub(crate) struct Connection {
    limit: Arc<ConnectionLimit>,
    number: u64,
    evicted: Arc<Notify>,
}

impl ConnectionLimit {
    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// At the limit the first stranger is evicted. None when there is no stranger.
    pub(crate) fn admit(self: &Arc<Self>) -> Option<Connection> {
        let mut open = self.open();
        if open.count >= CONNECTIONS_MAX {
            let (_, first) = open.strangers.pop_first()?;
            first.notify_one();
        }
        let (number, evicted) = (self.next.fetch_add(1, Ordering::Relaxed), Arc::new(Notify::new()));
        open.count += 1;
        open.strangers.insert(number, Arc::clone(&evicted));
        Some(Connection { limit: Arc::clone(self), number, evicted })
    }
}

impl Connection {
    /// Waits until another connection needs the place.
    pub(crate) async fn evicted(&self) {
        self.evicted.notified().await;
    }

    /// It has shown a good token.
    pub(crate) fn is_known(&self) {
        self.limit.open().strangers.remove(&self.number);
    }

    pub(crate) fn is_stranger(&self) -> bool {
        self.limit.open().strangers.contains_key(&self.number)
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        let mut open = self.limit.open();
        open.count = open.count.saturating_sub(1);
        open.strangers.remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_stranger_makes_room_and_who_is_known_stays() {
        let limit = Arc::new(ConnectionLimit::default());
        let mut all: Vec<_> = (0..CONNECTIONS_MAX).map(|_| limit.admit().unwrap()).collect();
        all[0].is_known();
        let next = limit.admit().unwrap();
        assert!(!all[1].is_stranger() && all[2].is_stranger());
        // An evicted connection counts until its task has ended.
        drop(all.remove(1));
        for connection in &all {
            connection.is_known();
        }
        next.is_known();
        assert!(limit.admit().is_none());
        drop(next);
        assert!(limit.admit().is_some());
    }
}
