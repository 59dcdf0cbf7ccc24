//! Does dockerd answer, and how does it store its layers? It is not critical: trouble here is
//! a warning. May import: `facts`, `finding`, `http`.

use super::facts;
use super::finding::{Notebook, Outcome, ok, skip, warn};
use crate::http;
use cvm_blueprint::paths::DOCKER_SOCKET;
use cvm_blueprint::status::Service;
use std::time::Duration;

const TIME: Duration = Duration::from_secs(4);

pub(crate) fn check(notebook: &mut Notebook<'_>) {
    notebook.about("dockerd");
    let status = facts::status();
    let service = facts::service(status.as_ref(), "dockerd");
    if status.is_some() && service.is_none() {
        return notebook.note("dockerd", skip("ENABLE_DOCKER is 0"));
    }
    let answer = http::get_unix(DOCKER_SOCKET, "/_ping", TIME);
    let up = matches!(&answer, Ok(answer) if answer.code == 200);
    notebook.note("dockerd", if up { ok(format!("{DOCKER_SOCKET} answers")) } else { down(answer, service) });
    if up {
        notebook.check("storage driver", || match http::get_unix(DOCKER_SOCKET, "/info", TIME) {
            Ok(answer) => driver(&answer.body),
            Err(why) => warn(format!("dockerd tells nothing of itself: {why}"), "`cvm logs dockerd`"),
        });
    }
}

fn down(answer: Result<http::Answer, String>, service: Option<&Service>) -> Outcome {
    let found = match answer {
        Ok(answer) => format!("{DOCKER_SOCKET} answers {}", answer.code),
        Err(why) => format!("{DOCKER_SOCKET}: {why}"),
    };
    let Some(service) = service else { return warn(found, "`cvm status`, once the supervisor answers") };
    let why =
        service.why.as_ref().or(service.last_end.as_ref()).map(|w| format!(", {w}")).unwrap_or_default();
    let remedy = format!("`cvm logs dockerd` shows its last words; next: {}", service.next_action);
    warn(format!("{found}; dockerd is {}{why}", service.state), remedy)
}

fn driver(info: &[u8]) -> Outcome {
    let info: serde_json::Value = serde_json::from_slice(info).unwrap_or_default();
    match info["Driver"].as_str() {
        Some("vfs") => warn(
            "vfs: every layer is a whole copy of the one below",
            "give dockerd a volume: in docker-compose.yml: volumes: [docker:/var/lib/docker]; see overlay",
        ),
        Some(driver) => ok(driver),
        None => warn("dockerd does not name it", "`docker info`"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::status::samples::service;

    #[test]
    fn vfs_works_but_is_worth_a_word() {
        assert_eq!(driver(br#"{"Driver":"overlay2"}"#).verdict, Verdict::Ok);
        assert_eq!(driver(br#"{"Driver":"vfs"}"#).verdict, Verdict::Warn);
        assert_eq!(driver(b"garbage").verdict, Verdict::Warn);
    }

    #[test]
    fn a_silent_dockerd_is_explained_by_the_supervisor() {
        let dockerd =
            Service { last_end: Some("exited with code 1".into()), ..service("dockerd", "waiting") };
        let outcome = down(Err("nobody listens there".into()), Some(&dockerd));
        assert_eq!(outcome.verdict, Verdict::Warn);
        assert!(outcome.found.ends_with("dockerd is waiting, exited with code 1"), "{}", outcome.found);
    }
}
