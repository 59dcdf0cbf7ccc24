//! Whatever comes in on the control socket, the reader has an answer; what it accepts it
//! writes back as it was.
#![no_main]

use cvm_blueprint::wire::{self, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    match Request::parse(data) {
        Ok(request) => {
            let line = wire::line(&request);
            assert_eq!(Request::parse(line.trim_ascii_end()).as_ref(), Ok(&request));
        }
        Err(bad) => assert!(!bad.to_string().is_empty()),
    }
});
