//! The control socket: one request and one answer a connection.
//!
//! It lives inside PID 1's only loop, so nothing a client does may cost more than a moment:
//! requests are short, answers are buffered, slow clients are dropped, and there is room for
//! a fixed number of them. Only root may connect.

use cvm_protocol::control::{BadRequest, Body, REQUEST_MAX, Request, Response, VERSION};
use cvm_protocol::json_lines;
use cvm_sys::clock::BootTime;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, accept4, bind, getsockopt, listen, socket, sockopt,
};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use zeroize::Zeroizing;

/// A machine has a handful of operators and one health check.
const CLIENTS_MAX: usize = 32;
/// From connecting to having read the answer.
const CLIENT_TIME: Duration = Duration::from_secs(5);
/// Accepted in one turn, so that a flood of connections leaves time for children.
const ACCEPTS_A_TURN: usize = 64;

pub(crate) struct Control {
    listener: OwnedFd,
    /// The socket's path, with device and inode of the file that we made.
    path: PathBuf,
    file: (u64, u64),
    clients: Vec<Client>,
}

struct Client {
    socket: OwnedFd,
    asked: Vec<u8>,
    answer: Option<Zeroizing<Vec<u8>>>,
    sent: usize,
    until: BootTime,
}

/// What became of a client after a turn.
enum Fate {
    Stays,
    Leaves,
}

impl Control {
    /// Listens at `path`, and replaces what an earlier start left there.
    pub(crate) fn open(path: &str) -> Result<Self, String> {
        let at = Path::new(path);
        let directory = at.parent().unwrap_or(Path::new("/"));
        let words = |e: std::io::Error| format!("{}: {e}", directory.display());
        std::fs::create_dir_all(directory).map_err(words)?;
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700)).map_err(words)?;
        let _ = std::fs::remove_file(at);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let words = |e: Errno| format!("{path}: {}", e.desc());
        let listener = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(words)?;
        bind(listener.as_raw_fd(), &UnixAddr::new(at).map_err(words)?).map_err(words)?;
        std::fs::set_permissions(at, std::fs::Permissions::from_mode(0o600))
            .map_err(|e| format!("{path}: {e}"))?;
        listen(&listener, Backlog::new(128).unwrap_or(Backlog::MAXCONN)).map_err(words)?;
        let file = identity(at).ok_or_else(|| format!("{path}: it is gone again"))?;
        Ok(Self { listener, path: at.to_owned(), file, clients: Vec::new() })
    }

    /// Whether the path still leads to our socket.
    pub(crate) fn is_in_place(&self) -> bool {
        identity(&self.path) == Some(self.file)
    }

    /// What to wait for: descriptor, and whether for writing.
    pub(crate) fn interests(&self) -> impl Iterator<Item = (BorrowedFd<'_>, bool)> {
        let clients = self.clients.iter().map(|c| (c.socket.as_fd(), c.answer.is_some()));
        std::iter::once((self.listener.as_fd(), false)).chain(clients)
    }

    pub(crate) fn deadline(&self) -> Option<BootTime> {
        self.clients.iter().map(|c| c.until).min()
    }

    /// One turn of the loop: accepts, reads, answers by `answer`, writes, and drops slow clients.
    pub(crate) fn turn(&mut self, now: BootTime, mut answer: impl FnMut(Request) -> Body) {
        self.accept(now);
        self.clients
            .retain_mut(|client| now < client.until && matches!(client.turn(&mut answer), Fate::Stays));
    }

    fn accept(&mut self, now: BootTime) {
        for _ in 0..ACCEPTS_A_TURN {
            let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
            let Ok(raw) = accept4(self.listener.as_raw_fd(), flags) else { return };
            // SAFETY: accept4 has just returned this descriptor, and nobody else knows it.
            #[allow(unsafe_code)]
            let socket = unsafe { OwnedFd::from_raw_fd(raw) };
            // The socket's mode says root only; this holds if somebody changes it.
            let is_root = getsockopt(&socket, sockopt::PeerCredentials).is_ok_and(|peer| peer.uid() == 0);
            if !is_root {
                continue;
            }
            if self.clients.len() >= CLIENTS_MAX {
                // The oldest connection makes room.
                self.clients.remove(0);
            }
            let until = now + CLIENT_TIME;
            self.clients.push(Client { socket, asked: Vec::new(), answer: None, sent: 0, until });
        }
    }
}

/// Device and inode of what lies at a path.
fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

impl Client {
    fn turn(&mut self, answer: &mut impl FnMut(Request) -> Body) -> Fate {
        if self.answer.is_none() {
            match self.read() {
                Ok(None) => return Fate::Stays,
                Ok(Some(request)) => {
                    let body = match request {
                        Ok(request) => answer(request),
                        Err(bad) => Body::Refused { why: bad.to_string() },
                    };
                    self.answer = Some(json_lines::line(&Response { v: VERSION, body }));
                }
                Err(()) => return Fate::Leaves,
            }
        }
        self.write()
    }

    fn read(&mut self) -> Result<Option<Result<Request, BadRequest>>, ()> {
        let mut bytes = [0u8; 1024];
        loop {
            match nix::unistd::read(&self.socket, &mut bytes) {
                Ok(0) => return Err(()),
                Ok(n) => self.asked.extend(bytes.iter().take(n)),
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(_) => return Err(()),
            }
            if let Some(end) = self.asked.iter().position(|b| *b == b'\n') {
                return Ok(Some(Request::parse(self.asked.get(..end).unwrap_or_default())));
            }
            if self.asked.len() > REQUEST_MAX {
                return Ok(Some(Err(BadRequest::TooLong)));
            }
        }
    }

    fn write(&mut self) -> Fate {
        let Some(answer) = &self.answer else { return Fate::Stays };
        while let Some(rest) = answer.get(self.sent..).filter(|r| !r.is_empty()) {
            match cvm_sys::descriptor::write_some(&self.socket, rest) {
                Ok(n) => self.sent += n,
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Fate::Stays,
                Err(_) => return Fate::Leaves,
            }
        }
        Fate::Leaves
    }
}
