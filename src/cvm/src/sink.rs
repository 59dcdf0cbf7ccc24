//! Where bytes of others go on standard output: as they are into a pipe, made harmless on a
//! terminal.
//!
//! May import: `out`, `trouble`, `words`.

use crate::out::Out;
use crate::trouble::Trouble;
use crate::words::for_terminal;
use std::io::Write as _;

pub(crate) struct Sink {
    out: Box<dyn std::io::Write>,
    cleans: bool,
    /// The beginning of a line whose end is yet to come.
    partial: Vec<u8>,
}

/// A line that is longer is shown in pieces.
const PARTIAL_MAX: usize = 64 * 1024;

impl Sink {
    pub(crate) fn new(cleans: bool) -> Self {
        Self { out: Box::new(Out::new()), cleans, partial: Vec::new() }
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        if !self.cleans {
            return self.out.write_all(bytes).map_err(|e| Trouble::output(&e));
        }
        for piece in bytes.split_inclusive(|b| *b == b'\n') {
            self.partial.extend_from_slice(piece);
            if piece.ends_with(b"\n") || self.partial.len() > PARTIAL_MAX {
                self.write_partial()?;
            }
        }
        Ok(())
    }

    fn write_partial(&mut self) -> Result<(), Trouble> {
        let mut text = for_terminal(&self.partial);
        // A colour that a line leaves on would go on into the next.
        if text.contains('\x1b') {
            let end = text.trim_end_matches('\n').len();
            text.insert_str(end, "\x1b[0m");
        }
        self.partial.clear();
        self.out.write_all(text.as_bytes()).map_err(|e| Trouble::output(&e))
    }

    /// Everything that was written is to be seen now.
    pub(crate) fn flush(&mut self) -> Result<(), Trouble> {
        self.out.flush().map_err(|e| Trouble::output(&e))
    }

    /// Nothing more will come: a last line without its end is shown too.
    pub(crate) fn finish(mut self) -> Result<(), Trouble> {
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

    /// A sink whose output a test can read.
    #[derive(Clone, Default)]
    pub(crate) struct Heard(Rc<RefCell<Vec<u8>>>);

    impl std::io::Write for Heard {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.borrow_mut().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl Heard {
        pub(crate) fn sink(&self, cleans: bool) -> Sink {
            Sink { out: Box::new(self.clone()), cleans, partial: Vec::new() }
        }

        pub(crate) fn text(&self) -> String {
            String::from_utf8(self.0.borrow().clone()).unwrap()
        }
    }

    #[test]
    fn a_pipe_gets_every_byte_and_a_terminal_only_harmless_ones() {
        let (raw, clean) = (Heard::default(), Heard::default());
        for heard in &mut [raw.sink(false), clean.sink(true)] {
            heard.write(b"a\x1b[31mb\x1b[2").unwrap();
            heard.write(b"J\nc\n").unwrap();
        }
        assert_eq!(raw.text(), "a\x1b[31mb\x1b[2J\nc\n");
        assert_eq!(clean.text(), "a\x1b[31mb^[[2J\x1b[0m\nc\n");
    }

    #[test]
    fn a_last_line_without_its_end_is_not_lost() {
        let heard = Heard::default();
        let mut sink = heard.sink(true);
        sink.write(b"a\nb").unwrap();
        assert_eq!(heard.text(), "a\n");
        sink.finish().unwrap();
        assert_eq!(heard.text(), "a\nb");
    }
}
