//! rclone's crypt format: names and contents, as rclone 1.60 and later write them.
//!
//! Only the control objects below `.cvm/` go through here; the user's files are rclone's own
//! business. Both must agree, so that stock rclone lists and reads everything in the bucket.
//!
//! ```text
//! keys       scrypt(password, salt, N=16384 r=8 p=1): 32 bytes contents | 32 bytes names | 16 bytes tweak
//! a name     each segment: PKCS#7 to 16 bytes, AES-256-EME under the tweak, base32hex without padding, lower case
//! contents   "RCLONE\0\0" | nonce (24) | blocks of at most 64 KiB, each a NaCl secretbox under nonce + block number
//! ```
//!
//! Refuses: to do I/O, and to accept a block that does not authenticate.

use aes::Aes256;
use aes::cipher::{Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use crypto_secretbox::XSalsa20Poly1305;
use crypto_secretbox::aead::{Aead, KeyInit as _};
pub(crate) use cvm_secrets::obscured::{obscure, reveal};
use zeroize::{Zeroize, Zeroizing};

const MAGIC: &[u8; 8] = b"RCLONE\0\0";
const NONCE_LEN: usize = 24;
const HEADER_LEN: usize = MAGIC.len() + NONCE_LEN;
const BLOCK_DATA: usize = 64 * 1024;
const BLOCK_OVERHEAD: usize = 16;
const BLOCK: usize = 16;
/// EME takes at most 128 blocks, so a longer segment has no encrypted name.
const SEGMENT_MAX: usize = 128 * BLOCK - 1;
/// base32hex of RFC 4648 in lower case.
const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";

/// Both directions for one password and salt.
pub(crate) struct Crypt {
    names: Aes256,
    tweak: [u8; BLOCK],
    contents: XSalsa20Poly1305,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Undecryptable {
    /// Shorter than a header, or without its magic.
    NotEncrypted,
    /// A block does not authenticate: another key, or changed bytes.
    Wrong,
}

impl Crypt {
    pub(crate) fn new(password: &[u8], salt: &[u8]) -> Self {
        let mut key = Zeroizing::new([0u8; 80]);
        // N = 2^14, r = 8, p = 1: within the limits of the parameters, and of the output.
        if let Ok(params) = scrypt::Params::new(14, 8, 1) {
            let _ = scrypt::scrypt(password, salt, &params, &mut key[..]);
        }
        let (contents, rest) = key.split_at(32);
        let (names, tweak) = rest.split_at(32);
        let array = |bytes: &[u8]| Zeroizing::new(<[u8; 32]>::try_from(bytes).unwrap_or([0; 32]));
        Self {
            names: Aes256::new(&(*array(names)).into()),
            tweak: <[u8; BLOCK]>::try_from(tweak).unwrap_or([0; BLOCK]),
            contents: XSalsa20Poly1305::new(&(*array(contents)).into()),
        }
    }

    /// The encrypted form of a path; `None` when a segment is too long to have one.
    pub(crate) fn encrypt_path(&self, path: &str) -> Option<String> {
        let segments: Option<Vec<String>> = path.split('/').map(|s| self.encrypt_segment(s)).collect();
        Some(segments?.join("/"))
    }

    fn encrypt_segment(&self, segment: &str) -> Option<String> {
        if segment.is_empty() {
            return Some(String::new());
        }
        if segment.len() > SEGMENT_MAX {
            return None;
        }
        let padding = BLOCK - segment.len() % BLOCK;
        let mut data = segment.as_bytes().to_vec();
        data.resize(segment.len() + padding, u8::try_from(padding).unwrap_or(16));
        self.eme(&mut data, true);
        Some(base32(&data))
    }

    /// One decrypted segment, if it is one of this key's.
    pub(crate) fn decrypt_segment(&self, segment: &str) -> Option<String> {
        let mut data = unbase32(segment)?;
        if data.is_empty() || data.len() % BLOCK != 0 || data.len() > 128 * BLOCK {
            return None;
        }
        self.eme(&mut data, false);
        let padding = usize::from(*data.last()?);
        let end = data.len().checked_sub(padding)?;
        let padded =
            (1..=BLOCK).contains(&padding) && data.get(end..)?.iter().all(|b| usize::from(*b) == padding);
        data.truncate(end);
        if !padded || data.contains(&0) || data.contains(&b'/') {
            return None;
        }
        String::from_utf8(data).ok()
    }

    /// AES-EME (Halevi and Rogaway) over a whole number of blocks, in place.
    fn eme(&self, data: &mut [u8], encrypt: bool) {
        let blocks = data.len() / BLOCK;
        let crypt = |block: [u8; BLOCK]| {
            let mut block = Block::<Aes256>::from(block);
            if encrypt {
                self.names.encrypt_block(&mut block);
            } else {
                self.names.decrypt_block(&mut block);
            }
            <[u8; BLOCK]>::from(block)
        };
        let mut zero = Block::<Aes256>::from([0u8; BLOCK]);
        self.names.encrypt_block(&mut zero);
        let mut l = <[u8; BLOCK]>::from(zero);
        let masks: Vec<[u8; BLOCK]> = (0..blocks)
            .map(|_| {
                l = doubled(l);
                l
            })
            .collect();
        let mut work: Vec<[u8; BLOCK]> = data
            .chunks_exact(BLOCK)
            .zip(&masks)
            .map(|(chunk, mask)| crypt(xor(<[u8; BLOCK]>::try_from(chunk).unwrap_or_default(), *mask)))
            .collect();
        let sum = work.iter().fold([0u8; BLOCK], |sum, block| xor(sum, *block));
        let mp = xor(sum, self.tweak);
        let mc = crypt(mp);
        let mut m = xor(mp, mc);
        for block in work.iter_mut().skip(1) {
            m = doubled(m);
            *block = xor(*block, m);
        }
        let rest = work.iter().skip(1).fold([0u8; BLOCK], |sum, block| xor(sum, *block));
        if let Some(first) = work.first_mut() {
            *first = xor(xor(mc, self.tweak), rest);
        }
        for ((chunk, block), mask) in data.chunks_exact_mut(BLOCK).zip(work).zip(&masks) {
            chunk.copy_from_slice(&xor(crypt(block), *mask));
        }
    }

    /// An object for these bytes.
    pub(crate) fn seal(&self, plain: &[u8]) -> Result<Vec<u8>, getrandom::Error> {
        let mut nonce = [0u8; NONCE_LEN];
        getrandom::fill(&mut nonce)?;
        let mut sealed =
            Vec::with_capacity(plain.len() + HEADER_LEN + (plain.len() / BLOCK_DATA + 1) * BLOCK_OVERHEAD);
        sealed.extend_from_slice(MAGIC);
        sealed.extend_from_slice(&nonce);
        for block in plain.chunks(BLOCK_DATA) {
            // Fails for lengths no block has.
            sealed.extend(self.contents.encrypt(&nonce.into(), block).unwrap_or_default());
            increment(&mut nonce);
        }
        Ok(sealed)
    }

    /// The bytes of an object.
    pub(crate) fn open(&self, object: &[u8]) -> Result<Vec<u8>, Undecryptable> {
        let (header, body) = object.split_at_checked(HEADER_LEN).ok_or(Undecryptable::NotEncrypted)?;
        let (magic, nonce) = header.split_at(MAGIC.len());
        let mut nonce = <[u8; NONCE_LEN]>::try_from(nonce).map_err(|_| Undecryptable::NotEncrypted)?;
        if magic != MAGIC {
            return Err(Undecryptable::NotEncrypted);
        }
        let mut plain = Vec::with_capacity(body.len());
        for block in body.chunks(BLOCK_DATA + BLOCK_OVERHEAD) {
            plain.extend(self.contents.decrypt(&nonce.into(), block).map_err(|_| Undecryptable::Wrong)?);
            increment(&mut nonce);
        }
        Ok(plain)
    }
}

impl Drop for Crypt {
    fn drop(&mut self) {
        self.tweak.zeroize();
    }
}

/// The length of the encrypted form of a path, without making it: what S3 counts.
pub(crate) fn encrypted_len(path: &str) -> Option<usize> {
    let of = |segment: &str| {
        if segment.len() > SEGMENT_MAX {
            return None;
        }
        let padded = (segment.len() / BLOCK + 1) * BLOCK;
        Some((padded * 8).div_ceil(5))
    };
    let lengths: Option<Vec<usize>> = path.split('/').map(of).collect();
    let lengths = lengths?;
    Some(lengths.iter().sum::<usize>() + lengths.len().saturating_sub(1))
}

fn xor(a: [u8; BLOCK], b: [u8; BLOCK]) -> [u8; BLOCK] {
    let mut out = a;
    out.iter_mut().zip(b).for_each(|(x, y)| *x ^= y);
    out
}

/// Multiplication by two in GF(2^128), little-endian as EME has it.
fn doubled(block: [u8; BLOCK]) -> [u8; BLOCK] {
    let number = u128::from_le_bytes(block);
    let carried = if number >> 127 == 1 { 135 } else { 0 };
    ((number << 1) ^ carried).to_le_bytes()
}

fn increment(nonce: &mut [u8; NONCE_LEN]) {
    for byte in nonce {
        *byte = byte.wrapping_add(1);
        if *byte != 0 {
            break;
        }
    }
}

fn base32(bytes: &[u8]) -> String {
    let mut out = String::with_capacity((bytes.len() * 8).div_ceil(5));
    let (mut buffer, mut bits) = (0u32, 0u32);
    for byte in bytes {
        buffer = (buffer << 8) | u32::from(*byte);
        bits += 8;
        while bits >= 5 {
            bits -= 5;
            out.push(symbol(buffer >> bits));
        }
    }
    if bits > 0 {
        out.push(symbol(buffer << (5 - bits)));
    }
    out
}

fn symbol(value: u32) -> char {
    ALPHABET.get((value & 31) as usize).copied().map_or('0', char::from)
}

fn unbase32(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 5 / 8);
    let (mut buffer, mut bits) = (0u32, 0u32);
    for c in text.bytes() {
        let value = ALPHABET.iter().position(|a| *a == c)?;
        buffer = (buffer << 5) | u32::try_from(value).ok()?;
        bits += 5;
        if bits >= 8 {
            bits -= 8;
            out.push(u8::try_from((buffer >> bits) & 0xff).ok()?);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Made once: scrypt is slow on purpose.
    fn crypt() -> &'static Crypt {
        static CRYPT: std::sync::LazyLock<Crypt> =
            std::sync::LazyLock::new(|| Crypt::new(b"a password", b"and a salt"));
        &CRYPT
    }

    #[test]
    fn a_name_too_long_for_the_cipher_has_none() {
        assert_eq!(crypt().encrypt_path(&"x".repeat(2048)), None);
        assert_eq!(encrypted_len(&"x".repeat(2048)), None);
    }

    #[test]
    fn another_key_opens_nothing() {
        let sealed = crypt().seal(b"words").unwrap();
        assert_eq!(Crypt::new(b"other", b"key").open(&sealed), Err(Undecryptable::Wrong));
        assert_eq!(crypt().open(b"plain"), Err(Undecryptable::NotEncrypted));
        assert_eq!(crypt().open(&[0; 100]), Err(Undecryptable::NotEncrypted));
    }

    #[test]
    fn a_changed_or_cut_object_is_not_opened() {
        let mut sealed = crypt().seal(&vec![7u8; 100_000]).unwrap();
        assert_eq!(crypt().open(&sealed).map(|p| p.len()), Ok(100_000));
        assert_eq!(crypt().open(&sealed[..70_000]), Err(Undecryptable::Wrong));
        sealed[80_000] ^= 1;
        assert_eq!(crypt().open(&sealed), Err(Undecryptable::Wrong));
    }

    proptest! {
        #[test]
        fn names_come_back(path in "[^/\0]{1,300}(/[^/\0]{1,40}){0,3}") {
            let crypt = crypt();
            if let Some(encrypted) = crypt.encrypt_path(&path) {
                prop_assert_eq!(Some(encrypted.len()), encrypted_len(&path));
                let segments: Option<Vec<String>> = encrypted.split('/').map(|s| crypt.decrypt_segment(s)).collect();
                prop_assert_eq!(segments.unwrap().join("/"), path);
            }
        }

        #[test]
        fn no_name_makes_the_reader_panic(name in "\\PC{0,60}") {
            let _ = crypt().decrypt_segment(&name);
        }

        #[test]
        fn contents_come_back(plain in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(crypt().open(&crypt().seal(&plain).unwrap()).unwrap(), plain);
        }
    }
}
