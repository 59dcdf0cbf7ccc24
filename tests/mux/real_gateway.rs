//! The real gateway, where it matters what it makes of a message.

use crate::fixtures::{PNG, World, event_word, events_in, pictures, telegram};
use cvm_harness::chat::{Asked, MODEL_PORT, two_agents};
use cvm_harness::machine::{DEVICE_ID, MASTER_KEY, PATIENCE};
use cvm_harness::{Builder, Chat, Mux, Network, Said, before, until};
use serde_json::{Value, json};

/// What a model would say that shows what it was told.
fn model(asked: &Asked, _: usize) -> Said {
    let words: Vec<String> = events_in(&asked.everything()).into_iter().map(event_word).collect();
    Said::Text(format!("I know {} and {} pictures", words.join(" "), pictures(asked).len()))
}

#[test]
fn the_real_gateway_answers_with_each_of_its_agents_remembers_its_sessions_and_survives_its_own_death() {
    let network = Network::new();
    let mux = Mux::start(&network, DEVICE_ID);
    let chat = Chat::start(&network, MODEL_PORT, model);
    let machine = Builder::product()
        .real_gateway()
        .environment("MASTER_KEY", MASTER_KEY)
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
        .environment("OPENCLAW_CONFIG_B64", &two_agents())
        .mux(&network, &mux)
        .start();
    let mut world = World { machine, chat, mux, next: 1 };
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    let (one, two) = (telegram("one"), telegram("two"));
    // Before there is a gateway that could answer.
    let first = world.say(&one);
    let last = |world: &World, session: &str, count: usize| {
        let found = before(2 * PATIENCE, || world.mux.texts(session).get(count - 1).cloned());
        found.unwrap_or_else(|| {
            let gateway = world.machine.read("/var/log/openclaw-cvm/gateway.log");
            panic!("no {count} answers; {}\n{gateway}", world.state(session))
        })
    };
    assert_eq!(events_in(&last(&world, &one, 1)), [first]);
    let other = world.say(&two);
    assert_eq!(events_in(&last(&world, &two, 1)), [other]);
    let (second, mut event) = world.message(&one);
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "content": PNG}]);
    world.mux.enqueue(&event);
    let said = last(&world, &one, 2);
    // With what it said itself: the conversation is told whole.
    let known = events_in(&said);
    assert!(known.contains(&first) && known.contains(&second) && !known.contains(&other), "{said}");
    assert!(said.ends_with("and 1 pictures"), "{said}");
    // It dies while the model thinks.
    let before = world.chat.asked().len();
    world.chat.script(move |asked, n| if n == before + 1 { Said::Hang } else { model(asked, n) });
    let third = world.say(&two);
    until("the model thinks", PATIENCE, || (world.chat.asked().len() > before).then_some(()));
    world.kill("gateway");
    let said = last(&world, &two, 2);
    let known = events_in(&said);
    assert!(known.contains(&other) && known.contains(&third) && !known.contains(&first), "{said}");
    let fourth = world.say(&two);
    assert!(events_in(&last(&world, &two, 3)).contains(&fourth));
    assert_eq!((world.mux.texts(&one).len(), world.mux.texts(&two).len()), (2, 3));
    // The session names its agent; one that names none is of `main`.
    for (session, model) in [("agent:bob:telegram:direct:one", "m2"), ("telegram:three", "m"), (&two, "m")] {
        let before = world.mux.texts(session).len();
        let n = world.say(session);
        assert!(events_in(&last(&world, session, before + 1)).contains(&n));
        let asked = world.chat.asked().into_iter().filter(|a| events_in(&a.everything()).contains(&n));
        let models: Vec<Value> = asked.map(|a| a.body["model"].clone()).collect();
        assert!(!models.is_empty() && models.iter().all(|m| m == model), "{session}: {models:?}");
    }
    // The schemas that the package says it knows are those of the databases that it makes: a boot relies on it.
    let package: Value =
        serde_json::from_str(&world.machine.read("/opt/openclaw/node_modules/openclaw/package.json"))
            .expect("the package says what it is");
    for (name, file) in [
        ("state", "state/openclaw.sqlite"),
        ("agent", "agents/main/agent/openclaw-agent.sqlite"),
        ("agent", "agents/bob/agent/openclaw-agent.sqlite"),
    ] {
        let db = rusqlite::Connection::open_with_flags(
            world.machine.data().join("openclaw").join(file),
            rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY,
        );
        let number = db.and_then(|db| db.query_row("PRAGMA user_version", [], |row| row.get::<_, i64>(0)));
        assert_eq!(number.ok(), package["openclaw"]["schemaVersions"][name].as_i64(), "{file}");
    }
    assert_eq!(world.mux.conflicts(), Vec::<String>::new());
}
