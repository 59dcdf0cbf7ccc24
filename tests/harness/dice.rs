//! Chance that can be had again, and how often it is tried.

/// How many rounds a test makes of what is random: with `CVM_SOAK` as many as `long` says.
pub fn rounds<T>(usual: T, long: T) -> T {
    if soaks() { long } else { usual }
}

/// Whether what takes long is wanted.
pub fn soaks() -> bool {
    std::env::var_os("CVM_SOAK").is_some()
}

/// Xorshift: the same seed gives the same run.
pub struct Dice(pub u64);

impl Dice {
    pub fn up_to(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }

    /// Lets a moment pass that nobody can foresee.
    pub fn pause(&mut self, at_most: std::time::Duration) {
        let most = u64::try_from(at_most.as_millis()).expect("short");
        std::thread::sleep(std::time::Duration::from_millis(self.up_to(most.max(1))));
    }
}
