//! `cvm start`, `stop`, `restart`: gives an order to the supervisor, and waits for its outcome.
//!
//! The supervisor takes an order at once and carries it out in its own time; this command watches the
//! status that `cvm status` shows. A service counts as started when it is ready.

use crate::args::{ServiceArgs, StopArgs};
use crate::control_socket;
use crate::failure::{Exit, Failure};
use crate::stdout;
use crate::text::clean;
use crate::units::span;
use cvm_protocol::control::{Body, Verb};
use cvm_protocol::status::{Service, ServiceState, Status, StepState};
use cvm_protocol::time::words;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Between two requests for the status. A start takes seconds.
const INTERVAL: Duration = Duration::from_millis(250);
/// A supervisor that does not answer for a while may be busy; after this it is gone.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    Start,
    Stop,
    Restart,
}

impl Order {
    fn name(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Restart => "restart",
        }
    }

    fn verb(self, service: String) -> Verb {
        match self {
            Self::Start => Verb::Start { service },
            Self::Stop => Verb::Stop { service },
            Self::Restart => Verb::Restart { service },
        }
    }

    fn usual_limit(self) -> Duration {
        Duration::from_secs(match self {
            Self::Start => 60,
            // The gateway itself drains for up to 315 s, if OPENCLAW_GATEWAY_STOP_TIMEOUT lets it.
            Self::Stop => 340,
            Self::Restart => 400,
        })
    }
}

/// The service that the order is for, and how long to wait.
pub(crate) struct Target {
    service: String,
    waits: bool,
    timeout: Option<Duration>,
    force: bool,
}

impl From<ServiceArgs> for Target {
    fn from(args: ServiceArgs) -> Self {
        Self { service: args.service, waits: !args.no_wait, timeout: args.timeout, force: false }
    }
}

impl From<StopArgs> for Target {
    fn from(args: StopArgs) -> Self {
        Self { force: args.force, ..args.common.into() }
    }
}

pub(crate) fn run(order: Order, target: &Target) -> Result<Exit, Failure> {
    let name = &target.service;
    let what = format!("{} {name}", order.name());
    if order == Order::Stop && name == "sshd" && !target.force {
        let hint = "`cvm restart sshd` keeps it; `cvm stop sshd --force` if you have another way in";
        return Err(Failure::new(Exit::Usage, what, "nobody could log in any more").hint(hint));
    }
    let before = control_socket::status()?.status;
    let known = find(&before, name).cloned();
    let unreachable = |cause: &str| Failure::new(Exit::Unreachable, &what, cause);
    let Body::Taken = control_socket::ask(&what, order.verb(name.clone()))? else {
        return Err(unreachable("the supervisor's answer does not fit the order"));
    };
    if !target.waits {
        stdout::print(&format!("{name}: order taken; `cvm status` shows its outcome\n"))?;
        return Ok(Exit::Good);
    }
    let Some(known) = known else {
        return Err(unreachable("the supervisor took the order, but does not show this service"));
    };
    let limit = target.timeout.unwrap_or_else(|| order.usual_limit());
    follow(order, &known, limit)
}

fn follow(order: Order, before: &Service, limit: Duration) -> Result<Exit, Failure> {
    let what = format!("{} {}", order.name(), before.name);
    let began = Instant::now();
    let mut last_answer = Instant::now();
    let mut progress = StateLine::new(&before.name);
    loop {
        let outcome = match control_socket::status() {
            Ok(snapshot) => {
                last_answer = Instant::now();
                judge(order, before, &snapshot.status)
            }
            Err(failure) if last_answer.elapsed() > PATIENCE => {
                progress.clear();
                return Err(failure);
            }
            Err(failure) => Outcome::Pending { state: failure.cause, next: None },
        };
        match outcome {
            Outcome::Pending { .. } if began.elapsed() >= limit => {
                progress.clear();
                let cause = format!("it was not done within {}", words(limit));
                let hint = format!("it goes on: `cvm status --watch`; `cvm logs {}`", before.name);
                return Err(Failure::new(Exit::Bad, what, cause).hint(hint));
            }
            Outcome::Pending { state, next } => progress.show(&state, next.as_deref(), began.elapsed()),
            Outcome::Done(state) => {
                progress.clear();
                let took = words(began.elapsed());
                stdout::print(&format!("{}: {} (after {took})\n", before.name, clean(&state)))?;
                return Ok(Exit::Good);
            }
            Outcome::Failed { why, hint } => {
                progress.clear();
                return Err(Failure::new(Exit::Bad, what, why).hint(hint));
            }
        }
        std::thread::sleep(INTERVAL);
    }
}

fn find<'s>(status: &'s Status, name: &str) -> Option<&'s Service> {
    status.services.iter().find(|s| s.name == name)
}

/// What has become of an order.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The state of the service, and its next action.
    Pending {
        state: String,
        next: Option<String>,
    },
    Done(String),
    Failed {
        why: String,
        hint: String,
    },
}

/// The outcome of an order by a snapshot. `before` is the service as it was when the order was given.
fn judge(order: Order, before: &Service, now: &Status) -> Outcome {
    let Some(service) = find(now, &before.name) else {
        return Outcome::Pending { state: "the supervisor does not show it".to_owned(), next: None };
    };
    let pending = || pending(service);
    let name = &service.name;
    match service.state {
        ServiceState::Stuck => Outcome::Failed {
            why: service.why.clone().unwrap_or_else(|| "it is stuck".to_owned()),
            hint: service.shown_action().to_owned(),
        },
        ServiceState::Stopped if order == Order::Stop => Outcome::Done(service.state.to_string()),
        _ if order == Order::Stop => pending(),
        // The old process still runs, so the order has not acted yet.
        ServiceState::Up | ServiceState::Ready if order == Order::Restart && is_same_run(before, service) => {
            pending()
        }
        _ if service.is_ready() => Outcome::Done(running(service)),
        ServiceState::Parked => Outcome::Failed {
            why: service.why.clone().unwrap_or_else(|| "it is parked".to_owned()),
            hint: format!("`cvm logs {name}` shows its last lines; {}", service.shown_action()),
        },
        // A wait that began before the order ends as soon as the order acts.
        ServiceState::Waiting if has_ended_since(before, service) => Outcome::Failed {
            why: service
                .why
                .clone()
                .or_else(|| service.last_end.clone())
                .unwrap_or_else(|| "it ended".to_owned()),
            hint: format!("`cvm logs {name}` shows its last lines; it {}", service.shown_action()),
        },
        ServiceState::Blocked => blocked(service, now),
        _ => pending(),
    }
}

fn is_same_run(before: &Service, now: &Service) -> bool {
    before.pid.is_some() && before.pid == now.pid && before.restarts == now.restarts
}

fn has_ended_since(before: &Service, now: &Service) -> bool {
    before.state != ServiceState::Waiting
        || before.restarts != now.restarts
        || before.failures_in_a_row != now.failures_in_a_row
}

/// A blocked service waits for a boot step: the order is pending as long as one runs.
fn blocked(service: &Service, now: &Status) -> Outcome {
    if now.boot.iter().any(|step| step.state == StepState::Running) {
        return pending(service);
    }
    match now.boot.iter().find(|step| step.required && step.state == StepState::Failed) {
        Some(step) => Outcome::Failed {
            why: service.why.clone().unwrap_or_else(|| format!("boot step {} {}", step.name, step.state)),
            hint: match step.next_try_in_ms {
                Some(ms) => format!("the step is tried again in {}; `cvm status` shows the boot", span(ms)),
                None => format!("{}; `cvm status` shows the boot", service.shown_action()),
            },
        },
        None => pending(service),
    }
}

fn running(service: &Service) -> String {
    match service.pid {
        Some(pid) => format!("{}, pid {pid}", service.state),
        None => service.state.to_string(),
    }
}

fn pending(service: &Service) -> Outcome {
    Outcome::Pending { state: service.state.to_string(), next: service.next_action.clone() }
}

/// On a terminal one line that changes; elsewhere a line for each change of state.
struct StateLine {
    name: String,
    is_terminal: bool,
    /// The state in the last line, without the part that counts down.
    shown: String,
}

impl StateLine {
    fn new(name: &str) -> Self {
        Self { name: clean(name), is_terminal: std::io::stderr().is_terminal(), shown: String::new() }
    }

    fn show(&mut self, state: &str, next: Option<&str>, since: Duration) {
        let described = clean(&next.map_or_else(|| state.to_owned(), |next| format!("{state}, {next}")));
        let mut stderr = std::io::stderr().lock();
        // A lost line of progress is no loss.
        if self.is_terminal {
            let _ = write!(stderr, "\r\x1b[K{}: {described} ({} s)", self.name, since.as_secs());
        } else if state != self.shown {
            let _ = writeln!(stderr, "{}: {described}", self.name);
        }
        state.clone_into(&mut self.shown);
    }

    fn clear(&mut self) {
        if self.is_terminal && !self.shown.is_empty() {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::samples::{healthy, running as up, service, step};

    fn with(now: Service) -> Status {
        Status { services: vec![now], boot: Vec::new(), ..healthy() }
    }

    fn is_pending(outcome: &Outcome) -> bool {
        matches!(outcome, Outcome::Pending { .. })
    }

    #[test]
    fn a_restart_is_done_only_when_another_process_is_ready() {
        let before = up("gateway", ServiceState::Ready, 100, (1, Some(2)));
        let judge = |now: Service| judge(Order::Restart, &before, &with(now));
        assert!(is_pending(&judge(before.clone())));
        assert!(is_pending(&judge(service("gateway", ServiceState::Stopping))));
        assert!(is_pending(&judge(service("gateway", ServiceState::Starting))));
        let not_ready = Service {
            next_action: Some("becomes ready".into()),
            ..up("gateway", ServiceState::Up, 200, (1, Some(2)))
        };
        assert!(is_pending(&judge(not_ready)));
        let ready = up("gateway", ServiceState::Ready, 200, (1, Some(2)));
        assert_eq!(judge(ready), Outcome::Done("ready, pid 200".into()));
        // A process id can be used again.
        let recycled = Service { restarts: 1, ..before.clone() };
        assert_eq!(judge(recycled), Outcome::Done("ready, pid 100".into()));
    }

    #[test]
    fn the_start_of_a_running_service_is_done_at_once() {
        let before = up("sshd", ServiceState::Up, 100, (1, None));
        assert_eq!(judge(Order::Start, &before, &with(before.clone())), Outcome::Done("up, pid 100".into()));
    }

    #[test]
    fn a_start_that_ends_in_a_wait_has_failed_and_says_how() {
        let before = Service { failures_in_a_row: 2, ..service("gateway", ServiceState::Waiting) };
        // A snapshot from before the order acted.
        assert!(is_pending(&judge(Order::Start, &before, &with(before.clone()))));
        let now = Service {
            failures_in_a_row: 3,
            last_end: Some("exited with code 1, after 3 s".into()),
            next_action: Some("starts in 20 s".into()),
            ..service("gateway", ServiceState::Waiting)
        };
        let Outcome::Failed { why, hint } = judge(Order::Start, &before, &with(now)) else { panic!() };
        assert_eq!(why, "exited with code 1, after 3 s");
        assert!(hint.contains("cvm logs gateway") && hint.contains("starts in 20 s"), "{hint}");
    }

    #[test]
    fn a_blocked_start_fails_when_no_step_can_help_any_more() {
        let before = service("gateway", ServiceState::Blocked);
        let now = |state| Status {
            boot: vec![step("home", state, None, None)],
            ..with(Service {
                why: Some("boot step home: no space".into()),
                ..service("gateway", ServiceState::Blocked)
            })
        };
        assert!(is_pending(&judge(Order::Start, &before, &now(StepState::Running))));
        assert!(is_pending(&judge(Order::Start, &before, &now(StepState::Waiting))));
        let outcome = judge(Order::Start, &before, &now(StepState::Failed));
        assert!(matches!(outcome, Outcome::Failed { why, .. } if why == "boot step home: no space"));
    }

    #[test]
    fn a_stop_is_done_when_the_service_is_stopped_and_fails_when_it_is_stuck() {
        let before = up("gateway", ServiceState::Ready, 100, (1, Some(2)));
        let judge = |state| judge(Order::Stop, &before, &with(service("gateway", state)));
        assert!(
            is_pending(&judge(ServiceState::Ready))
                && is_pending(&judge(ServiceState::Stopping))
                && is_pending(&judge(ServiceState::Waiting))
        );
        assert_eq!(judge(ServiceState::Stopped), Outcome::Done("stopped".into()));
        assert!(matches!(judge(ServiceState::Stuck), Outcome::Failed { .. }));
    }

    #[test]
    fn the_start_of_a_parked_service_fails_with_its_reason() {
        let now = Service { why: Some("exit 78 twice".into()), ..service("gateway", ServiceState::Parked) };
        let outcome = judge(Order::Start, &service("gateway", ServiceState::Stopped), &with(now));
        assert!(matches!(outcome, Outcome::Failed { why, .. } if why == "exit 78 twice"));
    }
}
