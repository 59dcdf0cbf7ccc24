//! The command line as data: the commands, their options, their help and examples.

// The comments below are the text of the help, where backticks would be visible.
#![allow(clippy::doc_markdown)]

mod storage;
mod values;
mod volume;

use crate::failure::{Exit, Failure};
use crate::stdout;
use crate::style;
use clap::{Args, Parser, Subcommand};
use cvm_secrets::owner::Epoch;
use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::PathBuf;
use std::time::Duration;
use values::{lines, seconds};

pub(crate) use storage::{
    StorageCommand, StorageDecideArgs, StorageGetArgs, StorageLsArgs, StorageStatusArgs,
};
pub(crate) use values::{Lines, Shell};
pub(crate) use volume::{AdoptArgs, VolumeCommand};

const EXIT_CODES: &str = "\
Exit codes:
  0  done; healthy; no check failed
  1  done, and the answer is bad: not healthy, a check failed, a service did not start
  2  the command line or the given configuration is wrong, or MASTER_KEY cannot be one
  3  the supervisor, or the storage worker, cannot be reached
  4  the supervisor, or the storage worker, refused

Environment:
  NO_COLOR             no colours, also on a terminal
  CVM_CONTROL_SOCKET   path of the supervisor's control socket, in place of the usual one
  CVM_STORAGE_SOCKET   the same for the storage worker's";

/// The operator's program of openclaw-cvm: inside the VM over SSH, and on a laptop.
#[derive(Debug, Parser)]
#[command(name = "cvm", version, after_help = EXIT_CODES, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Show what runs, what does not and why, and how the boot went
    ///
    /// Shows the supervisor's own snapshot: services, boot steps, storage, remarks, and
    /// fingerprints of the derived keys. It holds no secret and may be pasted in public.
    ///
    /// In S3 mode it begins with the storage worker's answer to the question whether everything is in
    /// the bucket.
    #[command(after_help = "\
Examples:
  cvm status                       the table
  cvm status --watch               the same, redrawn every second
  cvm status --json | jq .services

Exit codes: 0 healthy, 1 not healthy, 3 the supervisor cannot be reached.")]
    Status(StatusArgs),

    /// Show the log of a service, or which logs there are
    ///
    /// Reads the files at /var/log/openclaw-cvm directly, so it works without the supervisor.
    /// A service's log may hold private content; `supervisor` is the boot log.
    ///
    /// With --boot the log of an earlier boot, kept in the bucket (S3 mode only); `supervisor`
    /// unless a service is named. It outlives the machine: the last lines of a machine that is gone
    /// are read on its successor.
    ///
    /// On a terminal, control sequences other than colours are shown instead of obeyed.
    #[command(after_help = "\
Examples:
  cvm logs                         which logs there are
  cvm logs gateway                 the last 100 lines
  cvm logs gateway -n 1000 | less
  cvm logs supervisor -n all       everything that is kept
  cvm logs gateway -f              and go on with new lines
  cvm logs --boots                 which earlier boots there are
  cvm logs --boot -1               how the boot before this one ended
  cvm logs --boot -1 gateway -n all")]
    Logs(LogsArgs),

    /// Start a service that is stopped, parked or waiting, and wait until it runs
    #[command(after_help = "\
Examples:
  cvm start gateway
  cvm start gateway --timeout 300  a first start that migrates a large state

Exit codes: 0 the service runs and is ready, 1 it does not (and why), 3 no supervisor, 4 refused.")]
    Start(ServiceArgs),

    /// Stop a service, and wait until no process of it is left
    ///
    /// The service stays stopped until `cvm start`. Stopping sshd needs --force, because operators log
    /// in through it.
    #[command(after_help = "\
Examples:
  cvm stop gateway                 drains for up to OPENCLAW_GATEWAY_STOP_TIMEOUT
  cvm stop dockerd --no-wait")]
    Stop(StopArgs),

    /// Stop a service and start it again
    #[command(after_help = "\
Examples:
  cvm restart gateway
  cvm restart gateway --no-wait")]
    Restart(ServiceArgs),

    /// Ask about the encrypted bucket, give orders about it, or restore from it (S3 mode)
    ///
    /// All of them ask the storage worker of this VM, except `restore`, which works on any machine.
    #[command(after_help = "\
Examples:
  cvm storage status               is my data in the bucket?
  cvm storage flush                push everything now
  cvm storage restore --to state   on any machine, from MASTER_KEY and the bucket's credentials")]
    Storage {
        #[command(subcommand)]
        what: StorageCommand,
    },

    /// Give the volume to another MASTER_KEY
    ///
    /// A volume remembers the key with which it was first used. With another key, or with none, no
    /// gateway is started and no SSH key opens a shell; `cvm status` then says so.
    #[command(after_help = "\
Example:
  cvm volume adopt FINGERPRINT     before the key is changed: see `cvm volume adopt --help`")]
    Volume {
        #[command(subcommand)]
        what: VolumeCommand,
    },

    /// Mint a token with which a chat is paired with this instance
    ///
    /// Asks the mux-server's operator interface, with the admin token from MUX_ADMIN_TOKEN, from the
    /// file that MUX_ADMIN_TOKEN_FILE names, or from a prompt that hides the input.
    ///
    /// Inside of the VM it knows server and device. Elsewhere MUX_BASE_URL or --server names the
    /// server, and --device or MASTER_KEY the device.
    #[command(after_help = "\
Examples:
  cvm pair telegram                asks for the admin token
  cvm pair discord --session agent:main:discord:channel:1234
  MUX_ADMIN_TOKEN_FILE=token.txt cvm pair telegram --json | jq -r .deepLink

Exit codes: 0 minted, 1 the mux-server minted none, 2 the server, the device or the token is not given.")]
    Pair(PairArgs),

    /// Print one line and exit with a code, for HEALTHCHECK
    #[command(after_help = "\
Examples:
  cvm health                       0 healthy; 1 not healthy, or no supervisor
  cvm health --verbose

In a Dockerfile:
  HEALTHCHECK CMD [\"cvm\", \"health\"]")]
    Health(HealthArgs),

    /// Derive from MASTER_KEY what an operator needs outside of the VM
    ///
    /// Works on a laptop: no supervisor, no root, no network. MASTER_KEY is taken from, in this
    /// order: standard input if the last argument is `-`; the variable MASTER_KEY; the file that
    /// MASTER_KEY_FILE names; standard input if it is not a terminal; a prompt that hides the input.
    ///
    /// Every byte counts and nothing is decoded, with one exception: line breaks at the very end
    /// of a file or of standard input are no part of the key, as in the supervisor.
    #[command(after_help = "\
Examples:
  cvm derive gateway-token                       asks for the key
  MASTER_KEY_FILE=key.txt cvm derive device-id
  pass show openclaw/master-key | cvm derive gateway-token -
  cvm derive ssh-known-hosts --host vm.example.org >> ~/.ssh/known_hosts
  cvm derive owner --epoch 1                     CVM_OWNER, for the compose file
  (umask 077; cvm derive rclone-config > rclone.conf)")]
    Derive(DeriveArgs),

    /// Look for what is wrong with this machine, and say what to do
    ///
    /// Each check prints what it found and, unless all is well, a remedy. A check that hangs
    /// (a dead disk, a dead mount) is given up after 5 s. Nothing is changed: the overlay that the
    /// doctor tries is mounted in a mount namespace of its own.
    #[command(after_help = "\
Examples:
  cvm doctor
  cvm doctor --json | jq '.findings[] | select(.verdict == \"fail\")'

Exit codes: 0 no check failed (warnings allowed), 1 at least one failed.")]
    Doctor(DoctorArgs),

    /// One room of the doctor, in a process of its own
    #[command(hide = true)]
    DoctorRoom { room: String },

    /// Run the gateway's own command line, as the gateway's user and with its environment
    ///
    /// The same as the `openclaw` in the image. All arguments are openclaw's own, and so is the
    /// exit status. It gets a terminal of its own, and processes that it leaves running end with it.
    #[command(
        disable_help_flag = true,
        after_help = "\
Examples:
  cvm openclaw status
  cvm openclaw config get gateway.port
  openclaw doctor                  the same program under its other name"
    )]
    Openclaw {
        /// The arguments of openclaw
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        arguments: Vec<OsString>,
    },

    /// Print a completion script for a shell
    #[command(after_help = "\
Examples:
  cvm completions bash > /etc/bash_completion.d/cvm
  cvm completions zsh > \"${fpath[1]}/_cvm\"
  cvm completions fish > ~/.config/fish/completions/cvm.fish")]
    Completions { shell: Shell },

    /// Print the version of this program, and of the supervisor where there is one
    #[command(after_help = "Example:\n  cvm version")]
    Version,
}

#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// Print the snapshot as JSON, unchanged; indented on a terminal
    #[arg(long)]
    pub json: bool,
    /// Show it again and again, also while the supervisor is away
    #[arg(long, short, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = seconds)]
    pub watch: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// A service, or `supervisor`
    pub service: Option<String>,
    /// Go on with new lines, also in the next file
    #[arg(long, short, requires = "service")]
    pub follow: bool,
    /// The log of an earlier boot: -1 is the one before this
    #[arg(long, value_name = "-N", allow_negative_numbers = true, conflicts_with = "follow",
          value_parser = clap::value_parser!(i32).range(..=-1))]
    pub boot: Option<i32>,
    /// List the earlier boots
    #[arg(long, conflicts_with_all = ["service", "follow", "boot"])]
    pub boots: bool,
    /// How many lines from the end; or `all`
    #[arg(long, short = 'n', default_value = "100", value_parser = lines)]
    pub lines: Lines,
    /// The directory of the logs
    #[arg(long, default_value = cvm_protocol::paths::LOGS, value_name = "DIR")]
    pub directory: PathBuf,
}

#[derive(Debug, Args)]
pub(crate) struct ServiceArgs {
    /// Name of the service, as `cvm status` shows it
    pub service: String,
    /// Give the order and return
    #[arg(long)]
    pub no_wait: bool,
    /// How long to wait; 60 to start, 340 to stop, 400 to restart unless given
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub timeout: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    #[command(flatten)]
    pub common: ServiceArgs,
    /// Stop sshd although nobody can log in afterwards
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PairArgs {
    /// telegram, discord or whatsapp
    pub channel: String,
    /// The session that the chat becomes; the mux-server chooses one unless given
    #[arg(long, value_name = "KEY")]
    pub session: Option<String>,
    /// How long the token lives; the mux-server's usual time unless given
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    pub ttl: Option<u32>,
    /// Address of the mux-server
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// Device id of the instance, as `cvm derive device-id` prints it
    #[arg(long, value_name = "ID")]
    pub device: Option<String>,
    /// Print the mux-server's answer as JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct HealthArgs {
    /// Print a line for each complaint and each service as well
    #[arg(long, short)]
    pub verbose: bool,

    /// Ask the gateway for a list of each agent's sessions, with its token. This finds faults that its probes
    /// do not see, such as databases that it refuses after an update. As root, and not for HEALTHCHECK
    #[arg(long)]
    pub deep: bool,
}

#[derive(Debug, Args)]
pub(crate) struct DeriveArgs {
    #[command(subcommand)]
    pub what: Derived,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Derived {
    /// The token with which clients log in to the gateway: a secret
    #[command(after_help = "Example:\n  cvm derive gateway-token < key.txt")]
    GatewayToken(KeySource),
    /// The device id under which the gateway and the mux-server know this instance
    #[command(after_help = "Example:\n  MASTER_KEY_FILE=key.txt cvm derive device-id")]
    DeviceId(KeySource),
    /// The lines that make ssh know the host key before the first connection
    #[command(after_help = "\
Examples:
  cvm derive ssh-known-hosts --host vm.example.org --port 1022 >> ~/.ssh/known_hosts
  cvm derive ssh-known-hosts --host 203.0.113.7 --host vm.example.org < key.txt")]
    SshKnownHosts {
        /// Name or address with which ssh is called; may be given more than once
        #[arg(long, required = true)]
        host: Vec<String>,
        /// The published port of sshd
        #[arg(long, default_value_t = 1022, value_parser = clap::value_parser!(u16).range(1..))]
        port: u16,
        #[command(flatten)]
        key: KeySource,
    },
    /// CVM_OWNER, which says in the compose file who may write the machine's environment: no secret
    ///
    /// Only for a random MASTER_KEY, because CVM_OWNER confirms a guess of the key. With any other
    /// key, set CVM_OWNER_TOKEN to 32 random bytes, and CVM_OWNER to the SHA-256 of that text.
    #[command(after_help = "\
Examples:
  cvm derive owner < key.txt
  image/pin --owner \"$(cvm derive owner --epoch 3 < key.txt)\" NAME@sha256:DIGEST")]
    Owner {
        /// The value of CVM_OWNER_EPOCH in the environment: raise it to make all older environments void
        #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=i64::from(Epoch::MAX)))]
        epoch: u32,
        #[command(flatten)]
        key: KeySource,
    },
    /// The fingerprint that a volume remembers of a key: for `cvm volume adopt`, before the key is changed
    #[command(after_help = "\
Example:
  ssh -p 1022 root@HOST cvm volume adopt \"$(cvm derive volume-fingerprint < new-key.txt)\"")]
    VolumeFingerprint(KeySource),
    /// The password of the bucket's encryption: with the salt it opens everything in the bucket
    #[command(after_help = "\
Example:
  rclone config password REMOTE password \"$(cvm derive crypt-password < key.txt)\"

This is not the password of a bucket that was written with RCLONE_CRYPT_PASSWORD set.")]
    CryptPassword(CryptArgs),
    /// The salt of the bucket's encryption, which rclone calls password2: a secret
    #[command(after_help = "\
Example:
  cvm derive crypt-salt --obscured < key.txt")]
    CryptSalt(CryptArgs),
    /// An rclone.conf with which stock rclone opens the bucket: every secret of the bucket is in it
    ///
    /// Takes the S3_* and the AWS_* variables, and RCLONE_CRYPT_PASSWORD and _PASSWORD2 if they
    /// are set, from the environment, as the VM does; secrets also as NAME_FILE. The remote in it
    /// is called `openclaw:`.
    #[command(after_help = "\
Example:
  export S3_BUCKET=state S3_ENDPOINT=https://s3.example.org AWS_ACCESS_KEY_ID=...
  export AWS_SECRET_ACCESS_KEY_FILE=secret.txt MASTER_KEY_FILE=key.txt
  (umask 077; cvm derive rclone-config > rclone.conf)
  rclone --config rclone.conf lsf -R openclaw:")]
    RcloneConfig(KeySource),
}

#[derive(Debug, Args)]
pub(crate) struct CryptArgs {
    /// In the form that rclone.conf holds, which hides it from a glance and from nothing else
    #[arg(long)]
    pub obscured: bool,
    #[command(flatten)]
    pub key: KeySource,
}

#[derive(Debug, Args)]
pub(crate) struct KeySource {
    /// `-`: take MASTER_KEY from standard input, whatever the environment says
    #[arg(value_name = "-", value_parser = ["-"], hide_possible_values = true)]
    pub from_stdin: Option<String>,
}

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print the findings as one JSON object
    #[arg(long)]
    pub json: bool,
}

/// Prints help and version on standard output, and a mistake on standard error in the form of all
/// failures here.
pub(crate) fn explain(error: &clap::Error) -> Result<Exit, Failure> {
    let styled = error.render();
    if !error.use_stderr() {
        let colour = std::io::stdout().is_terminal() && style::wants_colour();
        stdout::print(&if colour { styled.ansi().to_string() } else { styled.to_string() })?;
        return Ok(Exit::Good);
    }
    let text = styled.to_string();
    // `cvm` alone prints the help, which does not begin with "error: ".
    let text = text.strip_prefix("error: ").map_or(text.clone(), |rest| format!("cvm: {rest}"));
    let _ = std::io::Write::write_all(&mut std::io::stderr().lock(), text.as_bytes());
    Err(Failure::silent(Exit::Usage))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    fn parse(words: &[&str]) -> Result<Command, clap::Error> {
        Cli::try_parse_from(std::iter::once(&"cvm").chain(words)).map(|cli| cli.command)
    }

    #[test]
    fn the_description_of_the_arguments_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_a_help_with_an_example() {
        fn check(command: &clap::Command) {
            for sub in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
                let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example"), "{} has no example", sub.get_name());
                assert!(
                    help.contains(sub.get_name()),
                    "the example of {} is of something else",
                    sub.get_name()
                );
                check(sub);
            }
        }
        check(&Cli::command());
    }

    #[test]
    fn watch_takes_a_number_or_none() {
        let watch = |words: &[&str]| match parse(words) {
            Ok(Command::Status(args)) => args.watch,
            other => panic!("{other:?}"),
        };
        assert_eq!(watch(&["status"]), None);
        assert_eq!(watch(&["status", "--watch"]), Some(Duration::from_secs(1)));
        assert_eq!(watch(&["status", "--watch", "2.5"]), Some(Duration::from_millis(2500)));
        for bad in ["0", "-1", "NaN", "1e9", "soon"] {
            assert!(parse(&["status", "--watch", bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_number_of_lines_may_be_all() {
        let of = |n: &str| match parse(&["logs", "gateway", "-n", n]) {
            Ok(Command::Logs(args)) => args.lines,
            other => panic!("{other:?}"),
        };
        assert_eq!((of("all"), of("0"), of("12")), (Lines::All, Lines::Last(0), Lines::Last(12)));
        assert!(parse(&["logs", "gateway", "-n", "many"]).is_err());
        assert!(parse(&["logs", "-f"]).is_err());
    }

    #[test]
    fn earlier_boots_are_counted_backwards() {
        let of = |words: &[&str]| match parse(words) {
            Ok(Command::Logs(args)) => (args.boot, args.service),
            other => panic!("{other:?}"),
        };
        assert_eq!(of(&["logs", "--boot", "-1"]), (Some(-1), None));
        assert_eq!(of(&["logs", "--boot=-12", "sshd"]), (Some(-12), Some("sshd".into())));
        assert_eq!(of(&["logs", "gateway", "--boot", "-2"]), (Some(-2), Some("gateway".into())));
        for bad in [&["logs", "--boot", "0"][..], &["logs", "--boot", "1"], &["logs", "--boots", "sshd"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
        assert!(parse(&["logs", "sshd", "-f", "--boot", "-1"]).is_err());
    }

    #[test]
    fn storage_takes_the_options_of_its_help() {
        let of = |words: &[&str]| match parse(&[&["storage"], words].concat()) {
            Ok(Command::Storage { what }) => Some(what),
            _ => None,
        };
        assert!(matches!(of(&["flush", "--timeout", "3"]), Some(StorageCommand::Flush { timeout: Some(_) })));
        assert!(matches!(of(&["verify", "--deep"]), Some(StorageCommand::Verify { deep: true })));
        assert!(matches!(of(&["takeover"]), Some(StorageCommand::Takeover { yes: false })));
        assert!(matches!(of(&["ls"]), Some(StorageCommand::Ls(StorageLsArgs { path: None, json: false }))));
        match of(&["get", "openclaw/openclaw.json", "-o", "-"]) {
            Some(StorageCommand::Get(args)) => assert_eq!(args.output, Some(PathBuf::from("-"))),
            other => panic!("{other:?}"),
        }
        assert!(of(&["restore"]).is_none() && of(&["get"]).is_none() && of(&[]).is_none());
    }

    #[test]
    fn every_argument_behind_openclaw_is_openclaws_own() {
        let given = ["openclaw", "--help", "-v", "config", "--", "x", "--watch"];
        match parse(&given) {
            Ok(Command::Openclaw { arguments }) => assert_eq!(arguments, given[1..]),
            other => panic!("{other:?}"),
        }
        assert!(matches!(parse(&["openclaw"]), Ok(Command::Openclaw { arguments }) if arguments.is_empty()));
    }

    #[test]
    fn derive_takes_the_key_from_standard_input_only_as_a_dash() {
        assert!(parse(&["derive", "gateway-token"]).is_ok());
        assert!(parse(&["derive", "gateway-token", "-"]).is_ok());
        assert!(parse(&["derive", "gateway-token", "the key itself"]).is_err());
        assert!(parse(&["derive", "crypt-salt", "--obscured", "-"]).is_ok());
        assert!(parse(&["derive", "rclone-config", "-"]).is_ok());
        assert!(parse(&["derive", "owner", "--epoch", "1000000", "-"]).is_ok());
        assert!(parse(&["derive", "owner", "--epoch", "1000001"]).is_err());
        assert!(parse(&["derive", "ssh-known-hosts"]).is_err());
        assert!(parse(&["derive", "ssh-known-hosts", "--host", "h", "--port", "0"]).is_err());
        match parse(&["derive", "ssh-known-hosts", "--host", "a", "--host", "b", "-"]) {
            Ok(Command::Derive(DeriveArgs { what: Derived::SshKnownHosts { host, port, key } })) => {
                assert_eq!((host.len(), port, key.from_stdin.as_deref()), (2, 1022, Some("-")));
            }
            other => panic!("{other:?}"),
        }
    }
}
