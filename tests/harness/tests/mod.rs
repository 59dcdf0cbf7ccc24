//! What the storage tests stand on does what it says: the store, the proxy, the digest and the
//! judges; and so does the mux-server that the mux client is tested with.

use crate::mux::{self, Door, Ill};
use crate::s3::{Bucket, Response};
use crate::serve::Client;
use crate::tools::{Rclone, python, rclone_crypt_python};
use crate::{Builder, Fault, Garage, Mux, Network, Proxy, Rule, difference, digest, until};
use serde_json::{Value, json};
use std::fs::{self, File, FileTimes};
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

const PATIENCE: Duration = Duration::from_secs(30);
const PASSWORD: &str = "correct horse";
const SALT: &str = "battery staple";

/// A store, a proxy in front of it, and the bucket as seen through the proxy.
fn proxied() -> (Garage, Proxy, Bucket) {
    let garage = Garage::start();
    let proxy = Proxy::start(garage.address());
    let bucket = garage.s3().at(proxy.address()).bucket(garage.bucket());
    (garage, proxy, bucket)
}

/// One that does not wait long for an answer that never comes.
fn impatient(bucket: &Bucket) -> Bucket {
    let mut bucket = bucket.clone();
    bucket.s3.timeout = Duration::from_millis(300);
    bucket
}

fn put(bucket: &Bucket, key: &str, bytes: &[u8], condition: &[(&str, &str)]) -> u16 {
    bucket.send("PUT", key, condition, bytes).expect("an answer").status
}

fn says(response: &Response, text: &str) -> bool {
    String::from_utf8_lossy(&response.body).contains(text)
}

// --- The store -------------------------------------------------------------------------------

#[test]
fn what_is_put_is_got_and_listed_through_the_proxy() {
    let (garage, proxy, through) = proxied();
    let big = vec![7; 3_000_000];
    for (key, bytes) in [("a/one", &b"1"[..]), ("a/two words + ä%", b""), ("b/big", &big)] {
        through.put_raw(key, bytes);
        assert_eq!(garage.get_raw(key).as_deref(), Some(bytes));
        assert_eq!(through.get_raw(key).as_deref(), Some(bytes));
    }
    assert_eq!(through.objects("a/"), [("a/one".into(), 1), ("a/two words + ä%".into(), 0)]);
    assert_eq!(garage.objects("").len(), 3);
    let stored: Vec<_> = garage.all_bytes().collect();
    assert_eq!(stored.first(), Some(&("a/one".into(), b"1".to_vec())));
    assert_eq!(stored.get(2).map(|(_, bytes)| bytes.len()), Some(big.len()));
    through.delete_raw("a/one");
    assert_eq!(garage.get_raw("a/one"), None);
    // A HEAD comes before each put_raw.
    assert_eq!((proxy.requests("PUT"), proxy.requests("HEAD"), proxy.requests("DELETE")), (3, 3, 1));
    assert_eq!(proxy.bytes().0, 3_000_001);
    assert!(proxy.bytes().1 > 3_000_001);
}

#[test]
fn a_listing_of_many_pages_is_whole() {
    let garage = Garage::start();
    let wanted: Vec<_> = (0..1100).map(|n| (format!("{n:04}"), 1)).collect();
    std::thread::scope(|scope| {
        for part in wanted.chunks(275) {
            let garage = &garage;
            scope.spawn(move || part.iter().for_each(|(key, _)| garage.put_raw(key, b"x")));
        }
    });
    assert_eq!(garage.objects(""), wanted);
}

#[test]
fn an_object_is_rolled_back_with_what_is_stored_beside_it() {
    let garage = Garage::start();
    garage.send("PUT", "key", &[("x-amz-meta-mtime", "1.5")], b"old").expect("an answer");
    let old = garage.object("key").expect("it is there");
    assert!(old.metadata.contains(&("x-amz-meta-mtime".into(), "1.5".into())), "{old:?}");
    garage.put_raw("key", b"tampered");
    let tampered = garage.object("key").expect("it is there");
    assert_eq!((tampered.bytes.as_slice(), &tampered.metadata), (&b"tampered"[..], &old.metadata));
    garage.put_object("key", &old);
    assert_eq!(garage.object("key"), Some(old));
}

#[test]
fn the_store_keeps_its_data_through_a_kill_and_its_address() {
    let mut garage = Garage::start();
    garage.put_raw("small", b"kept");
    garage.put_raw("large", &vec![9; 2_000_000]);
    let (before, pid) = (garage.address(), garage.pid().expect("it runs"));
    garage.stop();
    assert!(garage.send("GET", "small", &[], &[]).is_err());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    garage.restart();
    assert_eq!(garage.address(), before);
    assert_eq!(garage.get_raw("small").as_deref(), Some(&b"kept"[..]));
    assert_eq!(garage.get_raw("large").map(|b| b.len()), Some(2_000_000));
}

#[test]
fn a_permission_that_is_taken_away_is_refused_until_it_is_given_back() {
    let mut garage = Garage::start();
    garage.put_raw("key", b"1");
    let status = |garage: &Garage, method| garage.send(method, "key", &[], b"").expect("an answer").status;
    garage.deny_writing();
    assert_eq!((status(&garage, "GET"), status(&garage, "PUT")), (200, 403));
    garage.deny();
    assert_eq!((status(&garage, "GET"), status(&garage, "PUT")), (403, 403));
    garage.restart();
    assert_eq!(status(&garage, "GET"), 403);
    garage.allow();
    assert_eq!((status(&garage, "GET"), status(&garage, "PUT")), (200, 200));
}

#[test]
fn buckets_and_stores_are_apart() {
    let (one, other) = (Garage::start(), Garage::start());
    let second = one.new_bucket("second");
    one.put_raw("key", b"first");
    second.put_raw("key", b"second");
    assert_eq!(one.get_raw("key").as_deref(), Some(&b"first"[..]));
    assert_eq!(second.get_raw("key").as_deref(), Some(&b"second"[..]));
    assert_eq!(other.get_raw("key"), None);
    let stranger = other.s3().at(one.address()).bucket(one.bucket());
    assert_eq!(stranger.send("GET", "key", &[], &[]).expect("an answer").status, 403);
}

#[test]
fn a_store_ends_with_the_thread_that_owns_it_and_not_before() {
    let garage = std::thread::spawn(Garage::start).join().expect("it starts");
    // Whoever started it is gone: it serves all the same.
    garage.put_raw("key", b"1");
    let pid = garage.pid().expect("it runs");
    drop(garage);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn a_store_does_not_outlive_a_test_that_is_killed() {
    if std::env::var_os("CVM_TO_BE_KILLED").is_some() {
        let garage = Garage::start();
        println!("\nstore {} in {}", garage.pid().expect("it runs"), garage.directory().display());
        loop {
            std::thread::park();
        }
    }
    let mut killed = Command::new(std::env::current_exe().expect("a running program has a path"))
        .args(["--exact", "a_store_does_not_outlive_a_test_that_is_killed", "--nocapture"])
        .env("CVM_TO_BE_KILLED", "1")
        .stdout(Stdio::piped())
        .spawn()
        .expect("this program starts");
    let lines = BufReader::new(killed.stdout.take().expect("stdout is piped")).lines();
    let line = lines.map_while(Result::ok).find(|l| l.starts_with("store ")).expect("it says its store");
    let words: Vec<_> = line.split(' ').collect();
    let (process, directory) = (format!("/proc/{}", words[1]), words[3]);
    assert!(Path::new(&process).exists());
    killed.kill().expect("it is our child");
    let _ = killed.wait();
    until("the store is gone", PATIENCE, || (!Path::new(&process).exists()).then_some(()));
    fs::remove_dir_all(directory).expect("nobody else removes it");
}

// --- The proxy -------------------------------------------------------------------------------

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

#[test]
fn a_machine_reaches_the_store_in_a_network_that_outlives_it() {
    let garage = Garage::start();
    let network = Network::new();
    let proxy = Proxy::start_in(&network, garage.address());
    let fetch = |_: Builder| {
        let url = format!("{}/state/key", proxy.endpoint());
        Builder::new().network(&network).command(&["/usr/bin/curl", "-s", "-w", "got %{http_code}\\n", &url])
    };
    let mut machine = fetch(Builder::new()).start();
    machine.line("got 403");
    assert_eq!(machine.wait(), 0);
    let machine = machine.again(fetch);
    machine.line("got 403");
    assert_eq!(proxy.requests("GET"), 2);
    // Nobody outside sees it.
    assert!(std::net::TcpStream::connect(proxy.address()).is_err());
}

// --- The digest ------------------------------------------------------------------------------

fn tree() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let at = |name: &str| dir.path().join(name);
    fs::create_dir_all(at("sub/empty")).expect("a directory");
    fs::create_dir(at(".cvm")).expect("a directory");
    fs::write(at("sub/file"), "content").expect("a file");
    fs::write(at("other"), "content").expect("a file");
    fs::hard_link(at("other"), at("sub/linked")).expect("a hard link");
    symlink("sub/file", at("link")).expect("a link");
    for path in ["sub/empty", ".cvm", "sub/file", "other", "sub"] {
        touch(&at(path), 1_000_000_000);
    }
    dir
}

fn touch(path: &Path, nanoseconds: u64) {
    let time =
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000) + Duration::from_nanos(nanoseconds);
    let file = File::open(path).expect("it is there");
    file.set_times(FileTimes::new().set_modified(time)).expect("its time can be set");
}

#[test]
fn the_digest_of_the_same_tree_is_the_same() {
    let dir = tree();
    let before = digest(dir.path(), &[".cvm"]);
    fs::write(dir.path().join(".cvm/private"), "what is excluded may change").expect("a file");
    let after = digest(dir.path(), &[".cvm"]);
    assert_eq!(difference(&before, &after), "");
    assert_eq!(before, after);
    assert_eq!(before.len(), 7, "{before:#?}");
    assert!(digest(dir.path(), &[]).len() > before.len());
}

#[test]
fn the_digest_notices_every_kind_of_difference() {
    type Change = fn(&Path);
    let changes: [(&str, Change); 13] = [
        ("content of the same size", |d| {
            fs::write(d.join("sub/file"), "CONTENT").expect("a file");
            touch(&d.join("sub/file"), 1_000_000_000);
        }),
        ("a nanosecond", |d| touch(&d.join("sub/file"), 1_000_000_001)),
        ("the time of a directory", |d| touch(&d.join("sub/empty"), 0)),
        ("the mode", |d| {
            fs::set_permissions(d.join("sub/file"), PermissionsExt::from_mode(0o4755)).expect("a mode");
        }),
        ("the mode of the top", |d| {
            fs::set_permissions(d, PermissionsExt::from_mode(0o711)).expect("a mode");
        }),
        // Users of the agent's containers: all others look like the agent.
        ("the owner", |d| chown(d.join("sub/file"), Some(201_234), None).expect("an owner")),
        ("the group", |d| chown(d.join("sub"), None, Some(201_234)).expect("a group")),
        ("a file more", |d| fs::write(d.join("sub/empty/more"), "").expect("a file")),
        ("a file less", |d| fs::remove_file(d.join("sub/file")).expect("a file")),
        ("another target", |d| {
            fs::remove_file(d.join("link")).expect("a link");
            symlink("other", d.join("link")).expect("a link");
        }),
        ("a copy in place of a link", |d| {
            fs::remove_file(d.join("link")).expect("a link");
            fs::copy(d.join("sub/file"), d.join("link")).expect("a copy");
        }),
        ("a copy in place of a hard link", |d| {
            fs::remove_file(d.join("sub/linked")).expect("a file");
            fs::copy(d.join("other"), d.join("sub/linked")).expect("a copy");
            touch(&d.join("sub/linked"), 1_000_000_000);
            touch(&d.join("sub"), 1_000_000_000);
        }),
        ("a pipe in place of a file", |d| {
            fs::remove_file(d.join("sub/file")).expect("a file");
            nix::unistd::mkfifo(&d.join("sub/file"), nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
        }),
    ];
    for (what, change) in changes {
        let dir = tree();
        let before = digest(dir.path(), &[".cvm"]);
        change(dir.path());
        let difference = difference(&before, &digest(dir.path(), &[".cvm"]));
        assert_ne!(difference, "", "{what}");
    }
}

// --- The judges ------------------------------------------------------------------------------

#[test]
fn what_stock_rclone_encrypts_an_independent_reader_decrypts() {
    let (garage, proxy, through) = proxied();
    let rclone = Rclone::new(&through, "openclaw-data", PASSWORD, SALT);
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir_all(dir.path().join("deep/er")).expect("a directory");
    let big: Vec<u8> = (0..6_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let files = [("deep/er/näme", &b"the plaintext"[..]), ("empty", b""), ("big", &big)];
    for (name, content) in files {
        fs::write(dir.path().join(name), content).expect("a file");
    }
    rclone.ok(&["copy", &dir.path().display().to_string(), "crypt:"]);
    // Connections are kept, and a body that waits for 100 gets through.
    assert!(
        proxy.connections() < proxy.log().len(),
        "{} connections: {:#?}",
        proxy.connections(),
        proxy.log()
    );
    let stored: Vec<_> = garage.all_bytes().collect();
    assert_eq!(stored.len(), 3);
    for (key, bytes) in &stored {
        let name = key.strip_prefix("openclaw-data/").expect("everything lies below the prefix");
        let (clear, content) = rclone_crypt_python(name, bytes, PASSWORD, SALT).expect("it can be read");
        let wanted = files.iter().find(|(name, _)| *name == clear);
        assert_eq!(wanted.map(|(_, content)| content.len()), Some(content.len()), "{clear}");
        assert!(wanted.is_some_and(|(_, wanted)| *wanted == content), "{clear}");
        assert!(!bytes.windows(13).any(|w| w == b"the plaintext"));
        assert!(rclone_crypt_python(name, bytes, PASSWORD, "another").is_err());
        if !content.is_empty() {
            let mut changed = bytes.clone();
            *changed.last_mut().expect("it is not empty") ^= 1;
            assert!(rclone_crypt_python(name, &changed, PASSWORD, SALT).is_err());
        }
    }
    assert_eq!(rclone.ok(&["cat", "crypt:deep/er/näme"]), b"the plaintext");
}

#[test]
fn stock_rclone_survives_a_provider_that_sometimes_says_no() {
    let (garage, proxy, through) = proxied();
    let rclone = Rclone::new(&through, "p", PASSWORD, SALT);
    let dir = tempfile::tempdir().expect("a temporary directory");
    for n in 0..30 {
        fs::write(dir.path().join(format!("file {n}")), format!("{n}")).expect("a file");
    }
    proxy.add(Rule::new(Fault::Status(503)).every(5));
    proxy.add(Rule::new(Fault::NoResponse).every(7));
    // More retries than one file can need while the other requests take their share of the faults.
    rclone.ok(&["--low-level-retries", "60", "copy", &dir.path().display().to_string(), "crypt:"]);
    assert_eq!(garage.objects("p/").len(), 30);
    assert!(proxy.log().iter().any(|e| e.status == Some(503)));
}

// --- The mux-server --------------------------------------------------------------------------

const TENANT: &str = "an-instance";

/// A mux-server, and what talks to it as a client would.
fn mux_server() -> (Mux, Client) {
    let network = Network::new();
    let mux = Mux::start(&network, TENANT);
    let client = Client::new(&network, (std::net::Ipv4Addr::LOCALHOST, mux::PORT).into(), PATIENCE);
    (mux, client)
}

fn register(client: &mut Client) -> String {
    let bearer = format!("Bearer {}", mux::REGISTER_KEY);
    let body =
        json!({"openclawId": TENANT, "inboundUrl": "http://x/v1/mux/inbound", "inboundTimeoutMs": 15000});
    let answer = client
        .post(
            "/v1/instances/register",
            &[("Authorization", &bearer), ("Connection", "close")],
            body.to_string().as_bytes(),
        )
        .expect("an answer");
    let answer: Value = serde_json::from_slice(&answer.body).expect("JSON");
    format!("Bearer {}", answer["runtimeToken"].as_str().expect("a token"))
}

fn send(
    client: &mut Client,
    bearer: &str,
    key: &str,
    change: impl FnOnce(&mut Value),
) -> std::io::Result<u16> {
    let mut body = json!({
        "requestId": key, "op": "send", "channel": "telegram", "sessionKey": "s", "accountId": "default",
        "to": "telegram:1", "text": "hi", "openclawId": TENANT,
        "raw": {"telegram": {"method": "sendMessage", "body": {"chat_id": "1", "text": "hi"}}},
    });
    change(&mut body);
    let mut headers = vec![("Authorization", bearer), ("X-OpenClaw-Id", TENANT), ("Idempotency-Key", key)];
    // A connection that is kept is tried again by itself.
    headers.push(("Connection", "close"));
    client.post("/v1/mux/outbound/send", &headers, body.to_string().as_bytes()).map(|answer| answer.status)
}

#[test]
fn the_mux_server_takes_a_request_once_and_keeps_what_it_took_through_a_power_cut() {
    let (mux, mut client) = mux_server();
    let bearer = register(&mut client);
    assert_eq!(send(&mut client, &bearer, "k1", |_| {}).expect("an answer"), 403, "there is no route");
    mux.bind("telegram", "s");
    mux.ill(Door::Send, Ill::Lost, 1);
    mux.ill(Door::Send, Ill::Says(500), 1);
    assert!(send(&mut client, &bearer, "k1", |_| {}).is_err(), "done, and nobody is told");
    assert_eq!(send(&mut client, &bearer, "k1", |_| {}).expect("an answer"), 500);
    mux.stop();
    assert!(send(&mut client, &bearer, "k1", |_| {}).is_err());
    mux.resume();
    assert_eq!(send(&mut client, &bearer, "k1", |_| {}).expect("an answer"), 200);
    assert_eq!(mux.texts("s"), ["hi"]);
    assert_eq!(send(&mut client, &bearer, "k1", |b| b["threadId"] = json!("2")).expect("an answer"), 409);
    assert_eq!(mux.conflicts().len(), 1);
    mux.revoke();
    assert_eq!(send(&mut client, &bearer, "k2", |_| {}).expect("an answer"), 401);
    assert_eq!(mux.violations(), Vec::<String>::new());
}

#[test]
fn the_mux_server_notes_what_the_contract_does_not_allow() {
    type Breach = (&'static str, fn(&mut Value));
    let breaches: [Breach; 8] = [
        ("another key", |b| b["requestId"] = json!("k2")),
        ("no operation", |b| b["op"] = Value::Null),
        ("another tenant", |b| b["openclawId"] = json!("me")),
        ("no recipient", |b| b["to"] = json!("")),
        ("an envelope of another channel", |b| b["channel"] = json!("discord")),
        ("another method", |b| b["raw"]["telegram"]["method"] = json!("sendPhoto")),
        ("no chat", |b| b["raw"]["telegram"]["body"]["chat_id"] = Value::Null),
        ("a text that is too long", |b| b["raw"]["telegram"]["body"]["text"] = json!("🦞".repeat(2049))),
    ];
    for (what, breach) in breaches {
        let (mux, mut client) = mux_server();
        let bearer = register(&mut client);
        mux.bind("telegram", "s");
        let _ = send(&mut client, &bearer, "k1", breach);
        assert!(!mux.violations().is_empty(), "{what}");
        let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(mux)));
        assert!(dropped.is_err(), "{what} fails the test");
    }
}

#[test]
fn the_mux_servers_tokens_are_what_others_understand_by_them() {
    const PROGRAM: &str = "
import base64, hashlib, json, sys
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
decode = lambda text: base64.urlsafe_b64decode(text + '=' * (-len(text) % 4))
head, claims, signature = sys.argv[1].split('.')
key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(sys.argv[2]))
key.verify(decode(signature), f'{head}.{claims}'.encode())
spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
print(json.loads(decode(head))['kid'] == hashlib.sha256(spki).hexdigest()[:16], json.loads(decode(claims))['scope'])
";
    let (mux, _) = mux_server();
    let hex = mux.public_key().iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
    assert_eq!(python(PROGRAM, &[&mux.token(|_, _| {}), &hex]), "True mux:inbound");
}
