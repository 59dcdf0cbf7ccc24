//! The mux client and the storage worker: who may ask what is in the bucket, and as whom.

use cvm_harness::machine::PATIENCE;
use cvm_harness::{Cloud, Machine, until};
use cvm_protocol::accounts::MUX_UID;
use cvm_protocol::paths;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

fn ask(machine: &Machine, question: &str) -> serde_json::Value {
    let mut stream =
        UnixStream::connect(machine.path(paths::REPLICATION_SOCKET)).expect("the socket is there");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout can be set");
    writeln!(stream, "{question}").expect("the worker reads");
    let last = BufReader::new(stream).lines().map_while(Result::ok).last().expect("the worker answers");
    serde_json::from_str(&last).expect("an answer is JSON")
}

#[test]
fn the_queue_is_in_the_bucket_when_the_worker_says_so() {
    let cloud = Cloud::new();
    let machine = cloud
        .machine()
        // Nobody is there: the queue is made all the same.
        .environment("MUX_BASE_URL", "http://127.0.0.1:9")
        .environment("MUX_REGISTER_KEY", "register")
        .environment("MUX_INBOUND_URL", "https://me.example.org/v1/mux/inbound")
        .start();
    machine.service_in("mux", &["ready"]);
    let queue = machine.path(paths::MUX_STATE).join("queue.sqlite");
    until("the queue is made", PATIENCE, || queue.exists().then_some(()));

    let committed = r#"{"v":1,"verb":"committed","path":"openclaw-mux/queue.sqlite"}"#;
    assert_eq!(ask(&machine, committed)["answer"], "done");
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw-mux"]);
    assert!(listed.contains("openclaw-mux/queue.sqlite"), "{listed}");
    assert_eq!(ask(&machine, r#"{"v":1,"verb":"flush"}"#)["answer"], "refused");

    // Neither the agent nor anybody else: the directory, the socket and the process are the client's.
    let about = |path: &str| std::fs::symlink_metadata(machine.path(path)).expect("it is there");
    assert_eq!((about(paths::MUX_STATE).uid(), about(paths::MUX_STATE).mode() & 0o777), (MUX_UID, 0o700));
    let socket = about(paths::REPLICATION_SOCKET);
    assert_eq!((socket.uid(), socket.mode() & 0o777), (MUX_UID, 0o600));
    let process = machine.find("cvm-mux").expect("it runs");
    let status = machine.read(&format!("/proc/{}/status", process.pid));
    assert!(status.contains(&format!("Uid:\t{MUX_UID}\t{MUX_UID}\t{MUX_UID}\t{MUX_UID}")), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");

    until("status says why there is no registration", PATIENCE, || {
        let why = machine.fact("mux", "not registered")?;
        why["text"].as_str().filter(|e| e.contains("does not answer")).map(drop)
    });
}
