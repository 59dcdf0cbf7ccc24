//! Room mux: does the mux client accept messages, and do answers get out?

use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::sources;
use crate::http::{self, Answer};
use crate::text::clean;
use crate::units::{count, now_ms, span};
use cvm_protocol::mux::{MUX_CLIENT, MuxStatus};

/// A run of the agent takes minutes, and the events behind it wait.
const OLD_MS: u64 = 15 * 60 * 1000;

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.begin("configuration");
    let status = sources::status();
    let Some(status) = status else {
        return checks.add("configuration", skip("only the supervisor knows whether there is a mux client"));
    };
    if sources::service(Some(&status), MUX_CLIENT).is_none() {
        let found = "there is none; MUX_BASE_URL and MUX_REGISTER_KEY turn it on";
        return checks.add("configuration", skip(found));
    }
    checks.add("configuration", ok("MUX_BASE_URL and MUX_REGISTER_KEY are set"));
    checks.run("port", || listens(http::get(sources::MUX_PORT, "/healthz", None, sources::PATIENCE)));
    let Some(mux) = &status.mux else {
        return checks.add("registration", skip("the mux client has not reported yet"));
    };
    checks.add("registration", registration(mux, now_ms()));
    checks.add("queue", queue(mux, now_ms()));
    checks.add("replication", replication(mux, now_ms()));
}

fn listens(answer: Result<Answer, String>) -> Outcome {
    match answer {
        Ok(answer) if answer.code == 200 => ok("it answers"),
        Ok(answer) => fail(format!("/healthz answers {}", answer.code), "`cvm restart mux`; `cvm logs mux`"),
        Err(why) => {
            fail(why, "`cvm status` shows the mux client's state; `cvm logs mux` shows its last lines")
        }
    }
}

fn registration(mux: &MuxStatus, now: u64) -> Outcome {
    let remedy = "compare MUX_BASE_URL, MUX_REGISTER_KEY and MUX_INBOUND_URL with the mux-server's operator";
    match (mux.registered_until_ms.filter(|at| *at > now), &mux.register_error) {
        (Some(until), None) => ok(format!("for {} more", span(until - now))),
        (Some(until), Some(why)) => {
            warn(format!("for {} more, but it cannot be renewed: {}", span(until - now), clean(why)), remedy)
        }
        (None, Some(why)) => fail(clean(why), remedy),
        (None, None) => warn("not yet", "`cvm logs mux`"),
    }
}

fn queue(mux: &MuxStatus, now: u64) -> Outcome {
    let age = mux.oldest_at_ms.map(|at| now.saturating_sub(at));
    let mut found = format!(
        "{} for the agent, {} to be sent",
        count(mux.waiting, "event waits", "events wait"),
        count(mux.to_send, "answer is", "answers are")
    );
    let Some(age) = age else { return ok(found) };
    found = format!("{found}, the oldest since {}", span(age));
    if age < OLD_MS {
        return ok(found);
    }
    let error = mux.gateway_error.as_ref().or(mux.last_error.as_ref());
    if let Some(error) = error {
        found = format!("{found}: {}", clean(error));
    }
    warn(found, "`cvm status` shows whether the gateway works; nothing is lost meanwhile")
}

fn replication(mux: &MuxStatus, now: u64) -> Outcome {
    match mux.last_unreplicated_ack_at_ms {
        None => ok("the bucket was never too slow for an acknowledgement"),
        Some(at) => warn(
            format!(
                "{} 503 because the bucket did not have it in time, the last {} ago",
                count(mux.unreplicated_acks, "delivery was answered", "deliveries were answered"),
                span(now.saturating_sub(at))
            ),
            "`cvm storage status` shows why the bucket is slow; nothing is lost: the mux-server keeps them and asks again",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn a_refused_registration_an_old_event_and_a_slow_bucket_are_findings() {
        let mut mux = MuxStatus { registered_until_ms: Some(5_000), ..MuxStatus::default() };
        assert_eq!(registration(&mux, 1_000).verdict, Verdict::Ok);
        assert_eq!(queue(&mux, 1_000).verdict, Verdict::Ok);
        assert_eq!(replication(&mux, 1_000).verdict, Verdict::Ok);
        mux.register_error = Some("it answers 401".into());
        assert_eq!(registration(&mux, 1_000).verdict, Verdict::Warn);
        assert_eq!(registration(&mux, 6_000).verdict, Verdict::Fail);
        (mux.waiting, mux.oldest_at_ms) = (3, Some(0));
        assert_eq!(queue(&mux, OLD_MS - 1).verdict, Verdict::Ok);
        assert_eq!(queue(&mux, OLD_MS).verdict, Verdict::Warn);
        (mux.unreplicated_acks, mux.last_unreplicated_ack_at_ms) = (1, Some(0));
        assert_eq!(replication(&mux, 1_000).verdict, Verdict::Warn);
    }
}
