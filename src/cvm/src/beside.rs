//! The other programs of this build, and how they are told what they need: in a sealed memory file,
//! so that a secret is in no argument and in no environment.
//!
//! May import: `trouble`, `words`.

use crate::trouble::{Exit, Trouble};
use crate::words;
use cvm_protocol::json_lines;
use cvm_sys::memfd;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Where the image has them, if nobody can say where we are.
const HOME: &str = "/usr/local/lib/openclaw-cvm";
/// What a program needs to show progress and to reach the network from where it is. Nothing of
/// it is ours: those variables are in the specification, or nowhere.
const PASSED: &[&str] = &[
    "PATH",
    "HOME",
    "TERM",
    "LANG",
    "TZ",
    "TMPDIR",
    "NO_COLOR",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
];

/// The program of the same build, with `spec` on its standard input.
pub(crate) fn program<T: Serialize>(what: &str, name: &str, spec: &T) -> Result<(PathBuf, Command), Trouble> {
    let program = place(what, name)?;
    let sealed = memfd::sealed(c"spec", &json_lines::line(spec)).map_err(|e| failed(what, &program, &e))?;
    let kept = PASSED.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
    let mut command = Command::new(&program);
    command.stdin(Stdio::from(sealed)).env_clear().envs(kept);
    Ok((program, command))
}

pub(crate) fn failed(what: &str, program: &Path, error: &std::io::Error) -> Trouble {
    Trouble::new(Exit::Bad, format!("{what}: {}", program.display()), words::of_io(error))
}

/// Also asked before anybody is asked for a secret that would be of no use.
pub(crate) fn place(what: &str, name: &str) -> Result<PathBuf, Trouble> {
    let us = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let program = us.parent().unwrap_or(Path::new(HOME)).join(name);
    if program.is_file() {
        return Ok(program);
    }
    let cause = format!("{} is not there", program.display());
    let hint =
        format!("it belongs beside cvm; the image has both: `docker run --entrypoint cvm IMAGE {what} ...`");
    Err(Trouble::new(Exit::Bad, what, cause).hint(hint))
}
