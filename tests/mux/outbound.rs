//! What the mux-server is told: answers, in order, and once.

use crate::fixtures::{World, echo_text, telegram};
use cvm_harness::machine::PATIENCE;
use cvm_harness::mux::{Door, Ill};
use cvm_harness::{Said, until};
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

#[test]
fn the_status_says_soon_that_an_answer_waits_for_the_server() {
    let mut world =
        World::with(|asked, n| Said::After(Duration::from_secs(3), echo_text(asked, n)), |builder| builder);
    world.mux.ill(Door::Send, Ill::Says(503), 1_000_000);
    let session = telegram("1");
    let n = world.hand_over(&session);
    until("it waits for the server", PATIENCE, || {
        let count = |label| world.machine.fact("mux", label).map(|value| value["count"].clone());
        (count("waiting for the agent")? == 0 && count("answers to send")? == 1).then_some(())
    });
    world.mux.heal();
    world.answers(&session, &[n]);
}

#[test]
fn an_answer_whose_fate_is_unknown_is_sent_again_under_the_same_key_and_arrives_once() {
    let mut world = World::new();
    let mut all = Vec::new();
    let session = telegram("1");
    for ill in [Ill::Lost, Ill::Says(500), Ill::Says(503), Ill::Says(429), Ill::Lost, Ill::Hangs] {
        world.mux.ill(Door::Send, ill, 1);
        let n = world.hand_over(&session);
        all.push(n);
        until(&format!("it is answered after {ill:?}; {}", world.state(&session)), PATIENCE, || {
            (world.mux.visits(Door::Send).last().is_some_and(|v| v.status == Some(200))
                && world.events(&session).last() == Some(&n))
            .then_some(())
        });
        assert_eq!(world.asked(n), 1, "the agent is not asked again after {ill:?}");
    }
    let visits = world.mux.visits(Door::Send);
    let mut keys: BTreeMap<String, usize> = BTreeMap::new();
    for visit in &visits {
        *keys.entry(visit.key.clone().unwrap_or_default()).or_default() += 1;
    }
    assert_eq!(keys.len(), 6, "{keys:?}");
    assert!(keys.values().all(|n| *n == 2), "{keys:?}");
    world.answers(&session, &all);
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn answers_wait_for_a_server_that_is_away_and_keep_their_order() {
    let mut world = World::new();
    let session = telegram("1");
    let mut all = vec![world.hand_over(&session)];
    until("it is answered", PATIENCE, || (world.events(&session) == all).then_some(()));
    world.mux.stop();
    all.extend((0..5).map(|_| world.hand_over(&session)));
    until("the agent has answered", PATIENCE, || (world.asked(all[1]) == 1).then_some(()));
    let pid = world.kill("mux");
    world.back("mux", pid);
    world.mux.resume();
    world.answers(&session, &all);
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}

#[test]
fn a_refused_token_is_renewed_and_the_answer_sent_once_more() {
    let mut world = World::new();
    let session = telegram("1");
    let mut all = vec![world.hand_over(&session)];
    until("it is answered", PATIENCE, || (world.events(&session) == all).then_some(()));
    let registrations = world.mux.visits(Door::Register).len();
    world.mux.revoke();
    let n = world.hand_over(&session);
    all.push(n);
    until(&format!("it is answered; {}", world.state(&session)), PATIENCE, || {
        (world.events(&session) == all).then_some(())
    });
    assert_eq!(world.mux.visits(Door::Register).len(), registrations + 1);
    let visits = world.mux.visits(Door::Send);
    let statuses: Vec<Option<u16>> = visits.iter().map(|v| v.status).collect();
    assert_eq!(statuses, [Some(200), Some(401), Some(200)]);
    assert_eq!(visits[1].key, visits[2].key);
    // A server that refuses every token is not asked as fast as it can refuse.
    world.mux.ill(Door::Send, Ill::Says(401), 1_000_000);
    let (sends, registered) = (world.mux.visits(Door::Send).len(), world.mux.visits(Door::Register).len());
    all.push(world.hand_over(&session));
    let began = Instant::now();
    until("it is tried", PATIENCE, || (world.mux.visits(Door::Send).len() > sends + 3).then_some(()));
    let took = began.elapsed();
    assert!(took > Duration::from_millis(900), "four attempts in {took:?}");
    assert!(world.mux.visits(Door::Register).len() - registered <= 4);
    world.mux.heal();
    world.answers(&session, &all);
}

#[test]
fn an_event_without_a_route_ends_and_holds_up_nobody() {
    let mut world = World::with(
        |asked, n| Said::After(Duration::from_millis(500), echo_text(asked, n)),
        |builder| builder,
    );
    let (gone, session) = (telegram("gone"), telegram("1"));
    let lost = world.hand_over(&gone);
    until("it is asked", PATIENCE, || (world.asked(lost) == 1).then_some(()));
    world.mux.unbind("telegram", &gone);
    until("it is refused", PATIENCE, || {
        world.mux.visits(Door::Send).iter().any(|v| v.status == Some(403)).then_some(())
    });
    let n = world.hand_over(&session);
    world.answers(&session, &[n]);
    // With a route again, the next message is answered, and the old answer does not come.
    let n = world.hand_over(&gone);
    world.answers(&gone, &[n]);
    let refused = world.mux.visits(Door::Send).into_iter().filter(|v| v.status == Some(403)).count();
    assert_eq!(refused, 1);
}
