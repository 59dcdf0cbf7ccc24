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
use cvm_protocol::status::{Service, Status};
use cvm_protocol::time::words;
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Between two requests for the status. A start takes seconds.
const INTERVAL: Duration = Duration::from_millis(250);
/// A supervisor that does not answer for a while may be busy; after this it is gone.
const PATIENCE: Duration = Duration::from_secs(10);
/// What `next_action` says when nothing is due.
const NOTHING: &str = "-";

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
    match control_socket::ask(&what, order.verb(name.clone()))? {
        Body::Taken => {}
        _ => {
            return Err(Failure::new(
                Exit::Unreachable,
                what,
                "the supervisor's answer does not fit the order",
            ));
        }
    }
    if !target.waits {
        stdout::print(&format!("{name}: order taken; `cvm status` shows its outcome\n"))?;
        return Ok(Exit::Good);
    }
    let Some(known) = known else {
        return Err(Failure::new(
            Exit::Unreachable,
            what,
            "the supervisor took the order, but does not show this service",
        ));
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
            Err(failure) => Outcome::Pending(failure.cause),
        };
        match outcome {
            Outcome::Pending(_) if began.elapsed() >= limit => {
                progress.clear();
                let cause = format!("it was not done within {}", words(limit));
                let hint = format!("it goes on: `cvm status --watch`; `cvm logs {}`", before.name);
                return Err(Failure::new(Exit::Bad, what, cause).hint(hint));
            }
            Outcome::Pending(state) => progress.show(&state, began.elapsed()),
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
    Pending(String),
    Done(String),
    Failed { why: String, hint: String },
}

/// The outcome of an order by a snapshot. `before` is the service as it was when the order was given.
fn judge(order: Order, before: &Service, now: &Status) -> Outcome {
    let Some(service) = find(now, &before.name) else {
        return Outcome::Pending("the supervisor does not show it".to_owned());
    };
    let pending = || Outcome::Pending(described(service));
    let name = &service.name;
    match service.state.as_str() {
        "stuck" => Outcome::Failed {
            why: service.why.clone().unwrap_or_else(|| "it is stuck".to_owned()),
            hint: service.next_action.clone(),
        },
        "stopped" if order == Order::Stop => Outcome::Done("stopped".to_owned()),
        _ if order == Order::Stop => pending(),
        // The old process still runs, so the order has not acted yet.
        "up" | "ready" if order == Order::Restart && is_same_run(before, service) => pending(),
        "ready" => Outcome::Done(running(service)),
        "up" if service.next_action == NOTHING => Outcome::Done(running(service)),
        "parked" => Outcome::Failed {
            why: service.why.clone().unwrap_or_else(|| "it is parked".to_owned()),
            hint: format!("`cvm logs {name}` shows its last lines; {}", service.next_action),
        },
        // A wait that began before the order ends as soon as the order acts.
        "waiting" if has_ended_since(before, service) => Outcome::Failed {
            why: service
                .why
                .clone()
                .or_else(|| service.last_end.clone())
                .unwrap_or_else(|| "it ended".to_owned()),
            hint: format!("`cvm logs {name}` shows its last lines; it {}", service.next_action),
        },
        "blocked" => blocked(service, now),
        _ => pending(),
    }
}

fn is_same_run(before: &Service, now: &Service) -> bool {
    before.pid.is_some() && before.pid == now.pid && before.restarts == now.restarts
}

fn has_ended_since(before: &Service, now: &Service) -> bool {
    before.state != "waiting"
        || before.restarts != now.restarts
        || before.failures_in_a_row != now.failures_in_a_row
}

/// A blocked service waits for a boot step: the order is pending as long as one runs.
fn blocked(service: &Service, now: &Status) -> Outcome {
    if now.boot.iter().any(|step| step.state == "running") {
        return Outcome::Pending(described(service));
    }
    match now.boot.iter().find(|step| step.required && step.state == "failed") {
        Some(step) => Outcome::Failed {
            why: service.why.clone().unwrap_or_else(|| format!("boot step {} {}", step.name, step.state)),
            hint: match step.next_try_in_ms {
                Some(ms) => format!("the step is tried again in {}; `cvm status` shows the boot", span(ms)),
                None => format!("{}; `cvm status` shows the boot", service.next_action),
            },
        },
        None => Outcome::Pending(described(service)),
    }
}

fn running(service: &Service) -> String {
    match service.pid {
        Some(pid) => format!("{}, pid {pid}", service.state),
        None => service.state.clone(),
    }
}

fn described(service: &Service) -> String {
    if service.next_action == NOTHING {
        return service.state.clone();
    }
    format!("{}, {}", service.state, service.next_action)
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

    fn show(&mut self, described: &str, since: Duration) {
        let described = clean(described);
        let state = described.split(',').next().unwrap_or_default();
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
        matches!(outcome, Outcome::Pending(_))
    }

    #[test]
    fn a_restart_is_done_only_when_another_process_is_ready() {
        let before = up("gateway", "ready", 100, (1, Some(2)));
        let judge = |now: Service| judge(Order::Restart, &before, &with(now));
        assert!(is_pending(&judge(before.clone())));
        assert!(is_pending(&judge(service("gateway", "stopping"))));
        assert!(is_pending(&judge(service("gateway", "starting"))));
        let not_ready =
            Service { next_action: "becomes ready".into(), ..up("gateway", "up", 200, (1, Some(2))) };
        assert!(is_pending(&judge(not_ready)));
        let ready = up("gateway", "ready", 200, (1, Some(2)));
        assert_eq!(judge(ready), Outcome::Done("ready, pid 200".into()));
        // A process id can be used again.
        let recycled = Service { restarts: 1, ..before.clone() };
        assert_eq!(judge(recycled), Outcome::Done("ready, pid 100".into()));
    }

    #[test]
    fn the_start_of_a_running_service_is_done_at_once() {
        let before = up("sshd", "up", 100, (1, None));
        assert_eq!(judge(Order::Start, &before, &with(before.clone())), Outcome::Done("up, pid 100".into()));
    }

    #[test]
    fn a_start_that_ends_in_a_wait_has_failed_and_says_how() {
        let before = Service { failures_in_a_row: 2, ..service("gateway", "waiting") };
        // A snapshot from before the order acted.
        assert!(is_pending(&judge(Order::Start, &before, &with(before.clone()))));
        let now = Service {
            failures_in_a_row: 3,
            last_end: Some("exited with code 1, after 3 s".into()),
            next_action: "starts in 20 s".into(),
            ..service("gateway", "waiting")
        };
        let Outcome::Failed { why, hint } = judge(Order::Start, &before, &with(now)) else { panic!() };
        assert_eq!(why, "exited with code 1, after 3 s");
        assert!(hint.contains("cvm logs gateway") && hint.contains("starts in 20 s"), "{hint}");
    }

    #[test]
    fn a_blocked_start_fails_when_no_step_can_help_any_more() {
        let before = service("gateway", "blocked");
        let now = |state: &str| Status {
            boot: vec![step("home", state, None, None)],
            ..with(Service { why: Some("boot step home: no space".into()), ..service("gateway", "blocked") })
        };
        assert!(is_pending(&judge(Order::Start, &before, &now("running"))));
        assert!(is_pending(&judge(Order::Start, &before, &now("waiting"))));
        let outcome = judge(Order::Start, &before, &now("failed"));
        assert!(matches!(outcome, Outcome::Failed { why, .. } if why == "boot step home: no space"));
    }

    #[test]
    fn a_stop_is_done_when_the_service_is_stopped_and_fails_when_it_is_stuck() {
        let before = up("gateway", "ready", 100, (1, Some(2)));
        let judge = |state: &str| judge(Order::Stop, &before, &with(service("gateway", state)));
        assert!(
            is_pending(&judge("ready")) && is_pending(&judge("stopping")) && is_pending(&judge("waiting"))
        );
        assert_eq!(judge("stopped"), Outcome::Done("stopped".into()));
        assert!(matches!(judge("stuck"), Outcome::Failed { .. }));
    }

    #[test]
    fn the_start_of_a_parked_service_fails_with_its_reason() {
        let now = Service { why: Some("exit 78 twice".into()), ..service("gateway", "parked") };
        let outcome = judge(Order::Start, &service("gateway", "stopped"), &with(now));
        assert!(matches!(outcome, Outcome::Failed { why, .. } if why == "exit 78 twice"));
    }
}
