//! The real gateway goes on on another machine.

use crate::fixtures::TURNS;
use crate::fixtures::machines::no_incidents;
use cvm_harness::chat::{MODEL_PORT, local_model};
use cvm_harness::machine::{DEVICE_ID, GATEWAY_TOKEN};
use cvm_harness::{Builder, Chat, Cloud, Machine, Said, flush, until};
use std::fs;
use std::time::{Duration, Instant};

fn say(machine: &Machine, words: &str) -> String {
    let body =
        format!(r#"{{"model":"openclaw/default","messages":[{{"role":"user","content":"{words}"}}]}}"#);
    let bearer = format!("Authorization: Bearer {GATEWAY_TOKEN}");
    machine.ok(&[
        "curl",
        "-sS",
        "-m",
        "120",
        "-H",
        &bearer,
        "-H",
        "Content-Type: application/json",
        "-H",
        "x-openclaw-session-key: agent:main:crash",
        "-d",
        &body,
        "http://127.0.0.1:18789/v1/chat/completions",
    ])
}

/// The device in the gateway's own database, as the bucket has it.
fn device(cloud: &Cloud) -> String {
    let bytes = cloud.judge().ok(&["cat", "crypt:openclaw/state/openclaw.sqlite"]);
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    fs::write(file.path(), bytes).expect("it has room");
    let db = rusqlite::Connection::open(file.path()).expect("it opens");
    let sql = "SELECT device_id FROM device_identities WHERE identity_key = 'primary'";
    db.query_row(sql, [], |row| row.get(0)).expect("the device is there")
}

#[test]
fn a_conversation_goes_on_after_its_machine_was_lost() {
    let _turn = TURNS.take();
    let cloud = Cloud::new();
    let model = Chat::start(&cloud.network, MODEL_PORT, |_, _| Said::Text("understood".to_owned()));
    let config = local_model();
    let start = || {
        let machine = Builder::product()
            .real_gateway()
            .s3(&cloud.network, &cloud.proxy.endpoint(), &cloud.garage)
            .environment("OPENCLAW_CONFIG_B64", &config)
            .start();
        until("the gateway is ready", Duration::from_secs(240), || {
            (machine.service("gateway")["state"] == "ready").then_some(())
        });
        machine
    };
    let mut machine = start();
    let said = say(&machine, "the secret colour is heliotrope");
    assert!(said.contains("understood"), "{said}\n{}", machine.read("/var/log/openclaw-cvm/gateway.log"));
    flush(&machine);
    assert_eq!(device(&cloud), DEVICE_ID);
    machine.destroy();
    let before = model.asked().len();
    let lost = Instant::now();
    let machine = start();
    eprintln!("from the loss to a gateway that is ready: {:?}", lost.elapsed());
    let said = say(&machine, "which colour was it");
    assert!(said.contains("understood"), "{said}");
    let asked: Vec<String> = model.asked().iter().map(|asked| asked.body.to_string()).collect();
    assert!(
        asked[before..].iter().any(|body| body.contains("which colour") && body.contains("heliotrope")),
        "the model is not told what was said before: {:#?}",
        &asked[before..]
    );
    flush(&machine);
    assert_eq!(device(&cloud), DEVICE_ID);
    no_incidents(&machine);
}
