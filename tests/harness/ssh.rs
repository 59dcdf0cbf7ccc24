//! Keys of people, and how they come in by SSH.

use crate::Machine;
use crate::machine::{MASTER_KEY, binaries};
use std::fs;
use std::path::Path;
use std::process::Command;

/// Makes a key without a passphrase, and yields its public half.
#[track_caller]
pub fn make_key(file: &Path) -> String {
    let name = file.file_name().expect("a key has a name");
    let mut make = Command::new("ssh-keygen");
    make.args(["-q", "-t", "ed25519", "-N", "", "-C"]).arg(name).arg("-f").arg(file);
    assert!(make.status().expect("ssh-keygen runs").success());
    fs::read_to_string(file.with_extension("pub")).expect("ssh-keygen wrote it")
}

/// What `cvm` derives from [`MASTER_KEY`] for `known_hosts`.
#[track_caller]
pub fn known_hosts(port: u16) -> String {
    let known = Command::new(binaries().join("cvm"))
        .args(["derive", "ssh-known-hosts", "--host", "127.0.0.1", "--port", &port.to_string()])
        .env("MASTER_KEY", MASTER_KEY)
        .output()
        .expect("cvm runs");
    assert!(known.status.success());
    String::from_utf8_lossy(&known.stdout).into_owned()
}

/// Which host key an ssh takes.
#[derive(Debug, Clone, Copy)]
pub enum HostKey<'a> {
    Any,
    /// One in this file.
    Known(&'a str),
}

/// The words of an ssh that asks nobody: a command as root of the machine itself.
pub fn ssh(port: u16, key: &str, host: HostKey<'_>, options: &[&str], command: &str) -> Vec<String> {
    let (strict, file) = match host {
        HostKey::Any => ("no", "/dev/null"),
        HostKey::Known(file) => ("yes", file),
    };
    let mut words: Vec<String> =
        ["ssh", "-F", "none", "-p", &port.to_string(), "-i", key].map(str::to_owned).into();
    let host = [format!("StrictHostKeyChecking={strict}"), format!("UserKnownHostsFile={file}")];
    let ours = ["BatchMode=yes", "IdentitiesOnly=yes", "GlobalKnownHostsFile=none"];
    let all = ours.iter().chain(options).map(|option| (*option).to_owned()).chain(host);
    words.extend(all.flat_map(|option| ["-o".to_owned(), option]));
    words.extend(["root@127.0.0.1", command].map(str::to_owned));
    words
}

/// Whether something listens at port 22 of a machine: in state LISTEN, as the kernel writes it.
pub fn listens(machine: &Machine) -> bool {
    let sockets = fs::read_to_string(format!("/proc/{}/net/tcp", machine.pid())).unwrap_or_default();
    sockets.lines().any(|line| {
        let mut words = line.split_ascii_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(":0016")) && words.nth(1) == Some("0A")
    })
}
