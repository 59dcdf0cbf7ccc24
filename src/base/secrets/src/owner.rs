//! The two values by which an environment is proven to be its owner's: the word in the compose file, and the epoch.

use std::fmt;

/// What stands in the compose file for the owner: the SHA-256 of something that only he can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerWord([u8; 32]);

impl OwnerWord {
    /// From 64 hex digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let digits: Option<Vec<u32>> = text.chars().map(|digit| digit.to_digit(16)).collect();
        let mut word = [0_u8; 32];
        let digits = digits.filter(|digits| digits.len() == 2 * word.len())?;
        for (byte, pair) in word.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair.iter().fold(0, |byte, digit| byte << 4 | u8::try_from(*digit).unwrap_or(0));
        }
        Some(Self(word))
    }

    pub fn from_bytes(word: [u8; 32]) -> Self {
        Self(word)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for OwnerWord {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// How often the owner has made older environments of his void.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Epoch(u32);

impl Epoch {
    pub const MAX: u32 = 1_000_000;

    /// None above [`Self::MAX`].
    pub fn new(number: u32) -> Option<Self> {
        (number <= Self::MAX).then_some(Self(number))
    }

    pub fn get(self) -> u32 {
        self.0
    }
}
