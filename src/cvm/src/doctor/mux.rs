//! Room mux: does the mux client accept messages? What it reports about itself is in room services.

use super::finding::{Checks, Outcome, fail, ok, skip};
use super::sources;
use crate::http::{self, Answer};
use cvm_protocol::mux::MUX_CLIENT;

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
