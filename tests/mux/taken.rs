//! What a 2xx promises: each event is answered once and in order, whatever dies.
//!
//! `CVM_SOAK=1` makes more rounds of what is random; moments are chosen by a seed.

use crate::fixtures::{World, echo, echo_text, event_word, events_in, telegram};
use cvm_harness::chat::Asked;
use cvm_harness::machine::{DEVICE_ID, PATIENCE, RELAY, STUB_PORT};
use cvm_harness::mux::message;
use cvm_harness::{Chat, Cloud, Dice, Mux, Said, rounds, until};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

#[test]
fn an_event_that_comes_again_is_taken_again_and_answered_once() {
    let mut world = World::with(
        |asked, n| Said::After(Duration::from_millis(300), echo_text(asked, n)),
        |builder| builder,
    );
    let session = telegram("1");
    let (n, event) = world.message(&session);
    // Before, while and after it is answered, and several at the same time.
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| world.deliver(&event));
        }
    });
    until("it is answered", PATIENCE, || (world.events(&session) == [n]).then_some(()));
    world.deliver(&event);
    let pid = world.kill("mux");
    world.back("mux", pid);
    world.deliver(&event);
    let m = world.hand_over(&session);
    world.answers(&session, &[n, m]);
    assert_eq!(world.asked(n), 1);
}

#[test]
fn what_was_handed_over_is_answered_though_the_server_hangs_up_at_once() {
    let mut world = World::new();
    let session = |n: usize| telegram(&(n % 10).to_string());
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let events: Vec<(usize, Value)> = (0..50).map(|n| world.message(&session(n))).collect();
    for (_, event) in &events {
        world.mux.abandon(event).expect("it listens");
    }
    // The server does not know what became of them.
    for (at, (n, event)) in events.iter().enumerate() {
        world.deliver(event);
        expected.entry(session(at)).or_default().push(*n);
    }
    for (session, all) in &expected {
        until(&format!("all of {session} is answered; {}", world.state(session)), PATIENCE, || {
            (world.events(session).len() >= all.len()).then_some(())
        });
    }
    let last: Vec<(String, usize)> = expected.keys().map(|s| (s.clone(), world.hand_over(s))).collect();
    for (session, last) in last {
        until("the last one is answered", PATIENCE, || world.events(&session).contains(&last).then_some(()));
        // Connections that are beside each other have no order.
        let mut events = world.events(&session);
        events.sort_unstable();
        let mut all = expected[&session].clone();
        all.push(last);
        assert_eq!(events, all, "{session}");
    }
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn what_was_taken_is_answered_though_the_client_is_killed_at_once() {
    let mut world = World::new();
    let session = telegram("1");
    let mut all = Vec::new();
    let rounds = rounds(6, 60);
    for _ in 0..rounds {
        let pid = world.pid("mux");
        let outside = world.machine.outside(pid);
        let (n, event) = world.message(&session);
        let status = world.mux.deliver(&event);
        let _ = kill(outside, Signal::SIGKILL);
        assert!(matches!(status, Ok(200..300)), "{status:?}");
        all.push(n);
        world.back("mux", pid);
    }
    world.answers(&session, &all);
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn whatever_is_killed_each_event_is_answered_once_and_in_order() {
    let seed = 0x5eed_0001_u64;
    eprintln!("seed {seed:#x}");
    let mut dice = Dice(seed);
    // Every seventh answer takes several sends.
    let script = |asked: &Asked, n: usize| {
        let mut text = echo_text(asked, n);
        if events_in(&asked.last()).first().is_some_and(|e| e.is_multiple_of(7)) {
            text += &" and more of it".repeat(600);
        }
        Said::After(Duration::from_millis(u64::try_from(n * 7 % 60).unwrap_or(0)), text)
    };
    let mut world = World::with(script, |builder| builder);
    let sessions: Vec<String> = (0..4).map(|n| telegram(&n.to_string())).collect();
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let rounds = rounds(12, 120);
    for round in 0..rounds {
        for _ in 0..8 {
            let session = &sessions[usize::try_from(dice.up_to(4)).expect("small")];
            expected.entry(session.clone()).or_default().push(world.say(session));
        }
        world.mux.deaf(usize::try_from(dice.up_to(3)).expect("small"));
        dice.pause(Duration::from_millis(400));
        match round % 3 {
            0 => {
                let pid = world.kill("mux");
                world.back("mux", pid);
            }
            1 => drop(world.kill("gateway")),
            _ => {
                world.mux.stop();
                dice.pause(Duration::from_millis(200));
                world.mux.resume();
            }
        }
    }
    world.answered(&expected);
    for (session, events) in &expected {
        for n in events.iter().filter(|n| n.is_multiple_of(7)) {
            let texts = world.mux.texts(session);
            let first = texts.iter().position(|t| events_in(t) == [*n]).expect("it was answered");
            let rest = texts[first + 1..].iter().take_while(|t| events_in(t).is_empty());
            let whole: String =
                std::iter::once(&texts[first]).chain(rest).flat_map(|t| t.split_whitespace()).collect();
            assert!(whole.ends_with(&"andmoreofit".repeat(600)), "the answer to {n} is not whole");
            assert_eq!(whole.matches("andmoreofit").count(), 600, "the answer to {n} has a part twice");
        }
    }
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn what_was_taken_is_answered_once_though_the_machine_and_its_disk_are_lost() {
    let cloud = Cloud::new();
    let mux = Mux::start(&cloud.network, DEVICE_ID);
    let script = |asked: &Asked, n: usize| {
        Said::After(Duration::from_millis(u64::try_from(n * 53 % 400).unwrap_or(0)), echo_text(asked, n))
    };
    let chat = Chat::start(&cloud.network, STUB_PORT, script);
    let start = || cloud.machine().fake_gateway(RELAY).mux(&cloud.network, &mux).start();
    let mut machine = start();
    machine.service_in("mux", &["ready"]);
    let mut dice = Dice(0x5eed_0002);
    let mut expected: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut n = 0;
    for round in 0..rounds(3, 20) {
        for _ in 0..5 {
            n += 1;
            let session = telegram(&dice.up_to(3).to_string());
            mux.enqueue(&message("telegram", &session, n, &event_word(n)));
            expected.entry(session).or_default().push(n);
        }
        let before = mux.waiting();
        until("some were taken", PATIENCE, || (mux.waiting() + 3 <= before).then_some(()));
        dice.pause(Duration::from_millis(2500));
        let began = Instant::now();
        machine.destroy();
        drop(machine);
        machine = start();
        machine.service_in("mux", &["ready"]);
        eprintln!("round {round}: {} waiting, a new machine after {:?}", mux.waiting(), began.elapsed());
    }
    let all: usize = expected.values().map(Vec::len).sum();
    let told = || format!("{}\n{}", machine.output(), machine.read("/var/log/openclaw-cvm/mux.log"));
    until(&format!("all is answered; {}", told()), 2 * PATIENCE, || {
        (mux.waiting() == 0 && mux.sent().len() >= all).then_some(())
    });
    // Nothing can come after what came after all.
    for (session, expected) in &mut expected {
        n += 1;
        mux.enqueue(&message("telegram", session, n, &event_word(n)));
        expected.push(n);
        let events = || mux.texts(session).iter().flat_map(|t| events_in(t)).collect::<Vec<_>>();
        until(&format!("{session} is answered to the end; {}", told()), PATIENCE, || {
            events().contains(&n).then_some(())
        });
        assert_eq!(&events(), expected, "{session}: {:#?}\n{:#?}", mux.texts(session), mux.deliveries());
    }
    eprintln!("{} conflicts", mux.conflicts().len());
    machine.destroy();
    drop(chat);
}

#[test]
fn what_the_bucket_does_not_have_is_not_acknowledged_and_answered_once_all_the_same() {
    let cloud = Cloud::new();
    let mux = Mux::start(&cloud.network, DEVICE_ID);
    let chat = Chat::start(&cloud.network, STUB_PORT, echo);
    let machine = cloud
        .machine()
        .fake_gateway(RELAY)
        .mux(&cloud.network, &mux)
        .environment("MUX_ACK_REPLICATION_WAIT", "2")
        .start();
    machine.service_in("mux", &["ready"]);
    until("the client has registered", PATIENCE, || mux.registered().then_some(()));
    let session = telegram("1");
    let unreplicated = || {
        let count = machine.fact("mux", "answered 503 because the bucket was slow");
        count.and_then(|value| value["count"].as_u64()).unwrap_or(0)
    };
    let told = || format!("{}\n{}", machine.output(), machine.read("/var/log/openclaw-cvm/mux.log"));
    for n in 1..=5 {
        // On a busy machine the bucket may take longer than the client waits.
        until(&format!("event {n} is taken; {}", told()), PATIENCE, || {
            let status = mux.deliver(&message("telegram", &session, n, &event_word(n)));
            matches!(status, Ok(200..300)).then_some(())
        });
    }
    let before = unreplicated();
    cloud.proxy.refuse(true);
    // The second time it is known already, and no safer.
    let event = message("telegram", &session, 6, &event_word(6));
    for _ in 0..2 {
        let began = Instant::now();
        let status = mux.deliver(&event);
        assert!(matches!(status, Ok(503)), "{status:?}");
        assert!(began.elapsed() > Duration::from_millis(1900), "after {:?}", began.elapsed());
    }
    until("it is counted", PATIENCE, || (unreplicated() == before + 2).then_some(()));
    cloud.proxy.heal();
    mux.enqueue(&event);
    mux.enqueue(&message("telegram", &session, 7, &event_word(7)));
    let events = || mux.texts(&session).iter().flat_map(|t| events_in(t)).collect::<Vec<_>>();
    until(&format!("all of it is answered; {}", told()), PATIENCE, || events().contains(&7).then_some(()));
    assert_eq!(events(), [1, 2, 3, 4, 5, 6, 7]);
    until("it is taken", PATIENCE, || (mux.waiting() == 0).then_some(()));
    drop(machine);
    drop(chat);
}
