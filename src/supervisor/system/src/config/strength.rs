//! Judges by its form whether a secret can be guessed, because randomness itself cannot be seen.
//!
//! No message tells the length of a secret.

use base64::Engine as _;
use base64::alphabet::{Alphabet, STANDARD, URL_SAFE};
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use cvm_secrets::secret::Secret;

const BYTES_MIN: usize = 32;
/// 32 random bytes have 30 different ones on average, and fewer than 16 practically never.
const DISTINCT_MIN: usize = 16;

/// The rule of [`is_strong`], as the end of a sentence that begins with the name of a variable.
pub const STRONG: &str = "must be base64 of at least 32 random bytes, or at least 64 random hex digits";
/// How to make a secret that meets the rule.
pub const MAKE_STRONG: &str = "make one with: openssl rand -base64 32";

/// Whether these bytes, the text of a secret as it was given, look like 32 random bytes or more: base64
/// (of either alphabet, padded or not) or hex, and many different bytes in what they stand for.
pub fn is_strong(text: &[u8]) -> bool {
    from_hex(text).or_else(|| from_base64(text)).is_some_and(|bytes| {
        let mut seen = [false; 256];
        bytes.expose().iter().for_each(|byte| seen[usize::from(*byte)] = true);
        bytes.len() >= BYTES_MIN && seen.iter().filter(|seen| **seen).count() >= DISTINCT_MIN
    })
}

/// Decodes a text of hex digits that is long enough to be meant as hex. Shorter ones may be base64.
fn from_hex(text: &[u8]) -> Option<Secret> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    if text.len() < 2 * BYTES_MIN || !text.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    Some(Secret::filled(text.len() / 2, |room| {
        for (byte, pair) in room.iter_mut().zip(text.chunks_exact(2)) {
            *byte = pair.iter().fold(0, |byte, half| byte << 4 | digit(*half).unwrap_or_default());
        }
    }))
}

fn from_base64(text: &[u8]) -> Option<Secret> {
    let decode = |alphabet: &Alphabet| {
        let padding = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
        let engine = GeneralPurpose::new(alphabet, padding);
        let mut len = None;
        let room = Secret::filled(text.len().div_ceil(4) * 3, |room| {
            len = engine.decode_slice(text, room).ok();
        });
        len.and_then(|len| room.expose().get(..len)).map(Secret::copy_of)
    };
    decode(&STANDARD).or_else(|| decode(&URL_SAFE))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_random_generators_print_is_strong() {
        for strong in [
            // openssl rand -base64 32, openssl rand -hex 32, secrets.token_urlsafe(32)
            "kqkwGlAAGBFcUhH9pdY8mDWBZQBOgP2Kq4dkAQvqBjo=",
            "kqkwGlAAGBFcUhH9pdY8mDWBZQBOgP2Kq4dkAQvqBjo",
            "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
            "9F86D081884C7D659A2FEAA0C55AD015A3BF4F1B2B0B822CD15D6C15B0F00A08",
            "kqkwGlAAGBFcUhH9pdY8mDWBZQBOgP2K-4dkAQvqB_o",
        ] {
            assert!(is_strong(strong.as_bytes()), "{strong}");
        }
    }

    #[test]
    fn what_can_be_guessed_or_was_pasted_badly_is_not() {
        let repeated = "ab".repeat(32);
        for weak in [
            "",
            "correct horse battery staple",
            "correct horse battery staple correct horse battery staple",
            // 31 bytes, 62 hex digits
            "kqkwGlAAGBFcUhH9pdY8mDWBZQBOgP2Kq4dkAQvqBg==",
            "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a",
            &repeated,
            "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=",
            // eight bytes, four times
            "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=",
            " kqkwGlAAGBFcUhH9pdY8mDWBZQBOgP2Kq4dkAQvqBjo=",
        ] {
            assert!(!is_strong(weak.as_bytes()), "{weak}");
        }
        assert!(!is_strong(&[0xff; 64]));
    }
}
