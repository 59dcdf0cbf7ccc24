//! What the agent, any program that runs as the gateway's user, cannot reach; each attack beside a
//! control in which it succeeds.

use cvm_harness::Machine;
use cvm_harness::machine::Builder;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;

const HEALTHY: &str = "#!/bin/sh\nexec cvm-victim http 18789\n";
const AGENT: [&str; 4] = ["setpriv", "--reuid=990", "--regid=990", "--clear-groups"];

fn product(gateway: &str) -> Builder {
    Builder::product()
        .fake_gateway(gateway)
        .environment("ENABLE_DOCKER", "0")
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
}

/// dstack's guest agent, as open to everybody as upstream makes it.
fn guest_agent(socket: &Path) {
    let listener = UnixListener::bind(socket).expect("a socket in a directory of ours");
    fs::set_permissions(socket, fs::Permissions::from_mode(0o777)).expect("it is ours");
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let _ = stream.read(&mut [0; 1024]);
            let _ =
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\nConnection: close\r\n\r\nanswer");
        }
    });
}

/// Whether it answers whoever asks at `socket`.
fn answers(machine: &Machine, who: &[&str], socket: &str) -> bool {
    let curl = ["curl", "--silent", "--unix-socket", socket, "http://dstack/Info"];
    let output = machine.exec(&[who, &curl].concat());
    String::from_utf8_lossy(&output.stdout).starts_with("answer")
}

#[test]
fn the_guest_agent_answers_root_alone_wherever_the_compose_file_mounts_it() {
    let host = tempfile::tempdir().expect("a temporary directory");
    let directory = host.path().join("dstack");
    fs::create_dir(&directory).expect("the directory is writable");
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o755)).expect("it is ours");
    let socket = directory.join("dstack.sock");
    guest_agent(&socket);
    let closed = "/run/cvm-dstack/dstack.sock";

    // As the compose file mounts it; beside it the control: the same socket in a place that is open.
    let machine = product(HEALTHY).bind(&socket, closed).bind(&socket, "/srv/open.sock").start();
    machine.service_in("gateway", &["ready"]);
    assert!(answers(&machine, &AGENT, "/srv/open.sock"), "the control");
    assert!(!answers(&machine, &AGENT, closed));
    assert!(answers(&machine, &[], closed));
    assert_eq!(machine.lines_with("dstack"), 0, "{}", machine.output());

    // As older files do: alone, under the name of its predecessor, and with its directory.
    let machine = machine.again(|builder| {
        builder
            .unbind(closed)
            .bind(&socket, "/run/dstack.sock")
            .bind(&socket, "/run/tappd.sock")
            .bind(&directory, "/run/dstack")
    });
    machine.service_in("gateway", &["ready"]);
    for usual in ["/run/dstack.sock", "/var/run/dstack.sock", "/run/dstack/dstack.sock", "/run/tappd.sock"] {
        assert!(!answers(&machine, &AGENT, usual) && !answers(&machine, &[], usual), "{usual}");
    }
    assert!(!answers(&machine, &AGENT, closed));
    assert!(answers(&machine, &[], closed));
    machine
        .line("dstack's socket was mounted at /var/run/dstack.sock, where the agent can use it; it is moved");
    assert!(machine.status()["remarks"].to_string().contains("mount it there"));
    let mode = |path: &Path| fs::metadata(path).expect("it is there").mode() & 0o7777;
    assert_eq!((mode(&directory), mode(&socket)), (0o755, 0o777), "the host's own");
}

#[test]
fn a_guest_agent_that_cannot_be_taken_away_keeps_the_gateway_from_starting_and_no_shell() {
    let host = tempfile::tempdir().expect("a temporary directory");
    let socket = host.path().join("dstack.sock");
    guest_agent(&socket);
    let machine = product(HEALTHY)
        .bind(&socket, "/run/dstack.sock")
        .command(&["/usr/bin/setpriv", "--bounding-set=-sys_admin", "/usr/local/sbin/cvm-init"])
        .start();
    let gateway = machine.service_in("gateway", &["blocked"]);
    machine.line("Boot step home failed: dstack's socket is at /var/run/dstack.sock");
    let why = machine.service("gateway")["why"].to_string();
    assert!(why.contains("mount it at /run/cvm-dstack/dstack.sock"), "{why}\n{gateway:#}");
    machine.service_in("sshd", &["up"]);
    machine.ok(&["umount", "/run/dstack.sock"]);
    machine.ok(&["cvm", "start", "gateway"]);
    machine.service_in("gateway", &["ready"]);
}
