//! Checks that the agent cannot reach dstack's guest agent, which answers with quotes and keys.
//!
//! PID 1 has moved the guest agent's socket away at boot; this looks at the result before the gateway's home is made.
//! Nothing is changed here.

use crate::report::{Failure, Outcome};
use crate::root_dir::RootDir;
use cvm_protocol::paths;
use std::fs::{Metadata, metadata};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};

pub(super) fn is_out_of_reach(root_dir: &RootDir) -> Outcome<()> {
    let is_socket = |path: &str| metadata(root_dir.at(path)).is_ok_and(|found| found.file_type().is_socket());
    if let Some(open) = paths::DSTACK_USUAL_SOCKETS.iter().find(|path| is_socket(path)) {
        return Err(Failure::for_good(format!(
            "dstack's socket is at {open}, where the agent can use it, and could not be moved; mount it at {} \
             instead, or unmount it (for the supervisor to do so: cap_add SYS_ADMIN)",
            paths::DSTACK_SOCKET
        )));
    }
    let is_closed = |found: Metadata| found.mode().trailing_zeros() >= 6;
    if is_socket(paths::DSTACK_SOCKET) && !metadata(root_dir.at(paths::DSTACK_DIRECTORY)).is_ok_and(is_closed)
    {
        return Err(Failure::for_good(format!(
            "others than root may enter {}, where dstack's socket is; mount the socket alone at {}, and no directory",
            paths::DSTACK_DIRECTORY,
            paths::DSTACK_SOCKET
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_socket_at_any_usual_place_is_refused_with_the_remedy() {
        for usual in paths::DSTACK_USUAL_SOCKETS {
            let temp = tempfile::tempdir().unwrap();
            let root_dir = RootDir::below(temp.path());
            fs::create_dir_all(root_dir.at(usual).parent().unwrap()).unwrap();
            // What an engine makes where the host has no such socket.
            fs::create_dir(root_dir.at(usual)).unwrap();
            is_out_of_reach(&root_dir).unwrap();
            fs::remove_dir(root_dir.at(usual)).unwrap();
            let _listener = UnixListener::bind(root_dir.at(usual)).unwrap();
            let failure = is_out_of_reach(&root_dir).unwrap_err();
            assert!(!failure.retry && failure.why.contains(usual), "{}", failure.why);
            assert!(failure.why.contains(paths::DSTACK_SOCKET), "{}", failure.why);
        }
    }

    #[test]
    fn the_directory_that_holds_it_must_be_closed() {
        let temp = tempfile::tempdir().unwrap();
        let root_dir = RootDir::below(temp.path());
        let directory = root_dir.at(paths::DSTACK_DIRECTORY);
        fs::create_dir_all(&directory).unwrap();
        fs::set_permissions(&directory, Permissions::from_mode(0o755)).unwrap();
        is_out_of_reach(&root_dir).unwrap();
        let _listener = UnixListener::bind(root_dir.at(paths::DSTACK_SOCKET)).unwrap();
        assert!(is_out_of_reach(&root_dir).unwrap_err().why.contains("others than root"));
        fs::set_permissions(&directory, Permissions::from_mode(0o700)).unwrap();
        is_out_of_reach(&root_dir).unwrap();
    }
}
