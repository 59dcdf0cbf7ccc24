//! A machine that runs.

use super::{Builder, PATIENCE};
use crate::wait::{before, lock, until};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

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
    pub(super) child: Child,
    pub(super) lines: Arc<Mutex<Vec<String>>>,
    pub(super) pid: Pid,
    pub(super) builder: Builder,
    pub(super) status: Option<ExitStatus>,
    pub(super) _unread: Option<std::io::PipeReader>,
    /// Who reads what comes out; they end when everything has been read.
    pub(super) readers: Vec<JoinHandle<()>>,
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
        lock(&self.lines).join("\n")
    }

    /// Waits for a line that contains `text`, the `nth` one (from 1), and yields it.
    #[track_caller]
    pub fn nth_line(&self, text: &str, nth: usize) -> String {
        before(PATIENCE, || {
            let lines = lock(&self.lines);
            lines.iter().filter(|l| l.contains(text)).nth(nth - 1).cloned()
        })
        .unwrap_or_else(|| panic!("no line {nth} with {text:?} in {PATIENCE:?}:\n{}", self.output()))
    }

    #[track_caller]
    pub fn line(&self, text: &str) -> String {
        self.nth_line(text, 1)
    }

    pub fn lines_with(&self, text: &str) -> usize {
        lock(&self.lines).iter().filter(|l| l.contains(text)).count()
    }

    /// A command ready to run inside, in all of the machine's namespaces.
    pub fn command(&self, words: &[impl AsRef<OsStr>]) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["-t", &self.pid.to_string(), "-m", "-u", "-i", "-n", "-p", "--"])
            .args(words)
            .env_clear();
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        command.env("HOME", "/root").stdin(Stdio::null());
        command
    }

    pub fn exec(&self, words: &[impl AsRef<OsStr>]) -> Output {
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

    /// The value of a fact that a service reports, as it stands in the status.
    pub fn fact(&self, service: &str, label: &str) -> Option<serde_json::Value> {
        let facts = self.service(service)["facts"].as_array().cloned().unwrap_or_default();
        let fact = facts.into_iter().find(|fact| fact["label"] == label)?;
        Some(fact["value"].clone())
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

    /// Waits until its gateway is ready.
    #[track_caller]
    #[must_use]
    pub fn ready(self) -> Self {
        self.service_in("gateway", &["ready"]);
        self
    }

    /// Waits until a service runs, and yields its pid.
    #[track_caller]
    pub fn pid_of(&self, service: &str) -> i64 {
        self.service_in(service, &["up", "ready"])["pid"].as_i64().expect("a running service has a pid")
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
        status.code().unwrap_or_else(|| panic!("the sandbox itself died: {status}: {:?}", lock(&lines)))
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

/// Reads lines as they come.
pub(super) fn collect(stream: impl Read + Send + 'static, into: &Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    let into = Arc::clone(into);
    std::thread::spawn(move || {
        for line in BufReader::new(stream).split(b'\n').map_while(Result::ok) {
            lock(&into).push(String::from_utf8_lossy(&line).into_owned());
        }
    })
}
