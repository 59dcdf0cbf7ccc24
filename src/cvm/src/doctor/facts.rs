//! What several rooms ask the machine, and pure readers of what the kernel writes in /proc.
//!
//! Refuses to guess what it cannot read: an absent fact is None. May import: `socket`.

use crate::socket;
use cvm_protocol::accounts::Account;
use cvm_protocol::control::{Body, Verb};
use cvm_protocol::mux::MUX_INBOUND_PORT;
use cvm_protocol::paths;
use cvm_protocol::status::{Service, Status};
use cvm_system::env::variable;
use std::time::Duration;
use zeroize::Zeroizing;

/// For the supervisor's answer. A room asks it twice at most, and both must fit into one check,
/// or a supervisor that hangs would take every other check with it.
pub(crate) const PATIENCE: Duration = Duration::from_secs(1);

pub(crate) const MUX_PORT: u16 = MUX_INBOUND_PORT;

/// As whom and with what the gateway runs.
pub(crate) struct Access {
    pub user: String,
    pub token: Option<Zeroizing<String>>,
    pub port: u16,
}

pub(crate) fn access() -> Option<Access> {
    let Ok(Body::GatewayAccess { user, environment }) =
        socket::ask_within(PATIENCE, "doctor", Verb::GatewayAccess)
    else {
        return None;
    };
    let entries = environment.unpack()?;
    let value = |name: &str| {
        let entry = entries.iter().find_map(|e| e.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
        Some(Zeroizing::new(String::from_utf8(entry.to_vec()).ok()?))
    };
    let port =
        value("OPENCLAW_GATEWAY_PORT").and_then(|p| p.parse().ok()).unwrap_or_else(default_gateway_port);
    Some(Access { user, token: value("OPENCLAW_GATEWAY_TOKEN"), port })
}

pub(crate) fn default_gateway_port() -> u16 {
    let default = variable("OPENCLAW_GATEWAY_PORT").and_then(|v| v.default);
    default.and_then(|text| text.parse().ok()).unwrap_or(18789)
}

pub(crate) fn status() -> Option<Status> {
    socket::status_within(PATIENCE).ok().map(|snapshot| snapshot.status)
}

pub(crate) fn service<'s>(status: Option<&'s Status>, name: &str) -> Option<&'s Service> {
    status?.services.iter().find(|s| s.name == name)
}

pub(crate) fn account(user: &str) -> Option<Account> {
    Account::find(&read("/etc/passwd")?, &read("/etc/group")?, user)
}

/// What the supervisor told sshd.
pub(crate) struct Sshd {
    pub port: u16,
    pub authorized_keys: Vec<String>,
}

pub(crate) fn sshd() -> Option<Sshd> {
    let text = read(paths::SSHD_CONFIG)?;
    let value = |key: &str| text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(' '));
    Some(Sshd {
        port: value("Port")?.trim().parse().ok()?,
        authorized_keys: value("AuthorizedKeysFile")?.split_whitespace().map(str::to_owned).collect(),
    })
}

pub(crate) fn read(path: &str) -> Option<String> {
    std::fs::read(path).ok().map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// `Name:  123 kB` or `name 123`: the number.
pub(crate) fn number(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(name)?;
        let rest = rest.strip_prefix(':').or_else(|| rest.strip_prefix(' '))?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

/// One line of /proc/PID/mountinfo.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub point: String,
    pub kind: String,
    pub read_only: bool,
    /// Neither set-user-ID bits nor devices count on it.
    pub lends_no_rights: bool,
}

/// Mount points in the order in which they were mounted; the last one at a place counts.
pub(crate) fn mounts(mountinfo: &str) -> Vec<Mount> {
    let mount = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let left: Vec<&str> = left.split(' ').collect();
        let options: Vec<&str> = left.get(5)?.split(',').collect();
        Some(Mount {
            point: unescaped(left.get(4)?),
            kind: right.split(' ').next()?.to_owned(),
            read_only: options.contains(&"ro"),
            lends_no_rights: options.contains(&"nosuid") && options.contains(&"nodev"),
        })
    };
    mountinfo.lines().filter_map(mount).collect()
}

/// The kernel writes blanks and line breaks as `\040`.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let octal = if *first == b'\\' { tail.get(..3) } else { None };
        let octal = octal.and_then(|digits| std::str::from_utf8(digits).ok());
        if let Some(byte) = octal.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            bytes.push(byte);
            rest = &tail[3..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_read_whatever_optional_fields_they_have() {
        let text = "\
22 1 0:21 / / rw,relatime - overlay overlay rw,lowerdir=/a - b
30 22 254:1 /data /data rw,noatime shared:1 master:2 - ext4 /dev/vda1 rw
31 22 0:40 / /with\\040blank ro - tmpfs tmpfs rw
broken line
";
        let mounts = mounts(text);
        let told: Vec<(&str, &str, bool)> =
            mounts.iter().map(|m| (m.point.as_str(), m.kind.as_str(), m.read_only)).collect();
        assert_eq!(told, [("/", "overlay", false), ("/data", "ext4", false), ("/with blank", "tmpfs", true)]);
    }

    #[test]
    fn numbers_of_proc_files_are_found_by_their_whole_name() {
        assert_eq!(number("MemTotal:  16 kB\nMemAvailable:   12 kB\n", "MemAvailable"), Some(12));
        assert_eq!(number("oom_kill_x 1\noom_kill 3\n", "oom_kill"), Some(3));
        assert_eq!(number("", "oom_kill"), None);
    }
}
