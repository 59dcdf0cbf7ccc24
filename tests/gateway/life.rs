//! The real gateway from the first boot to the last: what it finds, what an operator can do with
//! it, and what it keeps through kills, stops and reboots.
//!
//! A start takes it ten seconds and more, so each test here is a story with few starts, and they
//! take turns.

use cvm_harness::chat::two_agents;
use cvm_harness::machine::{DEVICE_ID, GATEWAY_TOKEN, MASTER_KEY, PATIENCE, base64, repository};
use cvm_harness::{Builder, Machine, Process, Turns, until};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// Somebody who may log in, or `cvm doctor` has something to say.
const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF2IEYeE/uIsINsUkH2mMuP5KUdr4bDd5mRqBOnvyJlo";
/// On a machine that does much else besides.
const STARTS_WITHIN: Duration = Duration::from_secs(180);
static TURNS: Turns = Turns::new();

fn product() -> Builder {
    Builder::product()
        .real_gateway()
        .environment("MASTER_KEY", MASTER_KEY)
        .environment("SSH_AUTHORIZED_KEYS", KEY)
}

/// Waits until the gateway is in one of `states`; says what it wrote when that never comes.
#[track_caller]
fn reaches(machine: &Machine, states: &[&str]) -> Value {
    let told = || {
        format!(
            "{}\nthe gateway said:\n{}",
            machine.output(),
            machine.read("/var/log/openclaw-cvm/gateway.log")
        )
    };
    let deadline = std::time::Instant::now() + STARTS_WITHIN;
    until(&format!("the gateway is in {states:?}"), STARTS_WITHIN * 2, || {
        let gateway = machine.service("gateway");
        assert!(std::time::Instant::now() < deadline, "{gateway:#}\n{}", told());
        states.iter().any(|s| gateway["state"] == *s).then_some(gateway)
    })
}

#[track_caller]
fn ready(machine: &Machine) -> i64 {
    reaches(machine, &["ready"])["pid"].as_i64().expect("a running gateway has a pid")
}

/// Waits for a ready gateway that is another process than `old`.
#[track_caller]
fn ready_again(machine: &Machine, old: i64) -> i64 {
    until("the old gateway is noticed to be gone", PATIENCE, || {
        (machine.service("gateway")["pid"] != old).then_some(())
    });
    ready(machine)
}

fn config(machine: &Machine) -> PathBuf {
    machine.data().join("openclaw/openclaw.json")
}

/// Everything that runs as the gateway's user.
fn of_the_gateway(machine: &Machine) -> Vec<Process> {
    let user = fs::metadata(machine.data().join("openclaw")).expect("the state is there").uid();
    assert_ne!(user, 0, "the gateway must not be root");
    let owner = |p: &Process| fs::metadata(machine.path(&format!("/proc/{}", p.pid))).ok().map(|m| m.uid());
    machine.processes().into_iter().filter(|p| owner(p) == Some(user)).collect()
}

/// What in the state does not belong to the gateway's user.
fn foreign(machine: &Machine) -> Vec<PathBuf> {
    let top = machine.data().join("openclaw");
    let user = fs::metadata(&top).expect("the state is there").uid();
    let (mut open, mut found) = (vec![top], Vec::new());
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            // What is gone again is nobody's.
            let Ok(stat) = entry.metadata() else { continue };
            if stat.uid() != user {
                found.push(entry.path());
            }
            if stat.is_dir() {
                open.push(entry.path());
            }
        }
    }
    found
}

/// The status of an HTTP request to the gateway.
fn http(machine: &Machine, path: &str, token: Option<&str>) -> String {
    let url = format!("http://127.0.0.1:18789{path}");
    let bearer = format!("Authorization: Bearer {}", token.unwrap_or_default());
    let mut words = vec!["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", &url];
    if token.is_some() {
        words.extend(["-H", &bearer]);
    }
    machine.ok(&words)
}

fn python(script: &str, argument: &Path) -> String {
    let output =
        Command::new("python3").args(["-c", script]).arg(argument).output().expect("python3 is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// The gateway's device, from a copy of its database with what is in the log only.
#[track_caller]
fn device(machine: &Machine) -> String {
    let state = machine.data().join("openclaw/state");
    let copy = tempfile::tempdir().expect("a temporary directory");
    for name in ["openclaw.sqlite", "openclaw.sqlite-wal"] {
        let from = state.join(name);
        if from.exists() {
            fs::copy(&from, copy.path().join(name)).expect("the copy has room");
        }
    }
    let script = "import sqlite3, sys\n\
        rows = sqlite3.connect(sys.argv[1]).execute('SELECT identity_key, device_id FROM device_identities')\n\
        print(dict(rows).get('primary'))";
    python(script, &copy.path().join("openclaw.sqlite"))
}

#[test]
fn a_first_boot_ends_in_a_gateway_that_programs_and_operators_can_use() {
    let _turn = TURNS.take();
    let machine = product().start();
    ready(&machine);

    let written = fs::metadata(config(&machine)).expect("a configuration was written");
    assert_eq!(written.permissions().mode() & 0o7777, 0o600);
    assert_eq!(machine.ok(&["stat", "-c", "%U", "/data/openclaw/openclaw.json"]).trim(), "openclaw");
    assert!(!fs::read_to_string(config(&machine)).expect("it is text").contains(GATEWAY_TOKEN));

    assert_eq!(http(&machine, "/v1/models", None), "401");
    assert_eq!(http(&machine, "/v1/models", Some("zAFTUuSdbC5aQssqJbETwS5oEdhBGc5P")), "401");
    assert_eq!(http(&machine, "/v1/models", Some(GATEWAY_TOKEN)), "200");
    assert_eq!(device(&machine), DEVICE_ID);
    assert!(!machine.data().join("openclaw/identity/device.json").exists());

    // As root and without flags: the supervisor gives the user and the token.
    machine.ok(&["openclaw", "health"]);
    machine.ok(&["openclaw", "channels", "status", "--probe"]);
    assert_eq!(foreign(&machine), Vec::<PathBuf>::new());

    machine.ok(&["cvm", "health"]);
    assert_eq!(machine.ok(&["cvm", "health", "--deep"]), "healthy\n");
    let doctor = machine.exec(&["cvm", "doctor"]);
    let said =
        [&doctor.stdout, &doctor.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    assert_eq!(doctor.status.code(), Some(0), "{said}");
}

#[test]
fn kills_stops_and_reboots_change_neither_configuration_nor_device() {
    let _turn = TURNS.take();
    let mut machine = product().start();
    let first = ready(&machine);
    let bytes = fs::read(config(&machine)).expect("a configuration was written");
    let old: Vec<i32> = of_the_gateway(&machine).iter().map(|p| p.pid).collect();
    assert!(old.len() > 1, "the gateway has helpers: {old:?}");

    machine.kill(first, "KILL");
    ready_again(&machine, first);
    let left: Vec<Process> = machine.processes().into_iter().filter(|p| old.contains(&p.pid)).collect();
    assert!(left.is_empty(), "{left:#?}");
    assert_eq!(fs::read(config(&machine)).expect("it is there"), bytes);
    assert_eq!(device(&machine), DEVICE_ID);

    machine.ok(&["cvm", "stop", "gateway"]);
    assert_eq!(machine.service("gateway")["state"], "stopped");
    assert_eq!(of_the_gateway(&machine), Vec::new());
    assert_eq!(machine.stop(), 0, "{}", machine.output());

    // The owner's hand: a comment is what only a file that nobody wrote again still has.
    let mut edited = bytes;
    edited.extend_from_slice(b"\n// the owner was here\n");
    fs::write(config(&machine), &edited).expect("the volume outlives the machine");
    let mut machine = machine.again(|b| b);
    ready(&machine);
    assert_eq!(fs::read(config(&machine)).expect("it is there"), edited);
    assert_eq!(device(&machine), DEVICE_ID);
    assert_eq!(foreign(&machine), Vec::<PathBuf>::new());
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    machine.line("Stopped in order");
}

#[test]
fn a_refused_configuration_is_mended_by_the_gateways_doctor_or_parks_with_the_reason() {
    let _turn = TURNS.take();
    let builder = product();
    let state = builder.scratch().join("data/openclaw");
    fs::create_dir(&state).expect("the volume is a directory");
    fs::write(state.join("openclaw.json"), "{ \"gateway\": ").expect("the volume is writable");
    let machine = builder.start();

    let gateway = reaches(&machine, &["parked", "ready"]);
    assert_eq!(gateway["state"], "parked", "{gateway:#}");
    assert!(gateway["why"].as_str().is_some_and(|why| why.contains("78")), "{gateway:#}");
    assert!(!machine.exec(&["cvm", "health"]).status.success());
    assert_eq!(fs::read_to_string(config(&machine)).expect("it is there"), "{ \"gateway\": ");

    let unknown = r#"{"gateway":{"mode":"local","bind":"lan","port":18789,"auth":{"mode":"token","token":"${OPENCLAW_GATEWAY_TOKEN}"}},"nobodyKnowsThis":1}"#;
    fs::write(config(&machine), unknown).expect("the volume is writable");
    machine.ok(&["cvm", "start", "gateway", "--no-wait"]);
    until("the parked gateway is started again", PATIENCE, || {
        (machine.service("gateway")["state"] != "parked").then_some(())
    });
    let gateway = reaches(&machine, &["parked", "ready"]);
    assert_eq!(gateway["state"], "ready", "{gateway:#}\n{}", machine.output());
    assert!(!fs::read_to_string(config(&machine)).expect("it is there").contains("nobodyKnowsThis"));
}

#[test]
fn an_agent_whose_database_the_gateway_refuses_is_found_by_a_deep_look() {
    let _turn = TURNS.take();
    let mut machine = product().environment("OPENCLAW_CONFIG_B64", &two_agents()).start();
    ready(&machine);
    assert_eq!(machine.ok(&["cvm", "health", "--deep"]), "healthy\n");
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    // At its first start it would refuse to migrate a state with this, and stop.
    let of_bob = machine.data().join("openclaw/agents/bob/agent");
    fs::create_dir_all(&of_bob).expect("the volume outlives the machine");
    fs::write(of_bob.join("openclaw-agent.sqlite"), "no database").expect("the volume outlives the machine");

    let machine = machine.again(|b| b);
    ready(&machine);
    // It goes on for the other agents, and calls itself ready.
    assert_eq!(http(&machine, "/readyz", None), "200");
    machine.ok(&["cvm", "health"]);
    let deep = machine.exec(&["cvm", "health", "--deep"]);
    let said = String::from_utf8_lossy(&deep.stdout).into_owned();
    assert_eq!(deep.status.code(), Some(1), "{said}");
    assert!(said.contains("does not list the sessions of bob: 400 file is not a database"), "{said}");
}

#[test]
fn what_the_owner_gives_for_the_first_boot_is_used_then_and_never_again() {
    let _turn = TURNS.take();
    let own = r#"{
  "gateway": {"mode": "local", "bind": "lan", "port": 18789, "auth": {"mode": "token", "token": "${OPENCLAW_GATEWAY_TOKEN}"}},
  "update":   {"checkOnStart": false}
}
"#;
    let mut machine = product()
        .environment("OPENCLAW_CONFIG_B64", &base64(own))
        .environment("OPENCLAW_WORKSPACE_FILES_B64", &base64(r#"{"AGENTS.md":"be kind","notes/one.md":"1"}"#))
        .start();
    ready(&machine);
    assert_eq!(fs::read_to_string(config(&machine)).expect("it is there"), own);
    assert_eq!(machine.read("/data/openclaw/workspace/AGENTS.md"), "be kind");
    assert_eq!(machine.read("/data/openclaw/workspace/notes/one.md"), "1");
    assert_eq!(device(&machine), DEVICE_ID);
    assert_eq!(machine.stop(), 0, "{}", machine.output());

    // A state whose database holds no device: a legacy file would keep the gateway from starting.
    let forget = "import sqlite3, sys\n\
        db = sqlite3.connect(sys.argv[1])\n\
        db.execute('DELETE FROM device_identities')\n\
        db.commit()\n\
        db.close()";
    python(forget, &machine.data().join("openclaw/state/openclaw.sqlite"));
    let edited = format!("{own}\n\n");
    fs::write(config(&machine), &edited).expect("the volume outlives the machine");
    let machine = machine.again(|b| b);
    ready(&machine);
    assert_eq!(fs::read_to_string(config(&machine)).expect("it is there"), edited);
    assert_eq!(device(&machine), DEVICE_ID);
    assert!(!machine.data().join("openclaw/identity/device.json").exists());
    assert_eq!(foreign(&machine), Vec::<PathBuf>::new());
    assert_eq!(machine.service("gateway")["restarts"], 0);
}

#[test]
fn the_demo_with_a_bucket_sees_all_that_it_promises() {
    let _turn = TURNS.take();
    let demo = Command::new(repository().join("tests/demo"))
        .arg("s3")
        .env_remove("MASTER_KEY")
        .stdin(Stdio::null())
        .output()
        .expect("the demo runs");
    let said = String::from_utf8_lossy(&demo.stdout);
    assert!(demo.status.success(), "{said}\n{}", String::from_utf8_lossy(&demo.stderr));
    assert!(said.contains("== Everything came back") && !said.contains("   NOT  "), "{said}");
}
