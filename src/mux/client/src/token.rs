//! Who may hand us a message: the mux-server's signed tokens, checked without I/O and without a clock.
//!
//! A token is a JWT signed with Ed25519. Its key is found by `kid`, which is the first 16 hex digits of
//! the SHA-256 of the key's SPKI DER; a key under another name is not taken.
//!
//! Refuses every algorithm but one, and to say more of a token than which rule it breaks.
//! May import: nothing of this crate.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signature, VerifyingKey};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

const AUDIENCE: &str = "openclaw-mux-inbound";
const SCOPE: &str = "mux:inbound";
/// Clocks differ by this much at most.
const TOLERANCE_S: i64 = 60;
/// The contract's life of a token.
const LIFE_S: i64 = 300;
/// A token of ours has some 500 bytes.
pub(crate) const TOKEN_MAX: usize = 8 * 1024;
/// Of a key set; a server rotates among a few.
const KEYS_MAX: usize = 64;
/// What stands before the 32 bytes of an Ed25519 key in its SPKI DER form: RFC 8410.
const SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The server's public keys, by `kid`.
#[derive(Default, Clone)]
pub(crate) struct Keys(BTreeMap<String, VerifyingKey>);

/// Why a token is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// Perhaps the server has a new key.
    UnknownKey,
    Broken(&'static str),
}

#[derive(Deserialize)]
struct KeySet {
    keys: Vec<serde_json::Value>,
}

impl Keys {
    /// Reads a JWKS. Keys that are not for us are skipped.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let set: KeySet = serde_json::from_slice(bytes).map_err(|_| "it is no JSON Web Key Set")?;
        let mut keys = BTreeMap::new();
        for key in set.keys.iter().take(KEYS_MAX) {
            let word = |name: &str| key.get(name).and_then(serde_json::Value::as_str);
            if word("kty") != Some("OKP") || word("crv") != Some("Ed25519") {
                continue;
            }
            let bytes = word("x").and_then(|x| URL_SAFE_NO_PAD.decode(x).ok());
            let Some(bytes) = bytes.and_then(|b| <[u8; 32]>::try_from(b).ok()) else { continue };
            let Ok(verifying) = VerifyingKey::from_bytes(&bytes) else { continue };
            let kid = kid_of(&bytes);
            if word("kid").is_none_or(|given| given == kid) {
                keys.insert(kid, verifying);
            }
        }
        if keys.is_empty() { Err("it holds no Ed25519 key under its own kid") } else { Ok(Self(keys)) }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn kid_of(key: &[u8; 32]) -> String {
    let digest = Sha256::new().chain_update(SPKI).chain_update(key).finalize();
    crate::hex(digest.iter().take(8))
}

#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: String,
    #[serde(default)]
    crit: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Claims {
    aud: Words,
    sub: String,
    scope: Words,
    exp: f64,
    #[serde(default)]
    nbf: Option<f64>,
    #[serde(default)]
    iat: Option<f64>,
}

/// One word or several; a scope is one string of several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Words {
    One(String),
    Many(Vec<String>),
}

impl Words {
    fn holds(&self, word: &str) -> bool {
        match self {
            Self::One(text) => text == word,
            Self::Many(all) => all.iter().any(|w| w == word),
        }
    }

    fn holds_scope(&self, word: &str) -> bool {
        match self {
            Self::One(text) => text.split(' ').any(|w| w == word),
            Self::Many(all) => all.iter().any(|w| w == word),
        }
    }
}

/// Whether `token` lets its bearer hand messages to `subject` at `now_s`, seconds since 1970.
pub(crate) fn verify(token: &str, keys: &Keys, subject: &str, now_s: i64) -> Result<(), Refusal> {
    let broken = Refusal::Broken;
    if token.len() > TOKEN_MAX {
        return Err(broken("the token is too long"));
    }
    let mut parts = token.split('.');
    let (Some(header), Some(claims), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(broken("the token has not three parts"));
    };
    let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| broken("the token is not base64url"));
    let head: Header = serde_json::from_slice(&decode(header)?)
        .map_err(|_| broken("the token's header has no alg and kid"))?;
    if head.alg != "EdDSA" {
        return Err(broken("the token's algorithm is not EdDSA"));
    }
    if head.crit.is_some() {
        return Err(broken("the token asks for extensions"));
    }
    let key = keys.0.get(&head.kid).ok_or(Refusal::UnknownKey)?;
    let signature = Signature::from_slice(&decode(signature)?)
        .map_err(|_| broken("the token's signature has not 64 bytes"))?;
    let signed = token.get(..header.len() + 1 + claims.len()).unwrap_or_default();
    key.verify_strict(signed.as_bytes(), &signature).map_err(|_| broken("the token's signature is wrong"))?;
    // Signed by the server: from here on it is about whom and when.
    let claims: Claims = serde_json::from_slice(&decode(claims)?)
        .map_err(|_| broken("the token lacks aud, sub, scope or exp"))?;
    if !claims.aud.holds(AUDIENCE) {
        return Err(broken("the token is for another audience"));
    }
    if claims.sub != subject {
        return Err(broken("the token is for another device"));
    }
    if !claims.scope.holds_scope(SCOPE) {
        return Err(broken("the token's scope lacks mux:inbound"));
    }
    in_time(&claims, now_s)
}

fn in_time(claims: &Claims, now_s: i64) -> Result<(), Refusal> {
    // Seconds since 1970 are exact in a double.
    #[allow(clippy::cast_precision_loss)]
    let (now, tolerance, life) = (now_s as f64, TOLERANCE_S as f64, LIFE_S as f64);
    let begins = claims.iat.unwrap_or(claims.exp - life).max(claims.nbf.unwrap_or(f64::MIN));
    if !claims.exp.is_finite() || now >= claims.exp + tolerance {
        return Err(Refusal::Broken("the token has expired"));
    }
    if begins.is_nan() || begins > now + tolerance {
        return Err(Refusal::Broken("the token is not valid yet"));
    }
    if claims.exp - claims.iat.unwrap_or(claims.exp) > life {
        return Err(Refusal::Broken("the token lives longer than 5 minutes"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use ed25519_dalek::{Signer as _, SigningKey};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const NOW: i64 = 1_800_000_000;

    fn signer() -> SigningKey {
        SigningKey::from_bytes(&[7; 32])
    }

    fn kid() -> String {
        kid_of(&signer().verifying_key().to_bytes())
    }

    fn keys() -> Keys {
        let x = URL_SAFE_NO_PAD.encode(signer().verifying_key().to_bytes());
        let set = json!({"keys": [{"kty":"RSA","n":"1"}, {"kty":"OKP","crv":"Ed25519","x":x,"kid":kid()}]});
        Keys::parse(set.to_string().as_bytes()).unwrap()
    }

    fn token(header: &Value, claims: &Value) -> String {
        let encode = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", encode(header), encode(claims));
        let signature = signer().sign(signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
    }

    fn good() -> (Value, Value) {
        let claims = json!({"aud": ["x", AUDIENCE], "sub": "me", "scope": "a mux:inbound",
            "iat": NOW, "exp": NOW + 300});
        (json!({"alg":"EdDSA","kid":kid(),"typ":"JWT"}), claims)
    }

    fn with(change: impl FnOnce(&mut Value, &mut Value)) -> Result<(), Refusal> {
        let (mut header, mut claims) = good();
        change(&mut header, &mut claims);
        verify(&token(&header, &claims), &keys(), "me", NOW)
    }

    #[test]
    fn a_good_token_is_taken_and_each_broken_rule_refuses_it() {
        assert_eq!(with(|_, _| {}), Ok(()));
        assert_eq!(with(|_, c| c["aud"] = json!(AUDIENCE)), Ok(()));
        let no = |r: Result<(), Refusal>| matches!(r, Err(Refusal::Broken(_)));
        assert!(no(with(|_, c| c["aud"] = json!("other"))));
        assert!(no(with(|_, c| c["sub"] = json!("you"))));
        assert!(no(with(|_, c| c["scope"] = json!("mux:inbounds"))));
        assert!(no(with(|_, c| c["exp"] = json!(NOW + 301))));
        assert!(no(with(|_, c| drop(c.as_object_mut().unwrap().remove("exp")))));
        assert!(no(with(|_, c| c["nbf"] = json!(NOW + 61))));
        assert!(no(with(|h, _| h["alg"] = json!("none"))));
        assert!(no(with(|h, _| h["alg"] = json!("HS256"))));
        assert!(no(with(|h, _| h["crit"] = json!(["b64"]))));
        assert_eq!(with(|h, _| h["kid"] = json!("0000000000000000")), Err(Refusal::UnknownKey));
    }

    #[test]
    fn clocks_may_differ_by_a_minute_and_no_more() {
        let (header, claims) = good();
        let at = |now| verify(&token(&header, &claims), &keys(), "me", now).is_ok();
        assert!(at(NOW - 60) && at(NOW + 359));
        assert!(!at(NOW - 61) && !at(NOW + 360));
    }

    #[test]
    fn a_changed_byte_anywhere_makes_it_worthless() {
        let (header, claims) = good();
        let good = token(&header, &claims);
        for at in 0..good.len() - 1 {
            let mut bytes = good.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(verify(&changed, &keys(), "me", NOW).is_err(), "at {at}");
        }
    }

    #[test]
    fn a_key_under_another_name_is_not_taken() {
        let x = URL_SAFE_NO_PAD.encode(signer().verifying_key().to_bytes());
        let set = json!({"keys": [{"kty":"OKP","crv":"Ed25519","x":x,"kid":"mine"}]});
        assert!(Keys::parse(set.to_string().as_bytes()).is_err());
        assert!(Keys::parse(b"[]").is_err() && Keys::parse(b"").is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_check_panic(text in "\\PC{0,200}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(verify(&text, &keys(), "me", NOW).is_err());
            let _ = Keys::parse(&bytes);
        }
    }
}
