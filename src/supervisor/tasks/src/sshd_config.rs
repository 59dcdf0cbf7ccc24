//! The text of sshd's configuration, and of the file with the keys that may log in.
//!
//! No passwords in any form, no key exchange with which a recorded session could be decrypted
//! later, and no option that an OpenSSH in use does not know (9.2 of Debian 12 up to 10.x).

use std::collections::HashSet;
use std::fmt::Write as _;

use cvm_protocol::authorized_keys::{AuthorizedKey, key_lines};

/// What differs between instances and images. Paths come from the caller's own layout, never
/// from the user; they must not contain white space or quotes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SshdSettings<'a> {
    pub(crate) port: u16,
    /// Usually none: all addresses. Tests listen on loopback.
    pub(crate) listen_address: Option<&'a str>,
    pub(crate) host_key_path: &'a str,
    /// In the order in which sshd looks at them.
    pub(crate) authorized_keys_paths: &'a [&'a str],
    /// Whether this sshd knows `PerSourcePenalties` (OpenSSH 9.8 and later; an older one stops
    /// at the word). `false` is safe everywhere and leaves sshd's default.
    pub(crate) knows_source_penalties: bool,
}

/// The lines that are the same for every instance.
///
/// Algorithms are taken away from sshd's defaults, with wildcards: a list of allowed ones
/// would have to name what 9.2 does not know, which stops sshd, or leave out what 10.x does
/// better. What remains:
///
/// * key exchange: only hybrids with a post-quantum half (`sntrup761x25519`, and `mlkem768x25519`
///   from 9.9). Someone who records a session today and has a quantum computer later reads
///   everything that an operator saw. Clients from OpenSSH 8.5 (2021) can do it.
/// * ciphers: AES-GCM and AES-CTR. ChaCha20-Poly1305 falls to Terrapin (CVE-2023-48795) where
///   a client lacks the strict key exchange.
/// * MACs: SHA-2, encrypt-then-MAC.
/// * host key: Ed25519, the only one there is.
const SSHD_RULES: &str = "\
PidFile none
UsePAM no
PermitRootLogin prohibit-password
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
HostbasedAuthentication no
PermitEmptyPasswords no
AuthenticationMethods publickey

# What a session may do. Forwarding to the gateway's port is how operators reach its pages.
AllowTcpForwarding yes
AllowAgentForwarding no
X11Forwarding no
PermitTunnel no
PermitUserEnvironment no
PermitUserRC no
AcceptEnv LANG LC_*
PrintMotd no
Subsystem sftp internal-sftp

# The way in must stay open: strangers get little time, and there are places for many of them, so that some
# are left for operators. A session whose other end is gone ends after three minutes.
UseDNS no
TCPKeepAlive no
ClientAliveInterval 60
ClientAliveCountMax 3
LoginGraceTime 20
MaxAuthTries 6
MaxStartups 256:30:512

# VERBOSE names the fingerprint of the key that came in.
LogLevel VERBOSE

KexAlgorithms -ecdh-*,curve25519-*,diffie-*
Ciphers -chacha20-poly1305*,*-cbc
MACs -*-sha1*,umac-*,hmac-sha2-256,hmac-sha2-512
HostKeyAlgorithms ssh-ed25519
";

/// The text of an `sshd_config` for `sshd -D -e -f FILE`.
pub(crate) fn sshd_config(settings: &SshdSettings<'_>) -> String {
    let mut text = String::from("# Written by openclaw-cvm at every boot; changes here are lost.\n");
    let _ = writeln!(text, "Port {}", settings.port); // writing to a String cannot fail
    if let Some(address) = settings.listen_address {
        let _ = writeln!(text, "ListenAddress {address}");
    }
    let _ = writeln!(text, "HostKey {}", settings.host_key_path);
    let _ = writeln!(text, "AuthorizedKeysFile {}", settings.authorized_keys_paths.join(" "));
    if settings.knows_source_penalties {
        // On by default where it exists. Behind dstack's gateway all connections come from one
        // address, so a stranger's failures would lock the operators out for minutes. For the
        // same reason there is no PerSourceMaxStartups: sshd's own default is none.
        text.push_str("PerSourcePenalties no\n");
    }
    text.push_str(SSHD_RULES);
    text
}

/// One `authorized_keys` file out of those that were mounted and the keys of the environment.
///
/// Order is kept, the first of two equal keys stays. Two lines are equal when options, type and
/// key are: the same key with other options is another permission, and sshd tries both. Lines
/// that are not understood stay as they are, because sshd may understand them; blank lines and
/// comments go.
pub(crate) fn merge_authorized_keys(files: &[&str], extra: &[AuthorizedKey]) -> String {
    let mut merged = String::new();
    let mut seen = HashSet::new();
    let mut add = |identity: &str, line: &str| {
        if seen.insert(identity.to_owned()) {
            merged.push_str(line);
            merged.push('\n');
        }
    };
    for (_, line) in files.iter().flat_map(|file| key_lines(file)) {
        match AuthorizedKey::parse(line) {
            Ok(key) => add(key.identity(), key.line()),
            Err(_) => add(line, line),
        }
    }
    for key in extra {
        add(key.identity(), key.line());
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    const ED25519: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF2IEYeE/uIsINsUkH2mMuP5KUdr4bDd5mRqBOnvyJlo";

    fn settings() -> SshdSettings<'static> {
        SshdSettings {
            port: 22,
            listen_address: None,
            host_key_path: "/run/cvm/ssh/host_key",
            authorized_keys_paths: &["/root/.ssh/authorized_keys", "/run/cvm/ssh/authorized_keys"],
            knows_source_penalties: false,
        }
    }

    #[test]
    fn nothing_but_keys_opens_the_door() {
        let text = sshd_config(&settings());
        for line in [
            "Port 22",
            "HostKey /run/cvm/ssh/host_key",
            "AuthorizedKeysFile /root/.ssh/authorized_keys /run/cvm/ssh/authorized_keys",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            // Of what lies in a home, nothing runs before the operator's shell.
            "PermitUserRC no",
            "UsePAM no",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} is missing");
        }
        assert!(!text.contains("ListenAddress"));
    }

    #[test]
    fn no_option_is_given_twice() {
        // sshd takes the first of two, so a later line would be a promise that is not kept.
        let text = sshd_config(&settings());
        let mut names: Vec<&str> = text
            .lines()
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .filter_map(|line| line.split(' ').next())
            .collect();
        names.sort_unstable();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn options_that_older_sshds_do_not_know_are_not_used() {
        let text = sshd_config(&settings());
        for newer in ["PerSourcePenalties", "RefuseConnection", "mlkem", "sntrup"] {
            assert!(!text.contains(newer), "{newer}");
        }
    }

    #[test]
    fn a_strangers_failures_do_not_lock_out_everyone_behind_one_address() {
        let text = sshd_config(&SshdSettings { knows_source_penalties: true, ..settings() });
        assert!(text.contains("\nPerSourcePenalties no\n"));
    }

    #[test]
    fn the_address_is_for_tests() {
        let text = sshd_config(&SshdSettings { listen_address: Some("127.0.0.1"), ..settings() });
        assert!(text.contains("\nListenAddress 127.0.0.1\n"));
    }

    #[test]
    fn the_same_key_is_written_once_in_the_order_it_came() {
        let other = "ecdsa-made-up-type AAAA someone";
        let first = format!("# team\r\n{ED25519} alice\r\n\r\n{other}\r\n");
        let second = format!("{other}\n{ED25519} bob\n");
        let extra = AuthorizedKey::parse(&format!("{ED25519} carol")).unwrap();
        let merged = merge_authorized_keys(&[&first, &second], &[extra]);
        assert_eq!(merged, format!("{ED25519} alice\n{other}\n"));
    }

    #[test]
    fn the_same_key_with_other_options_is_another_permission() {
        let limited = format!("from=\"10.0.0.1\" {ED25519} bob");
        let extra = AuthorizedKey::parse(ED25519).unwrap();
        let merged = merge_authorized_keys(&[&limited], &[extra]);
        assert_eq!(merged, format!("{limited}\n{ED25519}\n"));
    }

    #[test]
    fn nobody_gives_an_empty_file() {
        assert_eq!(merge_authorized_keys(&[], &[]), "");
        assert_eq!(merge_authorized_keys(&["\n# nobody\n"], &[]), "");
    }
}
