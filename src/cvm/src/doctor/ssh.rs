//! Room ssh: can an operator log in? sshd sends its banner, and at least one key is authorized.

use super::finding::{Checks, Outcome, fail, ok};
use super::proc_files;
use super::sources::{self, Sshd};
use crate::text;
use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

const TIME: Duration = Duration::from_secs(3);
/// RFC 4253: at most 255 bytes.
const BANNER_MAX: u64 = 255;

pub(crate) fn check(checks: &mut Checks<'_>) {
    let sshd = sources::sshd();
    checks.run("configuration", || match &sshd {
        Some(_) => ok(cvm_protocol::paths::SSHD_CONFIG),
        None => fail(
            format!("{} is not there or not whole", cvm_protocol::paths::SSHD_CONFIG),
            "the boot step `ssh` writes it: `cvm status` shows why it did not",
        ),
    });
    let Some(sshd) = sshd else { return };
    checks.run("banner", || banner(sshd.port));
    checks.run("authorized keys", || keys(&sshd));
}

fn banner(port: u16) -> Outcome {
    let remedy = "`cvm logs sshd` shows why; `cvm restart sshd`";
    let ask = || -> std::io::Result<Vec<u8>> {
        let stream = TcpStream::connect_timeout(&SocketAddr::from((Ipv4Addr::LOCALHOST, port)), TIME)?;
        stream.set_read_timeout(Some(TIME))?;
        let mut line = Vec::new();
        BufReader::new(stream.take(BANNER_MAX)).read_until(b'\n', &mut line)?;
        Ok(line)
    };
    match ask() {
        Ok(line) if line.starts_with(b"SSH-2.0-") => ok(text::clean(String::from_utf8_lossy(&line).trim())),
        Ok(line) if line.is_empty() => fail(format!("port {port}: it hangs up without a banner"), remedy),
        Ok(_) => fail(format!("port {port}: another protocol answers"), "see ports"),
        Err(error) => fail(format!("port {port}: {}", text::io_error(&error)), remedy),
    }
}

fn keys(sshd: &Sshd) -> Outcome {
    // Operators log in as root, so relative paths are in root's home.
    let path = |name: &String| if name.starts_with('/') { name.clone() } else { format!("/root/{name}") };
    let number: usize =
        sshd.authorized_keys.iter().filter_map(|name| proc_files::read(&path(name))).map(|t| count(&t)).sum();
    if number == 0 {
        let remedy = "set SSH_AUTHORIZED_KEYS to your public key, and restart; if it is set, `cvm status` shows at the step \
                      `volume` why no key is accepted";
        return fail("none: nobody can log in", remedy);
    }
    ok(number.to_string())
}

fn count(text: &str) -> usize {
    text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')).count()
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::http::tests::serve_at_once;

    #[test]
    fn only_an_ssh_banner_is_good() {
        assert_eq!(banner(serve_at_once(b"SSH-2.0-OpenSSH_9.2p1\r\n")).found, "SSH-2.0-OpenSSH_9.2p1");
        assert_eq!(banner(serve_at_once(b"HTTP/1.1 400\r\n")).verdict, Verdict::Fail);
        assert!(banner(serve_at_once(b"")).found.contains("hangs up"));
    }

    #[test]
    fn a_file_without_keys_is_a_failure_and_comments_are_no_keys() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("keys");
        let sshd =
            Sshd { port: 22, authorized_keys: vec!["/no/such".into(), file.to_string_lossy().into_owned()] };
        std::fs::write(&file, "# none\n\n").unwrap();
        assert_eq!(keys(&sshd).verdict, Verdict::Fail);
        std::fs::write(&file, "# one\nssh-ed25519 AAAA me\n").unwrap();
        assert_eq!(keys(&sshd).found, "1");
    }
}
