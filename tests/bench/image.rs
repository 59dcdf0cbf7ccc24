//! The image's boot: from `docker run` to the gateway's readiness, beside the same image started by a
//! plain shell script that takes the same steps one after the other.
//!
//! Four cases, all in each round: without dockerd and with a rootful one; the first boot of a volume,
//! and a later one, in a new container on the volume that the first has left.

use crate::figures::Figure;
use cvm_harness::engine::{Engine, IMAGE};
use cvm_harness::machine::binaries;
use cvm_harness::{Network, until};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Fewer than of the others: a round starts the real gateway eight times, some minutes on a busy machine.
const ROUNDS: usize = 5;
const PATIENCE: Duration = Duration::from_mins(5);
const NAME: &str = "boot";
const STEPS: &str = include_str!("boot.sh");

/// What the compose file grants.
const GRANTED: &[&str] = &[
    "--cap-add=SYS_ADMIN",
    "--cap-add=NET_ADMIN",
    "--cap-add=DAC_READ_SEARCH",
    "--device-cgroup-rule=c 10:229 rwm",
    "--security-opt=seccomp=unconfined",
    "--security-opt=apparmor=unconfined",
    "--sysctl=net.ipv4.ip_forward=1",
    "--tmpfs=/run:exec,mode=755",
    "--hostname=openclaw",
    "--env=MASTER_KEY=0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M=",
];
const VOLUMES: [(&str, &str); 2] = [("boot-data", "/data"), ("boot-docker", "/var/lib/docker")];

/// Who starts the gateway.
#[derive(Clone, Copy)]
struct Contestant {
    name: &'static str,
    words: &'static [&'static str],
    /// Asks the gateway to end, and the container with it.
    stop: &'static [&'static str],
}

const OURS: Contestant = Contestant { name: "cvm-init", words: &[IMAGE], stop: &["stop", "--time=60", NAME] };
const SCRIPT: Contestant = Contestant {
    name: "shell script",
    words: &["--volume=/steps:/steps:ro", "--entrypoint=/bin/sh", "--env=REAL=1", IMAGE, "/steps/boot.sh"],
    // As process 1 the script has no ears for a signal.
    stop: &["exec", NAME, "pkill", "-TERM", "openclaw"],
};

struct Case {
    docker: &'static str,
    /// What the figures of the first and of a later boot are called.
    exec: [&'static str; 2],
    ready: [&'static str; 2],
}

const CASES: [Case; 2] = [
    Case {
        docker: "--env=ENABLE_DOCKER=0",
        exec: ["first run to exec", "later run to exec"],
        ready: ["first run to ready", "later run to ready"],
    },
    Case {
        docker: "--env=ENABLE_DOCKER=1",
        exec: ["first run to exec, with dockerd", "later run to exec, with dockerd"],
        ready: ["first run to ready, with dockerd", "later run to ready, with dockerd"],
    },
];
const RATIO: &str = "ours / script";
const TARGET: &str = "<= 0.8";

/// Milliseconds from `docker run`.
struct Boot {
    exec: f64,
    ready: f64,
    docker: f64,
}

pub(crate) fn boot() -> Vec<Figure> {
    if let Some(why) = Engine::missing() {
        eprintln!("\n*** No container engine can run here, so the image's boot is NOT MEASURED: {why}\n");
        return Vec::new();
    }
    Engine::builder().build(IMAGE, &["--given", &binaries().display().to_string()]);
    let network = Network::new();
    let engine = Engine::runner(&network, |host| host.file("/steps/boot.sh", STEPS, 0o755));
    let mut measured: [[[Vec<Boot>; 2]; 2]; 2] = Default::default();
    // The first round fills the page cache and does not count.
    for round in 0..=ROUNDS {
        for (case, measured) in CASES.iter().zip(&mut measured) {
            for (who, measured) in [OURS, SCRIPT].into_iter().zip(measured) {
                forget(&engine);
                for (boots, time) in measured.iter_mut().zip(["first", "later"]) {
                    eprint!("\r   round {round}/{ROUNDS}, {}, {}, {time} boot   ", who.name, case.docker);
                    let boot = start(&engine, &network, who, case.docker);
                    if round > 0 {
                        boots.push(boot);
                    }
                }
            }
        }
    }
    forget(&engine);
    eprintln!();
    CASES.iter().zip(&measured).flat_map(|(case, measured)| figures(case, measured)).collect()
}

fn figures(case: &Case, [ours, script]: &[[Vec<Boot>; 2]; 2]) -> Vec<Figure> {
    let mut figures = Vec::new();
    for (n, (ours, script)) in ours.iter().zip(script).enumerate() {
        let column = |boots: &[Boot], of: fn(&Boot) -> f64| boots.iter().map(of).collect::<Vec<_>>();
        for (what, of) in [(case.exec[n], (|b| b.exec) as fn(&Boot) -> f64), (case.ready[n], |b| b.ready)] {
            figures.push(Figure::new(what, OURS.name, "ms", column(ours, of), ""));
            figures.push(Figure::new(what, SCRIPT.name, "ms", column(script, of), ""));
        }
        // Of the two starts of one round, which the host's noise has in common.
        let ratio = ours.iter().zip(script).map(|(ours, script)| ours.ready / script.ready).collect();
        figures.push(Figure::new(case.ready[n], RATIO, "", ratio, TARGET));
        if case.docker.ends_with('1') {
            figures.push(Figure::new(
                "... and dockerd answers",
                OURS.name,
                "ms",
                column(ours, |b| b.docker),
                "",
            ));
        }
    }
    figures
}

/// What the container before has left.
fn forget(engine: &Engine) {
    let _ = engine.try_docker(&["rm", "--force", "--volumes", NAME]);
    for (volume, _) in VOLUMES {
        let _ = engine.try_docker(&["volume", "rm", "--force", volume]);
    }
}

/// One container, from its start to its orderly end. Its volumes stay.
fn start(engine: &Engine, network: &Network, who: Contestant, docker: &str) -> Boot {
    let volumes = VOLUMES.map(|(name, at)| format!("--volume={name}:{at}"));
    let mut words = [&["run", "--detach", "--name", NAME, docker], GRANTED].concat();
    words.extend(volumes.iter().map(String::as_str));
    words.extend(who.words);
    let began = Instant::now();
    let so_far = || began.elapsed().as_secs_f64() * 1e3;
    let id = engine.docker(&words);
    let exec = until("the gateway is executed", PATIENCE, || {
        engine.host.find("openclaw.mjs gateway run").map(|_| so_far())
    });
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = engine.docker(&["inspect", "--format", format, &id]);
    let address = SocketAddr::new(address.parse().expect("an address"), 18789);
    let ready = network.inside(|| until("the gateway is ready", PATIENCE, || is_ready(address).then(so_far)));
    // Both have started all of it, or the figures are not of the same thing.
    let docker = until("dockerd inside is ready, or not wanted", PATIENCE, || {
        let is_there = || engine.try_docker(&["exec", NAME, "docker", "info"]).status.success();
        (docker.ends_with('0') || is_there()).then(so_far)
    });
    let _ = engine.try_docker(who.stop);
    engine.docker(&["wait", NAME]);
    engine.docker(&["rm", NAME]);
    Boot { exec, ready, docker }
}

fn is_ready(address: SocketAddr) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        stream.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    ask().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200 "))
}
