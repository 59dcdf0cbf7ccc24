//! `cvm version`: this program's version and, where there is one, the supervisor's.
//!
//! May import: `out`, `socket`, `trouble`.

use crate::out;
use crate::socket;
use crate::trouble::{Exit, Trouble};
use crate::words::clean;
use cvm_protocol::control::VERSION;

pub(crate) fn run() -> Result<Exit, Trouble> {
    out::print(&format!("cvm {} (control protocol {VERSION})\n", env!("CARGO_PKG_VERSION")))?;
    // On a laptop there is none, and that is no failure.
    if let Ok(snapshot) = socket::status() {
        out::print(&format!("supervisor {}\n", clean(&snapshot.status.version)))?;
    }
    Ok(Exit::Good)
}
