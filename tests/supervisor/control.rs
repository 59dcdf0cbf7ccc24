//! The control socket against whoever may come: garbage, half messages, slow readers, crowds.

use crate::fixtures::product;
use cvm_harness::machine::{HEALTHY, PATIENCE};
use cvm_harness::{Machine, until};
use cvm_protocol::control::REQUEST_MAX;
use cvm_protocol::paths;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;

fn machine() -> Machine {
    product(HEALTHY).ready()
}

fn connect(machine: &Machine) -> UnixStream {
    let stream = UnixStream::connect(machine.path(paths::CONTROL_SOCKET)).expect("the socket listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout can be set");
    stream
}

/// Sends bytes and yields everything that comes back before the other side closes.
fn ask(machine: &Machine, bytes: &[u8]) -> String {
    let mut stream = connect(machine);
    // It may be closed on us while we still talk: what came back counts.
    let _ = stream.write_all(bytes);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn is_alive(machine: &Machine) -> bool {
    ask(machine, b"{\"v\":1,\"verb\":\"status\"}\n").contains("\"answer\":\"status\"")
}

#[test]
fn garbage_is_told_what_a_request_is_and_disturbs_nothing() {
    let machine = machine();
    for garbage in [
        &b"\n"[..],
        b"hello\n",
        b"\xff\x00\xfe\n",
        b"{}\n",
        b"{\"v\":1}\n",
        b"{\"v\":1,\"verb\":\"explode\"}\n",
        b"[[[[[[\n",
    ] {
        let answer = ask(&machine, garbage);
        assert!(answer.contains("refused"), "{garbage:?}: {answer}");
    }
    assert!(ask(&machine, b"{\"v\":99,\"verb\":\"status\"}\n").contains("speaks version 1"));
    let endless = vec![b'x'; REQUEST_MAX * 4];
    let answer = ask(&machine, &endless);
    assert!(answer.is_empty() || answer.contains("at most"), "{answer}");
    assert!(is_alive(&machine));
}

#[test]
fn half_a_message_and_silence_are_dropped_in_time() {
    let machine = machine();
    let mut half = connect(&machine);
    half.write_all(b"{\"v\":1,\"ver").expect("the socket takes half a message");
    let mut silent = connect(&machine);
    assert!(is_alive(&machine));
    let mut scrap = Vec::new();
    assert_eq!(half.read_to_end(&mut scrap).ok(), Some(0));
    assert_eq!(silent.read_to_end(&mut scrap).ok(), Some(0));
}

#[test]
fn a_thousand_idle_connections_do_not_keep_an_operator_out() {
    let machine = machine();
    let crowd: Vec<UnixStream> =
        (0..1000).filter_map(|_| UnixStream::connect(machine.path(paths::CONTROL_SOCKET)).ok()).collect();
    assert!(crowd.len() > 500, "only {} connected", crowd.len());
    until("an operator gets an answer", PATIENCE, || is_alive(&machine).then_some(()));
    let fds = std::fs::read_dir(format!("/proc/{}/fd", machine.pid())).expect("fds of process 1").count();
    assert!(fds < 100, "process 1 holds {fds} descriptors");
    drop(crowd);
    assert!(is_alive(&machine));
}

#[test]
fn a_client_that_asks_and_never_reads_holds_nothing_up() {
    let machine = machine();
    let slow: Vec<UnixStream> = (0..20)
        .map(|_| {
            let mut stream = connect(&machine);
            stream.write_all(b"{\"v\":1,\"verb\":\"status\"}\n").expect("the socket takes a request");
            stream
        })
        .collect();
    assert!(is_alive(&machine));
    drop(slow);
}

#[test]
fn only_root_may_speak() {
    let machine = machine();
    let mode =
        |path: &str| std::fs::metadata(machine.path(path)).expect("it exists").permissions().mode() & 0o777;
    assert_eq!(mode(paths::CONTROL_SOCKET), 0o600);
    assert_eq!(mode(paths::RUN), 0o700);
    let other =
        machine.exec(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cvm", "status"]);
    assert_eq!(other.status.code(), Some(3));
}

#[test]
fn requests_in_pieces_are_put_together() {
    let machine = machine();
    let mut stream = connect(&machine);
    for byte in b"{\"v\":1,\"verb\":\"status\"}\n" {
        stream.write_all(&[*byte]).expect("the socket takes a byte");
    }
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer comes");
    assert!(answer.ends_with("}\n"), "{answer}");
}

#[test]
fn a_lost_control_socket_is_opened_again() {
    let machine = product(HEALTHY).start();
    let pid = machine.pid_of("gateway");
    machine.ok(&["rm", paths::CONTROL_SOCKET]);
    // Whatever ends in this machine makes process 1 look after it.
    machine.kill(pid, "KILL");
    assert!(machine.pid_of("gateway") != pid);
}
