//! The socket on which the storage worker hands over its mount. The end of the worker's connection means that the
//! mount's server has died.
//!
//! One byte each way, one answer to each:
//!
//! ```text
//! F  with /dev/fuse, or with /dev/fuse, the mount's root and the upper layer's: hold this
//! H  everything is copied up: answer for me when I die
//! D  drop what you hold; to be said before unmounting, since the mount's root is held open
//! ?  n no device, h a device whose server lives, s answering in place of a dead server
//!    k done, x not done
//! ```
//!
//! Anyone who may open the socket may ask. The client that hands over a device is the worker from then on, and an
//! earlier worker that is still connected can decide nothing any more.

use crate::fuse_device::FuseDevice;
use cvm_sys::process_stat::Process;
use cvm_sys::{descriptor, scm_rights};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use std::convert::Infallible;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;

/// More clients at once than anybody needs; the one that came first has to go.
const CLIENTS_MAX: usize = 8;

struct Client {
    socket: OwnedFd,
    is_worker: bool,
    process: i32,
}

/// Milliseconds between two looks at the worker; most deaths show at once, by the end of its connection.
const LOOK_EVERY: u16 = 1000;

/// Ends only if there is nothing to listen on.
pub(crate) fn work(path: &Path) -> Result<Infallible, String> {
    let listener = listen(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut clients: Vec<Client> = Vec::new();
    let mut device = FuseDevice::None;
    loop {
        let mut waited: Vec<PollFd<'_>> = Vec::with_capacity(CLIENTS_MAX + 2);
        waited.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        waited.extend(clients.iter().map(|s| PollFd::new(s.socket.as_fd(), PollFlags::POLLIN)));
        waited.extend(device.answered().map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        let timeout = if device.has_server() { PollTimeout::from(LOOK_EVERY) } else { PollTimeout::NONE };
        match poll(&mut waited, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(format!("poll: {errno}")),
        }
        drop(waited);
        // Each of these returns at once when there is nothing to do, so it does not matter what ended the wait.
        device.serve();
        answer_all(&mut clients, &mut device);
        if device.has_server() && clients.iter().any(|s| s.is_worker && is_dying(s.process)) {
            device.answer_while_dying();
        }
        admit(&listener, &mut clients);
    }
}

fn listen(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // Only root may connect, from the first moment on and not only after the chmod.
    let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(old);
    let listener = listener?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn admit(listener: &UnixListener, clients: &mut Vec<Client>) {
    // One at a time: the next one ends the next wait at once.
    let Ok((socket, _)) = listener.accept() else { return };
    if clients.len() >= CLIENTS_MAX
        && let Some(first) = clients.iter().position(|s| !s.is_worker)
    {
        clients.remove(first);
    }
    let process = getsockopt(&socket, PeerCredentials).map_or(0, |peer| peer.pid());
    clients.push(Client { socket: socket.into(), is_worker: false, process });
}

/// Whether a process was killed and cannot end, because one of its threads waits for an answer of its own mount.
/// The kernel closes the descriptors of a process with its last thread, so neither its connection to this program
/// nor the mount's connection would ever end. Its first thread waits for nothing and is a zombie already.
fn is_dying(process: i32) -> bool {
    Process::of(process).is_some_and(|process| process.is_dead())
}

/// One request of each: a client that never stops asking must not keep the others waiting.
fn answer_all(clients: &mut Vec<Client>, device: &mut FuseDevice) {
    let mut at = 0;
    while let Some(client) = clients.get(at) {
        match scm_rights::next_byte(&client.socket) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(Some((request, passed))) => {
                let answer = carry_out(request, passed, at, clients, device);
                // A client that does not read misses the answer.
                let _ = clients.get(at).map(|client| descriptor::write_some(&client.socket, &[answer]));
            }
            // Also ECONNRESET: the client died with an answer unread.
            Ok(None) | Err(_) => {
                let gone = clients.remove(at);
                if gone.is_worker {
                    device.take_over();
                }
                continue;
            }
        }
        at += 1;
    }
}

const DONE: u8 = b'k';
/// Nothing was done: not a FUSE device, not asked by the worker, or no such request.
const REFUSED: u8 = b'x';

fn carry_out(
    request: u8,
    passed: Vec<OwnedFd>,
    at: usize,
    clients: &mut [Client],
    device: &mut FuseDevice,
) -> u8 {
    let may_decide = clients.iter().enumerate().all(|(index, s)| !s.is_worker || index == at);
    match request {
        b'F' if device.keep(passed) => {
            for (index, client) in clients.iter_mut().enumerate() {
                client.is_worker = index == at;
            }
            DONE
        }
        b'H' if may_decide && device.hydrated() => DONE,
        // Also from a worker that was started again and wants to mount again.
        b'D' if may_decide => {
            *device = FuseDevice::None;
            DONE
        }
        b'?' => device.state(),
        _ => REFUSED,
    }
}
