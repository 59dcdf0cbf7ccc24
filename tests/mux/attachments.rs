//! Pictures: along with the message, or to be fetched from the mux-server, who alone is shown a token.

use crate::fixtures::{PNG, Spy, World, echo, pictures, png, telegram};
use cvm_harness::chat::Asked;
use cvm_harness::machine::{DEVICE_ID, GATEWAY_TOKEN, MASTER_KEY, PATIENCE, RELAY, STUB_PORT};
use cvm_harness::mux::{Door, Ill, REGISTER_KEY};
use cvm_harness::{Builder, Chat, Mux, Network, Said, until};
use serde_json::{Value, json};

#[test]
fn pictures_reach_the_gateway_whether_they_came_along_or_have_to_be_fetched() {
    let mut world = World::new();
    let session = telegram("1");
    let url = world.mux.file("telegram", "abc", "image/png", &png());
    let mut all = Vec::new();
    for place in [json!({"content": PNG}), json!({"url": url})] {
        let (n, mut event) = world.message(&session);
        let mut attachment = json!({"type": "image", "mimeType": "image/png", "fileName": "dot.png"});
        for (name, value) in place.as_object().expect("an object") {
            attachment[name] = value.clone();
        }
        event["attachments"] = json!([attachment]);
        world.deliver(&event);
        all.push(n);
    }
    // A picture needs no words.
    let (_, mut event) = world.message(&session);
    event["body"] = json!("");
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "content": PNG}]);
    world.deliver(&event);
    world.answers(&session, &all);
    let asked = world.chat.asked();
    assert_eq!(asked.len(), 4, "{asked:#?}");
    for asked in &asked[..3] {
        assert_eq!(pictures(asked), [format!("data:image/png;base64,{PNG}")], "{:#}", asked.body);
    }
    let visits = world.mux.visits(Door::File);
    assert_eq!(visits.len(), 1);
    assert_eq!(visits[0].status, Some(200));
}

#[test]
fn pictures_that_nobody_can_fetch_hold_up_no_other_chat() {
    let mut world = World::new();
    world.mux.ill(Door::File, Ill::Hangs, 1_000_000);
    let url = world.mux.file("telegram", "abc", "image/png", &png());
    for chat in 0..20 {
        let (_, mut event) = world.message(&telegram(&format!("picture-{chat}")));
        event["attachments"] =
            json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "url": url}]);
        world.deliver(&event);
    }
    until("a picture is asked for", PATIENCE, || (!world.mux.visits(Door::File).is_empty()).then_some(()));
    let session = telegram("words");
    let n = world.hand_over(&session);
    world.answers(&session, &[n]);
}

#[test]
fn pictures_are_not_fetched_again_and_again_while_the_gateway_is_away() {
    let mut world = World::new();
    world.chat.ready(false);
    let url = world.mux.file("telegram", "abc", "image/png", &png());
    let (session, other) = (telegram("picture"), telegram("words"));
    let (n, mut event) = world.message(&session);
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "url": url}]);
    world.deliver(&event);
    until("it was asked", PATIENCE, || (world.chat.turned_away() == 1).then_some(()));
    let m = world.hand_over(&other);
    until("the other one was asked often", PATIENCE, || (world.chat.turned_away() >= 6).then_some(()));
    world.chat.ready(true);
    world.answers(&session, &[n]);
    world.answers(&other, &[m]);
    assert!(world.mux.visits(Door::File).len() <= 2, "{:#?}", world.mux.visits(Door::File));
}

#[test]
fn a_gateway_that_takes_no_pictures_gets_the_words_and_is_told_of_them() {
    let script =
        |asked: &Asked, n: usize| if pictures(asked).is_empty() { echo(asked, n) } else { Said::Status(413) };
    let mut world = World::with(script, |builder| builder);
    let session = telegram("1");
    let (n, mut event) = world.message(&session);
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "dot.png", "content": PNG}]);
    world.deliver(&event);
    world.answers(&session, &[n]);
    let asked = world.chat.asked();
    assert_eq!(asked.len(), 3, "{asked:#?}");
    assert!(asked[1].last().contains("dot.png"), "{:#}", asked[1].body);
}

#[test]
fn an_attachment_that_cannot_be_had_does_not_cost_its_message_the_answer() {
    let mut world = World::with(
        |asked, n| if pictures(asked).len() > 8 { Said::Status(400) } else { echo(asked, n) },
        |builder| builder,
    );
    let session = telegram("1");
    let missing = format!("{}/v1/mux/files/telegram?fileId=nobody-has-it", world.mux.url());
    let one = |place: Value| {
        let mut attachment = json!({"type": "image", "mimeType": "image/png", "fileName": "dot.png"});
        attachment.as_object_mut().expect("an object").extend(place.as_object().cloned().unwrap_or_default());
        attachment
    };
    let sets = [
        json!([one(json!({"url": missing}))]),
        json!([one(json!({"url": "http://127.0.0.1:9/refused"}))]),
        json!([one(json!({"content": "!! not base64 !!"}))]),
        json!([{"type": "document", "mimeType": "application/pdf", "fileName": "a.pdf", "content": PNG}]),
        json!([one(json!({}))]),
        // The gateway takes eight at most.
        Value::Array((0..12).map(|_| one(json!({"content": PNG}))).collect()),
    ];
    let mut all = Vec::new();
    for set in sets {
        let (n, mut event) = world.message(&session);
        event["attachments"] = set;
        world.deliver(&event);
        all.push(n);
    }
    world.answers(&session, &all);
}

#[test]
fn the_runtime_token_is_shown_to_the_mux_server_alone() {
    let network = Network::new();
    let mux = Mux::start(&network, DEVICE_ID);
    let elsewhere = Chat::start(&network, 9400, echo);
    let spy = Spy::start(&network, 9401);
    let chat = Chat::start(&network, STUB_PORT, echo);
    let machine = Builder::product()
        .fake_gateway(RELAY)
        .environment("MASTER_KEY", MASTER_KEY)
        .mux(&network, &mux)
        .start();
    let mut world = World { machine, chat, mux, next: 1 };
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    world.up();
    let session = telegram("1");
    let attachment =
        |url: &str| json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "url": url}]);
    let mut all = Vec::new();
    for url in
        ["http://127.0.0.1:9401/v1/mux/files/telegram?fileId=1", "http://127.0.0.1:9200@127.0.0.1:9401/x"]
    {
        let (n, mut event) = world.message(&session);
        event["attachments"] = attachment(url);
        world.deliver(&event);
        all.push(n);
    }
    let own = world.mux.file("telegram", "moved", "image/png", &png());
    world.mux.redirect_files("http://127.0.0.1:9401/redirected");
    let (n, mut event) = world.message(&session);
    event["attachments"] = attachment(&own);
    world.deliver(&event);
    all.push(n);
    world.answers(&session, &all);
    let seen = spy.seen();
    for token in world.mux.tokens() {
        assert!(!seen.contains(&token), "somebody else has seen the token:\n{seen}");
    }
    for secret in [REGISTER_KEY, GATEWAY_TOKEN] {
        assert!(!seen.contains(secret), "somebody else has seen {secret}");
    }
    drop(elsewhere);
}
