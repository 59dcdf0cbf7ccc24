//! A service's own end of its channel to PID 1: its specification on standard input, its report pipe as descriptor
//! 3, and its lifeline as descriptor 4. PID 1's end is in `cvm-init`, the keeper's between them.

mod reporter;

pub use reporter::Reporter;

use cvm_sys::{descriptor, memfd};
use nix::errno::Errno;
use serde::de::DeserializeOwned;
use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::fd::{AsFd as _, OwnedFd};

const REPORTS: i32 = 3;
const LIFELINE: i32 = 4;
/// Everything but the keys in it is short.
const SPECIFICATION_MAX: usize = 1024 * 1024;

/// The first call of a service: nobody reads its memory, and what it says goes to standard error, which its keeper
/// writes into its log. The text of a panic may quote anything, so only its place is said.
pub fn begin() {
    cvm_sys::private::keep_private();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .without_time()
        .with_target(false)
        .with_ansi(false)
        .init();
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!("a bug, at {place}");
    }));
}

/// What PID 1 has handed to this program.
pub struct Channel {
    pub reports: Reporter,
    pub lifeline: Lifeline,
}

impl Channel {
    /// To be called before this program opens a descriptor of its own: one that was not handed over is then missed,
    /// and not mistaken for another.
    pub fn take(program: &str) -> Result<Self, String> {
        let missing = |_| {
            format!("{program} is started by cvm-init: reports on descriptor 3, a lifeline on descriptor 4")
        };
        let reports = Reporter::new(descriptor::inherited(REPORTS).map_err(missing)?);
        let lifeline = Lifeline(descriptor::inherited(LIFELINE).map_err(missing)?);
        Ok(Self { reports, lifeline })
    }
}

/// A pipe on which nothing is ever said. Its end asks this program to end.
pub struct Lifeline(OwnedFd);

impl Lifeline {
    /// Blocks until this program is asked to end.
    pub fn wait(&self) {
        let mut byte = [0u8; 1];
        while matches!(nix::unistd::read(&self.0, &mut byte), Err(Errno::EINTR) | Ok(1..)) {}
    }
}

/// The specification on standard input, from its beginning: a run before this one may have read the same file.
/// Afterwards standard input is empty, so that nothing that this program starts reads the secrets again.
pub fn specification<T: DeserializeOwned>(program: &str) -> Result<T, String> {
    let mut input = File::from(std::io::stdin().as_fd().try_clone_to_owned().map_err(|e| e.to_string())?);
    let _ = input.seek(SeekFrom::Start(0));
    let bytes = memfd::read_all(input.into(), SPECIFICATION_MAX).map_err(|e| e.to_string())?;
    let nothing = File::open("/dev/null").map_err(|e| e.to_string())?;
    nix::unistd::dup2_stdin(nothing).map_err(|e| e.to_string())?;
    // The text of the error may quote the input: not said.
    serde_json::from_slice(bytes.trim_ascii_end()).map_err(|_| {
        format!("the specification for {program} is not understood: all binaries must come from one image")
    })
}
