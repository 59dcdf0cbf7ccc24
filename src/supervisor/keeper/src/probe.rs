//! Probes ask a service one small question at a time, and never block on the answer.

use cvm_protocol::keeper::Probe;
use cvm_protocol::keeper::ProbeSpec;
use cvm_sys::clock::BootTime;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, UnixAddr, connect, getsockopt, socket, sockopt,
};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

/// The most bytes of an answer that are read. A success needs only the status line; a failure also names parts.
const ANSWER_MAX: usize = 16 * 1024;
/// The most names of failing parts that are reported, and the most characters of each.
const FAILING_MAX: usize = 5;
const FAILING_CHARS_MAX: usize = 80;

/// One probe of one service, and the stage of its current question.
pub(crate) struct Prober {
    spec: ProbeSpec,
    stage: Stage,
    failing: Vec<String>,
}

enum Stage {
    Resting { until: BootTime },
    Connecting { socket: OwnedFd, until: BootTime },
    Reading { socket: OwnedFd, until: BootTime, answer: Vec<u8> },
}

impl Prober {
    pub(crate) fn new(spec: ProbeSpec, now: BootTime) -> Self {
        let until = now + Duration::from_millis(spec.eager_ms);
        Self { spec, stage: Stage::Resting { until }, failing: Vec::new() }
    }

    pub(crate) fn deadline(&self) -> BootTime {
        match &self.stage {
            Stage::Resting { until } | Stage::Connecting { until, .. } | Stage::Reading { until, .. } => {
                *until
            }
        }
    }

    /// The parts that the last answer named as failing.
    pub(crate) fn failing(&self) -> &[String] {
        &self.failing
    }

    /// The socket to wait for, and whether until it can be written.
    pub(crate) fn interest(&self) -> Option<(BorrowedFd<'_>, bool)> {
        match &self.stage {
            Stage::Resting { .. } => None,
            Stage::Connecting { socket, .. } => Some((socket.as_fd(), true)),
            Stage::Reading { socket, .. } => Some((socket.as_fd(), false)),
        }
    }

    /// Does what is possible without waiting. Returns an answer once it is complete.
    pub(crate) fn turn(&mut self, now: BootTime) -> Option<bool> {
        let resting = Stage::Resting { until: now };
        let (next, answer) = match std::mem::replace(&mut self.stage, resting) {
            Stage::Resting { until } if now < until => (Stage::Resting { until }, None),
            Stage::Resting { .. } => self.ask(now),
            Stage::Connecting { until, .. } | Stage::Reading { until, .. } if now >= until => {
                self.answered(false, now)
            }
            Stage::Connecting { socket, until } => self.connected(socket, until, now),
            Stage::Reading { socket, until, answer } => self.read(socket, until, answer, now),
        };
        self.stage = next;
        answer
    }

    fn ask(&mut self, now: BootTime) -> (Stage, Option<bool>) {
        let until = now + Duration::from_millis(self.spec.timeout_ms);
        match open(&self.spec.probe) {
            Ok(socket) => (Stage::Connecting { socket, until }, None),
            Err(_) => self.answered(false, now),
        }
    }

    fn connected(&mut self, socket: OwnedFd, until: BootTime, now: BootTime) -> (Stage, Option<bool>) {
        match getsockopt(&socket, sockopt::SocketError) {
            Ok(0) => {}
            _ => return self.answered(false, now),
        }
        // The peer shows whether there is a connection: SO_ERROR is 0 also while it is being made.
        match nix::sys::socket::getpeername::<nix::sys::socket::SockaddrStorage>(
            std::os::fd::AsRawFd::as_raw_fd(&socket),
        ) {
            Ok(_) => {}
            Err(Errno::ENOTCONN) => return (Stage::Connecting { socket, until }, None),
            Err(_) => return self.answered(false, now),
        }
        let path = match &self.spec.probe {
            Probe::Listens { .. } => return self.answered(true, now),
            Probe::Http { path, .. } | Probe::UnixHttp { path, .. } => path,
        };
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nUser-Agent: openclaw-cvm\r\n\r\n"
        );
        // The empty buffer of a new socket has room for the whole request.
        match nix::unistd::write(&socket, request.as_bytes()) {
            Ok(_) => (Stage::Reading { socket, until, answer: Vec::new() }, None),
            Err(_) => self.answered(false, now),
        }
    }

    fn read(
        &mut self,
        socket: OwnedFd,
        until: BootTime,
        mut answer: Vec<u8>,
        now: BootTime,
    ) -> (Stage, Option<bool>) {
        let mut bytes = [0u8; ANSWER_MAX];
        match nix::unistd::read(&socket, &mut bytes) {
            Ok(n) => {
                answer.extend(bytes.iter().take(n));
                let good = answer.contains(&b'\n') && is_success(&answer);
                if n == 0 || good || answer.len() >= ANSWER_MAX {
                    self.failing = if good { Vec::new() } else { failing_in(&answer) };
                    return self.answered(is_success(&answer), now);
                }
                (Stage::Reading { socket, until, answer }, None)
            }
            Err(Errno::EAGAIN | Errno::EINTR) => (Stage::Reading { socket, until, answer }, None),
            Err(_) => self.answered(false, now),
        }
    }

    fn answered(&self, good: bool, now: BootTime) -> (Stage, Option<bool>) {
        let pause = if good { self.spec.calm_ms } else { self.spec.eager_ms };
        (Stage::Resting { until: now + Duration::from_millis(pause) }, Some(good))
    }
}

fn open(probe: &Probe) -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let family = match probe {
        Probe::UnixHttp { .. } => AddressFamily::Unix,
        Probe::Http { .. } | Probe::Listens { .. } => AddressFamily::Inet,
    };
    let fd = socket(family, SockType::Stream, flags, None)?;
    let raw = std::os::fd::AsRawFd::as_raw_fd(&fd);
    let outcome = match probe {
        Probe::UnixHttp { socket, .. } => connect(raw, &UnixAddr::new(socket.as_str())?),
        Probe::Http { port, .. } | Probe::Listens { port } => {
            connect(raw, &SockaddrIn::new(127, 0, 0, 1, *port))
        }
    };
    match outcome {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(fd),
        Err(error) => Err(error),
    }
}

/// `HTTP/1.x 2..`
fn is_success(answer: &[u8]) -> bool {
    answer.starts_with(b"HTTP/1.") && answer.get(8..10) == Some(b" 2")
}

/// The names in `"failing"` of a JSON object at the end of the answer, as the gateway's `/readyz` lists them.
fn failing_in(answer: &[u8]) -> Vec<String> {
    let Some(start) = answer.iter().position(|b| *b == b'{') else { return Vec::new() };
    let object = answer.get(start..).unwrap_or_default();
    // Only the first object is read: more bytes follow it in a chunked answer.
    let body = serde_json::Deserializer::from_slice(object).into_iter::<serde_json::Value>().next();
    let Some(Ok(body)) = body else { return Vec::new() };
    let names = body.get("failing").and_then(serde_json::Value::as_array).into_iter().flatten();
    let names = names.filter_map(serde_json::Value::as_str).take(FAILING_MAX);
    names.map(|name| name.chars().filter(|c| !c.is_control()).take(FAILING_CHARS_MAX).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;

    fn ask(probe: Probe) -> bool {
        let spec = ProbeSpec { probe, eager_ms: 0, calm_ms: 1000, timeout_ms: 10_000 };
        let mut prober = Prober::new(spec, BootTime::now());
        loop {
            if let Some(answer) = prober.turn(BootTime::now()) {
                return answer;
            }
            std::thread::yield_now();
        }
    }

    fn serve(answer: &'static [u8]) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0u8; 512];
            let _ = stream.read(&mut request).unwrap();
            stream.write_all(answer).unwrap();
        });
        port
    }

    #[test]
    fn only_a_2xx_status_line_is_a_yes() {
        let http = |answer| ask(Probe::Http { port: serve(answer), path: "/healthz".into() });
        assert!(http(b"HTTP/1.1 200 OK\r\n\r\n{}"));
        assert!(!http(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"));
        assert!(!http(b"SSH-2.0-OpenSSH\r\n"));
        assert!(!http(b""));
    }

    #[test]
    fn a_no_hands_on_the_names_of_what_fails_in_bounds_and_nothing_else() {
        let chunked = b"HTTP/1.1 503 No\r\nTransfer-Encoding: chunked\r\n\r\n3f\r\n\
            {\"ready\":false,\"failing\":[\"agent-database:main\\u001b[2J\"],\"reason\":\"words\"}\r\n0\r\n\r\n";
        assert_eq!(failing_in(chunked), ["agent-database:main[2J"]);
        let long = serde_json::json!({ "failing": vec!["x".repeat(1000); 100] });
        let names = failing_in(format!("HTTP/1.1 503 No\r\n\r\n{long}").as_bytes());
        assert_eq!((names.len(), names[0].len()), (5, 80));
        for other in ["HTTP/1.1 503 No\r\n\r\nbusy", "HTTP/1.1 503 No\r\n\r\n{\"failing\":7}", ""] {
            assert_eq!(failing_in(other.as_bytes()), [""; 0]);
        }
    }

    #[test]
    fn a_port_where_nobody_listens_is_a_no() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert!(!ask(Probe::Listens { port }));
        assert!(!ask(Probe::UnixHttp { socket: "/no/such/socket".into(), path: "/".into() }));
    }

    #[test]
    fn a_server_that_accepts_and_says_nothing_is_a_no_at_the_deadline() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let probe = Probe::Http { port, path: "/healthz".into() };
        let mut now = BootTime::now();
        let mut prober = Prober::new(ProbeSpec { probe, eager_ms: 0, calm_ms: 0, timeout_ms: 60_000 }, now);
        let until = BootTime::now() + Duration::from_secs(10);
        while prober.interest().is_none_or(|(_, writes)| writes) && BootTime::now() < until {
            assert_eq!(prober.turn(now), None);
        }
        now = now + Duration::from_secs(61);
        assert_eq!(prober.turn(now), Some(false));
    }
}
