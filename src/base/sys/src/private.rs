//! Memory that holds secrets, or has held some.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Nobody who may not trace every process reads this one's memory or environment, and no core file
/// is left of it, nor, unless it is asked for, of what it starts. The first call of a program.
pub fn keep_private() {
    // It fails only for an unknown value.
    let _ = nix::sys::prctl::set_dumpable(false);
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_CORE) {
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, most);
    }
}
