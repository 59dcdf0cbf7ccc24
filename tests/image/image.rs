//! The image as users have it: built from this commit, started by the compose file on a machine
//! with a container engine, looked at, broken, and started anew.
//!
//! The binaries in it are those beside the tests, so that they are compiled once; the stage that
//! compiles them otherwise is built with `CVM_SOAK`. Tests take turns: there is one engine.

use cvm_harness::engine::{Engine, IMAGE, SECRET_MARK};
use cvm_harness::machine::{MASTER_KEY, PATIENCE, binaries, owner_word, repository};
use cvm_harness::{Builder, Garage, Network, Proxy, difference, digest, least_safe, until};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

/// The container that the compose file makes.
const CVM: &str = "cvm-openclaw-1";
/// Where containers find their host.
const HOST: &str = "172.17.0.1";
/// A start of the real gateway, on a machine that does much else besides.
const STARTS_WITHIN: Duration = Duration::from_mins(5);
/// All but Node and openclaw, in bytes.
const LARGEST: f64 = 450e6;

/// What labels begin with.
const LABEL: &str = "org.opencontainers.image";
/// Paths that are not the same in two builds of one commit. May only become shorter: none is left,
/// and that is part of its type.
const NOT_REPRODUCIBLE: [&str; 0] = [];
/// What an engine lays into every container, and the directory whose time that changes.
const OF_THE_ENGINE: &[&str] = &["etc", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf"];

/// Past the test runner, which keeps what a test prints to itself.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// One test at a time; nothing where no engine can run.
fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    static BUILT: Once = Once::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(why) = Engine::missing() {
        say(&format!("\n*** SKIPPED: no container engine can run here, so the image is NOT TESTED: {why}\n"));
        return None;
    }
    BUILT.call_once(|| {
        let engine = Engine::builder();
        clean(&engine);
        let given = ["--given", &binaries().display().to_string()];
        engine.build(IMAGE, &[&given[..], if from_nothing() { &["--no-cache"] } else { &[] }].concat());
        // Else every build adds to what the engine keeps.
        engine.docker(&["image", "prune", "--force"]);
        engine.docker(&["builder", "prune", "--force", "--keep-storage", "5GB"]);
    });
    Some(turn)
}

/// Whether the image of all tests is built without what an engine keeps of earlier builds. Where every
/// run begins from nothing that costs no more, and one build less has to be made to compare two.
fn from_nothing() -> bool {
    std::env::var_os("CVM_IMAGE").is_some()
}

/// What an earlier run left.
fn clean(engine: &Engine) {
    for container in engine.docker(&["ps", "--all", "--quiet"]).lines() {
        engine.docker(&["rm", "--force", "--volumes", container]);
    }
    engine.docker(&["volume", "prune", "--force"]);
    engine.docker(&["network", "prune", "--force"]);
}

/// What an operator has: a key that the environment names, and the host key that `MASTER_KEY` gives.
struct Laptop {
    key: String,
    public: String,
    known: String,
}

impl Laptop {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        let key = home.path().join("key");
        let made =
            Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key).status();
        assert!(made.expect("ssh-keygen runs").success());
        let known = Command::new(binaries().join("cvm"))
            .args(["derive", "ssh-known-hosts", "--host", "127.0.0.1", "--port", "1022"])
            .env("MASTER_KEY", MASTER_KEY)
            .output()
            .expect("cvm runs");
        assert!(known.status.success());
        let read = |path: &Path| fs::read_to_string(path).expect("ssh-keygen wrote it");
        Self {
            key: read(&key),
            public: read(&key.with_extension("pub")),
            known: String::from_utf8_lossy(&known.stdout).into_owned(),
        }
    }

    fn engine(&self, network: &Network) -> Engine {
        self.engine_on(network, |host| host)
    }

    fn engine_on(&self, network: &Network, change: impl FnOnce(Builder) -> Builder) -> Engine {
        let engine = Engine::runner(network, |host| {
            change(host).file("/laptop/key", &self.key, 0o600).file("/laptop/known_hosts", &self.known, 0o644)
        });
        clean(&engine);
        engine
    }
}

/// `ssh -p 1022`, which takes no host key but the derived one.
fn ssh(engine: &Engine, command: &str) -> Output {
    let mut words = vec!["ssh", "-F", "none", "-p", "1022", "-i", "/laptop/key"];
    for option in [
        "BatchMode=yes",
        "IdentitiesOnly=yes",
        "StrictHostKeyChecking=yes",
        "UserKnownHostsFile=/laptop/known_hosts",
        "GlobalKnownHostsFile=none",
    ] {
        words.extend(["-o", option]);
    }
    words.extend(["root@127.0.0.1", command]);
    engine.host.exec(&words)
}

#[track_caller]
fn good(what: &str, output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{what}: {}\n{text}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// What the image's own compose does with our compose file.
#[track_caller]
fn compose(engine: &Engine, environment: &[(&str, &str)], words: &[&str]) {
    compose_file(engine, &compose_lines(), environment, words);
}

/// Our compose file with the image of this build and our owner, whatever it has been pinned to.
fn compose_lines() -> Vec<String> {
    let text =
        fs::read_to_string(repository().join("docker-compose.yml")).expect("the compose file is there");
    let ours = |line: &str| match line.split_once(':') {
        Some(("    image", _)) => format!("    image: {IMAGE}"),
        Some((name @ "      CVM_OWNER", _)) => format!("{name}: {}", owner_word(MASTER_KEY, "0")),
        _ => line.to_owned(),
    };
    text.lines().map(ours).collect()
}

#[track_caller]
fn compose_file(engine: &Engine, lines: &[String], environment: &[(&str, &str)], words: &[&str]) {
    let mut all = vec!["run", "--rm", "--interactive", "--network", "none", "--entrypoint", "docker"];
    all.extend(["--volume", "/engine/docker.sock:/run/docker.sock"]);
    let set: Vec<String> = environment
        .iter()
        .chain(&[("MASTER_KEY", MASTER_KEY)])
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    all.extend(set.iter().flat_map(|pair| ["--env", pair.as_str()]));
    all.extend([IMAGE, "compose", "--project-name", "cvm", "--file", "-"]);
    all.extend(words);
    let mut client = engine.client(&all);
    client.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut client = client.spawn().expect("docker runs");
    let mut file = client.stdin.take().expect("stdin is piped");
    file.write_all(lines.join("\n").as_bytes()).expect("compose reads its file");
    drop(file);
    let output = client.wait_with_output().expect("docker is our child");
    good(&format!("compose {words:?}"), &output);
}

/// By `docker exec`.
fn exec(engine: &Engine, words: &[&str]) -> Output {
    engine.try_docker(&[&["exec", CVM], words].concat())
}

#[track_caller]
fn inside(engine: &Engine, words: &[&str]) -> String {
    good(&format!("{words:?} in the container"), &exec(engine, words)).trim_end().to_owned()
}

#[track_caller]
fn healthy(engine: &Engine) {
    let deadline = std::time::Instant::now() + STARTS_WITHIN;
    until("the container is healthy", STARTS_WITHIN * 2, || {
        let health = exec(engine, &["cvm", "health"]);
        assert!(
            std::time::Instant::now() < deadline,
            "not healthy: {}{}\nthe container said:\n{}\nthe gateway said:\n{}",
            String::from_utf8_lossy(&health.stdout),
            String::from_utf8_lossy(&health.stderr),
            log(engine, CVM),
            String::from_utf8_lossy(&exec(engine, &["cvm", "logs", "gateway"]).stdout),
        );
        health.status.success().then_some(())
    });
}

fn log(engine: &Engine, container: &str) -> String {
    let output = engine.try_docker(&["logs", container]);
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Also of a machine that is not healthy.
fn status(engine: &Engine) -> Value {
    serde_json::from_slice(&exec(engine, &["cvm", "status", "--json"]).stdout).unwrap_or_default()
}

/// The gateway's pid, when it has one.
fn gateway(engine: &Engine) -> Option<i64> {
    let status = status(engine);
    status["services"].as_array()?.iter().find(|s| s["name"] == "gateway")?["pid"].as_i64()
}

/// What must be the same in every container that has the same key and state.
#[derive(Debug, PartialEq)]
struct Identity {
    device: String,
    /// Fingerprints of the gateway's token, the host key and the others.
    keys: Value,
    configuration: String,
    /// Every path of ours with mode, owner and time, or target, and every content.
    files: String,
    second_database: String,
}

/// In the workspace, where the gateway changes nothing of its own accord.
const OURS: &str = "/data/openclaw/workspace/ours";

fn identity(engine: &Engine) -> Identity {
    let database = "file:/data/openclaw/state/openclaw.sqlite?mode=ro";
    let query = "SELECT device_id FROM device_identities WHERE identity_key = 'primary'";
    let shell = |script: &str| inside(engine, &["sh", "-c", &format!("cd {OURS} && {script}")]);
    Identity {
        device: inside(engine, &["sqlite3", database, query]),
        keys: status(engine)["keys"].clone(),
        configuration: inside(engine, &["sha256sum", "/data/openclaw/openclaw.json"]),
        // A directory's time, and a database's bytes, are not theirs alone.
        files: shell(
            "find . -type d -printf '%p %y %m %u:%g\\n' -o ! -name 'second.sqlite*' -printf '%p %y %m %u:%g %s %T@ %l\\n' | sort; \
             find . -type f ! -name 'second.sqlite*' -exec sha256sum {} + | sort",
        ),
        second_database: shell("sqlite3 second.sqlite 'PRAGMA integrity_check' .dump"),
    }
}

/// A few of everything.
fn write_ours(engine: &Engine) {
    let script = format!(
        "mkdir -p {OURS}/deep/er {OURS}/empty && cd {OURS} && echo remembered >note.txt && echo secret >private && \
         chmod 600 private && printf '#!/bin/sh\n' >deep/er/run && chmod 755 deep/er/run && chmod 700 deep/er && \
         ln -s deep/er/run link && ln -s nowhere dangling && head -c 3000000 /dev/urandom >large && \
         touch -d 2001-02-03T04:05:06.789 'a name with blanks and ü' && \
         sqlite3 second.sqlite 'PRAGMA journal_mode=wal; CREATE TABLE t(x); INSERT INTO t VALUES (1), (2);'"
    );
    inside(engine, &["runuser", "-u", "openclaw", "--", "sh", "-c", &script]);
}

/// `docker stop`, as long as the compose file lets it take.
#[track_caller]
fn stops_clean(engine: &Engine) {
    engine.docker(&["stop", CVM]);
    assert_eq!(engine.inspect(CVM, ".State.ExitCode"), "0", "{}", log(engine, CVM));
}

#[test]
fn the_image_is_small_and_says_what_it_is_and_holds_no_leftovers() {
    let Some(_turn) = turn() else { return };
    let engine = Engine::runner(&Network::new(), |host| host);
    let run = |words: &[&str]| {
        let options = ["run", "--rm", "--network", "none", "--entrypoint", "sh", IMAGE, "-c"];
        engine.docker(&[&options, words].concat())
    };

    let weights =
        fs::read_to_string(repository().join("target/image/weights.txt")).expect("image/build wrote it");
    say(&format!("\nWhat weighs how much in the image, in MB:\n{weights}"));
    let all_else = weights.lines().find_map(|l| l.strip_suffix("  all but Node and openclaw"));
    let all_else: f64 = all_else.and_then(|n| n.trim().parse().ok()).expect("the table ends with it");
    assert!(all_else * 1e6 <= LARGEST, "{all_else} MB");

    let label = |name: &str| engine.inspect(IMAGE, &format!("index .Config.Labels \"{LABEL}.{name}\""));
    let revision = label("revision");
    match git(&["log", "-1", "--format=%H %cd", "--date=format-local:%Y-%m-%dT%H:%M:%SZ"]) {
        Some(said) => {
            let (commit, date) = said.split_once(' ').expect("two words");
            assert_eq!(revision.trim_end_matches("-dirty"), commit);
            assert_eq!(label("created"), date);
        }
        None => assert_eq!(revision, "unknown"),
    }
    assert_eq!(label("version"), env!("CARGO_PKG_VERSION"));

    let leftovers =
        run(&["find /var/lib/apt/lists /var/cache/apt /var/log /tmp /var/tmp /root/.npm /root/.cargo \
         /etc/ssh/ssh_host_* /run/secrets ! -type d 2>/dev/null; true"]);
    assert_eq!(leftovers, "");
    let compilers = run(&["for each in cc c++ g++ gcc ld as clang make rustc cargo go npm python3; do \
         command -v $each; done; ls -d /opt/openclaw/node_modules/npm 2>/dev/null; true"]);
    assert_eq!(compilers, "");
    // With ours in place of a program of git's.
    let message = ". /usr/lib/git-core/git-sh-i18n; what=it; eval_gettext 'fills $what, ${what}!'";
    assert_eq!(run(&[message]), "fills it, it!");
    assert_eq!(run(&["id -u openclaw; id -g openclaw; id -u openclaw-mux"]), "990\n990\n18790");
    assert_eq!(run(&["ls /usr/local/lib/openclaw-cvm"]), run_names());

    // A control is found, and nothing else.
    let privileged = "touch /tmp/control && chmod 6755 /tmp/control && find / -xdev -perm /6000";
    assert_eq!(run(&[privileged]), "/tmp/control");

    let bill = bill();
    assert_eq!(bill["spdxVersion"], "SPDX-2.3");
    let locators: BTreeSet<&str> = bill["packages"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|p| p["externalRefs"][0]["referenceLocator"].as_str())
        .collect();
    for expected in [
        "pkg:npm/openclaw@",
        "pkg:deb/debian/docker.io@",
        "pkg:cargo/serde@",
        "pkg:golang/github.com/rclone/rclone@",
        "pkg:golang/stdlib@1.",
        "pkg:generic/node@24.",
        "pkg:deb/debian/libstdc%2B%2B6@",
    ] {
        assert!(locators.iter().any(|l| l.starts_with(expected)), "no {expected}");
    }
    assert!(!locators.iter().any(|l| l.contains('+')), "a plus sign that is not escaped");
    let id = engine.inspect(IMAGE, ".Id");
    let id = id.trim_start_matches("sha256:");
    assert!(bill["documentNamespace"].as_str().is_some_and(|name| name.ends_with(id)));
    assert_eq!(bill["packages"][0]["checksums"][0]["checksumValue"], id);
}

fn bill() -> Value {
    let bill = fs::read(repository().join("target/image/sbom.spdx.json")).expect("image/build wrote it");
    serde_json::from_slice(&bill).expect("JSON")
}

/// Both trust stores of the image, Debian's for all and Node's own. What looks at them finds a root that
/// is put beside them.
#[test]
fn no_trust_store_of_the_image_has_a_key_that_has_become_public() {
    let Some(_turn) = turn() else { return };
    let engine = Engine::runner(&Network::new(), |host| host);
    let judge = fs::read_to_string(repository().join("image/distrusted")).expect("a script");
    let debian = "cat /etc/ssl/certs/ca-certificates.crt";
    let node = "node -p 'tls.rootCertificates.join(`\n`)'";
    let found = |store: &str| {
        let script = "eval \"$STORE\" | sh -c \"$JUDGE\"";
        let (store, judge) = (format!("STORE={store}"), format!("JUDGE={judge}"));
        let options = ["run", "--rm", "--network", "none", "--env", &store, "--env", &judge];
        let output =
            engine.try_docker(&[&options[..], &["--entrypoint", "sh", IMAGE, "-c", script]].concat());
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for store in [debian, node] {
        assert_eq!(found(store), "", "{store}");
        let control = format!("{{ {store}; echo '{EMSIGN_G3}'; }}");
        assert_eq!(found(&control), "emSign ECC Root CA - G3\n", "{store}");
    }
    // Ours have no list of their own: they trust the system's.
    let ours = "grep -rl 'emSign' /usr/local/lib/openclaw-cvm; true";
    let lists = engine.docker(&["run", "--rm", "--network", "none", "--entrypoint", "sh", IMAGE, "-c", ours]);
    assert_eq!(lists, "");
}

/// As it was trusted until October 2026.
const EMSIGN_G3: &str = "-----BEGIN CERTIFICATE-----
MIICTjCCAdOgAwIBAgIKPPYHqWhwDtqLhDAKBggqhkjOPQQDAzBrMQswCQYDVQQG
EwJJTjETMBEGA1UECxMKZW1TaWduIFBLSTElMCMGA1UEChMcZU11ZGhyYSBUZWNo
bm9sb2dpZXMgTGltaXRlZDEgMB4GA1UEAxMXZW1TaWduIEVDQyBSb290IENBIC0g
RzMwHhcNMTgwMjE4MTgzMDAwWhcNNDMwMjE4MTgzMDAwWjBrMQswCQYDVQQGEwJJ
TjETMBEGA1UECxMKZW1TaWduIFBLSTElMCMGA1UEChMcZU11ZGhyYSBUZWNobm9s
b2dpZXMgTGltaXRlZDEgMB4GA1UEAxMXZW1TaWduIEVDQyBSb290IENBIC0gRzMw
djAQBgcqhkjOPQIBBgUrgQQAIgNiAAQjpQy4LRL1KPOxst3iAhKAnjlfSU2fySU0
WXTsuwYc58Byr+iuL+FBVIcUqEqy6HyC5ltqtdyzdc6LBtCGI79G1Y4PPwT01xyS
fvalY8L1X44uT6EYGQIrMgqCZH0Wk9GjQjBAMB0GA1UdDgQWBBR8XQKEE9TMipuB
zhccLikenEhjQjAOBgNVHQ8BAf8EBAMCAQYwDwYDVR0TAQH/BAUwAwEB/zAKBggq
hkjOPQQDAwNpADBmAjEAvvNhzwIQHWSVB7gYboiFBS+DCBeQyh+KTOgNG3qxrdWB
CUfvO6wIBHxcmbHtRwfSAjEAnbpV/KlK6O3t5nYBQnvI+GDZjVGLVTv7jHvrZQnD
+JbNR6iC8hZVdyR+EhCVBCyj
-----END CERTIFICATE-----";

/// Of Debian's packages, as the list of the least safe versions has them; `promises.rs` looks at the rest.
#[test]
fn no_package_of_the_image_is_older_than_the_least_safe_version() {
    let Some(_turn) = turn() else { return };
    let engine = Engine::runner(&Network::new(), |host| host);
    let bill = bill();
    let packages = bill["packages"].as_array().expect("a list");
    let locator =
        |package: &Value| package["externalRefs"][0]["referenceLocator"].as_str().map(str::to_owned);
    for line in least_safe().iter().filter(|line| line.ecosystem == "deb") {
        let prefix = format!("pkg:deb/debian/{}@", line.name);
        let here = packages.iter().find(|p| locator(p).is_some_and(|l| l.starts_with(&prefix)));
        let here = here.unwrap_or_else(|| panic!("{} is not in the image", line.name));
        let version = here["versionInfo"].as_str().expect("a version");
        let options =
            ["run", "--rm", "--network", "none", "--entrypoint", "dpkg", IMAGE, "--compare-versions"];
        let compared = engine.try_docker(&[&options[..], &[version, "ge", &line.version]].concat());
        assert!(
            compared.status.success(),
            "{} {version}: before {} it {}",
            line.name,
            line.version,
            line.why
        );
    }
}

/// What git says of this repository, where it is one.
fn git(words: &[&str]) -> Option<String> {
    let safe = format!("safe.directory={}", repository().display());
    let mut git = Command::new("git");
    git.args(["-c", &safe]).args(words).env("TZ", "UTC").current_dir(repository());
    let output = git.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// The binaries, as `ls` shows them.
fn run_names() -> String {
    let output = Command::new(repository().join("image/binaries")).output().expect("image/binaries runs");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

#[test]
fn a_volume_keeps_everything_through_kills_restarts_and_a_new_container() {
    let Some(_turn) = turn() else { return };
    let laptop = Laptop::new();
    let engine = laptop.engine(&Network::new());
    let _dstack = UnixListener::bind(engine.host.path("/run/dstack.sock")).expect("the host has a /run");
    let given = [
        ("OPENCLAW_GATEWAY_RESTART_DELAY", "1"),
        ("SSH_AUTHORIZED_KEYS", laptop.public.trim()),
        ("ENABLE_DOCKER", "1"),
    ];
    compose(&engine, &given, &["up", "--detach"]);

    // Up before anything else, with the key that was known before the machine was.
    until("SSH answers", PATIENCE, || ssh(&engine, "true").status.success().then_some(()));
    healthy(&engine);
    let shown = good("cvm status over SSH", &ssh(&engine, "cvm status"));
    assert!(shown.contains("gateway"), "{shown}");

    until("the engine finds it healthy", STARTS_WITHIN, || {
        (engine.inspect(CVM, ".State.Health.Status") == "healthy").then_some(())
    });
    let published = ["curl", "--silent", "--fail", "--max-time", "60", "http://127.0.0.1:18789/healthz"];
    good("the gateway at its published port", &engine.host.exec(&published));
    inside(&engine, &["test", "-S", "/run/cvm-dstack/dstack.sock"]);
    let agents =
        exec(&engine, &["runuser", "-u", "openclaw", "--", "test", "-e", "/run/cvm-dstack/dstack.sock"]);
    assert!(!agents.status.success(), "the agent sees dstack's socket");
    let doors = status(&engine)["doors"].clone();
    assert_eq!((doors[0]["name"].as_str(), doors[1].is_null()), (Some("ENABLE_DOCKER=1"), true), "{doors}");

    assert_eq!(engine.inspect(CVM, ".HostConfig.Privileged"), "false");
    assert_eq!(engine.inspect(CVM, ".Config.StopTimeout"), "90");

    for words in [&["openclaw", "--version"][..], &["openclaw", "channels", "status", "--probe"]] {
        let command = words.join(" ");
        let (by_ssh, by_exec) = (good(&command, &ssh(&engine, &command)), inside(&engine, words));
        if words.len() == 2 {
            assert_eq!(by_ssh.trim_end(), by_exec);
            assert!(by_exec.starts_with("OpenClaw "), "{by_exec}");
        }
    }

    // An image made on the spot, of a program that needs nothing else.
    until("dockerd is ready", PATIENCE, || exec(&engine, &["docker", "info"]).status.success().then_some(()));
    let script = "tar -C /usr/local/lib/openclaw-cvm -c cvm | docker import - spot && docker run --rm spot /cvm --version";
    let said = inside(&engine, &["sh", "-c", script]);
    assert!(said.lines().any(|l| l.starts_with("cvm ")), "{said}");

    write_ours(&engine);
    let before = identity(&engine);
    let old = gateway(&engine).expect("a healthy machine has one");
    inside(&engine, &["kill", "-9", &old.to_string()]);
    until("another gateway runs", PATIENCE, || gateway(&engine).filter(|new| *new != old));
    healthy(&engine);

    engine.docker(&["restart", CVM]);
    healthy(&engine);
    let said = log(&engine, CVM);
    assert_eq!(said.matches("SSH daemon started.").count(), 2);
    let begins = format!("openclaw-cvm {} starting", env!("CARGO_PKG_VERSION"));
    let (first, _) = said.rsplit_once(&begins).expect("it has started twice");
    let last = first.lines().rev().nth(1).expect("the first boot said something");
    assert!(last.contains("Stopped in order"), "the restart was not clean:\n{said}");
    assert_eq!(identity(&engine), before);

    stops_clean(&engine);
    engine.docker(&["rm", CVM]);
    compose(&engine, &given, &["up", "--detach"]);
    healthy(&engine);
    assert_eq!(identity(&engine), before);
    good("SSH with the same host key", &ssh(&engine, "cvm health"));
    stops_clean(&engine);
    clean(&engine);
}

#[test]
fn a_bucket_brings_everything_back_when_the_container_and_its_volumes_are_destroyed() {
    let Some(_turn) = turn() else { return };
    let (laptop, garage, network) = (Laptop::new(), Garage::start(), Network::new());
    let proxy = Proxy::open_in(&network, garage.address());
    // FUSE has to be there all the same: the device is made.
    let engine = laptop.engine_on(&network, Engine::without_fuse);
    assert!(!engine.host.path("/dev/fuse").exists());
    let bucket = of_bucket(&garage, &proxy);
    let mut given: Vec<(&str, &str)> = bucket.iter().map(|(name, value)| (*name, value.as_str())).collect();
    // A machine that is lost is succeeded after three beats.
    given.extend([("S3_HEARTBEAT", "1"), ("SSH_AUTHORIZED_KEYS", laptop.public.trim())]);
    compose(&engine, &given, &["up", "--detach"]);
    healthy(&engine);
    write_ours(&engine);
    inside(&engine, &["cvm", "storage", "flush"]);
    let before = identity(&engine);

    engine.docker(&["rm", "--force", "--volumes", CVM]);
    for volume in engine.docker(&["volume", "ls", "--quiet"]).lines() {
        engine.docker(&["volume", "rm", volume]);
    }
    compose(&engine, &given, &["up", "--detach"]);
    healthy(&engine);
    let said = log(&engine, CVM);
    assert!(said.contains("rclone FUSE mount ready at /data"), "{said}");
    assert_eq!(identity(&engine), before);
    good("SSH with the same host key", &ssh(&engine, "cvm storage status"));
    stops_clean(&engine);
    clean(&engine);
}

#[test]
fn what_a_container_may_not_do_is_said_and_the_rest_works() {
    let Some(_turn) = turn() else { return };
    let (garage, network) = (Garage::start(), Network::new());
    let proxy = Proxy::open_in(&network, garage.address());
    let engine = Laptop::new().engine(&network);
    // As a plain `docker run` has it: no capability, no device, no option more than the engine's own.
    let mut words = vec!["run".to_owned(), "--detach".into(), "--name".into(), CVM.into()];
    let bucket = of_bucket(&garage, &proxy);
    words.extend(bucket.iter().map(|(name, value)| format!("--env={name}={value}")));
    words.extend([
        format!("--env=MASTER_KEY={MASTER_KEY}"),
        "--env=ENABLE_DOCKER=1".into(),
        IMAGE.to_owned(),
    ]);
    engine.docker(&words.iter().map(String::as_str).collect::<Vec<_>>());
    healthy(&engine);
    let said = log(&engine, CVM);
    assert!(said.contains("FUSE mount failed, falling back to sync mode."), "{said}");
    until("dockerd's failure is a warning", PATIENCE, || warned(&engine, "dockerd").then_some(()));
    clean(&engine);
}

/// Each line of the compose file that grants something is taken out, alone: what the log warns of, and what
/// the doctor says, both with the name of the line.
#[test]
fn each_right_that_is_missing_is_named_in_the_log_and_by_the_doctor() {
    let Some(_turn) = turn() else { return };
    let (garage, network) = (Garage::start(), Network::new());
    let proxy = Proxy::open_in(&network, garage.address());
    let engine = Laptop::new().engine(&network);
    let profiles = engine.docker(&["info", "--format", "{{.SecurityOptions}}"]);
    for (number, (line, named)) in [
        ("- SYS_ADMIN", "SYS_ADMIN"),
        ("- NET_ADMIN", "NET_ADMIN"),
        ("- DAC_READ_SEARCH", "DAC_READ_SEARCH"),
        ("- \"c 10:229 rwm\"", "device_cgroup_rules"),
        ("- seccomp=unconfined", "seccomp=unconfined"),
        ("- apparmor=unconfined", "apparmor=unconfined"),
    ]
    .into_iter()
    .enumerate()
    {
        let profile = named.strip_suffix("=unconfined");
        if let Some(absent) = profile.filter(|profile| !profiles.contains(&format!("name={profile}"))) {
            say(&format!("\n*** SKIPPED: this host has no {absent}, so what it forbids is NOT TESTED\n"));
            continue;
        }
        let lines = without(compose_lines(), line);
        let mut given = of_bucket(&garage, &proxy);
        given.extend([("S3_PREFIX", format!("without-{number}")), ("ENABLE_DOCKER", "1".into())]);
        let given: Vec<(&str, &str)> = given.iter().map(|(name, value)| (*name, value.as_str())).collect();
        compose_file(&engine, &lines, &given, &["up", "--detach"]);
        until(&format!("the log warns of {named}"), PATIENCE, || warned(&engine, named).then_some(()));
        let told = exec(&engine, &["cvm", "doctor"]).stdout;
        let told = String::from_utf8_lossy(&told);
        assert!(told.contains(named), "the doctor does not say {named}:\n{told}");
        engine.docker(&["rm", "--force", "--volumes", CVM]);
        clean(&engine);
    }
}

/// The compose file without one entry, and without the key that it leaves empty.
fn without(mut lines: Vec<String>, entry: &str) -> Vec<String> {
    let at =
        lines.iter().position(|line| line.trim() == entry).unwrap_or_else(|| panic!("no line `{entry}`"));
    lines.remove(at);
    let is_comment = |line: &String| line.trim_start().starts_with('#');
    let is_entry = |line: &String| line.starts_with("      ") && !is_comment(line);
    let key = lines[..at].iter().rposition(|line| !line.starts_with("      ")).expect("an entry has a key");
    let rest = lines[key + 1..].iter().take_while(|line| is_entry(line) || is_comment(line));
    if !rest.into_iter().any(is_entry) {
        lines.remove(key);
    }
    lines
}

/// A warning with this in it; the reason of a fallback counts as one.
fn warned(engine: &Engine, text: &str) -> bool {
    let is_warning = |line: &str| line.contains("WARN") || line.contains("Reason: ");
    log(engine, CVM).lines().any(|line| is_warning(line) && line.contains(text))
}

/// S3 mode, as containers of this engine reach it.
fn of_bucket(garage: &Garage, proxy: &Proxy) -> Vec<(&'static str, String)> {
    vec![
        // Not the containers' own loopback.
        ("ALLOW_HTTP", "1".into()),
        ("S3_ENDPOINT", format!("http://{HOST}:{}", proxy.address().port())),
        ("S3_BUCKET", garage.bucket().into()),
        ("S3_REGION", garage.region().into()),
        ("AWS_ACCESS_KEY_ID", garage.access_key().into()),
        ("AWS_SECRET_ACCESS_KEY", garage.secret_key().into()),
    ]
}

#[test]
fn two_builds_of_one_commit_are_the_same() {
    let Some(_turn) = turn() else { return };
    let given = binaries().display().to_string();
    builds_are_the_same(&["--given", &given], from_nothing().then_some(IMAGE));
}

/// Both without what an engine keeps of earlier builds: files that only differ in their times are
/// the same to it. One of them may be there already.
#[track_caller]
fn builds_are_the_same(options: &[&str], built: Option<&str>) {
    let engine = Engine::builder();
    let first = built.unwrap_or("openclaw-cvm:first");
    let fresh: Vec<&str> =
        built.is_none().then_some(first).into_iter().chain(["openclaw-cvm:second"]).collect();
    for tag in &fresh {
        engine.build(tag, &[&["--no-cache", "--to", "target/image/again"], options].concat());
    }
    assert_same_trees(&engine, first, "openclaw-cvm:second");
    assert!(!has_secrets(&engine, first), "the certificates of the build are in a layer");
    for tag in fresh {
        engine.docker(&["rmi", "--force", tag]);
    }
}

/// Whether the build's certificates lie in any layer.
fn has_secrets(engine: &Engine, image: &str) -> bool {
    let mut save = engine.client(&["save", image]).stdout(Stdio::piped()).spawn().expect("docker runs");
    let layers = save.stdout.take().expect("stdout is piped");
    let found = Command::new("grep").args(["--quiet", "--text", SECRET_MARK]).stdin(layers).status();
    let found = found.expect("grep runs").success();
    assert!(save.wait().expect("docker is our child").success() || found);
    found
}

/// The stage that compiles, from nothing, twice.
#[test]
fn two_builds_with_the_compilers_of_the_image_are_the_same() {
    if std::env::var_os("CVM_SOAK").is_none() {
        say(
            "\n*** LEFT TO `make soak`: the stage of the image's build that compiles, twice, for half an hour\n",
        );
        return;
    }
    let Some(_turn) = turn() else { return };
    builds_are_the_same(&[], None);
}

#[track_caller]
fn assert_same_trees(engine: &Engine, first: &str, second: &str) {
    let (first, second) = (tree(engine, first), tree(engine, second));
    let difference = difference(&first, &second);
    let path = |line: &str| line.split('"').nth(1).unwrap_or_default().to_owned();
    let found: BTreeSet<String> = difference.lines().map(path).collect();
    let known: BTreeSet<String> = NOT_REPRODUCIBLE.iter().map(|p| (*p).to_owned()).collect();
    say(&format!("\nNot reproducible in the image: {known:?}"));
    assert_eq!(found, known, "a path that is not known, or one that is reproducible by now:\n{difference}");
}

/// Everything in an image, a line for each path.
#[track_caller]
fn tree(engine: &Engine, image: &str) -> Vec<String> {
    let place = tempfile::tempdir_in(repository().join("target/image")).expect("target/ is writable");
    let container = engine.docker(&["create", "--network", "none", image]);
    let mut export = engine.client(&["export", &container]);
    let mut export = export.stdout(Stdio::piped()).spawn().expect("docker runs");
    let tar = Command::new("tar")
        .args(["--extract", "--same-owner", "--same-permissions", "--numeric-owner", "--directory"])
        .arg(place.path())
        .stdin(export.stdout.take().expect("stdout is piped"))
        .status();
    assert!(tar.expect("tar runs").success() && export.wait().expect("docker is our child").success());
    engine.docker(&["rm", "--volumes", &container]);
    let created = engine.inspect(image, &format!("index .Config.Labels \"{LABEL}.created\""));
    let date = Command::new("date").args(["+%s", "--date", &created]).output();
    let date: i64 =
        String::from_utf8_lossy(&date.expect("date runs").stdout).trim().parse().expect("a number");
    let lines = digest(place.path(), &[".dockerenv", "dev", "proc", "sys"]);
    let lines = lines.into_iter().filter(|line| {
        !OF_THE_ENGINE.contains(&line.split('"').nth(1).unwrap_or_default()) && !line.starts_with("\"\"")
    });
    let lines: Vec<String> = lines.collect();
    for line in &lines {
        let time = line.split(' ').find_map(|word| word.split_once('.')?.0.parse::<i64>().ok());
        assert!(time.is_none_or(|t| t <= date), "younger than the commit: {line}");
    }
    lines
}
