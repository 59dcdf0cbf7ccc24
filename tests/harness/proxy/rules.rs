//! What can happen to a request, and to which.

use std::time::Duration;

/// What can happen to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It waits this long before it goes on; waits of several rules add up.
    Latency(Duration),
    /// The connection is reset.
    Reset,
    /// Nothing comes back, and the body is not read, until the rules change; then the
    /// connection is closed.
    Hang,
    /// The proxy answers with this status and S3's words for it.
    Status(u16),
    /// Half of the request's body reaches the server, then the connection closes on both sides.
    HalfRequest,
    /// The server does what it was asked, and half of its answer's body comes back.
    HalfResponse,
    /// The server does what it was asked, and nothing of its answer comes back.
    NoResponse,
    /// The client's connection is reset, and the server does what it was asked when the rules change.
    Late,
}

/// A fault, and the requests that it happens to: all, unless told otherwise.
#[derive(Debug, Clone)]
pub struct Rule {
    pub(super) fault: Fault,
    method: Option<String>,
    pub(super) path: Option<String>,
    which: Which,
    times: usize,
    seen: u64,
}

#[derive(Debug, Clone, Copy)]
enum Which {
    Every(u64),
    /// Of 1000, chosen by the seed.
    Some {
        per_mille: u64,
        seed: u64,
    },
}

impl Rule {
    pub fn new(fault: Fault) -> Self {
        Self { fault, method: None, path: None, which: Which::Every(1), times: usize::MAX, seen: 0 }
    }

    #[must_use]
    pub fn method(self, method: &str) -> Self {
        Self { method: Some(method.to_owned()), ..self }
    }

    /// Requests whose path and query contain this.
    #[must_use]
    pub fn path(self, part: &str) -> Self {
        Self { path: Some(part.to_owned()), ..self }
    }

    /// The `nth` of those that match, and again after as many.
    #[must_use]
    pub fn every(self, nth: u64) -> Self {
        Self { which: Which::Every(nth.max(1)), ..self }
    }

    /// A share of those that match; the same seed takes the same ones.
    #[must_use]
    pub fn some(self, per_mille: u64, seed: u64) -> Self {
        Self { which: Which::Some { per_mille, seed }, ..self }
    }

    /// At most so often.
    #[must_use]
    pub fn times(self, times: usize) -> Self {
        Self { times, ..self }
    }

    pub(super) fn happens(&mut self, method: &str, path: &str) -> bool {
        let matches = self.method.as_ref().is_none_or(|m| m == method)
            && self.path.as_ref().is_none_or(|part| path.contains(part));
        if !matches {
            return false;
        }
        self.seen += 1;
        let chosen = match self.which {
            Which::Every(nth) => self.seen.is_multiple_of(nth),
            Which::Some { per_mille, seed } => mixed(seed ^ mixed(self.seen)) % 1000 < per_mille,
        };
        if chosen && self.times > 0 {
            self.times -= 1;
            return true;
        }
        false
    }
}

/// The finalizer of `SplitMix64`.
pub(super) fn mixed(n: u64) -> u64 {
    let n = n.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let n = (n ^ (n >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let n = (n ^ (n >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    n ^ (n >> 31)
}
