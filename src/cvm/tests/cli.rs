//! The program as an operator meets it: exit codes, streams, pipes that close, and a supervisor
//! that comes and goes.

// Lint exceptions for tests reach only into functions marked as tests, not into their helpers.
#![allow(clippy::unwrap_used)]

mod common;

use common::{cvm, run};
use cvm_needs::{Need, skip};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A step that takes longer hangs, also on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn run_with_input(command: &mut Command, input: &[u8]) -> (i32, String, String) {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
}

/// A fake supervisor.
struct Supervisor {
    _directory: tempfile::TempDir,
    socket: PathBuf,
    asked: Arc<Mutex<Vec<String>>>,
    answers: Arc<Mutex<Vec<String>>>,
}

impl Supervisor {
    /// Sends `answers` one after the other, and the last one for ever.
    fn new(answers: &[String]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("control.sock");
        let supervisor = Self {
            socket: socket.clone(),
            _directory: directory,
            asked: Arc::default(),
            answers: Arc::new(Mutex::new(answers.to_vec())),
        };
        supervisor.listen();
        supervisor
    }

    fn listen(&self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let (asked, answers) = (Arc::clone(&self.asked), Arc::clone(&self.answers));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                asked.lock().unwrap().push(line);
                let mut answers = answers.lock().unwrap();
                let answer = if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() };
                let _ = stream.write_all(answer.as_bytes());
            }
        });
    }

    fn cvm(&self, arguments: &[&str]) -> Command {
        let mut command = cvm(arguments);
        command.env("CVM_CONTROL_SOCKET", &self.socket);
        command
    }
}

fn service(name: &str, state: &str, pid: Option<i32>) -> serde_json::Value {
    serde_json::json!({
        "name": name, "what": "w", "state": state, "why": null, "pid": pid, "up_ms": 1000, "first_exec_ms": 1,
        "first_ready_ms": null, "restarts": 0, "failures_in_a_row": 0, "crash_loop": false, "last_end": null,
        "last_end_ago_ms": null, "next_start_in_ms": null, "next_action": "-", "required": true, "dropped_lines": 0,
    })
}

fn status(healthy: bool, services: &[serde_json::Value]) -> String {
    let unhealthy: &[&str] = if healthy { &[] } else { &["gateway is parked: exit 78"] };
    let value = serde_json::json!({
        "v": 1, "answer": "status", "version": "0.1.0", "phase": "running", "uptime_ms": 5000,
        "storage": { "mode": "local", "meaning": "on the volume" }, "keys": [], "remarks": [], "boot": [],
        "services": services, "healthy": healthy, "unhealthy": unhealthy, "new_field": 7,
    });
    format!("{value}\n")
}

const TAKEN: &str = "{\"v\":1,\"answer\":\"taken\"}\n";

#[test]
fn status_and_health_exit_as_documented() {
    let well = Supervisor::new(&[status(true, &[service("gateway", "ready", Some(7))])]);
    let (code, out, err) = run(&mut well.cvm(&["status"]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("HEALTHY  running, up 5 s"), "{out}");
    assert_eq!(run(&mut well.cvm(&["health"])), (0, "healthy\n".into(), String::new()));

    let ill = Supervisor::new(&[status(false, &[])]);
    let (code, out, _) = run(&mut ill.cvm(&["status"]));
    assert!(code == 1 && out.contains("gateway is parked"), "{out}");
    assert_eq!(run(&mut ill.cvm(&["health"])).0, 1);

    let refused = Supervisor::new(&["{\"v\":1,\"answer\":\"refused\",\"why\":\"no\"}\n".into()]);
    let (code, _, err) = run(&mut refused.cvm(&["status"]));
    assert_eq!((code, err.lines().next()), (4, Some("cvm: status: the supervisor refused: no")));

    let nobody = PathBuf::from("/no/such/socket");
    let away = |command| run(cvm(&[command]).env("CVM_CONTROL_SOCKET", &nobody));
    let (code, out, err) = away("status");
    assert_eq!((code, out.as_str()), (3, ""));
    assert!(
        err.starts_with("cvm: status: the supervisor is not running here") && err.contains("\n  hint: "),
        "{err}"
    );
    // Docker knows no 3.
    assert_eq!(away("health").0, 1);
    assert_eq!(away("restart").0, 2);
    assert_eq!(run(&mut cvm(&["levitate"])).0, 2);
}

#[test]
fn json_is_the_answer_of_the_supervisor() {
    let supervisor = Supervisor::new(&[status(true, &[])]);
    let (code, out, _) = run(&mut supervisor.cvm(&["status", "--json"]));
    let value: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &value["new_field"], value.get("answer")), (0, &7.into(), None));
}

#[test]
fn a_usage_error_has_the_form_of_all_failures_and_help_goes_to_standard_output() {
    let (code, out, err) = run(&mut cvm(&["logs", "--colour"]));
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(err.starts_with("cvm: unexpected argument"), "{err}");
    let (code, out, err) = run(&mut cvm(&["derive", "--help"]));
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.contains("Examples:") && !out.contains('\x1b'), "{out}");
    assert_eq!(run(&mut cvm(&["--version"])).0, 0);
}

#[test]
fn a_restart_is_watched_until_another_process_is_ready() {
    let before = status(true, &[service("gateway", "ready", Some(7))]);
    let stopping = status(false, &[service("gateway", "stopping", Some(7))]);
    let after = status(true, &[service("gateway", "ready", Some(8))]);
    let supervisor = Supervisor::new(&[before, TAKEN.into(), stopping, after]);
    let (code, out, err) = run(&mut supervisor.cvm(&["restart", "gateway"]));
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("gateway: ready, pid 8 (after "), "{out}");
    assert_eq!(err, "gateway: stopping\n");
    assert!(supervisor.asked.lock().unwrap()[1].contains("\"verb\":\"restart\",\"service\":\"gateway\""));
}

#[test]
fn a_service_that_does_not_start_in_time_is_a_failure_with_a_remedy() {
    let starting = status(false, &[service("gateway", "starting", None)]);
    let supervisor = Supervisor::new(&[starting.clone(), TAKEN.into(), starting]);
    let (code, _, err) = run(&mut supervisor.cvm(&["start", "gateway", "--timeout", "0.3"]));
    assert_eq!(code, 1);
    assert!(err.contains("cvm: start gateway: ") && err.contains("cvm logs gateway"), "{err}");
    let (code, out, _) = run(&mut supervisor.cvm(&["start", "gateway", "--no-wait"]));
    assert_eq!(code, 3, "a status is no answer to an order: {out}");
}

#[test]
fn sshd_is_not_stopped_by_accident() {
    let supervisor = Supervisor::new(&[status(true, &[service("sshd", "up", Some(7))])]);
    let (code, _, err) = run(&mut supervisor.cvm(&["stop", "sshd"]));
    assert!(code == 2 && err.contains("--force"), "{err}");
    assert!(supervisor.asked.lock().unwrap().is_empty());
}

#[test]
fn watching_survives_a_supervisor_that_goes_and_comes() {
    let supervisor = Supervisor::new(&[status(true, &[])]);
    let mut child = supervisor.cvm(&["status", "--watch", "0.1", "--json"]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut until = |wanted: &str| {
        let began = Instant::now();
        while began.elapsed() < PATIENCE {
            if lines.next().unwrap().unwrap().contains(wanted) {
                return;
            }
        }
        panic!("no {wanted}");
    };
    until("\"healthy\":true");
    std::fs::remove_file(&supervisor.socket).unwrap();
    until("\"error\":");
    supervisor.listen();
    until("\"healthy\":true");
    end(&mut child);
}

#[test]
fn derive_takes_the_key_from_each_of_its_places() {
    const KEY: &str = "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M=";
    const TOKEN: &str = "zAFTUuSdbC5aQssqJbETwS5oEdhBGc5O\n";
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("key");
    std::fs::write(&file, format!("{KEY}\n")).unwrap();
    let derive = || cvm(&["derive", "gateway-token"]);
    let expected = (0, TOKEN.to_owned(), String::new());
    assert_eq!(run(derive().env("MASTER_KEY", KEY)), expected);
    assert_eq!(run(derive().env("MASTER_KEY_FILE", &file)), expected);
    assert_eq!(run_with_input(&mut derive(), format!("{KEY}\r\n").as_bytes()), expected);
    // An empty variable is an unset one, as everywhere.
    assert_eq!(run_with_input(derive().env("MASTER_KEY", ""), KEY.as_bytes()), expected);
    let mut dash = cvm(&["derive", "gateway-token", "-"]);
    assert_eq!(run_with_input(dash.env("MASTER_KEY", "another key, not this one"), KEY.as_bytes()), expected);
    // In a variable the line break is part of the key.
    assert_ne!(run(derive().env("MASTER_KEY", format!("{KEY}\n"))).1, TOKEN);
}

#[test]
fn derive_warns_as_the_supervisor_does_and_never_shows_the_key() {
    let (code, out, err) = run(cvm(&["derive", "device-id"]).env("MASTER_KEY", " hunter2 "));
    assert_eq!((code, out.len()), (0, 65));
    assert!(err.contains("MASTER_KEY can be guessed") && err.contains("white space"), "{err}");
    assert!(!err.contains("hunter2"));
    let absent = run(cvm(&["derive", "gateway-token"]).env("MASTER_KEY_FILE", "/no/such/hunter2"));
    assert_eq!((absent.0, absent.1.as_str()), (2, ""));
    let err = absent.2;
    assert!(err.contains("MASTER_KEY_FILE: cannot be read") && !err.contains("hunter2"), "{err}");
    let both = run(cvm(&["derive", "gateway-token"]).env("MASTER_KEY", "a").env("MASTER_KEY_FILE", "b"));
    assert_eq!(both.0, 2);
    assert_eq!(run(&mut cvm(&["derive", "gateway-token"])).0, 2, "nothing on standard input");
}

#[test]
fn a_reader_that_has_left_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("big.log"), "line\n".repeat(1_000_000)).unwrap();
    let path = directory.path().to_str().unwrap();
    for arguments in
        [&["logs", "big", "-n", "all", "--directory", path][..], &["completions", "bash"], &["--help"]]
    {
        let mut child = cvm(arguments).spawn().unwrap();
        drop(child.stdout.take());
        let mut err = String::new();
        child.stderr.take().unwrap().read_to_string(&mut err).unwrap();
        assert_eq!((child.wait().unwrap().code(), err.as_str()), (Some(0), ""), "{arguments:?}");
    }
}

#[test]
fn following_goes_on_across_a_rotation_and_ends_with_its_reader() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("gateway.log");
    std::fs::write(&log, "1\n2\n").unwrap();
    let path = directory.path().to_str().unwrap();
    let mut child = cvm(&["logs", "gateway", "-f", "-n", "1", "--directory", path]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert_eq!(lines.next().unwrap().unwrap(), "2");
    let append = |text: &str| {
        std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(&log)
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    };
    append("3\n");
    assert_eq!(lines.next().unwrap().unwrap(), "3");
    std::fs::rename(&log, directory.path().join("gateway.log.1")).unwrap();
    append("4\n");
    assert_eq!(lines.next().unwrap().unwrap(), "4");
    // Without a new line it notices all the same that its reader has left.
    drop(lines);
    let began = Instant::now();
    while began.elapsed() < PATIENCE {
        if let Some(status) = child.try_wait().unwrap() {
            assert_eq!(status.code(), Some(0));
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    end(&mut child);
    panic!("it still follows");
}

#[test]
fn logs_without_a_name_are_listed_and_a_wrong_name_fails_with_the_known_ones() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("supervisor.log"), "2026-11-20T23:59:59.999Z INFO up\n").unwrap();
    let path = directory.path().to_str().unwrap();
    let (code, out, _) = run(&mut cvm(&["logs", "--directory", path]));
    assert!(code == 0 && out.contains("supervisor") && out.contains("2026-11-20T23:59:59.999Z"), "{out}");
    let (code, _, err) = run(&mut cvm(&["logs", "gatway", "--directory", path]));
    assert!(code == 2 && err.contains("there are: supervisor"), "{err}");
}

#[test]
fn under_its_other_name_it_is_openclaw() {
    let directory = tempfile::tempdir().unwrap();
    let link = directory.path().join("openclaw");
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_cvm"), &link).unwrap();
    if std::path::Path::new(cvm_protocol::paths::OPENCLAW).exists() {
        skip(Need::Bare, "the gateway is installed here, and its command line would run");
        return;
    }
    // `cvm` does not read openclaw's arguments: `--version` does not print the version of `cvm`.
    let (code, out, err) = run(Command::new(link).arg("--version").env_clear().stdin(Stdio::null()));
    assert_eq!((code, out.as_str()), (1, ""));
    assert!(err.starts_with("cvm: openclaw: the gateway is not installed here"), "{err}");
}

fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.wait();
}
