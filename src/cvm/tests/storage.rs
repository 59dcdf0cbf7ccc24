//! `cvm storage`, and the commands that ask the storage worker, against a fake worker: exit codes, streams, files.

// Lint exceptions for tests reach only into functions marked as tests, not into their helpers.
#![allow(clippy::unwrap_used)]

mod common;

use common::{cvm, run};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};

/// A server that answers every question with the same lines.
struct Worker {
    directory: tempfile::TempDir,
    socket: PathBuf,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Worker {
    fn new(answer: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("storage.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let asked: Arc<Mutex<Vec<String>>> = Arc::default();
        let (heard, answer) = (Arc::clone(&asked), answer.join("\n") + "\n");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                heard.lock().unwrap().push(line);
                let _ = stream.write_all(answer.as_bytes());
            }
        });
        Self { directory, socket, asked }
    }

    fn run(&self, arguments: &[&str]) -> (i32, String, String) {
        run(cvm(arguments).env("CVM_STORAGE_SOCKET", &self.socket))
    }

    fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

const GOOD: &str =
    r#"{"answer":"status","phase":"ready","mode":"fuse","bucket":"b","prefix":"p","new_field":7}"#;
const PENDING: &str = r#"{"answer":"status","phase":"ready","mode":"sync","reason":"no /dev/fuse","bucket":"b","pending_files":2,"pending_bytes":2048,"oldest_unreplicated_ms":1200}"#;
const WAITING: &str = r#"{"answer":"status","phase":"waiting","bucket":"b","held_by":"7f3a"}"#;
const INCIDENT: &str = r#"{"answer":"status","phase":"ready","bucket":"b","incidents":[{"path":"a.db","what":"is missing","remedy":"look","since_ms_ago":5}]}"#;
const PROGRESS: &str = r#"{"answer":"progress","what":"pushing","files_done":1,"files_total":2,"bytes_done":5,"bytes_total":10}"#;
const DONE: &str = r#"{"answer":"done","text":"all is well","good":true}"#;
const BAD: &str = r#"{"answer":"done","text":"2 objects differ","good":false}"#;
const REFUSED: &str = r#"{"answer":"refused","why":"not while it drains"}"#;

#[test]
fn status_exits_as_documented_and_answers_the_three_questions_first() {
    for (answer, code, first) in [
        (GOOD, 0, "In the bucket: everything\nOldest change not in it: none\nDo now: nothing\n"),
        (
            PENDING,
            0,
            "In the bucket: not all: 2 files (2.0 KiB) not yet\nOldest change not in it: 1.2 s ago\n",
        ),
        (WAITING, 1, "In the bucket: not known while the worker is waiting for the bucket\n"),
        (
            INCIDENT,
            1,
            "In the bucket: everything except for the incidents below\nOldest change not in it: none\nDo now: look at",
        ),
    ] {
        let (found, out, err) = Worker::new(&[answer]).run(&["storage", "status"]);
        assert_eq!((found, err.as_str()), (code, ""), "{answer}");
        assert!(out.starts_with(first), "{out}");
    }
    let (code, out, _) = Worker::new(&[GOOD]).run(&["storage", "status", "--json"]);
    let value: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!((code, &value["new_field"], value.get("answer")), (0, &7.into(), None));
    let (code, _, err) = Worker::new(&[DONE]).run(&["storage", "status"]);
    assert!(code == 3 && err.contains("not one of the storage protocol"), "{err}");
}

#[test]
fn without_a_worker_every_command_that_asks_exits_with_3() {
    let directory = tempfile::tempdir().unwrap();
    let wanted = directory.path().join("out");
    let out = wanted.to_str().unwrap();
    for arguments in [
        &["storage", "status"][..],
        &["storage", "status", "--json"],
        &["storage", "flush"],
        &["storage", "verify"],
        &["storage", "drill"],
        &["storage", "forget", "--yes", "a"],
        &["storage", "keep", "--yes", "a"],
        &["storage", "accept-older", "--yes"],
        &["storage", "adopt", "--yes"],
        &["storage", "takeover", "--yes"],
        &["storage", "ls"],
        &["storage", "get", "a"],
        &["storage", "get", "a", "-o", out],
        &["logs", "--boots"],
        &["logs", "--boot", "-1"],
    ] {
        let (code, out, err) = run(cvm(arguments).env("CVM_STORAGE_SOCKET", "/no/such/socket"));
        assert_eq!((code, out.as_str()), (3, ""), "{arguments:?}");
        assert!(err.contains("there is no storage worker here") && err.contains("\n  hint: "), "{err}");
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn an_order_is_one_question_of_the_protocol_and_its_last_line_is_the_exit_code() {
    for (arguments, question) in [
        (&["flush"][..], r#"{"v":1,"verb":"flush"}"#),
        (&["flush", "--timeout", "30"], r#"{"v":1,"verb":"flush"}"#),
        (&["verify"], r#"{"v":1,"verb":"verify","deep":false}"#),
        (&["verify", "--deep"], r#"{"v":1,"verb":"verify","deep":true}"#),
        (&["drill"], r#"{"v":1,"verb":"drill"}"#),
        (&["forget", "--yes", "/data/a/b", "c"], r#"{"v":1,"verb":"forget","paths":["a/b","c"]}"#),
        (&["keep", "a", "--yes"], r#"{"v":1,"verb":"keep","paths":["a"]}"#),
        (&["accept-older", "--yes"], r#"{"v":1,"verb":"accept-older"}"#),
        (&["adopt", "--yes"], r#"{"v":1,"verb":"adopt"}"#),
        (&["takeover", "--yes"], r#"{"v":1,"verb":"takeover"}"#),
    ] {
        let arguments = [&["storage"], arguments].concat();
        let good = Worker::new(&[PROGRESS, r#"{"answer":"line","text":"a\u001b[2J"}"#, DONE]);
        let (code, out, err) = good.run(&arguments);
        assert_eq!((code, out.as_str()), (0, "a\u{fffd}[2J\nall is well\n"), "{arguments:?}");
        assert_eq!(err, "pushing  50 %  1 of 2 files  5 B of 10 B\n");
        assert_eq!(good.asked(), [format!("{question}\n")]);

        let (code, _, err) = Worker::new(&[BAD]).run(&arguments);
        assert!(code == 1 && err.contains("2 objects differ\n  hint: "), "{err}");
        let (code, _, err) = Worker::new(&[PROGRESS, REFUSED]).run(&arguments);
        assert!(code == 4 && err.contains("refused: not while it drains"), "{err}");
        let (code, _, err) = Worker::new(&[PROGRESS]).run(&arguments);
        assert!(code == 3 && err.contains("before its last line"), "{err}");
        let (code, _, _) = Worker::new(&[GOOD]).run(&arguments);
        assert_eq!(code, 3, "a status is no answer to an order");
    }
}

#[test]
fn an_order_that_cannot_be_taken_back_needs_a_confirmation() {
    let worker = Worker::new(&[DONE]);
    for order in [&["forget", "a"][..], &["keep", "a"], &["accept-older"], &["adopt"], &["takeover"]] {
        let (code, _, err) = worker.run(&[&["storage"], order].concat());
        assert!(code == 2 && err.contains("give --yes"), "{err}");
    }
    for order in [&["forget", "--yes"][..], &["keep"]] {
        let (code, _, err) = worker.run(&[&["storage"], order].concat());
        assert!(code == 2 && err.contains("PATH"), "{err}");
    }
    assert!(worker.asked().is_empty());
}

#[test]
fn the_old_command_names_the_four_that_replace_it() {
    let worker = Worker::new(&[DONE]);
    for order in [&["accept"][..], &["accept", "--yes"], &["accept", "a", "--json"]] {
        let (code, _, err) = worker.run(&[&["storage"], order].concat());
        let named =
            ["forget PATH", "keep PATH", "accept-older", "adopt"].iter().all(|verb| err.contains(verb));
        assert!(code == 2 && named, "{err}");
    }
    assert!(worker.asked().is_empty());
    let (_, help, _) = worker.run(&["storage", "--help"]);
    assert!(!help.contains("  accept "), "{help}");
}

#[test]
fn ls_shows_entries_and_no_conclusion() {
    let entry = r#"{"answer":"entry","path":"openclaw/a","kind":"file","size":2048,"mode":420,"mtime_ms":0}"#;
    let worker = Worker::new(&[entry, entry, DONE]);
    let (code, out, _) = worker.run(&["storage", "ls", "openclaw"]);
    let line = "-rw-r--r--    2.0 KiB  1970-01-01T00:00:00.000Z  openclaw/a\n";
    assert_eq!((code, out), (0, line.repeat(2)));
    assert!(worker.asked()[0].contains(r#""verb":"list","path":"openclaw""#));
    let (code, out, _) = worker.run(&["storage", "ls", "--json"]);
    assert_eq!((code, out.lines().count()), (0, 2));
    assert_eq!(serde_json::from_str::<serde_json::Value>(out.lines().next().unwrap()).unwrap()["mode"], 420);
    assert!(worker.asked()[1].contains(r#""path":"""#));
    assert_eq!(Worker::new(&[BAD]).run(&["storage", "ls", "nowhere"]).0, 1);
    assert_eq!(Worker::new(&[REFUSED]).run(&["storage", "ls"]).0, 4);
}

#[test]
fn get_writes_every_byte_or_no_file() {
    let pieces =
        [r#"{"answer":"data","base64":"AAEC/w=="}"#, PROGRESS, r#"{"answer":"data","base64":"YmM="}"#];
    let bytes = b"\x00\x01\x02\xffbc";
    let good = Worker::new(&[&pieces[..], &[DONE]].concat());
    let wanted = good.path("out");
    let out = wanted.to_str().unwrap();
    let output = cvm(&["storage", "get", "a"]).env("CVM_STORAGE_SOCKET", &good.socket).output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), &bytes[..]));
    let (code, told, _) = good.run(&["storage", "get", "a", "-o", out]);
    assert_eq!((code, told), (0, format!("{out}: 6 B\n")));
    assert_eq!(std::fs::read(&wanted).unwrap(), bytes);
    assert_eq!(wanted.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    let garbled = r#"{"answer":"data","base64":"!"}"#;
    for (last, expected) in [(BAD, 1), (REFUSED, 4), (garbled, 3), (PROGRESS, 3)] {
        let worker = Worker::new(&[&pieces[..], &[last]].concat());
        let wanted = worker.path("out");
        let (code, _, err) = worker.run(&["storage", "get", "a", "-o", wanted.to_str().unwrap()]);
        assert_eq!(code, expected, "{err}");
        let left: Vec<_> = std::fs::read_dir(worker.directory.path()).unwrap().map(|e| e.unwrap()).collect();
        assert_eq!(left.len(), 1, "only the socket: {left:?}");
    }
}

#[test]
fn earlier_boots_are_listed_and_read_from_their_end() {
    let lines = [r#"{"answer":"line","text":"-1  2026-11-20  gateway sshd supervisor"}"#, DONE];
    let (code, out, _) = Worker::new(&lines).run(&["logs", "--boots"]);
    assert_eq!((code, out.as_str()), (0, "-1  2026-11-20  gateway sshd supervisor\nall is well\n"));
    // "one\ntwo\nth" and "ree\n"
    let pieces = [
        r#"{"answer":"data","base64":"b25lCnR3bwp0aA=="}"#,
        r#"{"answer":"data","base64":"cmVlCg=="}"#,
        DONE,
    ];
    let worker = Worker::new(&pieces);
    assert_eq!(worker.run(&["logs", "--boot", "-1"]).1, "one\ntwo\nthree\n");
    assert_eq!(worker.run(&["logs", "--boot", "-2", "gateway", "-n", "1"]).1, "three\n");
    assert_eq!(worker.run(&["logs", "gateway", "--boot", "-2", "-n", "all"]).1, "one\ntwo\nthree\n");
    let asked = worker.asked();
    assert_eq!(asked[0], "{\"v\":1,\"verb\":\"boot-log\",\"boot\":-1,\"log\":\"supervisor\"}\n");
    assert!(asked[1].contains(r#""boot":-2,"log":"gateway""#), "{}", asked[1]);
    assert_eq!(Worker::new(&[REFUSED]).run(&["logs", "--boot", "-9"]).0, 4);
}

/// A fake supervisor whose status has this storage mode.
fn supervisor(mode: &str) -> Worker {
    let value = serde_json::json!({
        "v": 1, "answer": "status", "version": "0.1.0", "phase": "running", "uptime_ms": 5000,
        "storage": { "mode": mode, "meaning": "in the bucket" }, "keys": [], "remarks": [], "boot": [],
        "services": [], "healthy": true, "unhealthy": [],
    });
    Worker::new(&[&value.to_string()])
}

/// The checks of the doctor's room, each with its verdict.
fn storage_room(mode: &str, socket: &Path) -> Vec<(String, String)> {
    let supervisor = supervisor(mode);
    let mut command = cvm(&["doctor-room", "storage"]);
    command.env("CVM_CONTROL_SOCKET", &supervisor.socket).env("CVM_STORAGE_SOCKET", socket);
    let (_, out, _) = run(&mut command);
    let lines = out.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let word = |line: &serde_json::Value, name: &str| line[name].as_str().unwrap_or_default().to_owned();
    lines.filter(|l| l["line"] == "found").map(|l| (word(&l, "check"), word(&l, "verdict"))).collect()
}

#[test]
fn the_doctor_checks_the_worker_in_the_mode_that_has_one() {
    let nobody = Path::new("/no/such/socket");
    assert_eq!(storage_room("local", nobody), [("storage worker".to_owned(), "skip".to_owned())]);
    let verdict = |findings: &[(String, String)], check: &str| {
        findings.iter().find(|(name, _)| name == check).map(|(_, verdict)| verdict.clone())
    };
    let away = storage_room("s3", nobody);
    assert_eq!(verdict(&away, "storage worker").as_deref(), Some("fail"));
    assert!(verdict(&away, "space for pending changes").is_some(), "{away:?}");
    let pending = storage_room("s3", &Worker::new(&[PENDING]).socket);
    for check in ["storage worker", "phase", "changes in the bucket"] {
        assert_eq!(verdict(&pending, check).as_deref(), Some("ok"), "{pending:?}");
    }
    let incident = storage_room("s3", &Worker::new(&[INCIDENT]).socket);
    assert_eq!(verdict(&incident, "incident: a.db").as_deref(), Some("fail"), "{incident:?}");
}

#[test]
fn the_supervisors_status_begins_with_the_bucket_and_survives_an_absent_worker() {
    let supervisor = supervisor("s3");
    let worker = Worker::new(&[PENDING]);
    let status = |socket: &Path| {
        run(cvm(&["status"]).env("CVM_CONTROL_SOCKET", &supervisor.socket).env("CVM_STORAGE_SOCKET", socket))
    };
    let (code, out, err) = status(&worker.socket);
    assert_eq!((code, err.as_str()), (0, ""));
    let first = out.lines().next().unwrap();
    assert_eq!(
        first,
        "S3 bucket b (sync: no /dev/fuse): 2 files (2.0 KiB) not yet in the bucket, oldest change 1.2 s ago"
    );
    let (code, out, _) = status(Path::new("/no/such/socket"));
    assert!(
        code == 0 && out.contains("nothing is known about the bucket: there is no storage worker"),
        "{out}"
    );
}

/// A copy of `cvm` with a `cvm-storage` beside it that prints its input.
fn installed(program: &str) -> (tempfile::TempDir, PathBuf) {
    // By another process: a child that another test starts at the same moment would inherit a file that
    // this process has open for writing, and the kernel executes no such file.
    const INSTALL: &str =
        r#"cp "$1" "$2/cvm" && printf %s "$3" > "$2/cvm-storage" && chmod 755 "$2/cvm-storage""#;
    let directory = tempfile::tempdir().unwrap();
    let words = ["sh", env!("CARGO_BIN_EXE_cvm"), directory.path().to_str().unwrap(), program];
    assert!(Command::new("sh").args(["-c", INSTALL]).args(words).status().unwrap().success());
    let ours = directory.path().join("cvm");
    (directory, ours)
}

fn restore(ours: &Path, to: &Path) -> Command {
    let mut command = Command::new(ours);
    command.args(["storage", "restore", "--to"]).arg(to).env_clear().stdin(Stdio::null());
    command
        .env("S3_BUCKET", "state")
        .env("S3_ENDPOINT", "https://s3.example.org")
        .env("PATH", "/usr/bin:/bin");
    command
        .env("MASTER_KEY", "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M=")
        .env("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
fn restore_becomes_the_worker_with_the_keys_on_standard_input_only() {
    let script = "#!/bin/sh\necho \"$*\"\nenv\ncat\necho trouble >&2\nexit 42\n";
    let (directory, ours) = installed(script);
    let secret = directory.path().join("secret");
    std::fs::write(&secret, "s3cret\n").unwrap();
    let to = directory.path().join("state");
    let (code, out, err) = run(restore(&ours, &to).env("AWS_SECRET_ACCESS_KEY_FILE", &secret));
    assert_eq!((code, err.as_str()), (42, "trouble\n"));
    assert!(out.starts_with(&format!("restore {}\n", to.display())), "{out}");
    let spec: serde_json::Value = serde_json::from_str(out.lines().last().unwrap()).unwrap();
    assert_eq!((&spec["bucket"], &spec["secret_access_key"]), (&"state".into(), &"czNjcmV0".into()));
    assert_eq!(spec["crypt"]["form"], "clear");
    for name in ["MASTER_KEY", "AWS_", "0K9uLzQl7R8"] {
        assert!(!out.contains(name), "{name} reached the worker's environment: {out}");
    }
}

#[test]
fn restore_lists_every_mistake_before_it_starts_anything() {
    let (directory, ours) = installed("#!/bin/sh\necho started\n");
    let to = directory.path().join("state");
    let (code, out, err) = run(restore(&ours, &to).env("S3_REGION", "a b").env_remove("AWS_ACCESS_KEY_ID"));
    assert_eq!((code, out.as_str()), (2, ""));
    assert!(
        err.starts_with("cvm: storage restore: the configuration has 3 mistakes; nothing was started\n"),
        "{err}"
    );
    for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "S3_REGION"] {
        assert!(err.contains(&format!("\n  {name}: ")), "{err}");
    }
    assert!(!err.contains("0K9uLzQl7R8"));
    let mut local = restore(&ours, &to);
    let (code, _, err) = run(local.env_remove("S3_BUCKET").env_remove("S3_ENDPOINT"));
    assert!(code == 2 && err.contains("S3_BUCKET is not set"), "{err}");
    let full = restore(&ours, directory.path()).env("AWS_SECRET_ACCESS_KEY", "x").output().unwrap();
    let err = String::from_utf8(full.stderr).unwrap();
    assert!(
        full.status.code() == Some(2) && err.contains("it is not empty") && err.contains("hint"),
        "{err}"
    );
    std::fs::remove_file(directory.path().join("cvm-storage")).unwrap();
    let (code, _, err) = run(restore(&ours, &to).env("AWS_SECRET_ACCESS_KEY", "x"));
    assert!(code == 1 && err.contains("cvm-storage is not there"), "{err}");
    assert!(!to.exists());
}
