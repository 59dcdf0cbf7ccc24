//! Bytes as text, for lines of JSON: nothing here shows what it holds, and all of it is wiped.
//!
//! Refuses to be printed.

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use std::ffi::CString;
use zeroize::Zeroizing;

/// An environment of arbitrary bytes, as text.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct PackedEnvironment(PackedBytes);

impl PackedEnvironment {
    pub fn pack(pairs: &[(&[u8], &[u8])]) -> Self {
        // A buffer that grew would leave pieces of them behind.
        let size = pairs.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        let mut bytes = Zeroizing::new(Vec::with_capacity(size));
        for (name, value) in pairs {
            bytes.extend_from_slice(name);
            bytes.push(b'=');
            bytes.extend_from_slice(value);
            bytes.push(0);
        }
        Self(PackedBytes::pack(&bytes))
    }

    /// `NAME=VALUE` entries, as `execve` takes them.
    pub fn unpack_for_exec(&self) -> Option<Vec<Zeroizing<CString>>> {
        let entry = |bytes: &[u8]| {
            let mut entry = Vec::with_capacity(bytes.len() + 1);
            entry.extend_from_slice(bytes);
            CString::new(entry).ok().map(Zeroizing::new)
        };
        self.0.unpack()?.split(|b| *b == 0).filter(|bytes| !bytes.is_empty()).map(entry).collect()
    }

    /// `NAME=VALUE` entries.
    pub fn unpack(&self) -> Option<Vec<Zeroizing<Vec<u8>>>> {
        let bytes = self.0.unpack()?;
        Some(
            bytes
                .split(|b| *b == 0)
                .filter(|entry| !entry.is_empty())
                .map(|e| Zeroizing::new(e.to_vec()))
                .collect(),
        )
    }
}

/// Bytes as base64, wiped when dropped.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
pub struct PackedBytes(Zeroizing<String>);

impl PackedBytes {
    pub fn pack(bytes: &[u8]) -> Self {
        Self(Zeroizing::new(BASE64_STANDARD.encode(bytes)))
    }

    pub fn unpack(&self) -> Option<Zeroizing<Vec<u8>>> {
        BASE64_STANDARD.decode(self.0.as_bytes()).ok().map(Zeroizing::new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_environment_of_any_bytes_survives_packing() {
        let pairs: [(&[u8], &[u8]); 3] = [(b"A", b"1"), (b"\xff\xfe", b"\x80=\n"), (b"EMPTY", b"")];
        let packed = PackedEnvironment::pack(&pairs);
        let entries: Vec<Vec<u8>> = packed.unpack().unwrap().iter().map(|e| e.to_vec()).collect();
        assert_eq!(entries, [b"A=1".to_vec(), b"\xff\xfe=\x80=\n".to_vec(), b"EMPTY=".to_vec()]);
        let for_exec: Vec<Vec<u8>> =
            packed.unpack_for_exec().unwrap().iter().map(|e| e.as_bytes().to_vec()).collect();
        assert_eq!(for_exec, entries);
    }
}
