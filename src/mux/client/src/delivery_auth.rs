//! Whether the bearer of a delivery is the mux-server: its tokens, checked with its own keys.
//!
//! The keys are asked for once a minute at most because of a key that is not known, so that strangers
//! with made-up names of keys cannot make the client ask.

use crate::clock::now_ms;
use crate::http_client::{HttpClient, Request};
use crate::key_cache::KeyCache;
use crate::registration::Identity;
use crate::status::StatusReporter;
use cvm_mux_contract::token::{DELIVERY, JWKS_PATH, KeySet, Refusal, verify};
use std::sync::Arc;
use std::time::Duration;

const REQUEST_TIME: Duration = Duration::from_secs(5);
const BETWEEN_UNKNOWN_KEYS: Duration = Duration::from_secs(60);
/// A key that the server has withdrawn is taken for this long at most.
const REFRESH_EVERY: Duration = Duration::from_secs(3600);

pub(crate) struct DeliveryAuth {
    identity: Identity,
    http: Arc<HttpClient>,
    status: Arc<StatusReporter>,
    keys: KeyCache,
}

/// Why a delivery is not let in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    Token(&'static str),
    /// No key has been fetched yet, so no token can be checked.
    NoKeys,
}

impl DeliveryAuth {
    pub(crate) fn new(identity: Identity, http: Arc<HttpClient>, status: Arc<StatusReporter>) -> Self {
        Self { identity, http, status, keys: KeyCache::new(BETWEEN_UNKNOWN_KEYS, REFRESH_EVERY) }
    }

    pub(crate) fn device_id(&self) -> &str {
        &self.identity.device_id
    }

    pub(crate) async fn keep_keys(&self) {
        let failed = |why| {
            self.status.failed(format!("the mux-server's keys cannot be fetched: {why}; it is tried again"));
        };
        self.keys.keep(|| self.fetch_keys(), failed).await;
    }

    async fn fetch_keys(&self) -> Result<KeySet, String> {
        let request = Request::get(self.identity.server.at(JWKS_PATH), REQUEST_TIME);
        let answer = self.http.send(request).await.map_err(|why| why.to_string())?;
        if !answer.is_success() {
            return Err(format!("it answers {}", answer.summary()));
        }
        Ok(KeySet::parse(&answer.body)?)
    }

    pub(crate) async fn check(&self, token: &str) -> Result<(), Denied> {
        let now_s = || i64::try_from(now_ms() / 1000).unwrap_or(i64::MAX);
        let check = || verify(token, &DELIVERY, &self.keys.keys(), &self.identity.device_id, now_s());
        let mut found = check();
        if found == Err(Refusal::UnknownKey) {
            self.keys.refresh().await;
            found = check();
        }
        found.map_err(|refusal| match refusal {
            Refusal::Invalid(why) => Denied::Token(why),
            Refusal::UnknownKey if self.keys.keys().is_empty() => Denied::NoKeys,
            Refusal::UnknownKey => Denied::Token("the token's key is not the mux-server's"),
        })
    }
}
