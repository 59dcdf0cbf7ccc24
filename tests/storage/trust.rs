//! A hostile bucket, a broken network, a second machine: what may never be served, never be
//! started on, never be overwritten, and never be told.

use cvm_harness::cloud::{Cloud, HEALTHY, flush, independent, restore_by_hand, storage};
use cvm_harness::evidence::contains;
use cvm_harness::machine::{MASTER_KEY, PATIENCE, binary, repository};
use cvm_harness::tools::{Rclone, python};
use cvm_harness::{Builder, Fault, Garage, Machine, Network, Proxy, Rule, before, digest, until};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::{Duration, Instant, SystemTime};

/// What [`MASTER_KEY`] derives: see tests/vectors/keys.json.
const PASSWORD: &str = "jrq/5kUcKRy6NqQbM7C5bnpMnrR6+7d/aALQruAzhwk=";
const SALT: &str = "2kBa0tfg6UdY4fDnCeiDgqjrmnPuS/z8j0BDoG0BGvA=";
const PREFIX: &str = "openclaw-data";
/// A cipher block and the header before the first one.
const BLOCK: usize = 64 * 1024 + 16;
const HEADER: usize = 32;
/// For what waits for timeouts of the product's.
const LONG: Duration = Duration::from_secs(120);

// === What the tests do to a bucket ===

/// The bucket below its encryption, by the names above it.
struct Raw<'a> {
    garage: &'a Garage,
    rclone: Rclone,
}

impl<'a> Raw<'a> {
    fn new(garage: &'a Garage) -> Self {
        Self { garage, rclone: Rclone::new(garage, PREFIX, PASSWORD, SALT) }
    }

    fn keys<const N: usize>(&self, names: [&str; N]) -> [String; N] {
        names.map(|name| {
            let said = self.rclone.ok(&["cryptdecode", "crypt:", "--reverse", name]);
            let said = String::from_utf8_lossy(&said).into_owned();
            let encrypted = said.trim_end().rsplit('\t').next().expect("a name and what it becomes").trim();
            format!("{PREFIX}/{encrypted}")
        })
    }

    fn key(&self, name: &str) -> String {
        let [key] = self.keys([name]);
        key
    }

    #[track_caller]
    fn get(&self, name: &str) -> Vec<u8> {
        self.garage.get_raw(&self.key(name)).unwrap_or_else(|| panic!("{name} is not in the bucket"))
    }

    fn put(&self, name: &str, bytes: &[u8]) {
        self.garage.put_raw(&self.key(name), bytes);
    }

    fn delete(&self, name: &str) {
        self.garage.delete_raw(&self.key(name));
    }

    /// Names directly below a directory of the bucket, in order.
    fn names(&self, directory: &str) -> Vec<String> {
        let said = self.rclone.ok(&["lsf", "-R", "--files-only", &format!("crypt:{directory}")]);
        let mut names: Vec<String> = String::from_utf8_lossy(&said).lines().map(str::to_owned).collect();
        names.sort();
        names
    }

    fn segments(&self) -> Vec<String> {
        self.names(".cvm/manifest").into_iter().map(|n| format!(".cvm/manifest/{n}")).collect()
    }
}

/// Everything in the bucket, to be compared.
fn all(garage: &Garage) -> BTreeMap<String, Vec<u8>> {
    garage.all_bytes().collect()
}

/// To be put back as it was.
fn put_back(garage: &Garage, was: &BTreeMap<String, Vec<u8>>) {
    for (key, _) in garage.objects("") {
        if !was.contains_key(&key) {
            garage.delete_raw(&key);
        }
    }
    for (key, bytes) in was {
        garage.put_raw(key, bytes);
    }
}

// === Machines ===

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Fuse,
    Sync,
}

/// In sync mode /dev/fuse is there and cannot be opened, as in a container that lacks it.
fn in_mode(mode: Mode, builder: Builder) -> Builder {
    let without = "mount --bind /dev/fuse /dev/fuse && mount -o remount,bind,nodev /dev/fuse && exec /usr/local/sbin/cvm-init";
    match mode {
        Mode::Fuse => builder,
        Mode::Sync => builder.command(&["/bin/sh", "-c", without]),
    }
}

fn started(builder: Builder) -> Machine {
    let machine = builder.start();
    machine.service_in("gateway", &["ready"]);
    machine
}

/// Writes files with contents that no other has, of more than three cipher blocks.
fn write(machine: &Machine, paths: &[&str], salt: &str) {
    for path in paths {
        let at = machine.path(&format!("/data/{path}"));
        std::fs::create_dir_all(at.parent().expect("below /data")).expect("a directory");
        std::fs::write(at, content(path, salt)).expect("a file");
    }
}

fn content(path: &str, salt: &str) -> Vec<u8> {
    format!("{salt} of {path}; ").into_bytes().into_iter().cycle().take(220_000).collect()
}

fn read(machine: &Machine, path: &str) -> Option<Vec<u8>> {
    std::fs::read(machine.path(&format!("/data/{path}"))).ok()
}

fn tree(machine: &Machine) -> String {
    format!("{:?}", digest(&machine.path("/data"), &[".cvm", "lost+found"]))
}

fn incidents(machine: &Machine) -> Vec<String> {
    let status = storage(machine);
    let found = status["incidents"].as_array().cloned().unwrap_or_default();
    found.iter().filter_map(|i| i["path"].as_str().map(str::to_owned)).collect()
}

/// Waits until the storage says why it does not go on, in a phase and with words.
#[track_caller]
fn says(machine: &Machine, phase: &str, words: &[&str]) -> String {
    let mut last = serde_json::Value::Null;
    let said = before(LONG, || {
        let status = storage(machine);
        let why = status["why"].as_str().unwrap_or_default().to_owned();
        let is_it = status["phase"] == phase && !why.is_empty() && words.iter().all(|w| why.contains(w));
        if !status.is_null() {
            last = status;
        }
        is_it.then_some(why)
    });
    let Some(why) = said else {
        panic!("the storage is never {phase} with {words:?}:\n{}\n{last:#}", machine.output());
    };
    why
}

fn gateway_runs(machine: &Machine) -> bool {
    machine.find("http 18789").is_some()
}

/// The gateway has not started, sshd is up, and status says why.
#[track_caller]
fn refused(machine: &Machine, words: &[&str]) {
    says(machine, "refused", words);
    stays_out(machine);
}

#[track_caller]
fn stays_out(machine: &Machine) {
    machine.service_in("sshd", &["up", "ready"]);
    assert!(!gateway_runs(machine), "the gateway runs:\n{}", machine.output());
    let status = machine.exec(&["cvm", "status"]);
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    assert!(text.to_lowercase().contains("storage"), "cvm status does not speak of it:\n{text}");
}

fn accept_older(machine: &Machine) {
    machine.ok(&["cvm", "storage", "accept-older", "--yes"]);
}

fn adopt(machine: &Machine) {
    machine.ok(&["cvm", "storage", "adopt", "--yes"]);
}

/// `forget` or `keep`.
fn decide(machine: &Machine, verb: &str, paths: &[String]) {
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    machine.ok(&[&["cvm", "storage", verb, "--yes"], &paths[..]].concat());
}

/// The worker does nothing of it, and says why.
#[track_caller]
fn is_refused(machine: &Machine, words: &[&str], why: &str) {
    let said = machine.exec(&[&["cvm", "storage"], words].concat());
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.code() == Some(4) && text.contains(why), "{words:?}: {text}");
}

fn epoch(machine: &Machine) -> u64 {
    storage(machine)["epoch"].as_u64().unwrap_or_default()
}

// === A. Integrity and age of objects ===

/// Read before the gateway starts, and ordinary ones.
const PLACES: [&str; 2] = ["openclaw/state", "openclaw/workspace"];
const ATTACKED: [&str; 10] =
    ["swap1", "swap2", "cut", "cut-header", "cut-short", "cut-empty", "gone", "old", "flip", "flip-first"];

fn attack(raw: &Raw<'_>, place: &str, old: &[u8]) {
    let at = |name: &str| format!("{place}/{name}");
    let (one, two) = (raw.get(&at("swap1")), raw.get(&at("swap2")));
    raw.put(&at("swap1"), &two);
    raw.put(&at("swap2"), &one);
    for (name, length) in
        [("cut", HEADER + BLOCK), ("cut-header", HEADER), ("cut-short", 10), ("cut-empty", 0)]
    {
        let mut bytes = raw.get(&at(name));
        bytes.truncate(length);
        raw.put(&at(name), &bytes);
    }
    raw.delete(&at("gone"));
    raw.put(&at("old"), old);
    for (name, offset) in [("flip", HEADER + BLOCK + 500), ("flip-first", HEADER + 40)] {
        let mut bytes = raw.get(&at(name));
        bytes[offset] ^= 1;
        raw.put(&at(name), &bytes);
    }
}

fn objects_are_checked(mode: Mode) {
    let cloud = Cloud::new();
    let mut machine = started(in_mode(mode, cloud.machine()));
    let raw = Raw::new(&cloud.garage);
    let names: Vec<String> = PLACES
        .iter()
        .flat_map(|p| ATTACKED.iter().chain(&["good"]).map(move |n| format!("{p}/{n}")))
        .collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    write(&machine, &names, "first");
    write(&machine, &["openclaw/workspace/removed"], "first");
    flush(&machine);
    let old = PLACES.map(|p| raw.get(&format!("{p}/old")));
    let removed = raw.key("openclaw/workspace/removed");
    let removed_object = cloud.garage.object(&removed).expect("it was pushed");
    write(&machine, &PLACES.map(|p| format!("{p}/old")).each_ref().map(String::as_str), "second");
    std::fs::remove_file(machine.path("/data/openclaw/workspace/removed")).expect("it was there");
    flush(&machine);
    independent(&machine);
    until("its object is deleted", PATIENCE, || cloud.garage.object(&removed).is_none().then_some(()));
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let good = all(&cloud.garage);
    for (place, old) in PLACES.iter().zip(&old) {
        attack(&raw, place, old);
    }
    cloud.garage.put_object(&removed, &removed_object);

    // Without what the gateway reads while it starts it does not: it would make it anew.
    let machine = in_mode(mode, cloud.machine()).start();
    let [vital, ordinary] = PLACES;
    let of = |place: &str, names: &[&str]| -> Vec<String> {
        let mut paths: Vec<String> = names.iter().map(|n| format!("{place}/{n}")).collect();
        paths.sort();
        paths
    };
    refused(&machine, &["10 files that the gateway reads while it starts", "cvm storage status"]);
    // In sync mode all has been looked at by then.
    let mut told = incidents(&machine);
    told.retain(|path| path.starts_with(vital));
    assert_eq!(told, of(vital, &ATTACKED));
    for name in ["flip", "gone"] {
        let key = raw.key(&format!("{vital}/{name}"));
        cloud.garage.put_raw(&key, &good[&key]);
    }
    machine.ok(&["cvm", "restart", "storage", "--no-wait"]);
    refused(&machine, &["8 files that the gateway reads while it starts", "cvm storage forget"]);
    is_refused(&machine, &["accept-older", "--yes"], "not decided by this");
    is_refused(&machine, &["forget", "--yes", "openclaw/elsewhere"], "no incident names openclaw/elsewhere");
    let mut lost = told.clone();
    lost.retain(|path| !path.ends_with("/flip") && !path.ends_with("/gone"));
    // Only these go: one that is not given up keeps the gateway from starting.
    let kept_back = lost.pop().expect("eight files");
    decide(&machine, "forget", &lost);
    refused(&machine, &["1 files that the gateway reads while it starts"]);
    decide(&machine, "forget", &[kept_back]);
    machine.service_in("gateway", &["ready"]);
    assert_eq!(set_aside(&machine), 0, "a try that failed is no other owner");
    for name in ATTACKED {
        let path = format!("{vital}/{name}");
        let right = ["flip", "gone"].contains(&name).then(|| content(&path, "first"));
        assert_eq!(read(&machine, &path), right, "{path} when the gateway started");
    }
    let expected = of(ordinary, &ATTACKED);
    ordinary_objects_are_incidents(&cloud, &machine, &good, &expected);
}

#[test]
fn what_is_written_on_top_of_an_older_version_is_pushed_and_an_incident_until_somebody_looks() {
    let cloud = Cloud::new();
    let mut machine = started(cloud.machine());
    let raw = Raw::new(&cloud.garage);
    let place = "openclaw/workspace";
    let paths = ["appended", "rewritten", "replaced", "fine"].map(|name| format!("{place}/{name}"));
    write(&machine, &paths.each_ref().map(String::as_str), "first");
    machine.ok(&[
        "sh",
        "-ec",
        &format!(
            "mkdir /data/{place}/small; cd /data/{place}/small; for n in $(seq 300); do echo $n > $n; done"
        ),
    ]);
    flush(&machine);
    let old = paths.each_ref().map(|path| raw.get(path));
    // The largest come up last.
    let long = |path: &str| content(path, "second").repeat(4);
    for path in &paths {
        std::fs::write(machine.path(&format!("/data/{path}")), long(path)).expect("it is there");
    }
    // And one is a stub above, before its data is.
    machine.ok(&["chmod", "751", &format!("/data/{}", paths[1])]);
    flush(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    for (path, old) in paths.iter().zip(&old).take(3) {
        raw.put(path, old);
    }
    cloud.proxy.latency(Duration::from_millis(300));
    let mut machine = started(cloud.machine().environment("S3_HEARTBEAT", "1"));
    machine.ok(&[
        "sh",
        "-ec",
        "cd /data/openclaw/workspace; echo more >> appended; echo new > rewritten; echo more >> fine;
         echo new > other; mv other replaced",
    ]);
    assert_ne!(storage(&machine)["independent"], true, "it was written to before it was fetched");
    cloud.proxy.heal();
    // The second might be built on what was there: nobody can tell. The third is not.
    let tainted = paths[..2].to_vec();
    until("both are incidents", LONG, || (incidents(&machine) == tainted).then_some(()));
    flush(&machine);
    independent(&machine);
    let content_of = |path: &str| raw.rclone.ok(&["cat", &format!("crypt:{path}")]);
    // Whatever the kernel has made of what was there.
    let appended = read(&machine, &paths[0]).expect("it is there");
    assert!(appended.starts_with(&content(&paths[0], "first")) && appended.ends_with(b"more\n"));
    let fine = [&long(&paths[3])[..], b"more\n"].concat();
    for (path, wanted) in paths.iter().zip([&appended[..], b"new\n", b"new\n", &fine]) {
        let found = content_of(path);
        assert!(found == wanted, "{path} in the bucket has {} bytes, not {}", found.len(), wanted.len());
    }
    let told = machine.exec(&["cvm", "storage", "status"]).stdout;
    assert!(contains(&told, "may be built on that"), "{}", String::from_utf8_lossy(&told));
    // Neither another version nor another worker makes that forgotten.
    machine.ok(&["sh", "-c", "echo again >> /data/openclaw/workspace/appended"]);
    flush(&machine);
    machine.ok(&["cvm", "restart", "storage"]);
    flush(&machine);
    assert_eq!(incidents(&machine), tainted);
    is_refused(&machine, &["forget", "--yes", &tainted[0]], "the tree has");
    decide(&machine, "keep", &tainted[1..]);
    flush(&machine);
    assert_eq!(incidents(&machine), tainted[..1]);
    decide(&machine, "keep", &[format!("/data/{}", tainted[0])]);
    flush(&machine);
    assert_eq!(incidents(&machine), Vec::<String>::new());
    let now = read(&machine, &paths[0]).expect("it is there");
    assert!(now == [&appended[..], b"again\n"].concat(), "it has {} bytes", now.len());
    assert_eq!(machine.stop(), 0, "{}", machine.output());
}

#[test]
fn what_was_written_on_top_of_an_older_version_is_noticed_in_the_other_mode_too() {
    let cloud = Cloud::new();
    let hasty = || cloud.machine().environment("S3_HEARTBEAT", "1");
    let mut machine = started(hasty());
    let raw = Raw::new(&cloud.garage);
    let path = "openclaw/workspace/appended";
    write(&machine, &[path], "first");
    machine.ok(&[
        "sh",
        "-ec",
        "mkdir /data/openclaw/small; cd /data/openclaw/small; for n in $(seq 300); do echo $n > $n; done",
    ]);
    flush(&machine);
    let old = raw.get(path);
    write(&machine, &[path], "later");
    flush(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    raw.put(path, &old);
    cloud.proxy.latency(Duration::from_millis(300));
    let mut machine = started(hasty());
    cloud.proxy.add(Rule::new(Fault::Hang).method("PUT"));
    machine.ok(&["sh", "-c", &format!("echo more >> /data/{path}")]);
    assert_eq!(incidents(&machine), Vec::<String>::new(), "nobody has come to it yet");
    machine.destroy();
    cloud.proxy.heal();
    let machine = machine.again(|builder| in_mode(Mode::Sync, builder));
    machine.service_in("gateway", &["ready"]);
    until("it is an incident", LONG, || (incidents(&machine) == [path]).then_some(()));
    assert!(read(&machine, path).is_some_and(|bytes| bytes.ends_with(b"more\n")));
    flush(&machine);
    assert_eq!(incidents(&machine), [path]);
    gives_the_bucket_away(&cloud, machine);
}

/// Beside a gateway that runs.
fn ordinary_objects_are_incidents(
    cloud: &Cloud,
    machine: &Machine,
    good: &BTreeMap<String, Vec<u8>>,
    expected: &[String],
) {
    let raw = Raw::new(&cloud.garage);
    until("all is detected", LONG, || (incidents(machine).len() >= expected.len()).then_some(()));
    assert_eq!(incidents(machine), expected);
    for path in expected {
        assert_eq!(read(machine, path), None, "{path} is served");
        until(&format!("the worker's log names {path}"), PATIENCE, || {
            let incident = format!("incident: {path}: ");
            machine.read("/var/log/openclaw-cvm/storage.log").contains(&incident).then_some(())
        });
        assert!(!machine.output().contains(path.as_str()), "{path} is incident in the public log");
    }
    assert_eq!(read(machine, "openclaw/workspace/removed"), None, "what was deleted is back");
    for place in PLACES {
        let path = format!("{place}/good");
        assert_eq!(read(machine, &path), Some(content(&path, "first")));
    }
    // What is bad and not given up has not been deleted, and nothing was taken for a deletion.
    independent(machine);
    flush(machine);
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw"]);
    for path in expected {
        assert!(listed.contains(path.as_str()), "{path} was taken for a deletion:\n{listed}");
    }
    for (key, bytes) in good {
        let ours = [raw.key(".cvm"), raw.key(PLACES[0])];
        assert!(
            cloud.garage.get_raw(key).is_some()
                || ours.iter().any(|k| key.starts_with(k))
                || bytes.is_empty()
                || key == &raw.key("openclaw/workspace/gone"),
            "{key} was deleted"
        );
    }
    // What is put right comes back when the storage starts again.
    let key = raw.key("openclaw/workspace/flip");
    cloud.garage.put_raw(&key, &good[&key]);
    machine.ok(&["cvm", "restart", "storage"]);
    until("what was put right is back", LONG, || {
        let path = "openclaw/workspace/flip";
        (read(machine, path) == Some(content(path, "first"))).then_some(())
    });
    flush(machine);
    until("the rest is still known", PATIENCE, || {
        (incidents(machine).len() == expected.len() - 1).then_some(())
    });
    let left = incidents(machine);
    is_refused(machine, &["keep", "--yes", &left[0]], "nothing to keep");
    let (some, others) = left.split_at(2);
    decide(machine, "forget", some);
    flush(machine);
    assert_eq!(incidents(machine), others, "only what was named is given up");
    decide(machine, "forget", others);
    flush(machine);
    assert_eq!(incidents(machine), Vec::<String>::new());
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw"]);
    assert!(
        !listed.contains("swap1") && listed.contains("workspace/good") && listed.contains("workspace/flip"),
        "{listed}"
    );
    assert!(gateway_runs(machine));
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn what_is_bad_in_the_bucket_does_not_become_good_by_being_moved() {
    let cloud = Cloud::new();
    let mut machine = started(cloud.machine());
    let raw = Raw::new(&cloud.garage);
    let at = |name: &str| format!("openclaw/workspace/{name}");
    let names = ["d/swap1", "d/swap2", "d/flip", "d/gone", "d/good", "d/sub/good"].map(at);
    write(&machine, &names.each_ref().map(String::as_str), "first");
    flush(&machine);
    independent(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    drop(machine);
    let (one, two) = (raw.get(&at("d/swap1")), raw.get(&at("d/swap2")));
    raw.put(&at("d/swap1"), &two);
    raw.put(&at("d/swap2"), &one);
    let mut bytes = raw.get(&at("d/flip"));
    bytes[HEADER + 40] ^= 1;
    raw.put(&at("d/flip"), &bytes);
    raw.delete(&at("d/gone"));

    // Nobody has read them when they are moved.
    cloud.proxy.add(Rule::new(Fault::Hang).method("GET").path(&raw.key(&at("d"))));
    let machine = started(cloud.machine());
    let there = |name: &str| machine.path(&format!("/data/{}", at(name)));
    std::fs::rename(there("d"), there("e")).expect("a directory may be moved");
    cloud.proxy.heal();
    let expected = ["d/flip", "d/gone", "d/swap1", "d/swap2"].map(at);
    until("all is detected", LONG, || (incidents(&machine).len() >= expected.len()).then_some(()));
    independent(&machine);
    flush(&machine);
    assert_eq!(incidents(&machine), expected);
    let listed = machine.ok(&["cvm", "storage", "ls", "openclaw/workspace"]);
    for name in ["swap1", "swap2", "flip", "gone"] {
        assert_eq!(read(&machine, &at(&format!("e/{name}"))), None, "{name} is served");
        assert!(!listed.contains(&format!("e/{name}")), "{name} was taken for good:\n{listed}");
        assert!(listed.contains(&format!("d/{name}")), "{name} was taken for a deletion:\n{listed}");
    }
    for name in ["good", "sub/good"] {
        let is = content(&at(&format!("d/{name}")), "first");
        assert!(read(&machine, &at(&format!("e/{name}"))) == Some(is), "{name}");
        assert!(listed.contains(&format!("e/{name}")), "{listed}");
    }
    gives_the_bucket_away(&cloud, machine);
}

/// A stop has nothing to push: whatever incidents there are, the next machine does not wait.
fn gives_the_bucket_away(cloud: &Cloud, mut machine: Machine) {
    assert_ne!(incidents(&machine), Vec::<String>::new());
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let raw = Raw::new(&cloud.garage);
    let record = raw.rclone.ok(&["cat", "crypt:.cvm/owner"]);
    assert!(contains(&record, r#""released":true"#), "{}", String::from_utf8_lossy(&record));
}

fn set_aside(machine: &Machine) -> usize {
    std::fs::read_dir(machine.data().join(".cvm/storage/aside")).map_or(0, Iterator::count)
}

/// Something that is done to the bucket behind everybody's back.
type Attack<'a> = &'a dyn Fn(&Raw<'_>);

#[test]
fn a_changed_object_is_noticed_named_and_not_served_in_fuse_mode() {
    objects_are_checked(Mode::Fuse);
}

#[test]
fn a_changed_object_is_noticed_named_and_not_served_in_sync_mode() {
    objects_are_checked(Mode::Sync);
}

#[test]
fn the_tests_have_both_modes() {
    let cloud = Cloud::new();
    for (mode, name) in [(Mode::Fuse, "fuse"), (Mode::Sync, "sync")] {
        let mut machine = started(in_mode(mode, cloud.machine()));
        assert_eq!(storage(&machine)["mode"], name, "{}", machine.output());
        write(&machine, &["openclaw/workspace/a"], "words");
        assert_eq!(machine.stop(), 0);
    }
}

// === A. The manifest ===

/// A bucket of some generations, left in order; the machine's volume too, if it is wanted.
fn history(cloud: &Cloud) -> Machine {
    let mut machine = started(cloud.machine());
    for round in 0..4 {
        write(&machine, &[&format!("openclaw/workspace/{round}")], "words");
        flush(&machine);
    }
    independent(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    machine
}

fn anchor(machine: &Machine) -> String {
    storage(machine)["anchor"].as_str().expect("a bucket with a manifest has an anchor").to_owned()
}

#[test]
fn a_bucket_that_was_rolled_back_is_refused_by_who_knows_better() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    write(&machine, &["openclaw/workspace/one"], "words");
    flush(&machine);
    independent(&machine);
    flush(&machine);
    let early = all(&cloud.garage);
    let earlier = anchor(&machine);
    write(&machine, &["openclaw/workspace/two"], "words");
    flush(&machine);
    let later = anchor(&machine);
    assert_ne!(earlier, later);
    let machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    flush(&machine);
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    // Only the newest segments go; the record of the owner stays.
    let now = all(&cloud.garage);
    let raw = Raw::new(&cloud.garage);
    let segments = raw.segments();
    let old: Vec<String> = segments.iter().filter(|s| early.contains_key(&raw.key(s))).cloned().collect();
    for segment in segments.iter().filter(|s| !old.contains(s)) {
        raw.delete(segment);
    }
    // The same volume knows its own generation.
    let machine = machine.again(|b| b);
    refused(&machine, &["older than this volume", "cvm storage accept-older"]);
    drop(machine);
    // Without a volume, the operator's anchor knows.
    let machine = cloud.machine().environment("STATE_ANCHOR", &later).start();
    refused(&machine, &["STATE_ANCHOR"]);
    accept_older(&machine);
    machine.service_in("gateway", &["ready"]);
    drop(machine);
    // As it was, both anchors are good: it is neither older than the one nor than the other.
    put_back(&cloud.garage, &now);
    for anchor in [&later, &earlier] {
        let mut machine = started(cloud.machine().environment("STATE_ANCHOR", anchor));
        independent(&machine);
        assert!(read(&machine, "openclaw/workspace/two").is_some());
        assert_eq!(machine.stop(), 0);
    }
    // Another history of the same length is none.
    for part in [1, 2] {
        let machine = cloud.machine().environment("STATE_ANCHOR", &of_another(&later, part)).start();
        refused(&machine, &["STATE_ANCHOR"]);
    }
    // Those of older versions have no third part.
    for (anchor, is_good) in [(later.clone(), true), (of_another(&later, 1), false)] {
        let (old, _) = anchor.rsplit_once(':').expect("an anchor has three parts");
        let machine = cloud.machine().environment("STATE_ANCHOR", old).start();
        if is_good {
            machine.service_in("gateway", &["ready"]);
        } else {
            refused(&machine, &["STATE_ANCHOR"]);
        }
    }
}

/// An anchor of another history, or of another state.
fn of_another(anchor: &str, part: usize) -> String {
    let mut parts: Vec<String> = anchor.split(':').map(str::to_owned).collect();
    assert_eq!(parts.len(), 3, "{anchor}");
    parts[part] = parts[part].chars().map(|c| if c == 'a' { 'b' } else { 'a' }).collect();
    parts.join(":")
}

/// The same bucket under another prefix, as somebody can have it who has no key.
fn copy_to(garage: &Garage, prefix: &str) {
    for (key, _) in garage.objects(&format!("{PREFIX}/")) {
        let object = garage.object(&key).expect("it is listed");
        garage.put_object(&key.replacen(PREFIX, prefix, 1), &object);
    }
}

#[test]
fn a_prefix_is_not_served_as_another_of_the_same_key() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let other = "other-data";
    copy_to(&cloud.garage, other);
    let elsewhere = || cloud.machine().environment("S3_PREFIX", other);
    let machine = elsewhere().start();
    refused(&machine, &["ownership record", "S3_PREFIX=openclaw-data"]);
    for verb in ["adopt", "accept-older"] {
        is_refused(&machine, &[verb, "--yes"], "not decided by this");
    }
    drop(machine);
    // Nor without the record, when nobody renews it; and no word of the environment's helps.
    let record = Raw::new(&cloud.garage).key(".cvm/owner").replacen(PREFIX, other, 1);
    cloud.garage.delete_raw(&record);
    let machine = elsewhere().environment("S3_ADOPT", "1").start();
    refused(&machine, &["the manifest in the bucket", "S3_PREFIX=openclaw-data"]);
    drop(machine);
    let said =
        restore_by_hand(&cloud, &started(cloud.machine()), &["env", &format!("S3_PREFIX={other}")], "/tmp/w");
    assert!(!said.status.success() && contains(&said.stderr, "S3_PREFIX=openclaw-data"), "{said:?}");
}

/// What an older version has left: nothing of it says of which prefix it is.
fn as_an_older_version_left_it(raw: &Raw<'_>) {
    const PROGRAM: &str = "
import gzip, hashlib, hmac, json, os, sys
top, master = sys.argv[1:]
mac = lambda key, text: hmac.new(key, text, hashlib.sha256).digest()
key = mac(mac(bytes(32), master.encode()), b'openclaw-cvm-manifest-v1\\x01')
def tag(purpose, *parts):
    return mac(key, purpose + b''.join(len(p).to_bytes(8, 'little') + p for p in parts)).hex()
dense = lambda value: json.dumps(value, separators=(',', ':')).encode()
for name in os.listdir(top + '/manifest'):
    path = top + '/manifest/' + name
    header, lines = gzip.decompress(open(path, 'rb').read().split(b'\\n', 1)[1]).split(b'\\n', 1)
    header = json.loads(header)
    del header['prefix'], header['state']
    packed = gzip.compress(dense(header) + b'\\n' + lines)
    open(path, 'wb').write(b'openclaw-cvm-manifest 1 ' + tag(b'segment', packed).encode() + b'\\n' + packed)
record = json.load(open(top + '/owner'))['record']
del record['prefix'], record['mark']
open(top + '/owner', 'wb').write(dense({'record': record, 'tag': tag(b'owner', dense(record))}))
";
    let dir = tempfile::tempdir().expect("a temporary directory");
    let top = dir.path().join("cvm").display().to_string();
    raw.rclone.ok(&["copy", "crypt:.cvm", &top]);
    python(PROGRAM, &[&top, MASTER_KEY]);
    raw.rclone.ok(&["copy", "--ignore-times", &top, "crypt:.cvm"]);
}

#[test]
fn a_manifest_that_does_not_say_of_which_prefix_it_is_is_written_anew_and_no_other_is_taken_then() {
    let cloud = Cloud::new();
    let mut volume = history(&cloud).again(|b| b);
    volume.service_in("gateway", &["ready"]);
    let anchor = anchor(&volume);
    assert_eq!(volume.stop(), 0, "{}", volume.output());
    let raw = Raw::new(&cloud.garage);
    let is_bound = || {
        let segments = raw.segments();
        let says = |name: &String| {
            raw.rclone.ok(&["cat", &format!("crypt:{name}")]).starts_with(b"openclaw-cvm-manifest 2 ")
        };
        !segments.is_empty() && segments.iter().all(says)
    };
    assert!(is_bound());
    as_an_older_version_left_it(&raw);
    let old = all(&cloud.garage);
    assert!(!is_bound());
    copy_to(&cloud.garage, "other-data");
    // This volume has seen it say so, and who has a new anchor has.
    let mut volume = volume.again(|b| b);
    refused(&volume, &["this volume knows a newer one"]);
    volume.destroy();
    refused(
        &cloud.machine().environment("STATE_ANCHOR", &anchor).start(),
        &["STATE_ANCHOR is of a newer one"],
    );
    // A new machine has only the operator to ask: nothing tells it from that of another prefix.
    let elsewhere = cloud.machine().environment("S3_PREFIX", "other-data").start();
    refused(&elsewhere, &["does not say of which S3_PREFIX it is", "cvm storage adopt"]);
    adopt(&elsewhere);
    elsewhere.service_in("gateway", &["ready"]);
    assert!(read(&elsewhere, "openclaw/workspace/1").is_some());
    drop(elsewhere);
    let machine = cloud.machine().start();
    refused(&machine, &["cvm storage adopt"]);
    adopt(&machine);
    machine.service_in("gateway", &["ready"]);
    flush(&machine);
    assert!(is_bound() && storage(&machine)["state"].is_string(), "{:#}", storage(&machine));
    assert_eq!(anchor_parts(&machine), 3);
    drop(machine);
    // A volume that an older version has left does not ask.
    put_back(&cloud.garage, &old);
    let index = volume.data().join(".cvm/storage/index");
    let index = rusqlite::Connection::open(index).expect("the index is a database");
    index.execute("DELETE FROM meta WHERE name IN ('state', 'another')", []).expect("it is not held");
    drop(index);
    let volume = volume.again(|b| b);
    volume.service_in("gateway", &["ready"]);
    assert_eq!(set_aside(&volume), 0);
    flush(&volume);
    assert!(is_bound());
    assert_eq!(anchor_parts(&volume), 3);
    let mut volume = volume;
    assert_eq!(volume.stop(), 0, "{}", volume.output());
    let machine = started(cloud.machine());
    independent(&machine);
    assert!(read(&machine, "openclaw/workspace/1").is_some());
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

fn anchor_parts(machine: &Machine) -> usize {
    anchor(machine).split(':').count()
}

#[test]
fn a_volume_that_was_rolled_back_does_not_take_the_bucket_back_with_it() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    let write = |machine: &Machine, text: &str| {
        let at = machine.path("/data/openclaw/workspace/one");
        std::fs::create_dir_all(at.parent().expect("below /data")).expect("a directory");
        std::fs::write(at, text).expect("a file");
        flush(machine);
    };
    write(&machine, "old");
    independent(&machine);
    flush(&machine);
    // Nothing changes now: a copy is what a snapshot of the disk would be.
    let copy = tempfile::tempdir().expect("a directory");
    let cp = |from: &std::path::Path, to: &std::path::Path| {
        let status = std::process::Command::new("cp").arg("-aT").arg(from).arg(to).status();
        assert!(status.expect("cp is there").success());
    };
    cp(&machine.data(), &copy.path().join("data"));
    for text in ["newer", "newer still", "new"] {
        write(&machine, text);
    }
    let machine = machine.again(|builder| {
        let data = builder.scratch().join("data");
        std::fs::remove_dir_all(&data).expect("nobody uses it");
        cp(&copy.path().join("data"), &data);
        builder
    });
    machine.service_in("gateway", &["ready"]);
    machine.line("neither merged nor pushed");
    assert_eq!(machine.read("/data/openclaw/workspace/one"), "new");
    assert_eq!(set_aside(&machine), 1);
}

#[test]
fn a_write_that_was_given_up_and_arrives_late_changes_nothing() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    write(&machine, &["openclaw/workspace/one"], "words");
    flush(&machine);
    independent(&machine);
    flush(&machine);
    let raw = Raw::new(&cloud.garage);
    let segment = raw.key(&raw.segments()[0]);
    let manifest = segment.rsplit_once('/').expect("it is in a directory").0;
    cloud.proxy.clear_log();
    cloud.proxy.add(Rule::new(Fault::Late).method("PUT").path(manifest).times(1));
    let kept = || cloud.proxy.log().into_iter().find(|entry| entry.fault == Some(Fault::Late));
    write(&machine, &["openclaw/workspace/two"], "other words");
    until("a segment is lost on its way", LONG, kept);
    // What is written in its place is not the same.
    for name in ["two", "three", "four"] {
        write(&machine, &[&format!("openclaw/workspace/{name}")], "words");
        until("it is in the bucket in spite of all", LONG, || {
            machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
        });
    }
    assert_eq!(kept().expect("a segment was written").status, None);
    cloud.proxy.heal();
    until("it has arrived", LONG, || kept().is_some_and(|e| e.status == Some(200)).then_some(()));
    drop(machine);
    let machine = started(cloud.machine());
    for name in ["one", "two", "three", "four"] {
        let path = format!("openclaw/workspace/{name}");
        until("it is fetched", LONG, || (read(&machine, &path)? == content(&path, "words")).then_some(()));
    }
    assert!(incidents(&machine).is_empty(), "{:?}", incidents(&machine));
}

#[test]
fn a_manifest_without_its_end_is_refused_by_a_machine_that_knows_nothing() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let raw = Raw::new(&cloud.garage);
    let segments = raw.segments();
    raw.delete(segments.last().expect("there is a history"));
    let machine = cloud.machine().start();
    refused(&machine, &["end of the manifest is missing", "cvm storage accept-older"]);
    // Nor does a restore by hand call what there is all there was.
    let restore = |before: &[&str]| restore_by_hand(&cloud, &machine, before, "/tmp/whole");
    for _ in 0..2 {
        let said = restore(&[]);
        let words = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(!said.status.success(), "{words}");
        let told = "end of the manifest is missing";
        assert!(words.contains(told) && words.contains("cvm storage restore --accept"), "{words}");
    }
    let said = restore(&["sh", "-c", "exec \"$@\" --accept", "sh"]);
    let words = String::from_utf8_lossy(&said.stderr).into_owned();
    assert!(said.status.success() && words.contains("is missing"), "{words}");
    assert!(machine.path("/tmp/whole/openclaw").is_dir());
    accept_older(&machine);
    machine.service_in("gateway", &["ready"]);
}

/// In a database of the machine's.
fn commit(machine: &Machine, file: &str, sql: &str) {
    machine.inside(|| {
        let db = rusqlite::Connection::open(file).expect("a database");
        db.execute_batch(sql).expect("a commit");
    });
}

fn a_database_that_was_set_back_stops_the_start(mode: Mode) {
    let cloud = Cloud::new();
    let path = "openclaw/workspace/somewhere/own.sqlite";
    let mut machine = started(in_mode(mode, cloud.machine()));
    let file = format!("/data/{path}");
    std::fs::create_dir_all(machine.path("/data/openclaw/workspace/somewhere")).expect("a directory");
    commit(&machine, &file, "CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    flush(&machine);
    let raw = Raw::new(&cloud.garage);
    let old = raw.get(path);
    commit(&machine, &file, "INSERT INTO t VALUES (2)");
    flush(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    drop(machine);
    raw.put(path, &old);
    let machine = in_mode(mode, cloud.machine()).start();
    refused(&machine, &["that the gateway reads while it starts", "cvm storage status"]);
    assert_eq!(incidents(&machine), [path]);
}

#[test]
fn a_database_that_was_set_back_keeps_the_gateway_from_starting_wherever_it_lies() {
    for mode in [Mode::Fuse, Mode::Sync] {
        a_database_that_was_set_back_stops_the_start(mode);
    }
}

/// The machine is lost, and its volume meets a bucket that is older than it.
fn meets_again(cloud: &Cloud, mut machine: Machine, early: &BTreeMap<String, Vec<u8>>) -> Machine {
    machine.destroy();
    put_back(&cloud.garage, early);
    let machine = machine.again(|b| b);
    refused(&machine, &["older than this volume"]);
    machine
}

fn an_older_bucket_is_accepted(mode: Mode) {
    let cloud = Cloud::new();
    let machine = started(in_mode(mode, cloud.machine()));
    write(&machine, &["openclaw/workspace/one", "openclaw/workspace/goes"], "early");
    flush(&machine);
    independent(&machine);
    flush(&machine);
    let early = all(&cloud.garage);
    write(&machine, &["openclaw/workspace/one", "openclaw/workspace/two"], "late");
    machine.ok(&["rm", "/data/openclaw/workspace/goes"]);
    flush(&machine);
    let machine = meets_again(&cloud, machine, &early);
    accept_older(&machine);
    machine.service_in("gateway", &["ready"]);
    // All of the one, and all of the other beside it.
    let early_one = Some(content("openclaw/workspace/one", "early"));
    assert_eq!(read(&machine, "openclaw/workspace/one"), early_one);
    assert!(read(&machine, "openclaw/workspace/goes").is_some());
    assert_eq!(read(&machine, "openclaw/workspace/two"), None);
    assert_eq!(set_aside(&machine), 1);
    let mut find = std::process::Command::new("find");
    let found = find.arg(machine.data().join(".cvm/storage/aside")).args(["-name", "two"]).output();
    let found = String::from_utf8(found.expect("find runs").stdout).expect("a path");
    let kept = std::fs::read(found.trim_end()).expect("it is there once");
    assert_eq!(kept, content("openclaw/workspace/two", "late"));
    flush(&machine);
}

#[test]
fn an_older_bucket_that_is_accepted_while_the_network_breaks_is_not_merged_either() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    for name in ["one", "two", "goes"] {
        write(&machine, &[&format!("openclaw/workspace/{name}")], "early");
        flush(&machine);
    }
    independent(&machine);
    flush(&machine);
    let early = all(&cloud.garage);
    write(&machine, &["openclaw/workspace/one", "openclaw/workspace/three"], "late");
    flush(&machine);
    let machine = meets_again(&cloud, machine, &early);
    // What comes before the last segment is read, and it is not.
    let raw = Raw::new(&cloud.garage);
    let last = raw.key(raw.segments().last().expect("there is a manifest"));
    cloud.proxy.clear_log();
    cloud.proxy.add(Rule::new(Fault::Status(503)).method("GET").path(&last));
    accept_older(&machine);
    until("a try has failed", LONG, || {
        (cloud.proxy.log().iter().filter(|entry| entry.path.contains(&last)).count() > 4).then_some(())
    });
    cloud.proxy.heal();
    machine.service_in("gateway", &["ready"]);
    assert_eq!(set_aside(&machine), 1);
    let path = "openclaw/workspace/one";
    assert!(read(&machine, path) == Some(content(path, "early")), "{path} is not the bucket's");
    assert!(read(&machine, "openclaw/workspace/three").is_none(), "two histories are one");
}

#[test]
fn an_anchor_that_was_wrong_costs_the_volume_nothing() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine().environment("S3_DRAIN_TIMEOUT", "1"));
    let file = "/data/openclaw/some.sqlite";
    let rows = |machine: &Machine| {
        machine.inside(|| {
            let db = rusqlite::Connection::open(file).expect("a database");
            db.query_row("SELECT count(*) FROM t", [], |row| row.get::<_, i64>(0)).expect("a table")
        })
    };
    commit(&machine, file, "PRAGMA journal_mode=WAL; CREATE TABLE t(x); INSERT INTO t VALUES (1)");
    flush(&machine);
    independent(&machine);
    flush(&machine);
    let anchor = anchor(&machine);
    cloud.proxy.refuse(true);
    commit(&machine, file, "INSERT INTO t VALUES (2)");
    let mut machine = machine;
    assert_eq!(machine.stop(), 75, "{}", machine.output());
    cloud.proxy.refuse(false);
    let machine = machine.again(|b| b.environment("STATE_ANCHOR", &of_another(&anchor, 1)));
    refused(&machine, &["STATE_ANCHOR"]);
    let machine = machine.again(|b| b.environment("STATE_ANCHOR", &anchor));
    machine.service_in("gateway", &["ready"]);
    assert_eq!(rows(&machine), 2);
    assert_eq!(set_aside(&machine), 0);
    flush(&machine);
}

#[test]
fn an_older_bucket_that_is_accepted_is_not_merged_with_the_volume_in_fuse_mode() {
    an_older_bucket_is_accepted(Mode::Fuse);
}

#[test]
fn an_older_bucket_that_is_accepted_is_not_merged_with_the_volume_in_sync_mode() {
    an_older_bucket_is_accepted(Mode::Sync);
}

#[test]
fn a_manifest_that_was_tampered_with_is_refused_until_the_operator_accepts() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let good = all(&cloud.garage);
    let raw = Raw::new(&cloud.garage);
    let segments = raw.segments();
    assert!(segments.len() > 5, "{segments:?}");
    let middle = segments.len() / 2;
    let forge = |raw: &Raw<'_>| {
        let mut bytes = raw.get(&segments[middle]);
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        raw.put(&segments[middle], &bytes);
    };
    let swap = |raw: &Raw<'_>| {
        let (a, b) = (raw.get(&segments[middle]), raw.get(&segments[middle + 1]));
        raw.put(&segments[middle], &b);
        raw.put(&segments[middle + 1], &a);
    };
    let hole = |raw: &Raw<'_>| raw.delete(&segments[middle]);
    let first = |raw: &Raw<'_>| raw.delete(&segments[0]);
    let attacks: [(&str, Attack<'_>, &str); 4] = [
        ("forged", &forge, "does not decrypt"),
        ("swapped", &swap, "swapped"),
        ("with a hole", &hole, "gap"),
        ("without a beginning", &first, "gap"),
    ];
    for (name, attack, words) in attacks {
        put_back(&cloud.garage, &good);
        attack(&raw);
        let machine = cloud.machine().start();
        refused(&machine, &[words]);
        accept_older(&machine);
        machine.service_in("gateway", &["ready"]);
        write(&machine, &["openclaw/workspace/after"], name);
        flush(&machine);
        let mut machine = machine;
        assert_eq!(machine.stop(), 0);
        // What was accepted is a history like any other.
        let mut machine = started(cloud.machine());
        independent(&machine);
        assert_eq!(
            read(&machine, "openclaw/workspace/after"),
            Some(content("openclaw/workspace/after", name))
        );
        assert_eq!(machine.stop(), 0);
    }
}

#[test]
fn an_operator_accepts_what_was_shown_and_nothing_else() {
    let cloud = Cloud::new();
    let vital = format!("{}/vital", PLACES[0]);
    let mut machine = started(cloud.machine());
    write(&machine, &[&vital], "first");
    flush(&machine);
    write(&machine, &["openclaw/workspace/later"], "first");
    flush(&machine);
    independent(&machine);
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let raw = Raw::new(&cloud.garage);
    let last = raw.segments().pop().expect("there is a manifest");
    let mut bytes = raw.get(&last);
    *bytes.last_mut().expect("it is not empty") ^= 1;
    raw.put(&last, &bytes);
    raw.delete(&vital);
    let machine = cloud.machine().start();
    refused(&machine, &["does not decrypt"]);
    assert_eq!(incidents(&machine), Vec::<String>::new());
    // Not what is there now.
    let mut stream =
        std::os::unix::net::UnixStream::connect(machine.path(cvm_protocol::paths::STORAGE_SOCKET))
            .expect("the worker listens");
    writeln!(stream, r#"{{"v":1,"verb":"accept-older","seen":"something else"}}"#).expect("it reads");
    let said = std::io::read_to_string(&stream).expect("it answers");
    assert!(said.contains("refused") && said.contains("look at it again"), "{said}");
    accept_older(&machine);
    refused(&machine, &["1 files that the gateway reads while it starts"]);
    assert_eq!(incidents(&machine), [vital.as_str()]);
    decide(&machine, "forget", std::slice::from_ref(&vital));
    machine.service_in("gateway", &["ready"]);
    assert_eq!(read(&machine, &vital), None);
}

#[test]
fn what_was_accepted_is_not_that_the_manifest_has_lost_its_end_meanwhile() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let raw = Raw::new(&cloud.garage);
    let owner = raw.get(".cvm/owner");
    let segments = raw.segments();
    // Something is accepted before the manifest is read.
    let mut damaged = owner.clone();
    damaged[40] ^= 1;
    raw.put(".cvm/owner", &damaged);
    let machine = cloud.machine().start();
    refused(&machine, &[".cvm/owner"]);
    raw.put(".cvm/owner", &owner);
    raw.delete(segments.last().expect("there is a history"));
    accept_older(&machine);
    refused(&machine, &["end of the manifest is missing"]);
}

#[test]
fn objects_without_their_manifest_are_not_adopted_by_who_knows_of_one() {
    let cloud = Cloud::new();
    let machine = history(&cloud);
    let good = all(&cloud.garage);
    let raw = Raw::new(&cloud.garage);
    let ours = raw.key(".cvm");
    let volume = machine;
    let without = |what: &str| {
        put_back(&cloud.garage, &good);
        for key in good.keys().filter(|k| k.starts_with(what)) {
            cloud.garage.delete_raw(key);
        }
    };
    // Everything of ours: the volume knows, and so does the operator.
    without(&ours);
    let machine = volume.again(|b| b);
    refused(&machine, &["nothing of what this volume has written"]);
    drop(machine);
    let machine = cloud.machine().environment("STATE_ANCHOR", &format!("1:{}", "a".repeat(64))).start();
    refused(&machine, &["STATE_ANCHOR"]);
    drop(machine);
    // Only the manifest: the owner's record says that there was one.
    without(&raw.key(".cvm/manifest"));
    let before = all(&cloud.garage);
    let machine = cloud.machine().start();
    refused(&machine, &["manifest is gone", "cvm storage adopt"]);
    assert_eq!(before, all(&cloud.garage));
    is_refused(&machine, &["accept-older", "--yes"], "not decided by this");
    adopt(&machine);
    machine.service_in("gateway", &["ready"]);
    assert!(read(&machine, "openclaw/workspace/1").is_some());
    drop(machine);
    // Nothing is known to anybody: only the operator can say whose it is.
    without(&ours);
    let before = all(&cloud.garage);
    let machine = cloud.machine().start();
    refused(&machine, &["no manifest", "cvm storage adopt", "S3_ADOPT=1"]);
    assert_eq!(before, all(&cloud.garage));
    adopt(&machine);
    machine.service_in("gateway", &["ready"]);
    machine.line("The bucket has no manifest");
    assert!(read(&machine, "openclaw/workspace/1").is_some());
    drop(machine);
    // Or whoever has written the environment, as often as it is read.
    without(&ours);
    let machine = started(cloud.machine().environment("S3_ADOPT", "1"));
    assert!(read(&machine, "openclaw/workspace/1").is_some());
    machine.line("Open door: S3_ADOPT=1: a bucket that nobody can check is taken over");
}

#[test]
fn a_boot_that_fails_after_it_has_taken_the_bucket_keeps_what_is_only_on_the_volume() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine().environment("S3_DRAIN_TIMEOUT", "1"));
    write(&machine, &["openclaw/workspace/a"], "pushed");
    flush(&machine);
    independent(&machine);
    cloud.proxy.refuse(true);
    write(&machine, &["openclaw/workspace/b"], "only here");
    let mut machine = machine;
    assert_eq!(machine.stop(), 75, "{}", machine.output());
    cloud.proxy.refuse(false);
    // The record is written, and what follows fails.
    let owner = Raw::new(&cloud.garage).key(".cvm/owner");
    cloud.proxy.clear_log();
    cloud.proxy.add(Rule::new(Fault::Status(503)).method("PUT").path(&owner).every(2).times(3));
    let machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    let writes = cloud.proxy.log().iter().filter(|e| e.method == "PUT" && e.path.contains(&owner)).count();
    assert!(writes > 6, "the boot has not failed: {writes} writes");
    assert_eq!(set_aside(&machine), 0);
    let path = "openclaw/workspace/b";
    assert_eq!(read(&machine, path), Some(content(path, "only here")));
    flush(&machine);
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn an_ownership_record_that_was_rolled_back_or_deleted_is_noticed() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    write(&machine, &["openclaw/workspace/a"], "words");
    flush(&machine);
    let raw = Raw::new(&cloud.garage);
    let early = raw.get(".cvm/owner");
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    let mut machine = machine.again(|b| b);
    machine.service_in("gateway", &["ready"]);
    write(&machine, &["openclaw/workspace/b"], "words");
    flush(&machine);
    let late = epoch(&machine);
    assert_eq!(machine.stop(), 0);
    // Older than the manifest: a new machine sees it too.
    raw.put(".cvm/owner", &early);
    let other = cloud.machine().start();
    refused(&other, &["ownership record is older"]);
    drop(other);
    let machine = machine.again(|b| b);
    refused(&machine, &["ownership record is older"]);
    // Damaged: nobody's, until the operator accepts.
    let mut bytes = early.clone();
    bytes[40] ^= 1;
    raw.put(".cvm/owner", &bytes);
    drop(machine);
    let machine = cloud.machine().start();
    refused(&machine, &[".cvm/owner"]);
    accept_older(&machine);
    machine.service_in("gateway", &["ready"]);
    assert!(epoch(&machine) > late);
    write(&machine, &["openclaw/workspace/c"], "words");
    flush(&machine);
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    // Deleted: as good as held, for as long as somebody may be there.
    raw.delete(".cvm/owner");
    let machine = cloud.machine().environment("S3_HEARTBEAT", "3").start();
    says(&machine, "waiting", &["vanished"]);
    machine.service_in("gateway", &["ready"]);
    assert!(epoch(&machine) > late + 1);
}

// === B. Fail closed ===

/// Starts nothing, changes nothing, and says why and what to do.
#[track_caller]
fn closed(cloud: &Cloud, builder: Builder, phase: &str, words: &[&str]) -> Machine {
    let before = all(&cloud.garage);
    let machine = builder.start();
    says(&machine, phase, words);
    stays_out(&machine);
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
    drop(closed(
        &cloud,
        wrong("MASTER_KEY", "KqULR8kjQt3aHcy3dOUOSX11ljLbLDqLhrManXN/gVE="),
        "refused",
        &["none of their names decrypts", "use the MASTER_KEY"],
    ));
    // Right names and contents, and a manifest that is somebody else's.
    let override_ = |b: Builder| {
        b.environment("RCLONE_CRYPT_PASSWORD", &cvm_harness::tools::obscure(PASSWORD))
            .environment("RCLONE_CRYPT_PASSWORD2", &cvm_harness::tools::obscure(SALT))
    };
    drop(closed(
        &cloud,
        override_(wrong("MASTER_KEY", "KqULR8kjQt3aHcy3dOUOSX11ljLbLDqLhrManXN/gVE=")),
        "refused",
        &["MASTER_KEY"],
    ));
    // And the key may be overridden with what it derives anyway.
    let mut machine = started(override_(cloud.machine()));
    assert_eq!(machine.stop(), 0);
    // A prefix of somebody else's.
    cloud.garage.put_raw("elsewhere/a", b"not ours");
    cloud.garage.put_raw("elsewhere/b/c", b"not ours either");
    drop(closed(&cloud, wrong("S3_PREFIX", "elsewhere"), "refused", &["none of their names decrypts"]));
}

#[test]
fn what_can_get_better_starts_the_gateway_when_it_does() {
    let cloud = Cloud::new();
    drop(history(&cloud));
    let machine = closed(
        &cloud,
        cloud.machine().environment("S3_BUCKET", "not-there-yet"),
        "opening",
        &["no bucket of this name", "create the bucket"],
    );
    cloud.garage.new_bucket("not-there-yet");
    until("the gateway runs on the new bucket", LONG, || gateway_runs(&machine).then_some(()));
    drop(machine);

    cloud.garage.deny();
    let machine = cloud.machine().start();
    says(&machine, "opening", &["denies access", "AWS_ACCESS_KEY_ID"]);
    machine.line("denies access");
    stays_out(&machine);
    cloud.garage.allow();
    until("the gateway runs with the permission", LONG, || gateway_runs(&machine).then_some(()));
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);

    drop(closed(
        &cloud,
        cloud.machine().environment("AWS_SECRET_ACCESS_KEY", &"deadbeef".repeat(8)),
        "opening",
        &["denies access", "AWS_SECRET_ACCESS_KEY"],
    ));

    cloud.proxy.refuse(true);
    let machine = closed(&cloud, cloud.machine(), "opening", &["connection is refused", "S3_ENDPOINT"]);
    cloud.proxy.heal();
    until("the gateway runs with the network", LONG, || gateway_runs(&machine).then_some(()));
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);

    cloud.proxy.fault(Fault::Hang);
    let machine = closed(&cloud, cloud.machine(), "opening", &["no answer in time", "S3_ENDPOINT"]);
    cloud.proxy.heal();
    until("the gateway runs with an answer", LONG, || gateway_runs(&machine).then_some(()));
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
    let why = says(&machine, "opening", &["no trusted connection"]);
    assert!(why.contains("certificate"), "{why}");
    machine.line("no trusted connection");
    stays_out(&machine);
    let _ = server.kill();
    let _ = server.wait();
}

// === C. Outages ===

fn gateway_pid(machine: &Machine) -> i64 {
    machine.service("gateway")["pid"].as_i64().unwrap_or_default()
}

/// Kilobytes of memory that are the worker's alone or shared with its binary.
fn resident(machine: &Machine) -> u64 {
    let worker = machine.find("cvm-storage").expect("the worker runs");
    let text = machine.read(&format!("/proc/{}/status", worker.pid));
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).expect("a process has a size");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[test]
fn the_gateway_does_not_notice_an_outage_and_nothing_is_lost_by_it() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    independent(&machine);
    flush(&machine);
    let pid = gateway_pid(&machine);
    let faults = [
        Fault::Reset,
        Fault::Hang,
        Fault::Status(403),
        Fault::Status(429),
        Fault::Status(503),
        Fault::HalfRequest,
        Fault::HalfResponse,
        Fault::NoResponse,
    ];
    for (round, fault) in faults.iter().map(Some).chain([None]).enumerate() {
        let path = format!("openclaw/workspace/{round}");
        match fault {
            Some(fault) => cloud.proxy.fault(*fault),
            None => cloud.proxy.refuse(true),
        }
        write(&machine, &[&path], "written meanwhile");
        until(&format!("{fault:?} is seen"), LONG, || {
            let status = storage(&machine);
            let waits = status["oldest_unreplicated_ms"].as_u64().is_some_and(|ms| ms > 1500);
            (waits && status["pending_files"].as_u64() > Some(0) && status["phase"] == "ready").then_some(())
        });
        cloud.proxy.heal();
        until(&format!("after {fault:?} all is pushed"), LONG, || {
            let status = storage(&machine);
            (status["pending_files"] == 0 && status["oldest_unreplicated_ms"].is_null()).then_some(())
        });
        assert_eq!(gateway_pid(&machine), pid, "the gateway has noticed {fault:?}");
    }
    // One of twenty, for as long as a hundred files take.
    cloud.proxy.add(Rule::new(Fault::Status(503)).some(50, 1));
    for n in 0..100 {
        write(&machine, &[&format!("openclaw/workspace/many/{n}")], "one of many");
    }
    until("a hundred files arrive in spite of it", LONG, || {
        machine.exec(&["cvm", "storage", "flush"]).status.success().then_some(())
    });
    cloud.proxy.heal();
    assert!(resident(&machine) < 400 * 1024, "{} kB", resident(&machine));
    let before = tree(&machine);
    assert_eq!(incidents(&machine), Vec::<String>::new());
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    let machine = started(cloud.machine());
    independent(&machine);
    assert_eq!(tree(&machine), before);
}

#[test]
fn a_review_of_the_bucket_holds_up_no_push_and_takes_none_for_a_fault() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    let raw = Raw::new(&cloud.garage);
    let path = "openclaw/workspace/changing";
    write(&machine, &[path], "first");
    flush(&machine);
    independent(&machine);
    let before = raw.get(path);
    cloud.proxy.clear_log();
    // The drill reads files, and a push asks only whether the bucket is still its own.
    let slow = Rule::new(Fault::Latency(Duration::from_secs(8))).method("GET").path(&raw.key("openclaw"));
    cloud.proxy.add(slow);
    let mut drill = machine.command(&["cvm", "storage", "drill"]).spawn().expect("nsenter runs");
    let verb = || Some(()).filter(|()| cloud.proxy.log().iter().any(|e| e.method == "GET"));
    until("the drill has asked for something", PATIENCE, verb);
    write(&machine, &[path], "second");
    until("what was written meanwhile is in the bucket", PATIENCE, || {
        (raw.get(path) != before).then_some(())
    });
    assert!(drill.try_wait().expect("it is our child").is_none(), "the push waited for the drill");
    let other = machine.exec(&["cvm", "storage", "verify"]);
    assert!(!other.status.success(), "two reviews at once");
    cloud.proxy.heal();
    assert!(
        drill.wait().expect("it is our child").success(),
        "{}",
        machine.read("/var/log/openclaw-cvm/storage.log")
    );
    assert_eq!(incidents(&machine), Vec::<String>::new());
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn damage_in_the_bucket_is_mended_from_the_tree_and_an_outage_is_none() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    let raw = Raw::new(&cloud.garage);
    let [flip, gone] = ["openclaw/workspace/flip", "openclaw/workspace/gone"];
    write(&machine, &[flip, gone], "words");
    independent(&machine);
    flush(&machine);
    cloud.proxy.add(Rule::new(Fault::Status(503)).method("GET").path(&raw.key("openclaw")));
    assert!(!machine.exec(&["cvm", "storage", "drill"]).status.success());
    assert_eq!(incidents(&machine), Vec::<String>::new(), "an outage is no damage");
    cloud.proxy.heal();

    let mut bytes = raw.get(flip);
    bytes[BLOCK] ^= 1;
    raw.put(flip, &bytes);
    assert!(!machine.exec(&["cvm", "storage", "drill"]).status.success());
    until("it is sent again", PATIENCE, || (raw.get(flip) != bytes).then_some(()));
    until("the incident is over", PATIENCE, || incidents(&machine).is_empty().then_some(()));
    let log = machine.read("/var/log/openclaw-cvm/storage.log");
    assert!(log.contains(&format!("incident: {flip}: a restore drill found")), "{log}");

    raw.delete(gone);
    assert!(!machine.exec(&["cvm", "storage", "verify"]).status.success());
    let key = raw.key(gone);
    until("it is there again", PATIENCE, || cloud.garage.get_raw(&key).map(drop));
    flush(&machine);
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn a_server_that_is_overrun_for_a_moment_fails_no_flush() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
    flush(&machine);
    let raw = Raw::new(&cloud.garage);
    for (name, status) in [("a", 503), ("b", 429), ("c", 503)] {
        let path = format!("openclaw/workspace/{name}");
        let rule = Rule::new(Fault::Status(status)).method("PUT").path(&raw.key(&path)).times(1);
        cloud.proxy.add(rule);
        write(&machine, &[&path], "words");
    }
    flush(&machine);
    let told = cloud.proxy.log().iter().filter(|entry| entry.fault.is_some()).count();
    assert!(told >= 3, "only {told} were told so");
}

/// Uploads in parts from 5 MiB on, with a provider whose parts rclone would compare by `ETag`.
fn in_parts(builder: Builder) -> Builder {
    let worker = "/usr/local/lib/openclaw-cvm/cvm-storage";
    let script = "#!/bin/sh\nexport RCLONE_S3_UPLOAD_CUTOFF=5M RCLONE_S3_CHUNK_SIZE=5M\nexec /opt/cvm-storage \"$@\"\n";
    let builder = builder.unbind(worker).bind(&binary("cvm-storage"), "/opt/cvm-storage");
    builder.file(worker, script, 0o755).environment("S3_PROVIDER", "Minio")
}

/// As with SSE-KMS. Neither an object nor its earlier version is lost by it, and it costs no request more.
#[test]
fn nothing_is_lost_where_the_tags_of_objects_are_no_md5() {
    let cloud = Cloud::new();
    let machine = started(in_parts(cloud.machine()));
    flush(&machine);
    let raw = Raw::new(&cloud.garage);
    let (small, large) = ("openclaw/workspace/small", "openclaw/workspace/large");
    let keys = raw.keys([small, large]);
    // A server need not say why.
    for (version, says_so) in [("first", true), ("second", true), ("third", false)] {
        cloud.proxy.foreign_etags(says_so);
        cloud.proxy.clear_log();
        write(&machine, &[small], version);
        let content: Vec<u8> = version.bytes().cycle().take(12 << 20).collect();
        std::fs::write(machine.path(&format!("/data/{large}")), content).expect("a file");
        let flushed = machine.exec(&["cvm", "storage", "flush"]);
        for key in &keys {
            assert!(cloud.garage.get_raw(key).is_some(), "{key} is gone after the {version} version");
        }
        assert!(flushed.status.success(), "the {version} version: {flushed:?}");
        // Sent, and not asked for again; and the store can tell what arrives by the head.
        let log = cloud.proxy.log();
        let about = |key: &str| log.iter().filter(|e| e.path.contains(key)).collect::<Vec<_>>();
        let [one, parts] = keys.each_ref().map(|key| about(key));
        assert!(one.iter().all(|e| e.method == "PUT" && e.has_md5), "{one:?}");
        assert!(parts.iter().all(|e| e.method == "POST" || e.method == "PUT" && e.has_md5), "{parts:?}");
        assert!(parts.iter().any(|e| e.method == "POST"), "it was not sent in parts: {parts:?}");
    }
    machine.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn retries_are_few() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine().environment("S3_HEARTBEAT", "60"));
    flush(&machine);
    cloud.proxy.fault(Fault::Status(503));
    cloud.proxy.clear_log();
    let began = Instant::now();
    write(&machine, &["openclaw/workspace/a"], "words");
    until("three tries have failed", LONG, || {
        (storage(&machine)["retry_in_ms"].as_u64() > Some(5000)).then_some(())
    });
    let (requests, seconds) = (cloud.proxy.log().len() as u64, began.elapsed().as_secs());
    // Waits of 2, 4 and 8 s, and a few requests for each try.
    assert!(seconds >= 5, "three tries took {seconds} s");
    assert!(requests < 60, "{requests} requests in {seconds} s");
}

// === D. One writer ===

/// Another machine on the same bucket, in a network of its own.
struct Elsewhere {
    network: Network,
    proxy: Proxy,
}

impl Elsewhere {
    fn new(cloud: &Cloud) -> Self {
        let network = Network::new();
        let proxy = Proxy::start_in(&network, cloud.garage.address());
        Self { network, proxy }
    }

    fn machine(&self, cloud: &Cloud) -> Builder {
        Builder::product().fake_gateway(HEALTHY).s3(&self.network, &self.proxy.endpoint(), &cloud.garage)
    }
}

/// Two machines of one network differ by the port of their sshd.
fn two_at_once(conditional: bool) {
    let cloud = Cloud::new();
    cloud.proxy.conditional_puts(conditional.then(|| cloud.garage.s3()));
    // Both have read that there is no record before either of them writes one.
    cloud.proxy.add(Rule::new(Fault::Latency(Duration::from_millis(1500))).method("PUT").times(2));
    let two = cloud.machine().environment("SSH_PORT", "2222");
    let (mut one, mut two) = (cloud.machine().start(), two.start());
    until("one of them runs its gateway", LONG, || (gateway_runs(&one) || gateway_runs(&two)).then_some(()));
    if gateway_runs(&two) {
        std::mem::swap(&mut one, &mut two);
    }
    let why = says(&two, "waiting", &["owns the bucket", "cvm storage takeover"]);
    let owner = storage(&one)["instance"].as_str().expect("an owner has a name").to_owned();
    assert!(why.contains(&owner[..8]), "{why}");
    write(&one, &["openclaw/workspace/a"], "words");
    flush(&one);
    assert!(gateway_runs(&one) && !gateway_runs(&two));
    let first = epoch(&one);
    // Lost: succeeded after three beats.
    one.destroy();
    two.service_in("gateway", &["ready"]);
    assert!(epoch(&two) > first);
    assert!(read(&two, "openclaw/workspace/a").is_some());
    // Stopped in order: succeeded without waiting for anything.
    independent(&two);
    let slow = cloud.machine().environment("S3_HEARTBEAT", "60").start();
    says(&slow, "waiting", &["owns the bucket"]);
    assert_eq!(two.stop(), 0);
    slow.service_in("gateway", &["ready"]);
    assert!(read(&slow, "openclaw/workspace/a").is_some());
}

#[test]
fn of_two_that_start_at_once_one_runs_where_writes_have_conditions() {
    two_at_once(true);
}

#[test]
fn of_two_that_start_at_once_one_runs_where_writes_have_none() {
    two_at_once(false);
}

#[test]
fn an_impatient_machine_counts_the_beats_of_the_owner() {
    let cloud = Cloud::new();
    let elsewhere = Elsewhere::new(&cloud);
    let owner = started(cloud.machine().environment("S3_HEARTBEAT", "60"));
    flush(&owner);
    let other = elsewhere.machine(&cloud).environment("S3_HEARTBEAT", "1").start();
    let why = says(&other, "waiting", &["180 s"]);
    assert!(why.contains("takeover"), "{why}");
    // By force, and the owner finds out before anything of its successor's is at stake.
    other.ok(&["cvm", "storage", "takeover", "--yes"]);
    other.service_in("gateway", &["ready"]);
    write(&owner, &["openclaw/workspace/late"], "too late");
    says(&owner, "waiting", &["owns the bucket"]);
    until("the old owner's gateway is stopped", PATIENCE, || (!gateway_runs(&owner)).then_some(()));
    write(&other, &["openclaw/workspace/mine"], "words");
    flush(&other);
    independent(&other);
    assert_eq!(read(&other, "openclaw/workspace/late"), None);
}

#[test]
fn an_owner_with_a_successor_stops_its_gateway_although_its_push_hangs() {
    let cloud = Cloud::new();
    let elsewhere = Elsewhere::new(&cloud);
    // A beat of the owner's must not undo the takeover.
    for proxy in [&cloud.proxy, &elsewhere.proxy] {
        proxy.conditional_puts(Some(cloud.garage.s3()));
    }
    let owner = started(cloud.machine().environment("S3_HEARTBEAT", "2"));
    independent(&owner);
    flush(&owner);
    let stuck = "openclaw/workspace/stuck";
    let key = Raw::new(&cloud.garage).key(stuck);
    cloud.proxy.add(Rule::new(Fault::Hang).method("PUT").path(&key));
    write(&owner, &[stuck], "words");
    until("its push hangs", PATIENCE, || {
        storage(&owner)["oldest_unreplicated_ms"].as_u64().filter(|ms| *ms > 1500).map(drop)
    });
    let other = elsewhere.machine(&cloud).environment("S3_HEARTBEAT", "2").start();
    says(&other, "waiting", &["owns the bucket"]);
    other.ok(&["cvm", "storage", "takeover", "--yes"]);
    until("the old owner's gateway is stopped", PATIENCE, || (!gateway_runs(&owner)).then_some(()));
    let status = storage(&owner);
    assert_eq!((&status["phase"], &status["last_error"]), (&"fenced".into(), &serde_json::Value::Null));
    cloud.proxy.heal();
    other.service_in("gateway", &["ready"]);
    says(&owner, "waiting", &["owns the bucket"]);
}

/// Every process of a machine, process 1 last when it is frozen and first when it goes on.
fn freeze(machine: &Machine, signal: &str) {
    for process in machine.processes() {
        if process.pid != 1 {
            machine.kill(process.pid.into(), signal);
        }
    }
}

fn a_frozen_owner(mode: Mode, pushes: bool) {
    let cloud = Cloud::new();
    let elsewhere = Elsewhere::new(&cloud);
    let old = started(in_mode(mode, cloud.machine()));
    old.ok(&["sh", "-c", "mkdir -m 711 /data/openclaw/empty && ln -s empty /data/openclaw/link"]);
    write(&old, &["openclaw/workspace/a"], "words");
    flush(&old);
    independent(&old);
    flush(&old);
    if pushes {
        cloud.proxy.latency(Duration::from_millis(100));
        cloud.proxy.clear_log();
        let many: Vec<String> = (0..300).map(|n| format!("openclaw/workspace/many/{n}")).collect();
        write(&old, &many.iter().map(String::as_str).collect::<Vec<_>>(), "half");
        let in_the_middle = || cloud.proxy.log().iter().filter(|e| e.method == "PUT").count() > 60;
        until("it is in the middle of a push", PATIENCE, || in_the_middle().then_some(()));
    }
    freeze(&old, "STOP");
    let new = started(in_mode(mode, elsewhere.machine(&cloud)));
    independent(&new);
    write(&new, &["openclaw/workspace/a"], "the new owner's");
    flush(&new);
    // Written while nobody looked: it belongs to nobody's history.
    write(&old, &["openclaw/workspace/a", "openclaw/workspace/frozen"], "the old owner's");
    cloud.proxy.clear_log();
    freeze(&old, "CONT");
    says(&old, "waiting", &["owns the bucket"]);
    let writes = cloud.proxy.log().iter().filter(|e| e.method != "GET" && e.method != "HEAD").count();
    // What a thread had been told that it may write when it was frozen, nobody can take back.
    let told = if pushes { 16 } else { 0 };
    assert!(writes <= told, "{writes} writes without asking");
    until("the old owner's gateway is stopped", PATIENCE, || (!gateway_runs(&old)).then_some(()));
    new.ok(&["cvm", "storage", "verify", "--deep"]);
    let before = tree(&new);
    let mut new = new;
    assert_eq!(new.stop(), 0, "{}", new.output());
    // The old owner comes after it: its volume is set aside, and it goes on with the bucket's.
    old.service_in("gateway", &["ready"]);
    old.line("neither merged nor pushed");
    independent(&old);
    assert_eq!(read(&old, "openclaw/workspace/a"), Some(content("openclaw/workspace/a", "the new owner's")));
    assert_eq!(read(&old, "openclaw/workspace/frozen"), None);
    assert_eq!(tree(&old), before);
    // The find of a path that is only there in one of the modes ends with an error.
    let aside = old.exec(&[
        "find",
        "/run/openclaw-cvm/volume/.cvm",
        "/data/.cvm",
        "-path",
        "*aside*",
        "-name",
        "frozen",
    ]);
    assert!(String::from_utf8_lossy(&aside.stdout).contains("frozen"), "what was set aside is there");
}

#[test]
fn a_volume_of_an_earlier_owner_is_not_merged_when_the_record_of_the_later_one_is_gone() {
    let cloud = Cloud::new();
    let elsewhere = Elsewhere::new(&cloud);
    let beat = |builder: Builder| builder.environment("S3_HEARTBEAT", "1");
    let mut old = started(beat(cloud.machine()));
    write(&old, &["openclaw/workspace/a", "openclaw/workspace/goes"], "words");
    flush(&old);
    independent(&old);
    flush(&old);
    old.destroy();
    let mut new = started(beat(elsewhere.machine(&cloud)));
    independent(&new);
    write(&new, &["openclaw/workspace/a", "openclaw/workspace/b"], "the new owner's");
    new.ok(&["rm", "/data/openclaw/workspace/goes"]);
    flush(&new);
    assert_eq!(new.stop(), 0, "{}", new.output());
    Raw::new(&cloud.garage).delete(".cvm/owner");
    let old = old.again(|b| b);
    old.service_in("gateway", &["ready"]);
    independent(&old);
    for name in ["a", "b"] {
        let path = format!("openclaw/workspace/{name}");
        assert!(read(&old, &path) == Some(content(&path, "the new owner's")), "{path} is older");
    }
    assert!(read(&old, "openclaw/workspace/goes").is_none(), "it has come back");
    assert_eq!(set_aside(&old), 1);
    flush(&old);
    old.ok(&["cvm", "storage", "verify", "--deep"]);
}

#[test]
fn an_owner_that_was_frozen_stops_when_it_finds_its_successor_in_fuse_mode() {
    a_frozen_owner(Mode::Fuse, false);
}

#[test]
fn an_owner_that_was_frozen_in_the_middle_of_a_push_writes_nothing_more() {
    a_frozen_owner(Mode::Fuse, true);
}

#[test]
fn an_owner_that_was_frozen_stops_when_it_finds_its_successor_in_sync_mode() {
    a_frozen_owner(Mode::Sync, false);
}

fn local_volume(cloud: &Cloud) -> Builder {
    // What a machine in local mode leaves behind.
    let builder = cloud.machine();
    let at = builder.scratch().join("data/openclaw/workspace");
    std::fs::create_dir_all(&at).expect("a directory");
    std::fs::write(at.join("local"), "of the volume").expect("a file");
    builder
}

#[test]
fn a_local_volume_goes_into_an_empty_bucket_and_never_into_another() {
    let cloud = Cloud::new();
    let mut machine = started(local_volume(&cloud));
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the volume");
    flush(&machine);
    assert_eq!(machine.stop(), 0);
    let mut machine = started(cloud.machine());
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the volume");
    machine.ok(&["sh", "-c", "echo of the bucket > /data/openclaw/workspace/local"]);
    flush(&machine);
    assert_eq!(machine.stop(), 0);
    let machine = started(local_volume(&cloud));
    machine.line("neither merged nor pushed");
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the bucket\n");
}

#[test]
fn a_volume_that_has_not_written_yet_is_no_stranger_to_its_own_record() {
    let cloud = Cloud::new();
    // The record of ownership arrives, and nothing after it.
    cloud.proxy.conditional_puts(Some(cloud.garage.s3()));
    let machine = local_volume(&cloud).start();
    until("the record is there", LONG, || {
        let there = !cloud.garage.objects("").is_empty();
        if there {
            cloud.proxy.refuse(true);
        }
        there.then_some(())
    });
    let raw = Raw::new(&cloud.garage);
    let machine = machine.again(|b| b);
    for segment in raw.segments() {
        raw.delete(&segment);
    }
    cloud.proxy.heal();
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the volume");
}

#[test]
fn a_crash_before_the_first_answer_makes_the_volume_no_stranger() {
    let cloud = Cloud::new();
    let raw = Raw::new(&cloud.garage);
    let segment = raw.key(".cvm/manifest/any");
    let manifest = segment.rsplit_once('/').expect("it is in a directory").0;
    cloud.proxy.add(Rule::new(Fault::NoResponse).method("PUT").path(manifest));
    let machine = local_volume(&cloud).start();
    until("the first segment has arrived", LONG, || (!raw.segments().is_empty()).then_some(()));
    let machine = machine.again(|b| b);
    cloud.proxy.heal();
    machine.service_in("gateway", &["ready"]);
    assert_eq!(machine.read("/data/openclaw/workspace/local"), "of the volume");
    assert_eq!(set_aside(&machine), 0);
    flush(&machine);
    assert_eq!(incidents(&machine), [""; 0]);
}

// === E. Secrets ===

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
        ("the crypt password", PASSWORD.as_bytes().to_vec()),
        ("the crypt salt", SALT.as_bytes().to_vec()),
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
    let machine = started(noisy());
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
        until("another one has the tree", LONG, || {
            machine.exec(&["cvm", "start", "storage", "--no-wait"]);
            let other = machine.find("lib/openclaw-cvm/cvm-storage").is_some_and(|p| p.pid != pid);
            (other && storage(&machine)["phase"] == "ready").then_some(())
        });
        tells_nothing(&machine, since, &secrets);
    }
    let mut machine = machine;
    until("all is pushed", LONG, || {
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
    let mut machine = started(in_mode(Mode::Sync, noisy()));
    cloud.proxy.fault(Fault::HalfResponse);
    write(&machine, &["openclaw/workspace/c"], "words");
    let _ = machine.exec(&["cvm", "storage", "flush"]);
    let _ = machine.exec(&["cvm", "storage", "drill"]);
    tells_nothing(&machine, since, &secrets);
    cloud.proxy.heal();
    assert_eq!(machine.stop(), 0);
    let obscured = ["another password", SALT].map(cvm_harness::tools::obscure);
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
        says(&machine, phase, &[]);
        tells_nothing(&machine, since, &more);
    }
}

#[test]
fn only_the_worker_has_the_keys_in_memory_and_it_leaves_no_core() {
    let cloud = Cloud::new();
    let machine = started(cloud.machine());
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
    until("another worker is there", LONG, || {
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
