//! Standard output without `println!`, which panics when the reader has closed the pipe.

use crate::failure::Failure;
use std::io::{BufWriter, Stdout, Write as _};

/// Writes all of `text` and flushes it.
pub(crate) fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| Failure::output(&e))
}

/// Standard output with a buffer, for many small pieces.
pub(crate) fn buffered() -> BufWriter<Stdout> {
    BufWriter::with_capacity(64 * 1024, std::io::stdout())
}
