//! Whatever comes in on the control socket, the reader has an answer; what it accepts it
//! writes back as it was.
#![no_main]

use cvm_protocol::json_lines;
use cvm_protocol::control::Request;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    match Request::parse(data) {
        Ok(request) => {
            let line = json_lines::line(&request);
            assert_eq!(Request::parse(line.trim_ascii_end()).as_ref(), Ok(&request));
        }
        Err(bad) => assert!(!bad.to_string().is_empty()),
    }
});
