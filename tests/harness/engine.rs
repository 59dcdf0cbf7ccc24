//! The machine that a confidential VM is to our container: it runs a container engine, and
//! nothing else. Throw-away like the others, but for the engine's images, which are kept below
//! target/ so that one build serves all tests.

use crate::machine::{PATIENCE, binaries, repository};
use crate::network::Network;
use crate::wait::until;
use crate::{Builder, Machine};
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// What the tests call the image.
pub const IMAGE: &str = "openclaw-cvm:test";
/// In the certificates that a build gets as its secret, and in nothing else.
pub const SECRET_MARK: &str = "cvm-test: this is of the build and not of the image";
/// The engine's socket, on the host and as its scratch directory shows it.
const SOCKET: &str = "/engine/docker.sock";

/// A host with an engine. It goes with all containers, networks and volumes' users when it is
/// dropped; volumes are removed by whoever made them.
pub struct Engine {
    pub host: Machine,
    socket: PathBuf,
}

impl Engine {
    /// For building: on this machine's network, which reaches packages, and hands off it.
    pub fn builder() -> Self {
        Self::start(
            Builder::new().host_network(),
            &["--bridge=none", "--iptables=false", "--ip6tables=false"],
        )
    }

    /// For running: in a network of its own, where every port is free.
    pub fn runner(network: &Network, change: impl FnOnce(Builder) -> Builder) -> Self {
        Self::start(change(Builder::new().network(network)), &["--bip=172.17.0.1/16"])
    }

    /// A host whose kernel has FUSE and whose `/dev` does not, as where its module comes when it is
    /// asked for.
    #[must_use]
    pub fn without_fuse(host: Builder) -> Builder {
        let devices =
            ["null", "zero", "full", "random", "urandom", "tty"].map(|name| Path::new("/dev").join(name));
        devices
            .iter()
            .fold(host.volume("dev", "/dev"), |host, device| host.bind(device, &device.display().to_string()))
    }

    fn start(builder: Builder, options: &[&str]) -> Self {
        Self::begin(builder, options).unwrap_or_else(|last_words| panic!("the engine ended:\n{last_words}"))
    }

    /// Its last words, when it does not stay.
    fn begin(builder: Builder, options: &[&str]) -> Result<Self, String> {
        let storage = repository().join("target/image/engine");
        fs::create_dir_all(&storage).expect("target/ is writable");
        let mut words =
            vec!["/usr/local/sbin/cvm-init", "--", "dockerd", "--host=unix:///engine/docker.sock"];
        words.extend(["--log-level=error", "--data-root=/var/lib/docker"]);
        words.extend(options);
        let builder = builder
            .copy(&binaries().join("cvm-init"), "/usr/local/sbin/cvm-init")
            .volume("engine", "/engine")
            .bind(&storage, "/var/lib/docker")
            .file("/etc/docker/daemon.json", "{}\n", 0o644)
            .environment("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .environment("DOCKER_HOST", &format!("unix://{SOCKET}"))
            .command(&words);
        let socket = builder.scratch().join(SOCKET.trim_start_matches('/'));
        let _ = fs::remove_file(&socket);
        let mut engine = Self { host: builder.start(), socket };
        until("the engine answers, or ends", PATIENCE, || {
            let answers = engine.try_docker(&["version"]).status.success();
            (answers || !engine.host.is_running()).then_some(())
        });
        if engine.host.is_running() { Ok(engine) } else { Err(engine.host.output()) }
    }

    /// Why none can run here; nothing when one can.
    pub fn missing() -> Option<String> {
        static WHY: OnceLock<Option<String>> = OnceLock::new();
        WHY.get_or_init(Self::look).clone()
    }

    fn look() -> Option<String> {
        let there = |program: &str| {
            std::env::split_paths("/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
                .any(|dir| dir.join(program).exists())
        };
        if !nix::unistd::geteuid().is_root() {
            return Some("this is not root".into());
        }
        let programs = ["dockerd", "docker", "containerd", "runc", "mmdebstrap", "curl"];
        if let Some(program) = programs.into_iter().find(|program| !there(program)) {
            return Some(format!("{program} is not installed: tests/setup test"));
        }
        // On a thread of its own, whose namespace ends with it.
        let apart = std::thread::spawn(|| nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)).join();
        if let Ok(Err(errno)) = apart {
            return Some(format!("no mount namespace can be made ({}; CAP_SYS_ADMIN?)", errno.desc()));
        }
        let network = Network::new();
        let tried = Self::begin(Builder::new().network(&network), &["--bip=172.17.0.1/16"]);
        tried.err().map(|last_words| {
            let last = last_words.lines().rev().find(|line| !line.trim().is_empty());
            format!("dockerd does not start: {}", last.unwrap_or("it says nothing"))
        })
    }

    /// Builds the image from this commit and the binaries beside the test, and says so line by
    /// line. Panics with what the build said.
    #[track_caller]
    pub fn build(&self, tag: &str, options: &[&str]) {
        let mut command = Command::new(repository().join("image/build"));
        command.args(["--tag", tag]).args(options).args(["--", "--network", "host"]);
        let path = std::env::var("PATH").unwrap_or_default();
        let go = repository().join("target/go/bin");
        command
            .env("PATH", format!("{}:{path}:/usr/sbin:/sbin", go.display()))
            .env("DOCKER_HOST", self.address())
            .env("CA_BUNDLE", self.marked_certificates());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("image/build starts");
        let errors = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let reads = std::thread::spawn(move || errors.lines().map_while(Result::ok).collect::<Vec<_>>());
        for line in
            BufReader::new(child.stdout.take().expect("stdout is piped")).lines().map_while(Result::ok)
        {
            println!("{line}");
        }
        let status = child.wait().expect("image/build is our child");
        let said = reads.join().expect("reading does not panic");
        let last = said.len().saturating_sub(60);
        assert!(status.success(), "image/build {options:?}: {status}\n{}", said[last..].join("\n"));
    }

    /// This machine's certificates, recognisable.
    fn marked_certificates(&self) -> PathBuf {
        let given = ["CA_BUNDLE", "SSL_CERT_FILE"].iter().find_map(std::env::var_os);
        let given = given.map_or_else(|| "/etc/ssl/certs/ca-certificates.crt".into(), PathBuf::from);
        let mut certificates = fs::read(given).unwrap_or_default();
        certificates.extend_from_slice(format!("\n# {SECRET_MARK}\n").as_bytes());
        let file = self.socket.with_file_name("ca.crt");
        fs::write(&file, certificates).expect("the scratch directory is writable");
        file
    }

    pub fn address(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// A client, ready to run outside. It has nothing of the caller's environment.
    pub fn client(&self, words: &[&str]) -> Command {
        let mut command = Command::new("docker");
        command.args(words).env_clear().env("DOCKER_HOST", self.address()).env("HOME", "/nonexistent");
        command.env("PATH", "/usr/local/bin:/usr/bin:/bin").stdin(Stdio::null());
        command
    }

    pub fn try_docker(&self, words: &[&str]) -> Output {
        self.client(words).output().expect("docker runs")
    }

    /// Standard output of a client's command that has to succeed.
    #[track_caller]
    pub fn docker(&self, words: &[&str]) -> String {
        let output = self.try_docker(words);
        assert!(
            output.status.success(),
            "docker {words:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
    }

    /// What `docker inspect` says of a field.
    #[track_caller]
    pub fn inspect(&self, object: &str, field: &str) -> String {
        self.docker(&["inspect", "--format", &format!("{{{{{field}}}}}"), object])
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // In order, so that what it keeps on disk is whole, and no control group is left.
        let _ = self.try_docker(&["version"]);
        if self.host.is_running() {
            self.host.signal(nix::sys::signal::Signal::SIGTERM);
            let _ = crate::wait::before(PATIENCE, || (!self.host.is_running()).then_some(()));
        }
    }
}
