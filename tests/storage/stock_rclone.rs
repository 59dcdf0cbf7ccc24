//! The bucket in the eyes of programs that know nothing of the product, with and without its keys.

use crate::fixtures::files::{WORKSPACE, add_new, names, plant, put, walk};
use crate::fixtures::machines::tree;
use crate::fixtures::programs::sqlite_in;
use cvm_harness::judge::PREFIX;
use cvm_harness::machine::{CRYPT_PASSWORD, CRYPT_SALT, HEALTHY, MASTER_KEY, binaries, repository};
use cvm_harness::tools::rclone_crypt_python;
use cvm_harness::{Cloud, difference, digest, flush};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::process::Command;

/// Files of a tree by name: content and time.
fn files(lines: &[String]) -> Vec<String> {
    lines
        .iter()
        .filter_map(|line| {
            let (name, rest) = line.rsplit_once("\" file ")?;
            let words: Vec<&str> = rest.split(' ').collect();
            Some(format!("{name} {} {} {}", words[2], words[3], words[4]))
        })
        .collect()
}

#[test]
fn stock_rclone_reads_everything_that_is_written() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    plant(&machine.path(WORKSPACE));
    add_new(&machine.path(WORKSPACE));
    for name in [
        "\u{2400}\u{240a}",
        "full／width",
        "\r",
        "new\nline",
        "tab\t",
        "del\u{7f}",
        "gro\u{308}ße",
        "\u{201b}",
        "a\u{201b}FFb",
    ] {
        // rclone's own names for these differ from the kernel's, or are one name to it.
        fs::remove_file(machine.path(WORKSPACE).join("new/names").join(name)).unwrap();
        fs::remove_dir_all(machine.path(WORKSPACE).join("new/below").join(name)).unwrap();
    }
    for name in names().iter().filter(|n| std::str::from_utf8(n).is_err()) {
        // Stock rclone writes these with their quotes, as text.
        fs::remove_file(machine.path(WORKSPACE).join("new/names").join(OsStr::from_bytes(name))).unwrap();
        fs::remove_dir_all(machine.path(WORKSPACE).join("new/below").join(OsStr::from_bytes(name))).unwrap();
    }
    flush(&machine);
    let rclone = cloud.judge();
    let copy = tempfile::tempdir().unwrap();
    rclone.ok(&["copy", "crypt:", &copy.path().display().to_string()]);
    let (ours, theirs) = (tree(&machine), digest(&copy.path().join("openclaw"), &[]));
    assert_eq!(difference(&files(&ours), &files(&theirs)), "");
    // Its own objects are as open.
    let control: Vec<_> = walk(&copy.path().join(".cvm"));
    assert!(control.iter().any(|p| p.ends_with("owner")) && control.len() > 2, "{control:?}");
    assert!(control.iter().all(|p| fs::metadata(p).is_ok_and(|m| m.len() > 0)));
    // A program that shares no code with rclone agrees, also where there are several blocks.
    let objects: Vec<_> = cloud.garage.all_bytes().collect();
    let of_size = |least: usize, most: usize| {
        objects.iter().filter(move |(_, bytes)| (least..most).contains(&bytes.len()))
    };
    let mut judged = [0, 0];
    for (key, bytes) in of_size(0, 5000).take(12).chain(of_size(140_000, 4_000_000).take(4)) {
        let name = key.strip_prefix(PREFIX).unwrap().trim_start_matches('/');
        let (clear, content) = rclone_crypt_python(name, bytes, CRYPT_PASSWORD, CRYPT_SALT).unwrap();
        let at = copy.path().join(&clear);
        if clear.contains('\u{201b}') {
            continue;
        }
        assert!(clear.starts_with(".cvm/") || fs::read(&at).unwrap() == content, "{clear}");
        judged[usize::from(content.len() > 2 * 65536)] += 1;
    }
    assert!(judged[0] > 5 && judged[1] > 0, "{judged:?}");
}

/// The blocks of commands in `S3_STORAGE.md` that say how everything is had by hand.
fn recipes() -> Vec<String> {
    let text = fs::read_to_string(repository().join("S3_STORAGE.md")).unwrap();
    let (_, by_hand) = text.split_once("## Recover by hand").unwrap();
    let (by_hand, _) = by_hand.split_once("\n## ").unwrap();
    by_hand.split("```sh\n").skip(1).map(|rest| rest.split_once("```").unwrap().0.to_owned()).collect()
}

#[test]
fn the_recipes_for_a_recovery_by_hand_do_what_they_say() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    put(machine.path(WORKSPACE).join("notes"), "kept");
    put(machine.path("/data/openclaw/openclaw.json"), "{ }");
    flush(&machine);
    let scratch = tempfile::tempdir().unwrap();
    let at = |name: &str| scratch.path().join(name);
    put(at("key.txt"), format!("{MASTER_KEY}\n"));
    let [_, with_rclone, without_us, manifest, hmac] = &recipes()[..] else { panic!("other recipes") };
    let follow = |recipe: &str| {
        let path = [binaries(), repository().join("target/venv/bin"), "/usr/bin".into(), "/bin".into()];
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", recipe])
            .current_dir(scratch.path())
            .env_clear()
            .env("PATH", std::env::join_paths(path).unwrap())
            .env("MASTER_KEY_FILE", at("key.txt"))
            .env("S3_BUCKET", cloud.garage.bucket())
            .env("S3_ENDPOINT", cloud.garage.endpoint())
            .env("AWS_ACCESS_KEY_ID", cloud.garage.access_key())
            .env("AWS_SECRET_ACCESS_KEY", cloud.garage.secret_key())
            .output()
            .unwrap();
        assert!(output.status.success(), "{recipe}\n{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    let has_come = || {
        assert_eq!(fs::read_to_string(at("state/openclaw/workspace/notes")).unwrap(), "kept");
        assert!(!at("state/.cvm").exists());
        fs::remove_dir_all(at("state")).unwrap();
    };
    let listed = follow(with_rclone);
    assert!(listed.contains("openclaw/workspace/notes"), "{listed}");
    has_come();
    fs::remove_file(at("rclone.conf")).unwrap();
    let copy = with_rclone.lines().last().unwrap();
    follow(&format!("{without_us}\n{copy}"));
    has_come();
    let said: serde_json::Value = serde_json::from_str(&follow(manifest)).unwrap();
    let sum = follow("printf '{ }' | sha256sum");
    assert_eq!(said["sha"].as_str(), sum.split_whitespace().next(), "{said}");
    // Any of them.
    let first = follow("rclone --config rclone.conf lsf openclaw:.cvm/manifest | sort | head -n 1");
    let of_first = hmac.replace("000000000000-000000000001-000001", first.trim());
    let said = follow(&format!("{without_us}\n{of_first}"));
    let sums: Vec<&str> = said.lines().filter_map(|line| line.split_whitespace().last()).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1] && sums[0].len() == 64, "{said}");
}

#[test]
fn stock_rclone_reads_the_content_of_every_name_whatever_it_calls_it() {
    let cloud = Cloud::new();
    let machine = cloud.machine().ready();
    let names = names();
    for (n, name) in names.iter().enumerate() {
        put(machine.path(WORKSPACE).join("hard").join(OsStr::from_bytes(name)), format!("{n:08}"));
    }
    flush(&machine);
    let all = cloud.judge().ok(&["cat", "crypt:openclaw/workspace/hard"]);
    let mut contents: Vec<_> = all.chunks(8).map(String::from_utf8_lossy).collect();
    contents.sort();
    assert_eq!(contents, (0..names.len()).map(|n| format!("{n:08}")).collect::<Vec<_>>());
}

#[test]
fn nothing_of_names_or_contents_is_in_any_stored_byte() {
    const CANARY: &str = "Kanarienvogel";
    let cloud = Cloud::new();
    let gateway = HEALTHY.replace("exec", &format!("echo {CANARY}; exec"));
    let machine = cloud.machine().fake_gateway(&gateway).ready();
    let at = machine.path(WORKSPACE);
    put(at.join(CANARY).join(format!("a-{CANARY}.txt")), format!("{CANARY} ").repeat(9000));
    put(at.join("small"), CANARY);
    symlink(format!("to/{CANARY}"), at.join("link")).unwrap();
    fs::set_permissions(at.join("small"), fs::Permissions::from_mode(0o4711)).unwrap();
    let row = format!(
        "c.execute('create table t(x)'); c.execute('insert into t values(?)', ('{CANARY}',)); c.commit()"
    );
    sqlite_in(&machine, &row, &format!("{WORKSPACE}/of.sqlite"));
    // The bucket keeps the end of it.
    machine.ok(&["grep", "-q", CANARY, "/var/log/openclaw-cvm/gateway.log"]);
    flush(&machine);
    fs::rename(at.join("small"), at.join(format!("{CANARY}-2"))).unwrap();
    let mut machine = machine;
    assert_eq!(machine.stop(), 0);
    let has = |bytes: &[u8]| bytes.windows(CANARY.len()).any(|w| w.eq_ignore_ascii_case(CANARY.as_bytes()));
    let mut objects = 0;
    for (key, bytes) in cloud.garage.all_bytes() {
        assert!(!has(key.as_bytes()) && !has(&bytes), "{key}");
        objects += 1;
    }
    assert!(objects > 4);
    for file in walk(cloud.garage.directory()) {
        assert!(!has(&fs::read(&file).unwrap_or_default()), "{}", file.display());
    }
}
