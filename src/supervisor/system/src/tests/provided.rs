//! Any service may need and provide gates: a service that the machine does not know provides one, dockerd needs the
//! gate of another service, and random plans are run.

use super::*;
use crate::entry::Entry;
use crate::roles::plan_of;
use crate::services::{dockerd, sshd};
use crate::tasks;
use cvm_machine::gate::Provides;
use cvm_machine::plan::Unplannable;
use cvm_protocol::fact::{Fact, Severity};
use std::collections::BTreeSet;

const POLICY: GateName = GateName("docker policy");

/// A service for tests, which needs the gateway's state and provides a gate.
fn policy() -> Entry {
    let service = Service {
        has_channel: true,
        needs: &[gates::STATE],
        provides: vec![Provides {
            gate: POLICY,
            called: "the docker policy",
            by: "the policy service",
            in_doubt: "Nobody looks after the rules",
            says: None,
        }],
        ..Service::new("policy", "a toy", &["cvm-policy"])
    };
    Entry::with_specification(service, Some(&["what it is told"]))
}

/// A role with that service, and a dockerd that needs its gate.
fn role_with_policy() -> Boot {
    let mut docker = dockerd::entry();
    docker.service.needs = &[gates::VOLUME, POLICY];
    let tasks = vec![tasks::ssh(), tasks::volume(), tasks::home(&[gates::VOLUME]), tasks::state()];
    let (plan, told) = plan_of(tasks, vec![sshd::entry(22), policy(), docker]).unwrap();
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].0, told[0].1.as_slice()), ("policy", &b"[\"what it is told\"]\n"[..]));
    let mut boot = Boot::of(Machine::new(plan));
    boot.send(Event::Boot);
    boot.done(gates::SSH);
    boot.done(gates::HOME);
    boot
}

impl Boot {
    fn reports(&mut self, name: &str, report: ServiceReport) -> Vec<Action> {
        let run = self.run(name);
        self.send(Event::Report { id: self.id(name), run, report })
    }

    fn opens(&mut self, name: &str, gate: &str) -> Vec<Action> {
        let state = GateState::Open { outlives: false };
        self.reports(name, ServiceReport::Gate { gate: gate.into(), state })
    }

    fn closes(&mut self, name: &str, gate: &str) -> Vec<Action> {
        let state = GateState::Closed { why: "it has no rules".into(), retry: true };
        self.reports(name, ServiceReport::Gate { gate: gate.into(), state })
    }
}

#[test]
fn a_service_that_nobody_knows_needs_a_gate_provides_one_and_is_shown_with_its_facts() {
    let mut boot = role_with_policy();
    assert_eq!(boot.shown("policy").state, ServiceState::Blocked);
    let done = boot.done(gates::STATE);
    assert_eq!(boot.deeds(&done), ["launch policy"]);
    boot.runs("policy");
    assert_eq!(boot.shown("dockerd").why.as_deref(), Some("boot step docker policy is not done yet"));
    let done = boot.opens("policy", "docker policy");
    assert_eq!(boot.deeds(&done), ["prepare dockerd"]);
    let rules = Fact::text("rules", "12\u{1b}[2J").warns(Some("`cvm logs policy`"));
    boot.reports("policy", ServiceReport::Status { facts: vec![rules] });
    let shown = boot.shown("policy").facts;
    assert_eq!((shown.len(), shown[0].severity), (1, Severity::Warning));
    assert_eq!(shown[0].value, cvm_protocol::fact::Value::Text("12 [2J".into()), "and cannot break a page");
    let step = boot.status().boot.into_iter().find(|step| step.name == "docker policy").unwrap();
    assert_eq!((step.state, step.required), (status::StepState::Done, false));
}

#[test]
fn dockerd_behind_the_gate_of_another_is_withdrawn_when_it_closes_and_comes_back() {
    let mut boot = role_with_policy();
    boot.done(gates::STATE);
    boot.runs("policy");
    boot.opens("policy", "docker policy");
    boot.runs("dockerd");
    let done = boot.closes("policy", "docker policy");
    assert_eq!(boot.deeds(&done), ["TERM dockerd"]);
    let line = "The docker policy is lost: it has no rules; whatever needs it is stopped; the policy service keeps trying";
    assert_eq!(said(&done), [(Level::Error, line)]);
    boot.ends("dockerd", End::Code(0));
    assert_eq!(boot.shown("dockerd").why.as_deref(), Some("boot step docker policy: it has no rules"));
    let done = boot.opens("policy", "docker policy");
    assert_eq!(boot.deeds(&done), ["prepare dockerd"]);
    boot.runs("dockerd");
    // The provider dies, so its gate closes.
    let done = boot.ends("policy", End::Signal(11));
    assert_eq!(boot.deeds(&done), ["TERM dockerd"], "and no policy service before dockerd has ended");
    let done = boot.ends("dockerd", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of dockerd"]);
    let done = boot.pass(s(1));
    assert_eq!(boot.deeds(&done), ["launch policy"]);
}

#[test]
fn no_service_opens_the_gate_of_another() {
    let mut boot = role_with_policy();
    boot.done(gates::STATE);
    boot.runs("policy");
    for gate in ["state", "nobody's", ""] {
        assert_eq!(boot.closes("policy", gate), []);
        assert_eq!(boot.opens("policy", gate), []);
    }
    assert_eq!(boot.shown("dockerd").state, ServiceState::Blocked);
}

#[test]
fn facts_go_with_the_run_that_has_reported_them_and_may_come_before_its_exec() {
    let mut boot = role_with_policy();
    boot.done(gates::STATE);
    // The service's report pipe may be read before its keeper's.
    boot.reports("policy", ServiceReport::Status { facts: vec![Fact::text("rules", "12")] });
    boot.runs("policy");
    assert_eq!(boot.shown("policy").facts.len(), 1);
    boot.ends("policy", End::Code(1));
    assert_eq!(boot.shown("policy").facts, []);
}

#[test]
fn a_flood_of_notes_is_cut_and_the_cut_is_said() {
    let mut boot = role_with_policy();
    boot.done(gates::STATE);
    boot.runs("policy");
    let note = || ServiceReport::Note { level: Level::Info, text: "again".into() };
    let said_now: usize = (0..1_000).map(|_| boot.reports("policy", note()).len()).sum();
    assert_eq!(said_now, 100);
    // Errors are not dropped with the other notes.
    let error = ServiceReport::Note { level: Level::Error, text: "the disk is full".into() };
    assert_eq!(said(&boot.reports("policy", error)), [(Level::Error, "the disk is full")]);
    let done = boot.pass(s(1));
    assert_eq!(said(&done), [(Level::Warn, "policy: 900 notes were dropped: too many at once")]);
    assert_eq!(boot.reports("policy", note()), []);
}

#[test]
fn a_plan_that_could_never_start_cannot_be_built() {
    const OTHER: GateName = GateName("other");
    let providing = |name, gate, needs| Service {
        provides: vec![Provides { gate, called: "it", by: "it", in_doubt: "it", says: None }],
        ..service(name, needs, 1)
    };
    let plan = |steps, services| Plan::new(steps, services).map(drop).unwrap_err();
    assert_eq!(
        plan(vec![], vec![service("a", &[POLICY], 1)]),
        Unplannable::NobodyOpens { gate: POLICY, needed_by: "a" }
    );
    assert_eq!(
        plan(vec![], vec![providing("a", POLICY, &[OTHER]), providing("b", OTHER, &[POLICY])]),
        Unplannable::Circle(vec!["a", "b", "other", "docker policy"])
    );
    // A step that every service waits for must not wait for a service.
    let first = Step { before_services: true, ..step(OTHER, &[], &[POLICY]) };
    assert!(matches!(plan(vec![first], vec![providing("a", POLICY, &[])]), Unplannable::Circle(_)));
    let twice = vec![providing("a", POLICY, &[]), providing("b", POLICY, &[])];
    assert_eq!(plan(vec![], twice), Unplannable::Twice("docker policy"));
    assert_eq!(plan(vec![], vec![service("a", &[], 1), service("a", &[], 1)]), Unplannable::Twice("a"));
}

// === Random plans ===

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const GATES: [GateName; 6] =
    [GateName("g0"), GateName("g1"), GateName("g2"), GateName("g3"), GateName("g4"), GateName("g5")];

/// Service number n provides gate number n, and needs the gates of its mask.
fn random_plan(needs: &[u8]) -> Result<Plan, Unplannable> {
    let services = needs.iter().enumerate().map(|(n, mask)| {
        let gates = GATES.iter().take(needs.len()).enumerate().filter(|(bit, _)| mask >> bit & 1 == 1);
        let needs: &'static [GateName] = Box::leak(gates.map(|(_, gate)| *gate).collect());
        Service {
            provides: vec![Provides { gate: GATES[n], called: "it", by: "it", in_doubt: "it", says: None }],
            ..service(NAMES[n], needs, 1)
        }
    });
    Plan::new(vec![], services.collect())
}

/// Whether following the needs from service `n` leads to a service for a second time.
fn leads_round(needs: &[u8], n: usize, way: &mut BTreeSet<usize>) -> bool {
    if !way.insert(n) {
        return true;
    }
    let next = (0..needs.len()).filter(|bit| needs[n] >> bit & 1 == 1);
    let round = next.into_iter().any(|bit| leads_round(needs, bit, way));
    way.remove(&n);
    round
}

#[derive(Debug, Clone)]
enum Turn {
    Opens { outlives: bool },
    Closes,
    Waits,
    Doubts,
    Ends,
    IsOrdered(Order),
    Passes(u16),
}

fn turns() -> impl Strategy<Value = Vec<(usize, Turn)>> {
    let order = prop_oneof![Just(Order::Start), Just(Order::Stop), Just(Order::Restart)];
    let turn = prop_oneof![
        6 => any::<bool>().prop_map(|outlives| Turn::Opens { outlives }),
        2 => Just(Turn::Closes),
        1 => Just(Turn::Waits),
        1 => Just(Turn::Doubts),
        3 => Just(Turn::Ends),
        1 => order.prop_map(Turn::IsOrdered),
        2 => (0u16..40_000).prop_map(Turn::Passes),
    ];
    proptest::collection::vec((0usize..6, turn), 0..150)
}

impl Boot {
    fn takes(&mut self, n: usize, turn: &Turn) {
        let name = NAMES[n];
        let says = |state| ServiceReport::Gate { gate: GATES[n].0.into(), state };
        let why = || "no".to_owned();
        let report = match turn {
            Turn::Opens { outlives } => says(GateState::Open { outlives: *outlives }),
            Turn::Closes => says(GateState::Closed { why: why(), retry: true }),
            Turn::Waits => says(GateState::Waiting { why: why() }),
            Turn::Doubts => says(GateState::Unknown { why: why() }),
            Turn::Ends => {
                if self.unit(name).run().is_some() {
                    self.ends(name, End::Code(1));
                }
                return;
            }
            Turn::IsOrdered(order) => return drop(self.order(name, *order)),
            Turn::Passes(ms) => return drop(self.pass(Duration::from_millis(u64::from(*ms)))),
        };
        if matches!(self.unit(name).state(), State::Running { .. } | State::Ending { .. }) {
            self.reports(name, report);
        }
    }

    /// Started programs execute, and stopping ones end.
    fn obeys(&mut self) {
        for name in NAMES.into_iter().take(self.machine.services().len()) {
            match self.unit(name).state() {
                State::Starting { .. } => drop(self.runs(name)),
                State::Ending { .. } => drop(self.ends(name, End::Code(0))),
                _ => {}
            }
        }
    }

    /// No service runs on, or is started, while a gate that it needs is closed.
    fn nobody_is_behind_a_closed_gate(&self) {
        for record in self.machine.services() {
            let lives = !matches!(record.unit.state(), State::Ending { .. }) && record.unit.run().is_some();
            let open = |gate: &GateName| matches!(self.step(*gate).state, StepState::Done { .. });
            assert!(
                !lives || record.service.needs.iter().all(open),
                "{} lives behind a closed gate: {:?}",
                record.service.name,
                self.machine
            );
        }
    }
}

proptest! {
    #[test]
    fn a_plan_is_built_exactly_when_no_need_leads_round(needs in proptest::collection::vec(any::<u8>(), 1..7)) {
        let round = (0..needs.len()).any(|n| leads_round(&needs, n, &mut BTreeSet::new()));
        prop_assert_eq!(random_plan(&needs).is_err(), round);
    }

    /// Services need gates with lower numbers only, so every plan can be built.
    #[test]
    fn who_needs_a_closed_gate_is_down_and_all_that_can_come_back_does(
        masks in proptest::collection::vec(any::<u8>(), 2..7),
        life in turns(),
    ) {
        let needs: Vec<u8> = masks.iter().enumerate().map(|(n, mask)| mask & ((1 << n) - 1)).collect();
        let Ok(plan) = random_plan(&needs) else { panic!("needs that only go down lead nowhere round") };
        let mut boot = Boot::of(Machine::new(plan));
        boot.send(Event::Boot);
        for (n, turn) in &life {
            boot.takes(n % needs.len(), turn);
            boot.nobody_is_behind_a_closed_gate();
            boot.obeys();
            boot.nobody_is_behind_a_closed_gate();
        }
        // From here on there are only start orders, and every provider opens its gate.
        for _ in 0..20 {
            for (n, name) in NAMES.into_iter().enumerate().take(needs.len()) {
                if !matches!(boot.unit(name).state(), State::Running { .. }) {
                    boot.order(name, Order::Start);
                }
                boot.obeys();
                boot.takes(n, &Turn::Opens { outlives: false });
                boot.nobody_is_behind_a_closed_gate();
            }
            boot.pass(s(30));
        }
        for name in NAMES.into_iter().take(needs.len()) {
            prop_assert!(matches!(boot.unit(name).state(), State::Running { .. }), "{name} is down: {:?}", boot.machine);
        }
    }
}
