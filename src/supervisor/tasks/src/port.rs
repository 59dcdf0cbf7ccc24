//! Frees a service's port: ends whoever listens there, with everything below it.
//!
//! A gateway can restart itself and leave the old process holding the port, and every new gateway would then
//! fail. Whichever process listens there, the port belongs to the service. PID 1, this process and its ancestors are
//! never ended.

use crate::processes::{self, Process, Table};
use crate::report::{Failure, Outcome, Report};
use crate::root_dir::RootDir;
use cvm_sys::port::is_free;
use nix::sys::signal::Signal;
use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

/// From SIGTERM to SIGKILL. An idle gateway is gone in 0.3 s; one that drains does so for
/// minutes, and the run it drained for is over.
const GRACE: Duration = Duration::from_secs(3);
/// From SIGKILL until everything is gone, and the socket with it.
const AFTER_KILL: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// The port may be taken again while it is being freed.
const ROUNDS: u32 = 3;

pub(crate) fn free(root_dir: &RootDir, port: u16, service: &str, report: &mut Report) -> Outcome<()> {
    for _ in 0..ROUNDS {
        if is_free(port) {
            return Ok(());
        }
        let sockets = listeners(root_dir, port);
        let table = Table::read(root_dir);
        let holders = holders(root_dir, &table, &sockets);
        if holders.is_empty() {
            // It may have gone between the two looks.
            if wait_until(AFTER_KILL, || is_free(port)) {
                return Ok(());
            }
            return Err(Failure::again(format!(
                "port {port} is taken by a process that cannot be seen from here (another container in the same \
                 network?); stop it{}",
                or_another_port(service)
            )));
        }
        spare_ourselves(&table, &holders, port, service)?;
        for holder in &holders {
            report.warn(format!("port {port} was held by pid {} ({}); ended it", holder.pid, holder.name));
        }
        end(root_dir, &table, &holders);
        // The socket ends with the last process that has it open; closing it is the kernel's work.
        wait_until(AFTER_KILL, || is_free(port));
    }
    if is_free(port) {
        return Ok(());
    }
    Err(Failure::again(format!(
        "port {port} is taken again as often as it is freed; `ss -ltnp` shows by whom"
    )))
}

/// Inodes of the sockets that listen on `port`, IPv4 and IPv6.
pub(crate) fn listeners(root_dir: &RootDir, port: u16) -> BTreeSet<u64> {
    ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(root_dir.at(path)).ok())
        .flat_map(|text| text.lines().filter_map(|line| listening_inode(line, port)).collect::<Vec<_>>())
        .collect()
}

/// `sl: local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode …`
fn listening_inode(line: &str, port: u16) -> Option<u64> {
    const LISTEN: &str = "0A";
    let fields: Vec<&str> = line.split_ascii_whitespace().collect();
    let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
    let listens = *fields.get(3)? == LISTEN && u16::from_str_radix(local_port, 16).ok()? == port;
    listens.then(|| fields.get(9)?.parse().ok())?
}

/// Every process with one of these sockets open: a socket is inherited by children.
fn holders(root_dir: &RootDir, table: &Table, sockets: &BTreeSet<u64>) -> Vec<Process> {
    table.all().filter(|process| holds(root_dir, process.pid, sockets)).cloned().collect()
}

pub(crate) fn holds(root_dir: &RootDir, pid: i32, sockets: &BTreeSet<u64>) -> bool {
    let entries = fs::read_dir(processes::proc_file(root_dir, pid, "fd")).into_iter().flatten().flatten();
    entries.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|target| {
        let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        inode.is_some_and(|inode: u64| sockets.contains(&inode))
    })
}

/// The second half of a remedy, for a service whose port can be chosen.
fn or_another_port(service: &str) -> &'static str {
    match service {
        "sshd" => ", or give sshd another port with SSH_PORT",
        "gateway" => ", or give the gateway another port with OPENCLAW_GATEWAY_PORT",
        _ => "",
    }
}

fn spare_ourselves(table: &Table, holders: &[Process], port: u16, service: &str) -> Outcome<()> {
    let lineage = table.lineage(processes::own_pid());
    match holders.iter().find(|holder| lineage.contains(&holder.pid)) {
        None => Ok(()),
        Some(own) => Err(Failure::again(format!(
            "port {port} is held by pid {} ({}), which this container cannot do without, and {service} wants it{}",
            own.pid,
            own.name,
            or_another_port(service)
        ))),
    }
}

/// SIGTERM to the holders alone, since a gateway stops its own children in order; then SIGKILL
/// to what is left of them and of everything that was below them.
fn end(root_dir: &RootDir, table: &Table, holders: &[Process]) {
    let roots = holders.iter().map(|p| p.pid);
    let tree: Vec<Process> =
        table.with_descendants(roots).into_iter().filter_map(|pid| table.get(pid)).cloned().collect();
    for holder in holders {
        processes::send(root_dir, holder, Signal::SIGTERM);
    }
    wait_until(GRACE, || !tree.iter().any(|p| processes::still_runs(root_dir, p)));
    // A second table, for processes that were started meanwhile. Those that lost their parent meanwhile are in the
    // first.
    let now = Table::read(root_dir);
    let alive = tree.iter().filter(|p| processes::still_runs(root_dir, p)).map(|p| p.pid);
    let late: Vec<Process> =
        now.with_descendants(alive).into_iter().filter_map(|pid| now.get(pid)).cloned().collect();
    for process in tree.iter().chain(&late) {
        processes::send(root_dir, process, Signal::SIGKILL);
    }
    wait_until(AFTER_KILL, || !tree.iter().chain(&late).any(|p| processes::still_runs(root_dir, p)));
}

/// Whether `reached` became true in time.
fn wait_until(limit: Duration, mut reached: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + limit;
    loop {
        if reached() {
            return true;
        }
        if Instant::now() >= until {
            return false;
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::process::{Child, Command, Stdio};

    /// A process of its own that listens on a port, and says on which.
    fn listener_process(script: &str) -> Option<(Child, u16)> {
        use std::io::{BufRead as _, BufReader};
        let mut child = Command::new("python3").args(["-c", script]).stdout(Stdio::piped()).spawn().ok()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take()?).read_line(&mut line).ok()?;
        Some((child, line.trim().parse().ok()?))
    }

    /// What another test starts at that moment has our sockets too, until it is another program.
    fn is_free_in_the_end(port: u16) -> bool {
        wait_until(AFTER_KILL, || is_free(port))
    }

    #[test]
    fn a_free_port_costs_nothing_and_is_fine() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(is_free_in_the_end(port));
        let mut report = Report::default();
        free(&RootDir::default(), port, "gateway", &mut report).unwrap();
        assert!(report.notes.is_empty());
    }

    #[test]
    fn our_own_process_is_never_ended() {
        let own = TcpListener::bind("[::1]:0").unwrap();
        let port = own.local_addr().unwrap().port();
        let failure = free(&RootDir::default(), port, "gateway", &mut Report::default()).unwrap_err();
        assert!(failure.retry && failure.why.contains("cannot do without"), "{}", failure.why);
        assert!(failure.why.contains("OPENCLAW_GATEWAY_PORT"), "{}", failure.why);
    }

    #[test]
    fn a_holder_that_ignores_sigterm_goes_and_its_child_with_it() {
        let script = "import os,signal,socket,sys,time\n\
            signal.signal(signal.SIGTERM, signal.SIG_IGN)\n\
            s=socket.socket(); s.bind(('127.0.0.1',0)); s.listen()\n\
            pid=os.fork()\n\
            if pid==0:\n    s.close(); os.setsid(); time.sleep(60)\n\
            print(s.getsockname()[1], flush=True)\n\
            time.sleep(60)\n";
        let Some((mut child, port)) = listener_process(script) else { return };
        let pid = i32::try_from(child.id()).unwrap();
        let below = Table::read(&RootDir::default()).with_descendants([pid]);
        assert_eq!(below.len(), 2);
        let grandchild = processes::look_up(&RootDir::default(), below[1]).unwrap();
        let mut report = Report::default();
        free(&RootDir::default(), port, "gateway", &mut report).unwrap();
        assert!(!processes::still_runs(&RootDir::default(), &grandchild));
        assert!(report.notes[0].text.contains(&format!("pid {pid} (python3")), "{}", report.notes[0].text);
        child.wait().unwrap();
    }

    #[test]
    fn a_holder_that_cannot_be_seen_is_a_failure_that_names_the_port() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("proc/net")).unwrap();
        let line = format!(
            "   0: 0100007F:{port:04X} 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1 0\n"
        );
        fs::write(temp.path().join("proc/net/tcp"), line).unwrap();
        let failure = free(&RootDir::below(temp.path()), port, "sshd", &mut Report::default()).unwrap_err();
        assert!(failure.retry && failure.why.contains(&format!("port {port}")));
        assert!(failure.why.contains("SSH_PORT") && !failure.why.contains("gateway"), "{}", failure.why);
    }

    #[test]
    fn a_listener_on_one_address_of_either_family_is_noticed() {
        for address in ["127.0.0.1:0", "[::1]:0", "0.0.0.0:0", "[::]:0"] {
            let Ok(taken) = TcpListener::bind(address) else { continue };
            let port = taken.local_addr().unwrap().port();
            assert!(!is_free(port), "{address}");
            drop(taken);
            assert!(is_free_in_the_end(port), "{address}");
        }
    }

    #[test]
    fn only_listening_sockets_of_this_very_port_count() {
        let line = |state: &str, port: &str| {
            format!(
                "   1: 0100007F:{port} 00000000:0000 {state} 00000000:00000000 00:00000000 00000000 0 0 4711 1"
            )
        };
        assert_eq!(listening_inode(&line("0A", "4965"), 18789), Some(4711));
        assert_eq!(listening_inode(&line("01", "4965"), 18789), None);
        assert_eq!(listening_inode(&line("0A", "4966"), 18789), None);
        assert_eq!(listening_inode("  sl  local_address rem_address   st", 18789), None);
    }
}
