//! The snapshot of the machine's state that operators are shown. Reads everything, and nobody reads it back.

use crate::description::Courtesy;
use crate::machine::{self, Machine, Next, ServiceRecord, StepRecord, StepState};
use crate::moment::Moment;
use crate::plan::Weight;
use crate::service::{Life, State};
use cvm_protocol::doors::Door;
use cvm_protocol::status::{self, Fingerprint, Phase, Remark, Service, ServiceState, Status, Step, Storage};
use cvm_protocol::time::words;
use std::time::Duration;

/// What the machine cannot know of itself.
#[derive(Debug, Clone)]
pub struct About {
    pub version: String,
    pub storage: Storage,
    pub keys: Vec<Fingerprint>,
    pub doors: Vec<Door>,
    pub remarks: Vec<Remark>,
}

/// The snapshot of this moment.
pub fn snapshot(machine: &Machine, about: &About, now: Moment) -> Status {
    let boot: Vec<Step> = machine.steps().iter().map(|r| step(r, now)).collect();
    let services: Vec<Service> = machine.services().iter().map(|r| service(machine, r, now)).collect();
    let unhealthy = complaints(machine, &boot, &services);
    Status {
        version: about.version.clone(),
        phase: phase(machine),
        uptime_ms: now.as_millis(),
        frozen: false,
        storage: about.storage.clone(),
        keys: about.keys.clone(),
        doors: about.doors.clone(),
        remarks: about.remarks.clone(),
        boot,
        services,
        healthy: unhealthy.is_empty(),
        unhealthy,
    }
}

fn phase(machine: &Machine) -> Phase {
    if machine.phase() != machine::Phase::Up {
        return Phase::Stopping;
    }
    let required = || machine.steps().iter().filter(|r| r.step.weight == Weight::Required);
    if required().any(|r| matches!(r.state, StepState::Failed { .. })) {
        Phase::Degraded
    } else if required().all(|r| matches!(r.state, StepState::Done { .. })) {
        Phase::Running
    } else {
        Phase::Booting
    }
}

fn complaints(machine: &Machine, boot: &[Step], services: &[Service]) -> Vec<String> {
    let mut all = Vec::new();
    if machine.phase() != machine::Phase::Up {
        all.push("the machine is stopping".to_owned());
    }
    for step in boot.iter().filter(|s| s.required) {
        if let Some(why) = &step.why {
            all.push(format!("boot step {}: {why}", step.name));
        }
    }
    for service in
        services.iter().filter(|s| s.required && !matches!(s.state, ServiceState::Up | ServiceState::Ready))
    {
        let why = service.why.as_ref().map(|w| format!(": {w}")).unwrap_or_default();
        all.push(format!("{} is {}{why}", service.name, service.state));
    }
    for service in services.iter().filter(|s| s.required && s.state == ServiceState::Up && !s.is_ready()) {
        all.push(format!("{} runs but is not ready", service.name));
    }
    for service in services.iter().filter(|s| s.required && s.crash_loop && s.state != ServiceState::Ready) {
        all.push(format!(
            "{} is in a crash loop: {} failures in a row",
            service.name, service.failures_in_a_row
        ));
    }
    all
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

fn step(record: &StepRecord, now: Moment) -> Step {
    let mut shown = Step {
        name: record.step.name.0.to_owned(),
        state: status::StepState::Unknown,
        required: record.step.weight == Weight::Required,
        began_ms: None,
        took_ms: None,
        tries: record.tries,
        why: None,
        next_try_in_ms: None,
    };
    shown.state = match &record.state {
        StepState::Pending => status::StepState::Waiting,
        StepState::Running { since } | StepState::Killing { since, .. } => {
            shown.began_ms = Some(since.as_millis());
            status::StepState::Running
        }
        StepState::Done { began, took } => {
            shown.began_ms = Some(began.as_millis());
            shown.took_ms = Some(millis(*took));
            status::StepState::Done
        }
        StepState::Failed { began, took, why, next } => {
            shown.began_ms = Some(began.as_millis());
            shown.took_ms = Some(millis(*took));
            shown.why = Some(why.clone());
            if let Next::TryAt(at) = next {
                shown.next_try_in_ms = Some(millis(at.since(now)));
            }
            status::StepState::Failed
        }
    };
    shown
}

fn service(machine: &Machine, record: &ServiceRecord, now: Moment) -> Service {
    let unit = &record.unit;
    let name = record.service.name;
    let mut shown = Service {
        name: name.to_owned(),
        what: record.service.what.to_owned(),
        state: ServiceState::Unknown,
        why: None,
        pid: None,
        up_ms: None,
        first_exec_ms: record.first_exec.map(Moment::as_millis),
        first_ready_ms: record.first_ready.map(Moment::as_millis),
        restarts: unit.restarts(),
        failures_in_a_row: unit.failures(),
        crash_loop: unit.in_crash_loop(),
        last_end: None,
        last_end_ago_ms: None,
        next_start_in_ms: None,
        next_action: None,
        required: record.service.required,
        dropped_lines: record.dropped_lines,
        facts: record.facts.clone(),
    };
    if let Some(past) = unit.last() {
        let text = match (&past.why, &past.end) {
            (Some(why), _) => why.clone(),
            (None, Some(end)) => end.to_string(),
            (None, None) => "ended".to_owned(),
        };
        shown.last_end = Some(format!("{text}, after {}", words(past.ran)));
        shown.last_end_ago_ms = Some(millis(now.since(past.at)));
    }
    (shown.state, shown.next_action) = match unit.state() {
        State::Idle => blocked(machine, record, &mut shown),
        State::Preparing { .. } => {
            (ServiceState::Preparing, Some("starts when its preparation is done".to_owned()))
        }
        State::Starting { .. } => (ServiceState::Starting, None),
        State::Running { pid, since, ready, life, .. } => {
            shown.pid = Some(*pid);
            shown.up_ms = Some(millis(now.since(*since)));
            let failing = unit.failing();
            shown.why = (!failing.is_empty()).then(|| format!("not ready: {}", failing.join(", ")));
            running(record, *ready, *since, *life)
        }
        State::Repairing { .. } => {
            (ServiceState::Repairing, Some("starts once more when its repair command is done".to_owned()))
        }
        State::Ending { pid, phase: crate::service::Phase::Stuck, .. } => {
            shown.pid = *pid;
            shown.why =
                Some("something of its last run may still be alive; nothing is started over it".to_owned());
            (
                ServiceState::Stuck,
                Some(
                    "looked for again every 10 s; if it stays: `dmesg`, the disk, a restart of the container"
                        .to_owned(),
                ),
            )
        }
        State::Ending { pid, until, .. } => {
            shown.pid = *pid;
            (ServiceState::Stopping, Some(format!("next measure in {}", words(until.since(now)))))
        }
        State::Waiting { .. } if unit.is_held() => {
            shown.why = unit.last().and_then(|p| p.why.clone());
            (ServiceState::Waiting, Some("starts when everything that needs its gate has ended".to_owned()))
        }
        State::Waiting { until } => {
            shown.why = unit.last().and_then(|p| p.why.clone());
            shown.next_start_in_ms = Some(millis(until.since(now)));
            (ServiceState::Waiting, Some(format!("starts in {}", words(until.since(now)))))
        }
        State::Parked { why } => {
            shown.why = Some(why.clone());
            (ServiceState::Parked, Some(format!("mend it, then `cvm start {name}`")))
        }
        State::Down => (ServiceState::Stopped, Some(format!("`cvm start {name}`"))),
    };
    shown
}

fn blocked(machine: &Machine, record: &ServiceRecord, shown: &mut Service) -> (ServiceState, Option<String>) {
    let Some(missing) = machine.missing_for(&record.service) else {
        if let Some(Courtesy { to, at_most }) = machine.courtesy_of(&record.service) {
            shown.why = Some(format!("the {to} starts first"));
            let at_most = words(at_most);
            let next = format!("starts when the {to} is ready, {at_most} after the boot at the latest");
            return (ServiceState::Blocked, Some(next));
        }
        let first = machine.steps().iter().filter(|r| r.step.before_services).map(|r| r.step.name.0);
        let first: Vec<&str> = first.collect();
        let next = format!("starts when boot steps {} have ended", first.join(" and "));
        return (ServiceState::Blocked, Some(next));
    };
    let name = missing.step.name.0;
    shown.why = match &missing.state {
        StepState::Failed { why, .. } => Some(format!("boot step {name}: {why}")),
        _ => Some(format!("boot step {name} is not done yet")),
    };
    let next = match &missing.state {
        StepState::Failed { next: Next::Operator, .. } => {
            format!("mend it, then `cvm start {}`", record.service.name)
        }
        StepState::Failed { next: Next::Underway, .. } => {
            format!("starts when boot step {name} is done; {} keeps trying", missing.provided_by())
        }
        _ => format!("starts when boot step {name} is done"),
    };
    (ServiceState::Blocked, Some(next))
}

fn running(record: &ServiceRecord, ready: bool, since: Moment, life: Life) -> (ServiceState, Option<String>) {
    let Some(limit) = record.unit.silence_limit(since, life) else {
        return match ready {
            true if record.service.readiness.is_some() => (ServiceState::Ready, None),
            true => (ServiceState::Up, None),
            false => (ServiceState::Up, Some("becomes ready".to_owned())),
        };
    };
    if ready {
        return (ServiceState::Ready, None);
    }
    let at = words(Duration::from_millis(limit.as_millis()));
    (ServiceState::Up, Some(format!("becomes ready; ended if it stays silent until uptime {at}")))
}
