//! Every message is one JSON object on one line.

use serde::Serialize;
use zeroize::Zeroizing;

/// One message as a line, wiped when it is dropped. It is written into a buffer of its exact size, because a buffer
/// that grows would leave pieces of a secret behind.
pub fn line<T: Serialize>(message: &T) -> Zeroizing<Vec<u8>> {
    // serde_json refuses only maps whose keys are not strings, and no message has one.
    let mut size = Size(0);
    let _ = serde_json::to_writer(&mut size, message);
    let mut bytes = Zeroizing::new(Vec::with_capacity(size.0 + 1));
    let _ = serde_json::to_writer(&mut *bytes, message);
    bytes.push(b'\n');
    bytes
}

/// A writer that only counts bytes.
struct Size(usize);

impl std::io::Write for Size {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0 += bytes.len();
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_secrets::base64_bytes::PackedBytes;

    #[test]
    fn a_line_is_written_into_a_buffer_that_never_grew() {
        let packed = PackedBytes::pack(&[7; 5_000]);
        let bytes = line(&packed);
        assert_eq!(bytes.len(), bytes.capacity());
        assert_eq!(bytes.trim_ascii_end(), serde_json::to_vec(&packed).unwrap());
    }
}
