//! The command line of `cvm volume`.

// The comments below are the text of the help, where backticks would be visible.
#![allow(clippy::doc_markdown)]

use super::values::fingerprint;
use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Announce the next MASTER_KEY to the volume, or give the volume to the one that is set now
    ///
    /// With a FINGERPRINT, in a boot with the present key: the volume stays with the present key until
    /// the first boot with the key of that fingerprint. From then on the old key opens nothing.
    ///
    /// Without one, in a boot that the volume refuses: the volume belongs to this boot's key from now
    /// on. Such a boot lets nobody in over SSH, so this is for `docker exec` on a host of your own. On
    /// dstack it requires a CVM_OWNER that the environment has proven.
    ///
    /// The bucket stays encrypted with the old key: with a new key, set a new S3_PREFIX.
    #[command(after_help = "\
Examples:
  cvm volume adopt \"$(cvm derive volume-fingerprint < new-key.txt)\"
  docker exec -it CONTAINER cvm volume adopt

Exit codes: 0 done, 1 not confirmed or not done, 2 no supervisor has started here, 4 not allowed.")]
    Adopt(AdoptArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AdoptArgs {
    /// The fingerprint of the next key, as `cvm derive volume-fingerprint` prints it
    #[arg(value_name = "FINGERPRINT", value_parser = fingerprint)]
    pub fingerprint: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}
