//! Is PID 1 there, and what does it say of itself? May import: `facts`, `finding`,
//! `socket`, `words`.

use super::facts::PATIENCE;
use super::finding::{Notebook, Outcome, fail, ok, warn};
use crate::socket;
use crate::words::{count, span};
use cvm_protocol::status::{Phase, Service, Status};

pub(crate) fn check(notebook: &mut Notebook<'_>) {
    notebook.about("control socket");
    let status = match socket::status_within(PATIENCE) {
        Ok(snapshot) => snapshot.status,
        Err(trouble) => {
            let remedy = trouble.hint.unwrap_or_default();
            return notebook.note("control socket", fail(trouble.cause, remedy));
        }
    };
    notebook.note(
        "control socket",
        ok(format!("openclaw-cvm {}, up {}", status.version, span(status.uptime_ms))),
    );
    findings(&status, notebook);
}

fn findings(status: &Status, notebook: &mut Notebook<'_>) {
    notebook.check("health", || health(status));
    for service in &status.services {
        notebook.check(&format!("service {}", service.name), || of_service(service));
    }
    for door in &status.doors {
        notebook.note(&format!("open door: {}", door.name), warn(&door.risk, &door.remedy));
    }
    for remark in &status.remarks {
        notebook.note(
            &format!("remark: {}", remark.topic),
            warn(&remark.text, "`cvm logs supervisor` tells more"),
        );
    }
}

fn health(status: &Status) -> Outcome {
    if status.healthy {
        return ok("healthy");
    }
    let found = status.unhealthy.join("; ");
    match status.phase {
        Phase::Booting => warn(found, "the boot is under way: `cvm status --watch`"),
        Phase::Stopping => warn(found, "it is being stopped; nothing to do"),
        Phase::Running | Phase::Degraded => {
            fail(found, "`cvm status` shows each service with its reason and remedy")
        }
    }
}

fn of_service(service: &Service) -> Outcome {
    let name = &service.name;
    let why =
        service.why.as_ref().or(service.last_end.as_ref()).map(|w| format!(": {w}")).unwrap_or_default();
    let found = format!("{}{why}", service.state);
    let remedy = format!("`cvm logs {name}` shows its last words; next: {}", service.next_action);
    let trouble = |found, remedy| if service.required { fail(found, remedy) } else { warn(found, remedy) };
    match service.state.as_str() {
        "parked" | "stuck" => trouble(found, remedy),
        _ if service.crash_loop => {
            let failures = count(u64::from(service.failures_in_a_row), "failure", "failures");
            trouble(format!("crash loop, {failures} in a row{why}"), remedy)
        }
        "blocked" | "waiting" | "stopped" => warn(found, remedy),
        _ if service.dropped_lines > 0 => {
            let lines = count(service.dropped_lines, "line", "lines");
            warn(
                format!("{}; {lines} of its log dropped", service.state),
                "the disk is slow or full: see disk",
            )
        }
        _ => ok(service.state.clone()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::{Verdict, findings_of};
    use super::*;
    use crate::status::samples;

    #[test]
    fn a_healthy_machine_has_nothing_but_well() {
        let all = findings_of(|n| findings(&samples::healthy(), n));
        assert!(all.iter().all(|f| f.verdict == Verdict::Ok), "{all:?}");
    }

    #[test]
    fn every_trouble_of_the_supervisor_has_a_remedy() {
        let all = findings_of(|n| findings(&samples::troubled(), n));
        let of = |check: &str| all.iter().find(|f| f.check == check).unwrap().verdict;
        assert_eq!(of("health"), Verdict::Fail);
        assert_eq!(of("service sshd"), Verdict::Ok);
        assert_eq!(of("service gateway"), Verdict::Warn);
        assert_eq!(of("service tunnel"), Verdict::Fail);
        assert_eq!(of("service mux"), Verdict::Fail);
        assert_eq!(of("open door: ENABLE_DOCKER=1"), Verdict::Warn);
        assert_eq!(of("remark: docker"), Verdict::Warn);
        assert!(all.iter().all(|f| f.verdict == Verdict::Ok || f.remedy.is_some()));
    }
}
