//! The client against workers that misbehave in every way.

use super::*;
use cvm_protocol::storage::Progress;
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

const PATIENT: Patience = Patience { silence: Duration::from_secs(20), total: None };

struct Fake {
    directory: tempfile::TempDir,
    server: Option<JoinHandle<()>>,
}

impl Fake {
    /// Serves one client with `act`, after it has read the question.
    fn new(act: impl FnOnce(UnixStream) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(directory.path().join("sock")).unwrap();
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            let mut byte = [0];
            while byte != *b"\n" && stream.read_exact(&mut byte).is_ok() {}
            act(stream);
        });
        Self { directory, server: Some(server) }
    }

    fn answering(answer: impl Into<Vec<u8>>) -> Self {
        let answer = answer.into();
        Self::new(move |mut stream| drop(stream.write_all(&answer)))
    }

    fn ask(&self, patience: Patience) -> Client {
        let socket = self.directory.path().join("sock");
        Client::ask_at(&socket, "storage flush", Ask::Flush, patience).unwrap()
    }

    fn trouble(&self) -> Trouble {
        self.ask(PATIENT).answer().unwrap_err()
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

#[test]
fn lines_come_one_by_one_however_they_are_cut() {
    let fake = Fake::new(|mut stream| {
        for piece in [
            &b"{\"answer\":\"pro"[..],
            b"gress\",\"what\":\"a\",\"files_done\":1,\"files_total\":2,\"bytes_done\":3,\"bytes_total\":4}\n{\"ans",
            b"wer\":\"line\",\"text\":\"b\"}\n{\"answer\":\"done\",\"text\":\"c\",\"good\":true}\n",
        ] {
            stream.write_all(piece).unwrap();
            std::thread::yield_now();
        }
    });
    let mut client = fake.ask(PATIENT);
    let progress =
        Progress { what: "a".into(), files_done: 1, files_total: 2, bytes_done: 3, bytes_total: 4 };
    assert_eq!(client.answer().unwrap(), Answer::Progress(progress));
    assert_eq!(client.answer().unwrap(), Answer::Line { text: "b".into() });
    assert_eq!(client.answer().unwrap(), Answer::Done { text: "c".into(), good: true });
    assert_eq!(client.answer().unwrap_err().exit, Exit::Away);
}

#[test]
fn the_question_is_one_line_of_the_protocol() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sock");
    let listener = UnixListener::bind(&path).unwrap();
    let client = Client::ask_at(&path, "storage get", Ask::Get { path: "a\nb".into() }, PATIENT).unwrap();
    let mut text = String::new();
    drop(client);
    listener.accept().unwrap().0.read_to_string(&mut text).unwrap();
    assert_eq!(text, "{\"v\":1,\"verb\":\"get\",\"path\":\"a\\nb\"}\n");
    let long = Ask::Get { path: "x".repeat(QUESTION_MAX) };
    assert_eq!(Client::ask_at(&path, "storage get", long, PATIENT).unwrap_err().exit, Exit::Usage);
}

#[test]
fn a_line_at_the_limit_is_read_and_one_above_it_is_not() {
    let of_length = |length: usize| {
        let frame = "{\"answer\":\"data\",\"base64\":\"\"}".len();
        format!("{{\"answer\":\"data\",\"base64\":\"{}\"}}\n", "A".repeat(length - frame))
    };
    let fake = Fake::answering(of_length(ANSWER_MAX));
    assert!(matches!(fake.ask(PATIENT).answer().unwrap(), Answer::Data { base64 } if base64.len() > 100_000));
    let cause = Fake::answering(of_length(ANSWER_MAX + 1)).trouble().cause;
    assert!(cause.contains("longer than 128 KiB"), "{cause}");
    // Also when its end never comes.
    let endless = Fake::new(|mut stream| {
        let flood = vec![b' '; 1 << 16];
        while stream.write_all(&flood).is_ok() {}
    });
    assert!(endless.trouble().cause.contains("longer than 128 KiB"));
}

#[test]
fn garbage_is_called_garbage() {
    for answer in
        ["hello\n", "{}\n", "{\"answer\":\"poem\"}\n", "\n", "\u{0}\n", "[]\n", "{\"answer\":\"done\"}\n"]
    {
        let cause = Fake::answering(answer).trouble().cause;
        assert_eq!(cause, "the answer is not one of the storage protocol", "{answer:?}");
    }
    assert_eq!(Fake::answering([0xff, b'\n']).trouble().exit, Exit::Away);
}

#[test]
fn what_was_refused_exits_with_4_and_half_an_answer_with_3() {
    let refused = Fake::answering("{\"answer\":\"refused\",\"why\":\"not now\"}\n").trouble();
    assert_eq!(
        (refused.exit, refused.cause.as_str()),
        (Exit::Refused, "the storage worker refused: not now")
    );
    let half = Fake::answering("{\"answer\":\"done\",\"text\":\"\",\"good\":true}").trouble();
    assert!(half.exit == Exit::Away && half.cause.contains("before its last word"), "{half}");
}

#[test]
fn silence_and_work_without_end_are_told_apart() {
    let (release, wait) = std::sync::mpsc::channel::<()>();
    let silent = Fake::new(move |stream| {
        let _ = wait.recv();
        drop(stream);
    });
    let patience = Patience { silence: Duration::from_millis(50), total: None };
    let trouble = silent.ask(patience).answer().unwrap_err();
    drop(release);
    assert!(trouble.exit == Exit::Away && trouble.cause.contains("said nothing for 50 ms"), "{trouble}");

    let busy = Fake::new(|mut stream| {
        while stream.write_all(b"{\"answer\":\"line\",\"text\":\"\"}\n").is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let patience = Patience { total: Some(Duration::from_millis(80)), ..PATIENT };
    let mut client = busy.ask(patience);
    let trouble = std::iter::repeat_with(|| client.answer()).find_map(Result::err).unwrap();
    assert!(trouble.exit == Exit::Bad && trouble.cause.contains("within 80 ms"), "{trouble}");
    drop(client);
}

#[test]
fn nobody_there_is_told_with_where_to_look() {
    let trouble = Client::ask_at(Path::new("/no/such/sock"), "storage status", Ask::Status, PATIENT);
    let trouble = trouble.unwrap_err();
    assert!(trouble.exit == Exit::Away && trouble.cause.contains("no storage worker here"), "{trouble}");
    assert!(trouble.hint.unwrap().contains("cvm status"));
}
