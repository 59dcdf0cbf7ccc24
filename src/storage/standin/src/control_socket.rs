//! The socket: who speaks, what is said, and whose end means that a server has died.
//!
//! One byte each way, one answer to each:
//!
//! ```text
//! F  with /dev/fuse, or with /dev/fuse, the mount's root and the upper layer's: hold this
//! H  everything is copied up: answer for me when I die
//! D  drop what you hold; to be said before unmounting, since the mount's root is held open
//! ?  n nothing held, h held, s answering in place of the dead
//!    k done, x not done
//! ```
//!
//! Anyone who may open the socket may ask; whoever hands over a descriptor is the worker from
//! then on, and one whose connection is still there has nothing to say any more.

use crate::fuse_device::Held;
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

/// More speakers at once than anybody needs; the one that came first has to go.
const SPEAKERS_MAX: usize = 8;

struct Speaker {
    socket: OwnedFd,
    is_worker: bool,
    process: i32,
}

/// A dead worker is looked for this often, though its connection tells of most deaths at once.
const LOOK_EVERY: u16 = 1000;

/// Ends only if there is nothing to listen on.
pub(crate) fn work(path: &Path) -> Result<Infallible, String> {
    let listener = listen(path).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut speakers: Vec<Speaker> = Vec::new();
    let mut held = Held::Nothing;
    loop {
        let mut waited: Vec<PollFd<'_>> = Vec::with_capacity(SPEAKERS_MAX + 2);
        waited.push(PollFd::new(listener.as_fd(), PollFlags::POLLIN));
        waited.extend(speakers.iter().map(|s| PollFd::new(s.socket.as_fd(), PollFlags::POLLIN)));
        waited.extend(held.served().map(|device| PollFd::new(device, PollFlags::POLLIN)));
        let timeout = if held.is_kept() { PollTimeout::from(LOOK_EVERY) } else { PollTimeout::NONE };
        match poll(&mut waited, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(format!("poll: {errno}")),
        }
        drop(waited);
        // Everything here returns at once when there is nothing, so nobody asks what has woken us.
        held.serve();
        hear_all(&mut speakers, &mut held);
        if held.is_kept() && speakers.iter().any(|s| s.is_worker && is_dying(s.process)) {
            held.set_free();
        }
        admit(&listener, &mut speakers);
    }
}

fn listen(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // Nobody else's from the first moment on, and not only after the chmod.
    let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(old);
    let listener = listener?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn admit(listener: &UnixListener, speakers: &mut Vec<Speaker>) {
    // One at a time: the next one wakes us again.
    let Ok((socket, _)) = listener.accept() else { return };
    if speakers.len() >= SPEAKERS_MAX
        && let Some(first) = speakers.iter().position(|s| !s.is_worker)
    {
        speakers.remove(first);
    }
    let process = getsockopt(&socket, PeerCredentials).map_or(0, |peer| peer.pid());
    speakers.push(Speaker { socket: socket.into(), is_worker: false, process });
}

/// Whether a process has been killed and cannot end. One of its threads waits for an answer of its
/// own mount; the kernel closes descriptors with the last thread, so neither its connection to us
/// nor the mount's would ever end. Its first thread, which waits for nothing, is a zombie already.
fn is_dying(process: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['Z', 'X']))
}

/// One word of each: whoever never stops talking must not keep the others waiting.
fn hear_all(speakers: &mut Vec<Speaker>, held: &mut Held) {
    let mut at = 0;
    while let Some(speaker) = speakers.get(at) {
        match scm_rights::next_byte(&speaker.socket) {
            Err(Errno::EAGAIN | Errno::EINTR) => {}
            Ok(Some((word, passed))) => {
                let answer = obey(word, passed, at, speakers, held);
                // Whoever does not listen misses the answer.
                let _ = speakers.get(at).map(|speaker| descriptor::write_some(&speaker.socket, &[answer]));
            }
            // ECONNRESET as well: it died with an answer of ours unread.
            Ok(None) | Err(_) => {
                let gone = speakers.remove(at);
                if gone.is_worker {
                    held.take_over();
                }
                continue;
            }
        }
        at += 1;
    }
}

const DONE: u8 = b'k';
/// Nothing was done: not a FUSE device, not said by the worker, or no such word.
const REFUSED: u8 = b'x';

fn obey(word: u8, passed: Vec<OwnedFd>, at: usize, speakers: &mut [Speaker], held: &mut Held) -> u8 {
    let speaks_for_it = speakers.iter().enumerate().all(|(index, s)| !s.is_worker || index == at);
    match word {
        b'F' if held.keep(passed) => {
            for (index, speaker) in speakers.iter_mut().enumerate() {
                speaker.is_worker = index == at;
            }
            DONE
        }
        b'H' if speaks_for_it && held.hydrated() => DONE,
        // A worker that has started anew and wants to mount anew may say it as well.
        b'D' if speaks_for_it => {
            *held = Held::Nothing;
            DONE
        }
        b'?' => held.word(),
        _ => REFUSED,
    }
}
