//! The program from outside: what it reads, what it reports, how it exits, and what it does not
//! say. Only tasks that leave the machine alone are run here.

use cvm_protocol::json_lines::line;
use cvm_protocol::task::{DockerUse, StateTask, Task, TaskReport};
use cvm_secrets::base64_bytes::PackedBytes;
use std::process::{Command, Output, Stdio};

struct Run {
    output: Output,
    report: Option<TaskReport>,
    report_text: String,
}

impl Run {
    fn exit_code(&self) -> Option<i32> {
        self.output.status.code()
    }

    fn log(&self) -> String {
        let Output { stdout, stderr, .. } = &self.output;
        format!("{}{}", String::from_utf8_lossy(stdout), String::from_utf8_lossy(stderr))
    }

    fn failure(self) -> (String, bool) {
        match self.report {
            Some(TaskReport::Failed { why, retry, .. }) => (why, retry),
            _ => panic!("it did not fail: {}", self.report_text),
        }
    }
}

/// Runs the program with `input` in a file on standard input, and the report going to a file.
fn run(input: &[u8]) -> Run {
    let temp = tempfile::tempdir().expect("a directory for the test");
    let (task, report) = (temp.path().join("task"), temp.path().join("report"));
    std::fs::write(&task, input).expect("the task in its file");
    let output = Command::new("sh")
        .args(["-c", "exec \"$0\" test 3>\"$1\" <\"$2\"", env!("CARGO_BIN_EXE_cvm-task")])
        .args([&report, &task])
        .stdin(Stdio::null())
        .output()
        .expect("a shell");
    let text = std::fs::read_to_string(&report).expect("the report, as text");
    assert!(text.lines().count() <= 1, "one line: {text}");
    Run { output, report: serde_json::from_str(&text).ok(), report_text: text }
}

#[test]
fn a_task_that_is_done_exits_with_0_and_says_so() {
    let run = run(&line(&Task::Sweep { run: "nobody-has-this/0".into(), listens_on: None }));
    assert_eq!(run.exit_code(), Some(0));
    assert!(matches!(run.report, Some(TaskReport::Done { .. })));
    assert_eq!(run.log(), "");
}

#[test]
fn a_task_that_failed_exits_with_1_and_says_why() {
    let state = StateTask {
        user: "nobody-has-this-name".into(),
        port: 18789,
        redpill: false,
        config: None,
        workspace: None,
        device_seed: None,
        token: None,
    };
    let run = run(&line(&Task::State(state)));
    assert_eq!(run.exit_code(), Some(1));
    let (why, retry) = run.failure();
    assert!(retry && why.contains("nobody-has-this-name"), "{why}");
}

#[test]
fn what_is_no_task_is_refused_without_being_quoted() {
    let secret = "hunter2-hunter2";
    let inputs = [
        String::new(),
        "{".to_owned(),
        format!("{{\"task\":\"{secret}\"}}"),
        format!("{{\"task\":\"ssh\",\"port\":22,\"seed\":\"{secret}\",\"extra_keys\":\"\",\"{secret}\":1}}"),
        format!("{{\"task\":\"free-port\",\"port\":\"{secret}\"}}"),
    ];
    for input in inputs {
        let run = run(input.as_bytes());
        assert_eq!(run.exit_code(), Some(1), "{input}");
        assert!(!run.report_text.contains(secret) && !run.log().contains(secret), "{input}");
        assert!(!run.failure().1);
    }
}

#[test]
fn without_anybody_to_report_to_nothing_is_done() {
    let output = Command::new(env!("CARGO_BIN_EXE_cvm-task")).stdin(Stdio::null()).output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("started by cvm-init"));
}

#[test]
fn a_user_that_breaks_the_format_of_the_accounts_is_refused_before_anything_is_touched() {
    let (why, retry) = run(&line(&Task::Home { user: "a:b".into(), docker: DockerUse::None })).failure();
    assert!(!retry && why.contains("must have a name"), "{why}");
}

#[test]
fn a_seed_of_the_wrong_size_is_a_bug_and_not_a_panic() {
    let seed = Some(PackedBytes::pack(b"short"));
    let run = run(&line(&Task::Ssh { port: 22, seed, trust_host_keys: false }));
    // On a machine without sshd that is said first.
    assert_eq!(run.exit_code(), Some(1));
    assert!(!run.log().contains("bug, at"));
}
