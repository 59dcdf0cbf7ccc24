//! `cvm pair`: an operator connects a chat.

use crate::fixtures::{Spy, World};
use cvm_harness::machine::{MASTER_KEY, RELAY};
use cvm_harness::mux::{ADMIN_TOKEN, unix_now};
use cvm_harness::{Builder, Network};
use serde_json::{Value, json};

#[test]
fn an_operator_gets_a_pairing_token_as_text_as_json_and_as_a_picture() {
    let world = World::new();
    let pair = |words: &[&str], token: &str| {
        let mut command = world.machine.command(words);
        command.env("MUX_ADMIN_TOKEN", token).env("TERM", "xterm");
        let output = command.output().expect("nsenter runs");
        let all = [&output.stdout[..], &output.stderr].concat();
        (output.status.code(), String::from_utf8_lossy(&all).into_owned())
    };
    let (code, said) = pair(&["cvm", "pair", "telegram"], ADMIN_TOKEN);
    assert_eq!(code, Some(0), "{said}");
    let link = "https://t.me/a_bot?start=mpt_token-of-a-pairing";
    for part in ["mpt_token-of-a-pairing", "/start mpt_token-of-a-pairing", link] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    assert!(!said.contains('█'), "a picture is for people:\n{said}");
    let (code, said) = pair(&["cvm", "pair", "discord", "--ttl", "60", "--json"], ADMIN_TOKEN);
    assert_eq!(code, Some(0), "{said}");
    let answer: Value = serde_json::from_str(&said).expect("JSON and nothing else");
    assert_eq!((&answer["token"], &answer["channel"]), (&json!("mpt_token-of-a-pairing"), &json!("discord")));
    let left = answer["expiresAtMs"].as_i64().expect("a time") / 1000 - unix_now();
    assert!((50..=60).contains(&left), "{left} s");

    let wide = "stty cols 100 rows 40; exec cvm pair telegram";
    let (code, said) = pair(&["script", "-qec", wide, "/dev/null"], ADMIN_TOKEN);
    assert_eq!(code, Some(0), "{said}");
    let rows: Vec<&str> = said.lines().filter(|line| line.contains(['█', '▀', '▄'])).collect();
    // The link needs 33 modules a side, and two rows of them are a line.
    assert!((14..30).contains(&rows.len()), "{} rows\n{said}", rows.len());
    assert!(said.contains(link));
    let narrow = "stty cols 20 rows 40; exec cvm pair telegram";
    let (_, said) = pair(&["script", "-qec", narrow, "/dev/null"], ADMIN_TOKEN);
    assert!(said.contains("mpt_token-of-a-pairing") && !said.contains('█'), "{said}");

    let (code, said) = pair(&["cvm", "pair", "telegram"], "wrong-canary-1");
    assert!(code != Some(0) && said.contains("401"), "{code:?} {said}");
    assert!(!said.contains("wrong-canary-1"));
    let (code, _) = pair(&["cvm", "pair", "telegram"], "");
    assert_ne!(code, Some(0));
    let (code, said) = pair(&["cvm", "pair", "telegram", "--server", "http://127.0.0.1:9"], ADMIN_TOKEN);
    assert!(code != Some(0) && !said.contains(ADMIN_TOKEN), "{code:?} {said}");
}

#[test]
fn another_device_is_not_said_to_be_reached_where_this_one_is() {
    let network = Network::new();
    let spy = Spy::start(&network, 9401);
    let machine = Builder::product().fake_gateway(RELAY).network(&network).start();
    let pair = |more: &[&str]| {
        let words = [&["cvm", "pair", "telegram", "--server", "http://127.0.0.1:9401"], more].concat();
        let mut command = machine.command(&words);
        command.env("MUX_ADMIN_TOKEN", ADMIN_TOKEN).env("MASTER_KEY", MASTER_KEY);
        command.env("MUX_INBOUND_URL", "https://here.example.org/v1/mux/inbound");
        let output = command.output().expect("nsenter runs");
        assert_ne!(output.status.code(), Some(0), "the spy answers 404");
        spy.seen()
    };
    let other = "0".repeat(64);
    let seen = pair(&["--device", &other]);
    assert!(seen.contains(&other) && !seen.contains("here.example.org"), "{seen}");
    let seen = pair(&[]);
    assert!(seen.contains("here.example.org"), "{seen}");
}
