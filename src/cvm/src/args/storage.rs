//! The command line of `cvm storage`.

// The comments below are the text of the help, where backticks would be visible.
#![allow(clippy::doc_markdown)]

use super::values::seconds;
use clap::{Args, Subcommand};
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Subcommand)]
pub(crate) enum StorageCommand {
    /// Is my data in the bucket, how old is the oldest change that is not, and what do I do now?
    ///
    /// Incidents name files of the agent's: look before you paste it in public.
    #[command(after_help = "\
Examples:
  cvm storage status
  cvm storage status --watch       the same, redrawn every second
  cvm storage status --json | jq .pending_files

Exit codes: 0 ready and no incidents, 1 otherwise, 3 there is no storage worker.")]
    Status(StorageStatusArgs),

    /// Push everything that is not in the bucket yet, and wait until it is there
    ///
    /// Afterwards the bucket is equal to the tree as it was at that moment.
    #[command(after_help = "\
Examples:
  cvm storage flush
  cvm storage flush --timeout 60   waits no longer than a minute; the worker goes on

Exit codes: 0 all is in the bucket, 1 not all, 3 there is no storage worker, 4 it refused.")]
    Flush {
        /// How long to wait; until the worker is done unless given
        #[arg(long, value_name = "SECONDS", value_parser = seconds)]
        timeout: Option<Duration>,
    },

    /// Compare the tree with the bucket
    ///
    /// Compares the bucket's list, and reads back, decrypts and checks every database; with --deep
    /// every object, which costs a download of everything.
    #[command(after_help = "\
Examples:
  cvm storage verify
  cvm storage verify --deep

Exit codes: 0 no difference, 1 differences, 3 there is no storage worker, 4 it refused.")]
    Verify {
        /// Read every object back
        #[arg(long)]
        deep: bool,
    },

    /// Prove now that the bucket restores: every database and a sample of the files
    ///
    /// The worker also does it by itself; `cvm storage status` shows the last result.
    #[command(after_help = "\
Example:
  cvm storage drill

Exit codes: 0 all was restored and is good, 1 not all, 3 there is no storage worker, 4 it refused.")]
    Drill,

    /// Give up files whose objects in the bucket are wrong, and delete those objects
    ///
    /// Names are those of the incidents in `cvm storage status`. If the gateway has not started because
    /// of these files, the next try starts it without them.
    #[command(after_help = "\
Examples:
  cvm storage forget openclaw/workspace/a openclaw/workspace/b     lists the files, and asks
  cvm storage forget --yes openclaw/workspace/a

Exit codes: 0 given up, 1 not confirmed or not done, 3 there is no storage worker, 4 it refused.")]
    Forget(StorageDecideArgs),

    /// Take files as they are although an object on which they may be built was wrong in the bucket
    ///
    /// Names are those of the incidents in `cvm storage status`. Nothing is deleted. This also ends the
    /// incident of a file whose older state was set aside; that copy stays.
    #[command(after_help = "\
Examples:
  cvm storage keep openclaw/workspace/notes     lists the files, and asks
  cvm storage keep --yes openclaw/workspace/notes

Exit codes: 0 kept, 1 not confirmed or not done, 3 there is no storage worker, 4 it refused.")]
    Keep(StorageDecideArgs),

    /// Go on with a bucket that is older than it should be, or that has lost a part of its manifest
    ///
    /// Accepts the fault that was refused, and no other; data that the bucket lacks stays lost. A tree
    /// on the volume is set aside.
    #[command(after_help = "\
Examples:
  cvm storage accept-older         shows the refused fault, and asks
  cvm storage accept-older --yes

Exit codes: 0 accepted, 1 not confirmed or not done, 3 there is no storage worker, 4 it refused.")]
    AcceptOlder {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },

    /// Take over a bucket that cannot be checked: without a manifest, or with one of an older version
    ///
    /// Anybody who could write to the bucket may have chosen its contents. From then on it is checked.
    #[command(after_help = "\
Examples:
  cvm storage adopt                shows why it is asked for, and asks
  cvm storage adopt --yes

Exit codes: 0 adopted, 1 not confirmed or not done, 3 there is no storage worker, 4 it refused.")]
    Adopt {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },

    /// Replaced by four commands
    #[command(hide = true)]
    Accept {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
        anything: Vec<String>,
    },

    /// Take the bucket from another instance without waiting for its heartbeat to go stale
    ///
    /// Do it only when the other machine is gone for good: if it still runs, it stops writing, and
    /// changes that it has not pushed are lost.
    #[command(after_help = "\
Examples:
  cvm storage takeover             shows who holds the bucket, and asks
  cvm storage takeover --yes

Exit codes: 0 taken, 1 not confirmed or not done, 3 there is no storage worker, 4 it refused.")]
    Takeover {
        /// Do not ask
        #[arg(long)]
        yes: bool,
    },

    /// List the files in the bucket, from its manifest
    ///
    /// Kinds are those of ls -l, and D for a database, which is kept consistent.
    #[command(after_help = "\
Examples:
  cvm storage ls
  cvm storage ls openclaw/agents
  cvm storage ls --json | jq -r 'select(.size > 1000000).path'")]
    Ls(StorageLsArgs),

    /// Get one file straight from the bucket, checked against the manifest
    ///
    /// To standard output, or with -o into a file, which gets its name when all of it has arrived
    /// and is good.
    #[command(after_help = "\
Examples:
  cvm storage get openclaw/openclaw.json
  cvm storage get openclaw/agents/main/memory.db -o memory.db
  cvm storage get openclaw/media.tar -o - | tar t")]
    Get(StorageGetArgs),

    /// Restore everything into an empty directory, on any machine
    ///
    /// Takes MASTER_KEY, the S3_* and the AWS_* variables from the environment, as the VM does;
    /// secrets also as NAME_FILE. Nothing is written into the bucket. The exit status is that of
    /// cvm-storage, which does the work; 2 if it was not even started.
    #[command(after_help = "\
Examples:
  MASTER_KEY_FILE=key.txt S3_BUCKET=state S3_ENDPOINT=https://s3.example.org \\
      AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY_FILE=secret.txt cvm storage restore --to state
  docker run --rm --env-file .env -v ./state:/restored --entrypoint cvm IMAGE \\
      storage restore --to /restored")]
    Restore {
        /// A directory that is empty, or not there yet
        #[arg(long, value_name = "DIR")]
        to: PathBuf,
        /// Restore although the end of the manifest is missing or the bucket has been set back; without
        /// this the command prints the fault and refuses
        #[arg(long)]
        accept: bool,
    },
}

#[derive(Debug, Args)]
pub(crate) struct StorageStatusArgs {
    /// Print the worker's answer as JSON, unchanged; indented on a terminal
    #[arg(long)]
    pub json: bool,
    /// Show it again and again, also while the worker is away
    #[arg(long, short, value_name = "SECONDS", num_args = 0..=1, default_missing_value = "1", value_parser = seconds)]
    pub watch: Option<Duration>,
}

#[derive(Debug, Args)]
pub(crate) struct StorageDecideArgs {
    /// The files, relative to /data, as the incidents name them
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<String>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StorageLsArgs {
    /// The directory to list, relative to /data; everything unless given
    pub path: Option<String>,
    /// Print one JSON object a line
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct StorageGetArgs {
    /// The file, relative to /data, as `cvm storage ls` shows it
    pub path: String,
    /// The file to write; `-`: standard output, also if that is a terminal
    #[arg(long, short, value_name = "FILE")]
    pub output: Option<PathBuf>,
}
