//! Running the program as an operator does.

// Lint exceptions for tests reach only into functions marked as tests, not into their helpers.
#![allow(clippy::unwrap_used)]

use std::process::{Command, Output, Stdio};

/// `cvm` with a clean environment.
pub(crate) fn cvm(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_cvm"));
    command.args(arguments).env_clear().stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Its exit status, and what it says on both streams.
pub(crate) fn run(command: &mut Command) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}
