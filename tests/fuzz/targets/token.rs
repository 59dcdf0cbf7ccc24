//! Whatever a token holds, the check ends without a panic. A token that is let in keeps every rule, as a
//! second reading of it here shows.
#![no_main]

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use cvm_mux_contract::token::{DELIVERY, KeySet, verify};
use ed25519_dalek::{Signer as _, SigningKey};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use std::sync::LazyLock;

const NOW: i64 = 1_800_000_000;
const CLAIMS: [&str; 6] = ["aud", "sub", "scope", "exp", "iat", "nbf"];

static SIGNER: LazyLock<SigningKey> = LazyLock::new(|| SigningKey::from_bytes(&[7; 32]));
static SET: LazyLock<(String, KeySet)> = LazyLock::new(|| {
    let x = URL_SAFE_NO_PAD.encode(SIGNER.verifying_key().to_bytes());
    let set = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x}]}).to_string();
    let keys = KeySet::parse(set.as_bytes()).unwrap_or_else(|why| panic!("{why}"));
    // The kid of this key by the contract's rule, written out.
    ("324be2dea8bc4446".to_owned(), keys)
});

/// A token over these two parts, signed by the server.
fn signed(header: &[u8], claims: &[u8]) -> String {
    let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
    let signature = SIGNER.sign(signed.as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
}

fn has(value: &Value, word: &str, several_in_one: bool) -> bool {
    match value {
        Value::String(text) if several_in_one => text.split(' ').any(|w| w == word),
        Value::String(text) => text == word,
        Value::Array(all) => all.iter().any(|w| w == word),
        _ => false,
    }
}

fn keeps_the_rules(header: &[u8], claims: &[u8]) -> bool {
    let read = |bytes| serde_json::from_slice::<Value>(bytes).unwrap_or_default();
    let (header, claims) = (read(header), read(claims));
    let second = |name: &str| claims[name].as_f64();
    let Some(end) = second("exp") else { return false };
    #[allow(clippy::cast_precision_loss)]
    let now = NOW as f64;
    header["alg"] == "EdDSA"
        && header["kid"] == SET.0.as_str()
        && header["crit"].is_null()
        && has(&claims["aud"], "openclaw-mux-inbound", false)
        && claims["sub"] == "me"
        && has(&claims["scope"], "mux:inbound", true)
        && now < end + 60.0
        && second("iat").is_none_or(|begin| begin <= now + 60.0 && end - begin <= 300.0)
        && second("nbf").is_none_or(|begin| begin <= now + 60.0)
}

fuzz_target!(|data: &[u8]| {
    let _ = KeySet::parse(data);
    // Nobody has signed this.
    assert!(verify(&String::from_utf8_lossy(data), &DELIVERY, &SET.1, "me", NOW).is_err());
    let Some((first, rest)) = data.split_first() else { return };
    let header = json!({"alg": "EdDSA", "kid": SET.0}).to_string();
    let mut claims = json!({"aud": "openclaw-mux-inbound", "sub": "me", "scope": "a mux:inbound",
        "iat": NOW, "nbf": NOW, "exp": NOW + 300});
    // What the server has signed: a broken header, broken claims, or good claims but for one.
    let (header, claims) = match first % 8 {
        0 => (rest.to_vec(), claims.to_string().into_bytes()),
        1 => (header.into_bytes(), rest.to_vec()),
        n => {
            let Ok(value) = serde_json::from_slice::<Value>(rest) else { return };
            claims[CLAIMS[usize::from(n) - 2]] = value;
            (header.into_bytes(), claims.to_string().into_bytes())
        }
    };
    if verify(&signed(&header, &claims), &DELIVERY, &SET.1, "me", NOW).is_ok() {
        assert!(keeps_the_rules(&header, &claims), "{}", String::from_utf8_lossy(&claims));
    }
});
