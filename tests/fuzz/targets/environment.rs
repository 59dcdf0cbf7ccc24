//! Any environment is either a configuration or a list of mistakes, and no mistake tells a
//! secret.
#![no_main]

use cvm_system::config::Config;
use cvm_system::env::{Environment, VARIABLES};
use libfuzzer_sys::fuzz_target;

/// Marks values that must not come out again. Long enough that no message has it by chance.
const CANARY: &str = "cAnArY7f3k";

fuzz_target!(|data: &[u8]| {
    // Records: one byte picks a variable of the table (or none), the rest up to 0xff is its
    // value; so that most inputs get past the names and into the rules.
    let pairs = data.split(|b| *b == 0xff).filter_map(|record| {
        let (first, value) = record.split_first()?;
        let named = VARIABLES.get(usize::from(*first) % (VARIABLES.len() + 1));
        let (name, secret) = named.map_or(("OTHER", false), |v| (v.name, v.secret));
        let mut bytes = value.to_vec();
        if secret {
            bytes.extend_from_slice(CANARY.as_bytes());
        }
        Some((name.as_bytes().to_vec(), bytes))
    });
    let environment = Environment::new(pairs);
    assert!(!environment.inventory().contains(CANARY));
    match Config::parse(&environment) {
        Ok((_, warnings)) => assert!(warnings.iter().all(|w| !w.to_string().contains(CANARY))),
        Err(problems) => {
            assert!(!problems.is_empty());
            assert!(problems.iter().all(|p| !p.to_string().contains(CANARY)));
        }
    }
});
