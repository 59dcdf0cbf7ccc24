//! Who carries events to the client, in order, until they are taken.

use super::{Delivery, INBOUND_PATH, INBOUND_PORT, Shared, jwt};
use crate::serve::{Answer, Client};
use ed25519_dalek::Signer as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_millis(500);

/// A connection to the client.
pub struct Courier {
    pub(super) client: Client,
}

impl Courier {
    pub(super) fn post_event(
        &mut self,
        shared: &Shared,
        body: &[u8],
        token: Option<&str>,
    ) -> std::io::Result<Answer> {
        let tenant = shared.state().tenant.clone();
        let bearer = token.map(|t| format!("Bearer {t}"));
        let mut headers = vec![("X-OpenClaw-Id", tenant.as_str()), ("X-Mux-Trace-Id", "trace-1")];
        headers.extend(bearer.as_deref().map(|b| ("Authorization", b)));
        self.client.post(INBOUND_PATH, &headers, body)
    }

    /// Without any of the headers that a delivery has.
    pub fn raw(&mut self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> std::io::Result<Answer> {
        self.client.post(path, headers, body)
    }

    /// A bare connection.
    pub fn connect(&self) -> std::io::Result<std::net::TcpStream> {
        self.client.connect()
    }
}

/// In order, each until it is taken.
pub(super) fn carry(shared: &Shared) {
    let address: SocketAddr = (Ipv4Addr::LOCALHOST, INBOUND_PORT).into();
    let mut courier = Courier { client: Client::new(&shared.network, address, Duration::from_secs(15)) };
    courier.client.power(Arc::clone(&shared.power));
    let mut wait = FIRST_WAIT;
    loop {
        let mut state = shared.state();
        while !state.closing && (state.queue.is_empty() || !state.up || !state.registered) {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.closing {
            return;
        }
        let event = state.queue[0].clone();
        let (header, claims) = state.claims();
        let signer = state.signer.clone();
        drop(state);
        let token = jwt(&header, &claims, |input| signer.sign(input).to_bytes().to_vec());
        let status = courier.post_event(shared, event.to_string().as_bytes(), Some(&token)).ok();
        let status = status.map(|answer| answer.status);
        let mut state = shared.state();
        let id = event["eventId"].as_str().unwrap_or_default().to_owned();
        state.deliveries.push(Delivery { at: Instant::now(), event: id, status });
        let accepted = status.is_some_and(|s| (200..300).contains(&s));
        // Who lost power does not know what was answered.
        if accepted && state.up {
            if state.deaf > 0 {
                state.deaf -= 1;
            } else {
                state.queue.pop_front();
                wait = FIRST_WAIT;
            }
            continue;
        }
        let waited = shared.changed.wait_timeout_while(state, wait, |s| !s.closing);
        drop(waited);
        wait = (wait * 2).min(LONGEST_WAIT);
    }
}
