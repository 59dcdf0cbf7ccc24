//! Every key of an instance, derived from `MASTER_KEY`. No other file knows the labels of the derivation.
//!
//! `HKDF-SHA256[salt = "", info = LABEL](MASTER_KEY, 32)` (RFC 5869) gives every key that an
//! instance needs, so that a new machine becomes the old one from `MASTER_KEY` alone. One type
//! for each key: a salt cannot be handed in where a password belongs.
//!
//! No key is printed, every copy made here is wiped, and a label never changes: with another label or another shape of
//! a key, users lose their data.
//!
//! The SSH key file is written by hand: the crate `ssh-key` fits our other crates as a release candidate only (0.7), and
//! brings ciphers and readers that writing one key without a passphrase does not need.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use ed25519_dalek::SigningKey;
use hkdf::Hkdf;
use sha2::{Digest, Sha256};
use zeroize::Zeroize;

use crate::owner::{Epoch, OwnerWord};
use crate::secret::Secret;

const LABEL_CRYPT_PASSWORD: &str = "rclone-crypt-password";
const LABEL_CRYPT_SALT: &str = "rclone-crypt-salt";
const LABEL_GATEWAY_TOKEN: &str = "gateway-auth-token";
const LABEL_DEVICE_SEED: &str = "openclaw-device-identity-v1";
const LABEL_HOST_KEY_SEED: &str = "ssh-host-key-ed25519-v1";
const LABEL_MANIFEST_KEY: &str = "openclaw-cvm-manifest-v1";
const LABEL_VOLUME: &str = "volume-fingerprint-v1";
const LABEL_OWNER: &str = "owner-token-v1";

/// Comes before label and key in every fingerprint, so that a fingerprint is no hash that
/// anything else could be using.
const FINGERPRINT_DOMAIN: &str = "openclaw-cvm fingerprint";

const SSH_KEY_TYPE: &str = "ssh-ed25519";
const SSH_KEY_COMMENT: &str = "openclaw-cvm";
const SSH_DEFAULT_PORT: u16 = 22;

/// 32 bytes of standard base64, padding included.
const BASE64_KEY_LEN: usize = 44;

/// What the derived token has been cut to since the first shell entrypoint.
const TOKEN_LEN: usize = 32;

/// The shortest stored token that is taken for one: 20 characters of 62 are 119 bits. Shorter
/// is a damaged file, not the rare derived token that lost a character to `/ + =`.
const TOKEN_LEN_MIN: usize = 20;

/// The one secret: the bytes exactly as given, neither decoded nor trimmed, because a bucket
/// hangs on every one of them.
pub struct MasterKey(Secret);

impl MasterKey {
    /// `None` for no bytes at all, which would give everyone the same keys.
    pub fn new(bytes: Secret) -> Option<Self> {
        (!bytes.is_empty()).then_some(Self(bytes))
    }

    pub fn expose(&self) -> &[u8] {
        self.0.expose()
    }
}

/// All keys of one instance.
pub struct KeyRing {
    pub crypt_password: CryptPassword,
    pub crypt_salt: CryptSalt,
    pub gateway_token: GatewayToken,
    pub device_seed: DeviceSeed,
    pub host_key_seed: HostKeySeed,
    pub manifest_key: ManifestKey,
    pub volume_fingerprint: VolumeFingerprint,
}

impl KeyRing {
    pub fn derive(master: &MasterKey) -> Self {
        // Empty salt by contract. RFC 5869 makes no difference between none and empty.
        let hkdf = Hkdf::<Sha256>::new(None, master.expose());
        Self {
            crypt_password: CryptPassword(base64_text(&Seed::derive(&hkdf, LABEL_CRYPT_PASSWORD))),
            crypt_salt: CryptSalt(base64_text(&Seed::derive(&hkdf, LABEL_CRYPT_SALT))),
            gateway_token: GatewayToken(token_text(&Seed::derive(&hkdf, LABEL_GATEWAY_TOKEN))),
            device_seed: DeviceSeed(Seed::derive(&hkdf, LABEL_DEVICE_SEED)),
            host_key_seed: HostKeySeed(Seed::derive(&hkdf, LABEL_HOST_KEY_SEED)),
            manifest_key: ManifestKey(Seed::derive(&hkdf, LABEL_MANIFEST_KEY)),
            volume_fingerprint: VolumeFingerprint(Seed::derive(&hkdf, LABEL_VOLUME)),
        }
    }
}

/// Password of the rclone crypt remote, in clear (not in rclone's obscured form).
pub struct CryptPassword(Secret);

impl CryptPassword {
    pub fn expose(&self) -> &str {
        text_of(&self.0)
    }

    /// Eight hex digits by which two machines can be compared.
    pub fn fingerprint(&self) -> String {
        fingerprint(LABEL_CRYPT_PASSWORD, self.0.expose())
    }
}

/// Salt (`password2`) of the rclone crypt remote, in clear.
pub struct CryptSalt(Secret);

impl CryptSalt {
    pub fn expose(&self) -> &str {
        text_of(&self.0)
    }

    /// Eight hex digits by which two machines can be compared.
    pub fn fingerprint(&self) -> String {
        fingerprint(LABEL_CRYPT_SALT, self.0.expose())
    }
}

/// What a client of the gateway must present: letters and digits, 32 of them.
///
/// The contract's shape is "standard base64 of 32 bytes, without `/ + =`, first 32
/// characters". Of the 43 characters twelve or more would have to be `/` or `+` for fewer than
/// 32 to remain, which happens to about one key in 70 million. A *derived* token is then
/// shorter, because the old shell entrypoint would have made the same one and a token that
/// differs locks every client out; each missing character costs 6 of 190 bits. A *generated*
/// token is refused instead, because fresh randomness is free.
pub struct GatewayToken(Secret);

impl GatewayToken {
    /// A token for an instance without `MASTER_KEY`, from 32 random bytes.
    ///
    /// `None` when fewer than 32 characters would remain: ask again with other bytes. Bytes
    /// from a working generator practically never end here, a stuck one (all `0xff`) does.
    pub fn generate_from(mut random: [u8; 32]) -> Option<Self> {
        let seed = Seed::copy_of(&random);
        random.zeroize();
        let text = token_text(&seed);
        (text.len() == TOKEN_LEN).then_some(Self(text))
    }

    /// Reads back a token that was stored; one trailing line break is no part of it.
    pub fn parse(stored: &[u8]) -> Option<Self> {
        let text = stored.strip_suffix(b"\n").unwrap_or(stored);
        let text = text.strip_suffix(b"\r").unwrap_or(text);
        let right_length = (TOKEN_LEN_MIN..=TOKEN_LEN).contains(&text.len());
        (right_length && text.iter().all(u8::is_ascii_alphanumeric)).then(|| Self(Secret::copy_of(text)))
    }

    pub fn expose(&self) -> &str {
        text_of(&self.0)
    }

    /// Eight hex digits by which two machines can be compared.
    pub fn fingerprint(&self) -> String {
        fingerprint(LABEL_GATEWAY_TOKEN, self.0.expose())
    }
}

/// Ed25519 seed of the device, by which the gateway and the mux-server know this instance.
pub struct DeviceSeed(Seed);

impl DeviceSeed {
    pub fn from_bytes(seed: &[u8; 32]) -> Self {
        Self(Seed::copy_of(seed))
    }

    pub fn expose(&self) -> &[u8; 32] {
        &self.0.0
    }

    pub fn public_key(&self) -> [u8; 32] {
        self.0.public_key()
    }

    /// Hex SHA-256 of the raw public key.
    pub fn device_id(&self) -> String {
        hex(&Sha256::digest(self.public_key()))
    }

    /// Eight hex digits by which two machines can be compared.
    pub fn fingerprint(&self) -> String {
        fingerprint(LABEL_DEVICE_SEED, &self.0.0[..])
    }
}

/// Ed25519 seed of the SSH host key, so that a client never sees a host key change.
pub struct HostKeySeed(Seed);

impl HostKeySeed {
    /// For an instance without `MASTER_KEY`: random bytes, or those stored at an earlier boot.
    pub fn from_bytes(seed: &[u8; 32]) -> Self {
        Self(Seed::copy_of(seed))
    }

    pub fn expose(&self) -> &[u8; 32] {
        &self.0.0
    }

    pub fn public_key(&self) -> [u8; 32] {
        self.0.public_key()
    }

    /// Eight hex digits by which two machines can be compared.
    pub fn fingerprint(&self) -> String {
        fingerprint(LABEL_HOST_KEY_SEED, &self.0.0[..])
    }

    /// The line of `ssh_host_ed25519_key.pub`, without a line break.
    pub fn public_key_line(&self) -> String {
        format!("{SSH_KEY_TYPE} {} {SSH_KEY_COMMENT}", STANDARD.encode(self.public_blob()))
    }

    /// The line that makes a client know this host before its first connection, without a line
    /// break. `None` when `host` is no host name or address: anything else (a space, a comma,
    /// a `*`) would make the line speak about other hosts.
    pub fn known_hosts_line(&self, host: &str, port: u16) -> Option<String> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':');
        if host.is_empty() || !host.chars().all(allowed) {
            return None;
        }
        let host = host.to_ascii_lowercase();
        let pattern = if port == SSH_DEFAULT_PORT { host } else { format!("[{host}]:{port}") };
        Some(format!("{pattern} {SSH_KEY_TYPE} {}", STANDARD.encode(self.public_blob())))
    }

    /// The fingerprint that `ssh` and `ssh-keygen -l` show.
    pub fn ssh_fingerprint(&self) -> String {
        format!("SHA256:{}", STANDARD_NO_PAD.encode(Sha256::digest(self.public_blob())))
    }

    /// The private key as the file that sshd reads: PEM-like armour around `openssh-key-v1`
    /// (PROTOCOL.key of OpenSSH), unencrypted.
    pub fn private_key_file(&self) -> Secret {
        openssh_armoured(&self.openssh_key_v1())
    }

    fn public_blob(&self) -> Vec<u8> {
        let mut blob = Vec::new();
        put_string(&mut blob, SSH_KEY_TYPE.as_bytes());
        put_string(&mut blob, &self.public_key());
        blob
    }

    fn openssh_key_v1(&self) -> Secret {
        let public = self.public_key();
        // OpenSSH puts the same random number twice, to see whether a decryption worked. This
        // file is not encrypted and shall be the same at every boot: the public key serves.
        let check = &public[..4];

        // Room for everything at once: a vector that grows would leave the seed behind. The
        // private part is 144 bytes, the whole 242.
        let mut private = Vec::with_capacity(256);
        private.extend_from_slice(check);
        private.extend_from_slice(check);
        put_string(&mut private, SSH_KEY_TYPE.as_bytes());
        put_string(&mut private, &public);
        put_len(&mut private, 64);
        private.extend_from_slice(self.expose());
        private.extend_from_slice(&public);
        put_string(&mut private, SSH_KEY_COMMENT.as_bytes());
        for pad in 1_u8.. {
            if private.len().is_multiple_of(OPENSSH_BLOCK_LEN) {
                break;
            }
            private.push(pad);
        }
        debug_assert!(private.capacity() == 256, "the buffer moved and left the seed behind");
        let private = Secret::from(private);

        let mut file = Vec::with_capacity(512);
        file.extend_from_slice(b"openssh-key-v1\0");
        put_string(&mut file, b"none"); // cipher
        put_string(&mut file, b"none"); // key derivation
        put_string(&mut file, b""); // its options
        put_len(&mut file, 1); // number of keys
        put_string(&mut file, &self.public_blob());
        put_string(&mut file, private.expose());
        debug_assert!(file.capacity() == 512, "the buffer moved and left the seed behind");
        Secret::from(file)
    }
}

/// Authenticates the manifest and the ownership record of the bucket: who can write to the
/// bucket cannot make either of them.
pub struct ManifestKey(Seed);

impl ManifestKey {
    pub fn expose(&self) -> &[u8; 32] {
        &self.0.0
    }

    /// Eight hex digits by which two machines can be compared.
    pub fn fingerprint(&self) -> String {
        fingerprint(LABEL_MANIFEST_KEY, &self.0.0[..])
    }
}

/// What a volume remembers of the key that it belongs to.
pub struct VolumeFingerprint(Seed);

impl VolumeFingerprint {
    pub fn expose(&self) -> &[u8; 32] {
        &self.0.0
    }

    pub fn to_hex(&self) -> String {
        hex(self.expose())
    }
}

/// What `CVM_OWNER` is for the owner of this key. Each epoch has a word of its own.
pub fn owner_word(master: &MasterKey, epoch: Epoch) -> OwnerWord {
    let hkdf = Hkdf::<Sha256>::new(None, master.expose());
    let token = match epoch.get() {
        0 => Seed::derive(&hkdf, LABEL_OWNER),
        epoch => Seed::derive(&hkdf, &format!("{LABEL_OWNER}:{epoch}")),
    };
    OwnerWord::from_bytes(Sha256::digest(&token.0[..]).into())
}

/// What `CVM_OWNER` is for who has this token.
pub fn owner_word_of_token(token: &Secret) -> OwnerWord {
    OwnerWord::from_bytes(Sha256::digest(token.expose()).into())
}

/// What OpenSSH pads the private part to when there is no cipher.
const OPENSSH_BLOCK_LEN: usize = 8;

/// Where `ssh-keygen` breaks its lines.
const OPENSSH_LINE_LEN: usize = 70;

/// 32 bytes in one place on the heap, wiped on drop, written in place.
struct Seed(Box<[u8; 32]>);

impl Seed {
    fn derive(hkdf: &Hkdf<Sha256>, label: &str) -> Self {
        let mut seed = Self(Box::new([0; 32]));
        // RFC 5869 allows up to 255 times the hash length.
        hkdf.expand(label.as_bytes(), &mut seed.0[..]).expect("32 bytes are within HKDF's limit of 8160");
        seed
    }

    fn copy_of(bytes: &[u8; 32]) -> Self {
        let mut seed = Self(Box::new([0; 32]));
        seed.0.copy_from_slice(bytes);
        seed
    }

    fn public_key(&self) -> [u8; 32] {
        // `SigningKey` wipes itself (feature `zeroize`).
        SigningKey::from_bytes(&self.0).verifying_key().to_bytes()
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

fn base64_text(seed: &Seed) -> Secret {
    Secret::filled(BASE64_KEY_LEN, |room| {
        let written = STANDARD.encode_slice(&seed.0[..], room).expect("44 bytes hold the base64 of 32");
        debug_assert_eq!(written, BASE64_KEY_LEN);
    })
}

fn token_text(seed: &Seed) -> Secret {
    let encoded = base64_text(seed);
    let kept = || encoded.expose().iter().filter(|c| c.is_ascii_alphanumeric()).take(TOKEN_LEN);
    Secret::filled(kept().count(), |room| {
        for (place, character) in room.iter_mut().zip(kept()) {
            *place = *character;
        }
    })
}

fn text_of(secret: &Secret) -> &str {
    secret.expose_str().expect("base64 is ASCII")
}

/// 32 bits: enough to tell two machines apart, of no use to find a key of 256 bits. As with
/// the public host key, someone who guesses a weak `MASTER_KEY` can check the guess with it.
fn fingerprint(label: &str, key: &[u8]) -> String {
    let mut hash = Sha256::new();
    hash.update(FINGERPRINT_DOMAIN);
    hash.update(label);
    hash.update(key);
    hex(&hash.finalize()[..4])
}

/// The lines of a file that `ssh-keygen` makes: base64 between two lines that say what it is.
fn openssh_armoured(body: &Secret) -> Secret {
    const BEGIN: &[u8] = b"-----BEGIN OPENSSH PRIVATE KEY-----\n";
    const END: &[u8] = b"-----END OPENSSH PRIVATE KEY-----\n";
    let encoded_len = body.len().div_ceil(3) * 4;
    let encoded = Secret::filled(encoded_len, |room| {
        let written =
            STANDARD.encode_slice(body.expose(), room).expect("four thirds, rounded up, hold base64");
        debug_assert_eq!(written, encoded_len);
    });
    let lines = encoded_len.div_ceil(OPENSSH_LINE_LEN);
    let mut text = Vec::with_capacity(BEGIN.len() + encoded_len + lines + END.len());
    text.extend_from_slice(BEGIN);
    for line in encoded.expose().chunks(OPENSSH_LINE_LEN) {
        text.extend_from_slice(line);
        text.push(b'\n');
    }
    text.extend_from_slice(END);
    Secret::from(text)
}

/// `string` of RFC 4251: length in four bytes, then the bytes.
fn put_string(buffer: &mut Vec<u8>, bytes: &[u8]) {
    put_len(buffer, bytes.len());
    buffer.extend_from_slice(bytes);
}

fn put_len(buffer: &mut Vec<u8>, len: usize) {
    let len = u32::try_from(len).expect("the fields of a key file are a few bytes long");
    buffer.extend_from_slice(&len.to_be_bytes());
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // writing to a String cannot fail
        text
    })
}

#[cfg(test)]
mod tests;
