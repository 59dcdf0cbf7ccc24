//! The loop over a fake kernel: what it does when it fails itself, and when very much happens at
//! one instant.

use super::*;
use cvm_machine::description::Service;
use cvm_machine::plan::Plan;
use cvm_machine::service::Liveness;
use cvm_protocol::keeper::Leftovers;
use cvm_protocol::volume::Claim;
use cvm_sys::descriptor;
use cvm_sys::fake::{Fake, Manners, killed_by};
use cvm_system::config::{Config, LogFormat};
use cvm_system::env::Environment;
use std::io::Read as _;
use std::os::fd::OwnedFd;

const TERM: i32 = libc::SIGTERM;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn service(name: &'static str, stop_order: u8, grace: Duration) -> Service {
    Service { stop_order, grace, required: true, ..Service::new(name, "", &[name]) }
}

fn supervisor_of(services: Vec<Service>) -> Supervisor<Fake> {
    let environment = Environment::new(std::iter::empty());
    let (config, _) = Config::parse(&environment).unwrap_or_else(|problems| panic!("{problems:?}"));
    let keepers = Keepers::new();
    let launcher =
        Launcher::new(config, &environment, None, Vec::new(), Claim::default(), keepers.home().to_owned());
    let about = About {
        version: String::new(),
        storage: status::Storage::new(status::StorageMode::Local, ""),
        keys: Vec::new(),
        doors: Vec::new(),
        remarks: Vec::new(),
    };
    let (kernel, log) = (Fake::default(), Log::into(None, LogFormat::Text));
    let began = kernel.now();
    let machine = Machine::new(Plan::new(Vec::new(), services).expect("a plan"));
    let mut supervisor = Supervisor::new(machine, launcher, keepers, kernel, log, about, began);
    // Nobody asks here, unless a test says where.
    supervisor.control_path = "/dev/null/no-such-place";
    supervisor
}

/// A gateway that drains for 20 of its 30 seconds, and a storage worker that drains for 40 of 45.
/// Both run, and the first turn is over.
fn draining() -> Supervisor<Fake> {
    let mut supervisor = supervisor_of(vec![service("gateway", 1, s(30)), service("storage", 7, s(45))]);
    supervisor.kernel.manners =
        vec![("gateway", Manners::EndsAfter(s(20))), ("storage", Manners::EndsAfter(s(40)))];
    supervisor.feed(Event::Boot);
    for name in ["gateway", "storage"] {
        let keeper = supervisor.kernel.started_as(name).expect("it was started");
        // Its last word, too, which counts when it is reaped.
        for report in
            [KeeperReport::Started { pid: 7 }, KeeperReport::TreeGone { end: End::Code(0), killed: 0 }]
        {
            let line = cvm_protocol::json_lines::line(&report);
            nix::unistd::write(&keeper.descriptors[3], &line).expect("a pipe takes a line");
        }
    }
    supervisor.turn();
    supervisor
}

fn pid_of(supervisor: &Supervisor<Fake>, name: &str) -> Pid {
    supervisor.kernel.started_as(name).expect("it was started").pid
}

/// Runs it to its end, and yields the status and what the kernel saw.
fn run(mut supervisor: Supervisor<Fake>) -> (u8, Fake) {
    let status = supervisor.run();
    (status, supervisor.kernel)
}

/// Every service was asked in its order, had its full time, and nobody was killed.
fn assert_drained(kernel: &Fake, gateway: Pid, storage: Pid) {
    let asked = |pid| kernel.sent_at(pid, TERM).expect("it was asked to end");
    assert_eq!(asked(storage), asked(gateway) + s(20), "storage is asked when the gateway has ended");
    assert_eq!(kernel.elapsed, asked(gateway) + s(60), "and has its 40 seconds");
    let killed = kernel.sent.iter().any(|(at, _, signal)| {
        matches!(*signal, libc::SIGKILL | libc::SIGQUIT) && *at < asked(gateway) + s(60)
    });
    assert!(!killed, "{:?}", kernel.sent);
    assert!(!kernel.stuck);
}

#[test]
fn a_panic_in_any_turn_stops_everything_in_order_with_full_budgets() {
    for turn in 2..=4 {
        let mut supervisor = draining();
        let (gateway, storage) = (pid_of(&supervisor, "gateway"), pid_of(&supervisor, "storage"));
        // Something has to happen, or there would be no such turn.
        (1..=5).for_each(|at| supervisor.kernel.signal_at(s(at), libc::SIGCHLD));
        supervisor.kernel.panics.insert(turn);
        let (status, kernel) = run(supervisor);
        assert_eq!(status, exit::INTERNAL);
        assert_drained(&kernel, gateway, storage);
    }
}

#[test]
fn neither_a_second_defect_nor_the_stop_signal_after_it_hurries_anybody() {
    let mut supervisor = draining();
    let (gateway, storage) = (pid_of(&supervisor, "gateway"), pid_of(&supervisor, "storage"));
    supervisor.kernel.signal_at(s(1), libc::SIGCHLD);
    supervisor.kernel.panics.extend([2, 3]);
    supervisor.kernel.signal_at(s(5), TERM);
    let (status, kernel) = run(supervisor);
    assert_eq!(status, exit::INTERNAL);
    assert_drained(&kernel, gateway, storage);
}

#[test]
fn when_every_turn_panics_storage_still_drains() {
    let mut supervisor = draining();
    let (gateway, storage) = (pid_of(&supervisor, "gateway"), pid_of(&supervisor, "storage"));
    supervisor.kernel.always_panics = true;
    let (status, kernel) = run(supervisor);
    assert_eq!(status, exit::INTERNAL);
    assert_drained(&kernel, gateway, storage);
}

#[test]
fn the_last_net_ends_who_does_not_end_by_itself() {
    let mut supervisor = draining();
    let (gateway, storage) = (pid_of(&supervisor, "gateway"), pid_of(&supervisor, "storage"));
    let orphan = supervisor.kernel.adopt(Manners::IgnoresTerm);
    supervisor.kernel.set_manners(gateway, Manners::IgnoresTerm);
    supervisor.kernel.always_panics = true;
    let (_, kernel) = run(supervisor);
    let asked = kernel.sent_at(gateway, TERM).expect("it was asked");
    assert_eq!(kernel.sent_at(gateway, libc::SIGQUIT), Some(asked + s(30)), "when its grace is over");
    assert_eq!(kernel.sent_at(storage, TERM), Some(asked + s(30)));
    assert_eq!(kernel.sent_at(storage, libc::SIGQUIT), None);
    assert_eq!(kernel.sent_at(orphan, libc::SIGKILL), Some(asked + s(30 + 40 + 3)));
    assert!(kernel.children().is_empty());
}

#[test]
fn what_the_machine_had_ordered_is_done_although_one_order_panics() {
    let mut supervisor = supervisor_of(vec![service("gateway", 1, s(30)), service("storage", 7, s(45))]);
    supervisor.kernel.panics_at_spawn = Some(1);
    supervisor.guarded(|supervisor| supervisor.feed(Event::Boot));
    assert!(supervisor.kernel.started_as("gateway").is_none());
    assert!(supervisor.kernel.started_as("storage").is_some(), "its start was ordered before the defect");
}

#[test]
fn the_place_of_a_defect_is_in_the_supervisors_log_and_nothing_else_of_it() {
    let (reader, writer) = descriptor::pipe().expect("a pipe");
    let mut supervisor = draining();
    supervisor.log.write_also_to(Some(writer));
    let subscriber = supervisor.log.subscriber(tracing::Level::INFO);
    supervisor.kernel.always_panics = true;
    tracing::subscriber::with_default(subscriber, || run(supervisor));
    let log = text_of(reader);
    let at = "A defect of the supervisor was caught, at src/base/sys/src/fake.rs:";
    assert!(log.lines().any(|line| line.contains(at)), "{log}");
    assert!(!log.contains("this turn panics"), "{log}");
}

fn text_of(pipe: OwnedFd) -> String {
    let mut text = String::new();
    std::fs::File::from(pipe).read_to_string(&mut text).expect("the log is text");
    text
}

#[test]
fn a_panic_in_an_answer_stops_no_service_and_the_next_one_is_answered() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("control.sock");
    let mut supervisor = draining();
    supervisor.control_path = path.to_str().expect("a name in UTF-8").to_owned().leak();
    supervisor.control_due = Some(supervisor.kernel.now());
    supervisor.keep_control_open();
    let ask = |supervisor: &mut Supervisor<Fake>| {
        use std::io::Write as _;
        let mut client = std::os::unix::net::UnixStream::connect(&path).expect("the socket is there");
        client.write_all(b"{\"v\":1,\"verb\":\"status\"}\n").expect("a request");
        supervisor.answer_operators();
        let mut answer = String::new();
        // A connection that was dropped with a request in it ends with an error.
        let _ = client.read_to_string(&mut answer);
        answer
    };
    // The first question for the time is the loop's own, the second one the answer's.
    supervisor.kernel.panics_at_now.set(Some(2));
    assert_eq!(ask(&mut supervisor), "");
    supervisor.keep_control_open();
    assert!(ask(&mut supervisor).contains("\"gateway\""), "the next request is answered");
    assert_eq!((supervisor.defects, supervisor.machine.phase()), (0, machine::Phase::Up));
    assert_eq!(supervisor.kernel.sent, []);
}

#[test]
fn after_a_killed_keeper_is_looked_for_what_it_left_also_where_sessions_stay() {
    for leftovers in [Leftovers::Kill, Leftovers::Leave] {
        let mut supervisor = supervisor_of(vec![Service { leftovers, ..service("sshd", 9, s(5)) }]);
        supervisor.feed(Event::Boot);
        let keeper = pid_of(&supervisor, "sshd");
        supervisor.kernel.dies(keeper, killed_by(libc::SIGKILL));
        supervisor.turn();
        assert!(supervisor.kernel.started_as("sshd-sweep").is_some(), "{leftovers:?}");
    }
}

#[test]
fn twenty_thousand_deaths_at_one_instant_are_all_reaped_by_one_signal() {
    let mut supervisor = supervisor_of(Vec::new());
    let orphans: Vec<Pid> = (0..20_000).map(|_| supervisor.kernel.adopt(Manners::IgnoresTerm)).collect();
    supervisor.kernel.adopt(Manners::IgnoresTerm);
    supervisor.feed(Event::Boot);
    for pid in orphans {
        supervisor.kernel.dies(pid, killed_by(libc::SIGKILL));
    }
    // The next thing to happen; nothing may be left to be done until then.
    supervisor.kernel.signal_at(s(3600), libc::SIGCHLD);
    while supervisor.kernel.elapsed < s(5) {
        supervisor.turn();
    }
    assert_eq!(supervisor.kernel.children().len(), 1);
}

#[test]
fn the_last_sweep_of_twenty_thousand_ends_clean() {
    let mut supervisor = supervisor_of(Vec::new());
    for _ in 0..20_000 {
        supervisor.kernel.adopt(Manners::EndsAfter(Duration::ZERO));
    }
    supervisor.kernel.signal_at(s(1), TERM);
    let (status, kernel) = run(supervisor);
    assert_eq!(status, exit::CLEAN);
    assert_eq!(kernel.elapsed, s(1));
}

// === A machine that stands still ===

/// A service that has answered once, and whose silence is judged after a minute.
fn watched() -> Supervisor<Fake> {
    let probe = cvm_protocol::keeper::Probe::Listens { port: 1 };
    let limits = Liveness { start: s(60), start_at_most: s(60), silence: s(60) };
    let watched = Service { liveness: Some((limits, probe)), ..service("watched", 1, s(30)) };
    let mut supervisor = supervisor_of(vec![watched]);
    supervisor.kernel.manners = vec![("watched", Manners::IgnoresTerm)];
    supervisor.feed(Event::Boot);
    let keeper = supervisor.kernel.started_as("watched").expect("it was started");
    for report in [KeeperReport::Started { pid: 7 }, KeeperReport::Liveness { ok: true }] {
        let line = cvm_protocol::json_lines::line(&report);
        nix::unistd::write(&keeper.descriptors[3], &line).expect("a pipe takes a line");
    }
    supervisor.turn();
    supervisor
}

fn asks(supervisor: &mut Supervisor<Fake>, verb: Verb) -> Body {
    supervisor.answer(&Request { v: cvm_protocol::control::VERSION, verb })
}

/// A control socket that opens, so that nothing but the service's silence is due.
fn with_control(world: &mut Supervisor<Fake>) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("control.sock").to_string_lossy().into_owned();
    world.control_path = Box::leak(path.into_boxed_str());
    world.control_due = Some(world.kernel.now());
    world.keep_control_open();
    assert!(world.control.is_some() && world.control_due.is_none());
    dir
}

#[test]
fn a_machine_that_stood_still_for_an_hour_restarts_nothing() {
    let mut world = watched();
    let _dir = with_control(&mut world);
    let keeper = pid_of(&world, "watched");
    // The kernel wakes the loop an hour late.
    world.kernel.stands_still = Some(s(3_600));
    world.turn();
    assert_eq!(world.kernel.sent_at(keeper, TERM), None);
    // From then on its silence counts, from the beginning.
    let resumed = world.kernel.elapsed;
    assert!(resumed > s(3_600));
    while world.kernel.sent_at(keeper, TERM).is_none() {
        world.turn();
    }
    assert_eq!(world.kernel.sent_at(keeper, TERM), Some(resumed + s(60)));
}

#[test]
fn a_service_that_is_silent_while_the_machine_runs_is_ended() {
    let mut world = watched();
    let _dir = with_control(&mut world);
    let keeper = pid_of(&world, "watched");
    world.turn();
    assert_eq!(world.kernel.sent_at(keeper, TERM), Some(world.kernel.elapsed));
}

#[test]
fn a_stop_keeps_its_budget_on_a_machine_that_stands_still() {
    let mut world = watched();
    let _dir = with_control(&mut world);
    let keeper = pid_of(&world, "watched");
    world.kernel.signal_at(world.kernel.elapsed, TERM);
    world.turn();
    let asked = world.kernel.sent_at(keeper, TERM).expect("it was asked to end");
    world.kernel.stands_still = Some(s(3_600));
    world.turn();
    assert_eq!(
        world.kernel.sent_at(keeper, libc::SIGQUIT),
        Some(asked + s(3_630)),
        "not 30 s after the pause"
    );
}

#[test]
fn while_the_clock_is_frozen_nobody_is_judged_and_a_stop_signal_thaws_it() {
    let mut world = watched();
    let keeper = pid_of(&world, "watched");
    assert!(matches!(asks(&mut world, Verb::Freeze { at_most_s: 601 }), Body::Refused { .. }));
    assert!(matches!(asks(&mut world, Verb::Freeze { at_most_s: 600 }), Body::Taken));
    assert!(matches!(asks(&mut world, Verb::Freeze { at_most_s: 600 }), Body::Refused { .. }));
    let Body::Status(status) = asks(&mut world, Verb::Status) else { panic!("it was asked for") };
    assert!(status.frozen);
    world.kernel.elapsed += s(500);
    world.kernel.signal_at(world.kernel.elapsed, libc::SIGCHLD);
    world.turn();
    assert_eq!(world.kernel.sent_at(keeper, TERM), None);
    let Body::Status(later) = asks(&mut world, Verb::Status) else { panic!("it was asked for") };
    assert_eq!(later.uptime_ms, status.uptime_ms);

    world.kernel.signal_at(world.kernel.elapsed, TERM);
    world.turn();
    assert_eq!(world.kernel.sent_at(keeper, TERM), Some(world.kernel.elapsed));
    assert!(
        matches!(asks(&mut world, Verb::Freeze { at_most_s: 1 }), Body::Refused { .. }),
        "its grace has begun"
    );
}

#[test]
fn a_frozen_clock_that_nobody_thaws_goes_on_by_itself() {
    let mut world = watched();
    let _dir = with_control(&mut world);
    let keeper = pid_of(&world, "watched");
    let frozen = world.kernel.elapsed;
    assert!(matches!(asks(&mut world, Verb::Freeze { at_most_s: 300 }), Body::Taken));
    while world.kernel.sent_at(keeper, TERM).is_none() {
        world.turn();
    }
    assert_eq!(world.kernel.sent_at(keeper, TERM), Some(frozen + s(300) + s(60)));
}
