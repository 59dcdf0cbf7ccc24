//! Tokens as the server signs them.

use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64_URL;
use ed25519_dalek::SigningKey;
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::time::{SystemTime, UNIX_EPOCH};

/// In front of an Ed25519 public key in its SPKI form.
const SPKI_HEAD: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// `kid` of a key: the first 16 hex digits of the SHA-256 of its SPKI form.
pub(super) fn kid(key: &SigningKey) -> String {
    let spki = [&SPKI_HEAD[..], key.verifying_key().as_bytes()].concat();
    Sha256::digest(spki)[..8].iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

/// A token signed by whatever `sign` does.
pub fn jwt(header: &Value, claims: &Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let part = |value: &Value| BASE64_URL.encode(value.to_string());
    let input = format!("{}.{}", part(header), part(claims));
    let signature = BASE64_URL.encode(sign(input.as_bytes()));
    format!("{input}.{signature}")
}

pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(0)
}
