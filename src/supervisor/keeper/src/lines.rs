//! Splits a stream of bytes into lines, and holds only a limited part of a line.

/// A longer line is cut into pieces of this size: twice what most programs print at once.
const LINE_MAX: usize = 16 * 1024;

#[derive(Default)]
pub(crate) struct Lines {
    partial: Vec<u8>,
}

impl Lines {
    /// Takes the next bytes and calls `take` with each line that they complete, without its newline.
    pub(crate) fn feed(&mut self, mut bytes: &[u8], mut take: impl FnMut(&[u8])) {
        while let Some(end) = bytes.iter().position(|b| *b == b'\n') {
            let (line, rest) = bytes.split_at(end);
            self.append(line, &mut take);
            self.flush(true, &mut take);
            bytes = rest.get(1..).unwrap_or_default();
        }
        self.append(bytes, &mut take);
    }

    /// Calls `take` with a last line that has no newline.
    pub(crate) fn finish(&mut self, mut take: impl FnMut(&[u8])) {
        self.flush(false, &mut take);
    }

    fn append(&mut self, mut bytes: &[u8], take: &mut impl FnMut(&[u8])) {
        while self.partial.len() + bytes.len() > LINE_MAX {
            let (now, later) = bytes.split_at(LINE_MAX - self.partial.len());
            self.partial.extend_from_slice(now);
            take(&self.partial);
            self.partial.clear();
            bytes = later;
        }
        self.partial.extend_from_slice(bytes);
    }

    fn flush(&mut self, even_if_empty: bool, take: &mut impl FnMut(&[u8])) {
        if even_if_empty || !self.partial.is_empty() {
            let line = self.partial.strip_suffix(b"\r").unwrap_or(&self.partial);
            take(line);
            self.partial.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&[u8]]) -> Vec<String> {
        let mut told = Vec::new();
        let mut lines = Lines::default();
        for chunk in chunks {
            lines.feed(chunk, |l| told.push(String::from_utf8_lossy(l).into_owned()));
        }
        lines.finish(|l| told.push(String::from_utf8_lossy(l).into_owned()));
        told
    }

    #[test]
    fn lines_come_out_whole_however_they_came_in() {
        assert_eq!(split(&[b"one\ntw", b"o\n\nfo", b"ur"]), ["one", "two", "", "four"]);
        assert_eq!(split(&[b"dos\r\n"]), ["dos"]);
    }

    #[test]
    fn an_endless_line_is_cut_and_not_held() {
        let told = split(&[&vec![b'x'; LINE_MAX * 2 + 5]]);
        assert_eq!(told.iter().map(String::len).collect::<Vec<_>>(), [LINE_MAX, LINE_MAX, 5]);
    }
}
