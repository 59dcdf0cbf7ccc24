use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use proptest::prelude::*;
use serde_json::Value;

use super::*;

/// RFC 8410: the fixed bytes before an Ed25519 public key in its SPKI form,
const SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// and before a seed in its PKCS#8 form.
const PKCS8_HEAD: [u8; 16] =
    [0x30, 0x2e, 0x02, 0x01, 0x00, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x04, 0x22, 0x04, 0x20];

const OWN: &str = "xb60JGSYzqa9njB6VObVhc1aY1DUfuC1";

fn seed() -> DeviceSeed {
    DeviceSeed::from_bytes(&[7; 32])
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

fn token_of(text: &str) -> TokenState {
    inspect_config(text, OWN).token
}

#[test]
fn the_generated_configuration_is_the_documented_one() {
    let expected = json!({
        "gateway": {
            "mode": "local", "bind": "lan", "port": 18789,
            "auth": { "mode": "token", "token": "${OPENCLAW_GATEWAY_TOKEN}" },
            "http": { "endpoints": { "chatCompletions": { "enabled": true } } }
        },
        "update": { "checkOnStart": false }
    });
    assert_eq!(parsed(&generated_config(GatewaySettings { port: 18789, redpill: false })), expected);
}

#[test]
fn the_model_provider_gets_its_key_by_reference() {
    let config = parsed(&generated_config(GatewaySettings { port: 1, redpill: true }));
    let provider = &config["models"]["providers"]["redpill"];
    assert_eq!(provider["baseUrl"], "https://api.redpill.ai/v1");
    assert_eq!(provider["apiKey"], "${REDPILL_API_KEY}");
    assert_eq!(provider["api"], "openai-completions");
}

#[test]
fn what_was_generated_is_found_right_again() {
    for redpill in [false, true] {
        let text = generated_config(GatewaySettings { port: 4711, redpill });
        let expected =
            ConfigFindings { token: TokenState::Reference, port: Some(4711), chat_completions: Some(true) };
        assert_eq!(inspect_config(&text, OWN), expected);
    }
}

#[test]
fn the_device_file_holds_the_key_pair_in_the_gateways_legacy_form() {
    let file = device_identity_json(&seed(), 1_700_000_000_123);
    let json = parsed(file.expose_str().unwrap());
    assert_eq!(json["version"], 1);
    assert_eq!(json["deviceId"], seed().device_id());
    assert_eq!(json["createdAtMs"], 1_700_000_000_123_u64);
    let der = |field: &str, name: &str| {
        let pem = json[field].as_str().unwrap();
        let body = pem.strip_prefix(&format!("-----BEGIN {name}-----\n")).unwrap();
        let body = body.strip_suffix(&format!("\n-----END {name}-----\n")).unwrap();
        assert!(body.lines().all(|line| line.len() <= 64));
        STANDARD.decode(body.replace('\n', "")).unwrap()
    };
    assert_eq!(der("publicKeyPem", "PUBLIC KEY"), [&SPKI_HEAD[..], &seed().public_key()].concat());
    assert_eq!(der("privateKeyPem", "PRIVATE KEY"), [&PKCS8_HEAD[..], &[7; 32]].concat());
}

#[test]
fn every_way_to_write_the_token_is_told_apart() {
    let auth = |auth: &str| token_of(&format!("{{gateway: {{auth: {auth}}}}}"));
    assert_eq!(auth("{mode: 'token', token: '${OPENCLAW_GATEWAY_TOKEN}'}"), TokenState::Reference);
    assert_eq!(
        auth("{token: {source: 'env', provider: 'default', id: 'OPENCLAW_GATEWAY_TOKEN'}}"),
        TokenState::Reference
    );
    assert_eq!(auth(&format!("{{token: '{OWN}'}}")), TokenState::SameValue);
    assert_eq!(auth("{mode: 'token', token: 'other'}"), TokenState::Differs);
    assert_eq!(auth("{token: '$${OPENCLAW_GATEWAY_TOKEN}'}"), TokenState::Differs);
    assert_eq!(auth("{token: '${OTHER_TOKEN}'}"), TokenState::Elsewhere);
    assert_eq!(auth("{token: {source: 'file', id: '/x'}}"), TokenState::Elsewhere);
    assert_eq!(auth("{$include: './auth.json5'}"), TokenState::Elsewhere);
    assert_eq!(auth("{mode: 'token'}"), TokenState::Absent);
    assert_eq!(auth("{token: ' '}"), TokenState::Absent);
    assert_eq!(token_of("{}"), TokenState::Absent);
    assert_eq!(auth("{mode: 'none'}"), TokenState::NotToken(String::from("none")));
    assert_eq!(auth("{mode: 'a\\nb', token: 'x'}"), TokenState::NotToken(String::from("a\\nb")));
    assert_eq!(auth("{password: 'x'}"), TokenState::NotToken(String::from("password")));
    assert_eq!(auth("{mode: 'token', password: 'x'}"), TokenState::Absent);
    assert_eq!(auth("{token: 5}"), TokenState::Unreadable);
}

#[test]
fn json5_is_read_as_the_gateway_reads_it() {
    let text = "\u{feff}// a comment
        {
            /* another: { */ 'gateway': {
                \"port\": 0x4965, // a trailing comma follows
                \"\\u0061uth\": { mode: \"to\\\nken\", token: '\\x24{OPENCLAW_GATEWAY_TOKEN}', },
                http: { endpoints: { chatCompletions: { enabled: false } } },
            },
            list: [1, +.5, -Infinity, NaN, null, { gateway: { port: 1 } }, ['\\'', \"'\"],],
            'gateway.port': 2, $key_1: '\u{2028}',
        } // the end";
    let expected =
        ConfigFindings { token: TokenState::Reference, port: Some(0x4965), chat_completions: Some(false) };
    assert_eq!(inspect_config(text, OWN), expected);
}

#[test]
fn the_last_of_two_members_counts_with_all_that_is_below_it() {
    assert_eq!(token_of("{gateway: {auth: {token: 'x'}}, gateway: {}}"), TokenState::Absent);
    assert_eq!(token_of("{gateway: {auth: {token: {id: 'x'}, token: 'x'}}}"), TokenState::Differs);
    assert_eq!(inspect_config("{gateway: {port: 1, port: 2}}", OWN).port, Some(2));
}

#[test]
fn only_a_port_is_taken_for_a_port() {
    let port = |port: &str| inspect_config(&format!("{{gateway: {{port: {port}}}}}"), OWN).port;
    for text in ["18789", "18789.0", "1.8789e4", "+18789"] {
        assert_eq!(port(text), Some(18789), "{text}");
    }
    for text in ["0", "-1", "65536", "1.5", "NaN", "Infinity", "null", "'18789'", "[18789]", "{}"] {
        assert_eq!(port(text), None, "{text}");
    }
}

#[test]
fn what_is_not_json5_is_unreadable_and_nothing_more() {
    for text in [
        "",
        "{",
        "}",
        "{]",
        "{gateway}",
        "{gateway:}",
        "{,}",
        "[1 2]",
        "{a:1 b:2}",
        "'x",
        "'a\nb'",
        "{} x",
        "/* x",
        "{a: tru}",
        "{a: 0x}",
        "{a: 1x}",
        "{gateway: {auth: {token: '\\u12'}}}",
        "{gateway: {auth: {token: '\\xzz'}}}",
        "{1a: 1}",
    ] {
        assert_eq!(token_of(text), TokenState::Unreadable, "{text:?}");
    }
}

#[test]
fn depth_and_size_are_bounded() {
    for (open, close) in [("[", "]"), ("{a:", "}"), ("[{a:", "}]")] {
        let nested = |depth: usize| format!("{}1{}", open.repeat(depth), close.repeat(depth));
        assert_eq!(token_of(&nested(30)), TokenState::Absent);
        assert_eq!(token_of(&nested(65)), TokenState::Unreadable);
        assert_eq!(token_of(&nested(100_000)), TokenState::Unreadable);
        // One that never ends, so that nothing but its depth can stop the reader.
        assert_eq!(token_of(&open.repeat(1_000_000)), TokenState::Unreadable);
    }
    assert_eq!(token_of(&" ".repeat(5 * 1024 * 1024)), TokenState::Unreadable);
}

proptest! {
    #[test]
    fn any_text_is_inspected_without_a_panic(text in any::<String>()) {
        let _ = inspect_config(&text, OWN);
    }

    #[test]
    fn anything_made_of_json5s_own_parts_is_inspected_without_a_panic(
        parts in prop::collection::vec(prop::sample::select(vec![
            "{", "}", "[", "]", ":", ",", "gateway", "auth", "token", "'", "\"", "\\", "\\u", "d800", "$", " ", "\n",
            "\r", "//", "/*", "*/", "0x", "1", ".", "-", "é", "\u{2028}", "null",
        ]), 0..60)
    ) {
        let _ = inspect_config(&parts.concat(), OWN);
    }

    #[test]
    fn every_json_text_is_json5(keys in prop::collection::vec(any::<String>(), 0..6), token in "[a-z\\\\\"'\n\u{1}é]{1,9}") {
        let mut object = serde_json::Map::new();
        for key in keys {
            object.insert(key.clone(), json!([key, 1.5e300, null, { "x": key }]));
        }
        object.insert(String::from("gateway"), json!({ "auth": { "token": token } }));
        let text = Value::Object(object).to_string();
        let expected = if token.trim().is_empty() { TokenState::Absent } else { TokenState::SameValue };
        prop_assert_eq!(inspect_config(&text, &token).token, expected);
    }
}
