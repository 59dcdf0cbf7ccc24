//! The form in which rclone's configuration holds passwords: base64url of an IV and an
//! AES-256-CTR ciphertext under a key that is public. It hides a password from a glance and from
//! nothing else.
//!
//! Here because the storage worker and `cvm derive` make the same form, the latter on a laptop without anything
//! of rclone's.
//!
//! Text that is not in this form is revealed as noise.

use aes::Aes256;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ctr::cipher::{KeyIvInit as _, StreamCipher as _};
use zeroize::Zeroizing;

const BLOCK: usize = 16;
/// rclone's own, the same everywhere.
const KEY: [u8; 32] = [
    0x9c, 0x93, 0x5b, 0x48, 0x73, 0x0a, 0x55, 0x4d, 0x6b, 0xfd, 0x7c, 0x63, 0xc8, 0x86, 0xa9, 0x2b, 0xd3,
    0x90, 0x19, 0x8e, 0xb8, 0x12, 0x8a, 0xfb, 0xf4, 0xde, 0x16, 0x2b, 0x8b, 0x95, 0xf6, 0x38,
];

/// The obscured form of a password: what rclone wants in a remote's definition.
///
/// # Errors
/// When the kernel gives no random numbers.
pub fn obscure(clear: &[u8]) -> Result<Zeroizing<String>, getrandom::Error> {
    let mut iv = [0u8; BLOCK];
    getrandom::fill(&mut iv)?;
    let mut bytes = Zeroizing::new(Vec::with_capacity(BLOCK + clear.len()));
    bytes.extend_from_slice(&iv);
    bytes.extend_from_slice(clear);
    apply(iv, bytes.get_mut(BLOCK..).unwrap_or_default());
    Ok(Zeroizing::new(URL_SAFE_NO_PAD.encode(&bytes[..])))
}

/// The clear form of what rclone obscured.
pub fn reveal(obscured: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let mut bytes = Zeroizing::new(URL_SAFE_NO_PAD.decode(obscured).ok()?);
    let iv = <[u8; BLOCK]>::try_from(bytes.get(..BLOCK)?).ok()?;
    let mut clear = Zeroizing::new(bytes.split_off(BLOCK));
    apply(iv, &mut clear);
    Some(clear)
}

fn apply(iv: [u8; BLOCK], bytes: &mut [u8]) {
    ctr::Ctr128BE::<Aes256>::new(&KEY.into(), &iv.into()).apply_keystream(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_obscured_is_revealed() {
        for clear in ["pässword", ""] {
            let obscured = obscure(clear.as_bytes()).unwrap();
            assert_eq!(&reveal(obscured.as_bytes()).unwrap()[..], clear.as_bytes());
        }
        assert!(reveal(b"short").is_none() && reveal(b"not base64!").is_none());
    }

    #[test]
    fn what_rclone_obscured_is_revealed() {
        let made_by_rclone = "xJalTtuuy8WaPQwRMguTZpcT44dYYqeTiwh_7ptPFmJbxVToVM15lZ9hMCk";
        assert_eq!(&reveal(made_by_rclone.as_bytes()).unwrap()[..], b"correct horse battery staple");
    }
}
