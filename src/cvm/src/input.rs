//! Input from outside: the environment with the files that it names, up to a limit.

use crate::text;
use crate::units;
use cvm_system::env::Environment;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use zeroize::Zeroizing;

/// The supervisor's own limit for a file: a configuration, or workspace files.
const FILE_MAX: usize = 16 * 1024 * 1024;

/// All variables, as the supervisor would read them.
pub(crate) fn environment() -> Environment {
    let all = std::env::vars_os().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
    let mut environment = Environment::new(all);
    for (name, path) in environment.wanted_files() {
        environment.with_file(name, read_file(&path, FILE_MAX));
    }
    environment
}

/// Reads a file, or the pipe of a shell's `<(pass show key)`.
pub(crate) fn read_file(path: &Path, limit: usize) -> Result<Vec<u8>, String> {
    let mut file = File::open(path).map_err(|e| text::io_error(&e))?;
    read_limited(&mut file, limit)
}

pub(crate) fn read_limited(from: &mut impl Read, limit: usize) -> Result<Vec<u8>, String> {
    // As large as it can become: a vector that grows would leave parts of a key in memory.
    let mut bytes = Zeroizing::new(Vec::with_capacity(limit + 64));
    from.take(limit as u64 + 1).read_to_end(&mut bytes).map_err(|e| text::io_error(&e))?;
    if bytes.len() > limit {
        return Err(format!("it is longer than {}", units::size(limit as u64)));
    }
    Ok(std::mem::take(&mut *bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_input_without_end_is_refused() {
        let mut endless = std::io::repeat(b'x');
        assert!(read_limited(&mut endless, 64 * 1024).unwrap_err().contains("64.0 KiB"));
    }
}
