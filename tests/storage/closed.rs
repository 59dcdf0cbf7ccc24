//! What the storage does not start on: it changes nothing, and says why and what to do.

use crate::fixtures::bucket::all;
use crate::fixtures::machines::{gateway_runs, gateway_stays_down, history, storage_says};
use cvm_harness::machine::{CRYPT_PASSWORD, CRYPT_SALT, PATIENCE};
use cvm_harness::{Builder, Cloud, Fault, Machine, until};

/// Starts nothing, changes nothing, and says why and what to do.
#[track_caller]
fn starts_nothing(cloud: &Cloud, builder: Builder, phase: &str, words: &[&str]) -> Machine {
    let before = all(&cloud.garage);
    let machine = builder.start();
    storage_says(&machine, phase, words);
    gateway_stays_down(&machine);
    for word in words {
        machine.line(word);
    }
    assert!(before == all(&cloud.garage), "something in the bucket has changed");
    machine
}

#[test]
fn what_cannot_get_better_by_itself_is_refused_with_its_remedy() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let wrong = |name: &str, value: &str| cloud.machine().environment(name, value);
    drop(starts_nothing(
        &cloud,
        wrong("MASTER_KEY", "KqULR8kjQt3aHcy3dOUOSX11ljLbLDqLhrManXN/gVE="),
        "refused",
        &["none of their names decrypts", "use the MASTER_KEY"],
    ));
    // Right names and contents, and a manifest that is somebody else's.
    let override_ = |b: Builder| {
        b.environment("RCLONE_CRYPT_PASSWORD", &cvm_harness::tools::obscure(CRYPT_PASSWORD))
            .environment("RCLONE_CRYPT_PASSWORD2", &cvm_harness::tools::obscure(CRYPT_SALT))
    };
    drop(starts_nothing(
        &cloud,
        override_(wrong("MASTER_KEY", "KqULR8kjQt3aHcy3dOUOSX11ljLbLDqLhrManXN/gVE=")),
        "refused",
        &["MASTER_KEY"],
    ));
    // And the key may be overridden with what it derives anyway.
    let mut machine = override_(cloud.machine()).ready();
    assert_eq!(machine.stop(), 0);
    // A prefix of somebody else's.
    cloud.garage.put_raw("elsewhere/a", b"not ours");
    cloud.garage.put_raw("elsewhere/b/c", b"not ours either");
    drop(starts_nothing(
        &cloud,
        wrong("S3_PREFIX", "elsewhere"),
        "refused",
        &["none of their names decrypts"],
    ));
}

#[test]
fn what_can_get_better_starts_the_gateway_when_it_does() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let machine = starts_nothing(
        &cloud,
        cloud.machine().environment("S3_BUCKET", "not-there-yet"),
        "opening",
        &["no bucket of this name", "create the bucket"],
    );
    cloud.garage.new_bucket("not-there-yet");
    until("the gateway runs on the new bucket", PATIENCE, || gateway_runs(&machine).then_some(()));
    drop(machine);

    cloud.garage.deny();
    let machine = cloud.machine().start();
    storage_says(&machine, "opening", &["denies access", "AWS_ACCESS_KEY_ID"]);
    machine.line("denies access");
    gateway_stays_down(&machine);
    cloud.garage.allow();
    until("the gateway runs with the permission", PATIENCE, || gateway_runs(&machine).then_some(()));
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);

    drop(starts_nothing(
        &cloud,
        cloud.machine().environment("AWS_SECRET_ACCESS_KEY", &"deadbeef".repeat(8)),
        "opening",
        &["denies access", "AWS_SECRET_ACCESS_KEY"],
    ));

    cloud.proxy.refuse(true);
    let machine =
        starts_nothing(&cloud, cloud.machine(), "opening", &["connection is refused", "S3_ENDPOINT"]);
    cloud.proxy.heal();
    until("the gateway runs with the network", PATIENCE, || gateway_runs(&machine).then_some(()));
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);

    cloud.proxy.fault(Fault::Hang);
    let machine = starts_nothing(&cloud, cloud.machine(), "opening", &["no answer in time", "S3_ENDPOINT"]);
    cloud.proxy.heal();
    until("the gateway runs with an answer", PATIENCE, || gateway_runs(&machine).then_some(()));
}

#[test]
fn a_server_that_cannot_prove_who_it_is_gets_nothing() {
    let cloud = Cloud::new();
    let builder = cloud.machine();
    let dir = builder.scratch().join("tls");
    std::fs::create_dir_all(&dir).expect("a directory");
    let made = std::process::Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"])
        .args(["-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost"])
        .args(["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"])
        .current_dir(&dir)
        .output()
        .expect("openssl runs");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    let machine = builder
        .bind(&dir, "/etc/tls-of-the-test")
        .environment("S3_ENDPOINT", "https://127.0.0.1:9443")
        .start();
    machine.service_in("sshd", &["up", "ready"]);
    let mut server = machine
        .command(&["openssl", "s_server", "-accept", "9443", "-quiet", "-www"])
        .args(["-key", "/etc/tls-of-the-test/key.pem", "-cert", "/etc/tls-of-the-test/cert.pem"])
        .spawn()
        .expect("openssl runs");
    let why = storage_says(&machine, "opening", &["no trusted connection"]);
    assert!(why.contains("certificate"), "{why}");
    machine.line("no trusted connection");
    gateway_stays_down(&machine);
    let _ = server.kill();
    let _ = server.wait();
}
