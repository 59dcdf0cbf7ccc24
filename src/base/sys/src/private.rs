//! Keeps the memory of a program that handles secrets from being read.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// From now on only a process that may trace every process can read the memory and environment of this one. Neither
/// this process nor its children leave a core file, unless a child raises its limit again. A program calls this
/// first.
pub fn keep_private() {
    // Fails only for an unknown value.
    let _ = nix::sys::prctl::set_dumpable(false);
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_CORE) {
        let _ = setrlimit(Resource::RLIMIT_CORE, 0, most);
    }
}
