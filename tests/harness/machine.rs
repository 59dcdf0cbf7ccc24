//! A throw-away machine with the product installed.

use crate::network::Network;
use crate::sandbox::{FileInside, write_files};
use crate::wait::{before, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::cell::RefCell;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

/// `CVM_OWNER` for whoever has this key, in this epoch.
pub fn owner_word(master_key: &str, epoch: &str) -> String {
    use cvm_secrets::keys;
    use cvm_secrets::owner::Epoch;
    use cvm_secrets::secret::Secret;
    let master = keys::MasterKey::new(Secret::copy_of(master_key.as_bytes())).expect("it is not empty");
    keys::owner_word(&master, Epoch::new(epoch.parse().expect("a number")).expect("a small one")).to_string()
}

/// Everything here has happened long before on any machine that is not broken, however busy it is
/// with others.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The one of every machine in S3 mode. Like what a random generator prints: a weaker one is refused.
pub const MASTER_KEY: &str = "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M=";
/// Of that key: see tests/vectors/keys.json.
pub const DEVICE_ID: &str = "b82578d246fd5ff53bb0eb91da774cb27faa3612290a5966f36e4c2b61af1ea3";
pub const GATEWAY_TOKEN: &str = "zAFTUuSdbC5aQssqJbETwS5oEdhBGc5O";

/// Where the binaries under test lie: beside the test that runs.
pub fn binaries() -> PathBuf {
    if let Some(given) = std::env::var_os("CVM_BIN_DIR") {
        return given.into();
    }
    let exe = std::env::current_exe().expect("a running program has a path");
    let mut dir = exe.parent().expect("a program lies in a directory");
    if dir.ends_with("deps") {
        dir = dir.parent().expect("deps lies in the profile's directory");
    }
    dir.to_owned()
}

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

thread_local! {
    /// Where [`product_from`] has it.
    static PRODUCT: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// Puts machines together of the product in `dir`, as long as `work` runs on this thread.
pub fn product_from<T>(dir: &Path, work: impl FnOnce() -> T) -> T {
    PRODUCT.set(Some(dir.to_owned()));
    let done = work();
    PRODUCT.set(None);
    done
}

/// One of the product's binaries.
pub fn product(name: &str) -> PathBuf {
    PRODUCT.with_borrow(Clone::clone).map_or_else(|| binary(name), |dir| dir.join(name))
}

pub fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(path.exists(), "{} is missing: run `make build` first", path.display());
    path
}

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

    /// No /dev/fuse: a file of that name that cannot be opened as one.
    #[must_use]
    pub fn without_fuse(self) -> Self {
        self.bind(Path::new("/dev/full"), "/dev/fuse")
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

fn collect(stream: impl Read + Send + 'static, into: &Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    let into = Arc::clone(into);
    std::thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            into.lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(String::from_utf8_lossy(&line).into_owned());
        }
    })
}

/// A process inside, as /proc shows it from outside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Its pid inside.
    pub pid: i32,
    pub parent: i32,
    pub state: char,
    pub name: String,
    pub arguments: String,
}

/// A machine that runs. Dropping it kills everything in it.
pub struct Machine {
    child: Child,
    lines: Arc<Mutex<Vec<String>>>,
    pid: Pid,
    builder: Builder,
    status: Option<ExitStatus>,
    _unread: Option<std::io::PipeReader>,
    /// Who reads what comes out; they end when everything has been read.
    readers: Vec<JoinHandle<()>>,
}

impl Machine {
    /// The pid of process 1 as seen from outside.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// The root file system inside, as a path outside.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.pid))
    }

    pub fn path(&self, inside: &str) -> PathBuf {
        self.root().join(inside.trim_start_matches('/'))
    }

    /// The volume at /data, as a path outside that outlives the machine.
    pub fn data(&self) -> PathBuf {
        self.builder.scratch().join("data")
    }

    pub fn read(&self, inside: &str) -> String {
        fs::read_to_string(self.path(inside)).unwrap_or_default()
    }

    /// All lines that came out so far.
    pub fn output(&self) -> String {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).join("\n")
    }

    /// Waits for a line that contains `text`, the `nth` one (from 1), and yields it.
    #[track_caller]
    pub fn nth_line(&self, text: &str, nth: usize) -> String {
        before(PATIENCE, || {
            let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            lines.iter().filter(|l| l.contains(text)).nth(nth - 1).cloned()
        })
        .unwrap_or_else(|| panic!("no line {nth} with {text:?} in {PATIENCE:?}:\n{}", self.output()))
    }

    #[track_caller]
    pub fn line(&self, text: &str) -> String {
        self.nth_line(text, 1)
    }

    pub fn lines_with(&self, text: &str) -> usize {
        self.lines.lock().unwrap_or_else(PoisonError::into_inner).iter().filter(|l| l.contains(text)).count()
    }

    /// A command ready to run inside, in all of the machine's namespaces.
    pub fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.pid.to_string(), "-m", "-u", "-i", "-n", "-p", "--"])
            .args(words)
            .env_clear();
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", "/root").stdin(Stdio::null());
        command
    }

    pub fn exec(&self, words: &[&str]) -> Output {
        self.command(words).output().expect("nsenter runs")
    }

    /// Standard output of a command that has to succeed.
    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> String {
        let output = self.exec(words);
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "{words:?} ended with {}:\n{text}{}\nthe machine said:\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            self.output()
        );
        text
    }

    /// What the supervisor says of itself, asked over its control socket.
    #[track_caller]
    pub fn status(&self) -> serde_json::Value {
        let socket = self.path(cvm_protocol::paths::CONTROL_SOCKET);
        let ask = || -> std::io::Result<serde_json::Value> {
            let mut stream = UnixStream::connect(&socket)?;
            stream.write_all(b"{\"v\":1,\"verb\":\"status\"}\n")?;
            Ok(serde_json::from_reader(stream)?)
        };
        until(&format!("the supervisor answers; it said:\n{}", self.output()), PATIENCE, || ask().ok())
    }

    /// One service of the status.
    #[track_caller]
    pub fn service(&self, name: &str) -> serde_json::Value {
        let status = self.status();
        let all = status["services"].as_array().cloned().unwrap_or_default();
        all.into_iter()
            .find(|s| s["name"] == name)
            .unwrap_or_else(|| panic!("no service {name} in {status:#}"))
    }

    /// Waits until a service is in one of `states`, and yields it.
    #[track_caller]
    pub fn service_in(&self, name: &str, states: &[&str]) -> serde_json::Value {
        until(&format!("{name} is in {states:?}; the machine said:\n{}", self.output()), PATIENCE, || {
            let service = self.service(name);
            states.iter().any(|s| service["state"] == *s).then_some(service)
        })
    }

    /// Does something in the machine's file system, on a thread of its own. For what resolves
    /// links itself, as `SQLite` does: a path through /proc leads it astray.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        use nix::sched::{CloneFlags, setns, unshare};
        let namespace = fs::File::open(format!("/proc/{}/ns/mnt", self.pid)).expect("the machine runs");
        let enter = || {
            // Only a thread that shares its root and directory with no other may change them.
            unshare(CloneFlags::CLONE_FS)
                .and_then(|()| setns(&namespace, CloneFlags::CLONE_NEWNS))
                .expect("root may");
            work()
        };
        std::thread::scope(|scope| scope.spawn(enter).join()).expect("nothing in there panics")
    }

    /// Everything that runs inside.
    pub fn processes(&self) -> Vec<Process> {
        let Ok(entries) = fs::read_dir(self.path("/proc")) else { return Vec::new() };
        entries.flatten().filter_map(|e| process(&e.path(), e.file_name().to_str()?.parse().ok()?)).collect()
    }

    /// The process with this name or argument inside; process 1 does not count.
    pub fn find(&self, text: &str) -> Option<Process> {
        self.processes().into_iter().find(|p| p.pid != 1 && (p.name == text || p.arguments.contains(text)))
    }

    /// A pid inside as a pid outside.
    pub fn outside(&self, inside: i64) -> Pid {
        let ours = fs::read_link(format!("/proc/{}/ns/pid", self.pid)).ok();
        let found = fs::read_dir("/proc").into_iter().flatten().flatten().find_map(|entry| {
            let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
            if fs::read_link(entry.path().join("ns/pid")).ok() != ours {
                return None;
            }
            let status = fs::read_to_string(entry.path().join("status")).ok()?;
            let pids = status.lines().find_map(|l| l.strip_prefix("NSpid:"))?;
            (pids.split_ascii_whitespace().last()?.parse() == Ok(inside)).then_some(pid)
        });
        Pid::from_raw(found.expect("a process inside is a process outside"))
    }

    /// Sends a signal to a process inside.
    pub fn kill(&self, pid: i64, signal: &str) {
        self.exec(&["kill", &format!("-{signal}"), &pid.to_string()]);
    }

    /// Sends a signal to process 1 from outside, as a container engine does.
    pub fn signal(&self, signal: Signal) {
        let _ = kill(self.pid, signal);
    }

    pub fn is_running(&mut self) -> bool {
        self.status.is_none() && self.child.try_wait().ok().flatten().is_none()
    }

    /// Waits for the end and yields the status of process 1 (128 + n for a signal).
    #[track_caller]
    pub fn wait(&mut self) -> i32 {
        let lines = Arc::clone(&self.lines);
        let status = before(PATIENCE, || self.child.try_wait().expect("the sandbox is our child"))
            .unwrap_or_else(|| panic!("the machine did not end in {PATIENCE:?}:\n{}", self.output()));
        self.status = Some(status);
        for reader in self.readers.drain(..) {
            let _ = reader.join();
        }
        status.code().unwrap_or_else(|| {
            panic!(
                "the sandbox itself died: {status}: {:?}",
                lines.lock().unwrap_or_else(PoisonError::into_inner)
            )
        })
    }

    /// SIGTERM, and the status of the ordered shutdown.
    #[track_caller]
    pub fn stop(&mut self) -> i32 {
        self.signal(Signal::SIGTERM);
        self.wait()
    }

    /// Stops everything in it where it is.
    pub fn freeze(&self) {
        let ours = fs::read_link(format!("/proc/{}/ns/pid", self.pid)).ok();
        // What was started while others were stopped is met by the second look.
        for _ in 0..2 {
            for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
                let name = entry.file_name();
                let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
                if fs::read_link(entry.path().join("ns/pid")).ok() == ours {
                    let _ = kill(Pid::from_raw(pid), Signal::SIGSTOP);
                }
            }
        }
    }

    /// Loses the machine: everything in it is killed at once.
    pub fn destroy(&mut self) {
        // 0 would be this process and its whole group: the machine never came to be.
        if self.pid.as_raw() > 0 {
            let _ = kill(self.pid, Signal::SIGKILL);
        } else {
            let _ = self.child.kill();
        }
        let _ = self.child.wait();
    }

    /// Another machine with the same settings and volumes; whatever was elsewhere is gone.
    #[must_use]
    pub fn again(mut self, change: impl FnOnce(Builder) -> Builder) -> Machine {
        self.destroy();
        let builder = std::mem::take(&mut self.builder);
        drop(self);
        change(builder).start()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.destroy();
    }
}

fn process(dir: &Path, pid: i32) -> Option<Process> {
    let stat = fs::read_to_string(dir.join("stat")).ok()?;
    let (head, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let name = head.split_once('(')?.1.to_owned();
    let arguments = fs::read(dir.join("cmdline")).ok()?;
    let arguments = String::from_utf8_lossy(&arguments).replace('\0', " ").trim_end().to_owned();
    Some(Process { pid, parent, state, name, arguments })
}
