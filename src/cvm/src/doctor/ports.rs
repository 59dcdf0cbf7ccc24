//! Room ports: do the right processes listen on the ports of the product?
//!
//! The socket's inode comes from /proc/net/tcp, and the process that holds it from the open files of all
//! processes. Without `CAP_SYS_PTRACE` root does not see the files of other users' processes; then the
//! check compares the owner of the socket, which the table names.

use super::finding::{Checks, Outcome, fail, ok, skip, warn};
use super::proc_files;
use super::sources;
use crate::gateway_access::{self, GatewayAccess};
use crate::text::clean;
use cvm_protocol::status::{Service, ServiceState, Status};
use cvm_sys::process_stat::Process;

/// No process tree is deeper. The table of processes may change while it is read, and show a loop.
const ANCESTORS_MAX: usize = 64;

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.begin("sockets");
    let status = sources::status();
    let access = sources::gateway_access();
    let tables = [proc_files::read("/proc/net/tcp"), proc_files::read("/proc/net/tcp6")];
    let sockets: Vec<Socket> = tables.iter().flatten().flat_map(|table| listening(table)).collect();
    let gateway_port = access.as_ref().map_or_else(gateway_access::default_port, GatewayAccess::port);
    let ssh_port = sources::sshd().map_or(22, |sshd| sshd.port);
    let uid_of = |user: &str| sources::account(user).map(|a| a.uid);
    let gateway_uid = access.as_ref().and_then(|a| uid_of(&a.user));
    for (port, name, uid) in [
        (ssh_port, "sshd", Some(0)),
        (gateway_port, "gateway", gateway_uid),
        (sources::MUX_PORT, "mux", None),
    ] {
        checks.run(&format!("{port} ({name})"), || {
            let mine: Vec<&Socket> = sockets.iter().filter(|s| s.port == port).collect();
            let holders = holders(&mine);
            judge(&Wanted { port, name, uid }, &mine, &holders, status.as_ref())
        });
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Socket {
    port: u16,
    uid: u32,
    inode: u64,
}

struct Wanted {
    port: u16,
    name: &'static str,
    /// The right owner of the socket, for a process that is not visible.
    uid: Option<u32>,
}

#[derive(Debug, PartialEq, Eq)]
struct Holder {
    pid: i32,
    name: String,
    /// Its parent, its parent's parent, and so on.
    ancestors: Vec<i32>,
}

/// The sockets of a table in state LISTEN (0A).
fn listening(table: &str) -> Vec<Socket> {
    let socket = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (*fields.get(3)? == "0A").then_some(())?;
        Some(Socket {
            port: u16::from_str_radix(fields.get(1)?.rsplit(':').next()?, 16).ok()?,
            uid: fields.get(7)?.parse().ok()?,
            inode: fields.get(9)?.parse().ok()?,
        })
    };
    table.lines().skip(1).filter_map(socket).collect()
}

fn holders(sockets: &[&Socket]) -> Vec<Holder> {
    let wanted: Vec<String> = sockets.iter().map(|s| format!("socket:[{}]", s.inode)).collect();
    if wanted.is_empty() {
        return Vec::new();
    }
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let holds = |pid: &i32| {
        let Ok(files) = std::fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
        files.flatten().any(|file| {
            std::fs::read_link(file.path())
                .is_ok_and(|to| wanted.iter().any(|w| to.as_os_str() == w.as_str()))
        })
    };
    pids.filter(holds).map(holder).collect()
}

fn holder(pid: i32) -> Holder {
    let process = Process::of(pid);
    let mut ancestors = Vec::new();
    let mut parent = process.as_ref().map_or(0, |process| process.parent);
    while parent > 0 && ancestors.len() < ANCESTORS_MAX {
        ancestors.push(parent);
        parent = Process::of(parent).map_or(0, |process| process.parent);
    }
    Holder { pid, name: process.map(|process| clean(&process.name)).unwrap_or_default(), ancestors }
}

fn judge(port: &Wanted, sockets: &[&Socket], holders: &[Holder], status: Option<&Status>) -> Outcome {
    let service = sources::service(status, port.name);
    if sockets.is_empty() {
        return nobody(port, service, status.is_some());
    }
    let names: Vec<String> = holders.iter().map(|h| format!("{} (pid {})", h.name, h.pid)).collect();
    let Some(service) = service else {
        let found = if names.is_empty() { "somebody listens".to_owned() } else { names.join(", ") };
        if status.is_none() {
            return skip(format!("{found}; only the supervisor knows who should"));
        }
        return warn(
            format!("{found}, though there is no service {} here", port.name),
            format!("`ss -ltnp 'sport = :{}'`; end it if it is not yours", port.port),
        );
    };
    if holders.is_empty() {
        let right = port.uid.is_none_or(|uid| sockets.iter().all(|s| s.uid == uid));
        return if right {
            ok("its owner listens (the process itself is not visible without CAP_SYS_PTRACE)")
        } else {
            strangers(port, &format!("a process of user id {}", sockets.first().map_or(0, |s| s.uid)))
        };
    }
    let ours = |h: &Holder| service.pid.is_some_and(|pid| h.pid == pid || h.ancestors.contains(&pid));
    if holders.iter().any(ours) { ok(names.join(", ")) } else { strangers(port, &names.join(", ")) }
}

fn nobody(port: &Wanted, service: Option<&Service>, known: bool) -> Outcome {
    match service {
        None if known => skip(format!("there is no service {} here", port.name)),
        None => skip("nobody listens; only the supervisor knows who should"),
        Some(service) => {
            let found = format!("nobody listens; {} is {}", port.name, service.state);
            // A service that starts or stops does not listen.
            if matches!(service.state, ServiceState::Up | ServiceState::Ready) {
                return fail(found, format!("`cvm logs {}`; `cvm restart {}`", port.name, port.name));
            }
            warn(found, format!("`cvm status` shows what {} waits for", port.name))
        }
    }
}

fn strangers(port: &Wanted, who: &str) -> Outcome {
    fail(
        format!("{who} listens, which is not the service {}", port.name),
        format!("end that process, then `cvm restart {}`", port.name),
    )
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::status::samples::healthy;

    const TABLE: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11111 1 0 100 0 0 10 0
   1: 0100007F:4965 0100007F:9999 01 00000000:00000000 00:00000000 00000000   990        0 22222 1 0 100 0 0 10 0
   2: 00000000000000000000000000000000:4965 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000   990        0 33333 1 0 100 0 0 10 0
";

    #[test]
    fn only_listening_sockets_count() {
        let expected =
            [Socket { port: 22, uid: 0, inode: 11111 }, Socket { port: 18789, uid: 990, inode: 33333 }];
        assert_eq!(listening(TABLE), expected);
    }

    #[test]
    fn the_holder_must_belong_to_the_service() {
        let (status, socket) = (healthy(), Socket { port: 18789, uid: 990, inode: 1 });
        let port = Wanted { port: 18789, name: "gateway", uid: Some(990) };
        let holder =
            |pid, ancestors: &[i32]| Holder { pid, name: "node".into(), ancestors: ancestors.into() };
        let verdict = |holders: &[Holder]| judge(&port, &[&socket], holders, Some(&status)).verdict;
        assert_eq!(verdict(&[holder(131, &[1])]), Verdict::Ok);
        assert_eq!(verdict(&[holder(500, &[131, 1])]), Verdict::Ok);
        assert_eq!(verdict(&[holder(500, &[1])]), Verdict::Fail);
        // The process is not visible, so the owner of the socket decides.
        assert_eq!(verdict(&[]), Verdict::Ok);
        let strange = Socket { uid: 0, ..socket };
        assert_eq!(judge(&port, &[&strange], &[], Some(&status)).verdict, Verdict::Fail);
    }

    #[test]
    fn the_port_of_an_absent_service_may_be_free_but_not_taken() {
        let port = Wanted { port: 18790, name: "mux", uid: None };
        let socket = Socket { port: 18790, uid: 990, inode: 1 };
        assert_eq!(judge(&port, &[], &[], Some(&healthy())).verdict, Verdict::Skip);
        assert_eq!(judge(&port, &[&socket], &[], Some(&healthy())).verdict, Verdict::Warn);
        let gateway = Wanted { port: 1, name: "gateway", uid: None };
        assert_eq!(judge(&gateway, &[], &[], Some(&healthy())).verdict, Verdict::Fail);
    }

    #[test]
    fn our_own_listener_is_found() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let sockets = listening(&proc_files::read("/proc/net/tcp").unwrap());
        let mine: Vec<&Socket> = sockets.iter().filter(|s| s.port == port).collect();
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(holders(&mine).iter().any(|h| h.pid == pid));
    }
}
