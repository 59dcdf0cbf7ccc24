//! The other programs of this build, which lie beside this one.
//!
//! A specification reaches them in a sealed memory file on standard input, so that a secret is in no
//! argument and in no environment.

use crate::failure::{Exit, Failure};
use crate::text;
use cvm_protocol::json_lines;
use cvm_sys::memfd;
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Their directory in the image, if the kernel does not show where this program lies.
const HOME: &str = "/usr/local/lib/openclaw-cvm";
/// The variables that a program inherits: what it needs to show progress and to reach the network
/// from where it is. Everything else is in its specification.
const INHERITED: &[&str] = &[
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

/// The command that runs the program `name` with `spec` on its standard input.
pub(crate) fn command<T: Serialize>(what: &str, name: &str, spec: &T) -> Result<(PathBuf, Command), Failure> {
    let program = path(what, name)?;
    let sealed = memfd::sealed(c"spec", &json_lines::line(spec)).map_err(|e| failed(what, &program, &e))?;
    let inherited = INHERITED.iter().filter_map(|name| Some((*name, std::env::var_os(name)?)));
    let mut command = Command::new(&program);
    command.stdin(Stdio::from(sealed)).env_clear().envs(inherited);
    Ok((program, command))
}

pub(crate) fn failed(what: &str, program: &Path, error: &std::io::Error) -> Failure {
    Failure::new(Exit::Bad, format!("{what}: {}", program.display()), text::io_error(error))
}

/// Where the program `name` lies. A command looks here before it asks anybody for a secret.
pub(crate) fn path(what: &str, name: &str) -> Result<PathBuf, Failure> {
    let ours = std::fs::read_link("/proc/self/exe").unwrap_or_default();
    let program = ours.parent().unwrap_or(Path::new(HOME)).join(name);
    if program.is_file() {
        return Ok(program);
    }
    let cause = format!("{} is not there", program.display());
    let hint =
        format!("it belongs beside cvm; the image has both: `docker run --entrypoint cvm IMAGE {what} ...`");
    Err(Failure::new(Exit::Bad, what, cause).hint(hint))
}
