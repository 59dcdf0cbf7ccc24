//! Room supervisor: does PID 1 answer, and how does each service stand?

use super::finding::{Checks, Outcome, fail, ok, warn};
use super::sources::PATIENCE;
use crate::control_socket;
use crate::units::{count, span};
use cvm_protocol::status::{Phase, Service, ServiceState, Status};

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.begin("control socket");
    let status = match control_socket::status_within(PATIENCE) {
        Ok(snapshot) => snapshot.status,
        Err(failure) => {
            let remedy = failure.hint.unwrap_or_default();
            return checks.add("control socket", fail(failure.cause, remedy));
        }
    };
    checks
        .add("control socket", ok(format!("openclaw-cvm {}, up {}", status.version, span(status.uptime_ms))));
    findings(&status, checks);
}

fn findings(status: &Status, checks: &mut Checks<'_>) {
    checks.run("health", || health(status));
    for service in &status.services {
        checks.run(&format!("service {}", service.name), || of_service(service));
    }
    for door in &status.doors {
        checks.add(&format!("open door: {}", door.name), warn(&door.risk, &door.remedy));
    }
    for remark in &status.remarks {
        checks.add(
            &format!("remark: {}", remark.topic),
            warn(&remark.text, "`cvm logs supervisor` shows more"),
        );
    }
}

fn health(status: &Status) -> Outcome {
    if status.healthy {
        return ok("healthy");
    }
    let found = status.unhealthy.join("; ");
    match status.phase {
        Phase::Booting => warn(found, "the boot is not over yet: `cvm status --watch`"),
        Phase::Stopping => warn(found, "the machine is being stopped; nothing to do"),
        Phase::Running | Phase::Degraded | Phase::Unknown => {
            fail(found, "`cvm status` shows each service with its reason and remedy")
        }
    }
}

fn of_service(service: &Service) -> Outcome {
    let name = &service.name;
    let why =
        service.why.as_ref().or(service.last_end.as_ref()).map(|w| format!(": {w}")).unwrap_or_default();
    let found = format!("{}{why}", service.state);
    let remedy = format!("`cvm logs {name}` shows its last lines; next: {}", service.shown_action());
    let fault = |found, remedy| if service.required { fail(found, remedy) } else { warn(found, remedy) };
    match service.state {
        ServiceState::Parked | ServiceState::Stuck => fault(found, remedy),
        _ if service.crash_loop => {
            let failures = count(u64::from(service.failures_in_a_row), "failure", "failures");
            fault(format!("crash loop, {failures} in a row{why}"), remedy)
        }
        ServiceState::Blocked | ServiceState::Waiting | ServiceState::Stopped => warn(found, remedy),
        _ if service.dropped_lines > 0 => {
            let lines = count(service.dropped_lines, "line", "lines");
            warn(
                format!("{}; {lines} of its log dropped", service.state),
                "the disk is slow or full: see disk",
            )
        }
        _ => ok(service.state.as_str()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::{Verdict, findings_of};
    use super::*;
    use crate::status::samples;

    #[test]
    fn every_check_of_a_healthy_machine_is_ok() {
        let all = findings_of(|n| findings(&samples::healthy(), n));
        assert!(all.iter().all(|f| f.verdict == Verdict::Ok), "{all:?}");
    }

    #[test]
    fn every_fault_that_the_supervisor_shows_has_a_remedy() {
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
