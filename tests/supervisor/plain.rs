//! Plain mode, `cvm-init -- CMD ARG...`, as the real process 1 of a pid namespace.

use cvm_harness::{Builder, Machine, until};
use nix::sys::signal::Signal;
use std::path::Path;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(60);

fn builder(command: &[&str]) -> Builder {
    let bin = cvm_harness::machine::binaries();
    let words: Vec<&str> = ["/usr/local/sbin/cvm-init", "--"].iter().chain(command).copied().collect();
    Builder::new()
        .copy(&bin.join("cvm-init"), "/usr/local/sbin/cvm-init")
        .copy(&bin.join("cvm-victim"), "/usr/local/bin/cvm-victim")
        .environment("PATH", "/usr/local/bin:/usr/bin:/bin")
        .command(&words)
}

fn start(command: &[&str]) -> Machine {
    builder(command).start()
}

#[test]
fn all_256_exit_codes_are_passed_on() {
    for code in 0..=255 {
        assert_eq!(start(&["cvm-victim", "exit", &code.to_string()]).wait(), code);
    }
}

#[test]
fn every_terminating_signal_is_passed_on_as_128_and_its_number() {
    // Signals that do not end a process by default, and the two the C library keeps.
    let harmless = [17, 18, 19, 20, 21, 22, 23, 28, 32, 33];
    for signal in (1..=64).filter(|n| !harmless.contains(n)) {
        assert_eq!(
            start(&["cvm-victim", "die", &signal.to_string()]).wait(),
            128 + signal,
            "signal {signal}"
        );
    }
}

#[test]
fn the_command_starts_with_no_signal_blocked_or_ignored() {
    let mut machine = start(&["cvm-victim", "signals"]);
    assert_eq!(machine.wait(), 0);
    let zero = "0000000000000000";
    for kind in ["SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt"] {
        let line = machine.line(kind);
        // Rust's own runtime in the victim catches SIGSEGV and SIGBUS and ignores SIGPIPE.
        let allowed = match kind {
            "SigIgn" => "0000000000001000",
            "SigCgt" => "0000000000000440",
            _ => zero,
        };
        assert!(line.ends_with(zero) || line.ends_with(allowed), "{line}");
    }
    let mut shell = start(&["sh", "-c", "grep -E 'Sig(Blk|Ign)' /proc/self/status"]);
    assert_eq!(shell.wait(), 0);
    assert!(shell.line("SigIgn").ends_with(zero));
    assert!(shell.line("SigBlk").ends_with(zero));
}

#[test]
fn signals_reach_the_command_and_not_its_children() {
    let script = "trap 'echo main got it; while [ ! -e /go ]; do sleep 0.02; done; exit 5' TERM; \
                  (trap 'echo child got it' TERM; echo ready; while :; do sleep 0.05; done) & \
                  child=$!; wait $child; exit 6";
    let mut machine = start(&["sh", "-c", script]);
    machine.line("ready");
    machine.signal(Signal::SIGTERM);
    machine.line("main got it");
    assert_eq!(machine.lines_with("child got it"), 0);
    std::fs::write(machine.path("/go"), "").expect("the root inside is writable");
    // The command has ended, as it was asked to: what it left behind is told, and then killed.
    machine.line("child got it");
    assert_eq!(machine.wait(), 5);
}

#[test]
fn it_leaves_only_when_every_descendant_is_gone() {
    let mut machine =
        start(&["sh", "-c", "(setsid sh -c 'while [ ! -e /go ]; do sleep 0.02; done; echo last') & exit 3"]);
    until("the command has ended", PATIENCE, || machine.find("exit 3").is_none().then_some(()));
    assert!(machine.is_running());
    std::fs::write(machine.path("/go"), "").expect("the root inside is writable");
    assert_eq!(machine.wait(), 3);
    machine.line("last");
}

#[test]
fn ten_thousand_orphans_leave_no_zombie() {
    let mut machine = start(&["sh", "-c", "cvm-victim orphans 10000; echo done; exec cvm-victim wait"]);
    machine.line("done");
    until("no zombie is left", PATIENCE, || machine.processes().iter().all(|p| p.state != 'Z').then_some(()));
    machine.signal(Signal::SIGTERM);
    assert_eq!(machine.wait(), 143);
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_cannot_run_126() {
    let mut absent = start(&["no-such-command"]);
    assert_eq!(absent.wait(), 127);
    absent.line("no-such-command: could not start: executing the program: No such file or directory");
    let mut here = builder(&["tool"]).file("/tool", "#!/bin/sh\necho it ran\n", 0o755).start();
    assert_eq!(here.wait(), 127, "the working directory is not in PATH");
    assert_eq!(here.lines_with("it ran"), 0);
    let mut text = start(&["/etc/passwd"]);
    assert_eq!(text.wait(), 126);
    text.line("/etc/passwd: could not start: executing the program: Permission denied");
}

#[test]
fn it_works_without_being_process_1_and_keeps_the_working_directory() {
    let init = cvm_harness::machine::binaries().join("cvm-init");
    let run = |dir: &Path, command: &[&str]| {
        let words = std::iter::once("--").chain(command.iter().copied());
        std::process::Command::new(&init).args(words).current_dir(dir).output().expect("cvm-init runs")
    };
    let output = run(Path::new("/usr"), &["sh", "-c", "pwd; (sleep 0.1; echo late) & exit 4"]);
    assert_eq!(output.status.code(), Some(4));
    assert_eq!(String::from_utf8_lossy(&output.stdout), "/usr\nlate\n");
}

#[test]
fn what_is_printed_to_a_file_that_others_write_to_overwrites_nothing() {
    let init = cvm_harness::machine::binaries().join("cvm-init");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let script =
        format!("(echo before; env -i {} --check; echo after) > {}", init.display(), file.path().display());
    let status = std::process::Command::new("sh").args(["-c", &script]).status().expect("a shell");
    assert!(status.success());
    let text = std::fs::read_to_string(file.path()).expect("text");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!((lines.first(), lines.last()), (Some(&"before"), Some(&"after")), "{text}");
    assert!(lines.contains(&"The configuration is complete and correct."), "{text}");
}

#[test]
fn without_a_command_it_says_how_it_is_called() {
    let mut machine = builder(&[]).start();
    assert_eq!(machine.wait(), 64);
    machine.line("cvm-init -- CMD ARG...");
}
