use std::fmt::Write as _;

use proptest::prelude::*;

use super::*;

/// Frozen. Never edit a vector, whatever the reason: buckets, clients and devices hang on
/// them, and a changed vector is lost user data.
const VECTORS: &str = include_str!("../../../../../tests/vectors/keys.json");

fn ring(master: &[u8]) -> KeyRing {
    KeyRing::derive(&MasterKey::new(Secret::copy_of(master)).unwrap())
}

fn host_key() -> HostKeySeed {
    ring(b"correct horse battery staple").host_key_seed
}

#[test]
fn frozen_vectors_come_out_as_they_always_have() {
    let vectors: Vec<serde_json::Value> = serde_json::from_str(VECTORS).unwrap();
    assert!(vectors.len() >= 2);
    for vector in &vectors {
        let ring = ring(vector["masterKey"].as_str().unwrap().as_bytes());
        let got = serde_json::json!({
            "masterKey": vector["masterKey"],
            "rcloneCryptPassword": ring.crypt_password.expose(),
            "rcloneCryptSalt": ring.crypt_salt.expose(),
            "gatewayAuthToken": ring.gateway_token.expose(),
            "deviceSeedHex": hex(ring.device_seed.expose()),
            "devicePublicKeyHex": hex(&ring.device_seed.public_key()),
            "deviceId": ring.device_seed.device_id(),
        });
        assert_eq!(&got, vector);
    }
}

/// As frozen as the vectors above, made with Python's `hmac` and `ssh-keygen -lf`: operators
/// have this host key in their `known_hosts`.
#[test]
fn frozen_host_key_comes_out_as_it_always_has() {
    let key = host_key();
    assert_eq!(hex(key.expose()), "4370da626f9f3f6a680165f189295e901a8354b5f7c1e1c02e304336de12e1b8");
    assert_eq!(
        key.public_key_line(),
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIAcTP05elNOe/50qhuWtpRP8GGE7WnBngqndtWNl3tZP openclaw-cvm"
    );
    assert_eq!(key.ssh_fingerprint(), "SHA256:oSE27BUSZjOqIR0tRE5e1S7AadY0fLimbCGWZjhlGDY");
}

/// As frozen, made with Python's `hmac`: every manifest and ownership record in a bucket is
/// authenticated with this key.
#[test]
fn frozen_manifest_keys_come_out_as_they_always_have() {
    for (master, expected) in [
        ("correct horse battery staple", "eeb19a99ce177c465ea65db3c91bb3090626d7827f0383074d2c53f02b1e2397"),
        (
            "q83vEjRWeJCrze8SNFZ4kKvN7xI0VniQq83vEjRWeJA=",
            "51ff939e94cb13a2ca724770e5913e9be2eae83cf98a92fe9f496f9aa763e1da",
        ),
    ] {
        assert_eq!(hex(ring(master.as_bytes()).manifest_key.expose()), expected);
    }
}

/// RFC 2104 by hand.
fn hmac(key: &[u8], message: &[&[u8]]) -> [u8; 32] {
    let mut block = [0_u8; 64];
    if key.len() > 64 {
        block[..32].copy_from_slice(&Sha256::digest(key));
    } else {
        block[..key.len()].copy_from_slice(key);
    }
    let mut inner = Sha256::new();
    inner.update(block.map(|byte| byte ^ 0x36));
    for part in message {
        inner.update(part);
    }
    let mut outer = Sha256::new();
    outer.update(block.map(|byte| byte ^ 0x5c));
    outer.update(inner.finalize());
    outer.finalize().into()
}

/// RFC 5869 by hand: extract with an empty salt, expand to one block.
fn independent_hkdf(input: &[u8], label: &str) -> [u8; 32] {
    hmac(&hmac(&[], &[input]), &[label.as_bytes(), &[1]])
}

fn independent_base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits =
            chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for place in 0..4 {
            let symbol = ALPHABET[(bits >> (18 - 6 * place)) as usize & 63];
            text.push(if place <= chunk.len() { symbol as char } else { '=' });
        }
    }
    text
}

proptest! {
    #[test]
    fn every_key_is_what_a_second_implementation_derives(master in prop::collection::vec(any::<u8>(), 1..200)) {
        let ring = ring(&master);
        let password = independent_base64(&independent_hkdf(&master, "rclone-crypt-password"));
        prop_assert_eq!(ring.crypt_password.expose(), password);
        let salt = independent_base64(&independent_hkdf(&master, "rclone-crypt-salt"));
        prop_assert_eq!(ring.crypt_salt.expose(), salt);
        let token: String = independent_base64(&independent_hkdf(&master, "gateway-auth-token"))
            .chars().filter(|c| !matches!(c, '/' | '+' | '=')).take(32).collect();
        prop_assert_eq!(ring.gateway_token.expose(), token);
        let device = independent_hkdf(&master, "openclaw-device-identity-v1");
        prop_assert_eq!(ring.device_seed.expose(), &device);
        let host = independent_hkdf(&master, "ssh-host-key-ed25519-v1");
        prop_assert_eq!(ring.host_key_seed.expose(), &host);
        let manifest = independent_hkdf(&master, "openclaw-cvm-manifest-v1");
        prop_assert_eq!(ring.manifest_key.expose(), &manifest);
    }

    #[test]
    fn a_generated_token_can_be_read_back_and_has_the_derived_shape(random in any::<[u8; 32]>()) {
        let token = GatewayToken::generate_from(random).unwrap();
        prop_assert_eq!(token.expose().len(), 32);
        prop_assert!(token.expose().bytes().all(|c| c.is_ascii_alphanumeric()));
        let stored = format!("{}\n", token.expose());
        let read = GatewayToken::parse(stored.as_bytes()).unwrap();
        prop_assert_eq!(read.expose(), token.expose());
        prop_assert_eq!(read.fingerprint(), token.fingerprint());
    }

    #[test]
    fn a_private_key_file_parses_back_to_its_seed(seed in any::<[u8; 32]>()) {
        let key = HostKeySeed::from_bytes(&seed);
        prop_assert_eq!(seed_in_file(key.private_key_file().expose_str().unwrap(), &key), seed);
    }

    #[test]
    fn reading_a_stored_token_never_panics(stored in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = GatewayToken::parse(&stored);
    }
}

/// Takes `openssh-key-v1` apart as PROTOCOL.key of OpenSSH describes it.
fn seed_in_file(file: &str, key: &HostKeySeed) -> [u8; 32] {
    fn take<'b>(rest: &mut &'b [u8], len: usize) -> &'b [u8] {
        let (taken, left) = rest.split_at(len);
        *rest = left;
        taken
    }
    fn take_len(rest: &mut &[u8]) -> usize {
        u32::from_be_bytes(take(rest, 4).try_into().unwrap()) as usize
    }
    fn take_string<'b>(rest: &mut &'b [u8]) -> &'b [u8] {
        let len = take_len(rest);
        take(rest, len)
    }
    let body = file.strip_prefix("-----BEGIN OPENSSH PRIVATE KEY-----\n").unwrap();
    let body = body.strip_suffix("-----END OPENSSH PRIVATE KEY-----\n").unwrap();
    assert!(body.lines().all(|line| line.len() <= 70));
    let bytes = STANDARD.decode(body.replace('\n', "")).unwrap();
    let rest = &mut bytes.as_slice();
    assert_eq!(take(rest, 15), b"openssh-key-v1\0");
    assert_eq!([take_string(rest), take_string(rest), take_string(rest)], [&b"none"[..], b"none", b""]);
    assert_eq!(take_len(rest), 1);
    assert_eq!(take_string(rest), key.public_blob());
    let private = &mut take_string(rest);
    assert!(rest.is_empty());
    assert_eq!(private.len() % 8, 0);
    assert_eq!(take(private, 4).to_vec(), take(private, 4));
    assert_eq!(take_string(private), b"ssh-ed25519");
    assert_eq!(take_string(private), key.public_key());
    let pair = take_string(private);
    assert_eq!(pair[32..], key.public_key());
    assert_eq!(take_string(private), b"openclaw-cvm");
    assert!(private.iter().zip(1_u8..).all(|(pad, expected)| *pad == expected));
    pair[..32].try_into().unwrap()
}

#[test]
fn the_same_seed_gives_the_same_key_file_at_every_boot() {
    assert_eq!(host_key().private_key_file().expose(), host_key().private_key_file().expose());
}

#[test]
fn a_stuck_random_generator_gives_no_token() {
    assert!(GatewayToken::generate_from([0xff; 32]).is_none());
}

#[test]
fn a_damaged_stored_token_is_not_taken_for_one() {
    let token = "xb60JGSYzqa9njB6VObVhc1aY1DUfuC1";
    assert_eq!(GatewayToken::parse(format!("{token}\r\n").as_bytes()).unwrap().expose(), token);
    // A derived token that lost characters to "/ + =" is still one.
    assert!(GatewayToken::parse(&token.as_bytes()[..31]).is_some());
    let with_space = format!("{token} ");
    let too_long = format!("{token}x");
    for damaged in ["", "\n", &token[..19], &with_space, &too_long, "xb60JGSYzqa9njB6/ObVhc1aY1DUfuC1"] {
        assert!(GatewayToken::parse(damaged.as_bytes()).is_none(), "{damaged:?}");
    }
}

#[test]
fn known_hosts_lines_name_one_host_and_nothing_else() {
    let key = host_key();
    let blob = STANDARD.encode(key.public_blob());
    assert_eq!(key.known_hosts_line("Example.org", 22).unwrap(), format!("example.org ssh-ed25519 {blob}"));
    assert_eq!(
        key.known_hosts_line("example.org", 1022).unwrap(),
        format!("[example.org]:1022 ssh-ed25519 {blob}")
    );
    for host in ["", "*", "a,b", "a b", "a\nb", "!a", "|1|x"] {
        assert!(key.known_hosts_line(host, 22).is_none(), "{host:?}");
    }
}

#[test]
fn fingerprints_tell_keys_apart_and_show_none_of_them() {
    let (one, two) = (ring(b"one"), ring(b"two"));
    let of = |ring: &KeyRing| {
        [
            ring.crypt_password.fingerprint(),
            ring.crypt_salt.fingerprint(),
            ring.gateway_token.fingerprint(),
            ring.device_seed.fingerprint(),
            ring.host_key_seed.fingerprint(),
        ]
    };
    let mut all: Vec<String> = of(&one).into_iter().chain(of(&two)).collect();
    assert_eq!(of(&one), of(&ring(b"one")));
    assert!(all.iter().all(|text| text.len() == 8 && text.bytes().all(|c| c.is_ascii_hexdigit())));
    all.sort();
    all.dedup();
    assert_eq!(all.len(), 10);
}

#[test]
fn labels_are_the_contracts_and_differ() {
    let mut text = String::new();
    for label in
        [LABEL_CRYPT_PASSWORD, LABEL_CRYPT_SALT, LABEL_GATEWAY_TOKEN, LABEL_DEVICE_SEED, LABEL_HOST_KEY_SEED]
    {
        writeln!(text, "{label}").unwrap();
    }
    assert_eq!(
        text,
        "rclone-crypt-password\nrclone-crypt-salt\ngateway-auth-token\nopenclaw-device-identity-v1\n\
         ssh-host-key-ed25519-v1\n"
    );
}

#[test]
fn an_empty_master_key_is_no_key() {
    assert!(MasterKey::new(Secret::copy_of(b"")).is_none());
}
