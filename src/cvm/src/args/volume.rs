//! The command line of `cvm volume`.
//!
//! Refuses to do any of it.

// The comments below are the text of the help, where backticks would be shown.
#![allow(clippy::doc_markdown)]

use clap::{Args, Subcommand};

#[derive(Debug, Subcommand)]
pub(crate) enum VolumeCommand {
    /// Tell the volume of the MASTER_KEY that comes next, or give it to the one that is set now
    ///
    /// With a FINGERPRINT, in a boot with the present key: the volume goes on with the present key, until
    /// a boot comes with the key of that fingerprint. From then on the old key opens nothing.
    ///
    /// Without one, in a boot that the volume refuses: the volume belongs to this boot's key from now
    /// on. Nobody is let in over SSH by such a boot, so this is for `docker exec` on a host of your own.
    /// On dstack it wants a CVM_OWNER that is proven.
    ///
    /// What a bucket holds is encrypted with the old key and stays so: with a new key, give it a new
    /// S3_PREFIX.
    #[command(after_help = "\
Examples:
  cvm volume adopt \"$(cvm derive volume-fingerprint < new-key.txt)\"
  docker exec -it CONTAINER cvm volume adopt

Exit codes: 0 done, 1 not confirmed or not done, 2 no supervisor has begun here, 4 not allowed.")]
    Adopt(AdoptArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AdoptArgs {
    /// Of the next key, as `cvm derive volume-fingerprint` prints it
    #[arg(value_name = "FINGERPRINT", value_parser = fingerprint)]
    pub fingerprint: Option<String>,
    /// Do not ask
    #[arg(long)]
    pub yes: bool,
}

fn fingerprint(text: &str) -> Result<String, String> {
    if cvm_protocol::volume::is_fingerprint(text) {
        return Ok(text.to_owned());
    }
    Err("give 64 hex digits in lower case, as `cvm derive volume-fingerprint` prints them".to_owned())
}
