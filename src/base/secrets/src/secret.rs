//! Bytes that nobody else may read, and that are gone when they are dropped.
//!
//! A secret cannot be printed, cloned, compared with `==` or serialised. The bytes are read with
//! `expose()`, so that one `grep` finds every place that touches a secret.
//!
//! By hand, because the types of the crate `secrecy` have a `Debug`, cannot be filled in place when they are as long
//! as they happen to be, and shrink a vector with room to spare, which leaves its bytes behind. The comparison is by hand, because
//! process 1 would be larger with the crate `subtle`, by half a kilobyte.

use zeroize::Zeroize;

/// Bytes in a box of exactly their size, wiped on drop.
///
/// A `Vec` that grows leaves copies of its old contents behind in freed memory; a box never
/// grows. A secret therefore cannot be extended either, only made anew.
///
/// It has no `Debug`, so it cannot slip into a log line:
///
/// ```compile_fail
/// let key = cvm_secrets::secret::Secret::copy_of(b"correct horse");
/// println!("{key:?}");
/// ```
///
/// nor a `Display`:
///
/// ```compile_fail
/// let key = cvm_secrets::secret::Secret::copy_of(b"correct horse");
/// println!("{key}");
/// ```
///
/// and a copy is made on purpose or not at all:
///
/// ```compile_fail
/// let key = cvm_secrets::secret::Secret::copy_of(b"correct horse");
/// let copy = key.clone();
/// ```
pub struct Secret(Box<[u8]>);

impl Secret {
    /// Copies `bytes`; wiping the original is the caller's business.
    pub fn copy_of(bytes: &[u8]) -> Self {
        Self(Box::from(bytes))
    }

    /// Gives `fill` exactly `len` zeroed bytes to write into, so that a derived key never
    /// exists anywhere else.
    pub fn filled(len: usize, fill: impl FnOnce(&mut [u8])) -> Self {
        let mut secret = Self(vec![0; len].into_boxed_slice());
        fill(&mut secret.0);
        secret
    }

    /// The bytes themselves. Greppable on purpose.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }

    /// The bytes as text, if they are UTF-8.
    pub fn expose_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A second copy, asked for by name.
    #[must_use = "a copy of a secret that nobody uses should not be made"]
    pub fn duplicate(&self) -> Self {
        Self::copy_of(&self.0)
    }

    /// Compares in a time that depends on the lengths only, which are no secret.
    pub fn matches(&self, other: &[u8]) -> bool {
        if self.0.len() != other.len() {
            return false;
        }
        let mut difference = 0_u8;
        for (own, given) in self.0.iter().zip(other) {
            // The black box keeps the optimiser from returning at the first difference.
            difference = std::hint::black_box(difference | (own ^ given));
        }
        difference == 0
    }
}

impl From<Vec<u8>> for Secret {
    /// Takes the bytes over without a copy where the vector has no spare room; otherwise
    /// copies them into a box that fits and wipes the vector, because shrinking it would
    /// free the old memory unwiped.
    fn from(mut bytes: Vec<u8>) -> Self {
        if bytes.capacity() == bytes.len() {
            return Self(bytes.into_boxed_slice());
        }
        let secret = Self::copy_of(&bytes);
        bytes.zeroize();
        secret
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self::from(text.into_bytes())
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_exactly_what_it_was_given() {
        let mut roomy = Vec::with_capacity(100);
        roomy.extend_from_slice(b"key");
        let secret = Secret::from(roomy);
        assert_eq!(secret.expose(), b"key");
        assert_eq!(secret.expose_str(), Some("key"));
        assert_eq!((secret.len(), secret.is_empty()), (3, false));
        assert_eq!(secret.duplicate().expose(), b"key");
        assert_eq!(Secret::from(String::from("key")).expose(), b"key");
    }

    #[test]
    fn bytes_that_are_not_text_are_not_shown_as_text() {
        assert_eq!(Secret::copy_of(&[0xff]).expose_str(), None);
    }

    #[test]
    fn matches_only_the_same_bytes() {
        let secret = Secret::copy_of(b"abc");
        assert!(secret.matches(b"abc"));
        for other in [&b"abd"[..], b"xbc", b"ab", b"abcd", b""] {
            assert!(!secret.matches(other));
        }
        assert!(Secret::copy_of(b"").matches(b""));
    }

    #[test]
    fn filling_writes_in_place() {
        let secret = Secret::filled(4, |room| room.copy_from_slice(b"wxyz"));
        assert_eq!(secret.expose(), b"wxyz");
    }
}
