//! From process 1's first line to a gateway that may start: log, configuration, steps, and what stands in the way.

use crate::fixtures::{product, until_sigterm_is_in};
use cvm_harness::machine::{HEALTHY, MASTER_KEY, PATIENCE};
use cvm_harness::{Builder, Machine, rounds, until};
use std::fs;
use std::path::Path;

#[test]
fn the_boot_log_has_the_promised_lines_in_order_and_ssh_comes_first() {
    let mut machine = product(HEALTHY).start();
    let lines = [
        "Deriving keys from MASTER_KEY...",
        "Keys derived (crypt password, crypt salt, gateway token).",
        "SSH daemon started.",
        "gateway: ready",
    ];
    // What was said has been read only when it is here.
    for line in lines {
        machine.line(line);
    }
    let log = machine.output();
    let places: Vec<usize> =
        lines.iter().map(|l| log.find(l).unwrap_or_else(|| panic!("{l:?} is missing in:\n{log}"))).collect();
    assert!(places.is_sorted(), "{log}");
    machine.line("Home symlinks created (~/.openclaw, ~/.config → /data)");
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    machine.line("Stopped in order");
}

#[test]
fn a_gateway_older_than_its_state_is_not_started_and_the_status_says_why() {
    let package = r#"{"version":"2026.9.6","openclaw":{"schemaVersions":{"state":18,"agent":23}}}"#;
    let file = Path::new(cvm_protocol::paths::OPENCLAW).with_file_name("package.json");
    let builder = product(HEALTHY).environment("ENABLE_DOCKER", "0");
    let machine = builder.file(&file.display().to_string(), package, 0o644).ready();
    let state = machine.data().join("openclaw/state");
    fs::create_dir_all(&state).expect("the volume is writable");
    let database = state.join("openclaw.sqlite");
    let number = |n: u32| {
        let db = rusqlite::Connection::open(&database).expect("the volume is writable");
        db.pragma_update(None, "user_version", n).expect("it is a database");
    };
    number(19);
    let before = fs::read(&database).expect("it is there");
    let machine = machine.again(|builder| builder);
    let status = until("the boot step has ended", PATIENCE, || {
        let status = machine.status();
        let steps = status["boot"].as_array().cloned().unwrap_or_default();
        steps.into_iter().find(|s| s["name"] == "state" && s["state"] == "failed")
    });
    let why = status["why"].as_str().unwrap_or_default();
    assert!(why.contains("has schema 19 and it knows 18") && why.contains("Use the image"), "{status:#}");
    assert!(status["next_try_in_ms"].is_null(), "{status:#}");
    let shown = machine.ok(&["sh", "-c", "cvm status || true"]);
    let words: Vec<&str> = shown.split_whitespace().collect();
    assert!(words.join(" ").contains("newer than the gateway of this image"), "{shown}");
    assert!(machine.service("gateway")["pid"].is_null());
    assert_eq!(fs::read(&database).expect("it is there"), before);
    // The state of before is back: an operator says go.
    number(18);
    machine.ok(&["cvm", "start", "gateway"]);
    machine.service_in("gateway", &["ready"]);
}

#[test]
fn every_mistake_of_the_configuration_is_said_at_once_and_the_status_is_78() {
    let mut machine = product(HEALTHY)
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "soon")
        .environment("ENABLE_DOCKER", "perhaps")
        .environment("LOG_FORMAT", "xml")
        .start();
    assert_eq!(machine.wait(), 78);
    for name in ["OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "ENABLE_DOCKER", "LOG_FORMAT"] {
        machine.line(name);
    }
    assert!(!machine.output().contains(MASTER_KEY));
}

#[test]
fn a_wrong_configuration_is_status_78_whatever_standard_output_is() {
    let wrong = || product(HEALTHY).environment("LOG_LEVEL", "loud");
    assert_eq!(wrong().broken_stdout().start().wait(), 78);
    assert_eq!(wrong().blocked_stdout().start().wait(), 78);
}

/// What was taken without a word by earlier versions, with the variable that opens it again.
const OPENED: [(&str, &str, &str); 3] = [
    ("MASTER_KEY", "correct horse battery staple", "ALLOW_WEAK_MASTER_KEY"),
    ("MUX_BASE_URL", "http://mux.example.org", "ALLOW_HTTP"),
    ("MUX_INBOUND_URL", "http://me.example.org/v1/mux/inbound", "ALLOW_HTTP"),
];

#[test]
fn what_opens_a_machine_is_refused_or_said_at_each_boot() {
    let init = "/usr/local/sbin/cvm-init";
    let with = |allowed: &[&str], command: &[&str]| {
        let mut builder =
            Builder::product().fake_gateway(HEALTHY).environment("MUX_REGISTER_KEY", "register");
        for (name, value, _) in OPENED {
            builder = builder.environment(name, value);
        }
        allowed.iter().fold(builder, |b, name| b.environment(name, "1")).command(command)
    };
    for command in [&[init][..], &[init, "--check"]] {
        let mut machine = with(&[], command).start();
        assert_eq!(machine.wait(), 78);
        for (name, value, remedy) in OPENED {
            let line = machine.line(&format!("ERROR   {name}: "));
            assert!(line.contains(&format!("{remedy}=1")) && !line.contains(value), "{line}");
        }
    }
    let switches =
        ["ALLOW_WEAK_MASTER_KEY", "ALLOW_HTTP", "ENABLE_DOCKER", "SSH_TRUST_HOST_KEYS", "LOG_SERVICES"];
    let doors = switches.map(|name| format!("{name}=1"));
    let mut check = with(&switches, &[init, "--check"]).start();
    assert_eq!(check.wait(), 0);
    let mut machine = with(&switches, &[init]).start();
    for boot in 1..=2 {
        let status = machine.status();
        let listed = status["doors"].as_array().expect("a list");
        for door in &doors {
            assert!(listed.iter().any(|d| d["name"] == door.as_str()), "{door} in boot {boot}: {listed:?}");
            machine.line(&format!("WARN  Open door: {door}: "));
            check.line(&format!("warning: Open door: {door}: "));
        }
        assert_eq!(listed.len(), doors.len());
        let doctor = machine.exec(&["cvm", "doctor"]).stdout;
        let doctor = String::from_utf8_lossy(&doctor).into_owned();
        assert!(doors.iter().all(|door| doctor.contains(&format!("open door: {door}"))), "{doctor}");
        machine = machine.again(|b| b);
    }
}

#[test]
fn the_gateway_runs_as_no_account_that_has_more_than_it_should() {
    for (user, says) in
        [("root", "must not be root"), ("daemon", "is a system's own"), ("sshd", "is a system's own")]
    {
        let mut machine = product(HEALTHY).environment("OPENCLAW_GATEWAY_USER", user).start();
        assert_eq!(machine.wait(), 78);
        let line = machine.line("OPENCLAW_GATEWAY_USER: ");
        assert!(line.contains(says), "{line}");
    }
}

#[test]
fn sigterm_is_honoured_at_any_moment_of_a_boot() {
    let rounds: u64 = rounds(40, 500);
    for round in 0..rounds {
        let mut machine = product(HEALTHY).start();
        // Before that the kernel drops what is sent to a process 1, and it drops it without a word.
        until_sigterm_is_in(&["SigBlk", "SigCgt"], &machine, 1);
        // Spread over the first 60 ms, in which a boot without dockerd is complete.
        let moment = std::time::Duration::from_micros(60_000 * round / rounds);
        let begun = std::time::Instant::now();
        while begun.elapsed() < moment {
            std::hint::spin_loop();
        }
        assert_eq!(machine.stop(), 0, "round {round}:\n{}", machine.output());
    }
}

#[test]
fn it_starts_on_top_of_every_kind_of_leftover() {
    let mut machine = product(HEALTHY)
        .file("/run/openclaw-cvm/control.sock", "not a socket", 0o644)
        .file("/run/openclaw-cvm/sshd_config", "Nonsense yes\n", 0o000)
        .file("/run/openclaw-cvm/ssh_host_ed25519_key", "half a ke", 0o777)
        .file("/run/docker.pid", "1\n", 0o644)
        .file("/var/log/openclaw-cvm/gateway.log", "old words\n", 0o644)
        .ready();
    machine.service_in("sshd", &["up", "ready"]);
    assert_eq!(machine.stop(), 0);
    // And on top of itself, after a loss of the machine with the volume kept.
    let machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
}

#[test]
fn without_a_master_key_a_random_token_is_made_once_and_kept() {
    let builder = Builder::product().fake_gateway("#!/bin/sh\nprintf %s \"$OPENCLAW_GATEWAY_TOKEN\" > /data/openclaw/seen\nexec cvm-victim http 18789\n").environment("ENABLE_DOCKER", "0");
    let machine = builder.ready();
    machine.line("MASTER_KEY");
    let seen = machine.read("/data/openclaw/seen");
    assert_eq!(seen.len(), 32, "{seen:?}");
    let mode = machine.ok(&["stat", "-c", "%a", "/data/.cvm/gateway-token"]);
    assert_eq!(mode.trim(), "600");
    let fingerprint = |m: &Machine| m.status()["keys"].to_string();
    let host_key = fingerprint(&machine);
    let machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.read("/data/openclaw/seen"), seen);
    assert_eq!(fingerprint(&machine), host_key);
}

#[test]
fn a_boot_step_that_fails_leaves_ssh_up_and_is_tried_again() {
    // A file where the state directory should be.
    let machine = product(HEALTHY).file("/data/openclaw", "in the way", 0o600).start();
    machine.line("SSH daemon started.");
    machine.line("Boot step home failed");
    let gateway = machine.service("gateway");
    assert_eq!(gateway["state"], "blocked", "{gateway:#}");
    machine.ok(&["rm", "/data/openclaw"]);
    machine.exec(&["cvm", "start", "gateway", "--no-wait"]);
    machine.service_in("gateway", &["ready"]);
}

#[test]
fn services_get_no_descriptor_that_process_1_was_started_with() {
    let script = "#!/bin/sh\nls /proc/$$/fd > /data/openclaw/fds\nexec cvm-victim http 18789\n";
    let machine = product(script)
        .command(&["/bin/sh", "-c", "exec 7</dev/null 9>/tmp/leak; exec /usr/local/sbin/cvm-init"])
        .start();
    machine.service_in("gateway", &["ready"]);
    let fds = machine.read("/data/openclaw/fds");
    assert!(fds.lines().any(|fd| fd == "0"), "{fds}");
    // The shell keeps some of its own from 10 on; these two were not its own.
    assert!(fds.lines().all(|fd| !matches!(fd, "7" | "9")), "{fds}");
}

#[test]
fn services_start_with_no_signal_blocked_or_ignored() {
    let script = "#!/bin/sh\ngrep -E 'Sig(Blk|Ign)' /proc/self/status > /data/openclaw/signals\nexec cvm-victim http 18789\n";
    let machine = product(script).ready();
    let told = machine.read("/data/openclaw/signals");
    assert_eq!(told.lines().filter(|l| l.ends_with("0000000000000000")).count(), 2, "{told}");
}
