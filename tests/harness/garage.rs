//! A real S3 server of one's own: Garage, with one node on the loopback.
//!
//! It ignores If-Match and If-None-Match, as a server may; see [`crate::proxy`] for one that
//! does not.

use crate::machine::{PATIENCE, repository};
use crate::network::own_loopback;
use crate::s3::{Bucket, S3};
use crate::wait::until;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;

/// The name of the bucket that is there from the start.
const BUCKET: &str = "state";

/// A store that runs. Dropping it kills it and removes its data; so does the end of the test's
/// process, whatever ended it, but for the data.
pub struct Garage {
    scratch: tempfile::TempDir,
    bucket: Bucket,
    server: Option<Server>,
}

/// The process, and who waits for it. Death with the parent means with the thread that
/// started it, so that thread stays.
struct Server {
    pid: Pid,
    waits: JoinHandle<()>,
}

impl Garage {
    pub fn start() -> Self {
        let scratch =
            tempfile::Builder::new().prefix("cvm-garage-").tempdir().expect("a temporary directory");
        let address = own_loopback(2);
        let [_, a, b, c] =
            address.ip().to_string().parse::<std::net::Ipv4Addr>().map_or([0; 4], |ip| ip.octets());
        let number = u32::from_be_bytes([0, a, b, c]);
        let s3 = S3 {
            address,
            region: "us-east-1".into(),
            access_key: format!("GK{number:024x}"),
            secret_key: format!("{number:064x}"),
            timeout: PATIENCE,
        };
        let mut garage = Self { scratch, bucket: s3.bucket(BUCKET), server: None };
        garage.configure();
        garage.run(true);
        until(&format!("the bucket is there: {}", garage.log()), PATIENCE, || {
            garage.bucket.send("HEAD", "nothing", &[], &[]).ok().filter(|r| r.status == 404)
        });
        garage
    }

    fn configure(&self) {
        let dir = self.scratch.path().display();
        let SocketAddr::V4(s3) = self.s3().address else { unreachable!("the loopback has an old address") };
        let rpc = SocketAddr::from((*s3.ip(), s3.port() + 1));
        let text = format!(
            "metadata_dir = \"{dir}/meta\"\n\
             data_dir = \"{dir}/data\"\n\
             db_engine = \"sqlite\"\n\
             replication_factor = 1\n\
             compression_level = \"none\"\n\
             rpc_bind_addr = \"{rpc}\"\n\
             rpc_public_addr = \"{rpc}\"\n\
             rpc_secret = \"{}\"\n\
             [s3_api]\n\
             s3_region = \"{}\"\n\
             api_bind_addr = \"{s3}\"\n",
            self.s3().secret_key,
            self.s3().region,
        );
        fs::write(self.configuration(), text).expect("the scratch directory is writable");
    }

    fn configuration(&self) -> PathBuf {
        self.scratch.path().join("garage.toml")
    }

    fn command(&self) -> Command {
        let program = repository().join("target/garage/bin/garage");
        assert!(program.exists(), "{} is missing: run `tests/setup test` first", program.display());
        let mut command = Command::new(program);
        command.arg("-c").arg(self.configuration()).env_clear().stdin(Stdio::null());
        command
    }

    /// Everything the server said.
    pub fn log(&self) -> String {
        fs::read_to_string(self.scratch.path().join("log")).unwrap_or_default()
    }

    fn run(&mut self, first: bool) {
        let mut command = self.command();
        command.args(["server", "--single-node"]);
        // Later on it would give back the permission that was taken away.
        if first {
            command
                .arg("--default-bucket")
                .env("GARAGE_DEFAULT_ACCESS_KEY", self.access_key())
                .env("GARAGE_DEFAULT_SECRET_KEY", self.secret_key())
                .env("GARAGE_DEFAULT_BUCKET", BUCKET);
        }
        let log = File::options().create(true).append(true).open(self.scratch.path().join("log"));
        let log = log.expect("the scratch directory is writable");
        command.stdout(log.try_clone().expect("a second descriptor")).stderr(log);
        die_with_parent(&mut command);
        let (news, pid) = mpsc::channel();
        let waits = std::thread::spawn(move || {
            let mut child = command.spawn().expect("garage starts");
            let _ = news.send(Pid::from_raw(child.id().cast_signed()));
            let _ = child.wait();
        });
        self.server = Some(Server { pid: pid.recv().expect("garage starts"), waits });
        until("the store answers", PATIENCE, || {
            let running = self.server.as_ref().is_some_and(|s| !s.waits.is_finished());
            assert!(running, "the store ended:\n{}", self.log());
            self.s3().send("GET", "/", &[], &[], &[]).ok()
        });
    }

    /// Kills the server; what is stored stays.
    pub fn stop(&mut self) {
        if let Some(Server { pid, waits }) = self.server.take() {
            if !waits.is_finished() {
                let _ = kill(pid, Signal::SIGKILL);
            }
            let _ = waits.join();
        }
    }

    /// A server on the same data at the same address.
    pub fn restart(&mut self) {
        self.stop();
        self.run(false);
    }

    pub fn pid(&self) -> Option<Pid> {
        self.server.as_ref().map(|s| s.pid)
    }

    #[track_caller]
    fn administer(&self, words: &[&str]) {
        let output = self.command().args(words).output().expect("garage runs");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Another bucket, for the same key.
    #[track_caller]
    pub fn new_bucket(&self, name: &str) -> Bucket {
        self.administer(&["bucket", "create", name]);
        self.administer(&[
            "bucket",
            "allow",
            "--read",
            "--write",
            "--owner",
            name,
            "--key",
            self.access_key(),
        ]);
        self.s3().bucket(name)
    }

    /// Takes the key's permission on the bucket away.
    #[track_caller]
    pub fn deny(&self) {
        self.permission("deny", &["--read", "--write", "--owner"]);
    }

    /// Leaves the key the permission to read and no other.
    #[track_caller]
    pub fn deny_writing(&self) {
        self.permission("deny", &["--write", "--owner"]);
    }

    #[track_caller]
    pub fn allow(&self) {
        self.permission("allow", &["--read", "--write", "--owner"]);
    }

    fn permission(&self, verb: &str, which: &[&str]) {
        self.administer(&[&["bucket", verb], which, &[BUCKET, "--key", self.access_key()]].concat());
    }

    pub fn address(&self) -> SocketAddr {
        self.s3().address
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address())
    }

    pub fn access_key(&self) -> &str {
        &self.s3().access_key
    }

    pub fn secret_key(&self) -> &str {
        &self.s3().secret_key
    }

    pub fn region(&self) -> &str {
        &self.s3().region
    }

    /// A client that goes straight to this server.
    pub fn s3(&self) -> &S3 {
        &self.bucket.s3
    }

    /// The name of the bucket.
    pub fn bucket(&self) -> &str {
        &self.bucket.name
    }

    /// Where the server keeps everything, on disk.
    pub fn directory(&self) -> &std::path::Path {
        self.scratch.path()
    }
}

/// The bucket that is there from the start, as the store sees it.
impl std::ops::Deref for Garage {
    type Target = Bucket;

    fn deref(&self) -> &Bucket {
        &self.bucket
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        self.stop();
    }
}

#[allow(unsafe_code)]
fn die_with_parent(command: &mut Command) {
    let request = || nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(std::io::Error::from);
    // SAFETY: one system call, which allocates nothing and takes no lock.
    unsafe { command.pre_exec(request) };
}
