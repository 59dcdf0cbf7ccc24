//! A container by the compose file, from its first start through kills, restarts and losses.

use crate::fixtures::{
    CVM, Laptop, STARTS_WITHIN, clean, compose, exec, gateway, good, healthy, inside, log, of_bucket, ssh,
    status, stops_clean, turn,
};
use cvm_harness::machine::PATIENCE;
use cvm_harness::{Engine, Garage, Network, Proxy, until};
use serde_json::Value;
use std::os::unix::net::UnixListener;

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
    // What the gateway makes again at each first start, of which there is much here and nothing in the bucket.
    inside(&engine, &["sh", "-c", "find /data/openclaw/cache -type f | grep -q ."]);
    let listed = inside(&engine, &["cvm", "storage", "ls"]);
    assert!(listed.contains(" openclaw/workspace/ours/note.txt"), "{listed}");
    let made_again: Vec<&str> =
        listed.lines().filter(|l| l.contains(" openclaw/cache") || l.contains("compile-cache")).collect();
    assert_eq!(made_again, [""; 0]);

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
