//! The user and the environment of the gateway, as the supervisor tells them to root.

use crate::control_socket;
use crate::failure::{Exit, Failure};
use cvm_protocol::control::{Body, Verb};
use cvm_secrets::base64_bytes::PackedEnvironment;
use cvm_system::env::variable;
use std::time::Duration;
use zeroize::Zeroizing;

pub(crate) struct GatewayAccess {
    pub user: String,
    /// `NAME=VALUE` each.
    environment: Vec<Zeroizing<Vec<u8>>>,
}

impl GatewayAccess {
    /// Asks the supervisor. `what` names the command in a failure.
    pub(crate) fn ask(what: &str, patience: Duration) -> Result<Self, Failure> {
        let unreachable = |cause: &str| Failure::new(Exit::Unreachable, what, cause);
        let Body::GatewayAccess { user, environment } =
            control_socket::ask_within(patience, what, Verb::GatewayAccess)?
        else {
            return Err(unreachable("the supervisor's answer does not fit the question"));
        };
        Self::new(user, &environment).ok_or_else(|| unreachable("the supervisor's answer cannot be read"))
    }

    pub(crate) fn new(user: String, environment: &PackedEnvironment) -> Option<Self> {
        Some(Self { user, environment: environment.unpack()? })
    }

    /// The name and the value of each variable.
    pub(crate) fn variables(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.environment.iter().filter_map(|entry| {
            let at = entry.iter().position(|b| *b == b'=')?;
            Some((&entry[..at], &entry[at + 1..]))
        })
    }

    pub(crate) fn token(&self) -> Option<Zeroizing<String>> {
        self.value("OPENCLAW_GATEWAY_TOKEN")
    }

    pub(crate) fn port(&self) -> u16 {
        let port = self.value("OPENCLAW_GATEWAY_PORT").and_then(|port| port.parse().ok());
        port.unwrap_or_else(default_port)
    }

    fn value(&self, wanted: &str) -> Option<Zeroizing<String>> {
        let (_, value) = self.variables().find(|(name, _)| *name == wanted.as_bytes())?;
        Some(Zeroizing::new(String::from_utf8(value.to_vec()).ok()?))
    }
}

/// The gateway's port unless the owner has chosen another.
pub(crate) fn default_port() -> u16 {
    let default = variable("OPENCLAW_GATEWAY_PORT").and_then(|v| v.default);
    default.and_then(|text| text.parse().ok()).unwrap_or(18789)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_of_any_bytes_is_read() {
        let given: [(&[u8], &[u8]); 4] = [
            (b"A", b"\xff=\n"),
            (b"B", b""),
            (b"OPENCLAW_GATEWAY_TOKEN", b"t"),
            (b"OPENCLAW_GATEWAY_PORT", b"7"),
        ];
        let access = GatewayAccess::new("openclaw".into(), &PackedEnvironment::pack(&given)).unwrap();
        assert!(access.variables().eq(given));
        assert_eq!((access.token().unwrap().as_str(), access.port()), ("t", 7));
        let empty = GatewayAccess::new("openclaw".into(), &PackedEnvironment::pack(&[])).unwrap();
        assert_eq!((empty.token(), empty.port()), (None, 18789));
    }
}
