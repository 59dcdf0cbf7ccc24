//! The client against supervisors that misbehave in every way.

use super::*;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

struct Fake {
    directory: tempfile::TempDir,
    server: Option<JoinHandle<()>>,
}

impl Fake {
    /// Serves one client with `act`.
    fn new(act: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("sock")).unwrap();
        let server = std::thread::spawn(move || act(listener.accept().unwrap().0));
        Self { directory, server: Some(server) }
    }

    fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::new(move |mut stream| {
            let mut asked = [0; 256];
            let _ = stream.read(&mut asked).unwrap();
            let _ = stream.write_all(&answer);
        })
    }

    fn ask(&self, ms: u64) -> Result<Body, Failure> {
        let time = Duration::from_millis(ms);
        let line = exchange(&self.directory.path().join("sock"), time, Verb::Status)?;
        parse(&line)
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

const PATIENT_MS: u64 = 20_000;

#[test]
fn one_line_goes_out_and_one_comes_back() {
    let fake = Fake::new(|mut stream| {
        let mut asked = Vec::new();
        let mut byte = [0];
        while !asked.ends_with(b"\n") {
            stream.read_exact(&mut byte).unwrap();
            asked.push(byte[0]);
        }
        let request = Request::parse(asked.trim_ascii_end()).unwrap();
        assert_eq!(request.verb, Verb::Status);
        // In pieces, as a slow machine would.
        for piece in [&b"{\"v\":1,\"answ"[..], b"er\":\"taken\"}", b"\n"] {
            stream.write_all(piece).unwrap();
            std::thread::yield_now();
        }
    });
    assert!(matches!(fake.ask(PATIENT_MS), Ok(Body::Taken)));
}

#[test]
fn garbage_is_called_garbage() {
    for answer in ["hello\n", "{}\n", "{\"v\":1,\"answer\":\"poem\"}\n", "\n", "{\"v\":\"1\"}\n", "\u{0}\n"] {
        assert_eq!(Fake::answering(answer).ask(PATIENT_MS).err(), Some(Failure::Garbage), "{answer:?}");
    }
    assert_eq!(Fake::answering([0xff, b'\n']).ask(PATIENT_MS).err(), Some(Failure::Garbage));
}

#[test]
fn another_version_is_told_by_its_number_whatever_else_it_says() {
    let fake = Fake::answering("{\"v\":7,\"answer\":\"telepathy\"}\n");
    assert_eq!(fake.ask(PATIENT_MS).err(), Some(Failure::Version(7)));
}

#[test]
fn half_an_answer_is_none() {
    let expected = if nix::unistd::geteuid().is_root() { Failure::CutOff } else { Failure::NotAllowed };
    assert_eq!(
        Fake::answering("{\"v\":1,\"answer\":\"taken\"}").ask(PATIENT_MS).err(),
        Some(Failure::CutOff)
    );
    assert_eq!(Fake::answering("").ask(PATIENT_MS).err(), Some(expected));
}

#[test]
fn a_supervisor_that_says_nothing_is_busy() {
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let fake = Fake::new(move |stream| {
        let _ = wait.recv();
        drop(stream);
    });
    let outcome = fake.ask(50).err();
    drop(release);
    assert!(matches!(outcome, Some(Failure::Busy(_))), "{outcome:?}");
}

#[test]
fn a_supervisor_that_drips_is_busy_when_the_whole_time_is_over() {
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let fake = Fake::new(move |mut stream| {
        while wait
            .recv_timeout(Duration::from_millis(5))
            .is_err_and(|e| e == std::sync::mpsc::RecvTimeoutError::Timeout)
        {
            let _ = stream.write_all(b" ");
        }
    });
    let outcome = fake.ask(100).err();
    drop(release);
    assert!(matches!(outcome, Some(Failure::Busy(_))), "{outcome:?}");
}

#[test]
fn an_endless_answer_is_cut_at_the_limit() {
    let fake = Fake::new(|mut stream| {
        let flood = vec![b' '; 1 << 20];
        while stream.write_all(&flood).is_ok() {}
    });
    assert_eq!(fake.ask(PATIENT_MS).err(), Some(Failure::TooLong));
}

#[test]
fn nobody_there_is_told_apart_from_nobody_listening() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sock");
    let ask = || exchange(&path, TIME, Verb::Status).err().unwrap();
    let text = |f: Failure| f.into_trouble("status").to_string();
    assert!(text(ask()).contains("No such file"));
    drop(UnixListener::bind(&path).unwrap());
    assert!(text(ask()).contains("nobody listens"));
}

#[test]
fn a_full_queue_is_busy_and_not_a_hang() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sock");
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    nix::sys::socket::bind(fd.as_raw_fd(), &UnixAddr::new(&path).unwrap()).unwrap();
    nix::sys::socket::listen(&fd, nix::sys::socket::Backlog::new(1).unwrap()).unwrap();
    let mut kept = Vec::new();
    while let Ok(stream) = open(&path, TIME, Instant::now()) {
        kept.push(stream);
    }
    let time = Duration::from_millis(60);
    assert_eq!(exchange(&path, time, Verb::Status).err(), Some(Failure::Busy(time)));
}

#[test]
fn every_failure_names_a_remedy_and_exits_with_3() {
    let all = [
        Failure::NotRunning("x".into()),
        Failure::NotAllowed,
        Failure::Busy(TIME),
        Failure::CutOff,
        Failure::TooLong,
        Failure::Garbage,
        Failure::Version(9),
        Failure::Other("x".into()),
    ];
    for failure in all {
        let trouble = failure.into_trouble("status");
        assert!(trouble.hint.is_some() && trouble.exit == Exit::Away, "{trouble}");
    }
}

#[test]
fn the_snapshot_keeps_what_this_version_does_not_know() {
    let line = br#"{"v":1,"answer":"status","zeta":{"b":1,"a":2},"alpha":3}"#;
    assert_eq!(without_envelope(line), r#"{"zeta":{"b":1,"a":2},"alpha":3}"#);
    let shuffled = br#"{"answer":"status","zeta":1,"v":1}"#;
    assert_eq!(without_envelope(shuffled), r#"{"zeta":1}"#);
}
