//! The mux-server's keys, kept at hand by one task that alone asks for them.
//!
//! Who does not know a key says so, and looks again after the next answer. A stranger who made a
//! name up and hangs up stops nothing, since nobody's question is the one that is asked.
//!
//! Refuses to ask because of unknown names more often than once in the time that it is given.
//! May import: `backoff`, `token`.

use crate::backoff::{Backoff, jittered};
use crate::token::Keys;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// Longer than a question takes.
const PATIENCE: Duration = Duration::from_secs(6);

pub(crate) struct Keychain {
    /// Between an answer and a question because of an unknown name.
    between: Duration,
    /// So that a key that was taken back goes.
    anew: Duration,
    state: watch::Sender<State>,
    wanted: Notify,
}

#[derive(Clone)]
struct State {
    keys: Arc<Keys>,
    /// Questions that have ended.
    round: u64,
    /// When an unknown name may have them asked for; none while they are asked for.
    at: Option<Instant>,
}

impl Keychain {
    pub(crate) fn new(between: Duration, anew: Duration) -> Self {
        let state = watch::Sender::new(State { keys: Arc::default(), round: 0, at: None });
        Self { between, anew, state, wanted: Notify::new() }
    }

    pub(crate) fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.state.borrow().keys)
    }

    /// Asks, and asks again: after a failure soon, because of an unknown name when its time has come,
    /// and now and then anyway.
    pub(crate) async fn keep<A: Future<Output = Result<Keys, String>>>(
        &self,
        ask: impl Fn() -> A,
        failed: impl Fn(String),
    ) {
        let mut backoff = Backoff::of_contract();
        loop {
            let (keys, pause, wait) = match ask().await {
                Ok(keys) => {
                    backoff = Backoff::of_contract();
                    (Some(Arc::new(keys)), self.between, jittered(self.anew))
                }
                Err(why) => {
                    failed(why);
                    let wait = backoff.next();
                    (None, wait, wait)
                }
            };
            self.state.send_modify(|state| {
                state.round += 1;
                state.at = Some(Instant::now() + pause);
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
            self.state.send_modify(|state| state.at = None);
        }
    }

    /// Has them asked for as soon as it may be, and waits for it if that is now.
    pub(crate) async fn miss(&self) {
        let mut state = self.state.subscribe();
        let (round, at) = {
            let state = state.borrow_and_update();
            (state.round, state.at)
        };
        if at.is_some() {
            self.wanted.notify_one();
        }
        if at.is_none_or(|at| at <= Instant::now()) {
            let _ = tokio::time::timeout(PATIENCE, state.wait_for(|state| state.round > round)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::Semaphore;

    const LONG: Duration = Duration::from_secs(3600);

    /// How often it was asked, and how many answers there are.
    struct Server {
        asked: AtomicUsize,
        answers: Semaphore,
        fails: AtomicUsize,
    }

    fn start(between: Duration, answers: usize, fails: usize) -> (Arc<Keychain>, Arc<Server>) {
        let chain = Arc::new(Keychain::new(between, LONG));
        let server = Arc::new(Server {
            asked: AtomicUsize::new(0),
            answers: Semaphore::new(answers),
            fails: AtomicUsize::new(fails),
        });
        let (keeper, its) = (Arc::clone(&chain), Arc::clone(&server));
        tokio::spawn(async move {
            let answer = async |its: Arc<Server>| {
                its.asked.fetch_add(1, Ordering::SeqCst);
                its.answers.acquire().await.unwrap().forget();
                let fails = its.fails.load(Ordering::SeqCst);
                its.fails.store(fails.saturating_sub(1), Ordering::SeqCst);
                if fails > 0 { Err("not now".to_owned()) } else { Ok(Keys::default()) }
            };
            keeper.keep(|| answer(Arc::clone(&its)), |_| {}).await;
        });
        (chain, server)
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
    fn a_stranger_who_hangs_up_stops_no_question() {
        test(async {
            let (chain, server) = start(Duration::ZERO, 1, 0);
            chain.miss().await;
            let stranger = tokio::spawn({
                let chain = Arc::clone(&chain);
                async move { chain.miss().await }
            });
            asked(&server, 2).await;
            stranger.abort();
            assert!(stranger.await.unwrap_err().is_cancelled());
            // Who comes now waits for the same question, which is answered.
            let mut rounds = chain.state.subscribe();
            server.answers.add_permits(1);
            rounds.wait_for(|state| state.round == 2).await.unwrap();
            assert_eq!(server.asked.load(Ordering::SeqCst), 2);
        });
    }

    #[test]
    fn unknown_names_do_not_have_them_asked_for_again_before_their_time() {
        test(async {
            let (chain, server) = start(LONG, 100, 0);
            for _ in 0..100 {
                chain.miss().await;
            }
            assert_eq!(server.asked.load(Ordering::SeqCst), 1);
        });
    }

    #[test]
    fn a_question_that_failed_does_not_count_for_the_whole_time() {
        test(async {
            let (chain, server) = start(LONG, 100, 1);
            chain.miss().await;
            asked(&server, 2).await;
        });
    }
}
