//! `cvm version`: this program's version and, where there is one, the supervisor's.

use crate::control_socket;
use crate::failure::{Exit, Failure};
use crate::stdout;
use crate::text::clean;
use cvm_protocol::control::VERSION;

pub(crate) fn run() -> Result<Exit, Failure> {
    stdout::print(&format!("cvm {} (control protocol {VERSION})\n", env!("CARGO_PKG_VERSION")))?;
    // On a laptop there is no supervisor, and that is no failure.
    if let Ok(snapshot) = control_socket::status() {
        stdout::print(&format!("supervisor {}\n", clean(&snapshot.status.version)))?;
    }
    Ok(Exit::Good)
}
