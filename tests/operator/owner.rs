//! An environment that somebody else has written, or put back: on dstack everybody can. It gets no
//! shell, no gateway, and nothing of the volume; and its owner, who has only mistyped something, reads
//! what to do.

use cvm_harness::machine::{HEALTHY, PATIENCE, owner_word};
use cvm_harness::ssh::{HostKey, listens, make_key, ssh};
use cvm_harness::{Builder, Cloud, Machine, until};
use cvm_protocol::volume::{MEMORIES, Stranger};
use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

const OWNERS: &str = "kqkwGlAAGBFcUhH9pdY8mDWBZQBOgP2Kq4dkAQvqBjo=";
const FORGERS: &str = "VtHNhXzJ3pa2NhZzK4G8hm1oUtzbwBnXoV7qkQbSdqQ=";

/// The keys of two people for SSH, and the socket by which a machine knows that it is dstack's.
struct People {
    home: tempfile::TempDir,
    _dstack: UnixListener,
}

impl People {
    fn new() -> Self {
        let home = tempfile::tempdir().expect("a temporary directory");
        for name in ["owner", "forger"] {
            make_key(&home.path().join(name));
        }
        let dstack = UnixListener::bind(home.path().join("dstack.sock")).expect("a socket");
        Self { home, _dstack: dstack }
    }

    /// A volume that outlives its machines.
    fn volume(&self, name: &str) -> PathBuf {
        let path = self.home.path().join("volumes").join(name);
        fs::create_dir_all(&path).expect("the directory is writable");
        path
    }

    fn with(&self, machine: Builder, volume: &str) -> Builder {
        machine.unbind("/data").bind(&self.volume(volume), "/data").bind(self.home.path(), "/people")
    }

    fn at_home(&self) -> Builder {
        let machine = Builder::product().fake_gateway(HEALTHY).environment("ENABLE_DOCKER", "0");
        self.with(machine, "data")
    }

    fn on_dstack(&self) -> Builder {
        self.at_home().bind(&self.home.path().join("dstack.sock"), "/run/cvm-dstack/dstack.sock")
    }

    /// The environment of one of them.
    fn of(&self, machine: Builder, name: &str, key: &str) -> Builder {
        let public = fs::read_to_string(self.home.path().join(format!("{name}.pub")));
        machine
            .environment("MASTER_KEY", key)
            .environment("SSH_AUTHORIZED_KEYS", &public.expect("it was made"))
    }

    fn owners(&self, machine: Builder) -> Builder {
        self.of(machine, "owner", OWNERS)
    }

    fn forgers(&self, machine: Builder, key: &str) -> Builder {
        self.of(machine, "forger", key)
    }
}

fn comes_in(machine: &Machine, name: &str) -> bool {
    let output = machine.exec(&ssh(22, &format!("/people/{name}"), HostKey::Any, &[], "true"));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success() || said.contains("Permission denied"), "sshd is up and says no: {said}");
    output.status.success()
}

/// The gateway is ready, and this is who comes in.
#[track_caller]
fn serves(machine: &Machine, name: &str) {
    machine.service_in("gateway", &["ready"]);
    assert!(comes_in(machine, name), "{name}: {}", machine.output());
}

/// No gateway, and nobody comes in; the log and the status say why.
#[track_caller]
fn refuses(machine: &Machine, why: Stranger) {
    machine.line(&format!("Boot step volume failed: {}", why.words()));
    machine.line("SSH daemon started.");
    until("sshd listens", PATIENCE, || listens(machine).then_some(()));
    assert!(["owner", "forger"].into_iter().all(|name| !comes_in(machine, name)), "{}", machine.output());
    let gateway = machine.service("gateway");
    assert_eq!(gateway["state"], "blocked", "{gateway:#}");
    assert_eq!(gateway["why"], format!("boot step volume: {}", why.words()), "{gateway:#}");
    assert!(machine.exec(&["cvm", "health"]).status.code() == Some(1));
    assert!(machine.find("cvm-victim").is_none() && machine.find("cvm-storage").is_none());
}

#[test]
fn a_forged_environment_on_an_old_volume_gets_no_shell_and_no_gateway() {
    let people = People::new();
    let machine = people.owners(people.on_dstack()).start();
    serves(&machine, "owner");
    machine.line("Open door: CVM_OWNER is not set");
    let status = machine.status();
    let doors = status["doors"].as_array().cloned().unwrap_or_default();
    assert!(doors.iter().any(|door| door["name"] == "CVM_OWNER is not set"), "{doors:?}");
    drop(machine);
    for (key, why) in [(FORGERS, Stranger::OtherKey), ("", Stranger::NoKey)] {
        refuses(&people.forgers(people.on_dstack(), key).environment("LOG_SERVICES", "1").start(), why);
    }
    serves(&people.owners(people.on_dstack()).start(), "owner");

    // Nor on a new volume without a key: its next boot could be anybody's.
    let keyless =
        people.of(people.on_dstack().unbind("/data"), "owner", "").bind(&people.volume("new"), "/data");
    refuses(&keyless.start(), Stranger::Keyless);

    // As the version before left it: there whoever comes first would have the volume.
    for name in MEMORIES {
        fs::remove_file(people.volume("data").join(".cvm").join(name)).expect("the volume remembers its key");
    }
    refuses(&people.forgers(people.on_dstack(), FORGERS).start(), Stranger::Unproven);
    refuses(&people.owners(people.on_dstack()).start(), Stranger::Unproven);
    let proven = people.owners(people.on_dstack()).environment("CVM_OWNER", &owner_word(OWNERS, "0")).start();
    serves(&proven, "owner");
    proven.line("The volume holds a state of a version that remembered no key");
    assert_eq!(proven.lines_with("CVM_OWNER is not set"), 0);
}

#[test]
fn without_the_owners_key_nothing_starts_at_all_and_the_log_says_what_to_do() {
    let people = People::new();
    let owned = || people.on_dstack().environment("CVM_OWNER", &owner_word(OWNERS, "0"));
    let typo = OWNERS.replace('q', "g");
    let environments: [fn(&People, Builder, &str) -> Builder; 4] = [
        |people, machine, _| people.forgers(machine, FORGERS),
        |people, machine, _| people.forgers(machine, ""),
        |people, machine, typo| people.of(machine, "owner", typo),
        |people, machine, _| people.owners(machine).environment("CVM_OWNER_EPOCH", "1"),
    ];
    for environment in environments {
        let mut machine = environment(&people, owned(), &typo).start();
        assert_eq!(machine.wait(), 78);
        let output = machine.output();
        assert_eq!(machine.lines_with("CVM_OWNER: "), 1, "{output}");
        assert!(!output.contains("starting") && !output.contains(&owner_word(OWNERS, "0")[..8]), "{output}");
        assert_eq!(fs::read_dir(people.volume("data")).expect("it is there").count(), 0, "and is untouched");
        let mut checked = machine.again(|b| b.command(&["/usr/local/sbin/cvm-init", "--check"]));
        assert_eq!(checked.wait(), 78);
        assert_eq!(checked.output(), output, "before a boot it is said in the same words");
    }
    serves(&people.owners(owned()).start(), "owner");
}

#[test]
fn an_old_environment_is_void_once_the_epoch_was_raised_with_its_old_compose_file_too() {
    let people = People::new();
    let deployment = |word_of: &str, epoch: &str| {
        let machine =
            people.owners(people.on_dstack()).environment("CVM_OWNER", &owner_word(OWNERS, word_of));
        machine.environment("CVM_OWNER_EPOCH", epoch).start()
    };
    for epoch in ["0", "1"] {
        serves(&deployment(epoch, epoch), "owner");
    }
    refuses(&deployment("0", "0"), Stranger::OldEpoch);
    // From before there was an owner at all.
    refuses(&people.owners(people.on_dstack()).start(), Stranger::OldEpoch);
    let mut mixed = deployment("1", "0");
    assert_eq!(mixed.wait(), 78, "the old environment with the new compose file starts nothing");
    serves(&deployment("1", "1"), "owner");
}

#[test]
fn a_forged_environment_does_not_send_the_volume_to_its_own_bucket() {
    let people = People::new();
    let worker = "#!/bin/sh\necho start >> /data/starts\nprintf '%s\\n' \
                  '{\"report\":\"gate\",\"gate\":\"storage\",\"state\":\"open\",\"outlives\":true}' >&3\ncat <&4\n";
    let bucket = |name: &str| {
        people
            .on_dstack()
            .file("/usr/local/lib/openclaw-cvm/cvm-storage", worker, 0o755)
            .file("/usr/local/lib/openclaw-cvm/cvm-standin", "#!/bin/sh\nexec sleep 100000\n", 0o755)
            .environment("S3_BUCKET", name)
            .environment("S3_ENDPOINT", "https://s3.example.org")
            .environment("AWS_ACCESS_KEY_ID", "id")
            .environment("AWS_SECRET_ACCESS_KEY", "key")
    };
    serves(&people.owners(bucket("mine")).start(), "owner");
    let forged = people.forgers(bucket("his"), FORGERS).start();
    refuses(&forged, Stranger::OtherKey);
    // Neither by itself nor by an order, which asks the volume again.
    for (service, nth) in [("gateway", 2), ("storage", 3)] {
        forged.ok(&["cvm", "start", service, "--no-wait"]);
        forged.nth_line("Boot step volume failed", nth);
    }
    let starts = fs::read_to_string(people.volume("data").join("starts"));
    assert_eq!(starts.expect("the owner's worker has run"), "start\n");
}

#[test]
fn an_owner_who_mistyped_his_key_reads_what_to_do_and_gets_in_again() {
    let people = People::new();
    // On a docker host of his own, which he enters by the engine; and from the version before.
    let first = people.at_home().file("/data/openclaw/workspace/NOTES.md", "mine", 0o600);
    let first = people.owners(first).start();
    serves(&first, "owner");
    first.line("The volume holds a state of a version that remembered no key");
    drop(first);

    let other = || people.of(people.at_home(), "owner", FORGERS);
    let mistyped = other().start();
    refuses(&mistyped, Stranger::OtherKey);
    let status = String::from_utf8_lossy(&mistyped.exec(&["cvm", "status"]).stdout).into_owned();
    assert!(status.contains("another MASTER_KEY"), "{status}");
    drop(mistyped);
    serves(&people.owners(people.at_home()).start(), "owner");

    // He meant it: over the engine at once, or announced in a boot with the present key.
    let meant = other().start();
    refuses(&meant, Stranger::OtherKey);
    meant.ok(&["cvm", "volume", "adopt", "--yes"]);
    serves(&meant, "owner");
    drop(meant);
    refuses(&people.owners(people.at_home()).start(), Stranger::OtherKey);
    let present = other().start();
    serves(&present, "owner");
    let mut derive = present.command(&["cvm", "derive", "volume-fingerprint"]);
    let fingerprint = derive.env("MASTER_KEY", OWNERS).output().expect("nsenter runs").stdout;
    let fingerprint = String::from_utf8_lossy(&fingerprint).trim().to_owned();
    present.ok(&["cvm", "volume", "adopt", &fingerprint]);
    drop(present);
    let announced = people.owners(people.at_home()).start();
    serves(&announced, "owner");
    announced.line("The volume belongs to the new MASTER_KEY from now on");
    drop(announced);
    refuses(&other().start(), Stranger::OtherKey);
}

#[test]
fn a_new_machine_learns_from_the_bucket_that_its_environment_is_void() {
    let cloud = Cloud::new();
    let people = People::new();
    let deployment = |volume: &str, epoch: &str| {
        let machine = people.owners(people.with(cloud.machine(), volume));
        machine.environment("CVM_OWNER", &owner_word(OWNERS, epoch)).environment("CVM_OWNER_EPOCH", epoch)
    };
    let mut first = deployment("first", "1").start();
    serves(&first, "owner");
    assert_eq!(first.stop(), 0);
    let old = deployment("second", "0").start();
    old.line("Boot step storage failed: CVM_OWNER_EPOCH is lower");
    assert_eq!(
        old.read(cvm_protocol::paths::AUTHORIZED_KEYS),
        "",
        "who was let in meanwhile is not any more"
    );
    until("sshd listens", PATIENCE, || listens(&old).then_some(()));
    assert!(!comes_in(&old, "owner"));
    refuses(&old.again(|b| b), Stranger::OldEpoch);
    // Raised, the state is the owner's again.
    serves(&deployment("third", "2").start(), "owner");
}
