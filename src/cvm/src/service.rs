//! `cvm start`, `stop`, `restart`: the order, and then what comes of it.
//!
//! The supervisor takes an order at once and carries it out in its own time; this waits and
//! watches through the same status that `cvm status` shows.
//!
//! Refuses to stop the only way in without being told twice, and to call a service started
//! before it is ready. May import: `args`, `out`, `socket`, `trouble`, `words`.

use crate::args::{ServiceArgs, StopArgs};
use crate::out;
use crate::socket;
use crate::trouble::{Exit, Trouble};
use crate::words::{clean, span};
use cvm_protocol::control::{Body, Verb};
use cvm_protocol::status::{Service, Status};
use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Between two looks. A start takes seconds.
const LOOK: Duration = Duration::from_millis(250);
/// A supervisor that does not answer may be busy; after this it is away.
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
    fn word(self) -> &'static str {
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

    fn patience(self) -> Duration {
        Duration::from_secs(match self {
            Self::Start => 60,
            // The gateway itself drains for up to 315 s, if OPENCLAW_GATEWAY_STOP_TIMEOUT lets it.
            Self::Stop => 340,
            Self::Restart => 400,
        })
    }
}

/// What to do, to whom, and how long to watch.
pub(crate) struct Request {
    service: String,
    waits: bool,
    timeout: Option<Duration>,
    force: bool,
}

impl From<ServiceArgs> for Request {
    fn from(args: ServiceArgs) -> Self {
        Self { service: args.service, waits: !args.no_wait, timeout: args.timeout, force: false }
    }
}

impl From<StopArgs> for Request {
    fn from(args: StopArgs) -> Self {
        Self { force: args.force, ..args.common.into() }
    }
}

pub(crate) fn run(order: Order, request: &Request) -> Result<Exit, Trouble> {
    let name = &request.service;
    let what = format!("{} {name}", order.word());
    if order == Order::Stop && name == "sshd" && !request.force {
        let hint = "`cvm restart sshd` keeps it; `cvm stop sshd --force` if you have another way in";
        return Err(Trouble::new(Exit::Usage, what, "nobody could log in any more").hint(hint));
    }
    let before = socket::status()?.status;
    let known = find(&before, name).cloned();
    match socket::ask(&what, order.verb(name.clone()))? {
        Body::Taken => {}
        _ => return Err(Trouble::new(Exit::Away, what, "the supervisor's answer does not fit the order")),
    }
    if !request.waits {
        out::print(&format!("{name}: order taken; `cvm status` shows what comes of it\n"))?;
        return Ok(Exit::Good);
    }
    let Some(known) = known else {
        return Err(Trouble::new(Exit::Away, what, "the supervisor took it, but does not show this service"));
    };
    let limit = request.timeout.unwrap_or_else(|| order.patience());
    follow(order, &known, limit)
}

fn follow(order: Order, before: &Service, limit: Duration) -> Result<Exit, Trouble> {
    let what = format!("{} {}", order.word(), before.name);
    let began = Instant::now();
    let mut heard = Instant::now();
    let mut progress = Progress::new(&before.name);
    loop {
        let verdict = match socket::status() {
            Ok(snapshot) => {
                heard = Instant::now();
                judge(order, before, &snapshot.status)
            }
            Err(trouble) if heard.elapsed() > PATIENCE => {
                progress.clear();
                return Err(trouble);
            }
            Err(trouble) => Verdict::Pending(trouble.cause),
        };
        match verdict {
            Verdict::Pending(_) if began.elapsed() >= limit => {
                progress.clear();
                let cause = format!("it did not come to its end within {}", words_of(limit));
                let hint = format!("it goes on: `cvm status --watch`; `cvm logs {}`", before.name);
                return Err(Trouble::new(Exit::Bad, what, cause).hint(hint));
            }
            Verdict::Pending(words) => progress.show(&words, began.elapsed()),
            Verdict::Done(words) => {
                progress.clear();
                let took = words_of(began.elapsed());
                out::print(&format!("{}: {} (after {took})\n", before.name, clean(&words)))?;
                return Ok(Exit::Good);
            }
            Verdict::Failed { why, hint } => {
                progress.clear();
                return Err(Trouble::new(Exit::Bad, what, why).hint(hint));
            }
        }
        std::thread::sleep(LOOK);
    }
}

fn words_of(span: Duration) -> String {
    cvm_protocol::time::words(span)
}

fn find<'s>(status: &'s Status, name: &str) -> Option<&'s Service> {
    status.services.iter().find(|s| s.name == name)
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Pending(String),
    Done(String),
    Failed { why: String, hint: String },
}

/// What a snapshot says about an order. `before` is the service as it was when the order was given.
fn judge(order: Order, before: &Service, now: &Status) -> Verdict {
    let Some(service) = find(now, &before.name) else {
        return Verdict::Pending("the supervisor does not show it".to_owned());
    };
    let pending = || Verdict::Pending(told(service));
    let hint = |text: String| text;
    let name = &service.name;
    match service.state.as_str() {
        "stuck" => Verdict::Failed {
            why: service.why.clone().unwrap_or_else(|| "it is stuck".to_owned()),
            hint: hint(service.next_action.clone()),
        },
        "stopped" if order == Order::Stop => Verdict::Done("stopped".to_owned()),
        _ if order == Order::Stop => pending(),
        // The old process is still the one that runs: the order has yet to act.
        "up" | "ready" if order == Order::Restart && is_same_run(before, service) => pending(),
        "ready" => Verdict::Done(running(service)),
        "up" if service.next_action == NOTHING => Verdict::Done(running(service)),
        "parked" => Verdict::Failed {
            why: service.why.clone().unwrap_or_else(|| "it is parked".to_owned()),
            hint: hint(format!("`cvm logs {name}` shows its last words; {}", service.next_action)),
        },
        // A wait that was there before the order is over as soon as the order acts.
        "waiting" if has_ended_since(before, service) => Verdict::Failed {
            why: service
                .why
                .clone()
                .or_else(|| service.last_end.clone())
                .unwrap_or_else(|| "it ended".to_owned()),
            hint: hint(format!("`cvm logs {name}` shows its last words; it {}", service.next_action)),
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

/// It waits for a boot step: as long as one runs there is hope.
fn blocked(service: &Service, now: &Status) -> Verdict {
    if now.boot.iter().any(|step| step.state == "running") {
        return Verdict::Pending(told(service));
    }
    match now.boot.iter().find(|step| step.required && step.state == "failed") {
        Some(step) => Verdict::Failed {
            why: service.why.clone().unwrap_or_else(|| format!("boot step {} {}", step.name, step.state)),
            hint: match step.next_try_in_ms {
                Some(ms) => format!("the step is tried again in {}; `cvm status` shows the boot", span(ms)),
                None => format!("{}; `cvm status` shows the boot", service.next_action),
            },
        },
        None => Verdict::Pending(told(service)),
    }
}

fn running(service: &Service) -> String {
    match service.pid {
        Some(pid) => format!("{}, pid {pid}", service.state),
        None => service.state.clone(),
    }
}

fn told(service: &Service) -> String {
    let mut words = service.state.clone();
    if service.next_action != NOTHING {
        words = format!("{words}, {}", service.next_action);
    }
    words
}

/// On a terminal one line that changes; elsewhere a line for each change of state.
struct Progress {
    name: String,
    terminal: bool,
    /// The part of what was said last that does not count down.
    said: String,
}

impl Progress {
    fn new(name: &str) -> Self {
        Self { name: clean(name), terminal: std::io::stderr().is_terminal(), said: String::new() }
    }

    fn show(&mut self, words: &str, since: Duration) {
        let words = clean(words);
        let state = words.split(',').next().unwrap_or_default();
        let mut stderr = std::io::stderr().lock();
        // A lost line of progress is no loss.
        if self.terminal {
            let _ = write!(stderr, "\r\x1b[K{}: {words} ({} s)", self.name, since.as_secs());
            state.clone_into(&mut self.said);
        } else if state != self.said {
            let _ = writeln!(stderr, "{}: {words}", self.name);
            state.clone_into(&mut self.said);
        }
    }

    fn clear(&mut self) {
        if self.terminal && !self.said.is_empty() {
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

    fn is_pending(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Pending(_))
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
        assert_eq!(judge(ready), Verdict::Done("ready, pid 200".into()));
        // The same number can come again.
        let recycled = Service { restarts: 1, ..before.clone() };
        assert_eq!(judge(recycled), Verdict::Done("ready, pid 100".into()));
    }

    #[test]
    fn a_start_of_what_runs_is_done_at_once() {
        let before = up("sshd", "up", 100, (1, None));
        assert_eq!(judge(Order::Start, &before, &with(before.clone())), Verdict::Done("up, pid 100".into()));
    }

    #[test]
    fn a_start_that_ends_in_a_wait_has_failed_and_says_how() {
        let before = Service { failures_in_a_row: 2, ..service("gateway", "waiting") };
        // The snapshot is older than the order's effect.
        assert!(is_pending(&judge(Order::Start, &before, &with(before.clone()))));
        let now = Service {
            failures_in_a_row: 3,
            last_end: Some("exited with code 1, after 3 s".into()),
            next_action: "starts in 20 s".into(),
            ..service("gateway", "waiting")
        };
        let Verdict::Failed { why, hint } = judge(Order::Start, &before, &with(now)) else { panic!() };
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
        let verdict = judge(Order::Start, &before, &now("failed"));
        assert!(matches!(verdict, Verdict::Failed { why, .. } if why == "boot step home: no space"));
    }

    #[test]
    fn a_stop_is_done_when_it_is_stopped_and_hopeless_when_the_kernel_holds_it() {
        let before = up("gateway", "ready", 100, (1, Some(2)));
        let judge = |state: &str| judge(Order::Stop, &before, &with(service("gateway", state)));
        assert!(
            is_pending(&judge("ready")) && is_pending(&judge("stopping")) && is_pending(&judge("waiting"))
        );
        assert_eq!(judge("stopped"), Verdict::Done("stopped".into()));
        assert!(matches!(judge("stuck"), Verdict::Failed { .. }));
    }

    #[test]
    fn parked_says_why() {
        let now = Service { why: Some("exit 78 twice".into()), ..service("gateway", "parked") };
        let verdict = judge(Order::Start, &service("gateway", "stopped"), &with(now));
        assert!(matches!(verdict, Verdict::Failed { why, .. } if why == "exit 78 twice"));
    }
}
