//! `cvm derive`: what an operator needs outside of the VM, from `MASTER_KEY` alone.
//!
//! Reads the key with the supervisor's own code, so that both always mean the same bytes and
//! give the same warnings.
//!
//! Refuses the key as an argument, where every user of the machine could read it, and to
//! print a secret other than the token that was asked for.
//! May import: `args`, `input`, `out`, `prompt`, `trouble`.

use crate::args::{DeriveArgs, Derived, KeySource};
use crate::input;
use crate::out;
use crate::prompt;
use crate::trouble::{Exit, Trouble, warn};
use cvm_blueprint::config::{Config, MasterKey};
use cvm_blueprint::env::{Environment, file_twin};
use cvm_blueprint::keys::KeyRing;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::os::unix::ffi::OsStrExt as _;
use zeroize::Zeroizing;

const NAME: &str = "MASTER_KEY";
/// A key is a line. A larger input is a mistake, such as the wrong file.
const INPUT_MAX: usize = 64 * 1024;

pub(crate) fn run(args: &DeriveArgs) -> Result<Exit, Trouble> {
    let source = match &args.what {
        Derived::GatewayToken(key) | Derived::DeviceId(key) | Derived::SshKnownHosts { key, .. } => key,
    };
    let master = master_key(source)?;
    let text = derived(&args.what, &KeyRing::derive(&master))?;
    drop(master);
    out::print(&text)?;
    Ok(Exit::Good)
}

fn derived(what: &Derived, keys: &KeyRing) -> Result<Zeroizing<String>, Trouble> {
    let mut text = Zeroizing::new(String::with_capacity(1024));
    match what {
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
                    Trouble::new(Exit::Usage, "derive ssh-known-hosts", cause).hint(hint)
                })?;
                let _ = writeln!(text, "{line}");
            }
        }
    }
    Ok(text)
}

/// Where the key comes from, in the order that the help promises.
fn master_key(source: &KeySource) -> Result<MasterKey, Trouble> {
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
    // What comes in otherwise is treated as the content of a file.
    let content = if std::io::stdin().is_terminal() {
        prompt::secret("MASTER_KEY (not shown): ")?.to_vec()
    } else {
        input::read_limited(&mut std::io::stdin().lock(), INPUT_MAX).map_err(|cause| {
            Trouble::new(Exit::Usage, "derive: standard input", cause).hint("give the key as one line")
        })?
    };
    from_input(content)
}

/// A key that was typed or piped in, line breaks at its end not included.
fn from_input(content: Vec<u8>) -> Result<MasterKey, Trouble> {
    let rule = if content.iter().all(|b| matches!(b, b'\n' | b'\r')) {
        "holds no key"
    } else {
        "has NUL bytes, which no key has"
    };
    let mut environment = Environment::new([(file_twin(NAME).into_bytes(), b"-".to_vec())]);
    environment.with_file(NAME, Ok(content));
    checked(&environment, Some(rule))
}

/// The supervisor's judgement. `rule` replaces its words where those speak of a file.
fn checked(environment: &Environment, rule: Option<&str>) -> Result<MasterKey, Trouble> {
    let no_key = || Trouble::new(Exit::Usage, "derive", "there is no MASTER_KEY");
    match Config::parse(environment) {
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
            Err(Trouble::new(Exit::Usage, format!("derive: {what}"), cause).hint(hint))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source() -> KeySource {
        KeySource { from_stdin: None }
    }

    fn ring(key: &[u8]) -> KeyRing {
        let Ok(master) = from_input(key.to_vec()) else { panic!("{key:?} is a key") };
        KeyRing::derive(&master)
    }

    #[test]
    fn what_is_derived_is_what_the_frozen_vectors_say() {
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
        }
    }

    #[test]
    fn line_breaks_at_the_end_are_no_part_of_the_key_and_all_else_is() {
        let token = |key: &[u8]| ring(key).gateway_token.expose().to_owned();
        let plain = token(b"correct horse battery staple");
        assert_eq!(plain, token(b"correct horse battery staple\n"));
        assert_eq!(plain, token(b"correct horse battery staple\r\n"));
        assert_ne!(plain, token(b"correct horse battery staple "));
        assert_ne!(plain, token(b"\ncorrect horse battery staple"));
    }

    #[test]
    fn nothing_and_nul_bytes_are_no_key() {
        for bad in [&b""[..], b"\n", b"\r\n\n"] {
            let trouble = from_input(bad.to_vec()).err().unwrap();
            assert!(trouble.to_string().contains("standard input: holds no key"), "{trouble}");
            assert_eq!(trouble.exit, Exit::Usage);
        }
        let trouble = from_input(b"a\0b".to_vec()).err().unwrap();
        assert!(trouble.to_string().contains("NUL"), "{trouble}");
    }

    #[test]
    fn known_hosts_names_the_port_unless_it_is_the_usual_one() {
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
}
