//! The client registers, and renews its token in time and not without need.

use crate::fixtures::{World, echo, telegram};
use cvm_harness::machine::PATIENCE;
use cvm_harness::mux::{Door, Ill, REGISTER_KEY};
use cvm_harness::{Mux, rounds, until};
use std::time::{Duration, Instant};

#[test]
fn a_token_is_renewed_before_it_ends_and_not_without_need() {
    // Of a life of a day, six hours are left in three seconds.
    let life = Duration::from_secs(6 * 3600 + 3);
    let mut world = World::unregistered(echo, |mux| mux.token_life(life), |builder| builder);
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    let first = world.mux.visits(Door::Register)[0].at;
    // Once it has a token for a day, there is no need for another.
    world.mux.token_life(Duration::from_hours(24));
    until(&format!("it registers again; {}", world.logs()), PATIENCE, || {
        (world.mux.visits(Door::Register).len() == 2).then_some(())
    });
    let second = world.mux.visits(Door::Register)[1].at;
    assert!(second - first >= Duration::from_millis(2500), "after {:?}", second - first);
    world.up();
    let session = telegram("1");
    let all: Vec<usize> = (0..10).map(|_| world.hand_over(&session)).collect();
    world.answers(&session, &all);
    assert_eq!(world.mux.visits(Door::Register).len(), 2);
    let tokens = world.mux.visits(Door::Send).into_iter().map(|v| v.authorization);
    assert_eq!(tokens.collect::<std::collections::BTreeSet<_>>().len(), 1);
}

#[test]
fn tokens_with_short_lives_do_not_make_the_client_register_all_the_time() {
    let life = Duration::from_secs(60);
    let mut world = World::unregistered(echo, |mux| mux.token_life(life), |builder| builder);
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    world.up();
    let began = Instant::now();
    let session = telegram("1");
    let mut all = Vec::new();
    // While something goes on.
    while began.elapsed() < Duration::from_secs(4) {
        all.push(world.hand_over(&session));
        until("it is answered", PATIENCE, || (world.events(&session).len() == all.len()).then_some(()));
    }
    let count = world.mux.visits(Door::Register).len();
    assert!(count <= 5, "{count} registrations in {:?}", began.elapsed());
    assert!(world.mux.visits(Door::Send).iter().all(|v| v.status == Some(200)));
}

/// Mostly they wait, so they do it beside each other.
fn beside_each_other<T: Copy + Send + Sync>(cases: &[T], case: impl Fn(T) + Sync) {
    std::thread::scope(|scope| {
        let all: Vec<_> = cases.iter().map(|c| scope.spawn(|| case(*c))).collect();
        for one in all {
            one.join().expect("the case holds");
        }
    });
}

#[test]
fn mistakes_of_the_configuration_are_in_the_status_and_the_client_keeps_trying() {
    beside_each_other(&[400, 401, 404, 409], |status| {
        let refuses = |mux: &Mux| mux.ill(Door::Register, Ill::Says(status), 1_000_000);
        let mut world = World::unregistered(echo, refuses, |builder| builder);
        let told = until(&format!("the status speaks of {status}; {}", world.logs()), PATIENCE, || {
            let error = world.machine.fact("mux", "not registered")?["text"].as_str()?.to_owned();
            error.contains(&status.to_string()).then_some(error)
        });
        eprintln!("{told}");
        let shown = String::from_utf8_lossy(&world.machine.exec(&["cvm", "status"]).stdout).into_owned();
        assert!(shown.split_whitespace().any(|word| word.contains(&status.to_string())), "{shown}");
        assert!(!(told + &shown).contains(REGISTER_KEY));
        assert!(world.mux.visits(Door::Register).len() <= 3, "slowly");
        world.mux.heal();
        // Slowly is every five minutes; an operator need not wait for that.
        if rounds(0, 1) == 0 {
            world.machine.ok(&["cvm", "restart", "mux"]);
        }
        let told = || format!("it has registered after {status}; {}", world.logs());
        until(&told(), Duration::from_secs(400), || world.mux.registered().then_some(()));
        world.up();
        let session = telegram("1");
        let n = world.hand_over(&session);
        world.answers(&session, &[n]);
    });
}

#[test]
fn a_server_that_is_not_well_is_asked_again_after_longer_and_longer_waits() {
    beside_each_other(&[Ill::Says(500), Ill::Says(503), Ill::Lost], |ill| {
        let world = World::unregistered(echo, |mux| mux.ill(Door::Register, ill, 4), |builder| builder);
        until(&format!("it has registered; {}", world.logs()), PATIENCE, || {
            (world.mux.visits(Door::Register).len() == 5).then_some(())
        });
        let visits = world.mux.visits(Door::Register);
        let waits: Vec<f64> = visits.windows(2).map(|pair| (pair[1].at - pair[0].at).as_secs_f64()).collect();
        // 1, 2, 4, 8 seconds, or some part of them by chance.
        assert!(waits[0] >= 0.4 && waits[3] >= 3.5 && waits[3] > waits[0] * 2.0, "{waits:?}");
        assert!(waits.iter().sum::<f64>() < 30.0, "{waits:?}");
    });
}
