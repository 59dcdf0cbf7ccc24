//! Who is let in: tokens, keys, sizes, and crowds of connections.

use crate::fixtures::{World, echo, event_word, telegram};
use cvm_harness::machine::{DEVICE_ID, PATIENCE};
use cvm_harness::mux::{Door, Ill, REGISTER_KEY, jwt, message, unix_now};
use cvm_harness::{Mux, rounds, until};
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::{Value, json};
use sha2::Sha256;
use std::io::Write as _;
use std::time::{Duration, Instant};

fn hs256(key: &[u8]) -> impl Fn(&[u8]) -> Vec<u8> {
    let mac = Hmac::<Sha256>::new_from_slice(key).expect("any key will do");
    move |input| mac.clone().chain_update(input).finalize().into_bytes().to_vec()
}

/// What is no token of a delivery, and why.
fn bad_tokens(mux: &Mux) -> Vec<(&'static str, Option<String>)> {
    let now = unix_now();
    let good = mux.token(|_, _| {});
    let parts: Vec<&str> = good.split('.').collect();
    let header: Value = {
        use base64::Engine as _;
        let bytes = base64::prelude::BASE64_URL_SAFE_NO_PAD.decode(parts[0]).expect("it is base64");
        serde_json::from_slice(&bytes).expect("it is JSON")
    };
    let claims = json!({
        "sub": DEVICE_ID, "aud": "openclaw-mux-inbound", "scope": "mux:inbound", "iat": now, "exp": now + 300,
    });
    let with_alg = |alg: &str| {
        let mut header = header.clone();
        header["alg"] = json!(alg);
        header
    };
    let other = {
        use ed25519_dalek::{Signer as _, SigningKey};
        let key = SigningKey::from_bytes(&[99; 32]);
        let (header, claims) = (header.clone(), claims.clone());
        jwt(&header, &claims, |input| key.sign(input).to_bytes().to_vec())
    };
    let public = mux.public_key();
    let mut bad = vec![
        ("none at all", None),
        ("empty", Some(String::new())),
        ("no token", Some("mpt_not-a-token".into())),
        ("one part", Some(parts[0].into())),
        ("two parts", Some(format!("{}.{}", parts[0], parts[1]))),
        ("no signature", Some(format!("{}.{}.", parts[0], parts[1]))),
        ("four parts", Some(format!("{good}.{}", parts[2]))),
        ("alg none", Some(jwt(&with_alg("none"), &claims, |_| Vec::new()))),
        ("alg None, signed with nothing", Some(jwt(&with_alg("None"), &claims, |_| vec![0; 64]))),
        ("HS256 with the public key", Some(jwt(&with_alg("HS256"), &claims, hs256(&public)))),
        ("HS256 with an empty key", Some(jwt(&with_alg("HS256"), &claims, hs256(b"")))),
        ("signed by somebody else", Some(other)),
        ("zeroes as signature", Some(jwt(&header, &claims, |_| vec![0; 64]))),
        ("the register key", Some(REGISTER_KEY.into())),
        ("a runtime token", mux.tokens().first().cloned()),
    ];
    let mut changed = |what, change: &dyn Fn(&mut Value, &mut Value)| {
        bad.push((what, Some(mux.token(|header, claims| change(header, claims)))));
    };
    changed("another alg", &|h, _| h["alg"] = json!("ES256"));
    changed("no alg", &|h, _| drop(h.as_object_mut().map(|h| h.remove("alg"))));
    changed("an extension that has to be understood", &|h, _| h["crit"] = json!(["b64"]));
    changed("another audience", &|_, c| c["aud"] = json!("openclaw-mux-outbound"));
    changed("a longer audience", &|_, c| c["aud"] = json!("openclaw-mux-inbound2"));
    changed("other audiences", &|_, c| c["aud"] = json!(["a", "b"]));
    changed("no audience", &|_, c| c["aud"] = Value::Null);
    changed("another subject", &|_, c| c["sub"] = json!(DEVICE_ID.replace('4', "5")));
    changed("a shorter subject", &|_, c| c["sub"] = json!(DEVICE_ID[..63]));
    changed("no subject", &|_, c| c["sub"] = Value::Null);
    changed("another scope", &|_, c| c["scope"] = json!("mux:outbound"));
    changed("a longer scope", &|_, c| c["scope"] = json!("mux:inbound:read xmux:inbound"));
    changed("no scope", &|_, c| c["scope"] = Value::Null);
    changed("long over", &|_, c| c["exp"] = json!(now - 3600));
    changed("over beyond the tolerance", &|_, c| c["exp"] = json!(now - 70));
    changed("no end", &|_, c| c["exp"] = Value::Null);
    changed("an end in words", &|_, c| c["exp"] = json!("tomorrow"));
    changed("not yet valid", &|_, c| c["nbf"] = json!(now + 3600));
    changed("not yet valid, beyond the tolerance", &|_, c| c["nbf"] = json!(now + 120));
    changed("an unknown key", &|h, _| h["kid"] = json!("0123456789abcdef"));
    bad
}

#[test]
fn a_delivery_without_a_good_token_is_401_and_nobody_hears_of_it() {
    let mut world = World::new();
    let session = telegram("1");
    let now = unix_now();
    let good = world.mux.token(|_, _| {});
    for (what, token) in &bad_tokens(&world.mux) {
        let (_, event) = {
            let n = world.next;
            world.next += 1;
            (n, message("telegram", &session, n, &event_word(n)))
        };
        let answer = world.mux.post(event.to_string().as_bytes(), token.as_deref());
        assert_eq!(answer.expect("an answer").status, 401, "{what}");
    }
    let event = world.message(&session).1.to_string();
    for (what, value) in [
        ("basic", format!("Basic {good}")),
        ("a bare token", good.clone()),
        ("a scheme alone", "Bearer".into()),
    ] {
        let answer = world.mux.client(Duration::from_secs(20)).raw(
            "/v1/mux/inbound",
            &[("Authorization", &value)],
            event.as_bytes(),
        );
        assert_eq!(answer.expect("an answer").status, 401, "{what}");
    }
    // At the edges of what is allowed.
    let mut all = Vec::new();
    let edges: [&dyn Fn(&mut Value); 5] = [
        &|c| c["exp"] = json!(now - 40),
        &|c| c["nbf"] = json!(now + 40),
        &|c| c["aud"] = json!(["a", "openclaw-mux-inbound"]),
        &|c| c["scope"] = json!("a mux:inbound b"),
        &|c| drop(c.as_object_mut().map(|c| c.remove("nbf"))),
    ];
    for (at, edge) in edges.iter().enumerate() {
        let (n, event) = world.message(&session);
        world.mux.bind("telegram", &session);
        let token = world.mux.token(|_, claims| edge(claims));
        let answer = world.mux.post(event.to_string().as_bytes(), Some(&token)).expect("an answer");
        assert!((200..300).contains(&answer.status), "edge {at}: {}", answer.status);
        all.push(n);
    }
    world.answers(&session, &all);
    let fetched = world.mux.visits(Door::Keys).len();
    assert!(fetched <= 3, "the keys were fetched {fetched} times");
}

#[test]
fn a_rotated_key_is_learned_and_strangers_cannot_make_the_client_ask_for_keys() {
    let mut world = World::new();
    let session = telegram("1");
    let first = world.hand_over(&session);
    let before = world.mux.visits(Door::Keys).len();
    for n in 0..200 {
        let token = world.mux.token(|header, _| header["kid"] = json!(format!("{n:016x}")));
        let answer = world.mux.post(b"{}", Some(&token)).expect("an answer");
        assert_eq!(answer.status, 401);
    }
    let asked = world.mux.visits(Door::Keys).len() - before;
    assert!(asked <= 1, "200 strangers made the client ask {asked} times");
    world.mux.rotate();
    let second = world.say(&session);
    until(&format!("the new key is known; {}", world.logs()), PATIENCE, || {
        (world.mux.waiting() == 0).then_some(())
    });
    // The first time it asks for the keys, not for the keys again.
    let visits = world.mux.visits(Door::Keys);
    for pair in visits[1..].windows(2) {
        let apart = pair[1].at - pair[0].at;
        assert!(apart > Duration::from_secs(50), "asked again after {apart:?}");
    }
    world.answers(&session, &[first, second]);
}

#[test]
fn a_client_that_starts_while_there_are_no_keys_takes_events_as_soon_as_there_are() {
    let mut world =
        World::unregistered(echo, |mux| mux.ill(Door::Keys, Ill::Says(503), 2), |builder| builder);
    until("the client has registered", PATIENCE, || world.mux.registered().then_some(()));
    let session = telegram("1");
    let n = world.say(&session);
    world.answers(&session, &[n]);
}

#[test]
fn ten_mebibytes_are_taken_and_more_is_not() {
    let mut world = World::new();
    let session = telegram("1");
    let sized = |event: &mut Value, size: usize| {
        event["channelData"]["padding"] = json!("");
        let missing = size - event.to_string().len();
        event["channelData"]["padding"] = json!("x".repeat(missing));
        assert_eq!(event.to_string().len(), size);
    };
    let limit = 10 * 1024 * 1024;
    let (n, mut event) = world.message(&session);
    sized(&mut event, limit);
    world.deliver(&event);
    let (_, mut event) = world.message(&session);
    sized(&mut event, limit + 1);
    let token = world.mux.token(|_, _| {});
    // An answer, or a connection that is closed before all of it was sent.
    if let Ok(answer) = world.mux.post(event.to_string().as_bytes(), Some(&token)) {
        assert_eq!(answer.status, 413);
    }
    // Who has no token does not get to fill memory either.
    let before = memory_kib(&world, "VmHWM:");
    for _ in 0..20 {
        let _ = world.mux.post(&vec![b'x'; 9 * 1024 * 1024], Some("nonsense"));
    }
    let grown = memory_kib(&world, "VmHWM:") - before;
    assert!(grown < 20 * 1024, "grown by {grown} KiB");
    world.answers(&session, &[n]);
}

fn memory_kib(world: &World, key: &str) -> i64 {
    let status = world.machine.read(&format!("/proc/{}/status", world.pid("mux")));
    let line = status.lines().find_map(|l| l.strip_prefix(key)).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn idle_and_slow_connections_do_not_keep_a_delivery_out() {
    // Each connection is a descriptor here too.
    let (soft, hard) =
        nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).expect("a limit");
    let _ = nix::sys::resource::setrlimit(
        nix::sys::resource::Resource::RLIMIT_NOFILE,
        soft.max(8192).min(hard),
        hard,
    );
    let mut world = World::new();
    let session = telegram("1");
    let first = world.hand_over(&session);
    let courier = world.mux.client(Duration::from_secs(5));
    let token = world.mux.token(|_, _| {});
    let mut open = Vec::new();
    for n in 0..rounds(1500, 4000) {
        let Ok(mut stream) = courier.connect() else { break };
        let head = format!(
            "POST /v1/mux/inbound HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nAuthorization: Bearer {token}\r\n\r\n{{"
        );
        let said: &[u8] = match n % 4 {
            0 => b"",
            1 => b"POST /v1/mux/inbound HT",
            2 => b"POST /v1/mux/inbound HTTP/1.1\r\nHost: x\r\nX-A: b\r\n",
            _ => head.as_bytes(),
        };
        let _ = stream.write_all(said);
        open.push(stream);
    }
    assert!(open.len() > 500, "{} connections", open.len());
    // As the server does it: again until it is taken.
    let began = Instant::now();
    let mut all = vec![first];
    for _ in 0..5 {
        all.push(world.say(&session));
    }
    until(&format!("the good ones are taken; {}", world.logs()), Duration::from_secs(40), || {
        // The slow ones go on, a byte at a time.
        for stream in open.iter_mut().step_by(50) {
            let _ = stream.write_all(b"x");
        }
        (world.mux.waiting() == 0).then_some(())
    });
    eprintln!("five deliveries among {} connections: {:?}", open.len(), began.elapsed());
    world.answers(&session, &all);
    assert!(memory_kib(&world, "VmRSS:") < 100 * 1024, "{} KiB", memory_kib(&world, "VmRSS:"));
}
