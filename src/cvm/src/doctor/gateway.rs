//! Room gateway: does it answer its probes, and does it accept the derived token? Of its private answers
//! only codes and the names of failing parts are shown.

use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::sources;
use crate::gateway_access::{self, GatewayAccess};
use crate::http::{self, Answer};
use crate::text::clean;
use std::time::Duration;

const TIME: Duration = Duration::from_secs(4);
/// How many names of failing parts are shown.
const FAILING_MAX: usize = 5;
const NAME_CHARS_MAX: usize = 60;

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.begin("address");
    let access = sources::gateway_access();
    let port = access.as_ref().map_or_else(gateway_access::default_port, GatewayAccess::port);
    if access.is_none() {
        let found = format!(
            "only the supervisor knows the gateway's port; the following checks ask the usual one, {port}"
        );
        checks.add("address", skip(found));
    }
    let get = |path: &str, bearer: Option<&str>| http::get(port, path, bearer, TIME);
    checks.run("/healthz", || live(get("/healthz", None)));
    checks.run("/startupz", || soft(get("/startupz", None), "start-up has not finished, or it drains"));
    checks.run("/readyz", || soft(get("/readyz", None), "it is not ready"));
    checks.run("token", || match access.map(|access| access.token()) {
        Some(Some(token)) => takes_token(get("/v1/models", Some(&token))),
        None => skip("only the supervisor knows it"),
        Some(None) => skip("the supervisor holds none yet: the boot step `state` makes it known"),
    });
}

fn live(answer: Result<Answer, String>) -> Outcome {
    match answer {
        Ok(answer) if answer.code == 200 => ok("200"),
        Ok(answer) => fail(answer.code.to_string(), "`cvm logs gateway`; `cvm restart gateway`"),
        Err(why) => {
            fail(why, "`cvm status` shows the gateway's state; `cvm logs gateway` shows its last lines")
        }
    }
}

/// The gateway may answer 503 for a small reason, such as a broken channel account.
fn soft(answer: Result<Answer, String>, meaning: &str) -> Outcome {
    match answer {
        Ok(answer) if answer.code == 200 => ok("200"),
        Ok(answer) => {
            let failing = failing(&answer.body);
            let names = if failing.is_empty() { String::new() } else { format!(": {}", failing.join(", ")) };
            warn(
                format!("{}, {meaning}{names}", answer.code),
                "`openclaw status`; `openclaw doctor`; `cvm logs gateway`",
            )
        }
        Err(why) => warn(why, "see /healthz"),
    }
}

/// The names in the field `"failing"` of `/readyz`.
fn failing(body: &[u8]) -> Vec<String> {
    let body: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let names = body["failing"].as_array().into_iter().flatten().filter_map(|name| name.as_str());
    names.take(FAILING_MAX).map(|name| clean(name).chars().take(NAME_CHARS_MAX).collect()).collect()
}

fn takes_token(answer: Result<Answer, String>) -> Outcome {
    match answer {
        Ok(answer) => match answer.code {
            200 => ok("the gateway takes the supervisor's token"),
            401 | 403 => fail(
                format!("the gateway refuses the supervisor's token ({})", answer.code),
                "its openclaw.json sets another: `openclaw config set gateway.auth.token '${OPENCLAW_GATEWAY_TOKEN}'`, \
                 then `cvm restart gateway`",
            ),
            404 => skip(
                "its HTTP API is off, so it cannot be asked (gateway.http.endpoints.chatCompletions.enabled)",
            ),
            429 => warn(
                "429: too many wrong tokens came from loopback",
                "wait some minutes, and find out who tries",
            ),
            code => warn(format!("GET /v1/models answers {code}"), "`cvm logs gateway`"),
        },
        Err(why) => warn(why, "see /healthz"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[allow(clippy::unnecessary_wraps)] // stands for the result of a request
    fn answer(code: u16, body: &str) -> Result<Answer, String> {
        Ok(Answer { code, body: body.into() })
    }

    #[test]
    fn a_refused_token_is_a_failure_with_the_command_that_mends_it() {
        let outcome = takes_token(answer(401, ""));
        assert_eq!(outcome.verdict, Verdict::Fail);
        assert!(outcome.remedy.unwrap().contains("${OPENCLAW_GATEWAY_TOKEN}"));
        assert_eq!(takes_token(answer(200, "")).verdict, Verdict::Ok);
        assert_eq!(takes_token(answer(404, "")).verdict, Verdict::Skip);
    }

    #[test]
    fn only_the_names_of_failing_parts_are_shown() {
        let body = r#"{"ready":false,"failing":["telegram\u001b[2J","discord"],"secret":"words"}"#;
        let outcome = soft(answer(503, body), "it is not ready");
        assert_eq!(outcome.verdict, Verdict::Warn);
        assert_eq!(outcome.found, "503, it is not ready: telegram\u{fffd}[2J, discord");
    }

    #[test]
    fn a_silent_gateway_is_a_failure() {
        assert_eq!(live(Err("nobody listens there".into())).verdict, Verdict::Fail);
        assert_eq!(live(answer(503, "")).verdict, Verdict::Fail);
    }
}
