//! The mux-server's public keys, kept in memory by one task, which alone fetches them.
//!
//! Whoever meets an unknown key asks for a refresh and looks again after it. A stranger who hangs up
//! stops no fetch, since none of those who wait is the one that fetches.

use crate::backoff::{Backoff, jittered};
use cvm_mux_contract::token::KeySet;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// Longer than a fetch takes.
const REFRESH_TIME: Duration = Duration::from_secs(6);

pub(crate) struct KeyCache {
    /// From a fetch to the next one because of an unknown key.
    between: Duration,
    /// From a fetch to the next one anyway.
    every: Duration,
    state: watch::Sender<State>,
    wanted: Notify,
}

#[derive(Clone)]
struct State {
    keys: Arc<KeySet>,
    /// Fetches that have ended.
    fetches: u64,
    /// When an unknown key may cause the next fetch; none during one.
    next_at: Option<Instant>,
}

impl KeyCache {
    pub(crate) fn new(between: Duration, every: Duration) -> Self {
        let state = watch::Sender::new(State { keys: Arc::default(), fetches: 0, next_at: None });
        Self { between, every, state, wanted: Notify::new() }
    }

    pub(crate) fn keys(&self) -> Arc<KeySet> {
        Arc::clone(&self.state.borrow().keys)
    }

    /// Fetches again and again: soon after a failure, when an unknown key may cause it, and at the
    /// latest when the keys have become old.
    pub(crate) async fn keep<A: Future<Output = Result<KeySet, String>>>(
        &self,
        fetch: impl Fn() -> A,
        failed: impl Fn(String),
    ) {
        let mut backoff = Backoff::of_contract();
        loop {
            let (keys, pause, wait) = match fetch().await {
                Ok(keys) => {
                    backoff = Backoff::of_contract();
                    (Some(Arc::new(keys)), self.between, jittered(self.every))
                }
                Err(why) => {
                    failed(why);
                    let wait = backoff.next();
                    (None, wait, wait)
                }
            };
            self.state.send_modify(|state| {
                state.fetches += 1;
                state.next_at = Some(Instant::now() + pause);
                if let Some(keys) = keys {
                    state.keys = keys;
                }
            });
            tokio::select! {
                () = tokio::time::sleep(wait) => {}
                () = async {
                    tokio::time::sleep(pause).await;
                    self.wanted.notified().await;
                } => {}
            }
            self.state.send_modify(|state| state.next_at = None);
        }
    }

    /// Has the keys fetched as soon as that may be, and waits for it if that is now.
    pub(crate) async fn refresh(&self) {
        let mut state = self.state.subscribe();
        let (fetches, next_at) = {
            let state = state.borrow_and_update();
            (state.fetches, state.next_at)
        };
        if next_at.is_some() {
            self.wanted.notify_one();
        }
        if next_at.is_none_or(|at| at <= Instant::now()) {
            let next = state.wait_for(|state| state.fetches > fetches);
            let _ = tokio::time::timeout(REFRESH_TIME, next).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Semaphore;

    const LONG: Duration = Duration::from_secs(3600);

    /// Counts the fetches; each takes one of the answers that there are.
    struct Server {
        asked: AtomicUsize,
        answers: Semaphore,
        fails: AtomicUsize,
    }

    fn start(between: Duration, answers: usize, fails: usize) -> (Arc<KeyCache>, Arc<Server>) {
        let cache = Arc::new(KeyCache::new(between, LONG));
        let server = Arc::new(Server {
            asked: AtomicUsize::new(0),
            answers: Semaphore::new(answers),
            fails: AtomicUsize::new(fails),
        });
        let (keeper, its) = (Arc::clone(&cache), Arc::clone(&server));
        tokio::spawn(async move {
            let answer = async |its: Arc<Server>| {
                its.asked.fetch_add(1, Ordering::SeqCst);
                its.answers.acquire().await.unwrap().forget();
                let fails = its.fails.load(Ordering::SeqCst);
                its.fails.store(fails.saturating_sub(1), Ordering::SeqCst);
                if fails > 0 { Err("not now".to_owned()) } else { Ok(KeySet::default()) }
            };
            keeper.keep(|| answer(Arc::clone(&its)), |_| {}).await;
        });
        (cache, server)
    }

    fn test(body: impl Future<Output = ()>) {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(body);
    }

    async fn asked(server: &Server, times: usize) {
        while server.asked.load(Ordering::SeqCst) < times {
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn a_stranger_who_hangs_up_stops_no_fetch() {
        test(async {
            let (cache, server) = start(Duration::ZERO, 1, 0);
            cache.refresh().await;
            let stranger = tokio::spawn({
                let cache = Arc::clone(&cache);
                async move { cache.refresh().await }
            });
            asked(&server, 2).await;
            stranger.abort();
            assert!(stranger.await.unwrap_err().is_cancelled());
            // Who comes now waits for the same fetch, which succeeds.
            let mut fetches = cache.state.subscribe();
            server.answers.add_permits(1);
            fetches.wait_for(|state| state.fetches == 2).await.unwrap();
            assert_eq!(server.asked.load(Ordering::SeqCst), 2);
        });
    }

    #[test]
    fn unknown_keys_cause_no_second_fetch_before_its_time() {
        test(async {
            let (cache, server) = start(LONG, 100, 0);
            for _ in 0..100 {
                cache.refresh().await;
            }
            assert_eq!(server.asked.load(Ordering::SeqCst), 1);
        });
    }

    #[test]
    fn a_fetch_that_failed_is_repeated_soon() {
        test(async {
            let (cache, server) = start(LONG, 100, 1);
            cache.refresh().await;
            asked(&server, 2).await;
        });
    }
}
