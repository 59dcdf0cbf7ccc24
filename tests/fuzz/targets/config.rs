//! Whatever an `openclaw.json` holds, looking at it comes to an end and says nothing of it;
//! and what the supervisor writes itself is understood, with anything laid around it.
#![no_main]

use bootstrap::{GatewaySettings, TokenState, generated_config, inspect_config};
use libfuzzer_sys::fuzz_target;

const TOKEN: &str = "xb60JGSYzqa9njB6VObVhc1aY1DUfuC1";

#[allow(dead_code)] // the device identity
#[path = "../../../src/supervisor/tasks/src/state/bootstrap/mod.rs"]
mod bootstrap;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let _ = inspect_config(&text, TOKEN);
    // A comment before the generated text changes nothing, as long as it is one.
    if !text.contains(['\n', '\r', '\u{2028}', '\u{2029}']) {
        let commented = format!("// {text}\n{}", generated_config(GatewaySettings { port: 18789, redpill: true }));
        assert!(matches!(inspect_config(&commented, TOKEN).token, TokenState::Reference));
    }
});
