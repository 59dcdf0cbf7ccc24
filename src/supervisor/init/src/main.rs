//! PID 1: the one process that acts on what `cvm-system` and `cvm-machine` decide.
//!
//! It reads the environment once, derives the keys, and from then on does what the pure state
//! machine of `cvm-machine` says: start keepers, signal them, listen to them, reap them, and
//! answer operators on a unix socket. One thread, one wait point.
//!
//! It does not block, panic, touch `/data` or talk on the network, and does not exit because
//! something around it failed.

#![deny(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![deny(clippy::unreachable, clippy::todo, clippy::unimplemented)]

mod control;
mod defect;
mod dstack;
mod event_loop;
mod exit;
mod keepers;
mod last_net;
mod launch;
mod log;
mod plain;
mod reexec;
mod secret_files;

use cvm_machine::machine::Machine;
use cvm_machine::plan::Unplannable;
use cvm_machine::snapshot::About;
use cvm_protocol::paths;
use cvm_protocol::status::{self, Fingerprint, Remark, StorageMode};
use cvm_protocol::volume::Claim;
use cvm_secrets::keys::KeyRing;
use cvm_sys::clock::BootTime;
use cvm_sys::kernel::Linux;
use cvm_sys::signals;
use cvm_system::config::{Config, Storage};
use cvm_system::env::{Environment, Problem, Warning};
use cvm_system::owner::{self, Proof};
use cvm_system::roles::{self, Given};
use nix::poll::{PollFd, PollFlags, poll};
use secret_files::Exposed;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::Write as _;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;

const HELP: &str = "\
cvm-init: PID 1 of a confidential VM that runs an OpenClaw gateway

    cvm-init                    boot and supervise everything; configured by environment variables
    cvm-init -- CMD ARG...      run one command as a small container init would
    cvm-init --check            check the environment, report every mistake, start nothing
    cvm-init --help | --version

Exit status:  0  stopped in order          64  wrong command line     70  defect or missing right
             71  processes left that the kernel holds    75  stopped, but the bucket lacks something
             78  wrong configuration, nothing was started
With `-- CMD` the status is the command's own, 128 + N if signal N ended it,
127 if it does not exist and 126 if it cannot be run. What the command leaves behind
is waited for; after SIGTERM, SIGINT or SIGQUIT it gets the same signal when the
command has ended, and SIGKILL 5 s later.

Examples:
    docker run -e MASTER_KEY=... -v data:/data IMAGE
    docker run --entrypoint cvm-init IMAGE -- sleep 60
";

fn main() -> ExitCode {
    let began = BootTime::now();
    signals::block_all();
    let arguments: Vec<OsString> = std::env::args_os().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(|a| a.to_str().unwrap_or_default()).collect();
    ExitCode::from(match words.as_slice() {
        [] => supervise(began),
        ["--", ..] => plain::run(arguments.get(1..).unwrap_or_default()),
        ["--check"] => check(),
        ["--help" | "-h"] => {
            print(HELP);
            exit::CLEAN
        }
        ["--version" | "-V"] => {
            print(concat!("cvm-init ", env!("CARGO_PKG_VERSION"), "\n"));
            exit::CLEAN
        }
        _ => {
            eprint!("cvm-init: unknown arguments; a command comes after `--`\n\n{HELP}");
            exit::USAGE
        }
    })
}

fn check() -> u8 {
    let mut environment = reexec::current();
    let covered = secret_files::read(&mut environment, Exposed::OnlyJudge);
    match configuration(&environment) {
        Ok(Settings { config, warnings, .. }) => {
            for line in covered {
                print(&format!("note: {line}\n"));
            }
            for warning in warnings {
                print(&format!("warning: {warning}\n"));
            }
            for door in config.doors {
                print(&format!("warning: {door}\n"));
            }
            print("The configuration is complete and correct.\n");
            exit::CLEAN
        }
        Err(problems) => {
            print(&mistakes(&problems));
            exit::CONFIG
        }
    }
}

/// The configuration of this environment, once it is known that its author may write it.
struct Settings {
    config: Config,
    warnings: Vec<Warning>,
    proof: Option<Proof>,
    dstack: bool,
}

/// Checks the configuration, its owner, and the accounts of this image.
fn configuration(environment: &Environment) -> Result<Settings, Vec<Problem>> {
    let (mut config, warnings) = Config::parse(environment)?;
    let proof = owner::prove(&config).map_err(|problem| vec![problem])?;
    let [passwd, group] = ["/etc/passwd", "/etc/group"].map(|path| std::fs::read(path).unwrap_or_default());
    let (passwd, group) = (String::from_utf8_lossy(&passwd), String::from_utf8_lossy(&group));
    if let Some(problem) = config.check_account(&passwd, &group) {
        return Err(vec![problem]);
    }
    let dstack = dstack::is_here();
    config.doors.extend((dstack && proof.is_none()).then(owner::unowned));
    Ok(Settings { config, warnings, proof, dstack })
}

/// The boot, up to the border.
fn supervise(began: BootTime) -> u8 {
    if std::process::id() != 1 {
        eprintln!(
            "cvm-init: without arguments it has to be process 1: start it as the entrypoint of a container, \
             or under `unshare --pid --fork --mount-proc`. `cvm-init -- CMD` works anywhere."
        );
        return exit::USAGE;
    }
    let mut hidden = Ok(());
    let mut environment = match reexec::life() {
        reexec::Life::Second(fd) => match reexec::receive(fd) {
            Ok(environment) => environment,
            Err(error) => {
                eprintln!("cvm-init: the environment was lost on the way: {error}");
                return exit::INTERNAL;
            }
        },
        reexec::Life::First => {
            hidden = Err(reexec::begin_second_life());
            reexec::current()
        }
    };
    cvm_sys::private::keep_private();
    let Ok(kernel) = Linux::taking(&event_loop::HANDLED) else {
        eprintln!("cvm-init: no descriptors left for signals");
        return exit::INTERNAL;
    };
    let covered = secret_files::read(&mut environment, Exposed::Cover);
    let settings = match configuration(&environment) {
        Ok(settings) => settings,
        Err(problems) => {
            utter(&mistakes(&problems));
            return exit::CONFIG;
        }
    };
    let mut supervisor = match prepare(settings, environment, kernel, began) {
        Ok(supervisor) => supervisor,
        Err(why) => {
            utter(&format!(
                "ERROR The plan of this machine has a fault: {why}. This is a bug; nothing was started.\n"
            ));
            return exit::INTERNAL;
        }
    };
    for line in covered {
        tracing::info!("{line}");
    }
    if let Err(why) = hidden {
        tracing::warn!("The environment stays visible in /proc/1/environ: {why}");
    }
    // ------------------------------------------------------------------------------------
    // The border. Before it, a mistake of the user's may end the process with a numbered
    // status, since nothing runs yet. After it, only an ordered shutdown does.
    // ------------------------------------------------------------------------------------
    supervisor.run()
}

/// Everything the loop needs. What is secret and not needed any more is wiped on the way.
fn prepare(
    settings: Settings,
    environment: Environment,
    kernel: Linux,
    began: BootTime,
) -> Result<event_loop::Supervisor<Linux>, Unplannable> {
    let Settings { config, warnings, proof, dstack } = settings;
    let log = log::Log::start(config.log.level, config.log.format);
    tracing::info!("openclaw-cvm {} starting", env!("CARGO_PKG_VERSION"));
    tracing::info!("{}", environment.inventory());
    for warning in &warnings {
        tracing::warn!("{warning}");
    }
    for door in &config.doors {
        tracing::warn!("{door}");
    }
    let remarks = remarks_on_dstack();
    if let Err(error) = forget_former_keys(Path::new(paths::AUTHORIZED_KEYS)) {
        tracing::error!("{} of a former life stays: {error}", paths::AUTHORIZED_KEYS);
    }
    let keys = config.master_key.as_ref().map(|master| {
        tracing::info!("Deriving keys from MASTER_KEY...");
        let keys = KeyRing::derive(master);
        tracing::info!("Keys derived (crypt password, crypt salt, gateway token).");
        keys
    });
    let owner_epoch = proof.as_ref().map_or(0, |proof| proof.epoch.get());
    let has_preload = Path::new(paths::PRELOAD).exists();
    let given = Given { config: &config, keys: keys.as_ref(), owner_epoch, has_preload };
    let (plan, specifications) = roles::gateway(&given)?;
    let claim = Claim {
        key: keys.as_ref().map(|keys| keys.volume_fingerprint.to_hex()),
        proven: proof.is_some(),
        epoch: owner_epoch,
        dstack,
    };
    let about = About {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        storage: storage(&config),
        keys: keys.as_ref().map(fingerprints).unwrap_or_default(),
        doors: config.doors.clone(),
        // The first lines of the log are soon out of sight; warnings about the configuration stay true.
        remarks: warnings
            .iter()
            .map(|w| Remark { topic: w.variable.clone(), text: w.says.clone() })
            .chain(remarks)
            .collect(),
    };
    let machine = Machine::new(plan);
    if let Some(warning) = machine.warning_of_a_long_stop() {
        tracing::warn!("{warning}");
    }
    let keepers = keepers::Keepers::new();
    let launcher =
        launch::Launcher::new(config, &environment, keys, specifications, claim, keepers.home().to_owned());
    drop(environment);
    let mut supervisor = event_loop::Supervisor::new(machine, launcher, keepers, kernel, log, about, began);
    supervisor.start_logger();
    Ok(supervisor)
}

/// Removes the keys that could log in before this container was started again: its /run may be on a disk. The task
/// `volume` may fail before it gets to them, and sshd starts all the same.
fn forget_former_keys(path: &Path) -> std::io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Before the first child.
fn remarks_on_dstack() -> Vec<Remark> {
    let texts = dstack::put_away();
    for text in &texts {
        tracing::warn!("{text}");
    }
    if texts.is_empty() {
        return Vec::new();
    }
    vec![Remark { topic: "dstack".to_owned(), text: texts.join("; ") }]
}

fn storage(config: &Config) -> status::Storage {
    match &config.storage {
        Storage::Local => status::Storage::new(
            StorageMode::Local,
            "state lives on the volume at /data; it does not survive the loss of this machine",
        ),
        Storage::S3(s3) => status::Storage::new(
            StorageMode::S3,
            format!(
                "state lives in bucket {} below {}, encrypted, and on the volume; it survives the loss of this machine",
                s3.bucket.as_str(),
                s3.prefix.as_str()
            ),
        ),
    }
}

fn fingerprints(keys: &KeyRing) -> Vec<Fingerprint> {
    let named = [
        ("crypt password", keys.crypt_password.fingerprint()),
        ("crypt salt", keys.crypt_salt.fingerprint()),
        ("gateway token", keys.gateway_token.fingerprint()),
        ("device id", keys.device_seed.device_id()),
    ];
    named.map(|(name, fingerprint)| Fingerprint { name: name.to_owned(), fingerprint }).into()
}

/// Says every mistake at once. Nothing was started, so leaving is safe.
fn mistakes(problems: &[Problem]) -> String {
    let count = problems.len();
    let noun = if count == 1 { "mistake" } else { "mistakes" };
    let mut text = format!("ERROR The configuration has {count} {noun}; nothing was started.\n");
    for problem in problems {
        let _ = writeln!(text, "ERROR   {problem}");
    }
    text
}

/// Prints for the caller. Whether the text arrives does not change the exit status.
fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// Prints as PID 1, before the loop runs: a pipe that is full gets a second to take the text, and a broken one does
/// not change the exit status.
fn utter(text: &str) {
    let Ok(stdout) = cvm_sys::descriptor::own_nonblocking(1) else { return };
    let until = BootTime::now() + std::time::Duration::from_secs(1);
    let mut rest = text.as_bytes();
    while !rest.is_empty() && BootTime::now() < until {
        match cvm_sys::descriptor::write_some(&stdout, rest) {
            Ok(n) => rest = rest.get(n..).unwrap_or_default(),
            Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EINTR) => {
                let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::POLLOUT)];
                let _ = poll(&mut fds, 100u16);
            }
            Err(_) => return,
        }
    }
}
