//! Where secrets must not be: environments, command lines, logs, files, and the memory of process 1.

use cvm_harness::evidence::{assert_has_forgotten, assert_process_1_has_forgotten, contains, files};
use cvm_harness::machine::{GATEWAY_TOKEN, HEALTHY, MASTER_KEY, PATIENCE, base64, binaries};
use cvm_harness::{Builder, Machine, until};
use std::fs::Permissions;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::process::Stdio;

const AWS: &str = "aws-canary-93f0d2c4b7e1";
const REGISTER: &str = "register-canary-17c9e0aa42";
const REDPILL: &str = "redpill-canary-6e20f1b3";
const CONFIG: &str = "config-canary-c0ffee11";

fn machine() -> Machine {
    configured().ready()
}

fn configured() -> Builder {
    let config = format!("{{\"note\":\"{CONFIG}\"}}");
    Builder::product()
        .fake_gateway(HEALTHY)
        .environment("MASTER_KEY", MASTER_KEY)
        .environment("AWS_SECRET_ACCESS_KEY", AWS)
        .environment("MUX_BASE_URL", "https://mux.example.org")
        .environment("MUX_INBOUND_URL", "https://me.example.org/v1/mux/inbound")
        .environment("MUX_REGISTER_KEY", REGISTER)
        .environment("REDPILL_API_KEY", REDPILL)
        .environment("OPENCLAW_CONFIG_B64", &base64(config))
        .environment("LOG_LEVEL", "trace")
        .environment("LOG_SERVICES", "1")
}

/// Everything in /proc of every process that a root shell could look at, by file.
fn proc_files(machine: &Machine, file: &str) -> Vec<(String, Vec<u8>)> {
    let processes = machine.processes();
    processes
        .iter()
        .filter_map(|p| {
            let bytes = std::fs::read(machine.path(&format!("/proc/{}/{file}", p.pid))).ok()?;
            Some((format!("{file} of {} ({})", p.pid, p.arguments), bytes))
        })
        .collect()
}

#[test]
fn the_environment_of_process_1_shows_nothing() {
    let machine = machine();
    let shown = std::fs::read(machine.path("/proc/1/environ")).expect("root may read it");
    let shown = String::from_utf8_lossy(&shown).into_owned();
    let names: Vec<&str> =
        shown.split('\0').filter_map(|v| v.split('=').next()).filter(|n| !n.is_empty()).collect();
    assert_eq!(names, ["CVM_HANDOVER_FD"]);
}

#[test]
fn no_process_shows_the_master_key_or_what_is_not_its_own() {
    let machine = machine();
    let all: Vec<_> = ["environ", "cmdline"].iter().flat_map(|f| proc_files(&machine, f)).collect();
    assert!(all.len() > 6, "{} files", all.len());
    for (place, bytes) in &all {
        for secret in [MASTER_KEY, AWS, REGISTER, CONFIG] {
            assert!(!contains(bytes, secret), "{secret} is in {place}");
        }
        // The model key is the gateway's: its keeper and itself, nobody else.
        let may = place.contains("gateway") || place.contains("http 18789");
        assert!(may || !contains(bytes, REDPILL), "{REDPILL} is in {place}");
    }
}

#[test]
fn no_log_and_no_file_holds_a_secret() {
    let mut machine = machine();
    let found: Vec<_> = ["/run", "/tmp", "/var/log", "/root/.ssh", "/home", "/etc/docker"]
        .iter()
        .flat_map(|d| files(&machine.path(d)))
        .collect();
    assert!(found.iter().any(|(name, _)| name.ends_with("supervisor.log")));
    for (name, bytes) in &found {
        for secret in [MASTER_KEY, AWS, REGISTER, REDPILL] {
            assert!(!contains(bytes, secret), "{secret} is in {name}");
        }
    }
    for (name, bytes) in files(&machine.path("/data")) {
        for secret in [MASTER_KEY, AWS, REGISTER, REDPILL] {
            assert!(!contains(&bytes, secret), "{secret} is in {name}");
        }
    }
    assert_eq!(machine.stop(), 0);
    for secret in [MASTER_KEY, AWS, REGISTER, REDPILL, CONFIG] {
        assert!(!machine.output().contains(secret), "{secret} was printed");
    }
}

#[test]
fn the_master_key_is_not_in_the_memory_of_process_1_after_the_boot() {
    let machine = machine();
    assert_process_1_has_forgotten(&machine, &[MASTER_KEY, AWS]);
}

#[test]
fn a_keeper_forgets_what_it_gave_its_program() {
    let machine = machine();
    let keeper = machine.find("cvm-keeper gateway").expect("the gateway has a keeper");
    let mut forms = vec![REDPILL.to_owned()];
    // As it lies in base64, wherever in a group of three bytes it begins.
    forms.extend((0..3).map(|before| {
        let text = base64(format!("{}{REDPILL}", "=".repeat(before)));
        text[4..text.len() - 4].to_owned()
    }));
    assert_has_forgotten(machine.outside(i64::from(keeper.pid)), &forms);
}

/// Where root may not trace, as in the container of the compose file, only a process that keeps
/// itself private is safe from another one of root's. Newer kernels show an environment also to
/// whoever may watch performance.
#[test]
fn root_without_the_right_to_trace_reads_none_of_our_processes() {
    const NOT_TRACING: [&str; 3] = [
        "/usr/bin/setpriv",
        "--bounding-set=-sys_ptrace,-sys_admin,-perfmon",
        "--inh-caps=-sys_ptrace,-sys_admin,-perfmon",
    ];
    let not_tracing = |words: &[&'static str]| [&NOT_TRACING[..], words].concat();
    let lib = "/usr/local/lib/openclaw-cvm";
    let machine = configured()
        .bind(&binaries().join("cvm-storage"), &format!("{lib}/cvm-storage"))
        .command(&not_tracing(&["/usr/local/sbin/cvm-init"]))
        .ready();
    // What does not stay by itself: one that follows a log, and two that wait for their input.
    let mut waiting: Vec<_> = [
        "exec cvm logs --follow gateway",
        "exec /usr/local/lib/openclaw-cvm/cvm-task waits 3>/dev/null",
        "exec /usr/local/lib/openclaw-cvm/cvm-storage restore /tmp/restored",
    ]
    .map(|script| {
        let mut command = machine.command(&not_tracing(&["sh", "-c", script]));
        command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("nsenter runs")
    })
    .into();
    let reads = |pid: i32| {
        ["environ", "mem"].map(|file| {
            let script = format!(": < /proc/{pid}/{file}");
            machine.exec(&[&NOT_TRACING[..], &["sh", "-c", &script]].concat()).status.success()
        })
    };
    let neither = [false, false];
    for name in ["cvm-keeper gateway", "cvm logs", "cvm-task waits", "cvm-storage restore", "cvm-mux"] {
        until(&format!("{name} keeps itself private"), PATIENCE, || {
            machine.find(name).is_some_and(|process| reads(process.pid) == neither).then_some(())
        });
    }
    assert_eq!(reads(1), neither);
    for process in machine.processes().iter().filter(|p| p.arguments.starts_with("cvm-keeper")) {
        assert_eq!(reads(process.pid), neither, "{}", process.arguments);
        let limits = machine.read(&format!("/proc/{}/limits", process.pid));
        let core = limits.lines().find(|l| l.starts_with("Max core file size")).expect("a limit");
        assert_eq!(core.split_ascii_whitespace().nth(4), Some("0"), "{core}");
    }
    // What does not is read.
    let sshd = machine.find("/usr/sbin/sshd -D").expect("sshd runs");
    assert_eq!(reads(sshd.pid), [true, true]);
    for process in &mut waiting {
        drop(process.stdin.take());
        process.kill().expect("it is our child");
        process.wait().expect("it is our child");
    }
}

#[test]
fn a_wrong_configuration_is_reported_without_its_values() {
    let mut machine = Builder::product()
        .environment("MASTER_KEY", MASTER_KEY)
        .environment("REDPILL_API_KEY", &format!("{REDPILL} with spaces"))
        .environment("OPENCLAW_CONFIG_B64", &base64(format!("[\"{CONFIG}\"]")))
        .environment("OPENCLAW_GATEWAY_TOKEN", "token-canary-aa31")
        .environment("SSH_PORT", "none")
        .start();
    assert_eq!(machine.wait(), 78);
    let output = machine.output();
    for name in ["REDPILL_API_KEY", "OPENCLAW_CONFIG_B64", "OPENCLAW_GATEWAY_TOKEN", "SSH_PORT"] {
        assert!(output.contains(name), "{name} is not named in:\n{output}");
    }
    for secret in [MASTER_KEY, REDPILL, CONFIG, "token-canary-aa31"] {
        assert!(!output.contains(secret), "{secret} was printed");
    }
}

/// Leaves what the agent can read of these files, and the token that was derived.
const READER: &str = "#!/bin/sh\ncd /data/openclaw\ncat /run/secrets/master >of-master\ncat /run/secrets/other >of-other\n\
                      printf %s \"$OPENCLAW_GATEWAY_TOKEN\" >token\nexec cvm-victim http 18789\n";

#[track_caller]
fn token_of(machine: &Machine) -> String {
    machine.service_in("gateway", &["ready"]);
    machine.read("/data/openclaw/token")
}

#[test]
fn secrets_may_come_in_files() {
    let machine = Builder::product()
        .fake_gateway(READER)
        .file("/run/secrets/master", &format!("{MASTER_KEY}\n"), 0o400)
        .environment("MASTER_KEY_FILE", "/run/secrets/master")
        .start();
    assert_eq!(token_of(&machine), GATEWAY_TOKEN);
    assert!(!machine.output().contains("MASTER_KEY_FILE:"), "{}", machine.output());
}

/// A secret of docker compose is a file of the host, with the owner and mode that it has there.
#[test]
fn a_secret_that_everybody_may_read_is_hidden_from_the_agent() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    for name in ["master", "other"] {
        let file = dir.path().join(name);
        std::fs::write(&file, format!("{MASTER_KEY}\n")).expect("the directory is writable");
        std::fs::set_permissions(&file, Permissions::from_mode(0o444)).expect("it is ours");
        chown(&file, Some(1000), Some(1000)).expect("tests run as root");
    }
    let machine = Builder::product()
        .fake_gateway(READER)
        .bind(&dir.path().join("master"), "/run/secrets/master:ro")
        // The control: the same file, which no variable names.
        .bind(&dir.path().join("other"), "/run/secrets/other:ro")
        .environment("MASTER_KEY_FILE", "/run/secrets/master")
        .start();
    assert_eq!(token_of(&machine), GATEWAY_TOKEN);
    assert_eq!(machine.read("/data/openclaw/of-master"), "");
    assert_eq!(machine.read("/data/openclaw/of-other"), format!("{MASTER_KEY}\n"));
    machine.line("INFO  MASTER_KEY_FILE: others than root can read the file itself");
    // What root runs there finds what it expects; the copy has no other name; the host's file is as it was.
    assert_eq!(machine.ok(&["stat", "-c", "%a %u", "/run/secrets/master"]).trim(), "400 0");
    assert_eq!(machine.ok(&["cat", "/run/secrets/master"]), format!("{MASTER_KEY}\n"));
    assert!(!machine.path("/run/openclaw-cvm/secret").exists());
    let meta = std::fs::metadata(dir.path().join("master")).expect("it is there");
    assert_eq!((meta.uid(), meta.mode() & 0o7777), (1000, 0o444));
    assert_eq!(machine.exec(&["cvm-init", "--check"]).status.code(), Some(0));
}

#[test]
fn a_secret_that_cannot_be_hidden_is_refused_with_the_remedy() {
    let without_rights = ["/usr/bin/setpriv", "--bounding-set=-sys_admin"];
    let init = "/usr/local/sbin/cvm-init";
    for (last, status) in [(&[init][..], 78), (&[init, "--check"], 78)] {
        let mut machine = Builder::product()
            .file("/run/secrets/master", &format!("{MASTER_KEY}\n"), 0o444)
            .environment("MASTER_KEY_FILE", "/run/secrets/master")
            .command(&[&without_rights[..], last].concat())
            .start();
        assert_eq!(machine.wait(), status);
        let output = machine.output();
        assert!(output.contains("MASTER_KEY_FILE: names a file that others than root can read"), "{output}");
        assert!(output.contains("mode 0400") && !output.contains(MASTER_KEY), "{output}");
    }
}
