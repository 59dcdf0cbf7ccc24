//! The way in, with the real sshd and the real ssh: who may come in, what they find, and what
//! does not throw them out.

use cvm_harness::machine::{AS_AGENT, GATEWAY_TOKEN, HEALTHY, MASTER_KEY, PATIENCE, binaries, repository};
use cvm_harness::ssh::{HostKey, known_hosts, listens, make_key};
use cvm_harness::{Builder, Machine, until};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};

const REDPILL: &str = "redpill-canary-6e20f1b3";

/// What an operator has on the laptop: two keys, and the host key derived from `MASTER_KEY`.
struct Laptop {
    home: tempfile::TempDir,
}

impl Laptop {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        for name in ["environment", "mounted"] {
            make_key(&home.path().join(name));
        }
        fs::write(home.path().join("known_hosts"), known_hosts(22)).expect("the directory is writable");
        Self { home }
    }

    fn public(&self, name: &str) -> String {
        fs::read_to_string(self.home.path().join(format!("{name}.pub"))).expect("ssh-keygen wrote it")
    }

    /// A directory as dstack mounts it: read-only, not root's, and open to everybody.
    fn mounted(&self) -> PathBuf {
        let dir = self.home.path().join("dot-ssh");
        fs::create_dir(&dir).expect("the directory is writable");
        let file = dir.join("authorized_keys");
        fs::write(&file, self.public("mounted")).expect("the directory is writable");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).expect("it is ours");
        for path in [&file, &dir] {
            chown(path, Some(1000), Some(1000)).expect("tests run as root");
        }
        dir
    }

    fn machine(&self, gateway: &str) -> Builder {
        Builder::product()
            .fake_gateway(gateway)
            .bind(self.home.path(), "/laptop")
            .environment("MASTER_KEY", MASTER_KEY)
            .environment("REDPILL_API_KEY", REDPILL)
            .environment("SSH_AUTHORIZED_KEYS", &self.public("environment"))
    }
}

/// An ssh that asks nobody and takes no host key but the one that was derived.
fn ssh(machine: &Machine, key: &str, options: &[&str], command: &str) -> Command {
    let host = HostKey::Known("/laptop/known_hosts");
    machine.command(&cvm_harness::ssh::ssh(22, &format!("/laptop/{key}"), host, options, command))
}

fn text(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).join("")
}

#[track_caller]
fn says(machine: &Machine, key: &str, command: &str) -> String {
    let output = ssh(machine, key, &[], command).output().expect("nsenter runs");
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        text(&output),
        machine.read("/var/log/openclaw-cvm/sshd.log")
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until sshd takes connections; yields the listener's pid.
#[track_caller]
fn up(machine: &Machine) -> i64 {
    new_listener(machine, 0)
}

/// Waits for a listener that is not `old`.
#[track_caller]
fn new_listener(machine: &Machine, old: i64) -> i64 {
    until(&format!("an sshd listens; the machine said:\n{}", machine.output()), PATIENCE, || {
        let pid = machine.service("sshd")["pid"].as_i64().filter(|pid| *pid != old)?;
        listens(machine).then_some(pid)
    })
}

/// A /run on a disk outlives the container's process, and the step that takes the keys away may not run.
#[test]
fn the_keys_of_a_former_life_open_nothing_where_the_volume_is_never_asked() {
    let laptop = Laptop::new();
    let step = "/usr/local/lib/openclaw-cvm/cvm-task";
    let without_the_volume = "#!/bin/sh\ntask=$(cat)\ncase $task in *claim*) exit 1;; esac\n\
                              printf '%s\\n' \"$task\" | /real/cvm-task\n";
    let run = laptop.home.path().join("run");
    fs::create_dir(&run).expect("the directory is writable");
    let keys = run.join("authorized_keys");
    fs::write(&keys, laptop.public("environment")).expect("the directory is writable");
    let machine = laptop
        .machine(HEALTHY)
        .bind(&run, "/run/openclaw-cvm")
        .bind(&binaries(), "/real")
        .file(step, without_the_volume, 0o755)
        .start();
    machine.line("Boot step volume failed");
    up(&machine);
    assert!(!keys.exists());
    let tried = ssh(&machine, "environment", &[], "true").output().expect("nsenter runs");
    assert!(text(&tried).contains("Permission denied (publickey)."), "{}", text(&tried));
}

#[test]
fn the_derived_host_key_and_the_owners_key_open_a_useful_and_clean_session() {
    let laptop = Laptop::new();
    let machine = laptop.machine(HEALTHY).start();
    up(&machine);
    assert_eq!(says(&machine, "environment", "id -u").trim(), "0");

    machine.service_in("gateway", &["ready"]);
    assert!(says(&machine, "environment", "cvm status").contains("gateway"));
    assert_eq!(says(&machine, "environment", "command -v openclaw").trim(), "/usr/local/bin/openclaw");
    let environment = says(&machine, "environment", "env");
    assert!(environment.contains("SSH_CONNECTION="), "{environment}");
    for secret in [MASTER_KEY, GATEWAY_TOKEN, REDPILL] {
        assert!(!environment.contains(secret), "{secret} is in the session's environment");
    }

    let without_key =
        ssh(&machine, "environment", &["PubkeyAuthentication=no"], "true").output().expect("nsenter runs");
    assert!(text(&without_key).contains("Permission denied (publickey)."), "{}", text(&without_key));
    let stranger = machine.ok(&["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/laptop/stranger"]);
    assert_eq!(stranger, "");
    assert!(!ssh(&machine, "stranger", &[], "true").output().expect("nsenter runs").status.success());

    // The known_hosts file stays, so this succeeds with the same host key only.
    let machine = machine.again(|b| b);
    up(&machine);
    assert_eq!(says(&machine, "environment", "echo $HOME").trim(), "/root");
}

/// Whoever runs the CVM's host writes what is mounted at /root/.ssh.
#[test]
fn the_hosts_keys_open_no_shell_unless_the_compose_file_trusts_them() {
    let laptop = Laptop::new();
    let mounted = laptop.mounted();
    // What programs that an operator runs as root obey.
    fs::write(mounted.join("config"), "ProxyCommand false\n").expect("the directory is writable");
    let machine = laptop.machine(HEALTHY).bind(&mounted, "/root/.ssh:ro").start();
    up(&machine);
    let tried = ssh(&machine, "mounted", &[], "true").output().expect("nsenter runs");
    assert!(text(&tried).contains("Permission denied (publickey)."), "{}", text(&tried));
    assert_eq!(says(&machine, "environment", "grep -c ProxyCommand /root/.ssh/config || true").trim(), "");
    machine.line("(1), and they open no shell any more");
    let status = says(&machine, "environment", "cvm status");
    assert!(status.contains("ssh keys") && status.contains("SSH_AUTHORIZED_KEYS"), "{status}");
    assert!(!status.contains("OPEN DOORS"), "{status}");

    // The control: with the wall taken away the same key gets in.
    let machine = machine.again(|b| b.environment("SSH_TRUST_HOST_KEYS", "1"));
    up(&machine);
    assert_eq!(says(&machine, "mounted", "grep -c ProxyCommand /root/.ssh/config").trim(), "1");
    machine.line("Open door: SSH_TRUST_HOST_KEYS=1");
    let status = says(&machine, "mounted", "cvm status");
    assert!(status.contains("OPEN DOORS") && status.contains("SSH_TRUST_HOST_KEYS=1"), "{status}");
}

#[test]
fn an_auditor_has_nothing_to_say() {
    let laptop = Laptop::new();
    let machine = laptop.machine(HEALTHY).start();
    up(&machine);
    let auditor = repository().join("target/venv/bin/ssh-audit");
    assert!(auditor.exists(), "{} is missing: run `tests/setup test` first", auditor.display());
    // In the machine's network and outside of its file system, where the auditor is.
    let audit = Command::new("nsenter")
        .args(["-t", &machine.pid().to_string(), "-n", "--"])
        .arg(auditor)
        .args(["--no-colors", "--skip-rate-test", "127.0.0.1"])
        .stdin(Stdio::null())
        .output()
        .expect("nsenter runs");
    let report = text(&audit);
    assert!(audit.status.success(), "{report}");
    assert!(report.contains("(kex)") && report.contains("(key) ssh-ed25519"), "{report}");
    for verdict in ["[fail]", "[warn]"] {
        assert!(!report.contains(verdict), "{report}");
    }
}

#[test]
fn whatever_else_fails_ssh_lets_in_and_says_what() {
    let laptop = Laptop::new();
    let loops = laptop
        .machine("#!/bin/sh\nexit 9\n")
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "0")
        .start();
    let first = up(&loops);
    loops.line("This is a crash loop");
    assert!(says(&loops, "environment", "cvm status --json || true").contains("crash loop"));
    assert_eq!(up(&loops), first);
    drop(loops);

    // A file where the state directory should be: the step can never be done.
    let wrong = laptop.machine(HEALTHY).file("/data/openclaw", "in the way", 0o600).start();
    wrong.line("Boot step home failed");
    up(&wrong);
    let status = says(&wrong, "environment", "cvm status --json || true");
    assert!(status.contains("blocked"), "{status}");
    // The one who came in can mend it.
    says(&wrong, "environment", "rm /data/openclaw && cvm start gateway --no-wait");
    wrong.service_in("gateway", &["ready"]);
}

#[test]
fn an_open_session_outlives_the_listener_and_its_keeper() {
    let laptop = Laptop::new();
    let machine = laptop.machine(HEALTHY).start();
    let listener = up(&machine);
    let command = "echo open; while read line; do echo \"heard $line\"; done; echo closed";
    let mut session = ssh(&machine, "environment", &[], command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("nsenter runs");
    let mut hear = BufReader::new(session.stdout.take().expect("piped")).lines();
    let mut expect = |what: &str| {
        let line = hear.next().expect("the session is open").expect("text");
        assert_eq!(line, what, "{}", machine.output());
    };
    let mut say = session.stdin.take().expect("piped");
    expect("open");

    machine.kill(listener, "KILL");
    let second = new_listener(&machine, listener);
    writeln!(say, "listener").expect("the session is open");
    expect("heard listener");
    assert_eq!(says(&machine, "environment", "echo in").trim(), "in");

    let keeper = machine.find("cvm-keeper sshd").expect("sshd has a keeper");
    machine.kill(i64::from(keeper.pid), "KILL");
    new_listener(&machine, second);
    writeln!(say, "keeper").expect("the session is open");
    expect("heard keeper");
    assert_eq!(says(&machine, "environment", "echo in").trim(), "in");

    drop(say);
    expect("closed");
    assert!(session.wait().expect("it is our child").success());
}

/// tmux and git read their settings below `~/.config`, and run what those say.
#[test]
fn what_the_agent_writes_is_no_setting_of_roots() {
    let laptop = Laptop::new();
    let machine = laptop.machine(HEALTHY).start();
    up(&machine);
    machine.service_in("gateway", &["ready"]);
    let planted = "mkdir -p /data/.config/tmux /data/.config/git
        printf '#!/bin/sh\\nid -u >> /tmp/ran-by-git\\n' > /data/.config/run
        chmod 755 /data/.config/run
        printf 'run-shell \"id -u >> /tmp/ran-by-tmux\"\\n' > /data/.config/tmux/tmux.conf
        printf '[core]\\n\\tfsmonitor = /data/.config/run\\n' > /data/.config/git/config";
    machine.ok(&[&AS_AGENT[..], &["sh", "-c", planted]].concat());
    let shell = "tmux -L a new-session -d 'sleep 30'; tmux -L a kill-server
        git init --quiet /tmp/repository; git -C /tmp/repository status";
    let ran = || machine.read("/tmp/ran-by-tmux") + &machine.read("/tmp/ran-by-git");
    says(&machine, "environment", shell);
    assert_eq!(ran(), "");
    // The control: with the link that versions before made.
    machine.ok(&["sh", "-c", "rm -rf /root/.config; ln -s /data/.config /root/.config"]);
    says(&machine, "environment", shell);
    for by in ["tmux", "git"] {
        assert!(machine.read(&format!("/tmp/ran-by-{by}")).starts_with("0\n"), "{by}: {}", ran());
    }
}

/// Behind dstack's gateway everybody comes from one address.
#[test]
fn an_operator_gets_in_while_two_hundred_strangers_hold_connections() {
    let laptop = Laptop::new();
    let machine = laptop.machine(HEALTHY).start();
    up(&machine);
    let knock = "for n in $(seq 200); do exec {c}<>/dev/tcp/127.0.0.1/22; done; echo all; sleep 1000";
    let mut strangers =
        machine.command(&["bash", "-c", knock]).stdout(Stdio::piped()).spawn().expect("nsenter runs");
    let mut hear = BufReader::new(strangers.stdout.take().expect("piped")).lines();
    assert_eq!(hear.next().expect("a line").expect("text"), "all");
    for _ in 0..3 {
        assert_eq!(says(&machine, "environment", "echo in").trim(), "in");
    }
    strangers.kill().expect("it is our child");
    strangers.wait().expect("it is our child");
}

#[test]
fn nobody_keeps_sshd_from_its_port() {
    let laptop = Laptop::new();
    let machine = laptop.machine(HEALTHY).start();
    up(&machine);
    let seize = [&AS_AGENT[..], &["cvm-victim", "http", "22"]].concat();
    machine.ok(&["cvm", "stop", "sshd", "--force"]);
    // As the compose file has it, the agent may not take it.
    assert!(!machine.exec(&seize).status.success());
    // As an engine has it without that line.
    machine.ok(&["sh", "-c", "echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start"]);
    let mut squatter = machine.command(&seize).stdout(Stdio::null()).spawn().expect("nsenter runs");
    until("the agent holds port 22", PATIENCE, || listens(&machine).then_some(()));
    machine.ok(&["cvm", "start", "sshd"]);
    up(&machine);
    assert_eq!(says(&machine, "environment", "echo in").trim(), "in");
    machine.line("port 22 was held by pid");
    assert!(!squatter.wait().expect("it is our child").success());
}
