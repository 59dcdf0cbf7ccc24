//! Where the keys of a bucket must not be, whatever goes wrong.

use crate::fixtures::bucket::all;
use crate::fixtures::files::write;
use crate::fixtures::machines::storage_says;
use cvm_harness::evidence::contains;
use cvm_harness::machine::{CRYPT_PASSWORD, CRYPT_SALT, MASTER_KEY, PATIENCE, repository};
use cvm_harness::{Cloud, Fault, Machine, Mode, Rule, flush, restore_by_hand, storage, until};
use std::time::SystemTime;

/// The secrets of a run, in all forms in which they could be written down.
fn secrets(cloud: &Cloud) -> Vec<(&'static str, Vec<u8>)> {
    use cvm_secrets::keys::{KeyRing, MasterKey};
    use cvm_secrets::secret::Secret;
    let master = MasterKey::new(Secret::copy_of(MASTER_KEY.as_bytes())).expect("it is not empty");
    let manifest = *KeyRing::derive(&master).manifest_key.expose();
    let hex = manifest.iter().fold(String::new(), |text, b| text + &format!("{b:02x}"));
    vec![
        ("MASTER_KEY", MASTER_KEY.as_bytes().to_vec()),
        ("the bucket's secret", cloud.garage.secret_key().as_bytes().to_vec()),
        ("the bucket's access key", cloud.garage.access_key().as_bytes().to_vec()),
        ("the crypt password", CRYPT_PASSWORD.as_bytes().to_vec()),
        ("the crypt salt", CRYPT_SALT.as_bytes().to_vec()),
        ("the manifest key", manifest.to_vec()),
        ("the manifest key in hex", hex.into_bytes()),
        ("the session token", SESSION_TOKEN.as_bytes().to_vec()),
    ]
}

const SESSION_TOKEN: &str = "a-token-that-ends-with-its-session/0123456789+==";

/// Every file that was written in a machine since then, wherever it is; but a machine also sees what
/// other tests write at the same time to the disk below its own.
fn written_since(machine: &Machine, moment: SystemTime) -> Vec<(String, Vec<u8>)> {
    let since = moment.duration_since(SystemTime::UNIX_EPOCH).expect("now is later").as_secs_f64();
    let since = format!("@{since:.3}");
    let all = "exec find / /run /tmp /data /dev/shm /run/openclaw-cvm/volume -xdev \
               -path /proc -prune -o -path /sys -prune -o -path \"$1\" -prune -o -type f -newerct $0 -print0";
    let others = repository().join("target");
    let found = machine.exec(&["sh", "-c", all, &since, &others.to_string_lossy()]).stdout;
    let names = found.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let names = names.map(|name| String::from_utf8_lossy(name).into_owned());
    names.map(|name| (name.clone(), std::fs::read(machine.path(&name)).unwrap_or_default())).collect()
}

#[track_caller]
fn tells_nothing(machine: &Machine, since: SystemTime, secrets: &[(&'static str, Vec<u8>)]) {
    let mut places = written_since(machine, since);
    let place = "/var/log/openclaw-cvm/supervisor.log";
    assert!(places.iter().any(|(name, _)| name == place), "{place} was not looked at");
    for process in machine.processes() {
        for file in ["environ", "cmdline", "mountinfo", "maps", "comm", "status"] {
            let bytes = std::fs::read(machine.path(&format!("/proc/{}/{file}", process.pid)));
            places.push((
                format!("{file} of {} {}", process.pid, process.arguments),
                bytes.unwrap_or_default(),
            ));
        }
    }
    places.push(("standard output".to_owned(), machine.output().into_bytes()));
    for words in [&["cvm", "storage", "status", "--json"][..], &["cvm", "status"], &["cvm", "doctor"]] {
        let output = machine.exec(words);
        places.push((format!("{words:?}"), [output.stdout, output.stderr].concat()));
    }
    for (place, bytes) in &places {
        for (name, secret) in secrets {
            assert!(!contains(bytes, secret), "{name} is in {place}");
        }
        // A remote as rclone writes it has them in obscured form.
        assert!(!contains(bytes, b"password2="), "a connection string is in {place}");
        assert!(!contains(bytes, b"secret_access_key="), "a connection string is in {place}");
    }
}

#[test]
fn no_run_and_no_failure_writes_a_secret_down() {
    let cloud = Cloud::new();
    let secrets = secrets(&cloud);
    let since = SystemTime::now();
    let noisy = || {
        let machine = cloud.machine().environment("AWS_SESSION_TOKEN", SESSION_TOKEN);
        machine.environment("LOG_LEVEL", "trace").environment("LOG_SERVICES", "1")
    };
    let machine = noisy().ready();
    write(&machine, &["openclaw/workspace/a"], "words");
    flush(&machine);
    let mut index = written_since(&machine, since);
    index.retain(|(name, bytes)| name.contains("/storage/index") && contains(bytes, "workspace"));
    assert!(!index.is_empty(), "the volume itself is looked at");
    for fault in
        [Fault::Status(403), Fault::Status(400), Fault::Status(503), Fault::Reset, Fault::HalfResponse]
    {
        cloud.proxy.fault(fault);
        write(&machine, &["openclaw/workspace/b"], &format!("{fault:?}"));
        let _ = machine.exec(&["cvm", "storage", "flush"]);
        let _ = machine.exec(&["cvm", "storage", "verify"]);
        let _ = machine.exec(&["cvm", "storage", "get", "openclaw/workspace/a"]);
        tells_nothing(&machine, since, &secrets);
        cloud.proxy.heal();
    }
    // Both of its runtimes have words to say when they die, and the kernel a core to leave.
    for signal in ["SEGV", "ABRT", "QUIT"] {
        let pid = machine.find("lib/openclaw-cvm/cvm-storage").expect("the worker runs").pid;
        machine.ok(&["kill", &format!("-{signal}"), &pid.to_string()]);
        until("another one has the tree", PATIENCE, || {
            machine.exec(&["cvm", "start", "storage", "--no-wait"]);
            let other = machine.find("lib/openclaw-cvm/cvm-storage").is_some_and(|p| p.pid != pid);
            (other && storage(&machine)["phase"] == "ready").then_some(())
        });
        tells_nothing(&machine, since, &secrets);
    }
    let mut machine = machine;
    until("all is pushed", PATIENCE, || {
        machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
    });
    cloud.proxy.add(Rule::new(Fault::Reset).every(3));
    let said = restore_by_hand(&cloud, &machine, &[], "/tmp/whole");
    for (name, secret) in &secrets {
        let told = contains(&said.stdout, secret) || contains(&said.stderr, secret);
        assert!(!told, "{name} is in what a restore by hand says");
    }
    tells_nothing(&machine, since, &secrets);
    cloud.proxy.heal();
    // Nor does the bucket hold what only its keys should open.
    for (key, bytes) in all(&cloud.garage) {
        for (name, secret) in &secrets {
            assert!(!contains(&bytes, secret), "{name} is in {key}");
        }
        assert!(!contains(&bytes, b"words of openclaw"), "{key} is not encrypted");
    }
    assert_eq!(machine.stop(), 0);
    let mut machine = Mode::Sync.of(noisy()).ready();
    cloud.proxy.fault(Fault::HalfResponse);
    write(&machine, &["openclaw/workspace/c"], "words");
    let _ = machine.exec(&["cvm", "storage", "flush"]);
    let _ = machine.exec(&["cvm", "storage", "drill"]);
    tells_nothing(&machine, since, &secrets);
    cloud.proxy.heal();
    assert_eq!(machine.stop(), 0);
    let obscured = ["another password", CRYPT_SALT].map(cvm_harness::tools::obscure);
    let failing = [
        (noisy().environment("MASTER_KEY", "KqULR8kjQt3aHcy3dOUOSX11ljLbLDqLhrManXN/gVE="), "refused"),
        (noisy().environment("AWS_SECRET_ACCESS_KEY", &"deadbeef".repeat(8)), "opening"),
        (noisy().environment("S3_ENDPOINT", "http://127.0.0.1:9"), "opening"),
        (
            noisy()
                .environment("RCLONE_CRYPT_PASSWORD", &obscured[0])
                .environment("RCLONE_CRYPT_PASSWORD2", &obscured[1]),
            "refused",
        ),
    ];
    let mut more = secrets.clone();
    more.extend([
        ("another key", b"KqULR8kjQt3aHcy3dOUOSX11ljLbLDqLhrManXN/gVE=".to_vec()),
        ("a wrong secret", b"deadbeef".repeat(8)),
        ("a wrong password", b"another password".to_vec()),
        ("an obscured password", obscured[0].clone().into_bytes()),
        ("an obscured salt", obscured[1].clone().into_bytes()),
    ]);
    for (builder, phase) in failing {
        let machine = builder.start();
        storage_says(&machine, phase, &[]);
        tells_nothing(&machine, since, &more);
    }
}

#[test]
fn only_the_worker_has_the_keys_in_memory_and_it_leaves_no_core() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let secrets = secrets(&cloud);
    let mut looked_at = 0;
    for process in machine.processes() {
        if process.arguments.contains("lib/openclaw-cvm/cvm-storage") {
            continue;
        }
        let maps = machine.read(&format!("/proc/{}/maps", process.pid));
        let Ok(memory) = std::fs::File::open(machine.path(&format!("/proc/{}/mem", process.pid))) else {
            continue;
        };
        for line in maps.lines().filter(|l| l.split(' ').nth(1).is_some_and(|m| m.starts_with("rw"))) {
            let Some((from, to)) = line.split(' ').next().and_then(|r| r.split_once('-')) else { continue };
            let (Ok(from), Ok(to)) = (u64::from_str_radix(from, 16), u64::from_str_radix(to, 16)) else {
                continue;
            };
            let mut bytes = vec![0; usize::try_from((to - from).min(64 << 20)).expect("it fits")];
            if std::os::unix::fs::FileExt::read_exact_at(&memory, &mut bytes, from).is_err() {
                continue;
            }
            looked_at += bytes.len();
            for (name, secret) in &secrets {
                assert!(
                    !contains(&bytes, secret),
                    "{name} is in the memory of {} at {line}",
                    process.arguments
                );
            }
        }
    }
    assert!(looked_at > 100 * 1024, "only {looked_at} bytes were readable");
    let worker = machine.find("lib/openclaw-cvm/cvm-storage").expect("the worker runs");
    // What is not dumpable belongs to root, whoever runs it, and leaves no core behind.
    machine.kill(worker.pid.into(), "SEGV");
    until("another worker is there", PATIENCE, || {
        machine.find("lib/openclaw-cvm/cvm-storage").filter(|p| p.pid != worker.pid).map(drop)
    });
    let cores = machine.ok(&[
        "find",
        "/",
        "-xdev",
        "-name",
        "core*",
        "-newer",
        "/proc/1/comm",
        "-type",
        "f",
        "-size",
        "+1M",
    ]);
    assert_eq!(cores, "");
}
