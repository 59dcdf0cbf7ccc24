//! What we are to the mux-server: the registration and its token; and what it is to us: its keys.
//!
//! Refuses to log a token, and to ask for keys because somebody made up a name for one: an unknown
//! `kid` is asked for once a minute at most.
//! May import: `backoff`, `desk`, `http`, `keychain`, `token`.

use crate::backoff::{Backoff, jittered};
use crate::desk::{Desk, now_ms};
use crate::http::{Ask, Http};
use crate::keychain::Keychain;
use crate::token::{Keys, Refusal, verify};
use cvm_protocol::report::Level;
use hyper::{Method, Uri};
use serde::Deserialize;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use zeroize::Zeroizing;

/// What we tell the server: it gives a delivery up after this.
const INBOUND_TIMEOUT_MS: u64 = 15_000;
const TIME: Duration = Duration::from_secs(15);
const ANSWER_MAX: usize = 64 * 1024;
/// Between two tries when the configuration is wrong: somebody has to mend it.
const SLOWLY: Duration = Duration::from_secs(300);
const SIX_HOURS_MS: u64 = 6 * 3600 * 1000;
/// A server that gives out short lives is not asked more often than this.
const REFRESH_AT_LEAST: Duration = Duration::from_secs(1);

const KEYS_TIME: Duration = Duration::from_secs(5);
const KEYS_BETWEEN: Duration = Duration::from_secs(60);
/// So that a key that was taken back goes.
const KEYS_ANEW: Duration = Duration::from_secs(3600);

/// Who we are, and where the server is.
pub(crate) struct Server {
    pub(crate) base_url: String,
    pub(crate) register_key: Zeroizing<String>,
    pub(crate) inbound_url: String,
    pub(crate) device_id: String,
}

struct Token {
    text: Zeroizing<String>,
    expires_at_ms: u64,
}

pub(crate) struct Registration {
    server: Server,
    http: Arc<Http>,
    desk: Arc<Desk>,
    token: watch::Sender<Option<Arc<Token>>>,
    wanted: Notify,
    keys: Keychain,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Registered {
    #[serde(default)]
    ok: Option<bool>,
    runtime_token: Zeroizing<String>,
    expires_at_ms: u64,
}

/// A token as it is used: it can be sent, and given back as one that did not work.
#[derive(Clone)]
pub(crate) struct Pass(Arc<Token>);

impl Pass {
    pub(crate) fn expose(&self) -> &str {
        &self.0.text
    }
}

/// Why a delivery is not let in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    Token(&'static str),
    /// Nobody can tell a good token now.
    NoKeys,
}

impl Registration {
    pub(crate) fn new(server: Server, http: Arc<Http>, desk: Arc<Desk>) -> Self {
        Self {
            server,
            http,
            desk,
            token: watch::Sender::new(None),
            wanted: Notify::new(),
            keys: Keychain::new(KEYS_BETWEEN, KEYS_ANEW),
        }
    }

    pub(crate) fn device_id(&self) -> &str {
        &self.server.device_id
    }

    pub(crate) fn base_url(&self) -> &str {
        &self.server.base_url
    }

    pub(crate) fn url(&self, path: &str) -> Uri {
        // The configuration has an address behind it: one that is none is not reached.
        format!("{}{path}", self.server.base_url).parse().unwrap_or_default()
    }

    // === Our token ===

    /// Registers, and again before the token ends or when it did not work.
    pub(crate) async fn keep(&self) {
        let mut backoff = Backoff::of_contract();
        loop {
            match self.register().await {
                Ok(token) => {
                    backoff = Backoff::of_contract();
                    let wait = refresh_in(now_ms(), token.expires_at_ms);
                    let expires = token.expires_at_ms;
                    let first = self.token.send_replace(Some(Arc::new(token))).is_none();
                    if first {
                        self.desk.note(Level::Info, "Registered with the mux-server");
                    }
                    self.desk.change(|b| (b.registered_until_ms, b.register_error) = (Some(expires), None));
                    // A server that takes none of its own tokens is not asked all the time.
                    tokio::time::sleep(REFRESH_AT_LEAST).await;
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = self.wanted.notified() => {}
                    }
                }
                Err((why, wrong)) => {
                    self.refused(&why, wrong);
                    // Whoever needs a token waits with us: asking more often would not help.
                    tokio::time::sleep(if wrong { jittered(SLOWLY) } else { backoff.next() }).await;
                }
            }
        }
    }

    fn refused(&self, why: &str, wrong: bool) {
        let ended = self.token.borrow().as_ref().is_some_and(|t| t.expires_at_ms <= now_ms());
        if ended {
            self.token.send_replace(None);
        }
        let mut new = false;
        self.desk.change(|board| {
            new = board.register_error.as_deref() != Some(why);
            board.register_error = Some(why.to_owned());
            if ended {
                board.registered_until_ms = None;
            }
        });
        if new {
            let level = if wrong { Level::Error } else { Level::Warn };
            self.desk.note(level, format!("The mux client is not registered: {why}"));
        }
    }

    /// The second of an error is whether only an operator can mend it.
    async fn register(&self) -> Result<Token, (String, bool)> {
        let server = &self.server;
        let body = json!({
            "openclawId": server.device_id,
            "inboundUrl": server.inbound_url,
            "inboundTimeoutMs": INBOUND_TIMEOUT_MS,
        });
        let ask = Ask {
            method: Method::POST,
            uri: self.url("/v1/instances/register"),
            bearer: Some(&server.register_key),
            headers: &[],
            body: Some(body.to_string().into()),
            room: None,
            answer_max: ANSWER_MAX,
            time: TIME,
        };
        let answer =
            self.http.ask(ask).await.map_err(|why| {
                (format!("the mux-server does not answer: {why}; it is tried again"), false)
            })?;
        if !answer.is_good() {
            let said = answer.words();
            return Err(match answer.status {
                400 => (
                    format!(
                        "it answers {said}: it does not take our registration; compare MUX_INBOUND_URL and the versions of both sides"
                    ),
                    true,
                ),
                401 => (format!("it answers {said}: MUX_REGISTER_KEY is not its key"), true),
                404 => (format!("it answers {said}: MUX_BASE_URL is not a mux-server's"), true),
                409 => (
                    format!("it answers {said}: the device is registered in another way; ask its operator"),
                    true,
                ),
                _ => (format!("it answers {said}; it is tried again"), false),
            });
        }
        match serde_json::from_slice::<Registered>(&answer.body) {
            Ok(registered) if registered.ok != Some(false) && !registered.runtime_token.is_empty() => {
                Ok(Token { text: registered.runtime_token, expires_at_ms: registered.expires_at_ms })
            }
            _ => {
                Err(("its answer holds no runtimeToken and expiresAtMs; it is tried again".to_owned(), false))
            }
        }
    }

    /// A token that is thought to work; waits for one.
    pub(crate) async fn pass(&self) -> Pass {
        let mut token = self.token.subscribe();
        loop {
            let current = token.borrow_and_update().clone();
            match current {
                Some(token) if token.expires_at_ms > now_ms() => return Pass(token),
                Some(_) => self.wanted.notify_one(),
                None => {}
            }
            // An end of the wait without a change: the clock may have passed its end.
            let _ = tokio::time::timeout(Duration::from_secs(5), token.changed()).await;
        }
    }

    /// Like [`Registration::pass`], without waiting.
    pub(crate) fn pass_at_hand(&self) -> Option<Pass> {
        self.token.borrow().clone().map(Pass)
    }

    /// The server does not take `old`. Yields another one, or nothing when there is none soon.
    pub(crate) async fn renew(&self, old: &Pass) -> Option<Pass> {
        let mut token = self.token.subscribe();
        let is_new = |current: &Option<Arc<Token>>| current.as_ref().is_some_and(|t| !Arc::ptr_eq(t, &old.0));
        if !is_new(&token.borrow_and_update()) {
            self.wanted.notify_one();
            let _ = tokio::time::timeout(TIME, token.wait_for(is_new)).await;
        }
        let current = token.borrow().clone();
        current.filter(|t| !Arc::ptr_eq(t, &old.0)).map(Pass)
    }

    // === Its keys ===

    /// Keeps the keys at hand.
    pub(crate) async fn keep_keys(&self) {
        let failed = |why| {
            self.desk.failed(format!("the mux-server's keys cannot be had: {why}; it is tried again"));
        };
        self.keys.keep(|| self.fetch_keys(), failed).await;
    }

    async fn fetch_keys(&self) -> Result<Keys, String> {
        let ask = Ask {
            method: Method::GET,
            uri: self.url("/.well-known/jwks.json"),
            bearer: None,
            headers: &[],
            body: None,
            room: None,
            answer_max: ANSWER_MAX,
            time: KEYS_TIME,
        };
        let answer = self.http.ask(ask).await.map_err(|why| why.to_string())?;
        if !answer.is_good() {
            return Err(format!("it answers {}", answer.words()));
        }
        Ok(Keys::parse(&answer.body)?)
    }

    /// Whether the bearer of `token` is the mux-server.
    pub(crate) async fn check(&self, token: &str) -> Result<(), Denied> {
        let now_s = || i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX);
        let look = || verify(token, &self.keys.keys(), &self.server.device_id, now_s());
        let mut found = look();
        if found == Err(Refusal::UnknownKey) {
            self.keys.miss().await;
            found = look();
        }
        match found {
            Ok(()) => Ok(()),
            Err(Refusal::Broken(why)) => Err(Denied::Token(why)),
            Err(Refusal::UnknownKey) if self.keys.keys().is_empty() => Err(Denied::NoKeys),
            Err(Refusal::UnknownKey) => Err(Denied::Token("the token's key is not the mux-server's")),
        }
    }
}

/// When less than the larger of six hours and a tenth of its life is left; of a life that is
/// shorter than that, when half of it is over.
fn refresh_in(now: u64, expires: u64) -> Duration {
    let life = expires.saturating_sub(now);
    let margin = SIX_HOURS_MS.max(life / 10);
    let wait = if life > margin { life - margin } else { life / 2 };
    Duration::from_millis(wait).max(REFRESH_AT_LEAST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_renewed_while_there_is_time() {
        let hour = 3_600_000;
        let hours = |n: u64| Duration::from_millis(n * hour);
        assert_eq!(refresh_in(0, 24 * hour), hours(18));
        assert_eq!(refresh_in(0, 100 * hour), hours(90));
        assert_eq!(refresh_in(0, 2 * hour), hours(1));
        assert_eq!(refresh_in(5, 0), REFRESH_AT_LEAST);
    }
}
