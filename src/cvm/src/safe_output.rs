//! Standard output for bytes that others wrote: unchanged into a pipe, made harmless on a terminal.

use crate::failure::Failure;
use crate::stdout;
use crate::text::for_terminal;
use std::io::Write as _;

pub(crate) struct SafeOutput {
    out: Box<dyn std::io::Write>,
    is_cleaned: bool,
    /// The beginning of a line whose end has not arrived yet.
    partial: Vec<u8>,
}

/// A longer line is shown in pieces.
const PARTIAL_MAX: usize = 64 * 1024;

impl SafeOutput {
    pub(crate) fn new(is_cleaned: bool) -> Self {
        Self { out: Box::new(stdout::buffered()), is_cleaned, partial: Vec::new() }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        if !self.is_cleaned {
            return self.out.write_all(bytes).map_err(|e| Failure::output(&e));
        }
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.partial.len() > PARTIAL_MAX {
                self.write_partial()?;
            }
        }
        Ok(())
    }

    fn write_partial(&mut self) -> Result<(), Failure> {
        let mut text = for_terminal(&self.partial);
        // A colour that a line does not end would colour the next line too.
        if text.contains('\x1b') {
            let end = text.trim_end_matches('\n').len();
            text.insert_str(end, "\x1b[0m");
        }
        self.partial.clear();
        self.out.write_all(text.as_bytes()).map_err(|e| Failure::output(&e))
    }

    /// Makes everything visible that was written so far.
    pub(crate) fn flush(&mut self) -> Result<(), Failure> {
        self.out.flush().map_err(|e| Failure::output(&e))
    }

    /// Shows what is left, which may be a last line without a line break.
    pub(crate) fn finish(mut self) -> Result<(), Failure> {
        if !self.partial.is_empty() {
            self.write_partial()?;
        }
        self.flush()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::rc::Rc;

    /// What a [`SafeOutput`] has written, for a test to read.
    #[derive(Clone, Default)]
    pub(crate) struct Written(Rc<RefCell<Vec<u8>>>);

    impl std::io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.borrow_mut().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Written {
        pub(crate) fn output(&self, is_cleaned: bool) -> SafeOutput {
            SafeOutput { out: Box::new(self.clone()), is_cleaned, partial: Vec::new() }
        }

        pub(crate) fn text(&self) -> String {
            String::from_utf8(self.0.borrow().clone()).unwrap()
        }
    }

    #[test]
    fn a_pipe_gets_every_byte_and_a_terminal_only_harmless_ones() {
        let (raw, clean) = (Written::default(), Written::default());
        for output in &mut [raw.output(false), clean.output(true)] {
            output.write(b"a\x1b[31mb\x1b[2").unwrap();
            output.write(b"J\nc\n").unwrap();
        }
        assert_eq!(raw.text(), "a\x1b[31mb\x1b[2J\nc\n");
        assert_eq!(clean.text(), "a\x1b[31mb^[[2J\x1b[0m\nc\n");
    }

    #[test]
    fn a_last_line_without_a_line_break_is_not_lost() {
        let written = Written::default();
        let mut output = written.output(true);
        output.write(b"a\nb").unwrap();
        assert_eq!(written.text(), "a\n");
        output.finish().unwrap();
        assert_eq!(written.text(), "a\nb");
    }
}
