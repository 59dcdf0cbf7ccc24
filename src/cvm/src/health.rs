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
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::{Duration, Instant};

/// For all agents: listing sessions opens the database of each.
const LIST_TIME: Duration = Duration::from_secs(30);
/// How many agents a complaint names.
const NAMED_MAX: usize = 3;

pub(crate) fn run(args: &HealthArgs) -> Result<Exit, Failure> {
    let mut status = match control_socket::status() {
        Ok(snapshot) => snapshot.status,
        Err(failure) => return Err(failure.with_exit(Exit::Bad)),
    };
    if args.deep {
        let complaints = unlisted_sessions()
            .unwrap_or_else(|why| vec![format!("the gateway could not be asked for its sessions: {why}")]);
        status.healthy &= complaints.is_empty();
        status.unhealthy.extend(complaints);
    }
    stdout::print(&render(&status, args.verbose))?;
    Ok(if status.healthy { Exit::Good } else { Exit::Bad })
}

/// Asks the gateway for the sessions of each of its agents, as a client with its token does. Its probes say
/// nothing of an agent whose database it refuses, and the other agents do not notice.
fn unlisted_sessions() -> Result<Vec<String>, String> {
    let access = GatewayAccess::ask("health", control_socket::PATIENCE)
        .map_err(|_| "the supervisor does not say how; are you root?")?;
    let token = access.token().ok_or("the supervisor holds no token yet")?;
    let until = Instant::now() + LIST_TIME;
    let left = || until.saturating_duration_since(Instant::now());
    let models = http::get(access.port(), "/v1/models", Some(&token), left())?;
    let agents = agents(&models.body).into_iter().map(Some);
    // With its HTTP API off it names none; then one question without a name is for the only agent.
    let agents = if agents.len() == 0 { vec![None] } else { agents.collect() };
    let mut causes: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for agent in agents {
        let question = json!({"tool": "sessions_list", "agentId": &agent, "args": {"limit": 1}}).to_string();
        let answer = http::post(access.port(), "/tools/invoke", Some(&token), &question, left());
        if let Err(cause) = answer.and_then(|answer| judge(&answer)) {
            causes.entry(cause).or_default().extend(agent);
        }
    }
    Ok(causes.iter().map(|(cause, agents)| complaint(cause, agents)).collect())
}

/// The agents in an answer to `GET /v1/models`.
fn agents(models: &[u8]) -> Vec<String> {
    let models: Value = serde_json::from_slice(models).unwrap_or_default();
    let ids = models["data"].as_array().into_iter().flatten().filter_map(|model| model["id"].as_str());
    let agents = ids.filter_map(|id| id.strip_prefix("openclaw/")).filter(|agent| *agent != "default");
    agents.map(str::to_owned).collect()
}

fn complaint(cause: &str, agents: &[String]) -> String {
    let named: Vec<String> = agents.iter().take(NAMED_MAX).map(|agent| clean(agent)).collect();
    let of_whom = match (named.as_slice(), agents.len() - named.len()) {
        ([], _) => "its sessions".to_owned(),
        (named, 0) => format!("the sessions of {}", named.join(", ")),
        (named, more) => format!("the sessions of {} and {more} more agents", named.join(", ")),
    };
    format!("the gateway does not list {of_whom}: {cause}")
}

/// Nothing, or why there is no list.
fn judge(answer: &Answer) -> Result<(), String> {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    Err(match answer.code {
        200 if body["ok"] == true => return Ok(()),
        401 | 403 => "it refuses the supervisor's token; `cvm doctor` names the remedy".to_owned(),
        404 => "its tool policy leaves `sessions_list` out, so this cannot be known".to_owned(),
        code => {
            let message = body["error"]["message"].as_str().map(clean).unwrap_or_default();
            format!("{code} {message}; `openclaw doctor`, `cvm logs gateway`").replace(" ;", ";")
        }
    })
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
            let _ = writeln!(text, "  {}: {}", clean(&service.name), service.state); // a String takes all
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
            "500 agent database remains degraded\u{fffd}[2J; \
             `openclaw doctor`, `cvm logs gateway`"
        );
        assert!(judge(401, "").unwrap_err().contains("token"));
        assert!(judge(404, "").unwrap_err().contains("tool policy"));
        assert!(judge(200, "words").unwrap_err().contains("200; "));
    }

    #[test]
    fn agents_that_lack_a_list_for_the_same_reason_are_named_together() {
        let models = r#"{"data":[{"id":"openclaw"},{"id":"openclaw/default"},{"id":"openclaw/main"},{"id":"openclaw/bob"},{}]}"#;
        assert_eq!(agents(models.as_bytes()), ["main", "bob"]);
        assert!(agents(b"off").is_empty());
        let complaint =
            |agents: &[&str]| complaint("why", &agents.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>());
        assert_eq!(complaint(&[]), "the gateway does not list its sessions: why");
        assert_eq!(complaint(&["main", "bob"]), "the gateway does not list the sessions of main, bob: why");
        let many = complaint(&["a", "b", "c", "d", "e"]);
        assert_eq!(many, "the gateway does not list the sessions of a, b, c and 2 more agents: why");
    }

    #[test]
    fn verbose_adds_every_service() {
        let text = render(&samples::healthy(), true);
        assert_eq!(text, "healthy\n  sshd: up\n  dockerd: ready\n  gateway: ready\n");
    }
}
