//! The registration with the mux-server, and the runtime token that it yields.

use crate::address::ServerAddress;
use crate::backoff::{Backoff, jittered};
use crate::clock::now_ms;
use crate::http_client::{HttpClient, Request, Response, json};
use crate::status::StatusReporter;
use cvm_mux_contract::registration::{INBOUND_TIMEOUT_MS, PATH, Register, Registered};
use cvm_protocol::report::Level;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Notify, watch};
use zeroize::Zeroizing;

const REQUEST_TIME: Duration = Duration::from_secs(15);
/// Between two tries while the configuration is wrong: an operator has to mend it.
const RETRY_MISCONFIGURED: Duration = Duration::from_secs(300);
const SIX_HOURS_MS: u64 = 6 * 3600 * 1000;
/// Between two registrations at least, however short the lives are that the server gives to its tokens.
const REFRESH_AT_LEAST: Duration = Duration::from_secs(1);
/// How often somebody who waits for a token looks whether the one that is there has expired.
const EXPIRY_CHECK: Duration = Duration::from_secs(5);

/// Who this instance is, and where its server.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) server: ServerAddress,
    pub(crate) inbound_url: String,
    /// `openclawId` on the wire.
    pub(crate) device_id: String,
}

/// What the server lets this instance in with.
pub(crate) struct RuntimeToken {
    text: Zeroizing<String>,
    expires_at_ms: u64,
}

impl RuntimeToken {
    pub(crate) fn expose(&self) -> &str {
        &self.text
    }
}

pub(crate) struct Registration {
    identity: Identity,
    register_key: Zeroizing<String>,
    http: Arc<HttpClient>,
    status: Arc<StatusReporter>,
    token: watch::Sender<Option<Arc<RuntimeToken>>>,
    refresh: Notify,
}

/// Why a registration failed.
enum Failure {
    /// It may succeed later.
    Temporary(String),
    /// Only an operator can mend it.
    Misconfigured(String),
}

impl Registration {
    pub(crate) fn new(
        identity: Identity,
        register_key: Zeroizing<String>,
        http: Arc<HttpClient>,
        status: Arc<StatusReporter>,
    ) -> Self {
        let (token, refresh) = (watch::Sender::new(None), Notify::new());
        Self { identity, register_key, http, status, token, refresh }
    }

    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Registers, and again before the token expires or when the server has refused it.
    pub(crate) async fn keep(&self) {
        let mut backoff = Backoff::of_contract();
        loop {
            match self.register().await {
                Ok(token) => {
                    backoff = Backoff::of_contract();
                    let wait = refresh_in(now_ms(), token.expires_at_ms);
                    self.registered(token);
                    tokio::time::sleep(REFRESH_AT_LEAST).await;
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = self.refresh.notified() => {}
                    }
                }
                // Whoever needs a token waits with us: asking more often would not help.
                Err(Failure::Temporary(why)) => {
                    self.not_registered(Level::Warn, &why);
                    tokio::time::sleep(backoff.next()).await;
                }
                Err(Failure::Misconfigured(why)) => {
                    self.not_registered(Level::Error, &why);
                    tokio::time::sleep(jittered(RETRY_MISCONFIGURED)).await;
                }
            }
        }
    }

    fn registered(&self, token: RuntimeToken) {
        let expires_at_ms = token.expires_at_ms;
        let is_first = self.token.send_replace(Some(Arc::new(token))).is_none();
        if is_first {
            self.status.note(Level::Info, "Registered with the mux-server");
        }
        self.status.update(|status| {
            (status.registered_until_ms, status.register_error) = (Some(expires_at_ms), None);
        });
    }

    fn not_registered(&self, level: Level, why: &str) {
        let has_expired = self.token.borrow().as_ref().is_some_and(|t| t.expires_at_ms <= now_ms());
        if has_expired {
            self.token.send_replace(None);
        }
        let mut is_new = false;
        self.status.update(|status| {
            is_new = status.register_error.as_deref() != Some(why);
            status.register_error = Some(why.to_owned());
            if has_expired {
                status.registered_until_ms = None;
            }
        });
        if is_new {
            self.status.note(level, format!("The mux client is not registered: {why}"));
        }
    }

    async fn register(&self) -> Result<RuntimeToken, Failure> {
        let identity = &self.identity;
        let body = json(&Register {
            openclaw_id: (&identity.device_id).into(),
            inbound_url: (&identity.inbound_url).into(),
            inbound_timeout_ms: INBOUND_TIMEOUT_MS,
        });
        let request = Request::post(identity.server.at(PATH), body, REQUEST_TIME).bearer(&self.register_key);
        let answer = self.http.send(request).await.map_err(|why| {
            Failure::Temporary(format!("the mux-server does not answer: {why}; it is tried again"))
        })?;
        if !answer.is_success() {
            return Err(refusal(&answer));
        }
        match serde_json::from_slice::<Registered>(&answer.body) {
            Ok(registered) if registered.ok != Some(false) && !registered.runtime_token.is_empty() => {
                let Registered { runtime_token: text, expires_at_ms, .. } = registered;
                Ok(RuntimeToken { text, expires_at_ms })
            }
            _ => Err(Failure::Temporary(
                "its answer holds no runtimeToken and expiresAtMs; it is tried again".to_owned(),
            )),
        }
    }

    /// A token that has not expired; waits until there is one.
    pub(crate) async fn token(&self) -> Arc<RuntimeToken> {
        let mut token = self.token.subscribe();
        loop {
            let current = token.borrow_and_update().clone();
            match current {
                Some(token) if token.expires_at_ms > now_ms() => return token,
                Some(_) => self.refresh.notify_one(),
                None => {}
            }
            let _ = tokio::time::timeout(EXPIRY_CHECK, token.changed()).await;
        }
    }

    /// The last token, without waiting.
    pub(crate) fn last_token(&self) -> Option<Arc<RuntimeToken>> {
        self.token.borrow().clone()
    }

    /// Another token than `refused`; none when there is none soon.
    pub(crate) async fn renew(&self, refused: &Arc<RuntimeToken>) -> Option<Arc<RuntimeToken>> {
        let mut token = self.token.subscribe();
        let is_new = |current: &Option<Arc<RuntimeToken>>| {
            current.as_ref().is_some_and(|token| !Arc::ptr_eq(token, refused))
        };
        if !is_new(&token.borrow_and_update()) {
            self.refresh.notify_one();
            let _ = tokio::time::timeout(REQUEST_TIME, token.wait_for(is_new)).await;
        }
        let current = token.borrow().clone();
        current.filter(|token| !Arc::ptr_eq(token, refused))
    }
}

fn refusal(answer: &Response) -> Failure {
    let summary = answer.summary();
    let remedy = match answer.status {
        400 => "it does not take our registration; compare MUX_INBOUND_URL and the versions of both sides",
        401 => "MUX_REGISTER_KEY is not its key",
        404 => "MUX_BASE_URL is not a mux-server's",
        409 => "the device is registered in another way; ask its operator",
        _ => return Failure::Temporary(format!("it answers {summary}; it is tried again")),
    };
    Failure::Misconfigured(format!("it answers {summary}: {remedy}"))
}

/// When less than the larger of six hours and a tenth of its life is left; a token with a shorter life
/// is refreshed when half of it is over.
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
