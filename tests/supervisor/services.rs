//! The supervisor as the real process 1, with real sshd and dockerd and a gateway of the
//! test's choosing.

use cvm_harness::machine::PATIENCE;
use cvm_harness::{Builder, Machine, until};
use nix::sys::signal::Signal;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

const KEY: &str = cvm_harness::machine::MASTER_KEY;

/// Answers on the gateway's port until it is told to stop.
const HEALTHY: &str = "#!/bin/sh\nexec cvm-victim http 18789\n";

fn product(gateway: &str) -> Builder {
    Builder::product()
        .fake_gateway(gateway)
        .environment("MASTER_KEY", KEY)
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
}

fn soak(usual: usize, long: usize) -> usize {
    if std::env::var_os("CVM_SOAK").is_some() { long } else { usual }
}

fn pid_of(machine: &Machine, service: &str) -> i64 {
    machine.service_in(service, &["up", "ready"])["pid"].as_i64().expect("a running service has a pid")
}

#[track_caller]
fn assert_no_zombies(machine: &Machine) {
    until("no zombie is left", PATIENCE, || machine.processes().iter().all(|p| p.state != 'Z').then_some(()));
}

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
    let machine = builder.file(&file.display().to_string(), package, 0o644).start();
    machine.service_in("gateway", &["ready"]);
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
    assert!(!machine.output().contains(KEY));
}

#[test]
fn a_crashing_gateway_waits_as_documented_and_the_reason_is_shown() {
    let machine = product("#!/bin/sh\nexit 3\n").environment("OPENCLAW_GATEWAY_RESTART_DELAY", "30").start();
    let gateway = machine.service_in("gateway", &["waiting"]);
    assert!(gateway["last_end"].as_str().is_some_and(|w| w.starts_with("exited with code 3")), "{gateway:#}");
    let wait = gateway["next_start_in_ms"].as_u64().expect("a waiting service says until when");
    assert!((1..=30_000).contains(&wait));
    machine.line("gateway: exited with code 3; next start in 30 s");
    // An operator need not wait.
    machine.exec(&["cvm", "start", "gateway", "--no-wait"]);
    machine.nth_line("gateway: exited with code 3; next start in 30 s", 2);
}

#[test]
fn sigterm_ends_a_backoff_wait_at_once() {
    let mut machine = product("#!/bin/sh\nexit 3\n")
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "3600")
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "3600")
        .start();
    machine.service_in("gateway", &["waiting"]);
    assert_eq!(machine.stop(), 0);
}

#[test]
fn a_crash_loop_is_called_one() {
    let machine =
        product("#!/bin/sh\nexit 9\n").environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "0").start();
    machine.line("This is a crash loop: 5 failures");
    let status = machine.status();
    assert!(status["unhealthy"].to_string().contains("crash loop"), "{status:#}");
}

#[test]
fn exit_0_that_nobody_asked_for_restarts_at_once() {
    let script =
        "#!/bin/sh\n[ -e /once ] && exec cvm-victim http 18789\ntouch /tmp/x; echo > /data/openclaw/once\n";
    let script = script.replace("/once ]", "/data/openclaw/once ]");
    let machine = product(&script)
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "600")
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "600")
        .start();
    machine.line("without being asked to; starting it again at once");
    machine.service_in("gateway", &["ready"]);
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
fn code_78_runs_the_doctor_once_retries_once_and_parks() {
    let script = "#!/bin/sh\necho \"$*\" >> /data/openclaw/calls\n[ \"$2\" = doctor ] && exit 0\nexit 78\n";
    let machine = product(script).start();
    let gateway = machine.service_in("gateway", &["parked"]);
    assert!(gateway["why"].as_str().is_some_and(|w| w.contains("78")), "{gateway:#}");
    let calls = machine.read("/data/openclaw/calls");
    let kinds: Vec<&str> = calls.lines().filter_map(|l| l.split(' ').nth(1)).collect();
    assert_eq!(kinds, ["gateway", "doctor", "gateway"]);
    assert!(calls.contains("doctor --fix --yes --non-interactive"), "{calls}");
}

#[test]
fn signals_out_of_memory_and_codes_are_told_apart() {
    let machine = product("#!/bin/sh\nexec cvm-victim die 11\n")
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "600")
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "600")
        .start();
    machine.line("gateway: killed by SIGSEGV");
    let absent = Builder::product()
        .environment("MASTER_KEY", KEY)
        .file(cvm_protocol::paths::NODE, "not a program", 0o644)
        .start();
    absent.line("gateway: could not start: executing the program: Permission denied");
}

#[test]
fn a_gateway_that_runs_but_does_not_answer_is_restarted_and_the_reason_says_so() {
    let machine = product(HEALTHY).environment("OPENCLAW_GATEWAY_LIVENESS_TIMEOUT", "1").start();
    let first = pid_of(&machine, "gateway");
    machine.service_in("gateway", &["ready"]);
    machine.kill(first, "USR1");
    machine.line("gateway: no answer to its liveness probe for");
    until("a new gateway runs", PATIENCE, || {
        let gateway = machine.service("gateway");
        (gateway["state"] == "ready" && gateway["pid"] != first).then_some(())
    });
    let gateway = machine.service("gateway");
    assert!(gateway["last_end"].as_str().is_some_and(|w| w.contains("no answer")), "{gateway:#}");
}

#[test]
fn nothing_of_the_old_process_tree_survives_a_restart() {
    let script = "#!/bin/sh\ncvm-victim escape &\nexec cvm-victim http 18789\n";
    let machine = product(script).start();
    let gateway = pid_of(&machine, "gateway");
    let escaped = until("a grandchild has escaped", PATIENCE, || machine.find("escaped"));
    machine.kill(gateway, "KILL");
    until("the escaped one is gone and there is a new one", PATIENCE, || {
        let now: Vec<i32> = machine
            .processes()
            .iter()
            .filter(|p| p.arguments.starts_with("escaped"))
            .map(|p| p.pid)
            .collect();
        (now.len() == 1 && !now.contains(&escaped.pid)).then_some(())
    });
    assert_no_zombies(&machine);
}

#[test]
fn a_killed_keeper_leaves_nothing_behind_and_its_service_comes_back() {
    let script = "#!/bin/sh\nsetsid cvm-victim stubborn &\nexec cvm-victim http 18789\n";
    let machine = product(script).start();
    machine.service_in("gateway", &["ready"]);
    let stubborn = until("its child runs", PATIENCE, || machine.find("cvm-victim stubborn"));
    let keeper = machine.find("cvm-keeper gateway").expect("the gateway has a keeper");
    machine.kill(i64::from(keeper.pid), "KILL");
    until("a new gateway and no old child", PATIENCE, || {
        let all = machine.processes();
        let old = all.iter().any(|p| p.pid == stubborn.pid);
        let new = all.iter().filter(|p| p.arguments.contains("cvm-victim http")).count();
        (!old && new == 1 && machine.service("gateway")["state"] == "ready").then_some(())
    });
    assert_eq!(machine.processes().iter().filter(|p| p.arguments.contains("stubborn")).count(), 1);
}

/// Whether a service comes back by itself, or an operator saves the wait.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Backoff {
    Waits,
    IsSkipped,
}

#[track_caller]
fn kill_again_and_again(machine: &Machine, service: &str, rounds: usize, backoff: Backoff) {
    for round in 0..rounds {
        let pid = pid_of(machine, service);
        machine.kill(pid, "KILL");
        until(&format!("a new {service} in round {round}"), PATIENCE, || {
            let now = machine.service(service);
            if backoff == Backoff::IsSkipped && now["state"] == "waiting" {
                machine.exec(&["cvm", "start", service, "--no-wait"]);
            }
            now["pid"].as_i64().is_some_and(|new| new != pid).then_some(())
        });
    }
}

#[test]
fn each_service_comes_back_from_kill_9_again_and_again() {
    let machine = product(HEALTHY).environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "0").start();
    kill_again_and_again(&machine, "gateway", soak(100, 1000), Backoff::Waits);
    let gateways = || machine.processes().iter().filter(|p| p.arguments.contains("cvm-victim http")).count();
    // The last shell may not have executed it yet.
    until("a gateway runs", PATIENCE, || (gateways() > 0).then_some(()));
    assert_eq!(gateways(), 1);
    assert_no_zombies(&machine);
    kill_again_and_again(&machine, "sshd", soak(100, 1000), Backoff::IsSkipped);
    assert_no_zombies(&machine);
}

/// Waits until a process has SIGTERM in one of its signal masks: blocks, catches or ignores it.
#[track_caller]
fn until_sigterm_is_in(masks: &[&str], machine: &Machine, pid: i64) {
    until(&format!("{pid} has SIGTERM in {masks:?}"), PATIENCE, || {
        let status = machine.read(&format!("/proc/{pid}/status"));
        status
            .lines()
            .filter_map(|line| line.split_once(":\t"))
            .filter(|(name, _)| masks.contains(name))
            .filter_map(|(_, bits)| u64::from_str_radix(bits, 16).ok())
            .any(|bits| bits & (1 << (Signal::SIGTERM as u32 - 1)) != 0)
            .then_some(())
    });
}

#[test]
fn a_gateway_that_ignores_sigterm_is_killed_at_the_end_of_its_budget_and_the_stop_is_clean() {
    let script = "#!/bin/sh\nexec cvm-victim stubborn\n";
    let mut machine = product(script).environment("OPENCLAW_GATEWAY_STOP_TIMEOUT", "1").start();
    machine.service_in("gateway", &["up"]);
    until_sigterm_is_in(&["SigIgn"], &machine, pid_of(&machine, "gateway"));
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    machine.line("did not end within its grace period");
}

#[test]
fn a_gateway_that_works_may_take_longer_than_its_start_timeout() {
    let script = "#!/bin/sh\nuntil [ -e /data/openclaw/enough ]; do\n\
        i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; sleep 0.1; done\nexec cvm-victim http 18789\n";
    // Two looks at its work fall into each of these spans.
    let mut machine = product(script).environment("OPENCLAW_GATEWAY_START_TIMEOUT", "11").start();
    let pid = pid_of(&machine, "gateway");
    until("it has run for longer than that", PATIENCE, || {
        (machine.service("gateway")["up_ms"].as_u64() > Some(23_000)).then_some(())
    });
    assert_eq!(pid_of(&machine, "gateway"), pid, "{}", machine.output());
    machine.ok(&["touch", "/data/openclaw/enough"]);
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
}

/// Lives, and is not ready because of a database, as the real gateway says it.
const REFUSES_A_DATABASE: &str = r#"#!/bin/sh
exec python3 -c '
import http.server
class Gateway(http.server.BaseHTTPRequestHandler):
    def answer(self, code, body):
        self.send_response(code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
    def do_GET(self):
        if self.path == "/readyz":
            self.answer(503, "{\"ready\":false,\"failing\":[\"agent-database:main\"]}")
        else:
            self.answer(200, "{\"ok\":true}")
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(500, "{\"ok\":false,\"error\":{\"message\":\"agent database remains degraded\"}}")
http.server.ThreadingHTTPServer(("127.0.0.1", 18789), Gateway).serve_forever()
'
"#;

#[test]
fn a_database_that_the_gateway_refuses_is_named_in_status_and_found_by_a_deep_look() {
    let machine = product(REFUSES_A_DATABASE).start();
    let gateway = until("the gateway names what it refuses", PATIENCE, || {
        let gateway = machine.service("gateway");
        (gateway["why"] == "not ready: agent-database:main").then_some(gateway)
    });
    assert_eq!(gateway["state"], "up");
    let shown = machine.exec(&["cvm", "status"]);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("agent-database:main"));
    let deep = machine.exec(&["cvm", "health", "--deep"]);
    let said = String::from_utf8_lossy(&deep.stdout).into_owned();
    assert_eq!(deep.status.code(), Some(1));
    assert!(said.contains("does not list its sessions: 500 agent database remains degraded"), "{said}");
    assert!(!machine.output().contains("agent-database"), "what the gateway says is not for the public log");
}

#[test]
fn a_second_sigterm_does_not_wait_any_longer() {
    let script = "#!/bin/sh\nexec cvm-victim stubborn\n";
    let mut machine = product(script).environment("OPENCLAW_GATEWAY_STOP_TIMEOUT", "3600").start();
    machine.service_in("gateway", &["up"]);
    until_sigterm_is_in(&["SigIgn"], &machine, pid_of(&machine, "gateway"));
    machine.signal(Signal::SIGTERM);
    machine.line("Stopping");
    machine.signal(Signal::SIGTERM);
    machine.line("Second stop signal");
    assert_eq!(machine.wait(), 0, "{}", machine.output());
}

#[test]
fn the_gateway_is_stopped_alone_before_its_children() {
    let script = "#!/bin/sh\n\
        (trap 'echo child was told > /data/openclaw/told' TERM; while :; do sleep 0.05; done) &\n\
        trap 'sleep 0.3; [ -e /data/openclaw/told ] || echo alone > /data/openclaw/alone; exit 0' TERM\n\
        touch /data/openclaw/up; while :; do sleep 0.05; done\n";
    let mut machine = product(script).start();
    until("the gateway's trap stands", PATIENCE, || machine.path("/data/openclaw/up").exists().then_some(()));
    let data = machine.data();
    assert_eq!(machine.stop(), 0);
    assert!(data.join("openclaw/alone").exists());
}

#[test]
fn a_stdout_that_nobody_reads_blocks_nothing() {
    let mut machine = product(HEALTHY).environment("LOG_SERVICES", "1").blocked_stdout().start();
    machine.service_in("gateway", &["ready"]);
    let pid = pid_of(&machine, "gateway");
    machine.kill(pid, "KILL");
    until("a new gateway runs", PATIENCE, || (machine.service("gateway")["pid"] != pid).then_some(()));
    assert_eq!(machine.stop(), 0);
}

/// A broken pipe is always writable: waiting for room in it was a busy loop once.
#[test]
fn a_stdout_whose_reader_is_gone_costs_no_time() {
    let mut machine = product(HEALTHY).broken_stdout().start();
    machine.service_in("gateway", &["ready"]);
    // Whoever loops is never found asleep, however little of the processor it gets.
    let is_asleep = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", machine.pid())).expect("process 1 has a stat");
        stat.rsplit_once(')').expect("a name in brackets").1.trim_start().starts_with('S')
    };
    let asleep = (0..100).filter(|_| {
        machine.status();
        std::thread::sleep(std::time::Duration::from_millis(10));
        is_asleep()
    });
    let asleep = asleep.count();
    assert!(asleep > 50, "process 1 was asleep {asleep} times of 100");
    assert_eq!(machine.stop(), 0);
}

#[test]
fn sigterm_is_honoured_at_any_moment_of_a_boot() {
    let rounds = soak(40, 500);
    for round in 0..rounds {
        let mut machine = product(HEALTHY).start();
        // Before that the kernel drops what is sent to a process 1, and it drops it without a word.
        until_sigterm_is_in(&["SigBlk", "SigCgt"], &machine, 1);
        // Spread over the first 60 ms, in which a boot without dockerd is complete.
        let moment = std::time::Duration::from_micros(60_000 * round as u64 / rounds as u64);
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
        .start();
    machine.service_in("gateway", &["ready"]);
    machine.service_in("sshd", &["up", "ready"]);
    assert_eq!(machine.stop(), 0);
    // And on top of itself, after a loss of the machine with the volume kept.
    let machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
}

#[test]
fn ten_thousand_orphans_disturb_nothing() {
    let machine = product(HEALTHY).start();
    let before = pid_of(&machine, "gateway");
    machine.ok(&["cvm-victim", "orphans", "10000"]);
    assert_no_zombies(&machine);
    assert_eq!(pid_of(&machine, "gateway"), before);
    assert_eq!(machine.service("gateway")["restarts"], 0);
}

#[test]
fn services_start_with_no_signal_blocked_or_ignored() {
    let script = "#!/bin/sh\ngrep -E 'Sig(Blk|Ign)' /proc/self/status > /data/openclaw/signals\nexec cvm-victim http 18789\n";
    let machine = product(script).start();
    machine.service_in("gateway", &["ready"]);
    let told = machine.read("/data/openclaw/signals");
    assert_eq!(told.lines().filter(|l| l.ends_with("0000000000000000")).count(), 2, "{told}");
}

#[test]
fn an_operator_stops_starts_and_restarts_a_service() {
    let machine = product(HEALTHY).start();
    let first = pid_of(&machine, "gateway");
    machine.ok(&["cvm", "stop", "gateway"]);
    assert_eq!(machine.service("gateway")["state"], "stopped");
    assert!(machine.find("cvm-victim http").is_none());
    machine.ok(&["cvm", "start", "gateway"]);
    let second = pid_of(&machine, "gateway");
    machine.ok(&["cvm", "restart", "gateway"]);
    let third = pid_of(&machine, "gateway");
    assert!(first != second && second != third);
    let health = machine.exec(&["cvm", "health"]);
    assert!(health.status.success());
    let unknown = machine.exec(&["cvm", "restart", "nonsense"]);
    assert!(!unknown.status.success());
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("gateway"), "the known names are listed");
}

#[test]
fn without_a_master_key_a_random_token_is_made_once_and_kept() {
    let builder = Builder::product().fake_gateway("#!/bin/sh\nprintf %s \"$OPENCLAW_GATEWAY_TOKEN\" > /data/openclaw/seen\nexec cvm-victim http 18789\n").environment("ENABLE_DOCKER", "0");
    let machine = builder.start();
    machine.service_in("gateway", &["ready"]);
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
fn dockerd_comes_up_and_nothing_waited_for_it() {
    let machine = product(HEALTHY).environment("ENABLE_DOCKER", "1").start();
    machine.service_in("gateway", &["ready"]);
    machine.line("Docker daemon ready.");
    let dockerd = machine.service_in("dockerd", &["ready"]);
    let gateway = machine.service("gateway");
    assert!(
        gateway["first_exec_ms"].as_u64() < dockerd["first_ready_ms"].as_u64(),
        "{gateway:#} {dockerd:#}"
    );
}

#[test]
fn dockerd_comes_back_from_kill_9_again_and_again() {
    let machine = product(HEALTHY).environment("ENABLE_DOCKER", "1").start();
    kill_again_and_again(&machine, "dockerd", soak(10, 100), Backoff::IsSkipped);
    assert_no_zombies(&machine);
    assert!(pid_of(&machine, "gateway") > 0);
}

/// Forks faster than one walk through /proc takes; bounded, so that a failure of this test
/// is not a failure of the machine it runs on.
const STORM: &str = "#!/bin/sh\n\
    trap '' TERM\n\
    storm() { n=0; while [ $n -lt 600 ]; do n=$((n + 1)); setsid env -i /bin/sleep 300 & done; }\n\
    storm & storm & touch /data/openclaw/storm\nexec cvm-victim http 18789\n";

#[test]
fn a_gateway_that_forks_as_it_dies_leaves_nothing_behind() {
    let mut machine = product(STORM).environment("OPENCLAW_GATEWAY_STOP_TIMEOUT", "1").start();
    machine.service_in("gateway", &["ready"]);
    machine.ok(&["cvm", "stop", "gateway"]);
    assert!(machine.find("/bin/sleep 300").is_none(), "{:?}", machine.find("/bin/sleep 300"));
    machine.ok(&["cvm", "start", "gateway"]);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
}

#[test]
fn a_sweep_that_failed_is_made_again() {
    let machine = product(HEALTHY).start();
    machine.service_in("gateway", &["ready"]);
    let step = "/usr/local/lib/openclaw-cvm/cvm-task";
    machine.ok(&["mv", step, "/aside"]);
    let keeper = machine.find("cvm-keeper gateway").expect("the gateway has a keeper");
    machine.kill(i64::from(keeper.pid), "KILL");
    machine.service_in("gateway", &["stopping", "stuck"]);
    machine.line("executing the program: No such file");
    machine.ok(&["mv", "/aside", step]);
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
fn a_wrong_configuration_is_status_78_whatever_standard_output_is() {
    let wrong = || product(HEALTHY).environment("LOG_LEVEL", "loud");
    assert_eq!(wrong().broken_stdout().start().wait(), 78);
    assert_eq!(wrong().blocked_stdout().start().wait(), 78);
}

#[test]
fn a_lost_control_socket_is_opened_again() {
    let machine = product(HEALTHY).start();
    let pid = pid_of(&machine, "gateway");
    machine.ok(&["rm", cvm_protocol::paths::CONTROL_SOCKET]);
    // Whatever ends in this machine makes process 1 look after it.
    machine.kill(pid, "KILL");
    assert!(pid_of(&machine, "gateway") != pid);
}

#[test]
fn a_flood_of_output_is_counted_and_does_not_flood_the_supervisors_log() {
    let script =
        "#!/bin/sh\n(while :; do cvm-victim chatty 100000 300; done) &\nexec cvm-victim http 18789\n";
    let machine = product(script).start();
    machine.service_in("gateway", &["ready"]);
    until("lines have been dropped", PATIENCE, || {
        (machine.service("gateway")["dropped_lines"].as_u64() > Some(0)).then_some(())
    });
    machine.ok(&["cvm", "status"]);
    assert!(machine.lines_with("log lines dropped") <= 3, "{}", machine.output());
}

#[test]
fn a_gateway_killed_for_want_of_memory_is_said_to_be() {
    // It waits until it has been put into a memory cgroup, and then takes more than that has.
    let script = "#!/bin/sh\nuntil [ -e /data/openclaw/go ]; do sleep 0.1; done\nexec cvm-victim hog 500\n";
    let machine = product(script)
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "600")
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "600")
        .start();
    let pid = machine.service_in("gateway", &["up"])["pid"].as_i64().expect("it runs");
    let Some(group) = MemoryGroup::of(machine.outside(pid).as_raw(), 64 << 20) else {
        // Not by a macro: those are swallowed when a test passes.
        let _ =
            std::io::stderr().write_all(b"NOT TESTED HERE: no memory cgroup can be made on this machine\n");
        return;
    };
    machine.ok(&["touch", "/data/openclaw/go"]);
    let gateway = machine.service_in("gateway", &["waiting"]);
    drop(group);
    assert!(gateway["last_end"].as_str().is_some_and(|w| w.contains("out of memory")), "{gateway:#}");
}

/// A memory cgroup, version 1 or 2, of this test alone; gone when dropped, if nothing is in it.
struct MemoryGroup(PathBuf);

impl MemoryGroup {
    /// With this process in it. None where none can be made.
    fn of(pid: i32, limit: u64) -> Option<Self> {
        let of_version_1 = Path::new("/sys/fs/cgroup/memory");
        let (root, file) = if of_version_1.is_dir() {
            (of_version_1, "memory.limit_in_bytes")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max")
        };
        let group = Self(root.join(format!("cvm-test-oom-{}", std::process::id())));
        fs::create_dir(&group.0).ok()?;
        fs::write(group.0.join(file), limit.to_string()).ok()?;
        fs::write(group.0.join("cgroup.procs"), pid.to_string()).ok()?;
        Some(group)
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}
