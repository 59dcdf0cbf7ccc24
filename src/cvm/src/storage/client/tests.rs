//! The client against workers that misbehave in every way.

use super::*;
use crate::connection::tests::FakeServer;
use cvm_protocol::storage::Progress;
use std::io::Write as _;

const PATIENT: Patience = Patience { silence: Duration::from_secs(20), total: None };

fn ask(worker: &FakeServer, patience: Patience) -> Client {
    Client::ask_at(&worker.socket(), "storage flush", Ask::Flush, patience).unwrap()
}

fn failure_of(worker: &FakeServer) -> Failure {
    ask(worker, PATIENT).answer().unwrap_err()
}

#[test]
fn lines_come_one_by_one_however_they_are_cut() {
    let worker = FakeServer::new(|_, mut stream| {
        for piece in [
            &b"{\"answer\":\"pro"[..],
            b"gress\",\"what\":\"a\",\"files_done\":1,\"files_total\":2,\"bytes_done\":3,\"bytes_total\":4}\n{\"ans",
            b"wer\":\"line\",\"text\":\"b\"}\n{\"answer\":\"done\",\"text\":\"c\",\"good\":true}\n",
        ] {
            stream.write_all(piece).unwrap();
            std::thread::yield_now();
        }
    });
    let mut client = ask(&worker, PATIENT);
    let progress =
        Progress { what: "a".into(), files_done: 1, files_total: 2, bytes_done: 3, bytes_total: 4 };
    assert_eq!(client.answer().unwrap(), Answer::Progress(progress));
    assert_eq!(client.answer().unwrap(), Answer::Line { text: "b".into() });
    assert_eq!(client.answer().unwrap(), Answer::Done { text: "c".into(), good: true });
    assert_eq!(client.answer().unwrap_err().exit, Exit::Unreachable);
}

#[test]
fn the_question_is_one_line_of_the_protocol() {
    let worker = FakeServer::new(|question, _| {
        assert_eq!(question, "{\"v\":1,\"verb\":\"get\",\"path\":\"a\\nb\"}\n");
    });
    let get = |path: String| Client::ask_at(&worker.socket(), "storage get", Ask::Get { path }, PATIENT);
    drop(get("a\nb".into()).unwrap());
    assert_eq!(get("x".repeat(QUESTION_MAX)).unwrap_err().exit, Exit::Usage);
}

#[test]
fn a_line_at_the_limit_is_read_and_one_above_it_is_not() {
    let of_length = |length: usize| {
        let frame = "{\"answer\":\"data\",\"base64\":\"\"}".len();
        format!("{{\"answer\":\"data\",\"base64\":\"{}\"}}\n", "A".repeat(length - frame))
    };
    let worker = FakeServer::answering(of_length(ANSWER_MAX));
    let answer = ask(&worker, PATIENT).answer().unwrap();
    assert!(matches!(answer, Answer::Data { base64 } if base64.len() > 100_000));
    let cause = failure_of(&FakeServer::answering(of_length(ANSWER_MAX + 1))).cause;
    assert!(cause.contains("longer than 128 KiB"), "{cause}");
    // Also when its end never comes.
    assert!(failure_of(&FakeServer::endless()).cause.contains("longer than 128 KiB"));
}

#[test]
fn garbage_is_called_garbage() {
    for answer in
        ["hello\n", "{}\n", "{\"answer\":\"poem\"}\n", "\n", "\u{0}\n", "[]\n", "{\"answer\":\"done\"}\n"]
    {
        let cause = failure_of(&FakeServer::answering(answer)).cause;
        assert_eq!(cause, "the answer is not one of the storage protocol", "{answer:?}");
    }
    assert_eq!(failure_of(&FakeServer::answering([0xff, b'\n'])).exit, Exit::Unreachable);
}

#[test]
fn a_refusal_exits_with_4_and_half_an_answer_with_3() {
    let refused = failure_of(&FakeServer::answering("{\"answer\":\"refused\",\"why\":\"not now\"}\n"));
    assert_eq!(
        (refused.exit, refused.cause.as_str()),
        (Exit::Refused, "the storage worker refused: not now")
    );
    let half = failure_of(&FakeServer::answering("{\"answer\":\"done\",\"text\":\"\",\"good\":true}"));
    assert!(half.exit == Exit::Unreachable && half.cause.contains("before its last line"), "{half}");
}

#[test]
fn silence_and_work_without_end_are_told_apart() {
    let (release, silent) = FakeServer::silent();
    let patience = Patience { silence: Duration::from_millis(50), total: None };
    let failure = ask(&silent, patience).answer().unwrap_err();
    drop(release);
    let is_silence = failure.cause.contains("sent nothing for 50 ms");
    assert!(failure.exit == Exit::Unreachable && is_silence, "{failure}");

    let busy = FakeServer::new(|_, mut stream| {
        while stream.write_all(b"{\"answer\":\"line\",\"text\":\"\"}\n").is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let patience = Patience { total: Some(Duration::from_millis(80)), ..PATIENT };
    let mut client = ask(&busy, patience);
    let failure = std::iter::repeat_with(|| client.answer()).find_map(Result::err).unwrap();
    assert!(failure.exit == Exit::Bad && failure.cause.contains("within 80 ms"), "{failure}");
    drop(client);
}

#[test]
fn the_failure_where_there_is_no_worker_says_where_to_look() {
    let failure = Client::ask_at(Path::new("/no/such/sock"), "storage status", Ask::Status, PATIENT);
    let failure = failure.unwrap_err();
    assert!(
        failure.exit == Exit::Unreachable && failure.cause.contains("no storage worker here"),
        "{failure}"
    );
    assert!(failure.hint.unwrap().contains("cvm status"));
}
