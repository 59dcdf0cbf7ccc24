//! A service that ends, hangs or is killed: why, when it comes back, and what is left of it.

use crate::fixtures::{Backoff, assert_no_zombies, kill_again_and_again, product};
use cvm_harness::machine::{HEALTHY, MASTER_KEY, PATIENCE};
use cvm_harness::{Builder, rounds, until};
use cvm_needs::{Need, skip};
use std::fs;
use std::path::{Path, PathBuf};

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
        .environment("MASTER_KEY", MASTER_KEY)
        .file(cvm_protocol::paths::NODE, "not a program", 0o644)
        .start();
    absent.line("gateway: could not start: executing the program: Permission denied");
}

#[test]
fn a_gateway_that_runs_but_does_not_answer_is_restarted_and_the_reason_says_so() {
    let machine = product(HEALTHY).environment("OPENCLAW_GATEWAY_LIVENESS_TIMEOUT", "1").start();
    let first = machine.pid_of("gateway");
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
    let gateway = machine.pid_of("gateway");
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
    let machine = product(script).ready();
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

#[test]
fn each_service_comes_back_from_kill_9_again_and_again() {
    let machine = product(HEALTHY).environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "0").start();
    kill_again_and_again(&machine, "gateway", rounds(100, 1000), Backoff::Waits);
    let gateways = || machine.processes().iter().filter(|p| p.arguments.contains("cvm-victim http")).count();
    // The last shell may not have executed it yet.
    until("a gateway runs", PATIENCE, || (gateways() > 0).then_some(()));
    assert_eq!(gateways(), 1);
    assert_no_zombies(&machine);
    kill_again_and_again(&machine, "sshd", rounds(100, 1000), Backoff::IsSkipped);
    assert_no_zombies(&machine);
}

#[test]
fn a_gateway_that_works_may_take_longer_than_its_start_timeout() {
    let script = "#!/bin/sh\nuntil [ -e /data/openclaw/enough ]; do\n\
        i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done; sleep 0.1; done\nexec cvm-victim http 18789\n";
    // Two looks at its work fall into each of these spans.
    let mut machine = product(script).environment("OPENCLAW_GATEWAY_START_TIMEOUT", "11").start();
    let pid = machine.pid_of("gateway");
    until("it has run for longer than that", PATIENCE, || {
        (machine.service("gateway")["up_ms"].as_u64() > Some(23_000)).then_some(())
    });
    assert_eq!(machine.pid_of("gateway"), pid, "{}", machine.output());
    machine.ok(&["touch", "/data/openclaw/enough"]);
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
}

/// Lives, and is not ready because of the database of its only agent. The real gateway says so of one whose
/// inspection takes longer than 300 s or fails after that; one that is plainly broken keeps it from starting.
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
fn ten_thousand_orphans_disturb_nothing() {
    let machine = product(HEALTHY).start();
    let before = machine.pid_of("gateway");
    machine.ok(&["cvm-victim", "orphans", "10000"]);
    assert_no_zombies(&machine);
    assert_eq!(machine.pid_of("gateway"), before);
    assert_eq!(machine.service("gateway")["restarts"], 0);
}

#[test]
fn an_operator_stops_starts_and_restarts_a_service() {
    let machine = product(HEALTHY).start();
    let first = machine.pid_of("gateway");
    machine.ok(&["cvm", "stop", "gateway"]);
    assert_eq!(machine.service("gateway")["state"], "stopped");
    assert!(machine.find("cvm-victim http").is_none());
    machine.ok(&["cvm", "start", "gateway"]);
    let second = machine.pid_of("gateway");
    machine.ok(&["cvm", "restart", "gateway"]);
    let third = machine.pid_of("gateway");
    assert!(first != second && second != third);
    let health = machine.exec(&["cvm", "health"]);
    assert!(health.status.success());
    let unknown = machine.exec(&["cvm", "restart", "nonsense"]);
    assert!(!unknown.status.success());
    assert!(String::from_utf8_lossy(&unknown.stderr).contains("gateway"), "the known names are listed");
}

/// Forks faster than one walk through /proc takes; bounded, so that a failure of this test
/// is not a failure of the machine it runs on.
const STORM: &str = "#!/bin/sh\n\
    trap '' TERM\n\
    storm() { n=0; while [ $n -lt 600 ]; do n=$((n + 1)); setsid env -i /bin/sleep 300 & done; }\n\
    storm & storm & touch /data/openclaw/storm\nexec cvm-victim http 18789\n";

#[test]
fn a_gateway_that_forks_as_it_dies_leaves_nothing_behind() {
    let mut machine = product(STORM).environment("OPENCLAW_GATEWAY_STOP_TIMEOUT", "1").ready();
    machine.ok(&["cvm", "stop", "gateway"]);
    assert!(machine.find("/bin/sleep 300").is_none(), "{:?}", machine.find("/bin/sleep 300"));
    machine.ok(&["cvm", "start", "gateway"]);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
}

#[test]
fn a_sweep_that_failed_is_made_again() {
    let machine = product(HEALTHY).ready();
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
fn a_gateway_killed_for_want_of_memory_is_said_to_be() {
    // It waits until it has been put into a memory cgroup, and then takes more than that has.
    let script = "#!/bin/sh\nuntil [ -e /data/openclaw/go ]; do sleep 0.1; done\nexec cvm-victim hog 500\n";
    let machine = product(script)
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "600")
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "600")
        .start();
    let pid = machine.service_in("gateway", &["up"])["pid"].as_i64().expect("it runs");
    let Some(group) = MemoryGroup::of(machine.outside(pid).as_raw(), 64 << 20) else {
        skip(Need::MemoryCgroup, "no memory cgroup can be made on this machine");
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
