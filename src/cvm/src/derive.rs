//! `cvm derive`: secrets and identities that an operator needs outside of the VM, from `MASTER_KEY`.
//!
//! Reads the key with the supervisor's own code, so that both always mean the same bytes and
//! give the same warnings. The key is never an argument, where every user of the machine could read it.

use crate::args::{DeriveArgs, Derived, KeySource};
use crate::failure::{Exit, Failure, mistakes, warn};
use crate::input;
use crate::prompt;
use crate::stdout;
use cvm_secrets::keys::MasterKey;
use cvm_secrets::keys::{self, KeyRing};
use cvm_secrets::owner::Epoch;
use cvm_system::config::{Config, S3, Storage, is_strong};
use cvm_system::env::{Environment, file_twin};
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::os::unix::ffi::OsStrExt as _;
use zeroize::Zeroizing;

const NAME: &str = "MASTER_KEY";
/// A key is a line. A larger input is a mistake, such as the wrong file.
const INPUT_MAX: usize = 64 * 1024;

pub(crate) fn run(args: &DeriveArgs) -> Result<Exit, Failure> {
    let source = match &args.what {
        Derived::GatewayToken(key)
        | Derived::DeviceId(key)
        | Derived::VolumeFingerprint(key)
        | Derived::Owner { key, .. }
        | Derived::SshKnownHosts { key, .. } => key,
        Derived::CryptPassword(args) | Derived::CryptSalt(args) => {
            warn("the output is a secret: password and salt together open everything in the bucket");
            &args.key
        }
        Derived::RcloneConfig(key) => return rclone_config(key),
    };
    let master = master_key(source)?;
    let text = match &args.what {
        Derived::Owner { epoch, .. } => owner(&master, *epoch)?,
        what => derived(what, &KeyRing::derive(&master))?,
    };
    drop(master);
    stdout::print(&text)?;
    Ok(Exit::Good)
}

/// `CVM_OWNER`. Everybody may read the compose file that holds it, and could check a guess of the key.
fn owner(master: &MasterKey, epoch: u32) -> Result<Zeroizing<String>, Failure> {
    if !is_strong(master.expose()) {
        let cause =
            "this key can be guessed, and CVM_OWNER, which everybody can read, would confirm the guess";
        let hint = "set CVM_OWNER_TOKEN to the output of `openssl rand -base64 32`; CVM_OWNER is then what `printf %s \
                    \"$CVM_OWNER_TOKEN\" | sha256sum` prints";
        return Err(Failure::new(Exit::Usage, "derive owner: MASTER_KEY", cause).hint(hint));
    }
    let epoch = Epoch::new(epoch)
        .ok_or_else(|| Failure::new(Exit::Usage, "derive owner", "there is no such epoch"))?;
    Ok(Zeroizing::new(format!("{}\n", keys::owner_word(master, epoch))))
}

fn derived(what: &Derived, keys: &KeyRing) -> Result<Zeroizing<String>, Failure> {
    let mut text = Zeroizing::new(String::with_capacity(1024));
    let mut crypt = |clear: &str, is_obscured: bool| -> Result<(), Failure> {
        let _ = if is_obscured { writeln!(text, "{}", *obscured(clear)?) } else { writeln!(text, "{clear}") };
        Ok(())
    };
    match what {
        Derived::CryptPassword(args) => crypt(keys.crypt_password.expose(), args.obscured)?,
        Derived::CryptSalt(args) => crypt(keys.crypt_salt.expose(), args.obscured)?,
        // These two need more than the key ring: see `rclone_config` and `owner`.
        Derived::RcloneConfig(_) | Derived::Owner { .. } => {}
        Derived::VolumeFingerprint(_) => {
            let _ = writeln!(text, "{}", keys.volume_fingerprint.to_hex());
        }
        Derived::GatewayToken(_) => {
            let _ = writeln!(text, "{}", keys.gateway_token.expose()); // a String takes all
        }
        Derived::DeviceId(_) => {
            let _ = writeln!(text, "{}", keys.device_seed.device_id());
        }
        Derived::SshKnownHosts { host, port, .. } => {
            for host in host {
                let line = keys.host_key_seed.known_hosts_line(host, *port).ok_or_else(|| {
                    let cause = format!("{host:?} is no host name or address");
                    let hint = "give one name or address as you give it to ssh, without user and port";
                    Failure::new(Exit::Usage, "derive ssh-known-hosts", cause).hint(hint)
                })?;
                let _ = writeln!(text, "{line}");
            }
        }
    }
    Ok(text)
}

fn obscured(clear: &str) -> Result<Zeroizing<String>, Failure> {
    cvm_secrets::obscured::obscure(clear.as_bytes())
        .map_err(|_| Failure::new(Exit::Bad, "derive", "the kernel gives no random numbers"))
}

// === rclone.conf ===

const RCLONE_CONFIG: &str = "derive rclone-config";

fn rclone_config(source: &KeySource) -> Result<Exit, Failure> {
    let environment = with_key(source)?;
    let (config, warnings) = Config::parse_elsewhere(&environment)
        .map_err(|problems| mistakes(RCLONE_CONFIG, &problems, "nothing was derived"))?;
    for warning in warnings {
        warn(&warning.to_string());
    }
    let (Storage::S3(s3), Some(master)) = (&config.storage, &config.master_key) else {
        let hint = "set S3_BUCKET and the credentials as they are set for the VM";
        return Err(Failure::new(Exit::Usage, RCLONE_CONFIG, "S3_BUCKET is not set, so there is no bucket")
            .hint(hint));
    };
    warn("the output holds every secret of the bucket: keep it where only you can read it");
    stdout::print(&rclone_conf(s3, &KeyRing::derive(master))?)?;
    Ok(Exit::Good)
}

/// All variables, and the key from the place that the help promises.
fn with_key(source: &KeySource) -> Result<Environment, Failure> {
    let twin = file_twin(NAME);
    let given = |name: &str| std::env::var_os(name).is_some_and(|v| !v.is_empty());
    if source.from_stdin.is_none() && (given(NAME) || given(&twin)) {
        return Ok(input::environment());
    }
    let all = std::env::vars_os().filter(|(name, _)| name != NAME && *name != *twin);
    let all = all.map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
    let mut environment = Environment::new(all.chain([(twin.clone().into_bytes(), b"-".to_vec())]));
    for (name, path) in environment.wanted_files() {
        let content = if name == NAME { Ok(typed_or_piped()?) } else { input::read_file(&path, INPUT_MAX) };
        environment.with_file(name, content);
    }
    Ok(environment)
}

/// Two remotes, as the storage worker has them: the bucket, and the encryption over it.
fn rclone_conf(s3: &S3, keys: &KeyRing) -> Result<Zeroizing<String>, Failure> {
    let mut text = Zeroizing::new(String::with_capacity(4096));
    text.push_str(
        "# This file holds every secret of the bucket. Use it to read; a file that is written with it\n\
         # is not in the manifest, and a running machine ignores it.\n\
         [openclaw-bucket]\ntype = s3\nforce_path_style = true\nno_check_bucket = true\nenv_auth = false\n",
    );
    let mut add = |name: &str, value: &[u8]| -> Result<(), Failure> {
        let value = std::str::from_utf8(value).map_err(|_| {
            Failure::new(Exit::Usage, RCLONE_CONFIG, format!("{name} is no text that rclone.conf can hold"))
        })?;
        let _ = writeln!(text, "{name} = {value}");
        Ok(())
    };
    add("provider", s3.provider.as_str().as_bytes())?;
    add("region", s3.region.as_str().as_bytes())?;
    if let Some(endpoint) = &s3.endpoint {
        add("endpoint", endpoint.as_str().as_bytes())?;
    }
    add("access_key_id", s3.access_key_id.expose())?;
    add("secret_access_key", s3.secret_access_key.expose())?;
    if let Some(token) = &s3.session_token {
        add("session_token", token.expose())?;
    }
    let root = format!("openclaw-bucket:{}/{}", s3.bucket.as_str(), s3.prefix.as_str());
    add("\n[openclaw]\ntype = crypt\nremote", root.as_bytes())?;
    if let Some(given) = &s3.crypt_override {
        add("password", given.password.expose())?;
        add("password2", given.salt.expose())?;
    } else {
        add("password", obscured(keys.crypt_password.expose())?.as_bytes())?;
        add("password2", obscured(keys.crypt_salt.expose())?.as_bytes())?;
    }
    text.push_str(
        "filename_encryption = standard\ndirectory_name_encryption = true\nfilename_encoding = base32\n",
    );
    Ok(text)
}

// === MASTER_KEY ===

/// The key, from the first of the places that the help names.
fn master_key(source: &KeySource) -> Result<MasterKey, Failure> {
    let twin = file_twin(NAME);
    let value = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let pair = |name: &str, value: &OsStr| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
    if source.from_stdin.is_none() {
        let given: Vec<_> = [NAME, &twin].into_iter().filter_map(|n| Some(pair(n, &value(n)?))).collect();
        if !given.is_empty() {
            let mut environment = Environment::new(given);
            for (name, path) in environment.wanted_files() {
                environment.with_file(name, input::read_file(&path, INPUT_MAX));
            }
            return checked(&environment, None);
        }
    }
    from_input(typed_or_piped()?)
}

/// The key as it was typed or piped in, to be treated like the content of a file.
fn typed_or_piped() -> Result<Vec<u8>, Failure> {
    if std::io::stdin().is_terminal() {
        return Ok(prompt::secret("MASTER_KEY (not shown): ")?.to_vec());
    }
    input::read_limited(&mut std::io::stdin().lock(), INPUT_MAX).map_err(|cause| {
        Failure::new(Exit::Usage, "derive: standard input", cause).hint("give the key as one line")
    })
}

/// A key that was typed or piped in, without the line breaks at its end.
fn from_input(content: Vec<u8>) -> Result<MasterKey, Failure> {
    let rule = if content.iter().all(|b| matches!(b, b'\n' | b'\r')) {
        "holds no key"
    } else {
        "has NUL bytes, which no key has"
    };
    let mut environment = Environment::new([(file_twin(NAME).into_bytes(), b"-".to_vec())]);
    environment.with_file(NAME, Ok(content));
    checked(&environment, Some(rule))
}

/// Checks the key as the supervisor does. `rule` replaces a message that would speak of a file.
fn checked(environment: &Environment, rule: Option<&str>) -> Result<MasterKey, Failure> {
    let no_key = || Failure::new(Exit::Usage, "derive", "there is no MASTER_KEY");
    match Config::parse_elsewhere(environment) {
        Ok((config, warnings)) => {
            for warning in warnings {
                warn(&warning.to_string());
            }
            config.master_key.ok_or_else(no_key)
        }
        Err(problems) => {
            let Some(problem) = problems.first() else { return Err(no_key()) };
            let (what, cause, hint) = match rule {
                Some(rule) => ("standard input", rule, "give the key as one line of text"),
                None => (problem.variable.as_str(), problem.rule.as_str(), problem.hint.as_str()),
            };
            Err(Failure::new(Exit::Usage, format!("derive: {what}"), cause).hint(hint))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::CryptArgs;

    fn source() -> KeySource {
        KeySource { from_stdin: None }
    }

    fn ring(key: &[u8]) -> KeyRing {
        let Ok(master) = from_input(key.to_vec()) else { panic!("{key:?} is a key") };
        KeyRing::derive(&master)
    }

    #[test]
    fn derived_values_are_those_of_the_frozen_vectors() {
        let text = include_str!("../../../tests/vectors/keys.json");
        let vectors: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert!(!vectors.is_empty());
        for vector in vectors {
            let of = |name: &str| vector[name].as_str().unwrap();
            let keys = ring(of("masterKey").as_bytes());
            let token = derived(&Derived::GatewayToken(source()), &keys).unwrap();
            assert_eq!(token.as_str(), format!("{}\n", of("gatewayAuthToken")));
            let id = derived(&Derived::DeviceId(source()), &keys).unwrap();
            assert_eq!(id.as_str(), format!("{}\n", of("deviceId")));
            let clear = |obscured| CryptArgs { obscured, key: source() };
            for (what, name) in [
                (Derived::CryptPassword as fn(CryptArgs) -> Derived, "rcloneCryptPassword"),
                (Derived::CryptSalt, "rcloneCryptSalt"),
            ] {
                assert_eq!(derived(&what(clear(false)), &keys).unwrap().as_str(), format!("{}\n", of(name)));
                let hidden = derived(&what(clear(true)), &keys).unwrap();
                assert_eq!(
                    cvm_secrets::obscured::reveal(hidden.trim_end().as_bytes()).unwrap()[..],
                    *of(name).as_bytes()
                );
            }
        }
    }

    #[test]
    fn line_breaks_at_the_end_are_no_part_of_the_key_and_every_other_byte_is() {
        let token = |key: &[u8]| ring(key).gateway_token.expose().to_owned();
        let plain = token(b"correct horse battery staple");
        assert_eq!(plain, token(b"correct horse battery staple\n"));
        assert_eq!(plain, token(b"correct horse battery staple\r\n"));
        assert_ne!(plain, token(b"correct horse battery staple "));
        assert_ne!(plain, token(b"\ncorrect horse battery staple"));
    }

    #[test]
    fn an_empty_input_and_one_with_nul_bytes_are_no_key() {
        for bad in [&b""[..], b"\n", b"\r\n\n"] {
            let failure = from_input(bad.to_vec()).err().unwrap();
            assert!(failure.to_string().contains("standard input: holds no key"), "{failure}");
            assert_eq!(failure.exit, Exit::Usage);
        }
        let failure = from_input(b"a\0b".to_vec()).err().unwrap();
        assert!(failure.to_string().contains("NUL"), "{failure}");
    }

    #[test]
    fn a_random_key_has_an_owner_hash_for_each_epoch_and_a_weak_key_has_none() {
        let hash = |key: &str, epoch| {
            let Ok(master) = from_input(key.as_bytes().to_vec()) else { panic!("{key:?} is a key") };
            owner(&master, epoch).map(|text| text.trim_end().to_owned())
        };
        // Computed by another implementation of HKDF (RFC 5869), with the labels of the contract.
        let key = "kqkwGlAAGBFcUhH9pdY8mDWBZQBOgP2Kq4dkAQvqBjo=";
        let first = "b7e20f20e8962f703b119bb96f973b9ddae67a1603ccb7cd0f9fc734d4f61216";
        let third = "7b9a086866d46811f0433ffaffcfb7f0f39af6240e1694e689b22e4157dd5167";
        assert_eq!((hash(key, 0).unwrap().as_str(), hash(key, 3).unwrap().as_str()), (first, third));
        let fingerprint = derived(&Derived::VolumeFingerprint(source()), &ring(key.as_bytes())).unwrap();
        assert_eq!(
            fingerprint.trim_end(),
            "ec052118bd1a479f3b1188a91e6bfb7d8d4b9187c9c90e0ee43587b3a92cb0a6"
        );
        let refused = hash("correct horse battery staple", 0).unwrap_err();
        assert_eq!(refused.exit, Exit::Usage);
        assert!(refused.to_string().contains("CVM_OWNER_TOKEN"), "{refused}");
    }

    #[test]
    fn known_hosts_names_the_port_unless_it_is_22() {
        let lines = |hosts: &[&str], port| {
            let host = hosts.iter().map(|h| (*h).to_owned()).collect();
            derived(
                &Derived::SshKnownHosts { host, port, key: source() },
                &ring(b"correct horse battery staple"),
            )
        };
        let text = lines(&["vm.example.org", "203.0.113.7"], 1022).unwrap();
        let starts: Vec<&str> = text.lines().filter_map(|l| l.split(" AAAA").next()).collect();
        assert_eq!(starts, ["[vm.example.org]:1022 ssh-ed25519", "[203.0.113.7]:1022 ssh-ed25519"]);
        assert!(lines(&["vm.example.org"], 22).unwrap().starts_with("vm.example.org ssh-ed25519 AAAA"));
        for bad in ["a b", "*", "a,b", "", "root@h"] {
            assert!(lines(&[bad], 22).is_err(), "{bad}");
        }
    }

    #[test]
    fn an_rclone_conf_holds_the_bucket_and_the_passwords_that_open_it() {
        let conf = |more: &[(&str, &str)]| {
            let given = [
                ("MASTER_KEY", "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M="),
                ("S3_BUCKET", "claws"),
                ("S3_ENDPOINT", "https://s3.example.org"),
                ("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"),
                ("AWS_SECRET_ACCESS_KEY", "not/a+secret="),
            ];
            let pairs = given.iter().chain(more).map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
            let Ok((config, _)) = Config::parse(&Environment::new(pairs)) else { panic!("it is complete") };
            let Storage::S3(s3) = &config.storage else { panic!("S3_BUCKET is set") };
            rclone_conf(s3, &ring(b"correct horse battery staple")).unwrap().to_string()
        };
        let value = |text: &str, name: &str| {
            let all: Vec<_> = text
                .lines()
                .filter_map(|l| l.strip_prefix(name)?.strip_prefix(" = "))
                .map(str::to_owned)
                .collect();
            all.join("|")
        };
        let text = conf(&[("S3_PREFIX", "a/b")]);
        assert_eq!(value(&text, "remote"), "openclaw-bucket:claws/a/b");
        assert_eq!(value(&text, "secret_access_key"), "not/a+secret=");
        assert_eq!((value(&text, "type"), value(&text, "session_token")), ("s3|crypt".into(), String::new()));
        let password = cvm_secrets::obscured::reveal(value(&text, "password").as_bytes()).unwrap();
        assert_eq!(&password[..], b"fWxyhzuLSQizHmoLLNCIFuPKNGAgWm3D5LziNPZ2UdM=");
        let mine = cvm_secrets::obscured::obscure(b"mine").unwrap();
        let text = conf(&[("RCLONE_CRYPT_PASSWORD", &mine), ("RCLONE_CRYPT_PASSWORD2", &mine)]);
        assert_eq!(
            (value(&text, "password").as_str(), value(&text, "password2").as_str()),
            (&**mine, &**mine)
        );
    }
}
