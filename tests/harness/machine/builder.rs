//! A machine that is being put together.

use super::running::{Machine, collect};
use super::{MASTER_KEY, PATIENCE, binary, product, repository};
use crate::network::Network;
use crate::sandbox::{FileInside, write_files};
use crate::wait::until;
use nix::unistd::Pid;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// What process 1 finds at its standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stdout {
    Read,
    Blocked,
    Broken,
}

/// A machine that is being put together.
pub struct Builder {
    options: Vec<String>,
    files: Vec<FileInside>,
    command: Vec<String>,
    scratch: tempfile::TempDir,
    stdout: Stdout,
    /// Kept open for the next machine.
    network: Option<Network>,
}

impl Default for Builder {
    fn default() -> Self {
        Self::new()
    }
}

impl Builder {
    /// An empty machine with a private network.
    pub fn new() -> Self {
        let scratch = tempfile::Builder::new().prefix("cvm-test-").tempdir().expect("a temporary directory");
        Self {
            options: Vec::new(),
            files: Vec::new(),
            command: Vec::new(),
            scratch,
            stdout: Stdout::Read,
            network: None,
        }
    }

    /// The product as the image lays it out, with an empty volume at /data and at
    /// /var/lib/docker, and `cvm-init` as the command.
    pub fn product() -> Self {
        let lib = "/usr/local/lib/openclaw-cvm";
        let mut builder = Self::new();
        // An older commit that a bench is measured beside has the second of them.
        let task = ["cvm-task", "cvm-step"].into_iter().find(|name| product(name).exists());
        for name in ["cvm-init", "cvm-keeper", task.expect("a program for tasks"), "cvm"] {
            builder = builder.copy(&product(name), &format!("{lib}/{name}"));
        }
        builder
            .bind(&product("cvm-mux"), &format!("{lib}/cvm-mux"))
            .symlink(&format!("{lib}/cvm"), "/usr/local/bin/cvm")
            .symlink(&format!("{lib}/cvm"), "/usr/local/bin/openclaw")
            .symlink(&format!("{lib}/cvm-init"), "/usr/local/sbin/cvm-init")
            .copy(&binary("cvm-victim"), "/usr/local/bin/cvm-victim")
            .volume("data", "/data")
            .volume("docker", "/var/lib/docker")
            .environment("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .command(&["/usr/local/sbin/cvm-init"])
    }

    /// S3 mode: the storage worker and its stand-in, on this bucket. The network is the one in
    /// which the bucket's address can be reached.
    #[must_use]
    pub fn s3(mut self, network: &Network, endpoint: &str, garage: &crate::Garage) -> Self {
        let lib = "/usr/local/lib/openclaw-cvm";
        // Large, and the same for all: not copied.
        for name in ["cvm-storage", "cvm-standin"] {
            self = self.bind(&product(name), &format!("{lib}/{name}"));
        }
        self.network(network)
            .environment("S3_ENDPOINT", endpoint)
            .environment("S3_BUCKET", garage.bucket())
            .environment("S3_REGION", garage.region())
            .environment("AWS_ACCESS_KEY_ID", garage.access_key())
            .environment("AWS_SECRET_ACCESS_KEY", garage.secret_key())
            .environment("MASTER_KEY", MASTER_KEY)
            .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
            // The owner's beats count: a machine that is lost is succeeded after three seconds.
            .environment("S3_HEARTBEAT", "1")
    }

    /// The mux client, with this server in this network.
    #[must_use]
    pub fn mux(self, network: &Network, mux: &crate::Mux) -> Self {
        self.network(network)
            .environment("MUX_BASE_URL", &mux.url())
            .environment("MUX_REGISTER_KEY", crate::mux::REGISTER_KEY)
            .environment("MUX_INBOUND_URL", &mux.inbound_url())
    }

    /// No FUSE: in the device's place lies a file that nobody can write to.
    #[must_use]
    pub fn without_fuse(self) -> Self {
        self.bind(Path::new("/etc/passwd"), "/dev/fuse:ro")
    }

    /// The real gateway, from target/openclaw.
    #[must_use]
    pub fn real_gateway(self) -> Self {
        let gateway = repository().join("target/openclaw");
        assert!(gateway.exists(), "{} is missing: run `tests/setup test` first", gateway.display());
        self.option("--bind", &format!("{}:/opt/openclaw:ro", gateway.display()))
    }

    /// A shell script in place of the Node that would run the gateway. It gets the gateway's
    /// arguments; the first is the path of `openclaw.mjs`.
    #[must_use]
    pub fn fake_gateway(self, script: &str) -> Self {
        self.file(cvm_protocol::paths::NODE, script, 0o755).file(cvm_protocol::paths::OPENCLAW, "", 0o644)
    }

    fn option(mut self, name: &str, value: &str) -> Self {
        self.options.extend([name.to_owned(), value.to_owned()]);
        self
    }

    #[must_use]
    pub fn host_network(self) -> Self {
        self.option("--net", "host")
    }

    /// A network where something may listen already.
    #[must_use]
    pub fn network(mut self, network: &Network) -> Self {
        self.network = Some(network.clone());
        self.option("--net", &network.file().display().to_string())
    }

    #[must_use]
    pub fn environment(self, name: &str, value: &str) -> Self {
        self.option("--env", &format!("{name}={value}"))
    }

    #[must_use]
    pub fn copy(self, from: &Path, to: &str) -> Self {
        self.option("--copy", &format!("{}:{to}", from.display()))
    }

    #[must_use]
    pub fn symlink(self, target: &str, link: &str) -> Self {
        self.option("--symlink", &format!("{target}:{link}"))
    }

    /// A directory on a real disk. The same name is the same directory in later machines of
    /// this one's [`Machine::again`].
    #[must_use]
    pub fn volume(self, name: &str, target: &str) -> Self {
        let source = self.scratch.path().join(name);
        fs::create_dir_all(&source).expect("a directory in the scratch directory");
        self.option("--bind", &format!("{}:{target}", source.display()))
    }

    #[must_use]
    pub fn bind(self, source: &Path, target: &str) -> Self {
        self.option("--bind", &format!("{}:{target}", source.display()))
    }

    /// Takes back what was bound there.
    #[must_use]
    pub fn unbind(mut self, target: &str) -> Self {
        let there = |value: &str| value.split(':').nth(1) == Some(target);
        let kept = self.options.chunks(2).filter(|pair| !(pair[0] == "--bind" && there(&pair[1])));
        self.options = kept.flatten().cloned().collect();
        self
    }

    #[must_use]
    pub fn file(mut self, path: &str, content: &str, mode: u32) -> Self {
        self.files.push(FileInside { path: path.into(), content: content.into(), mode });
        self
    }

    #[must_use]
    pub fn command(mut self, words: &[&str]) -> Self {
        self.command = words.iter().map(|w| (*w).to_owned()).collect();
        self
    }

    /// Standard output is a pipe whose reader is gone.
    #[must_use]
    pub fn broken_stdout(mut self) -> Self {
        self.stdout = Stdout::Broken;
        self
    }

    /// Standard output is a pipe that is full and that nobody reads.
    #[must_use]
    pub fn blocked_stdout(mut self) -> Self {
        self.stdout = Stdout::Blocked;
        self
    }

    /// A path on the host that volumes of this machine live below.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    pub fn start(self) -> Machine {
        let info = self.scratch.path().join("pid");
        let _ = fs::remove_file(&info);
        let files = self.scratch.path().join("files.json");
        write_files(&files, &self.files).expect("the scratch directory is writable");
        let mut command = Command::new(binary("cvm-sandbox"));
        command
            .args(&self.options)
            .arg("--files")
            .arg(&files)
            .arg("--info")
            .arg(&info)
            .arg("--")
            .args(&self.command);
        command.env_clear().stdin(Stdio::null()).stderr(Stdio::piped());
        let keep = match self.stdout {
            Stdout::Read => {
                command.stdout(Stdio::piped());
                None
            }
            Stdout::Blocked => {
                let (reader, writer) = full_pipe();
                command.stdout(writer);
                Some(reader)
            }
            Stdout::Broken => {
                let (_, writer) = std::io::pipe().expect("a pipe");
                command.stdout(writer);
                None
            }
        };
        let mut child = command.spawn().expect("cvm-sandbox starts");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let mut readers = vec![collect(child.stderr.take().expect("stderr is piped"), &lines)];
        readers.extend(child.stdout.take().map(|out| collect(out, &lines)));
        let mut machine = Machine {
            child,
            lines,
            pid: Pid::from_raw(0),
            builder: self,
            status: None,
            _unread: keep,
            readers,
        };
        machine.pid = until("process 1 executes its command", PATIENCE, || {
            assert!(
                machine.child.try_wait().ok().flatten().is_none() || info.exists(),
                "{}",
                machine.output()
            );
            fs::read_to_string(&info).ok()?.parse().ok().map(Pid::from_raw)
        });
        machine
    }

    /// Starts it and waits until its gateway is ready.
    #[track_caller]
    pub fn ready(self) -> Machine {
        self.start().ready()
    }
}

/// A pipe with no room left.
fn full_pipe() -> (std::io::PipeReader, std::io::PipeWriter) {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let flags = nix::fcntl::OFlag::O_NONBLOCK;
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(flags)).expect("flags of a pipe");
    while nix::unistd::write(&writer, &[b'.'; 4096]).is_ok() {}
    nix::fcntl::fcntl(&writer, nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::empty()))
        .expect("flags of a pipe");
    (reader, writer)
}
