//! A connection to a unix socket of this VM: connect, send one line, read lines, each before a deadline.

use crate::text;
use memchr::memchr;
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::geteuid;
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// Between two tries to connect while the server's queue is full.
const RETRY: Duration = Duration::from_millis(20);
const BLOCK: usize = 64 * 1024;

/// Why there is no answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum NoAnswer {
    /// There is no socket, or nobody listens on it.
    NotRunning(String),
    NotAllowed,
    /// The deadline passed.
    Late,
    /// The connection ended before the answer did.
    CutOff,
    TooLong,
    Garbage,
    Version(u32),
    Other(String),
}

#[derive(Debug)]
pub(crate) struct Connection {
    stream: UnixStream,
    line_max: usize,
    /// Bytes that have arrived and belong to a line that was not asked for yet.
    pending: Zeroizing<Vec<u8>>,
}

impl Connection {
    /// Connects to `path` and sends `request`. Answers may have lines of `line_max` bytes.
    pub(crate) fn open(
        path: &Path,
        request: &[u8],
        line_max: usize,
        deadline: Instant,
    ) -> Result<Self, NoAnswer> {
        let mut stream = connected(path, deadline)?;
        let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        stream.set_write_timeout(Some(left)).map_err(|e| NoAnswer::Other(text::io_error(&e)))?;
        stream.write_all(request).map_err(|e| of_transfer(&e))?;
        Ok(Self { stream, line_max, pending: Zeroizing::new(Vec::with_capacity(BLOCK)) })
    }

    /// The next line, without its line break.
    pub(crate) fn line(&mut self, deadline: Instant) -> Result<Zeroizing<Vec<u8>>, NoAnswer> {
        let mut searched = 0;
        loop {
            if let Some(end) = memchr(b'\n', &self.pending[searched..]).map(|at| searched + at) {
                if end > self.line_max {
                    return Err(NoAnswer::TooLong);
                }
                let line = Zeroizing::new(self.pending[..end].to_vec());
                self.pending.drain(..=end);
                return Ok(line);
            }
            searched = self.pending.len();
            if searched > self.line_max {
                return Err(NoAnswer::TooLong);
            }
            self.read_more(deadline)?;
        }
    }

    fn read_more(&mut self, deadline: Instant) -> Result<(), NoAnswer> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(NoAnswer::Late);
        }
        self.stream.set_read_timeout(Some(left)).map_err(|e| NoAnswer::Other(text::io_error(&e)))?;
        let mut bytes = Zeroizing::new(vec![0; BLOCK]);
        match self.stream.read(&mut bytes[..]) {
            // Mode and credentials admit root alone; the server hangs up on anybody else.
            Ok(0) if self.pending.is_empty() && !geteuid().is_root() => Err(NoAnswer::NotAllowed),
            Ok(0) => Err(NoAnswer::CutOff),
            Ok(n) => {
                self.pending.extend_from_slice(&bytes[..n]);
                Ok(())
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(of_transfer(&error)),
        }
    }
}

/// The path of a socket: the value of `variable`, or the usual one.
pub(crate) fn socket_path(variable: &str, usual: &str) -> PathBuf {
    let given = std::env::var_os(variable).filter(|v| !v.is_empty());
    given.map_or_else(|| PathBuf::from(usual), PathBuf::from)
}

/// Connects without blocking: a blocking connect(2) to a unix socket with a full queue waits for ever.
fn connected(path: &Path, deadline: Instant) -> Result<UnixStream, NoAnswer> {
    let other = |errno: Errno| NoAnswer::Other(format!("{}: {}", path.display(), errno.desc()));
    let address = UnixAddr::new(path).map_err(other)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    loop {
        let fd = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(other)?;
        match connect(fd.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false).map_err(|e| NoAnswer::Other(text::io_error(&e)))?;
                return Ok(stream);
            }
            Err(Errno::EAGAIN) if Instant::now() < deadline => std::thread::sleep(RETRY),
            Err(Errno::EAGAIN) => return Err(NoAnswer::Late),
            Err(Errno::EACCES | Errno::EPERM) => return Err(NoAnswer::NotAllowed),
            Err(errno @ (Errno::ENOENT | Errno::ENOTDIR)) => {
                return Err(NoAnswer::NotRunning(format!("{}: {}", path.display(), errno.desc())));
            }
            Err(Errno::ECONNREFUSED) => {
                return Err(NoAnswer::NotRunning(format!("{}: nobody listens", path.display())));
            }
            Err(errno) => return Err(other(errno)),
        }
    }
}

fn of_transfer(error: &std::io::Error) -> NoAnswer {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => NoAnswer::Late,
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => NoAnswer::CutOff,
        _ => NoAnswer::Other(text::io_error(error)),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    /// A server of one client, for tests of what a client does with its answers.
    pub(crate) struct FakeServer {
        directory: tempfile::TempDir,
        server: Option<JoinHandle<()>>,
    }

    impl FakeServer {
        /// Reads the client's line, and then serves it with `act`.
        pub(crate) fn new(act: impl FnOnce(String, UnixStream) + Send + 'static) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join("sock")).unwrap();
            let server = std::thread::spawn(move || {
                let mut stream = listener.accept().unwrap().0;
                let (mut request, mut byte) = (Vec::new(), [0]);
                while !request.ends_with(b"\n") && stream.read_exact(&mut byte).is_ok() {
                    request.push(byte[0]);
                }
                act(String::from_utf8(request).unwrap(), stream);
            });
            Self { directory, server: Some(server) }
        }

        pub(crate) fn answering(answer: impl Into<Vec<u8>>) -> Self {
            let answer = answer.into();
            Self::new(move |_, mut stream| drop(stream.write_all(&answer)))
        }

        /// Sends spaces until the client hangs up.
        pub(crate) fn endless() -> Self {
            Self::new(|_, mut stream| {
                let flood = vec![b' '; 1 << 16];
                while stream.write_all(&flood).is_ok() {}
            })
        }

        /// Sends nothing until the sender is dropped.
        pub(crate) fn silent() -> (std::sync::mpsc::Sender<()>, Self) {
            let (release, wait) = std::sync::mpsc::channel::<()>();
            let server = Self::new(move |_, stream| {
                let _ = wait.recv();
                drop(stream);
            });
            (release, server)
        }

        pub(crate) fn socket(&self) -> PathBuf {
            self.directory.path().join("sock")
        }
    }

    impl Drop for FakeServer {
        fn drop(&mut self) {
            let is_good = self.server.take().is_none_or(|server| server.join().is_ok());
            assert!(is_good || std::thread::panicking(), "the server's side of the test failed");
        }
    }

    const PATIENCE: Duration = Duration::from_secs(20);

    fn line_of(path: &Path, patience: Duration) -> Result<Vec<u8>, NoAnswer> {
        let deadline = Instant::now() + patience;
        let mut connection = Connection::open(path, b"question\n", 1 << 20, deadline)?;
        connection.line(deadline).map(|line| line.to_vec())
    }

    #[test]
    fn half_a_line_is_no_answer() {
        let expected = if geteuid().is_root() { NoAnswer::CutOff } else { NoAnswer::NotAllowed };
        assert_eq!(line_of(&FakeServer::answering("half").socket(), PATIENCE), Err(NoAnswer::CutOff));
        assert_eq!(line_of(&FakeServer::answering("").socket(), PATIENCE), Err(expected));
    }

    #[test]
    fn a_server_that_says_nothing_is_late() {
        let (release, server) = FakeServer::silent();
        let outcome = line_of(&server.socket(), Duration::from_millis(50));
        drop(release);
        assert_eq!(outcome, Err(NoAnswer::Late));
    }

    #[test]
    fn a_server_that_sends_byte_by_byte_is_late_when_the_whole_time_is_over() {
        let server = FakeServer::new(|_, mut stream| {
            while stream.write_all(b" ").is_ok() {
                std::thread::yield_now();
            }
        });
        assert_eq!(line_of(&server.socket(), Duration::from_millis(50)), Err(NoAnswer::Late));
    }

    #[test]
    fn an_endless_line_is_cut_at_the_limit() {
        assert_eq!(line_of(&FakeServer::endless().socket(), PATIENCE), Err(NoAnswer::TooLong));
    }

    #[test]
    fn a_socket_without_a_server_is_told_apart_from_no_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let cause = || match line_of(&path, PATIENCE) {
            Err(NoAnswer::NotRunning(cause)) => cause,
            other => panic!("{other:?}"),
        };
        assert!(cause().contains("No such file"));
        drop(UnixListener::bind(&path).unwrap());
        assert!(cause().contains("nobody listens"));
    }

    #[test]
    fn a_full_queue_is_late_and_not_a_hang() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sock");
        let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
        nix::sys::socket::bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
        nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
        let mut kept = Vec::new();
        while let Ok(stream) = connected(&path, Instant::now()) {
            kept.push(stream);
        }
        assert_eq!(line_of(&path, Duration::from_millis(60)), Err(NoAnswer::Late));
    }
}
