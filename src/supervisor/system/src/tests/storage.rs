//! The machine with a bucket: the storage gate opens, closes and opens again, the worker dies in every way, and the
//! last log line says what is missing.

use super::*;

const LOST: &str = "another instance has taken the bucket";
const ENDED: &str = "the storage worker ended and is started again";

pub(super) fn gate(state: GateState) -> ServiceReport {
    ServiceReport::Gate { gate: gates::STORAGE.0.into(), state }
}

fn ready(outlives: bool) -> ServiceReport {
    gate(GateState::Open { outlives })
}

fn not_ready(why: &str, retry: bool) -> ServiceReport {
    gate(GateState::Closed { why: why.into(), retry })
}

fn drained() -> ServiceReport {
    ServiceReport::Drained { missing: None }
}

impl Boot {
    fn s3(more: &[(&str, &str)]) -> Self {
        Self::of(machine_of(&config(&[&S3[..], more].concat())))
    }

    /// The worker runs, and has reported nothing.
    fn awaiting() -> Self {
        let mut boot = Self::s3(&[]);
        boot.send(Event::Boot);
        boot.done(gates::SSH);
        for name in ["sshd", "standin", "storage"] {
            boot.runs(name);
        }
        boot
    }

    /// The storage gate is open, and every service is up.
    fn on_a_tree(independent: bool) -> Self {
        let mut boot = Self::awaiting();
        boot.says(ready(independent));
        boot.gets_up();
        boot
    }

    /// All that follows once the storage gate is open, until the gateway is ready.
    fn gets_up(&mut self) {
        self.done(gates::HOME);
        self.done(gates::STATE);
        self.runs("gateway");
        let run = self.run("gateway");
        self.answers("gateway", Happens::Readiness { run, ready: true });
        assert_eq!(self.complaints(), [""; 0]);
    }

    fn says(&mut self, report: ServiceReport) -> Vec<Action> {
        self.says_in(self.run("storage"), report)
    }

    fn says_in(&mut self, run: Run, report: ServiceReport) -> Vec<Action> {
        self.send(Event::Report { id: self.id("storage"), run, report })
    }

    fn state_of(&self, name: GateName) -> status::StepState {
        let step = self.status().boot.into_iter().find(|s| s.name == name.0).unwrap();
        step.state
    }

    /// A whole shutdown, in which the worker reports `last` before it ends.
    fn stopped_after(&mut self, last: Option<&ServiceReport>) -> Vec<Action> {
        let mut all = self.send(Event::Terminate);
        for name in ["gateway", "storage", "standin", "sshd"] {
            if self.unit(name).run().is_none() {
                continue;
            }
            if name == "storage" {
                all.extend(last.into_iter().flat_map(|report| self.says(report.clone())));
            }
            all.extend(self.ends(name, End::Code(0)));
        }
        all.extend(self.send(Event::Childless));
        all
    }
}

// === Boot ===

#[test]
fn with_a_bucket_home_state_and_gateway_wait_for_the_worker_and_nothing_else_does() {
    let mut boot = Boot::s3(&[]);
    boot.send(Event::Boot);
    let done = boot.done(gates::SSH);
    assert_eq!(boot.deeds(&done), ["prepare sshd", "launch standin", "launch storage"]);
    assert_eq!(said(&done), [(Level::Info, "S3 storage configured (bucket: claws), setting up rclone...")]);
    for name in ["sshd", "standin", "storage"] {
        boot.runs(name);
    }
    assert_eq!(boot.state_of(gates::STORAGE), status::StepState::Running);
    let shown = boot.shown("gateway");
    assert_eq!(shown.why.as_deref(), Some("boot step storage is not done yet"));
    // A restore may take days, so it has no deadline.
    assert_eq!(boot.pass(s(1_000_000)), []);
}

#[test]
fn when_the_tree_is_good_the_steps_that_need_it_run_and_then_the_gateway() {
    let mut boot = Boot::awaiting();
    boot.pass(s(100));
    let done = boot.says(ready(false));
    assert_eq!(boot.deeds(&done), ["run home#1"]);
    let StepState::Done { took, .. } = boot.step(gates::STORAGE).state else { panic!() };
    assert_eq!(took, s(100), "since it began");
    boot.gets_up();
    assert_eq!(boot.says(ready(true)), [], "once more, since something of it has changed");
    assert!(boot.step(gates::STORAGE).gate.outlives);
    assert!(boot.unit("gateway").run().is_some());
}

#[test]
fn notes_of_the_worker_are_said_as_they_are() {
    let mut boot = Boot::awaiting();
    let note = ServiceReport::Note { level: Level::Info, text: "Attempting FUSE mount...".into() };
    assert_eq!(boot.says(note), [Action::Say(Level::Info, "Attempting FUSE mount...".into())]);
}

#[test]
fn what_a_server_says_cannot_become_a_line_of_its_own() {
    let mut boot = Boot::awaiting();
    let done = boot.says(not_ready("403\n2026-11-21 INFO all is well\u{1b}[2J", true));
    let [(_, line)] = said(&done)[..] else { panic!("{done:?}") };
    assert!(!line.contains(char::is_control), "{line:?}");
}

#[test]
fn what_keeps_the_tree_from_coming_is_said_once_and_shown() {
    let mut boot = Boot::awaiting();
    let refused = boot.says(not_ready("the bucket does not answer", true));
    let line = "Boot step storage failed: the bucket does not answer; the storage worker keeps trying";
    assert_eq!(said(&refused), [(Level::Error, line)]);
    assert_eq!(boot.deeds(&refused), [""; 0]);
    assert_eq!(boot.says(not_ready("the bucket does not answer", true)), []);
    let shown = boot.shown("gateway");
    assert_eq!(shown.why.as_deref(), Some("boot step storage: the bucket does not answer"));
    assert!(shown.next_action.is_some_and(|next| next.contains("the storage worker keeps trying")));
    assert_eq!(boot.status().phase, status::Phase::Degraded);
    let waits = boot.says(gate(GateState::Waiting { why: "another has it".into() }));
    assert_eq!(said(&waits), [(Level::Warn, "Boot step storage waits: another has it")]);
    let refused = boot.says(not_ready("the key is wrong", false));
    assert_eq!(
        said(&refused),
        [(Level::Error, "Boot step storage failed: the key is wrong; an operator is needed")]
    );
    assert_eq!(boot.shown("gateway").next_action.as_deref(), Some("mend it, then `cvm start gateway`"));
    assert_eq!(boot.says(not_ready("the bucket does not answer", true)), [], "said before");
    let done = boot.says(ready(false));
    assert_eq!(boot.deeds(&done), ["run home#1"]);
}

#[test]
fn a_worker_that_dies_before_there_was_a_tree_is_started_again_with_backoff() {
    let mut boot = Boot::awaiting();
    let done = boot.ends("storage", End::Signal(11));
    assert!(said(&done).iter().any(|(_, text)| text.contains(ENDED)), "{done:?}");
    assert_eq!(boot.shown("gateway").why, Some(format!("boot step storage: {ENDED}")));
    let done = boot.pass(s(1));
    assert_eq!(boot.deeds(&done), ["launch storage"]);
    boot.runs("storage");
    boot.says(not_ready("the bucket does not answer", true));
    let done = boot.ends("storage", End::Signal(11));
    assert!(!said(&done).iter().any(|(_, text)| text.contains(ENDED)), "its own words say more");
    assert_eq!(boot.shown("gateway").why.as_deref(), Some("boot step storage: the bucket does not answer"));
}

#[test]
fn words_of_an_earlier_worker_change_nothing() {
    let mut boot = Boot::awaiting();
    let old = boot.run("storage");
    boot.ends("storage", End::Code(1));
    boot.pass(s(1));
    for report in [ready(true), not_ready("x", false), drained()] {
        assert_eq!(boot.says_in(old, report), []);
    }
    assert_eq!(boot.state_of(gates::STORAGE), status::StepState::Failed);
}

// === The storage gate closes and opens again ===

#[test]
fn a_tree_that_is_lost_takes_the_gateway_down_and_the_next_one_brings_it_back() {
    let mut boot = Boot::on_a_tree(true);
    let lost = boot.says(not_ready(LOST, false));
    let line = format!("The storage is lost: {LOST}; whatever needs it is stopped; an operator is needed");
    assert_eq!(said(&lost), [(Level::Error, line.as_str())]);
    assert_eq!(boot.deeds(&lost), ["TERM gateway"]);
    for step in [gates::HOME, gates::STATE] {
        assert_eq!(boot.state_of(step), status::StepState::Waiting);
    }
    boot.ends("gateway", End::Code(0));
    assert_eq!(boot.shown("gateway").state, ServiceState::Blocked);
    assert_eq!(boot.shown("gateway").why, Some(format!("boot step storage: {LOST}")));
    let done = boot.pass(s(10_000));
    assert_eq!(boot.deeds(&done), [""; 0], "not by itself");
    let back = boot.says(ready(false));
    assert_eq!(boot.deeds(&back), ["run home#2"]);
    boot.gets_up();
}

#[test]
fn a_tree_that_comes_back_while_the_gateway_is_still_ending_waits_for_its_end() {
    let mut boot = Boot::on_a_tree(false);
    boot.says(not_ready(LOST, true));
    let back = boot.says(ready(false));
    assert_eq!(boot.deeds(&back), [""; 0], "the old gateway is still there");
    let done = boot.ends("gateway", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of gateway", "run home#2"]);
    boot.gets_up();
}

#[test]
fn a_gateway_in_any_state_comes_back_with_the_tree_unless_an_operator_stopped_it() {
    let mut waiting = Boot::on_a_tree(false);
    waiting.ends("gateway", End::Code(1));
    assert_eq!(waiting.shown("gateway").state, ServiceState::Waiting);
    waiting.says(not_ready(LOST, true));
    assert_eq!(waiting.shown("gateway").state, ServiceState::Blocked);
    waiting.says(ready(false));
    waiting.gets_up();

    let mut stopped = Boot::on_a_tree(false);
    stopped.order("gateway", Order::Stop);
    stopped.ends("gateway", End::Code(0));
    stopped.says(not_ready(LOST, true));
    stopped.says(ready(false));
    stopped.done(gates::HOME);
    assert_eq!(stopped.done(gates::STATE), []);
    assert_eq!(stopped.shown("gateway").state, ServiceState::Stopped);

    let mut stopping = Boot::on_a_tree(false);
    stopping.order("gateway", Order::Stop);
    stopping.says(not_ready(LOST, true));
    stopping.ends("gateway", End::Code(0));
    assert_eq!(stopping.shown("gateway").state, ServiceState::Stopped, "the operator's word stands");
    stopping.order("gateway", Order::Start);
    assert_eq!(stopping.shown("gateway").state, ServiceState::Blocked);
    stopping.says(ready(false));
    stopping.gets_up();
}

#[test]
fn a_step_on_a_tree_that_is_lost_is_ended_and_done_again() {
    let mut boot = Boot::awaiting();
    boot.says(ready(false));
    boot.done(gates::HOME);
    let lost = boot.says(not_ready(LOST, true));
    assert_eq!(boot.deeds(&lost), ["end state#1"]);
    let back = boot.says(ready(false));
    assert_eq!(boot.deeds(&back), [""; 0], "one of its steps is still alive");
    let done = boot.ended(gates::STATE, Ok(()));
    assert_eq!(boot.deeds(&done), ["run home#2"], "done on the old tree is not done");
    boot.gets_up();
}

#[test]
fn an_operators_start_runs_no_step_without_the_tree_it_works_on() {
    let mut boot = Boot::awaiting();
    boot.says(ready(false));
    boot.says(not_ready(LOST, true));
    // The kernel holds the process.
    boot.pass(s(10));
    assert_eq!(boot.state_of(gates::HOME), status::StepState::Failed);
    let done = boot.order("gateway", Order::Start);
    assert_eq!(boot.deeds(&done), [""; 0]);
    boot.ended(gates::HOME, Err(unreported(&End::Signal(9))));
    let back = boot.says(ready(false));
    assert_eq!(boot.deeds(&back), ["run home#2"]);
}

// === The worker dies ===

#[test]
fn when_the_worker_dies_under_an_independent_tree_nobody_notices() {
    let mut boot = Boot::on_a_tree(true);
    let gateway = boot.run("gateway");
    let done = boot.ends("storage", End::Signal(9));
    assert_eq!(boot.deeds(&done), [""; 0]);
    assert_eq!(boot.state_of(gates::STORAGE), status::StepState::Done);
    let done = boot.pass(s(1));
    assert_eq!(boot.deeds(&done), ["launch storage"], "although the gateway stands on the tree");
    boot.runs("storage");
    boot.says(ready(true));
    assert_eq!(boot.run("gateway"), gateway);
}

#[test]
fn an_outage_after_the_worker_died_stops_nobody_on_an_independent_tree() {
    let mut boot = Boot::on_a_tree(true);
    let gateway = boot.run("gateway");
    boot.ends("storage", End::Signal(9));
    boot.pass(s(1));
    boot.runs("storage");
    let silent = || gate(GateState::Unknown { why: "the bucket cannot be reached".into() });
    let done = boot.says(silent());
    assert_eq!(boot.deeds(&done), [""; 0]);
    assert!(
        matches!(&said(&done)[..], [(Level::Warn, text)] if text.starts_with("Nothing is replicated: ")),
        "{done:?}"
    );
    assert_eq!(boot.says(silent()), [], "said once");
    assert_eq!(boot.state_of(gates::STORAGE), status::StepState::Done);
    // Once more, after a good report.
    boot.says(ready(true));
    assert_eq!(boot.says(silent()).len(), 1);
    assert_eq!(boot.run("gateway"), gateway);
    // A report that the tree is bad ends it nevertheless.
    let done = boot.says(not_ready(LOST, true));
    assert_eq!(boot.deeds(&done), ["TERM gateway"]);
}

#[test]
fn an_outage_is_no_tree_where_there_is_none_that_outlives_its_worker() {
    let silent = || gate(GateState::Unknown { why: "the bucket cannot be reached".into() });
    let mut boot = Boot::awaiting();
    boot.says(silent());
    assert_eq!(boot.state_of(gates::STORAGE), status::StepState::Failed);
    assert_eq!(boot.shown("gateway").state, ServiceState::Blocked);
    boot.says(ready(true));
    boot.gets_up();
    let mut boot = Boot::on_a_tree(false);
    let done = boot.says(silent());
    assert_eq!(boot.deeds(&done), ["TERM gateway"]);
}

#[test]
fn when_the_worker_dies_and_the_tree_with_it_the_next_one_waits_until_nobody_stands_on_the_old_tree() {
    for end in [End::Signal(9), End::Code(0), End::Code(1), End::OutOfMemory] {
        let mut boot = Boot::on_a_tree(false);
        let done = boot.ends("storage", end);
        assert_eq!(boot.deeds(&done), ["TERM gateway"], "and no worker");
        assert!(said(&done).iter().any(|(_, text)| text.contains(ENDED)), "{done:?}");
        // The gateway ends slowly.
        let done = boot.pass(s(29));
        assert!(!boot.deeds(&done).contains(&"launch storage".to_owned()));
        assert_eq!(boot.shown("storage").state, ServiceState::Waiting);
        let done = boot.ends("gateway", End::Code(0));
        assert_eq!(boot.deeds(&done), ["kill tree of gateway", "launch storage"]);
        boot.runs("storage");
        let back = boot.says(ready(false));
        assert_eq!(boot.deeds(&back), ["run home#2"]);
        boot.gets_up();
    }
}

#[test]
fn a_worker_whose_keeper_died_is_no_different() {
    let mut boot = Boot::on_a_tree(false);
    let run = boot.run("storage");
    let done = boot.answers("storage", Happens::Gone { run, end: End::Unseen });
    assert_eq!(boot.deeds(&done), ["TERM gateway", "sweep storage"]);
    boot.answers("storage", Happens::Swept { run });
    let done = boot.pass(s(29));
    assert_eq!(boot.deeds(&done), [""; 0]);
    let done = boot.ends("gateway", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of gateway", "launch storage"]);
}

#[test]
fn a_gateway_that_cannot_be_ended_keeps_the_next_worker_away() {
    let mut boot = Boot::on_a_tree(false);
    boot.ends("storage", End::Signal(9));
    let done = boot.pass(s(10_000));
    assert!(!boot.deeds(&done).contains(&"launch storage".to_owned()), "{done:?}");
    assert_eq!(boot.shown("gateway").state, ServiceState::Stuck);
    let run = boot.run("gateway");
    let done = boot.answers("gateway", Happens::Swept { run });
    assert_eq!(boot.deeds(&done), ["launch storage"]);
}

// === Operators ===

#[test]
fn an_order_to_stop_the_worker_takes_everybody_from_its_tree_first() {
    for (order, last) in [(Order::Stop, ServiceState::Stopped), (Order::Restart, ServiceState::Starting)] {
        let mut boot = Boot::on_a_tree(false);
        let done = boot.order("storage", order);
        assert_eq!(boot.deeds(&done), ["TERM gateway"]);
        let done = boot.ends("gateway", End::Code(0));
        assert_eq!(boot.deeds(&done), ["kill tree of gateway", "TERM storage"]);
        boot.says(drained());
        boot.ends("storage", End::Code(0));
        assert_eq!(boot.shown("storage").state, last);
    }
}

#[test]
fn under_an_independent_tree_the_worker_is_stopped_at_once_and_nobody_else() {
    let mut boot = Boot::on_a_tree(true);
    let done = boot.order("storage", Order::Stop);
    assert_eq!(boot.deeds(&done), ["TERM storage"]);
    boot.ends("storage", End::Code(0));
    assert_eq!(
        (boot.shown("storage").state, boot.shown("gateway").state),
        (ServiceState::Stopped, ServiceState::Ready)
    );
}

#[test]
fn a_start_of_the_gateway_starts_a_worker_that_was_stopped() {
    let mut boot = Boot::awaiting();
    boot.order("storage", Order::Stop);
    boot.ends("storage", End::Code(0));
    assert_eq!(
        boot.shown("gateway").why.as_deref(),
        Some("boot step storage: the storage worker was stopped")
    );
    let done = boot.order("gateway", Order::Start);
    assert_eq!(boot.deeds(&done), ["launch storage"]);
    boot.runs("storage");
    boot.says(ready(false));
    boot.gets_up();
}

// === Shutdown ===

#[test]
fn the_worker_is_stopped_after_all_that_write_and_before_the_standin_and_sshd() {
    let mut boot = Boot::on_a_tree(false);
    let done = boot.stopped_after(Some(&drained()));
    let terms: Vec<_> = boot.deeds(&done).into_iter().filter(|d| !d.starts_with("kill")).collect();
    assert_eq!(terms, ["TERM gateway", "TERM storage", "TERM standin", "TERM sshd", "TERM all", "exit"]);
}

#[test]
fn the_last_line_says_what_the_bucket_lacks_and_the_status_too() {
    let some = "Not everything is in the bucket: 3 files are missing there";
    let cases = [
        (Some(None), "exit", None),
        (Some(Some(some)), "exit undrained", Some(some)),
        (None, "exit undrained", Some("the storage worker ended without saying what is missing")),
    ];
    for (last, exit, line) in cases {
        for outlives in [false, true] {
            let mut boot = Boot::on_a_tree(outlives);
            let last = last.map(|missing| ServiceReport::Drained { missing: missing.map(str::to_owned) });
            let done = boot.stopped_after(last.as_ref());
            assert_eq!(boot.deeds(&done).last().map(String::as_str), Some(exit));
            let lines = said(&done);
            let (_, spoken) = lines.last().unwrap();
            match line {
                Some(line) => assert!(spoken.contains(line), "{spoken}"),
                None => assert!(spoken.starts_with("Stopped in order"), "{spoken}"),
            }
        }
    }
}

#[test]
fn a_machine_that_never_had_a_tree_lacks_nothing() {
    let mut boot = Boot::awaiting();
    boot.says(not_ready("the key is wrong", false));
    let done = boot.stopped_after(None);
    assert_eq!(boot.deeds(&done).last().map(String::as_str), Some("exit"));
}

#[test]
fn a_worker_that_is_away_at_the_stop_has_not_said_what_is_missing() {
    let mut boot = Boot::on_a_tree(true);
    boot.says(drained());
    boot.ends("storage", End::Code(1));
    let done = boot.stopped_after(None);
    assert_eq!(boot.deeds(&done).last().map(String::as_str), Some("exit undrained"), "the gateway wrote on");
}

#[test]
fn a_worker_stopped_by_an_operator_after_everybody_else_has_said_all() {
    let mut boot = Boot::on_a_tree(false);
    boot.order("storage", Order::Stop);
    boot.ends("gateway", End::Code(0));
    boot.says(drained());
    boot.ends("storage", End::Code(0));
    let done = boot.stopped_after(None);
    assert_eq!(boot.deeds(&done).last().map(String::as_str), Some("exit"));
}

#[test]
fn a_second_stop_signal_does_not_wait_for_the_bucket() {
    let mut boot = Boot::on_a_tree(false);
    boot.send(Event::Terminate);
    boot.ends("gateway", End::Code(0));
    let done = boot.send(Event::Terminate);
    assert!(boot.deeds(&done).contains(&"kill tree of storage".to_owned()), "{done:?}");
}

#[test]
fn a_tree_lost_on_the_way_down_changes_no_order() {
    let mut boot = Boot::on_a_tree(false);
    boot.send(Event::Terminate);
    let done = boot.says(not_ready(LOST, false));
    assert_eq!(boot.deeds(&done), [""; 0]);
    assert_eq!(said(&done).len(), 1);
    let done = boot.ends("gateway", End::Code(0));
    assert_eq!(boot.deeds(&done), ["kill tree of gateway", "TERM storage"]);
}

#[test]
fn a_stop_has_time_for_the_drain() {
    let budget = |more: &[(&str, &str)]| Boot::s3(more).machine.stop_budget();
    assert_eq!(budget(&[("S3_DRAIN_TIMEOUT", "120")]), budget(&[]) + s(100));
}
