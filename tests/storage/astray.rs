//! A manifest that has files below links: nothing is written through them.

use crate::fixtures::files::{WORKSPACE, walk};
use crate::fixtures::machines::{comes_back, in_workspace, is_listed};
use cvm_harness::Mode::{Fuse, Sync};
use cvm_harness::machine::MASTER_KEY;
use cvm_harness::tools::python;
use cvm_harness::{Cloud, Machine, Mode, flush, independent, restore_by_hand};
use std::ffi::OsStr;
use std::fs;
use std::path::Path;

/// Writes lines into the manifest as an owner of the bucket would, so that it says what no worker
/// writes any more.
fn graft(cloud: &Cloud, lines: &str) {
    const PROGRAM: &str = "
import gzip, hashlib, hmac, json, sys
old, lines, new, master = sys.argv[1:]
mac = lambda key, text: hmac.new(key, text, hashlib.sha256).digest()
key = mac(mac(bytes(32), master.encode()), b'openclaw-cvm-manifest-v1\\x01')
def tag(purpose, *parts):
    return mac(key, purpose + b''.join(len(p).to_bytes(8, 'little') + p for p in parts))
last = json.loads(gzip.decompress(open(old, 'rb').read().split(b'\\n', 1)[1]).split(b'\\n')[0])
body = lines.encode()
head = tag(b'chain', bytes.fromhex(last['head']), hashlib.sha256(body).digest()).hex()
header = dict(last, to=last['to'] + 1, prev=last['head'], head=head)
header['from'] = last['to']
packed = gzip.compress(json.dumps(header).encode() + b'\\n' + body)
open(new, 'wb').write(b'openclaw-cvm-manifest 2 ' + tag(b'segment', packed).hex().encode() + b'\\n' + packed)
print('%012d-%012d-%06d' % (header['from'], header['to'], header['epoch']))
";
    let rclone = cloud.judge();
    let said = String::from_utf8(rclone.ok(&["lsf", "crypt:.cvm/manifest"])).unwrap();
    let last = said.lines().max_by_key(|name| name.split('-').nth(1).map(str::to_owned)).unwrap();
    let scratch = tempfile::tempdir().unwrap();
    let [old, new] = ["old", "new"].map(|name| scratch.path().join(name).display().to_string());
    rclone.ok(&["copyto", &format!("crypt:.cvm/manifest/{last}"), &old]);
    let name = python(PROGRAM, &[&old, lines, &new, MASTER_KEY]);
    rclone.ok(&["copyto", &new, &format!("crypt:.cvm/manifest/{name}")]);
}

/// A bucket whose manifest has files below links, and below a file.
fn with_files_astray() -> Cloud {
    let cloud = Cloud::new();
    let mut machine = cloud.machine().ready();
    in_workspace(&machine, "mkdir d e g; for n in d/x d/odd d/empty e/x g/x good; do echo $n > $n; done");
    in_workspace(&machine, ": > d/empty; chmod 666 d/odd; ln -s d/x d/link; mkdir d/sub");
    flush(&machine);
    assert_eq!(machine.stop(), 0);
    let outside = "L3RtcC9vdXRzaWRl"; // /tmp/outside
    let line = |name: &str, rest: &str| {
        format!("{{\"p\":\"openclaw/workspace/{name}\",{rest},\"mode\":511,\"mt\":1700000000000000000}}\n")
    };
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    graft(
        &cloud,
        &[
            line("d", &format!("\"t\":\"l\",\"to\":\"{outside}\"")),
            line("e", "\"t\":\"l\",\"to\":\"bm93aGVyZQ==\""),
            line("g", &format!("\"t\":\"f\",\"size\":0,\"sha\":\"{empty}\"")),
        ]
        .concat(),
    );
    let nothing = tempfile::NamedTempFile::new().unwrap();
    cloud.judge().ok(&["copyto", &nothing.path().display().to_string(), "crypt:openclaw/workspace/g"]);
    cloud
}

const OUTSIDE: &str = "/tmp/outside";

/// Nothing was written through the link.
#[track_caller]
fn untouched(machine: &Machine) {
    let mut names: Vec<_> =
        walk(&machine.path(OUTSIDE)).into_iter().filter_map(|p| p.file_name().map(OsStr::to_owned)).collect();
    names.sort();
    assert_eq!(names, ["x"]);
    assert_eq!(machine.read(&format!("{OUTSIDE}/x")), "mine");
}

fn files_astray(mode: Mode) {
    let cloud = with_files_astray();
    let machine = mode.of(cloud.machine().file("/tmp/outside/x", "mine", 0o600)).ready();
    independent(&machine);
    untouched(&machine);
    let at = machine.path(WORKSPACE);
    assert_eq!(fs::read_to_string(at.join("good")).unwrap(), "good\n");
    assert_eq!(fs::read_link(at.join("d")).unwrap(), Path::new(OUTSIDE));
    assert_eq!(fs::read_link(at.join("e")).unwrap(), Path::new("nowhere"));
    assert_eq!(fs::read(at.join("g")).unwrap(), b"");
    flush(&machine);
    for name in ["d/x", "d/odd", "d/sub", "e/x", "g/x"] {
        assert!(!is_listed(&machine, name), "{name}");
    }
    untouched(&machine);
    comes_back(&cloud, machine, mode);
}

#[test]
fn files_below_links_are_neither_restored_nor_kept_in_fuse_mode() {
    files_astray(Fuse);
}

#[test]
fn files_below_links_are_neither_restored_nor_kept_in_sync_mode() {
    files_astray(Sync);
}

#[test]
fn a_restore_by_hand_writes_nothing_outside_of_its_directory() {
    let cloud = with_files_astray();
    // On another prefix: what it restores from is nobody's.
    let elsewhere = cloud.machine().environment("S3_PREFIX", "elsewhere");
    let machine = elsewhere.file("/tmp/outside/x", "mine", 0o600).ready();
    let output = restore_by_hand(&cloud, &machine, &[], "/tmp/whole");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    untouched(&machine);
    let at = machine.path("/tmp/whole/openclaw/workspace");
    assert_eq!(fs::read_to_string(at.join("good")).unwrap(), "good\n");
    assert_eq!(fs::read_link(at.join("d")).unwrap(), Path::new(OUTSIDE));
}
