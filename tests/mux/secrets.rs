//! Where keys, tokens, and what people write to each other must not be.

use crate::fixtures::{World, echo, event_word, png, telegram};
use cvm_harness::evidence::{contains, files};
use cvm_harness::machine::{GATEWAY_TOKEN, MASTER_KEY, PATIENCE};
use cvm_harness::mux::{ADMIN_TOKEN, Door, Ill, REGISTER_KEY};
use cvm_harness::{Said, until};
use serde_json::json;

#[test]
fn no_key_and_no_token_is_in_a_log_a_command_line_or_an_environment() {
    let mut world = World::with(
        |asked, n| if n % 5 == 1 { Said::Status(500) } else { echo(asked, n) },
        |b| {
            b.environment("LOG_LEVEL", "trace").environment("LOG_SERVICES", "1").file(
                "/run/admin-token",
                ADMIN_TOKEN,
                0o600,
            )
        },
    );
    let session = telegram("1");
    let mut all = vec![world.hand_over(&session)];
    // What goes wrong is what is talked about.
    world.mux.ill(Door::Send, Ill::Says(500), 1);
    all.push(world.hand_over(&session));
    world.mux.revoke();
    all.push(world.hand_over(&session));
    world.mux.stop();
    all.push(world.hand_over(&session));
    world.mux.resume();
    let url = world.mux.file("telegram", "x", "image/png", &png());
    let (n, mut event) = world.message(&session);
    event["attachments"] =
        json!([{"type": "image", "mimeType": "image/png", "fileName": "a.png", "url": url}]);
    world.deliver(&event);
    all.push(n);
    let delivery_token = world.mux.token(|_, _| {});
    let _ = world.mux.post(b"{", Some(&delivery_token));
    let bad = world.mux.token(|_, c| c["aud"] = json!("x"));
    let _ = world.mux.post(b"{}", Some(&bad));
    world.answers(&session, &all);
    // Somebody who pairs while others look at what runs.
    let mut pairing =
        world.machine.command(&["cvm", "pair", "telegram", "--server", "http://127.0.0.1:9300"]);
    let asked = world.chat.asked().len();
    world.chat.script(|_, _| Said::Hang);
    let mut pairing = pairing.env("MUX_ADMIN_TOKEN_FILE", "/run/admin-token").spawn().expect("nsenter runs");
    until("it asks", PATIENCE, || (world.chat.asked().len() > asked).then_some(()));
    let mut secrets = world.mux.tokens();
    assert!(secrets.len() >= 2);
    secrets.extend([REGISTER_KEY, ADMIN_TOKEN, MASTER_KEY, &delivery_token, &bad].map(str::to_owned));
    let mut looked_at = 0;
    for process in world.machine.processes() {
        for file in ["environ", "cmdline"] {
            let path = world.machine.path(&format!("/proc/{}/{file}", process.pid));
            let Ok(bytes) = std::fs::read(path) else { continue };
            looked_at += 1;
            for secret in &secrets {
                assert!(!contains(&bytes, secret), "{secret} is in {file} of {}", process.arguments);
            }
            // The gateway has its own.
            let gateways = process.arguments.contains("relay") || process.arguments.contains("gateway");
            assert!(
                gateways || !contains(&bytes, GATEWAY_TOKEN),
                "the gateway's token is in {file} of {}",
                process.arguments
            );
        }
    }
    assert!(looked_at > 10, "{looked_at} files");
    world.chat.stop();
    let _ = pairing.wait();
    let status = world.machine.ok(&["cvm", "status", "--json"]) + &world.machine.ok(&["cvm", "status"]);
    secrets.push(GATEWAY_TOKEN.into());
    // What people wrote to each other is nobody's business either.
    secrets.extend(all.iter().map(|n| event_word(*n)));
    assert_eq!(world.machine.stop(), 0, "{}", world.logs());
    let mut logs = vec![
        ("the output".to_owned(), world.machine.output().into_bytes()),
        ("the status".into(), status.into_bytes()),
    ];
    let scratch = world.machine.data();
    logs.extend(files(&scratch).into_iter().filter(|(name, _)| name.contains("/log")));
    for (name, bytes) in &logs {
        for secret in &secrets {
            assert!(!contains(bytes, secret), "{secret} is in {name}");
        }
    }
    // On the volume may be what people wrote, but nothing that opens a door.
    for (name, bytes) in files(&scratch) {
        for secret in [REGISTER_KEY, ADMIN_TOKEN, MASTER_KEY, GATEWAY_TOKEN] {
            assert!(!contains(&bytes, secret), "{secret} is in {name}");
        }
    }
}
