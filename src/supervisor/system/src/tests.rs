//! The whole machine runs in virtual time: boots, orders and shutdowns, with the real plan, with plans made by hand,
//! and with random reports.

use crate::config::Config;
use crate::env::Environment;
use crate::gates;
use crate::roles::{self, Given};
use cvm_machine::backoff::Backoff;
use cvm_machine::description::Service;
use cvm_machine::gate::GateName;
use cvm_machine::machine::{
    Action, Event, Machine, Next, Order, Phase, ServiceId, StepRecord, StepState, Try, unreported,
};
use cvm_machine::moment::Moment;
use cvm_machine::plan::{Plan, Step, Weight, Work};
use cvm_machine::service::{self, Event as Happens, Liveness, Refusal, Run, State, Unit};
use cvm_machine::snapshot::{self, About};
use cvm_protocol::exit_status::End;
use cvm_protocol::keeper::Probe;
use cvm_protocol::report::{GateState, Level, ServiceReport};
use cvm_protocol::status::{self, ServiceState, Status, StorageMode};
use proptest::prelude::*;
use std::time::Duration;

mod provided;
mod specifications;
mod storage;

const MS: Duration = Duration::from_millis(1);

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn just_under(span: Duration) -> Duration {
    span.saturating_sub(MS)
}

fn config(pairs: &[(&str, &str)]) -> Config {
    let pairs = pairs.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
    match Config::parse(&Environment::new(pairs)) {
        Ok((config, _)) => config,
        Err(problems) => panic!("{problems:?}"),
    }
}

fn machine_of(config: &Config) -> Machine {
    let given = Given { config, keys: None, owner_epoch: 0, has_preload: false };
    roles::gateway(&given).map_or_else(|why| panic!("{why}"), |(plan, _)| Machine::new(plan))
}

fn machine(steps: Vec<Step>, services: Vec<Service>) -> Machine {
    Plan::new(steps, services).map_or_else(|why| panic!("{why}"), Machine::new)
}

/// The variables that S3 mode needs.
const S3: [(&str, &str); 5] = [
    ("MASTER_KEY", "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M="),
    ("S3_BUCKET", "claws"),
    ("S3_ENDPOINT", "https://s3.example.org"),
    ("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"),
    ("AWS_SECRET_ACCESS_KEY", "not-a-secret"),
];

const DOCKER: (&str, &str) = ("ENABLE_DOCKER", "1");

/// A machine, and the loop around it.
struct Boot {
    machine: Machine,
    now: Moment,
}

impl Boot {
    fn of(machine: Machine) -> Self {
        Self { machine, now: Moment::from_millis(1_000) }
    }

    /// The plan with a local volume and all services.
    fn local() -> Self {
        Self::of(machine_of(&config(&[DOCKER])))
    }

    /// A plan without dockerd: SSH is up, and the next step runs.
    fn with_ssh() -> Self {
        let mut boot = Self::of(machine_of(&config(&[])));
        boot.send(Event::Boot);
        boot.done(gates::SSH);
        boot.runs("sshd");
        boot
    }

    /// The plan with a local volume, all of whose services are ready.
    fn up() -> Self {
        let mut boot = Self::local();
        boot.send(Event::Boot);
        for step in [gates::SSH, gates::HOME, gates::STATE] {
            boot.done(step);
        }
        for name in ["sshd", "gateway", "dockerd"] {
            boot.runs(name);
            boot.answers(name, Happens::Readiness { run: boot.run(name), ready: true });
        }
        assert_eq!(boot.complaints(), [""; 0]);
        boot
    }

    fn send(&mut self, event: Event) -> Vec<Action> {
        self.machine.step(event, self.now)
    }

    /// Lets time pass, with a tick at each deadline, as the loop does.
    fn pass(&mut self, span: Duration) -> Vec<Action> {
        let until = self.now + span;
        let mut done = Vec::new();
        while let Some(due) = self.machine.deadline().filter(|due| *due <= until) {
            self.now = due;
            done.extend(self.send(Event::Tick));
            assert!(
                self.machine.deadline().is_none_or(|next| next > due),
                "a tick leaves no deadline behind it"
            );
        }
        self.now = until;
        done.extend(self.send(Event::Tick));
        done
    }

    fn step(&self, name: GateName) -> &StepRecord {
        self.machine.steps().iter().find(|r| r.step.name == name).unwrap()
    }

    fn ended(&mut self, name: GateName, outcome: Result<(), Refusal>) -> Vec<Action> {
        // Ends the parallel step too: no service starts before both have ended.
        let volume = self.machine.steps().iter().find(|r| r.step.name == gates::VOLUME);
        if name == gates::SSH && volume.is_some_and(|r| matches!(r.state, StepState::Running { .. })) {
            self.done(gates::VOLUME);
        }
        let of = Try { step: name, number: self.step(name).tries };
        self.send(Event::StepEnded { of, outcome })
    }

    fn done(&mut self, name: GateName) -> Vec<Action> {
        self.ended(name, Ok(()))
    }

    fn fails(&mut self, name: GateName, retry: bool) -> Vec<Action> {
        self.ended(name, Err(Refusal { why: "no space left on device".into(), retry }))
    }

    fn id(&self, name: &str) -> ServiceId {
        self.machine.find(name).unwrap()
    }

    fn unit(&self, name: &str) -> &Unit {
        &self.machine.service(self.id(name)).unwrap().unit
    }

    fn run(&self, name: &str) -> Run {
        self.unit(name).run().unwrap_or_else(|| panic!("{name} is {:?}", self.unit(name).state()))
    }

    fn answers(&mut self, name: &str, event: Happens) -> Vec<Action> {
        self.send(Event::Service { id: self.id(name), event })
    }

    /// Takes a service from its start to running.
    fn runs(&mut self, name: &str) -> Vec<Action> {
        let run = self.run(name);
        let mut done = Vec::new();
        if matches!(self.unit(name).state(), State::Preparing { .. }) {
            done = self.answers(name, Happens::Prepared { run, outcome: Ok(()) });
        }
        done.extend(self.answers(name, Happens::Exec { run, pid: 100 }));
        assert!(matches!(self.unit(name).state(), State::Running { .. }), "{name}");
        done
    }

    /// The service ends with its whole tree.
    fn ends(&mut self, name: &str, end: End) -> Vec<Action> {
        let run = self.run(name);
        let mut done = self.answers(name, Happens::MainEnded { run, end: end.clone() });
        done.extend(self.answers(name, Happens::Gone { run, end }));
        done
    }

    fn order(&mut self, name: &str, order: Order) -> Vec<Action> {
        self.send(Event::Order { id: self.id(name), order })
    }

    fn status(&self) -> Status {
        let storage = status::Storage::new(StorageMode::Local, "");
        let about = About { version: "0".into(), storage, keys: vec![], doors: vec![], remarks: vec![] };
        snapshot::snapshot(&self.machine, &about, self.now)
    }

    fn complaints(&self) -> Vec<String> {
        let status = self.status();
        assert_eq!(status.healthy, status.unhealthy.is_empty());
        status.unhealthy
    }

    fn shown(&self, name: &str) -> status::Service {
        self.status().services.into_iter().find(|shown| shown.name == name).unwrap()
    }

    /// The actions in words, without notes for the log.
    fn deeds(&self, actions: &[Action]) -> Vec<String> {
        actions.iter().filter_map(|action| self.deed(action)).collect()
    }

    fn deed(&self, action: &Action) -> Option<String> {
        use service::Action as Do;
        Some(match action {
            Action::RunStep(of) => format!("run {}#{}", of.step.0, of.number),
            Action::KillStep { of, hard: false } => format!("end {}#{}", of.step.0, of.number),
            Action::KillStep { of, hard: true } => format!("kill {}#{}", of.step.0, of.number),
            Action::SignalAll { hard: false } => "TERM all".into(),
            Action::SignalAll { hard: true } => "KILL all".into(),
            Action::Exit { abandoned: false, undrained: false } => "exit".into(),
            Action::Exit { abandoned: true, undrained: false } => "exit, some abandoned".into(),
            Action::Exit { abandoned: false, undrained: true } => "exit undrained".into(),
            Action::Exit { abandoned: true, undrained: true } => "exit undrained, some abandoned".into(),
            Action::Say(..) => return None,
            Action::Service { id, action } => {
                let word = match action {
                    Do::Prepare(_) => "prepare",
                    Do::Launch(_) => "launch",
                    Do::Repair(_) => "repair",
                    Do::Term(_) => "TERM",
                    Do::KillTree(_) => "kill tree of",
                    Do::KillKeeper(_) => "kill keeper of",
                    Do::Sweep(_) => "sweep",
                    Do::Say(..) => unreachable!("translated into a line of ours"),
                };
                format!("{word} {}", self.machine.service(*id).unwrap().service.name)
            }
        })
    }
}

fn said(actions: &[Action]) -> Vec<(Level, &str)> {
    let lines = actions.iter().filter_map(|action| match action {
        Action::Say(level, text) => Some((*level, text.as_str())),
        _ => None,
    });
    lines.collect()
}

// === Boot ===

#[test]
fn nothing_at_all_is_started_before_the_ssh_step_has_ended() {
    let mut boot = Boot::local();
    let run = |step| Action::RunStep(Try { step, number: 1 });
    assert_eq!(boot.send(Event::Boot), [run(gates::SSH), run(gates::VOLUME)]);
    assert_eq!(boot.done(gates::VOLUME), []);
    assert_eq!(boot.pass(s(9)), []);
}

#[test]
fn sshd_is_not_started_before_it_is_known_whose_volume_it_is() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    let of = Try { step: gates::SSH, number: 1 };
    assert_eq!(boot.send(Event::StepEnded { of, outcome: Ok(()) }), []);
    let done = boot.done(gates::VOLUME);
    assert_eq!(boot.deeds(&done), ["prepare sshd", "run home#1"]);
}

#[test]
fn on_a_volume_of_somebody_elses_nothing_starts_but_sshd_until_an_operator_has_acted() {
    for (pairs, beside, after) in [
        (&[][..], &["prepare sshd"][..], &["prepare dockerd", "run home#1"][..]),
        (&S3[..], &["prepare sshd", "launch standin"], &["prepare dockerd", "launch storage"]),
    ] {
        let mut boot = Boot::of(machine_of(&config(&[pairs, &[("ENABLE_DOCKER", "1")]].concat())));
        boot.send(Event::Boot);
        boot.fails(gates::VOLUME, false);
        let done = boot.done(gates::SSH);
        assert_eq!(boot.deeds(&done), beside);
        for deed in beside {
            boot.runs(deed.split(' ').next_back().expect("a verb and a name"));
        }
        assert_eq!(boot.pass(s(100_000)), [], "and nothing is tried by itself");
        assert_eq!(boot.status().phase, status::Phase::Degraded);
        assert_eq!(boot.shown("gateway").why.as_deref(), Some("boot step volume: no space left on device"));
        // The order starts the step that is the first cause. The worker must not push this volume to a stranger's
        // bucket.
        let done = boot.order("gateway", Order::Start);
        assert_eq!(boot.deeds(&done), ["run volume#2"]);
        let done = boot.done(gates::VOLUME);
        assert_eq!(boot.deeds(&done), after);
    }
}

#[test]
fn a_volume_that_does_not_answer_holds_sshd_up_no_longer_than_the_deadline_and_two_kills() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    let of = Try { step: gates::SSH, number: 1 };
    boot.send(Event::StepEnded { of, outcome: Ok(()) });
    let done = boot.pass(s(16));
    assert_eq!(boot.deeds(&done), ["end volume#1", "kill volume#1", "prepare sshd"]);
}

#[test]
fn sshd_is_started_before_everything_else() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    let done = boot.done(gates::SSH);
    assert_eq!(boot.deeds(&done), ["prepare sshd", "run home#1"]);
}

#[test]
fn a_boot_goes_through_its_steps_in_order_and_starts_the_gateway_and_then_dockerd() {
    let mut boot = Boot::local();
    let mut done = boot.send(Event::Boot);
    done.extend(boot.done(gates::SSH));
    done.extend(boot.runs("sshd"));
    done.extend(boot.done(gates::HOME));
    done.extend(boot.done(gates::STATE));
    done.extend(boot.runs("gateway"));
    let run = boot.run("gateway");
    done.extend(boot.answers("gateway", Happens::Readiness { run, ready: true }));
    let expected = [
        "run ssh#1",
        "run volume#1",
        "prepare sshd",
        "run home#1",
        "launch sshd",
        "run state#1",
        "prepare gateway",
        "launch gateway",
        "prepare dockerd",
    ];
    assert_eq!(boot.deeds(&done), expected);
}

#[test]
fn the_lines_that_operators_look_for_are_said_word_for_word_when_they_become_true() {
    let line = |text: &'static str| vec![(Level::Info, text)];
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    assert_eq!(said(&boot.done(gates::SSH)), [], "launched is not started");
    assert_eq!(said(&boot.runs("sshd")), line("SSH daemon started."));
    assert_eq!(said(&boot.done(gates::HOME)), line("Home symlinks created (~/.openclaw, ~/.config → /data)"));
    boot.order("dockerd", Order::Start);
    assert_eq!(said(&boot.runs("dockerd")), [], "running is not ready");
    boot.pass(s(2));
    let ready = Happens::Readiness { run: boot.run("dockerd"), ready: true };
    let expected =
        [(Level::Info, "Docker daemon ready."), (Level::Info, "dockerd: ready 2 s after its start")];
    assert_eq!(said(&boot.answers("dockerd", ready.clone())), expected);
    assert_eq!(said(&boot.answers("dockerd", ready)), [], "once");
}

#[test]
fn a_failed_ssh_step_is_a_warning_and_the_rest_goes_on() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    let done = boot.fails(gates::SSH, true);
    assert_eq!(
        said(&done),
        [(Level::Warn, "Boot step ssh failed: no space left on device; next try in 2 s")]
    );
    assert_eq!(boot.deeds(&done), ["run home#1"]);
    assert_eq!(boot.shown("sshd").state, ServiceState::Blocked);
    assert_eq!(boot.shown("sshd").why.as_deref(), Some("boot step ssh: no space left on device"));
    let retried = boot.pass(s(2));
    assert_eq!(boot.deeds(&retried), ["run ssh#2"]);
    let done = boot.done(gates::SSH);
    assert_eq!(boot.deeds(&done), ["prepare sshd"], "SSH comes up as soon as it can");
}

#[test]
fn an_ssh_step_that_hangs_holds_the_boot_up_no_longer_than_its_deadline_and_two_kills() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    boot.done(gates::VOLUME);
    let mut times = Vec::new();
    for _ in 0..16_000 {
        let done = boot.pass(MS);
        times.extend(boot.deeds(&done).into_iter().map(|deed| (boot.now.as_millis() - 1_000, deed)));
    }
    let at = |ms, deed: &str| (ms, deed.to_owned());
    assert_eq!(times, [at(10_000, "end ssh#1"), at(13_000, "kill ssh#1"), at(16_000, "run home#1")]);
    let why = "its process does not die of SIGKILL: the kernel holds it (a dead disk or mount?)";
    assert_eq!(boot.shown("sshd").why, Some(format!("boot step ssh: {why}")));
    assert_eq!(
        boot.pass(s(200)).iter().filter(|a| matches!(a, Action::RunStep(_))).count(),
        0,
        "no second victim"
    );
    let freed = boot.ended(gates::SSH, Err(unreported(&End::Signal(9))));
    assert_eq!(
        said(&freed),
        [(Level::Warn, "Boot step ssh failed: it took longer than its 10 s and was ended; next try in 2 s")]
    );
    let retried = boot.pass(s(2));
    assert!(boot.deeds(&retried).contains(&"run ssh#2".to_owned()));
}

#[test]
fn a_step_that_the_kernel_holds_is_tried_again_on_an_operators_order_and_its_old_try_is_forgotten() {
    let mut boot = Boot::with_ssh();
    boot.pass(s(306));
    assert_eq!(boot.shown("gateway").next_action.as_deref(), Some("mend it, then `cvm start gateway`"));
    let done = boot.order("gateway", Order::Start);
    assert_eq!(boot.deeds(&done), ["run home#2"]);
    let old = Try { step: gates::HOME, number: 1 };
    assert_eq!(boot.send(Event::StepEnded { of: old, outcome: Ok(()) }), []);
    boot.fails(gates::HOME, false);
    assert_eq!(boot.done(gates::HOME), [], "each try ends once");
}

#[test]
fn a_step_that_the_kernel_held_ends_once() {
    let mut boot = Boot::with_ssh();
    boot.pass(s(306));
    boot.fails(gates::HOME, true);
    assert_eq!(boot.done(gates::HOME), []);
    let done = boot.pass(s(2));
    assert_eq!(boot.deeds(&done), ["run home#2"]);
}

#[test]
fn trying_the_ssh_step_again_holds_nothing_up() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    boot.fails(gates::SSH, true);
    boot.order("gateway", Order::Stop);
    boot.pass(s(2));
    assert!(matches!(boot.step(gates::SSH).state, StepState::Running { .. }));
    boot.done(gates::HOME);
    boot.done(gates::STATE);
    let done = boot.order("gateway", Order::Start);
    assert_eq!(boot.deeds(&done), ["prepare gateway"]);
    boot.runs("gateway");
    let done = boot.order("gateway", Order::Restart);
    assert_eq!(boot.deeds(&done), ["TERM gateway"]);
}

#[test]
fn a_failed_required_step_keeps_the_gateway_down_and_ssh_up_and_status_says_why() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    boot.done(gates::SSH);
    boot.runs("sshd");
    let done = boot.fails(gates::HOME, true);
    assert_eq!(
        said(&done),
        [(Level::Error, "Boot step home failed: no space left on device; next try in 2 s")]
    );
    assert_eq!(boot.deeds(&done), [""; 0]);
    let status = boot.status();
    assert_eq!(status.phase, status::Phase::Degraded);
    assert_eq!(
        status.unhealthy,
        [
            "boot step home: no space left on device",
            "gateway is blocked: boot step home: no space left on device",
        ]
    );
    let gateway = boot.shown("gateway");
    assert_eq!((gateway.state, gateway.pid), (ServiceState::Blocked, None));
    assert_eq!(gateway.next_action.as_deref(), Some("starts when boot step home is done"));
    assert_eq!(boot.shown("sshd").state, ServiceState::Up);
    assert_eq!(status.boot.iter().find(|b| b.name == "home").unwrap().next_try_in_ms, Some(2_000));
}

#[test]
fn a_failed_step_is_tried_again_after_2_4_8_16_32_60_60_seconds() {
    let mut boot = Boot::with_ssh();
    let mut waits = Vec::new();
    for _ in 0..7 {
        boot.fails(gates::HOME, true);
        let StepState::Failed { next: Next::TryAt(at), .. } = boot.step(gates::HOME).state else { panic!() };
        let wait = at.since(boot.now);
        assert_eq!(boot.pass(just_under(wait)), []);
        let done = boot.pass(MS);
        assert_eq!(boot.deeds(&done), [format!("run home#{}", boot.step(gates::HOME).tries)]);
        waits.push(wait.as_secs());
    }
    assert_eq!(waits, [2, 4, 8, 16, 32, 60, 60]);
    let done = boot.done(gates::HOME);
    assert_eq!(boot.deeds(&done), ["run state#1"]);
    assert_eq!(boot.status().phase, status::Phase::Booting);
}

#[test]
fn an_operators_start_of_the_gateway_tries_its_failed_step_again_at_once() {
    for (retry, order) in [(true, Order::Start), (false, Order::Start), (false, Order::Restart)] {
        let mut boot = Boot::local();
        boot.send(Event::Boot);
        boot.done(gates::SSH);
        boot.fails(gates::HOME, retry);
        let done = boot.order("gateway", order);
        assert_eq!(boot.deeds(&done), ["run home#2"]);
        assert_eq!(boot.order("gateway", order), [], "it is being tried already");
        boot.done(gates::HOME);
        let done = boot.done(gates::STATE);
        assert_eq!(boot.deeds(&done), ["prepare gateway"]);
    }
}

#[test]
fn a_step_that_cannot_succeed_by_itself_waits_for_an_operator_and_says_so() {
    let mut boot = Boot::with_ssh();
    boot.done(gates::HOME);
    let done = boot.fails(gates::STATE, false);
    let text = "Boot step state failed: no space left on device; trying again cannot help until something is changed";
    assert_eq!(said(&done), [(Level::Error, text)]);
    assert_eq!(boot.pass(s(100_000)), []);
    assert_eq!(boot.shown("gateway").next_action.as_deref(), Some("mend it, then `cvm start gateway`"));
}

#[test]
fn a_step_past_its_deadline_is_ended_then_killed_and_its_late_failure_is_called_lateness() {
    let mut boot = Boot::with_ssh();
    boot.done(gates::HOME);
    assert_eq!(boot.pass(just_under(s(60))), []);
    let done = boot.pass(MS);
    assert_eq!(boot.deeds(&done), ["end state#1"]);
    assert_eq!(boot.pass(just_under(s(3))), []);
    let done = boot.pass(MS);
    assert_eq!(boot.deeds(&done), ["kill state#1"]);
    let done = boot.ended(gates::STATE, Err(unreported(&End::Signal(9))));
    let text = "Boot step state failed: it took longer than its 1 min and was ended; next try in 2 s";
    assert_eq!(said(&done), [(Level::Error, text)]);
}

#[test]
fn a_step_that_reports_success_while_it_is_being_ended_has_succeeded() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    boot.done(gates::SSH);
    boot.done(gates::HOME);
    boot.pass(s(60));
    let done = boot.done(gates::STATE);
    assert!(boot.deeds(&done).contains(&"prepare gateway".to_owned()), "its work is done");
}

#[test]
fn an_outcome_of_an_earlier_try_changes_nothing() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    boot.done(gates::SSH);
    boot.fails(gates::HOME, true);
    boot.pass(s(2));
    let before = boot.step(gates::HOME).state.clone();
    let of = Try { step: gates::HOME, number: 1 };
    assert_eq!(boot.send(Event::StepEnded { of, outcome: Ok(()) }), []);
    assert_eq!(boot.step(gates::HOME).state, before);
    boot.done(gates::HOME);
    assert_eq!(boot.fails(gates::HOME, true), [], "and an outcome said twice neither");
}

#[test]
fn how_a_process_ended_is_the_reason_when_it_left_no_report() {
    let refusal = unreported(&End::OutOfMemory);
    assert_eq!(refusal.why, "its process killed by the kernel: out of memory without a report");
    assert!(refusal.retry);
}

// === Orders and health ===

#[test]
fn a_stop_ordered_before_a_service_could_start_is_honoured_and_can_be_taken_back() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    assert_eq!(boot.order("gateway", Order::Stop), []);
    assert_eq!(boot.shown("gateway").state, ServiceState::Stopped);
    for step in [gates::SSH, gates::HOME, gates::STATE] {
        let done = boot.done(step);
        assert!(!boot.deeds(&done).iter().any(|d| d.ends_with("gateway")), "{done:?}");
    }
    let done = boot.order("gateway", Order::Start);
    assert_eq!(boot.deeds(&done), ["prepare gateway"]);
}

#[test]
fn a_start_ordered_before_a_service_can_start_is_remembered() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    boot.order("gateway", Order::Stop);
    assert_eq!(boot.order("gateway", Order::Start), []);
    assert_eq!(boot.shown("gateway").state, ServiceState::Blocked);
    boot.done(gates::SSH);
    boot.done(gates::HOME);
    let done = boot.done(gates::STATE);
    assert_eq!(boot.deeds(&done), ["prepare gateway"]);
}

#[test]
fn errors_of_a_service_that_nothing_depends_on_are_warnings() {
    let mut boot = Boot::up();
    let done = boot.ends("dockerd", End::Code(1));
    assert_eq!(said(&done), [(Level::Warn, "dockerd: exited with code 1; next start in 5 s")]);
    assert_eq!(boot.complaints(), [""; 0], "and the machine is healthy without it");
    let done = boot.ends("gateway", End::Code(1));
    assert_eq!(said(&done), [(Level::Error, "gateway: exited with code 1; next start in 5 s")]);
}

#[test]
fn one_service_in_trouble_touches_no_other() {
    let mut boot = Boot::up();
    for _ in 0..20 {
        let done = boot.ends("gateway", End::Signal(11));
        assert!(boot.deeds(&done).iter().all(|deed| deed.ends_with("gateway")), "{done:?}");
        let done = boot.pass(s(60));
        assert!(boot.deeds(&done).iter().all(|deed| deed.ends_with("gateway")), "{done:?}");
        boot.runs("gateway");
    }
    for name in ["sshd", "dockerd"] {
        assert!(matches!(boot.unit(name).state(), State::Running { .. }));
        assert_eq!(boot.unit(name).restarts(), 0);
    }
}

#[test]
fn the_machine_is_healthy_exactly_while_everything_required_is_ready() {
    let mut boot = Boot::local();
    assert_eq!(
        boot.complaints(),
        [
            "sshd is blocked: boot step ssh is not done yet",
            "gateway is blocked: boot step volume is not done yet",
        ]
    );
    boot.send(Event::Boot);
    for step in [gates::SSH, gates::HOME, gates::STATE] {
        boot.done(step);
    }
    assert_eq!(boot.status().phase, status::Phase::Running);
    assert_eq!(boot.complaints(), ["sshd is preparing", "gateway is preparing"]);
    boot.runs("sshd");
    boot.runs("gateway");
    assert_eq!(boot.complaints(), ["gateway runs but is not ready"]);
    let ready = |run, ready| Happens::Readiness { run, ready };
    let run = boot.run("gateway");
    boot.answers("gateway", ready(run, true));
    assert_eq!(boot.complaints(), [""; 0], "whatever dockerd does");
    boot.answers("gateway", ready(run, false));
    assert_eq!(boot.complaints(), ["gateway runs but is not ready"]);
    boot.ends("gateway", End::OutOfMemory);
    assert_eq!(boot.complaints(), ["gateway is waiting: killed by the kernel: out of memory"]);
    boot.order("gateway", Order::Stop);
    assert_eq!(boot.complaints(), ["gateway is stopped"]);
    boot.send(Event::Terminate);
    assert!(boot.complaints().contains(&"the machine is stopping".to_owned()));
}

#[test]
fn a_crash_loop_and_a_parked_service_are_complaints_with_their_reasons() {
    let mut boot = Boot::up();
    for _ in 0..5 {
        boot.ends("gateway", End::Code(1));
        boot.pass(s(60));
        boot.runs("gateway");
    }
    let complaint = "gateway is in a crash loop: 5 failures in a row".to_owned();
    assert!(boot.complaints().contains(&complaint));
    for _ in 0..10 {
        boot.pass(s(60));
        boot.answers("gateway", Happens::Alive { run: boot.run("gateway") });
    }
    assert!(!boot.complaints().contains(&complaint), "a run of RESET_AFTER is no loop, also while it lasts");
    boot.ends("gateway", End::Code(78));
    boot.ends("gateway", End::Code(0));
    boot.runs("gateway");
    boot.ends("gateway", End::Code(78));
    assert_eq!(
        boot.complaints(),
        ["gateway is parked: it refuses its configuration (code 78), also after its own repair command ran"]
    );
    assert_eq!(boot.shown("gateway").next_action.as_deref(), Some("mend it, then `cvm start gateway`"));
}

/// A machine in which dockerd has everything that it needs, and the gateway is about to start.
fn before_the_gateway() -> Boot {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    for step in [gates::SSH, gates::HOME, gates::STATE] {
        boot.done(step);
    }
    assert_eq!(*boot.unit("dockerd").state(), State::Idle);
    boot
}

#[test]
fn dockerd_starts_when_the_gateway_is_ready() {
    let mut boot = before_the_gateway();
    assert_eq!(boot.shown("dockerd").why.as_deref(), Some("the gateway starts first"));
    boot.runs("gateway");
    assert_eq!(*boot.unit("dockerd").state(), State::Idle);
    let run = boot.run("gateway");
    boot.answers("gateway", Happens::Readiness { run, ready: true });
    assert!(boot.unit("dockerd").run().is_some());
}

#[test]
fn dockerd_starts_a_minute_after_the_boot_whatever_the_gateway_does() {
    for gateway_runs in [false, true] {
        let mut boot = before_the_gateway();
        if gateway_runs {
            boot.runs("gateway");
        }
        boot.pass(just_under(s(60)));
        assert_eq!(*boot.unit("dockerd").state(), State::Idle);
        boot.pass(s(1));
        assert!(boot.unit("dockerd").run().is_some());
    }
}

#[test]
fn dockerd_starts_when_the_gateway_fails_and_when_an_operator_says_so() {
    let mut boot = before_the_gateway();
    boot.runs("gateway");
    boot.ends("gateway", End::Code(1));
    assert!(boot.unit("dockerd").run().is_some());

    let mut boot = before_the_gateway();
    boot.order("dockerd", Order::Start);
    assert!(boot.unit("dockerd").run().is_some());
}

#[test]
fn the_first_exec_and_the_first_readiness_are_kept_through_restarts() {
    let mut boot = Boot::up();
    let first = (boot.shown("gateway").first_exec_ms, boot.shown("gateway").first_ready_ms);
    assert!(first.0.is_some() && first.1.is_some());
    boot.ends("gateway", End::Code(1));
    boot.pass(s(5));
    boot.runs("gateway");
    let shown = boot.shown("gateway");
    assert_eq!((shown.first_exec_ms, shown.first_ready_ms), first);
    assert_eq!((shown.restarts, shown.last_end.as_deref()), (1, Some("exited with code 1, after 0 ms")));
}

// === Shutdown ===

#[test]
fn services_end_one_group_after_the_other_with_the_gateway_alone_first_and_sshd_last() {
    let mut boot = Boot::up();
    let mut done = boot.send(Event::Terminate);
    assert_eq!(said(&done), [(Level::Info, "Stopping: services get up to 52 s in all")]);
    assert_eq!(boot.deeds(&done), ["TERM gateway"]);
    assert_eq!(boot.pass(just_under(s(30))), [], "nobody is hurried while the gateway drains");
    done = boot.ends("gateway", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of gateway", "TERM dockerd"]);
    done = boot.ends("dockerd", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of dockerd", "TERM sshd"]);
    done = boot.ends("sshd", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of sshd", "TERM all"]);
    done = boot.send(Event::Childless);
    assert_eq!(boot.deeds(&done), ["exit"]);
    assert_eq!(said(&done), [(Level::Info, "Stopped in order after 29 s")]);
}

#[test]
fn the_stop_budget_is_the_sum_of_the_groups_and_the_last_sweep_and_is_kept_when_nobody_answers() {
    let mut boot = Boot::up();
    // Gateway 30, dockerd 10, sshd 2, slow trees 5, all other processes 2 + 3.
    assert_eq!(boot.machine.stop_budget(), s(52));
    let began = boot.now;
    let mut done = boot.send(Event::Terminate);
    done.extend(boot.pass(just_under(s(52))));
    assert!(!boot.deeds(&done).iter().any(|d| d.starts_with("exit")));
    let last = boot.pass(MS);
    assert_eq!(boot.deeds(&last), ["kill keeper of sshd", "exit, some abandoned"]);
    assert_eq!(said(&last), [(Level::Error, "Stopped after 52 s; some processes did not die of SIGKILL")]);
    assert_eq!(boot.now.since(began), s(52));
    let expected = [
        "TERM gateway",
        "kill tree of gateway",
        // The 5 s are over: the last sweep ends the rest of the gateway.
        "kill keeper of gateway",
        "TERM dockerd",
        "sweep gateway",
        "kill tree of dockerd",
        "TERM sshd",
        "kill tree of sshd",
        "TERM all",
        "KILL all",
        "kill keeper of dockerd",
    ];
    assert_eq!(boot.deeds(&done), expected);
}

#[test]
fn a_service_that_dies_while_others_are_being_stopped_does_not_come_back() {
    for end in [End::Code(0), End::Code(1), End::Code(78), End::Signal(9)] {
        let mut boot = Boot::up();
        boot.send(Event::Terminate);
        let done = boot.ends("dockerd", end.clone());
        assert_eq!(boot.deeds(&done), [""; 0], "dockerd {end}");
        let done = boot.ends("sshd", end.clone());
        assert_eq!(boot.deeds(&done), [""; 0], "sshd {end}");
        let text = format!("sshd: {end}; not started again, everything is being stopped");
        assert_eq!(said(&done), [(Level::Info, text.as_str())]);
        let done = boot.ends("gateway", End::Code(0));
        assert_eq!(boot.deeds(&done), ["kill tree of gateway", "TERM all"]);
    }
}

#[test]
fn a_service_that_was_about_to_start_does_not_when_everything_is_being_stopped() {
    let mut boot = Boot::up();
    boot.ends("dockerd", End::Code(1));
    boot.pass(s(5));
    assert!(matches!(boot.unit("dockerd").state(), State::Preparing { .. }));
    boot.order("sshd", Order::Restart);
    boot.send(Event::Terminate);
    let done = boot.answers("dockerd", Happens::Prepared { run: boot.run("dockerd"), outcome: Ok(()) });
    assert_eq!(boot.deeds(&done), [""; 0]);
    let done = boot.ends("sshd", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of sshd"]);
}

#[test]
fn no_order_starts_anything_on_the_way_down() {
    let mut boot = Boot::up();
    boot.ends("dockerd", End::Code(1));
    boot.send(Event::Terminate);
    for name in ["sshd", "dockerd", "gateway"] {
        for order in [Order::Start, Order::Restart, Order::Stop] {
            assert_eq!(boot.order(name, order), []);
        }
    }
    let mut early = Boot::local();
    early.send(Event::Boot);
    early.done(gates::SSH);
    early.fails(gates::HOME, true);
    early.send(Event::Terminate);
    assert_eq!(early.order("gateway", Order::Start), [], "nor a step");
    let done = early.pass(s(1));
    assert!(!early.deeds(&done).iter().any(|d| d.starts_with("run")));
}

#[test]
fn a_second_stop_signal_skips_every_wait_and_a_third_changes_nothing() {
    let mut boot = Boot::up();
    boot.send(Event::Terminate);
    boot.pass(s(1));
    let done = boot.send(Event::Terminate);
    assert_eq!(said(&done)[0], (Level::Warn, "Second stop signal: not waiting any longer"));
    assert_eq!(
        boot.deeds(&done),
        ["TERM sshd", "kill tree of sshd", "TERM dockerd", "kill tree of dockerd", "kill tree of gateway"]
    );
    assert_eq!(boot.send(Event::Terminate), []);
    for name in ["sshd", "dockerd"] {
        boot.ends(name, End::Signal(9));
    }
    let done = boot.ends("gateway", End::Signal(9));
    assert_eq!(boot.deeds(&done), ["KILL all"], "and whoever is left gets no SIGTERM first");
    let done = boot.send(Event::Childless);
    assert_eq!(boot.deeds(&done), ["exit"]);
}

#[test]
fn after_a_second_stop_signal_a_world_that_never_answers_is_left_within_18_seconds() {
    let mut boot = Boot::up();
    boot.send(Event::Terminate);
    boot.send(Event::Terminate);
    let done = boot.pass(just_under(s(18)));
    assert!(!boot.deeds(&done).iter().any(|d| d.starts_with("exit")));
    let done = boot.pass(MS);
    assert_eq!(boot.deeds(&done), ["exit, some abandoned"]);
}

#[test]
fn whoever_is_left_gets_term_then_kill_and_is_then_abandoned() {
    let mut boot = Boot::of(machine(vec![], vec![]));
    let done = boot.send(Event::Terminate);
    assert_eq!(boot.deeds(&done), ["TERM all"]);
    assert_eq!(boot.pass(just_under(s(2))), []);
    let done = boot.pass(MS);
    assert_eq!(boot.deeds(&done), ["KILL all"]);
    assert_eq!(boot.pass(just_under(s(3))), []);
    let done = boot.pass(MS);
    assert_eq!(boot.deeds(&done), ["exit, some abandoned"]);
    assert_eq!(
        (boot.pass(s(1_000)), boot.send(Event::Childless), boot.send(Event::Terminate)),
        (vec![], vec![], vec![])
    );
    assert_eq!(boot.machine.phase(), Phase::Over);
}

#[test]
fn a_second_stop_signal_during_the_last_sweep_kills_at_once() {
    let mut boot = Boot::of(machine(vec![], vec![]));
    boot.send(Event::Terminate);
    let done = boot.send(Event::Terminate);
    assert_eq!(boot.deeds(&done), ["KILL all"]);
    assert_eq!(boot.send(Event::Terminate), []);
}

#[test]
fn being_childless_means_nothing_before_the_last_sweep() {
    let mut boot = Boot::local();
    assert_eq!(boot.send(Event::Childless), []);
    boot.send(Event::Boot);
    assert_eq!(boot.send(Event::Childless), []);
    let mut boot = Boot::up();
    boot.send(Event::Terminate);
    assert_eq!(boot.send(Event::Childless), []);
}

#[test]
fn a_stop_signal_before_the_boot_began_leaves_without_starting_anything() {
    let mut boot = Boot::local();
    let done = boot.send(Event::Terminate);
    assert_eq!(boot.deeds(&done), ["TERM all"]);
    assert_eq!(boot.send(Event::Boot), []);
    let done = boot.send(Event::Childless);
    assert_eq!(boot.deeds(&done), ["exit"]);
}

#[test]
fn a_stop_signal_ends_the_step_that_runs_and_its_failure_is_no_error() {
    let mut boot = Boot::local();
    boot.send(Event::Boot);
    boot.done(gates::SSH);
    let done = boot.send(Event::Terminate);
    assert_eq!(boot.deeds(&done), ["end home#1", "kill tree of sshd"], "there is no gateway to wait for");
    let done = boot.ended(gates::HOME, Err(unreported(&End::Signal(3))));
    let text =
        "Boot step home failed: its process killed by SIGQUIT without a report; everything is being stopped";
    assert_eq!(said(&done), [(Level::Info, text)]);
    let StepState::Failed { next, .. } = boot.step(gates::HOME).state else { panic!() };
    assert_eq!(next, Next::Operator);
}

#[test]
fn a_stop_signal_during_a_backoff_wait_does_not_wait_for_it() {
    let mut boot = Boot::up();
    for name in ["gateway", "dockerd", "sshd"] {
        boot.ends(name, End::Code(1));
    }
    let done = boot.send(Event::Terminate);
    assert_eq!(boot.deeds(&done), ["TERM all"]);
}

/// The actions of a whole stop, in which each service ends in time.
fn stop_of(boot: &mut Boot, first: Vec<Action>) -> Vec<String> {
    let mut done = first;
    for name in ["gateway", "dockerd", "sshd"] {
        done.extend(boot.pass(s(1)));
        done.extend(boot.ends(name, End::Code(0)));
    }
    done.extend(boot.send(Event::Childless));
    boot.deeds(&done)
}

#[test]
fn a_defect_stops_everything_as_a_stop_signal_does_and_only_once() {
    let mut signalled = Boot::up();
    let first = signalled.send(Event::Terminate);
    let expected = stop_of(&mut signalled, first);
    let mut boot = Boot::up();
    let mut first = boot.send(Event::Defect);
    first.extend(boot.send(Event::Defect));
    assert_eq!(stop_of(&mut boot, first), expected);
    assert_eq!(boot.send(Event::Defect), [], "nothing is left to stop");
}

#[test]
fn the_stop_signal_after_a_defect_is_the_first_one() {
    let mut boot = Boot::up();
    boot.send(Event::Defect);
    let done = boot.send(Event::Terminate);
    assert_eq!(said(&done), [(Level::Info, "Stop signal: everything is being stopped already")]);
    assert_eq!(boot.deeds(&done), [""; 0], "nobody is hurried");
    let done = boot.send(Event::Terminate);
    assert_eq!(said(&done)[0], (Level::Warn, "Second stop signal: not waiting any longer"));
    let mut swept = Boot::of(machine(vec![], vec![]));
    swept.send(Event::Defect);
    let done = swept.send(Event::Terminate);
    assert_eq!(swept.deeds(&done), [""; 0]);
    let done = swept.send(Event::Terminate);
    assert_eq!(swept.deeds(&done), ["KILL all"]);
}

#[test]
fn a_defect_during_a_stop_changes_nothing() {
    let mut boot = Boot::up();
    boot.send(Event::Terminate);
    assert_eq!(boot.send(Event::Defect), []);
}

// === Plans made by hand ===

fn step(name: GateName, after: &'static [GateName], needs: &'static [GateName]) -> Step {
    Step {
        name,
        after,
        needs,
        before_services: false,
        deadline: Some(s(10)),
        weight: Weight::Required,
        work: Work::Task,
        says: None,
    }
}

fn service(name: &'static str, needs: &'static [GateName], stop_order: u8) -> Service {
    Service {
        needs,
        backoff: Backoff::seconds(1, 8, 60),
        stop_order,
        grace: s(10),
        required: true,
        ..Service::new(name, "a service of a test", &["/bin/true"])
    }
}

#[test]
fn steps_that_wait_for_nothing_of_each_other_run_side_by_side() {
    let steps = vec![
        step(gates::SSH, &[], &[]),
        step(gates::STORAGE, &[], &[]),
        step(gates::HOME, &[gates::STORAGE], &[]),
        step(gates::STATE, &[], &[gates::STORAGE]),
    ];
    let mut boot = Boot::of(machine(steps, vec![]));
    let done = boot.send(Event::Boot);
    assert_eq!(boot.deeds(&done), ["run ssh#1", "run storage#1"]);
    let done = boot.fails(gates::STORAGE, true);
    assert_eq!(boot.deeds(&done), ["run home#1"], "after is satisfied by a failure, needs is not");
    boot.pass(s(2));
    let done = boot.done(gates::STORAGE);
    assert_eq!(boot.deeds(&done), ["run state#1"]);
}

#[test]
fn services_of_one_group_are_stopped_together_and_the_slowest_decides() {
    let mut slow = service("slow", &[], 3);
    slow.grace = s(100);
    let services = vec![service("quick", &[], 3), slow, service("later", &[], 200)];
    let mut boot = Boot::of(machine(vec![], services));
    let done = boot.send(Event::Boot);
    assert_eq!(boot.deeds(&done), ["launch quick", "launch slow", "launch later"], "no ssh step to wait for");
    for name in ["quick", "slow", "later"] {
        boot.runs(name);
    }
    // The default grace of a service here is 10 s; then 5 for slow trees, and the last sweep.
    assert_eq!(boot.machine.stop_budget(), s(100 + 10 + 5 + 5));
    let done = boot.send(Event::Terminate);
    assert_eq!(boot.deeds(&done), ["TERM quick", "TERM slow"]);
    let done = boot.ends("quick", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of quick"]);
    let done = boot.ends("slow", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of slow", "TERM later"]);
}

#[test]
fn a_service_that_cannot_be_ended_does_not_keep_the_next_group_from_its_stop() {
    let services = vec![service("stuck", &[], 1), service("later", &[], 2)];
    let mut boot = Boot::of(machine(vec![], services));
    boot.send(Event::Boot);
    boot.runs("stuck");
    boot.runs("later");
    boot.send(Event::Terminate);
    let done = boot.pass(s(15));
    assert_eq!(boot.deeds(&done), ["kill tree of stuck", "kill keeper of stuck", "TERM later"]);
    assert!(
        said(&done).iter().any(|(_, text)| *text == "stuck did not end in time; the stop goes on without")
    );
}

#[test]
fn a_delay_of_zero_restarts_in_the_same_step_of_the_machine() {
    let mut eager = service("eager", &[], 1);
    eager.backoff = Backoff::seconds(0, 0, 60);
    let mut boot = Boot::of(machine(vec![], vec![eager]));
    boot.send(Event::Boot);
    boot.runs("eager");
    boot.pass(s(1));
    let done = boot.ends("eager", End::Code(1));
    assert_eq!(boot.deeds(&done), ["launch eager"]);
}

#[test]
fn a_hung_service_is_shown_with_what_will_be_done_about_it() {
    let mut hung = service("hung", &[], 1);
    let probe = Probe::Listens { port: 1 };
    hung.liveness = Some((Liveness { start: s(30), start_at_most: s(30), silence: s(20) }, probe.clone()));
    hung.readiness = Some(probe);
    let mut boot = Boot::of(machine(vec![], vec![hung]));
    boot.send(Event::Boot);
    boot.runs("hung");
    assert_eq!(
        boot.shown("hung").next_action.as_deref(),
        Some("becomes ready; ended if it stays silent until uptime 31 s")
    );
    let done = boot.pass(s(30));
    assert_eq!(
        said(&done),
        [(
            Level::Error,
            "hung: no first answer to its liveness probe after 30 s, and no sign of work for 30 s; ending it"
        )]
    );
    let shown = boot.shown("hung");
    assert_eq!(
        (shown.state, shown.next_action.as_deref()),
        (ServiceState::Stopping, Some("next measure in 10 s"))
    );
}

/// Otherwise `missing_for`, which follows needs, and the loop that starts steps would not end.
#[test]
fn the_real_plans_need_only_what_comes_before_and_services_need_only_what_is_there() {
    for pairs in [&S3[..], &[], &[DOCKER]] {
        let machine = machine_of(&config(pairs));
        let names: Vec<GateName> = machine.steps().iter().map(|r| r.step.name).collect();
        assert_eq!(names[0], gates::SSH);
        for (index, record) in machine.steps().iter().enumerate() {
            let needed = record.step.needs.iter().chain(record.step.after);
            assert!(needed.into_iter().all(|need| names[..index].contains(need)), "{:?}", record.step.name);
        }
        for record in machine.services() {
            assert!(record.service.needs.iter().all(|need| names.contains(need)), "{}", record.service.name);
        }
        let services: Vec<&str> = machine.services().iter().map(|r| r.service.name).collect();
        assert!(services.contains(&"sshd") && services.contains(&"gateway"));
        assert_eq!(services.contains(&"dockerd"), pairs.contains(&DOCKER));
    }
}

// === Random events ===

#[derive(Debug, Clone)]
enum Move {
    Pass(u32),
    ToDeadline,
    /// A running step ends, if there is one.
    Step(Result<(), bool>),
    /// A report of a service, even if it makes no sense in its state.
    Service(usize, Report),
    Order(usize, Order),
    /// A report of the storage worker, if there is one.
    Storage(ServiceReport),
    Childless,
}

#[derive(Debug, Clone)]
enum Report {
    Prepared(Result<(), bool>),
    Exec,
    MainEnded(End),
    Gone(End),
    Swept,
    Alive,
    Ready(bool),
}

fn moves(most: usize) -> impl Strategy<Value = Vec<Move>> {
    let outcome = || prop_oneof![3 => Just(Ok(())), 1 => any::<bool>().prop_map(Err)];
    let end = || {
        prop_oneof![
            Just(End::Code(0)),
            Just(End::Code(1)),
            Just(End::Code(78)),
            Just(End::Signal(9)),
            Just(End::Unseen)
        ]
    };
    let report = prop_oneof![
        4 => outcome().prop_map(Report::Prepared),
        4 => Just(Report::Exec),
        2 => end().prop_map(Report::MainEnded),
        2 => end().prop_map(Report::Gone),
        2 => Just(Report::Swept),
        1 => Just(Report::Alive),
        1 => any::<bool>().prop_map(Report::Ready),
    ];
    let order = prop_oneof![Just(Order::Start), Just(Order::Stop), Just(Order::Restart)];
    let gate = prop_oneof![
        6 => any::<bool>().prop_map(|outlives| GateState::Open { outlives }),
        2 => any::<bool>().prop_map(|retry| GateState::Closed { why: "no".into(), retry }),
        1 => Just(GateState::Waiting { why: "not yet".into() }),
        1 => Just(GateState::Unknown { why: "silence".into() }),
    ];
    let storage = prop_oneof![
        10 => gate.prop_map(storage::gate),
        1 => any::<bool>().prop_map(|all| ServiceReport::Drained { missing: (!all).then(|| "some".into()) }),
    ];
    let one = prop_oneof![
        2 => (0u32..5_000).prop_map(Move::Pass),
        1 => (0u32..1_000_000).prop_map(Move::Pass),
        3 => Just(Move::ToDeadline),
        4 => outcome().prop_map(Move::Step),
        10 => (0usize..5, report).prop_map(|(index, report)| Move::Service(index, report)),
        1 => (0usize..5, order).prop_map(|(index, order)| Move::Order(index, order)),
        2 => storage.prop_map(Move::Storage),
        1 => Just(Move::Childless),
    ];
    proptest::collection::vec(one, 0..most)
}

struct Simulation {
    boot: Boot,
    stopping: bool,
    exits: usize,
}

impl Simulation {
    fn feed(&mut self, event: Event) {
        let tick = event == Event::Tick;
        self.stopping |= matches!(event, Event::Terminate | Event::Defect);
        let actions = self.boot.send(event);
        if tick {
            let due = self.boot.machine.deadline();
            assert!(due.is_none_or(|due| due > self.boot.now), "busy loop, due {due:?}");
        }
        for action in &actions {
            self.check(action);
        }
        let ssh = self.boot.step(gates::SSH);
        let something_runs = self.boot.machine.services().iter().any(|r| r.unit.run().is_some());
        assert!(ssh.tries > 0 || !something_runs, "a service before the first try of the ssh step");
        let status = self.boot.status();
        assert_eq!(status.healthy, status.unhealthy.is_empty());
    }

    fn check(&mut self, action: &Action) {
        let deed = self.boot.deed(action).unwrap_or_default();
        let begins = ["run ", "prepare ", "launch ", "repair "].iter().any(|word| deed.starts_with(word));
        assert!(!(begins && self.stopping), "{deed} after the stop signal");
        if let Action::Service { id, .. } = action
            && begins
        {
            let record = self.boot.machine.service(*id).unwrap();
            let met = |need: &GateName| matches!(self.boot.step(*need).state, StepState::Done { .. });
            assert!(record.service.needs.iter().all(met), "{deed} without what it needs");
            // Two overlays on one upper layer would corrupt it.
            let free = record.service.name != "storage"
                || met(&gates::STORAGE)
                || !self.boot.machine.is_in_use(gates::STORAGE);
            assert!(free, "{deed} while somebody uses the old tree");
        }
        if matches!(action, Action::Exit { .. }) {
            assert!(self.stopping, "left without a stop signal");
            self.exits += 1;
        }
    }

    fn happens(&mut self, what: &Move) {
        match what {
            Move::Pass(ms) => {
                let mut until = self.boot.now + Duration::from_millis(u64::from(*ms));
                if self.stopping {
                    // The budget of a shutdown holds for a loop that meets its deadlines.
                    until = self.boot.machine.deadline().map_or(until, |due| due.min(until));
                }
                self.boot.now = until;
                self.feed(Event::Tick);
            }
            Move::ToDeadline => {
                if let Some(due) = self.boot.machine.deadline() {
                    self.boot.now = self.boot.now.max(due);
                    self.feed(Event::Tick);
                }
            }
            Move::Step(outcome) => {
                let running = self
                    .boot
                    .machine
                    .steps()
                    .iter()
                    .find(|r| (r.state.is_alive() || r.held) && r.step.work == Work::Task);
                if let Some(record) = running {
                    let of = Try { step: record.step.name, number: record.tries };
                    let outcome = outcome.map_err(|retry| Refusal { why: "no".into(), retry });
                    self.feed(Event::StepEnded { of, outcome });
                }
            }
            Move::Service(index, report) => {
                let index = index % self.boot.machine.services().len();
                let Some(run) = self.boot.machine.services()[index].unit.run() else { return };
                let event = match report.clone() {
                    Report::Prepared(outcome) => {
                        let outcome = outcome.map_err(|retry| Refusal { why: "no".into(), retry });
                        Happens::Prepared { run, outcome }
                    }
                    Report::Exec => Happens::Exec { run, pid: 100 },
                    Report::MainEnded(end) => Happens::MainEnded { run, end },
                    Report::Gone(end) => Happens::Gone { run, end },
                    Report::Swept => Happens::Swept { run },
                    Report::Alive => Happens::Alive { run },
                    Report::Ready(ready) => Happens::Readiness { run, ready },
                };
                self.feed(Event::Service { id: ServiceId(index), event });
            }
            Move::Order(index, order) => {
                let id = ServiceId(index % self.boot.machine.services().len());
                self.feed(Event::Order { id, order: *order });
            }
            Move::Storage(report) => {
                let Some(id) = self.boot.machine.find("storage") else { return };
                let Some(run) = self.boot.machine.service(id).and_then(|s| s.unit.run()) else { return };
                self.feed(Event::Report { id, run, report: report.clone() });
            }
            Move::Childless => self.feed(Event::Childless),
        }
    }
}

proptest! {
    /// In every phase a stop signal or a defect leads to one exit within the announced budget, even if no process
    /// ever answers again, and nothing is started after it.
    #[test]
    fn a_stop_in_any_phase_leads_out_once_and_within_the_budget(
        booted in prop::bool::weighted(0.95),
        with_bucket in any::<bool>(),
        life in moves(120),
        end in moves(40),
        by_defect in any::<bool>(),
        second_after in proptest::option::of(0usize..40),
    ) {
        let boot = if with_bucket { Boot::of(machine_of(&config(&[&S3[..], &[DOCKER]].concat()))) } else { Boot::local() };
        let mut simulation = Simulation { boot, stopping: false, exits: 0 };
        if booted {
            simulation.feed(Event::Boot);
            for what in &life {
                simulation.happens(what);
            }
        }
        let (began, budget) = (simulation.boot.now, simulation.boot.machine.stop_budget());
        simulation.feed(if by_defect { Event::Defect } else { Event::Terminate });
        let mut hurried = None;
        for (index, what) in end.iter().enumerate() {
            if second_after == Some(index) && simulation.exits == 0 {
                simulation.feed(Event::Terminate);
                hurried = (!by_defect).then_some(simulation.boot.now);
            }
            if simulation.exits == 0 {
                simulation.happens(what);
            }
        }
        // From here on no process answers.
        let mut ticks = 0;
        while simulation.exits == 0 {
            prop_assert!(simulation.boot.machine.deadline().is_some(), "waits for ever: {:?}", simulation.boot.machine);
            simulation.happens(&Move::ToDeadline);
            ticks += 1;
            prop_assert!(ticks < 100, "no end: {:?}", simulation.boot.machine);
        }
        let took = simulation.boot.now.since(began);
        prop_assert!(took <= budget, "took {took:?} of {budget:?}");
        if let Some(hurried) = hurried {
            let now = simulation.boot.now;
            prop_assert!(now.since(hurried) <= s(20), "{:?} after the second signal", now.since(hurried));
        }
        simulation.feed(Event::Childless);
        simulation.boot.pass(s(1_000));
        prop_assert_eq!(simulation.exits, 1);
    }

    /// Once steps succeed that have failed and hung any number of times, the gateway comes up.
    #[test]
    fn after_any_trouble_a_boot_whose_steps_succeed_brings_up_everything(
        life in moves(120),
        with_bucket in any::<bool>(),
    ) {
        let boot = if with_bucket { Boot::of(machine_of(&config(&[&S3[..], &[DOCKER]].concat()))) } else { Boot::local() };
        let mut simulation = Simulation { boot, stopping: false, exits: 0 };
        let count = simulation.boot.machine.services().len();
        simulation.feed(Event::Boot);
        for what in &life {
            simulation.happens(what);
        }
        for _ in 0..20 {
            for index in 0..count {
                if !matches!(simulation.boot.machine.services()[index].unit.state(), State::Running { .. }) {
                    simulation.happens(&Move::Order(index, Order::Start));
                }
            }
            let tree = storage::gate(GateState::Open { outlives: true });
            simulation.happens(&Move::Storage(tree));
            simulation.happens(&Move::Step(Ok(())));
            for report in [Report::Swept, Report::Prepared(Ok(())), Report::Gone(End::Code(1)), Report::Exec] {
                for index in 0..count {
                    let state = simulation.boot.machine.services()[index].unit.state();
                    let starting = matches!(state, State::Starting { .. } | State::Running { .. });
                    if !(starting && matches!(report, Report::Gone(_))) {
                        simulation.happens(&Move::Service(index, report.clone()));
                    }
                }
            }
        }
        for record in simulation.boot.machine.services() {
            let running = matches!(record.unit.state(), State::Running { .. });
            prop_assert!(running, "{} is {:?}", record.service.name, record.unit.state());
        }
        prop_assert_eq!(simulation.boot.status().phase, status::Phase::Running);
    }
}
