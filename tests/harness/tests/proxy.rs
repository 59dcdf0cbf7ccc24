//! The network fails as it is told to.

use super::fixtures::{impatient, proxied, put, says};
use crate::machine::PATIENCE;
use crate::{Fault, Rule, until};
use std::fs;
use std::io::ErrorKind;
use std::process::Command;
use std::time::{Duration, Instant};

#[test]
fn latency_is_added_to_each_request() {
    let (_garage, proxy, bucket) = proxied();
    proxy.latency(Duration::from_millis(150));
    let start = Instant::now();
    put(&bucket, "key", b"1", &[]);
    put(&bucket, "key", b"1", &[]);
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_eq!(proxy.log()[0].fault, None);
}

#[test]
fn a_refused_connection_is_refused_and_later_accepted_at_the_same_address() {
    let (_garage, proxy, bucket) = proxied();
    put(&bucket, "key", b"1", &[]);
    proxy.refuse(true);
    let error = bucket.send("GET", "key", &[], &[]).expect_err("nobody listens");
    assert_eq!(error.kind(), ErrorKind::ConnectionRefused);
    proxy.heal();
    assert_eq!(bucket.get_raw("key").as_deref(), Some(&b"1"[..]));
}

#[test]
fn a_reset_is_a_reset() {
    let (garage, proxy, bucket) = proxied();
    proxy.fault(Fault::Reset);
    for (method, body) in [("GET", &b""[..]), ("PUT", &vec![1; 100_000])] {
        let error = bucket.send(method, "key", &[], body).expect_err("the connection is reset");
        assert!(matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe), "{error:?}");
    }
    assert_eq!(garage.get_raw("key"), None);
    assert!(proxy.log().iter().all(|e| e.status.is_none() && e.fault == Some(Fault::Reset)));
}

#[test]
fn a_request_hangs_until_the_proxy_is_healed() {
    let (_garage, proxy, bucket) = proxied();
    proxy.fault(Fault::Hang);
    let error = impatient(&bucket).send("GET", "key", &[], &[]).expect_err("no answer");
    assert!(matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut), "{error:?}");
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| bucket.send("GET", "key", &[], &[]));
        until("the second request hangs", PATIENCE, || (proxy.requests("GET") == 2).then_some(()));
        proxy.heal();
        waits.join().expect("no panic").expect_err("a hung request is not answered");
    });
    put(&bucket, "key", b"1", &[]);
}

#[test]
fn a_status_is_answered_in_the_words_of_s3() {
    let (garage, proxy, bucket) = proxied();
    for (status, code) in [(403, "AccessDenied"), (429, "TooManyRequests"), (503, "SlowDown")] {
        proxy.heal();
        proxy.fault(Fault::Status(status));
        let answer = bucket.send("PUT", "key", &[], &vec![1; 1_000_000]).expect("an answer");
        assert_eq!(answer.status, status);
        assert!(says(&answer, &format!("<Code>{code}</Code>")), "{answer:?}");
        assert_eq!(bucket.send("HEAD", "key", &[], &[]).expect("an answer").status, status);
    }
    assert_eq!(garage.objects(""), []);
}

#[test]
fn a_fault_happens_to_the_requests_it_is_meant_for() {
    let (garage, proxy, bucket) = proxied();
    proxy.add(Rule::new(Fault::Status(503)).method("PUT").path("/state/x").every(3).times(2));
    let statuses: Vec<_> = (0..12).map(|n| put(&bucket, &format!("x{n}"), b"1", &[])).collect();
    assert_eq!(statuses, [200, 200, 503, 200, 200, 503, 200, 200, 200, 200, 200, 200]);
    assert_eq!(put(&bucket, "y", b"1", &[]), 200);
    assert_eq!(garage.objects("").len(), 11);
    let share = |seed| {
        proxy.heal();
        proxy.add(Rule::new(Fault::Status(503)).some(300, seed));
        (0..40).map(|_| bucket.send("GET", "y", &[], &[]).expect("an answer").status).collect::<Vec<_>>()
    };
    let first = share(1);
    assert_eq!(share(1), first);
    assert_ne!(share(2), first);
    assert!((2..=24).contains(&first.iter().filter(|s| **s == 503).count()), "{first:?}");
}

#[test]
fn a_response_that_is_cut_is_not_taken_for_a_whole_one() {
    let (_garage, proxy, bucket) = proxied();
    put(&bucket, "key", &vec![1; 100_000], &[]);
    proxy.clear_log();
    proxy.fault(Fault::HalfResponse);
    let error = bucket.send("GET", "key", &[], &[]).expect_err("half is missing");
    assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
    assert_eq!((proxy.log()[0].down, proxy.log()[0].status), (50_000, Some(200)));
}

#[test]
fn a_request_that_is_cut_leaves_what_was_there() {
    let (garage, proxy, bucket) = proxied();
    put(&bucket, "key", b"old", &[]);
    proxy.clear_log();
    proxy.fault(Fault::HalfRequest);
    bucket.send("PUT", "key", &[], &vec![1; 4_000_000]).expect_err("no answer");
    assert_eq!(proxy.log()[0].up, 2_000_000);
    assert_eq!(garage.get_raw("key").as_deref(), Some(&b"old"[..]));
}

#[test]
fn a_lost_answer_is_an_error_for_who_asked_and_done_in_the_store() {
    let (garage, proxy, bucket) = proxied();
    proxy.fault(Fault::NoResponse);
    bucket.send("PUT", "key", &[], b"done").expect_err("no answer");
    assert_eq!(garage.get_raw("key").as_deref(), Some(&b"done"[..]));
}

#[test]
fn a_condition_is_enforced_for_one_writer_among_many() {
    let (garage, proxy, bucket) = proxied();
    let absent = [("if-none-match", "*")];
    // By itself the store ignores it; if it ever learns, conditional_puts has no reason to be.
    assert_eq!([put(&bucket, "plain", b"1", &absent), put(&bucket, "plain", b"2", &absent)], [200, 200]);
    proxy.conditional_puts(Some(garage.s3()));
    // What came by another way counts too.
    garage.put_raw("there", b"1");
    assert_eq!(put(&bucket, "there", b"2", &absent), 412);
    let statuses = std::thread::scope(|scope| {
        let writers: Vec<_> = (0..8)
            .map(|n| (n, &bucket))
            .map(|(n, bucket)| scope.spawn(move || put(bucket, "won by one", &[n], &absent)))
            .collect();
        writers.into_iter().map(|w| w.join().expect("no panic")).collect::<Vec<_>>()
    });
    assert_eq!(statuses.iter().filter(|s| **s == 200).count(), 1, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|s| **s == 412).count(), 7, "{statuses:?}");
    // Compare and swap.
    let tag = format!("\"{}\"", bucket.etag("there").expect("it is there"));
    assert_eq!(put(&bucket, "there", b"3", &[("if-match", &tag)]), 200);
    assert_eq!(put(&bucket, "there", b"4", &[("if-match", &tag)]), 412);
    assert_eq!(put(&bucket, "nowhere", b"1", &[("if-match", &tag)]), 404);
    assert_eq!(garage.get_raw("there").as_deref(), Some(&b"3"[..]));
    proxy.conditional_puts(None);
    assert_eq!(put(&bucket, "there", b"5", &absent), 200);
}

#[test]
fn bodies_in_chunks_and_bodies_that_wait_to_be_asked_for_pass() {
    let (_garage, proxy, _) = proxied();
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (file, url) = (dir.path().join("file"), format!("{}/state/key", proxy.endpoint()));
    fs::write(&file, vec![1; 300_000]).expect("a file");
    let upload = |header: &str| {
        let mut curl = Command::new("curl");
        // Twice on one connection; not signed, so that the store says no once it has the head.
        for next in [false, true] {
            curl.args(next.then_some("--next")).args([
                "-sS",
                "-o",
                "/dev/null",
                "-w",
                "%{http_code} ",
                "-H",
                header,
            ]);
            curl.arg("-T").arg(&file).arg(&url);
        }
        let output = curl.output().expect("curl runs");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "403 403 ", "{header}: {output:?}");
    };
    upload("Expect: 100-continue");
    assert_eq!((proxy.log()[0].up, proxy.log()[1].up), (300_000, 300_000));
    proxy.clear_log();
    upload("Transfer-Encoding: chunked");
    let passed = proxy.log()[1].up;
    assert!((300_000..301_000).contains(&passed), "{passed}");
    proxy.fault(Fault::Status(403));
    upload("Expect: 100-continue");
    upload("Transfer-Encoding: chunked");
}
