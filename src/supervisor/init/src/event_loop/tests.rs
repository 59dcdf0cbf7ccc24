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

fn world_of(services: Vec<Service>) -> World<Fake> {
    let environment = Environment::new(std::iter::empty());
    let (config, _) = Config::parse(&environment).unwrap_or_else(|problems| panic!("{problems:?}"));
    let children = Children::new();
    let kit = Kit::new(config, &environment, None, Vec::new(), Claim::default(), children.home().to_owned());
    let about = About {
        version: String::new(),
        storage: status::Storage::new("local", ""),
        keys: Vec::new(),
        doors: Vec::new(),
        remarks: Vec::new(),
    };
    let (kernel, voice) = (Fake::default(), Voice::into(None, LogFormat::Text));
    let began = kernel.now();
    let machine = Machine::new(Plan::new(Vec::new(), services).expect("a plan"));
    let mut world = World::new(machine, kit, children, kernel, voice, about, began);
    // Nobody asks here, unless a test says where.
    world.control_path = "/dev/null/no-such-place";
    world
}

/// A gateway that drains for 20 of its 30 seconds, and a storage worker that drains for 40 of 45.
/// Both run, and the first turn is over.
fn draining() -> World<Fake> {
    let mut world = world_of(vec![service("gateway", 1, s(30)), service("storage", 7, s(45))]);
    world.kernel.manners =
        vec![("gateway", Manners::EndsAfter(s(20))), ("storage", Manners::EndsAfter(s(40)))];
    world.feed(Event::Boot);
    for name in ["gateway", "storage"] {
        let keeper = world.kernel.started_as(name).expect("it was started");
        // Its last word, too, which counts when it is reaped.
        for report in
            [KeeperReport::Started { pid: 7 }, KeeperReport::TreeGone { end: End::Code(0), killed: 0 }]
        {
            let line = cvm_protocol::json_lines::line(&report);
            nix::unistd::write(&keeper.descriptors[3], &line).expect("a pipe takes a line");
        }
    }
    world.turn();
    world
}

fn pid_of(world: &World<Fake>, name: &str) -> Pid {
    world.kernel.started_as(name).expect("it was started").pid
}

/// Runs it to its end, and yields the status and what the kernel saw.
fn run(mut world: World<Fake>) -> (u8, Fake) {
    let status = world.run();
    (status, world.kernel)
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
        let mut world = draining();
        let (gateway, storage) = (pid_of(&world, "gateway"), pid_of(&world, "storage"));
        // Something has to happen, or there would be no such turn.
        (1..=5).for_each(|at| world.kernel.signal_at(s(at), libc::SIGCHLD));
        world.kernel.panics.insert(turn);
        let (status, kernel) = run(world);
        assert_eq!(status, exit::INTERNAL);
        assert_drained(&kernel, gateway, storage);
    }
}

#[test]
fn neither_a_second_defect_nor_the_stop_signal_after_it_hurries_anybody() {
    let mut world = draining();
    let (gateway, storage) = (pid_of(&world, "gateway"), pid_of(&world, "storage"));
    world.kernel.signal_at(s(1), libc::SIGCHLD);
    world.kernel.panics.extend([2, 3]);
    world.kernel.signal_at(s(5), TERM);
    let (status, kernel) = run(world);
    assert_eq!(status, exit::INTERNAL);
    assert_drained(&kernel, gateway, storage);
}

#[test]
fn when_every_turn_panics_storage_still_drains() {
    let mut world = draining();
    let (gateway, storage) = (pid_of(&world, "gateway"), pid_of(&world, "storage"));
    world.kernel.always_panics = true;
    let (status, kernel) = run(world);
    assert_eq!(status, exit::INTERNAL);
    assert_drained(&kernel, gateway, storage);
}

#[test]
fn the_last_net_ends_who_does_not_end_by_itself() {
    let mut world = draining();
    let (gateway, storage) = (pid_of(&world, "gateway"), pid_of(&world, "storage"));
    let orphan = world.kernel.adopt(Manners::IgnoresTerm);
    world.kernel.set_manners(gateway, Manners::IgnoresTerm);
    world.kernel.always_panics = true;
    let (_, kernel) = run(world);
    let asked = kernel.sent_at(gateway, TERM).expect("it was asked");
    assert_eq!(kernel.sent_at(gateway, libc::SIGQUIT), Some(asked + s(30)), "when its grace is over");
    assert_eq!(kernel.sent_at(storage, TERM), Some(asked + s(30)));
    assert_eq!(kernel.sent_at(storage, libc::SIGQUIT), None);
    assert_eq!(kernel.sent_at(orphan, libc::SIGKILL), Some(asked + s(30 + 40 + 3)));
    assert!(kernel.children().is_empty());
}

#[test]
fn what_the_machine_had_ordered_is_done_although_one_order_panics() {
    let mut world = world_of(vec![service("gateway", 1, s(30)), service("storage", 7, s(45))]);
    world.kernel.panics_at_spawn = Some(1);
    world.guarded(|world| world.feed(Event::Boot));
    assert!(world.kernel.started_as("gateway").is_none());
    assert!(world.kernel.started_as("storage").is_some(), "its start was ordered before the defect");
}

#[test]
fn the_place_of_a_defect_is_in_the_supervisors_log_and_nothing_else_of_it() {
    let (reader, writer) = descriptor::pipe().expect("a pipe");
    let mut world = draining();
    world.voice.write_also_to(Some(writer));
    let ears = world.voice.ears(tracing::Level::INFO);
    world.kernel.always_panics = true;
    tracing::subscriber::with_default(ears, || run(world));
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
    let mut world = draining();
    world.control_path = path.to_str().expect("a name in UTF-8").to_owned().leak();
    world.control_due = Some(world.kernel.now());
    world.keep_control_open();
    let ask = |world: &mut World<Fake>| {
        use std::io::Write as _;
        let mut client = std::os::unix::net::UnixStream::connect(&path).expect("the socket is there");
        client.write_all(b"{\"v\":1,\"verb\":\"status\"}\n").expect("a request");
        world.answer_operators();
        let mut answer = String::new();
        // A connection that was dropped with a request in it ends with an error.
        let _ = client.read_to_string(&mut answer);
        answer
    };
    // The first question for the time is the loop's own, the second one the answer's.
    world.kernel.panics_at_now.set(Some(2));
    assert_eq!(ask(&mut world), "");
    world.keep_control_open();
    assert!(ask(&mut world).contains("\"gateway\""), "the next request is answered");
    assert_eq!((world.defects, world.machine.phase()), (0, machine::Phase::Up));
    assert_eq!(world.kernel.sent, []);
}

#[test]
fn after_a_killed_keeper_is_looked_for_what_it_left_also_where_sessions_stay() {
    for leftovers in [Leftovers::Kill, Leftovers::Leave] {
        let mut world = world_of(vec![Service { leftovers, ..service("sshd", 9, s(5)) }]);
        world.feed(Event::Boot);
        let keeper = pid_of(&world, "sshd");
        world.kernel.dies(keeper, killed_by(libc::SIGKILL));
        world.turn();
        assert!(world.kernel.started_as("sshd-sweep").is_some(), "{leftovers:?}");
    }
}

#[test]
fn twenty_thousand_deaths_at_one_instant_are_all_reaped_by_one_signal() {
    let mut world = world_of(Vec::new());
    let orphans: Vec<Pid> = (0..20_000).map(|_| world.kernel.adopt(Manners::IgnoresTerm)).collect();
    world.kernel.adopt(Manners::IgnoresTerm);
    world.feed(Event::Boot);
    for pid in orphans {
        world.kernel.dies(pid, killed_by(libc::SIGKILL));
    }
    // The next thing to happen; nothing may be left to be done until then.
    world.kernel.signal_at(s(3600), libc::SIGCHLD);
    while world.kernel.elapsed < s(5) {
        world.turn();
    }
    assert_eq!(world.kernel.children().len(), 1);
}

#[test]
fn the_last_sweep_of_twenty_thousand_ends_clean() {
    let mut world = world_of(Vec::new());
    for _ in 0..20_000 {
        world.kernel.adopt(Manners::EndsAfter(Duration::ZERO));
    }
    world.kernel.signal_at(s(1), TERM);
    let (status, kernel) = run(world);
    assert_eq!(status, exit::CLEAN);
    assert_eq!(kernel.elapsed, s(1));
}

// === A machine that stands still ===

/// A service that has answered once, and whose silence is judged after a minute.
fn watched() -> World<Fake> {
    let probe = cvm_protocol::keeper::Probe::Listens { port: 1 };
    let limits = Liveness { start: s(60), start_at_most: s(60), silence: s(60) };
    let watched = Service { liveness: Some((limits, probe)), ..service("watched", 1, s(30)) };
    let mut world = world_of(vec![watched]);
    world.kernel.manners = vec![("watched", Manners::IgnoresTerm)];
    world.feed(Event::Boot);
    let keeper = world.kernel.started_as("watched").expect("it was started");
    for report in [KeeperReport::Started { pid: 7 }, KeeperReport::Liveness { ok: true }] {
        let line = cvm_protocol::json_lines::line(&report);
        nix::unistd::write(&keeper.descriptors[3], &line).expect("a pipe takes a line");
    }
    world.turn();
    world
}

fn asks(world: &mut World<Fake>, verb: Verb) -> Body {
    world.answer(&Request { v: cvm_protocol::control::VERSION, verb })
}

#[test]
fn a_machine_that_stood_still_for_an_hour_restarts_nothing() {
    let mut world = watched();
    let keeper = pid_of(&world, "watched");
    world.kernel.elapsed += s(3_600);
    world.turn();
    assert_eq!(world.kernel.sent_at(keeper, TERM), None);
    // From then on its silence counts, second for second, and so do the ten seconds up to the moment at which the
    // loop should have woken: whether the pause began before it or after, nobody knows.
    let resumed = world.kernel.elapsed;
    while world.kernel.sent_at(keeper, TERM).is_none() {
        world.turn();
    }
    assert_eq!(world.kernel.sent_at(keeper, TERM), Some(resumed + s(50)));
}

#[test]
fn while_the_clock_is_frozen_nobody_is_judged_and_a_stop_signal_thaws_it() {
    let mut world = watched();
    let keeper = pid_of(&world, "watched");
    assert!(matches!(asks(&mut world, Verb::Freeze), Body::Taken));
    let Body::Status(status) = asks(&mut world, Verb::Status) else { panic!("it was asked for") };
    assert!(status.frozen);
    world.kernel.elapsed += s(3_600);
    world.kernel.signal_at(world.kernel.elapsed, libc::SIGCHLD);
    world.turn();
    assert_eq!(world.kernel.sent_at(keeper, TERM), None);
    let Body::Status(later) = asks(&mut world, Verb::Status) else { panic!("it was asked for") };
    assert_eq!(later.uptime_ms, status.uptime_ms);

    world.kernel.signal_at(world.kernel.elapsed, TERM);
    world.turn();
    assert_eq!(world.kernel.sent_at(keeper, TERM), Some(world.kernel.elapsed));
    assert!(matches!(asks(&mut world, Verb::Freeze), Body::Refused { .. }), "its grace has begun");
}
