//! The peers: other inits and supervisors, each started as process 1 of a machine like ours.

use cvm_harness::machine::{binaries, product as binary_of_product, product_from, repository};
use cvm_harness::{Builder, Machine};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

/// Services that do nothing, for those that keep services.
pub(crate) const SERVICES: usize = 5;

/// The product of one commit.
pub(crate) struct Build {
    /// The commit's, of the one that this one is measured beside.
    pub(crate) name: Option<String>,
    dir: PathBuf,
}

impl Build {
    /// Machines that `work` starts are of this build.
    pub(crate) fn chosen<T>(&self, work: impl FnOnce() -> T) -> T {
        product_from(&self.dir, work)
    }
}

/// This commit's, and then what `make bench BESIDE=COMMIT` has built, if that was asked for.
pub(crate) fn builds() -> &'static [Build] {
    static BUILDS: LazyLock<Vec<Build>> = LazyLock::new(|| {
        let mut builds = vec![Build { name: None, dir: binaries() }];
        let beside = std::env::var_os("CVM_BESIDE").filter(|dir| !dir.is_empty()).map(PathBuf::from);
        builds.extend(beside.map(|dir| {
            // .../COMMIT/bin
            let commit = dir.parent().and_then(Path::file_name).unwrap_or_default();
            let name = commit.to_string_lossy().chars().take(7).collect();
            Build { name: Some(name), dir }
        }));
        builds
    });
    &BUILDS
}

/// Something that can be process 1.
pub(crate) struct Contestant {
    pub(crate) name: &'static str,
    /// Which of [`builds`] it is of; the peers are of the first.
    pub(crate) build: usize,
    start: fn() -> Option<Machine>,
}

impl Contestant {
    pub(crate) fn start(&self) -> Option<Machine> {
        builds()[self.build].chosen(self.start)
    }
}

/// Small inits that run one command.
pub(crate) fn small_inits() -> Vec<(&'static str, Vec<String>)> {
    let own = "/usr/local/sbin/cvm-init";
    let all = [
        ("cvm-init --", own, vec![own, "--"]),
        ("tini", "/usr/bin/tini", vec!["/usr/bin/tini", "--"]),
        ("dumb-init", "/usr/bin/dumb-init", vec!["/usr/bin/dumb-init", "--"]),
        ("catatonit", "/usr/bin/catatonit", vec!["/usr/bin/catatonit", "--"]),
    ];
    let here = all.into_iter().filter(|(name, path, _)| *name == "cvm-init --" || Path::new(path).exists());
    here.map(|(name, _, words)| (name, words.into_iter().map(str::to_owned).collect())).collect()
}

/// A machine with only the init and the victim in it.
pub(crate) fn bare(command: &[&str]) -> Builder {
    Builder::new()
        .copy(&binary_of_product("cvm-init"), "/usr/local/sbin/cvm-init")
        .copy(&binaries().join("cvm-victim"), "/usr/local/bin/cvm-victim")
        .environment("PATH", "/usr/local/bin:/usr/bin:/bin")
        .command(command)
}

/// The product with a stub in the gateway's place, and the gateway's user in place as the image
/// has it. Its process 1 notes the time before its first exec.
pub(crate) fn product() -> Builder {
    with_user(Builder::product())
        .copy(&binaries().join("cvm-victim"), cvm_protocol::paths::NODE)
        .file(cvm_protocol::paths::OPENCLAW, "", 0o644)
        .environment("MASTER_KEY", cvm_harness::machine::MASTER_KEY)
        // The script has it too.
        .environment("ENABLE_DOCKER", "1")
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
        .environment("OPENCLAW_GATEWAY_RESTART_MAX_DELAY", "0")
        .command(&["/usr/local/bin/cvm-victim", "stamp", "/tmp/began", "/usr/local/sbin/cvm-init"])
}

pub(crate) fn with_user(builder: Builder) -> Builder {
    let with = |file: &str, line: &str| std::fs::read_to_string(file).unwrap_or_default() + line;
    builder
        .file("/etc/passwd", &with("/etc/passwd", "openclaw:x:990:990::/home/openclaw:/bin/bash\n"), 0o644)
        .file("/etc/group", &with("/etc/group", "openclaw:x:990:\n"), 0o644)
        .file("/home/openclaw/.profile", "", 0o644)
}

/// The shell script that does the same, one step after the other.
pub(crate) fn script() -> Builder {
    Builder::product()
        .copy(&binaries().join("cvm-victim"), cvm_protocol::paths::NODE)
        .bind(&repository().join("target/openclaw"), "/opt/real")
        .copy(&repository().join("tests/bench/boot.sh"), "/boot.sh")
        .environment("MASTER_KEY", cvm_harness::machine::MASTER_KEY)
        .command(&["/usr/local/bin/cvm-victim", "stamp", "/tmp/began", "/bin/sh", "/boot.sh"])
}

/// Supervisors with idle services.
pub(crate) fn supervisors() -> Vec<Contestant> {
    let ours = (0..builds().len()).map(|build| Contestant {
        name: "cvm-init",
        build,
        start: || Some(product().start()),
    });
    let peer = |name, start| Contestant { name, build: 0, start };
    let peers = [
        peer("tini", tini),
        peer("s6-svscan", s6),
        peer("runsvdir", runit),
        peer("supervisord", supervisord),
    ];
    ours.chain(peers).collect()
}

fn installed(program: &str) -> Option<()> {
    Path::new(program).exists().then_some(())
}

fn tini() -> Option<Machine> {
    installed("/usr/bin/tini")?;
    Some(bare(&["/usr/bin/tini", "--", "cvm-victim", "wait"]).start())
}

const RUN: &str = "#!/bin/sh\nexec cvm-victim wait\n";

fn with_services(mut builder: Builder) -> Builder {
    for n in 0..SERVICES {
        builder = builder.file(&format!("/services/idle{n}/run"), RUN, 0o755);
    }
    builder
}

fn s6() -> Option<Machine> {
    let program = ["/usr/bin/s6-svscan", "/bin/s6-svscan"].into_iter().find(|p| Path::new(p).exists())?;
    Some(with_services(bare(&[program, "/services"])).start())
}

fn runit() -> Option<Machine> {
    installed("/usr/bin/runsvdir")?;
    Some(with_services(bare(&["/usr/bin/runsvdir", "/services"])).start())
}

fn supervisord() -> Option<Machine> {
    installed("/usr/bin/supervisord")?;
    let mut text =
        "[supervisord]\nnodaemon=true\nuser=root\nlogfile=/dev/null\nlogfile_maxbytes=0\n".to_owned();
    for n in 0..SERVICES {
        let _ = write!(text, "[program:idle{n}]\ncommand=cvm-victim wait\n");
    }
    let command = ["/usr/bin/supervisord", "-c", "/supervisord.conf"];
    Some(bare(&command).file("/supervisord.conf", &text, 0o644).start())
}
