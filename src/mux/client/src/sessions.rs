//! The order of the work: the events of one session one after the other, different sessions beside each
//! other.
//!
//! A panic in the work on an event costs this event alone. It is tried again a few times, and then the
//! session goes on with the next one.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;

/// The program is stopping: events that are not done go on in its next run.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stopping;

pub(crate) trait Work: Send + Sync + 'static {
    /// Works on one event to its end.
    fn process(&self, seq: i64, size: u64) -> impl Future<Output = Result<(), Stopping>> + Send;
    /// A panic has ended the work on this event, so many times in a row. Returns whether the event ends
    /// here; otherwise it is worked on again.
    fn panicked(&self, seq: i64, times: u32) -> impl Future<Output = Result<bool, Stopping>> + Send;
    fn is_stopping(&self) -> bool;
}

#[derive(Default)]
struct Session {
    /// Numbers and sizes of the events that are not done.
    open: BTreeMap<i64, u64>,
    is_worked_on: bool,
}

#[derive(Default)]
pub(crate) struct Sessions {
    /// The sessions that have events which are not done.
    all: Mutex<HashMap<String, Session>>,
    events: AtomicU64,
    bytes: AtomicU64,
    workers: AtomicUsize,
    worker_ended: Notify,
    changed: Notify,
}

impl Sessions {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Session>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many events are not done.
    pub(crate) fn events(&self) -> u64 {
        self.events.load(Ordering::Relaxed)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// To be called when an event has come a step further.
    pub(crate) fn notify_change(&self) {
        self.changed.notify_one();
    }

    /// Waits until an event has come, or come a step further.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Takes an event that is in the queue. An event that is here already keeps its place.
    pub(crate) fn push<W: Work>(self: &Arc<Self>, work: &Arc<W>, seq: i64, name: String, size: u64) {
        let mut all = self.all();
        let session = all.entry(name.clone()).or_default();
        let is_new = match session.open.entry(seq) {
            Entry::Vacant(place) => {
                place.insert(size);
                true
            }
            Entry::Occupied(_) => false,
        };
        let was_worked_on = std::mem::replace(&mut session.is_worked_on, true);
        drop(all);
        if is_new {
            self.events.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(size, Ordering::Relaxed);
            self.notify_change();
        }
        if !was_worked_on {
            self.workers.fetch_add(1, Ordering::Relaxed);
            let (worker, work) = (Worker { sessions: Arc::clone(self), name }, Arc::clone(work));
            tokio::spawn(async move { worker.work_through(&work).await });
        }
    }

    /// Waits until nothing is worked on any more, which after the order to stop is soon.
    pub(crate) async fn finished(&self) {
        while self.workers.load(Ordering::Relaxed) > 0 {
            self.worker_ended.notified().await;
        }
    }
}

/// Works on one session alone, and gives it back however it ends.
struct Worker {
    sessions: Arc<Sessions>,
    name: String,
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(session) = self.sessions.all().get_mut(&self.name) {
            session.is_worked_on = false;
        }
        self.sessions.workers.fetch_sub(1, Ordering::Relaxed);
        self.sessions.worker_ended.notify_one();
    }
}

impl Worker {
    /// The first event of the session; a session without one is forgotten.
    fn next(&self) -> Option<(i64, u64)> {
        let mut all = self.sessions.all();
        let next = all.get(&self.name)?.open.first_key_value().map(|(seq, size)| (*seq, *size));
        if next.is_none() {
            all.remove(&self.name);
        }
        next
    }

    fn done(&self, seq: i64) {
        let Some(size) = self.sessions.all().get_mut(&self.name).and_then(|s| s.open.remove(&seq)) else {
            return;
        };
        self.sessions.events.fetch_sub(1, Ordering::Relaxed);
        self.sessions.bytes.fetch_sub(size, Ordering::Relaxed);
        self.sessions.notify_change();
    }

    async fn work_through<W: Work>(&self, work: &Arc<W>) {
        let mut panics = 0;
        while let Some((seq, size)) = self.next() {
            if work.is_stopping() {
                return;
            }
            let its = Arc::clone(work);
            // A task of its own: a panic in it ends there, and gives back all that it held.
            let outcome = tokio::spawn(async move { its.process(seq, size).await }).await;
            let is_done = if let Ok(outcome) = outcome {
                outcome.map(|()| true)
            } else {
                panics += 1;
                work.panicked(seq, panics).await
            };
            match is_done {
                Ok(true) => {
                    panics = 0;
                    self.done(seq);
                }
                Ok(false) => {}
                Err(Stopping) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Records what it does, and panics at odd events as often as it is told to.
    #[derive(Default)]
    struct Clumsy {
        did: Mutex<Vec<i64>>,
        falls: AtomicUsize,
        /// Whether it panics when it is told of a panic, too.
        is_hopeless: bool,
    }

    impl Work for Clumsy {
        async fn process(&self, seq: i64, _: u64) -> Result<(), Stopping> {
            self.did.lock().unwrap().push(seq);
            tokio::task::yield_now().await;
            let falls = self.falls.load(Ordering::Relaxed);
            if seq % 2 == 1 && falls > 0 {
                self.falls.store(falls - 1, Ordering::Relaxed);
                panic!("a bug");
            }
            Ok(())
        }

        async fn panicked(&self, _: i64, times: u32) -> Result<bool, Stopping> {
            assert!(!self.is_hopeless, "another bug");
            Ok(times >= 3)
        }

        fn is_stopping(&self) -> bool {
            false
        }
    }

    fn work(
        falls: usize,
        is_hopeless: bool,
        events: &[(i64, &str)],
    ) -> (Vec<i64>, Arc<Sessions>, Arc<Clumsy>) {
        let clumsy = Arc::new(Clumsy { falls: AtomicUsize::new(falls), is_hopeless, ..Clumsy::default() });
        let sessions = Arc::new(Sessions::default());
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            for (seq, session) in events {
                sessions.push(&clumsy, *seq, (*session).to_owned(), 10);
            }
            sessions.finished().await;
        });
        let did = clumsy.did.lock().unwrap().clone();
        (did, sessions, clumsy)
    }

    #[test]
    fn a_session_is_worked_through_in_order_and_forgotten() {
        let (did, sessions, _) = work(0, false, &[(2, "s"), (4, "s"), (2, "s"), (6, "t")]);
        assert_eq!((did.len(), sessions.events(), sessions.bytes()), (3, 0, 0));
        let of_s: Vec<i64> = did.into_iter().filter(|seq| *seq < 6).collect();
        assert_eq!(of_s, [2, 4]);
        assert!(sessions.all().is_empty());
    }

    #[test]
    fn a_panic_is_tried_again_and_the_session_goes_on() {
        let (did, sessions, _) = work(1, false, &[(1, "s"), (2, "s")]);
        assert_eq!((did, sessions.events()), (vec![1, 1, 2], 0));
    }

    #[test]
    fn an_event_that_always_panics_ends_and_the_session_goes_on() {
        let (did, sessions, _) = work(100, false, &[(1, "s"), (2, "s")]);
        assert_eq!((did, sessions.events(), sessions.bytes()), (vec![1, 1, 1, 2], 0, 0));
    }

    #[test]
    fn a_worker_that_dies_gives_its_session_back_to_the_next_event() {
        let (did, sessions, clumsy) = work(1, true, &[(1, "s"), (2, "s")]);
        assert_eq!((did, sessions.events()), (vec![1], 2));
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
            sessions.push(&clumsy, 4, "s".to_owned(), 10);
            sessions.finished().await;
        });
        assert_eq!(*clumsy.did.lock().unwrap(), [1, 1, 2, 4]);
        assert_eq!((sessions.events(), sessions.bytes()), (0, 0));
    }
}
