//! Standard output, without `println!`: that panics when the reader is gone.
//!
//! May import: `trouble`.

use crate::trouble::Trouble;
use std::io::{BufWriter, Stdout, Write};

/// Writes all of `text` and flushes it.
pub(crate) fn print(text: &str) -> Result<(), Trouble> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).map_err(|e| Trouble::output(&e))
}

/// For many small pieces.
pub(crate) struct Out(BufWriter<Stdout>);

impl Out {
    pub(crate) fn new() -> Self {
        Self(BufWriter::with_capacity(64 * 1024, std::io::stdout()))
    }
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}
