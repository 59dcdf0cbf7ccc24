//! The S3 server keeps what it is given, and goes with its test.

use super::fixtures::proxied;
use crate::machine::PATIENCE;
use crate::{Builder, Garage, Network, Proxy, until};
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

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
    let chapter = module_path!().split_once("::").expect("a chapter of the harness").1;
    let this_test = format!("{chapter}::a_store_does_not_outlive_a_test_that_is_killed");
    let mut killed = Command::new(std::env::current_exe().expect("a running program has a path"))
        .args(["--exact", &this_test, "--nocapture"])
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

#[test]
fn a_machine_reaches_the_store_in_a_network_that_outlives_it() {
    if cvm_needs::lacks_root() {
        return;
    }
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
