//! An engine with our compose file, and what is done to the container.

use cvm_harness::engine::IMAGE;
use cvm_harness::machine::{MASTER_KEY, binaries, owner_word, repository};
use cvm_harness::ssh::{HostKey, known_hosts, make_key};
use cvm_harness::{Builder, Engine, Garage, Network, Proxy, Turns, until};
use cvm_needs::{Need, skip};
use serde_json::Value;
use std::fs;
use std::io::Write as _;
use std::process::{Output, Stdio};
use std::sync::{MutexGuard, Once};
use std::time::Duration;

/// The container that the compose file makes.
pub(crate) const CVM: &str = "cvm-openclaw-1";

/// Where containers find their host.
pub(crate) const HOST: &str = "172.17.0.1";

/// A start of the real gateway, on a machine that does much else besides.
pub(crate) const STARTS_WITHIN: Duration = Duration::from_mins(5);

/// What labels begin with.
pub(crate) const LABEL: &str = "org.opencontainers.image";

/// Past the test runner, which keeps what a test prints to itself.
pub(crate) fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// One test at a time; nothing where no engine can run, and the test is skipped.
#[track_caller]
pub(crate) fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURNS: Turns = Turns::new();
    static BUILT: Once = Once::new();
    let turn = TURNS.take();
    if let Some(why) = Engine::missing() {
        skip(Need::Engine, &format!("no container engine can run here: {why}"));
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
pub(crate) fn from_nothing() -> bool {
    Need::Engine.is_required()
}

/// What an earlier run left.
pub(crate) fn clean(engine: &Engine) {
    for container in engine.docker(&["ps", "--all", "--quiet"]).lines() {
        engine.docker(&["rm", "--force", "--volumes", container]);
    }
    engine.docker(&["volume", "prune", "--force"]);
    engine.docker(&["network", "prune", "--force"]);
}

/// What an operator has: a key that the environment names, and the host key that `MASTER_KEY` gives.
pub(crate) struct Laptop {
    pub(crate) key: String,
    pub(crate) public: String,
    pub(crate) known: String,
}

impl Laptop {
    pub(crate) fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        let key = home.path().join("key");
        let public = make_key(&key);
        let key = fs::read_to_string(key).expect("ssh-keygen wrote it");
        Self { key, public, known: known_hosts(1022) }
    }

    pub(crate) fn engine(&self, network: &Network) -> Engine {
        self.engine_on(network, |host| host)
    }

    pub(crate) fn engine_on(&self, network: &Network, change: impl FnOnce(Builder) -> Builder) -> Engine {
        let engine = Engine::runner(network, |host| {
            change(host).file("/laptop/key", &self.key, 0o600).file("/laptop/known_hosts", &self.known, 0o644)
        });
        clean(&engine);
        engine
    }
}

/// `ssh -p 1022`, which takes no host key but the derived one.
pub(crate) fn ssh(engine: &Engine, command: &str) -> Output {
    let host = HostKey::Known("/laptop/known_hosts");
    engine.host.exec(&cvm_harness::ssh::ssh(1022, "/laptop/key", host, &[], command))
}

#[track_caller]
pub(crate) fn good(what: &str, output: &Output) -> String {
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
pub(crate) fn compose(engine: &Engine, environment: &[(&str, &str)], words: &[&str]) {
    compose_file(engine, &compose_lines(), environment, words);
}

/// Our compose file with the image of this build and our owner, whatever it has been pinned to.
pub(crate) fn compose_lines() -> Vec<String> {
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
pub(crate) fn compose_file(engine: &Engine, lines: &[String], environment: &[(&str, &str)], words: &[&str]) {
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
pub(crate) fn exec(engine: &Engine, words: &[&str]) -> Output {
    engine.try_docker(&[&["exec", CVM], words].concat())
}

#[track_caller]
pub(crate) fn inside(engine: &Engine, words: &[&str]) -> String {
    good(&format!("{words:?} in the container"), &exec(engine, words)).trim_end().to_owned()
}

#[track_caller]
pub(crate) fn healthy(engine: &Engine) {
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

pub(crate) fn log(engine: &Engine, container: &str) -> String {
    let output = engine.try_docker(&["logs", container]);
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Also of a machine that is not healthy.
pub(crate) fn status(engine: &Engine) -> Value {
    serde_json::from_slice(&exec(engine, &["cvm", "status", "--json"]).stdout).unwrap_or_default()
}

/// The gateway's pid, when it has one.
pub(crate) fn gateway(engine: &Engine) -> Option<i64> {
    let status = status(engine);
    status["services"].as_array()?.iter().find(|s| s["name"] == "gateway")?["pid"].as_i64()
}

/// `docker stop`, as long as the compose file lets it take.
#[track_caller]
pub(crate) fn stops_clean(engine: &Engine) {
    engine.docker(&["stop", CVM]);
    assert_eq!(engine.inspect(CVM, ".State.ExitCode"), "0", "{}", log(engine, CVM));
}

/// S3 mode, as containers of this engine reach it.
pub(crate) fn of_bucket(garage: &Garage, proxy: &Proxy) -> Vec<(&'static str, String)> {
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
