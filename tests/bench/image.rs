//! The image's boot: from `docker run` to the gateway's exec and to its readiness, beside the same
//! image started by a plain shell script that takes the same steps one after the other.

use crate::figures::Figure;
use cvm_harness::engine::{Engine, IMAGE};
use cvm_harness::machine::binaries;
use cvm_harness::{Network, until};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

/// Fewer than of the others: a round takes the real gateway's start twice, most of a minute on a
/// busy machine.
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
    "--env=ENABLE_DOCKER=1",
    "--env=MASTER_KEY=0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M=",
];
const OURS: &[&str] = &[IMAGE];
const SCRIPT: &[&str] =
    &["--volume=/steps:/steps:ro", "--entrypoint=/bin/sh", "--env=REAL=1", IMAGE, "/steps/boot.sh"];

pub(crate) fn boot() -> Vec<Figure> {
    if let Some(why) = Engine::missing() {
        eprintln!("\n*** No container engine can run here, so the image's boot is NOT MEASURED: {why}\n");
        return Vec::new();
    }
    Engine::builder().build(IMAGE, &["--given", &binaries().display().to_string()]);
    let network = Network::new();
    let engine = Engine::runner(&network, |host| host.file("/steps/boot.sh", STEPS, 0o755));
    let mut measured: [[Vec<f64>; 2]; 2] = Default::default();
    // The first round of each fills the page cache and does not count.
    for round in 0..=ROUNDS {
        eprint!("\r   round {round}/{ROUNDS}");
        for (who, measured) in [OURS, SCRIPT].into_iter().zip(&mut measured) {
            let (executed, ready) = start(&engine, &network, who);
            if round > 0 {
                measured[0].push(executed);
                measured[1].push(ready);
            }
        }
    }
    eprintln!();
    let [[our_exec, our_ready], [their_exec, their_ready]] = measured;
    let figure = |what, who: &str, values| Figure::new(what, who, "ms", values, "");
    let (exec, ready) = ("docker run to exec of the gateway", "docker run to gateway ready");
    vec![
        figure(exec, "cvm-init", our_exec),
        figure(exec, "shell script", their_exec),
        figure(ready, "cvm-init", our_ready),
        figure(ready, "shell script", their_ready),
    ]
}

/// Milliseconds to the gateway's exec, and to its readiness.
fn start(engine: &Engine, network: &Network, words: &[&str]) -> (f64, f64) {
    let _ = engine.try_docker(&["rm", "--force", "--volumes", NAME]);
    let began = Instant::now();
    let so_far = || began.elapsed().as_secs_f64() * 1e3;
    let id = engine.docker(&[&["run", "--detach", "--name", NAME], GRANTED, words].concat());
    let executed = until("the gateway is executed", PATIENCE, || {
        engine.host.find("openclaw.mjs gateway run").map(|_| so_far())
    });
    let format = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}";
    let address = engine.docker(&["inspect", "--format", format, &id]);
    let address = SocketAddr::new(address.parse().expect("an address"), 18789);
    let ready = network.inside(|| until("the gateway is ready", PATIENCE, || is_ready(address).then(so_far)));
    // Both have started all of it, or the figures are not of the same thing.
    until("dockerd inside is ready", PATIENCE, || {
        engine.try_docker(&["exec", NAME, "docker", "info"]).status.success().then_some(())
    });
    engine.docker(&["rm", "--force", "--volumes", NAME]);
    (executed, ready)
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
