//! How the gateway is asked: order, patience, and a gateway that hangs, fails or is not there.

use crate::fixtures::{World, echo, echo_text, telegram};
use cvm_harness::chat::Asked;
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Said, rounds, until};
use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use std::time::Duration;

#[test]
fn a_session_is_asked_one_message_at_a_time_and_sixteen_sessions_at_once() {
    // No question is answered before all have been handed over.
    let gate = Arc::new(RwLock::new(()));
    let closed = gate.write().expect("nobody has it");
    let its = Arc::clone(&gate);
    let script = move |asked: &Asked, n: usize| {
        drop(its.read());
        Said::Text(echo_text(asked, n))
    };
    let mut world = World::with(script, |builder| builder);
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let hand_over = |world: &mut World, expected: &mut BTreeMap<String, Vec<usize>>| {
        for session in 0..40 {
            let session = telegram(&session.to_string());
            expected.entry(session.clone()).or_default().push(world.hand_over(&session));
        }
    };
    hand_over(&mut world, &mut expected);
    until("sixteen are asked", PATIENCE, || (world.chat.most_at_once().1 >= 16).then_some(()));
    // Whoever could be asked besides would be, while these are taken.
    hand_over(&mut world, &mut expected);
    assert_eq!(world.chat.most_at_once(), (1, 16));
    drop(closed);
    world.answered(&expected);
    assert_eq!(world.chat.most_at_once(), (1, 16));
}

#[test]
fn a_session_that_hangs_does_not_hold_up_the_others() {
    let script = |asked: &Asked, n: usize| {
        if asked.session.as_deref() == Some("agent:main:telegram:direct:stuck") {
            Said::Hang
        } else {
            echo(asked, n)
        }
    };
    let mut world = World::with(script, |builder| builder);
    let stuck = world.hand_over(&telegram("stuck"));
    until("it is asked", PATIENCE, || (world.asked(stuck) == 1).then_some(()));
    let mut expected = BTreeMap::new();
    for session in 0..10 {
        let session = telegram(&session.to_string());
        let n = world.hand_over(&session);
        expected.insert(session, vec![n]);
    }
    world.answered(&expected);
    assert!(world.events(&telegram("stuck")).is_empty());
}

#[test]
fn events_are_taken_while_there_is_no_gateway_and_answered_when_there_is() {
    let mut world = World::new();
    world.machine.ok(&["cvm", "stop", "gateway"]);
    let session = telegram("1");
    let mut all: Vec<usize> = (0..3).map(|_| world.hand_over(&session)).collect();
    world.chat.ready(false);
    world.machine.exec(&["cvm", "start", "gateway", "--no-wait"]);
    world.machine.service_in("gateway", &["up", "ready"]);
    all.push(world.hand_over(&session));
    assert_eq!(world.events(&session), Vec::<usize>::new());
    world.chat.ready(true);
    world.answers(&session, &all);
}

#[test]
fn a_gateway_that_dies_while_it_thinks_is_asked_again() {
    let mut world =
        World::with(|asked, n| if n == 1 { Said::Hang } else { echo(asked, n) }, |builder| builder);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until("it thinks", PATIENCE, || (world.asked(n) == 1).then_some(()));
    world.kill("gateway");
    world.answers(&session, &[n]);
    assert_eq!(world.asked(n), 2);
}

#[test]
fn a_gateway_that_fails_for_a_while_is_asked_again_until_it_does_not() {
    let script = |asked: &Asked, n: usize| match n {
        1 => Said::Status(500),
        2 => Said::Cut,
        3 => Said::Status(503),
        4 => Said::Status(429),
        _ => echo(asked, n),
    };
    let mut world = World::with(script, |builder| builder);
    let session = telegram("1");
    let all = [world.hand_over(&session), world.hand_over(&session)];
    world.answers(&session, &all);
}

#[test]
fn an_agent_that_thinks_long_is_not_asked_twice() {
    let long = Duration::from_secs(rounds(15, 400));
    let mut world = World::with(move |asked, n| Said::After(long, echo_text(asked, n)), |builder| builder);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until(&format!("the answer; {}", world.state(&session)), long + PATIENCE, || {
        (world.events(&session) == [n]).then_some(())
    });
    assert_eq!(world.asked(n), 1);
}

#[test]
fn a_stop_in_order_loses_nothing_and_repeats_nothing() {
    let script = |asked: &Asked, n: usize| Said::After(Duration::from_millis(400), echo_text(asked, n));
    let mut world = World::with(script, |builder| builder);
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for _ in 0..3 {
        for _ in 0..3 {
            for session in ["1", "2", "3"] {
                expected.entry(telegram(session)).or_default().push(world.hand_over(&telegram(session)));
            }
        }
        let World { mut machine, chat, mux, next } = world;
        assert_eq!(machine.stop(), 0, "{}", machine.output());
        world = World { machine: machine.again(|builder| builder), chat, mux, next };
        world.up();
    }
    world.answered(&expected);
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn what_the_gateway_is_about_to_answer_is_sent_before_a_stop_is_over() {
    let script = |asked: &Asked, n: usize| Said::After(Duration::from_secs(2), echo_text(asked, n));
    let mut world = World::with(script, |builder| builder);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until("it is asked", PATIENCE, || (world.asked(n) == 1).then_some(()));
    world.machine.ok(&["cvm", "stop", "mux"]);
    assert_eq!(world.events(&session), [n], "{}", world.logs());
    world.machine.ok(&["cvm", "start", "mux"]);
    world.answers(&session, &[n]);
    assert_eq!(world.asked(n), 1);
}
