//! Tokens: signed by the server, checked by both sides without I/O and without a clock.
//!
//! A token is a JWT signed with Ed25519. Its key is found by `kid`, which is the first 16 hex digits of
//! the SHA-256 of the key's SPKI DER; a key under another name is not taken.
//!
//! A JWT library is for many algorithms and leaves it to its caller to allow only one; these two kinds
//! of tokens have one algorithm and five claims. What no library checks is most of this file: the rule
//! for `kid`, the longest life, and that an error never quotes the token. The file is fuzzed against a
//! second reading of the same rules (`tests/fuzz/targets/token.rs`).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ed25519_dalek::{Signature, VerifyingKey};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;

pub const JWKS_PATH: &str = "/.well-known/jwks.json";

/// What a token of one kind must say.
#[derive(Debug, Clone, Copy)]
pub struct TokenKind {
    pub audience: &'static str,
    pub scope: &'static str,
    pub life_max_s: i64,
}

/// The server shows it with each delivery to a client.
pub const DELIVERY: TokenKind =
    TokenKind { audience: "openclaw-mux-inbound", scope: "mux:inbound", life_max_s: 300 };
/// A client shows it with each request to the server.
pub const RUNTIME: TokenKind =
    TokenKind { audience: "mux-server", scope: "mux:outbound", life_max_s: 24 * 3600 };

/// Clocks differ by this much at most.
const TOLERANCE_S: i64 = 60;
/// A token of the contract has some 500 bytes.
const TOKEN_BYTES_MAX: usize = 8 * 1024;
/// A server rotates among a few keys.
const KEYS_MAX: usize = 64;
/// What stands before the 32 bytes of an Ed25519 key in its SPKI DER form (RFC 8410).
const SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// The server's public keys, by `kid`.
#[derive(Default, Clone)]
pub struct KeySet(BTreeMap<String, VerifyingKey>);

/// Why a token is not taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// Perhaps the server has a new key.
    UnknownKey,
    /// The rule that the token breaks.
    Invalid(&'static str),
}

impl KeySet {
    /// Reads a JSON Web Key Set. Keys of other kinds are skipped.
    pub fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        #[derive(Deserialize)]
        struct Listed {
            keys: Vec<serde_json::Value>,
        }
        let listed: Listed = serde_json::from_slice(bytes).map_err(|_| "it is no JSON Web Key Set")?;
        let keys: BTreeMap<_, _> = listed.keys.iter().take(KEYS_MAX).filter_map(ed25519_key).collect();
        if keys.is_empty() { Err("it holds no Ed25519 key under its own kid") } else { Ok(Self(keys)) }
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

fn ed25519_key(key: &serde_json::Value) -> Option<(String, VerifyingKey)> {
    let field = |name: &str| key.get(name).and_then(serde_json::Value::as_str);
    if field("kty") != Some("OKP") || field("crv") != Some("Ed25519") {
        return None;
    }
    let bytes: [u8; 32] = URL_SAFE_NO_PAD.decode(field("x")?).ok()?.try_into().ok()?;
    let kid = kid_of(&bytes);
    let is_own_name = field("kid").is_none_or(|given| given == kid);
    VerifyingKey::from_bytes(&bytes).ok().filter(|_| is_own_name).map(|key| (kid, key))
}

fn kid_of(key: &[u8; 32]) -> String {
    let digest = Sha256::new().chain_update(SPKI_HEAD).chain_update(key).finalize();
    let first = digest.first_chunk().copied().unwrap_or_default();
    format!("{:016x}", u64::from_be_bytes(first))
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
    aud: OneOrMany,
    sub: String,
    scope: OneOrMany,
    exp: f64,
    #[serde(default)]
    nbf: Option<f64>,
    #[serde(default)]
    iat: Option<f64>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

impl OneOrMany {
    fn has(&self, name: &str) -> bool {
        match self {
            Self::One(one) => one == name,
            Self::Many(all) => all.iter().any(|one| one == name),
        }
    }

    /// A scope that is one text is a list with spaces.
    fn has_scope(&self, name: &str) -> bool {
        match self {
            Self::One(list) => list.split(' ').any(|one| one == name),
            Self::Many(_) => self.has(name),
        }
    }
}

/// Whether `token` is one of this kind for `subject` at `now_s`, seconds since 1970.
pub fn verify(
    token: &str,
    kind: &TokenKind,
    keys: &KeySet,
    subject: &str,
    now_s: i64,
) -> Result<(), Refusal> {
    let claims = signed_claims(token, keys)?;
    if !claims.aud.has(kind.audience) {
        return Err(Refusal::Invalid("the token is for another audience"));
    }
    if claims.sub != subject {
        return Err(Refusal::Invalid("the token is for another device"));
    }
    if !claims.scope.has_scope(kind.scope) {
        return Err(Refusal::Invalid("the token lacks the scope that it needs"));
    }
    check_time(&claims, kind, now_s)
}

/// The claims of a token, once its signature has been checked.
fn signed_claims(token: &str, keys: &KeySet) -> Result<Claims, Refusal> {
    let invalid = Refusal::Invalid;
    if token.len() > TOKEN_BYTES_MAX {
        return Err(invalid("the token is too long"));
    }
    let mut parts = token.split('.');
    let (Some(header), Some(claims), Some(signature), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(invalid("the token has not three parts"));
    };
    let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|_| invalid("the token is not base64url"));
    let head: Header = serde_json::from_slice(&decode(header)?)
        .map_err(|_| invalid("the token's header has no alg and kid"))?;
    if head.alg != "EdDSA" {
        return Err(invalid("the token's algorithm is not EdDSA"));
    }
    if head.crit.is_some() {
        return Err(invalid("the token asks for extensions"));
    }
    let key = keys.0.get(&head.kid).ok_or(Refusal::UnknownKey)?;
    let signature = Signature::from_slice(&decode(signature)?)
        .map_err(|_| invalid("the token's signature has not 64 bytes"))?;
    let signed = token.get(..header.len() + 1 + claims.len()).unwrap_or_default();
    key.verify_strict(signed.as_bytes(), &signature)
        .map_err(|_| invalid("the token's signature is wrong"))?;
    serde_json::from_slice(&decode(claims)?).map_err(|_| invalid("the token lacks aud, sub, scope or exp"))
}

fn check_time(claims: &Claims, kind: &TokenKind, now_s: i64) -> Result<(), Refusal> {
    // Seconds since 1970 are exact in a double.
    #[allow(clippy::cast_precision_loss)]
    let (now, tolerance, life) = (now_s as f64, TOLERANCE_S as f64, kind.life_max_s as f64);
    let begins = claims.iat.unwrap_or(claims.exp - life).max(claims.nbf.unwrap_or(f64::MIN));
    if !claims.exp.is_finite() || now >= claims.exp + tolerance {
        return Err(Refusal::Invalid("the token has expired"));
    }
    if begins.is_nan() || begins > now + tolerance {
        return Err(Refusal::Invalid("the token is not valid yet"));
    }
    if claims.exp - claims.iat.unwrap_or(claims.exp) > life {
        return Err(Refusal::Invalid("the token lives longer than its kind may"));
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

    fn keys() -> KeySet {
        let x = URL_SAFE_NO_PAD.encode(signer().verifying_key().to_bytes());
        let set = json!({"keys": [{"kty":"RSA","n":"1"}, {"kty":"OKP","crv":"Ed25519","x":x,"kid":kid()}]});
        KeySet::parse(set.to_string().as_bytes()).unwrap()
    }

    fn token(header: &Value, claims: &Value) -> String {
        let encode = |v: &Value| URL_SAFE_NO_PAD.encode(v.to_string());
        let signed = format!("{}.{}", encode(header), encode(claims));
        let signature = signer().sign(signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature.to_bytes()))
    }

    fn good(kind: &TokenKind) -> (Value, Value) {
        let claims = json!({"aud": ["x", kind.audience], "sub": "me", "scope": format!("a {}", kind.scope),
            "iat": NOW, "exp": NOW + kind.life_max_s});
        (json!({"alg":"EdDSA","kid":kid(),"typ":"JWT"}), claims)
    }

    fn check(token: &str, kind: &TokenKind, now_s: i64) -> Result<(), Refusal> {
        verify(token, kind, &keys(), "me", now_s)
    }

    fn with(change: impl FnOnce(&mut Value, &mut Value)) -> Result<(), Refusal> {
        let (mut header, mut claims) = good(&DELIVERY);
        change(&mut header, &mut claims);
        check(&token(&header, &claims), &DELIVERY, NOW)
    }

    #[test]
    fn a_good_token_is_taken_and_each_broken_rule_refuses_it() {
        assert_eq!(with(|_, _| {}), Ok(()));
        assert_eq!(with(|_, c| c["aud"] = json!(DELIVERY.audience)), Ok(()));
        let no = |r: Result<(), Refusal>| matches!(r, Err(Refusal::Invalid(_)));
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
    fn a_token_of_one_kind_is_none_of_the_other() {
        for (kind, other) in [(RUNTIME, DELIVERY), (DELIVERY, RUNTIME)] {
            let (header, claims) = good(&kind);
            let token = token(&header, &claims);
            assert_eq!(check(&token, &kind, NOW), Ok(()));
            assert!(check(&token, &other, NOW).is_err());
        }
    }

    #[test]
    fn clocks_may_differ_by_a_minute_and_no_more() {
        let (header, claims) = good(&DELIVERY);
        let at = |now| check(&token(&header, &claims), &DELIVERY, now).is_ok();
        assert!(at(NOW - 60) && at(NOW + 359));
        assert!(!at(NOW - 61) && !at(NOW + 360));
    }

    #[test]
    fn a_changed_byte_anywhere_makes_it_worthless() {
        let (header, claims) = good(&DELIVERY);
        let good = token(&header, &claims);
        for at in 0..good.len() - 1 {
            let mut bytes = good.clone().into_bytes();
            bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
            let changed = String::from_utf8(bytes).unwrap();
            assert!(check(&changed, &DELIVERY, NOW).is_err(), "at {at}");
        }
    }

    #[test]
    fn a_key_under_another_name_is_not_taken() {
        let x = URL_SAFE_NO_PAD.encode(signer().verifying_key().to_bytes());
        let set = json!({"keys": [{"kty":"OKP","crv":"Ed25519","x":x,"kid":"mine"}]});
        assert!(KeySet::parse(set.to_string().as_bytes()).is_err());
        assert!(KeySet::parse(b"[]").is_err() && KeySet::parse(b"").is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_check_panic(text in "\\PC{0,200}", bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(check(&text, &DELIVERY, NOW).is_err());
            let _ = KeySet::parse(&bytes);
        }
    }
}
