//! `cvm health`: one line and an exit code, for HEALTHCHECK.
//!
//! Docker knows 0 and 1 only, and reserves 2. So the code is 1 whenever the machine is not healthy, also
//! when the supervisor does not answer.

use crate::args::HealthArgs;
use crate::control_socket;
use crate::failure::{Exit, Failure};
use crate::gateway_access::GatewayAccess;
use crate::http::{self, Answer};
use crate::stdout;
use crate::text::clean;
use cvm_protocol::status::Status;
use std::fmt::Write as _;
use std::time::Duration;

/// Listing sessions opens every agent's database.
const LIST_TIME: Duration = Duration::from_secs(30);

pub(crate) fn run(args: &HealthArgs) -> Result<Exit, Failure> {
    let mut status = match control_socket::status() {
        Ok(snapshot) => snapshot.status,
        Err(failure) => return Err(failure.with_exit(Exit::Bad)),
    };
    if args.deep
        && let Err(why) = sessions_are_listed()
    {
        status.healthy = false;
        status.unhealthy.push(why);
    }
    stdout::print(&render(&status, args.verbose))?;
    Ok(if status.healthy { Exit::Good } else { Exit::Bad })
}

/// Asks the gateway for its sessions, as a client with its token does.
fn sessions_are_listed() -> Result<(), String> {
    let cannot = |why: &str| format!("the gateway could not be asked for its sessions: {why}");
    let access = GatewayAccess::ask("health", control_socket::PATIENCE)
        .map_err(|_| cannot("the supervisor does not say how; are you root?"))?;
    let token = access.token().ok_or_else(|| cannot("the supervisor holds no token yet"))?;
    let question = r#"{"tool":"sessions_list","args":{"limit":1}}"#;
    let answer = http::post(access.port(), "/tools/invoke", Some(&token), question, LIST_TIME);
    judge(&answer.map_err(|why| cannot(&why))?)
}

fn judge(answer: &Answer) -> Result<(), String> {
    let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let cause = match answer.code {
        200 if body["ok"] == true => return Ok(()),
        401 | 403 => "it refuses the supervisor's token; `cvm doctor` names the remedy".to_owned(),
        404 => "its tool policy leaves `sessions_list` out, so this cannot be known".to_owned(),
        code => {
            let message = body["error"]["message"].as_str().map(clean).unwrap_or_default();
            format!("{code} {message}; `openclaw doctor`, `cvm logs gateway`").replace(" ;", ";")
        }
    };
    Err(format!("the gateway does not list its sessions: {cause}"))
}

fn render(status: &Status, verbose: bool) -> String {
    let complaints: Vec<String> = status.unhealthy.iter().map(|c| clean(c)).collect();
    let mut text = if status.healthy {
        "healthy\n".to_owned()
    } else if verbose {
        format!("not healthy\n  {}\n", complaints.join("\n  "))
    } else {
        format!("not healthy: {}\n", complaints.join("; "))
    };
    if verbose {
        for service in &status.services {
            let _ = writeln!(text, "  {}: {}", clean(&service.name), clean(&service.state)); // a String takes all
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::samples;

    #[test]
    fn all_complaints_are_on_one_line() {
        assert_eq!(render(&samples::healthy(), false), "healthy\n");
        let text = render(&samples::troubled(), false);
        assert_eq!(text.lines().count(), 1);
        assert!(text.starts_with("not healthy: boot step storage: "), "{text}");
    }

    #[test]
    fn only_a_list_of_sessions_is_good_and_every_other_answer_has_its_reason() {
        let judge = |code, body: &str| judge(&Answer { code, body: body.into() });
        assert_eq!(judge(200, r#"{"ok":true,"result":{}}"#), Ok(()));
        let degraded =
            r#"{"ok":false,"error":{"type":"x","message":"agent database remains degraded\u001b[2J"}}"#;
        assert_eq!(
            judge(500, degraded).unwrap_err(),
            "the gateway does not list its sessions: 500 agent database remains degraded\u{fffd}[2J; \
             `openclaw doctor`, `cvm logs gateway`"
        );
        assert!(judge(401, "").unwrap_err().contains("token"));
        assert!(judge(404, "").unwrap_err().contains("tool policy"));
        assert!(judge(200, "words").unwrap_err().contains("200; "));
    }

    #[test]
    fn verbose_adds_every_service() {
        let text = render(&samples::healthy(), true);
        assert_eq!(text, "healthy\n  sshd: up\n  dockerd: ready\n  gateway: ready\n");
    }
}
