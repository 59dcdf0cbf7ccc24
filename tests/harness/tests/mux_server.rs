//! The mux-server is strict about the contract, and keeps what it took.

use crate::machine::PATIENCE;
use crate::mux;
use crate::mux::{Door, Ill};
use crate::serve::Client;
use crate::tools::python;
use crate::{Mux, Network};
use serde_json::{Value, json};

const TENANT: &str = "an-instance";

/// A mux-server, and what talks to it as a client would.
fn mux_server() -> (Mux, Client) {
    let network = Network::new();
    let mux = Mux::start(&network, TENANT);
    let client = Client::new(&network, (std::net::Ipv4Addr::LOCALHOST, mux::PORT).into(), PATIENCE);
    (mux, client)
}

fn register(client: &mut Client) -> String {
    let bearer = format!("Bearer {}", mux::REGISTER_KEY);
    let body =
        json!({"openclawId": TENANT, "inboundUrl": "http://x/v1/mux/inbound", "inboundTimeoutMs": 15000});
    let answer = client
        .post(
            "/v1/instances/register",
            &[("Authorization", &bearer), ("Connection", "close")],
            body.to_string().as_bytes(),
        )
        .expect("an answer");
    let answer: Value = serde_json::from_slice(&answer.body).expect("JSON");
    format!("Bearer {}", answer["runtimeToken"].as_str().expect("a token"))
}

fn send(
    client: &mut Client,
    bearer: &str,
    key: &str,
    change: impl FnOnce(&mut Value),
) -> std::io::Result<u16> {
    let mut body = json!({
        "requestId": key, "op": "send", "channel": "telegram", "sessionKey": "s", "accountId": "default",
        "to": "telegram:1", "text": "hi", "openclawId": TENANT,
        "raw": {"telegram": {"method": "sendMessage", "body": {"chat_id": "1", "text": "hi"}}},
    });
    change(&mut body);
    let mut headers = vec![("Authorization", bearer), ("X-OpenClaw-Id", TENANT), ("Idempotency-Key", key)];
    // A connection that is kept is tried again by itself.
    headers.push(("Connection", "close"));
    client.post("/v1/mux/outbound/send", &headers, body.to_string().as_bytes()).map(|answer| answer.status)
}

#[test]
fn the_mux_server_takes_a_request_once_and_keeps_what_it_took_through_a_power_cut() {
    if cvm_needs::lacks_root() {
        return;
    }
    let (mux, mut client) = mux_server();
    let bearer = register(&mut client);
    assert_eq!(send(&mut client, &bearer, "k1", |_| {}).expect("an answer"), 403, "there is no route");
    mux.bind("telegram", "s");
    mux.ill(Door::Send, Ill::Lost, 1);
    mux.ill(Door::Send, Ill::Says(500), 1);
    assert!(send(&mut client, &bearer, "k1", |_| {}).is_err(), "done, and nobody is told");
    assert_eq!(send(&mut client, &bearer, "k1", |_| {}).expect("an answer"), 500);
    mux.stop();
    assert!(send(&mut client, &bearer, "k1", |_| {}).is_err());
    mux.resume();
    assert_eq!(send(&mut client, &bearer, "k1", |_| {}).expect("an answer"), 200);
    assert_eq!(mux.texts("s"), ["hi"]);
    assert_eq!(send(&mut client, &bearer, "k1", |b| b["threadId"] = json!("2")).expect("an answer"), 409);
    assert_eq!(mux.conflicts().len(), 1);
    mux.revoke();
    assert_eq!(send(&mut client, &bearer, "k2", |_| {}).expect("an answer"), 401);
    assert_eq!(mux.violations(), Vec::<String>::new());
}

#[test]
fn the_mux_server_notes_what_the_contract_does_not_allow() {
    type Breach = (&'static str, fn(&mut Value));
    if cvm_needs::lacks_root() {
        return;
    }
    let breaches: [Breach; 8] = [
        ("another key", |b| b["requestId"] = json!("k2")),
        ("no operation", |b| b["op"] = Value::Null),
        ("another tenant", |b| b["openclawId"] = json!("me")),
        ("no recipient", |b| b["to"] = json!("")),
        ("an envelope of another channel", |b| b["channel"] = json!("discord")),
        ("another method", |b| b["raw"]["telegram"]["method"] = json!("sendPhoto")),
        ("no chat", |b| b["raw"]["telegram"]["body"]["chat_id"] = Value::Null),
        ("a text that is too long", |b| b["raw"]["telegram"]["body"]["text"] = json!("🦞".repeat(2049))),
    ];
    for (what, breach) in breaches {
        let (mux, mut client) = mux_server();
        let bearer = register(&mut client);
        mux.bind("telegram", "s");
        let _ = send(&mut client, &bearer, "k1", breach);
        assert!(!mux.violations().is_empty(), "{what}");
        let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(mux)));
        assert!(dropped.is_err(), "{what} fails the test");
    }
}

#[test]
fn the_mux_servers_tokens_are_what_others_understand_by_them() {
    const PROGRAM: &str = "
import base64, hashlib, json, sys
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
decode = lambda text: base64.urlsafe_b64decode(text + '=' * (-len(text) % 4))
head, claims, signature = sys.argv[1].split('.')
key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(sys.argv[2]))
key.verify(decode(signature), f'{head}.{claims}'.encode())
spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
print(json.loads(decode(head))['kid'] == hashlib.sha256(spki).hexdigest()[:16], json.loads(decode(claims))['scope'])
";
    if cvm_needs::lacks_root() {
        return;
    }
    let (mux, _) = mux_server();
    let hex = mux.public_key().iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
    assert_eq!(python(PROGRAM, &[&mux.token(|_, _| {}), &hex]), "True mux:inbound");
}
