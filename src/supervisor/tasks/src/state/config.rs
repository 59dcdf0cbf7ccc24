//! The gateway's `openclaw.json`: written when there is none, else only looked at.
//!
//! One that exists is not changed, not followed if it is a link, and its content is never repeated.

use super::bootstrap::{GatewaySettings, TokenState, generated_config, inspect_config};
use super::unpack;
use crate::files::{Dir, Kind, Owner};
use crate::report::{self, Outcome, Report};
use cvm_protocol::task::StateTask;
use cvm_secrets::keys::GatewayToken;
use nix::errno::Errno;
use std::ffi::OsStr;

pub(crate) const NAME: &str = "openclaw.json";
/// Far more than a configuration has.
const CONFIG_MAX: usize = 8 * 1024 * 1024;
const TOKEN: &str = "gateway token";
const PORT: &str = "gateway port";

/// Writes the user's configuration, or a generated one, if there is nothing at all.
pub(crate) fn write(state: &Dir, task: &StateTask, owner: Owner, report: &mut Report) -> Outcome<()> {
    if state.has(NAME)? {
        return Ok(());
    }
    let name = OsStr::new(NAME);
    let kind = Kind::kept_by(owner);
    if let Some(packed) = &task.config {
        state.create(name, &unpack(packed, "gateway configuration")?, kind)?;
        report.info("gave the gateway the configuration of OPENCLAW_CONFIG_B64");
    } else {
        let settings = GatewaySettings { port: task.port, redpill: task.redpill };
        state.create(name, generated_config(settings).as_bytes(), kind)?;
        report.info("gave the gateway a generated configuration");
    }
    Ok(())
}

/// Says where the configuration contradicts what this instance was told. Never a failure: the
/// gateway is the judge of its configuration.
pub(crate) fn inspect(state: &Dir, task: &StateTask, token: &GatewayToken, report: &mut Report) {
    let bytes = match state.read(NAME, CONFIG_MAX) {
        Ok(Some(bytes)) => bytes,
        Ok(None) => return,
        // It is a link: the user keeps the file elsewhere.
        Err(error) if error.errno == Errno::ELOOP => {
            return report::detail("openclaw.json is a link; what it leads to is not looked at");
        }
        Err(error) => return report.remark(TOKEN, &format!("openclaw.json is not looked at: {error}")),
    };
    // Bytes that are not UTF-8 become text that is not JSON5.
    let findings = inspect_config(&String::from_utf8_lossy(&bytes), token.expose());
    if let Some(words) = trouble_with(&findings.token) {
        report.remark(TOKEN, &words);
    }
    if let Some(port) = findings.port.filter(|port| *port != task.port) {
        report.remark(
            PORT,
            &format!(
                "openclaw.json says port {port}, the gateway is started on {}; set gateway.port to that, so that \
                 `openclaw` finds the gateway",
                task.port
            ),
        );
    }
}

fn trouble_with(token: &TokenState) -> Option<String> {
    let words = match token {
        TokenState::Reference | TokenState::Absent | TokenState::SameValue | TokenState::Elsewhere => return None,
        TokenState::Differs => {
            "openclaw.json has another token than the one of this instance, and the gateway asks for that. To have the \
             right one always, set gateway.auth.token in it to \"${OPENCLAW_GATEWAY_TOKEN}\""
                .to_owned()
        }
        TokenState::NotToken(mode) => {
            // The text is the agent's; only words that we know are repeated.
            let known = ["password", "none", "trusted-proxy"].into_iter().find(|known| known == mode);
            format!(
                "openclaw.json lets clients in by {}, not by token; the token of this instance opens nothing",
                known.unwrap_or("another way")
            )
        }
        TokenState::Unreadable => {
            "openclaw.json cannot be understood; the gateway may refuse it (`openclaw doctor` says more)".to_owned()
        }
    };
    Some(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mode_that_nobody_knows_is_not_repeated() {
        let words = |mode: &str| trouble_with(&TokenState::NotToken(mode.into())).unwrap();
        assert!(words("password").contains("by password"));
        assert!(!words("buy now").contains("buy now"));
    }

    #[test]
    fn what_is_right_is_not_talked_about() {
        for fine in [TokenState::Reference, TokenState::Absent, TokenState::SameValue, TokenState::Elsewhere]
        {
            assert_eq!(trouble_with(&fine), None);
        }
    }
}
