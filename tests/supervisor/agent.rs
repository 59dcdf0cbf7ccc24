//! What the agent, any program that runs as the gateway's user, cannot reach; each attack beside a control in which it
//! succeeds.

use cvm_harness::machine::{AS_AGENT, HEALTHY, MASTER_KEY, PATIENCE, owner_word};
use cvm_harness::wait::lock;
use cvm_harness::{Builder, Machine, before, until};
use cvm_needs::{Need, skip};
use cvm_protocol::paths::{NODE, OPENCLAW};
use nix::pty::{OpenptyResult, Winsize, openpty};
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

fn product(gateway: &str) -> Builder {
    Builder::product()
        .fake_gateway(gateway)
        .environment("MASTER_KEY", MASTER_KEY)
        .environment("CVM_OWNER", &owner_word(MASTER_KEY, "0"))
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
    let machine = product(HEALTHY).bind(&socket, closed).bind(&socket, "/srv/open.sock").ready();
    assert!(answers(&machine, &AS_AGENT, "/srv/open.sock"), "the control");
    assert!(!answers(&machine, &AS_AGENT, closed));
    assert!(answers(&machine, &[], closed));
    assert_eq!(machine.lines_with("dstack's socket"), 0, "{}", machine.output());

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
        assert!(!answers(&machine, &AS_AGENT, usual) && !answers(&machine, &[], usual), "{usual}");
    }
    assert!(!answers(&machine, &AS_AGENT, closed));
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

/// What stands in for Node: the gateway, and what an agent may make of `openclaw`.
const SPY: &str = r#"#!/bin/sh
case "$2" in
gateway) exec cvm-victim http 18789 ;;
leave)
    exec 3<&0 >> /data/openclaw/stolen
    (trap '' HUP; exec cat -u <&3) &
    (trap '' HUP; exec cat -u < /dev/tty) &
    (trap '' HUP; exec setsid cat -u <&3) &
    ;;
inject) perl -e 'ioctl(STDIN, 0x5412, $_) for split //, "typed by the agent\n"' ;;
size) stty size; read -r _; stty size ;;
environment) env; exit 7 ;;
esac
"#;

/// An operator's terminal, with whoever sits before it.
struct Terminal {
    keys: File,
    slave: OwnedFd,
    seen: Arc<Mutex<String>>,
}

impl Terminal {
    fn new() -> Self {
        let size = Winsize { ws_row: 33, ws_col: 101, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(&size, None).expect("a terminal");
        let keys = File::from(master);
        let mut screen = keys.try_clone().expect("a descriptor");
        let seen = Arc::new(Mutex::new(String::new()));
        let shown = Arc::clone(&seen);
        std::thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count) = screen.read(&mut piece) {
                let text = String::from_utf8_lossy(&piece[..count]);
                lock(&shown).push_str(&text);
            }
        });
        Self { keys, slave, seen }
    }

    /// A shell of root's in the machine, for which this is the terminal.
    fn shell(&self, machine: &Machine, script: &str) -> Child {
        let end = || Stdio::from(self.slave.try_clone().expect("a descriptor"));
        machine
            .command(&["setsid", "--ctty", "--wait", "sh", "-c", script])
            .env("TERM", "xterm")
            .stdin(end())
            .stdout(end())
            .stderr(end())
            .spawn()
            .expect("nsenter runs")
    }

    fn shown(&self) -> String {
        lock(&self.seen).replace('\r', "")
    }

    /// Waits until the screen shows `text`.
    #[track_caller]
    fn shows(&self, text: &str) {
        let found = before(PATIENCE, || self.shown().contains(text).then_some(()));
        assert!(found.is_some(), "no {text:?} in:\n{}", self.shown());
    }

    fn types(&mut self, text: &str) {
        self.keys.write_all(text.as_bytes()).expect("a terminal");
    }
}

#[test]
fn what_openclaw_leaves_behind_gets_nothing_of_the_operators_terminal() {
    let machine = product(SPY).ready();
    let stolen = || machine.read("/data/openclaw/stolen");
    let mut terminal = Terminal::new();
    let then = "echo \"then $(stty -g)\"; echo ready; read -r line; echo \"read <$line>\"";
    let script = format!("echo \"first $(stty -g)\"; openclaw leave; openclaw inject; {then}");
    let mut shell = terminal.shell(&machine, &script);
    terminal.shows("ready\n");
    let left = |machine: &Machine| machine.processes().iter().filter(|p| p.arguments == "cat -u").count();
    assert_eq!(left(&machine), 0);
    terminal.types("a secret\n");
    terminal.shows("read <a secret>");
    assert!(shell.wait().expect("it is our child").success());
    assert!(!stolen().contains("secret"), "{}", stolen());
    let settings = |when: &str| {
        let shown = terminal.shown();
        shown.lines().find_map(|line| line.strip_prefix(when)).map(str::to_owned).expect("stty says it")
    };
    assert_eq!(settings("first "), settings("then "));

    // The control: the same program on the operator's own terminal.
    let mut terminal = Terminal::new();
    let agents = format!("setpriv --reuid=990 --regid=990 --clear-groups {NODE} {OPENCLAW}");
    let mut shell = terminal.shell(&machine, &format!("{agents} leave; echo left; sleep 1000"));
    terminal.shows("left\n");
    until("the leftovers wait for keys", PATIENCE, || (left(&machine) == 3).then_some(()));
    terminal.types("a secret\n");
    until("one of them has them", PATIENCE, || stolen().contains("a secret").then_some(()));
    shell.kill().expect("it is our child");
    shell.wait().expect("it is our child");
    // Kernels can be told to refuse this to everybody.
    if fs::read_to_string("/proc/sys/dev/tty/legacy_tiocsti").is_ok_and(|on| on.trim() == "1") {
        let terminal = Terminal::new();
        let mut shell =
            terminal.shell(&machine, &format!("{agents} inject; read -r line; echo \"read <$line>\""));
        terminal.shows("read <typed by the agent>");
        shell.wait().expect("it is our child");
    } else {
        skip(Need::Tiocsti, "this kernel lets nobody type into a terminal, so the control is left out");
    }
}

#[test]
fn openclaw_has_a_terminal_as_large_as_the_operators_and_pipes_stay_pipes() {
    let machine = product(SPY).ready();
    let mut terminal = Terminal::new();
    let mut shell = terminal.shell(&machine, "openclaw size");
    terminal.shows("33 101\n");
    let end = Stdio::from(terminal.slave.try_clone().expect("a descriptor"));
    let resized = Command::new("stty").args(["rows", "40", "cols", "90"]).stdin(end).status();
    assert!(resized.expect("stty runs").success());
    terminal.types("\n");
    terminal.shows("40 90\n");
    assert!(shell.wait().expect("it is our child").success());

    // By pipes, with another's exit status and the gateway's environment, whoever asks.
    let environment = |machine: &Machine| {
        let mut command = machine.command(&["cvm", "openclaw", "environment"]);
        let output = command.env("OF_THE_CALLER", "1").env("LC_TIME", "C").output().expect("nsenter runs");
        assert_eq!(output.status.code(), Some(7));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(text.contains("HOME=/home/openclaw\n") && text.contains("LC_TIME=C\n"), "{text}");
        assert!(!text.contains("OF_THE_CALLER"), "{text}");
        text
    };
    assert!(environment(&machine).contains("OPENCLAW_GATEWAY_TOKEN="));
    machine.ok(&["mv", cvm_protocol::paths::CONTROL_SOCKET, "/run/openclaw-cvm/elsewhere"]);
    assert!(!environment(&machine).contains("OPENCLAW_GATEWAY_TOKEN="));
}

#[test]
fn a_file_on_the_volume_lends_nobodys_rights_and_the_gateway_has_limits() {
    let machine = product(HEALTHY).start();
    let pid = machine.service_in("gateway", &["ready"])["pid"].as_i64().expect("it runs");
    let lends = |path: &str| {
        machine.ok(&["sh", "-c", &format!("cp /usr/bin/id {path}; chmod 4755 {path}")]);
        machine.ok(&[&AS_AGENT[..], &[path, "-u"]].concat()).trim() == "0"
    };
    // In /data the agent's own tree is closed to others; its top is not.
    assert!(!lends("/data/borrowed"));
    assert!(lends("/srv/borrowed"), "the control");

    let limits = machine.read(&format!("/proc/{pid}/limits"));
    let of = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("the kernel lists it");
        line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(
        (of("Max processes"), of("Max core file size")),
        (vec!["4096".to_owned(); 2], vec!["0".to_owned(); 2])
    );
    let doctor = machine.exec(&["cvm", "doctor", "--json"]);
    let doctor = String::from_utf8_lossy(&doctor.stdout).into_owned();
    for found in ["(nosuid, nodev)", "only root may take them", "4096 processes and threads of its user"] {
        assert!(doctor.contains(found), "{found}: {doctor}");
    }
}
