//! What is written where: services to their files, the supervisor to standard output, and nobody ever waits for
//! a reader.

use crate::fixtures::product;
use cvm_harness::machine::{HEALTHY, PATIENCE};
use cvm_harness::until;
use std::fs;

const SAYS: &str = "#!/bin/sh\necho 'words of the gateway'\nexec cvm-victim http 18789\n";

#[test]
fn a_services_words_go_to_its_file_and_not_to_stdout() {
    let mut machine = product(SAYS).ready();
    let log = until("the line is in the file", PATIENCE, || {
        Some(machine.read("/var/log/openclaw-cvm/gateway.log")).filter(|l| l.contains("words of the gateway"))
    });
    let line = log.lines().find(|l| l.contains("words of the gateway")).expect("it is there");
    // 2026-11-21T04:17:50.123Z words of the gateway
    assert_eq!(line.find("Z words"), Some(23), "{line}");
    assert!(machine.ok(&["cvm", "logs", "gateway", "-n", "50"]).contains("words of the gateway"));
    assert!(machine.ok(&["cvm", "logs", "supervisor", "-n", "100"]).contains("SSH daemon started."));
    assert_eq!(machine.stop(), 0);
    assert!(!machine.output().contains("words of the gateway"));
}

#[test]
fn with_log_services_they_also_go_to_stdout_under_their_name() {
    let machine = product(SAYS).environment("LOG_SERVICES", "1").start();
    assert!(machine.line("words of the gateway").contains(" gateway | words of the gateway"));
}

#[test]
fn as_json_every_line_is_an_object() {
    let mut machine =
        product(SAYS).environment("LOG_SERVICES", "1").environment("LOG_FORMAT", "json").start();
    machine.line("words of the gateway");
    assert_eq!(machine.stop(), 0);
    let output = machine.output();
    for line in output.lines() {
        let object: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
        assert!(object["time"].is_string(), "{line}");
        assert!(object["message"].is_string() || object["line"].is_string(), "{line}");
    }
    assert!(output.contains("SSH daemon started."));
}

/// After a flood, of which lines may be dropped where the disk is slow: said until it is heard.
const SAYS_THE_END: &str = "while :; do echo the end; sleep 0.1; done &\nexec cvm-victim http 18789\n";

#[test]
fn the_file_is_rotated_at_10_mb_and_one_old_one_is_kept() {
    let script = format!("#!/bin/sh\ncvm-victim chatty 300000 100\n{SAYS_THE_END}");
    let machine = product(&script).start();
    until("the last line is in the file", PATIENCE, || {
        machine.read("/var/log/openclaw-cvm/gateway.log").contains("the end").then_some(())
    });
    let limit = 10 * 1024 * 1024;
    let size =
        |name: &str| fs::metadata(machine.path(&format!("/var/log/openclaw-cvm/{name}"))).map(|m| m.len());
    assert!(size("gateway.log").is_ok_and(|n| n <= limit));
    assert!(size("gateway.log.1").is_ok_and(|n| n > limit / 2 && n <= limit));
    assert!(size("gateway.log.2").is_err());
}

#[test]
fn a_log_that_cannot_be_written_does_not_stop_the_service() {
    // Every write to /dev/full fails as on a full disk.
    let full = product("#!/bin/sh\ncvm-victim chatty 200000 100\nexec cvm-victim http 18789\n")
        .symlink("/dev/full", "/var/log/openclaw-cvm/gateway.log")
        .symlink("/dev/full", "/var/log/openclaw-cvm/supervisor.log");
    drop(full.ready());
}

#[test]
fn binary_output_and_endless_lines_are_survived() {
    let script = format!(
        "#!/bin/sh\nhead -c 3000000 /dev/urandom\nprintf '\\n'; head -c 1000000 /dev/zero | tr '\\0' x\necho\n{SAYS_THE_END}"
    );
    let machine = product(&script).environment("LOG_SERVICES", "1").ready();
    until("the last line is in the file", PATIENCE, || {
        let log = fs::read(machine.path("/var/log/openclaw-cvm/gateway.log")).unwrap_or_default();
        log.windows(7).any(|w| w == b"the end").then_some(())
    });
}

#[test]
fn a_stdout_that_nobody_reads_blocks_nothing() {
    let mut machine = product(HEALTHY).environment("LOG_SERVICES", "1").blocked_stdout().ready();
    let pid = machine.pid_of("gateway");
    machine.kill(pid, "KILL");
    until("a new gateway runs", PATIENCE, || (machine.service("gateway")["pid"] != pid).then_some(()));
    assert_eq!(machine.stop(), 0);
}

/// A broken pipe is always writable: waiting for room in it was a busy loop once.
#[test]
fn a_stdout_whose_reader_is_gone_costs_no_time() {
    let mut machine = product(HEALTHY).broken_stdout().ready();
    // Whoever loops is never found asleep, however little of the processor it gets.
    let is_asleep = || {
        let stat = fs::read_to_string(format!("/proc/{}/stat", machine.pid())).expect("process 1 has a stat");
        stat.rsplit_once(')').expect("a name in brackets").1.trim_start().starts_with('S')
    };
    let asleep = (0..100).filter(|_| {
        machine.status();
        std::thread::sleep(std::time::Duration::from_millis(10));
        is_asleep()
    });
    let asleep = asleep.count();
    assert!(asleep > 50, "process 1 was asleep {asleep} times of 100");
    assert_eq!(machine.stop(), 0);
}

#[test]
fn a_flood_of_output_is_counted_and_does_not_flood_the_supervisors_log() {
    let script =
        "#!/bin/sh\n(while :; do cvm-victim chatty 100000 300; done) &\nexec cvm-victim http 18789\n";
    let machine = product(script).ready();
    until("lines have been dropped", PATIENCE, || {
        (machine.service("gateway")["dropped_lines"].as_u64() > Some(0)).then_some(())
    });
    machine.ok(&["cvm", "status"]);
    assert!(machine.lines_with("log lines dropped") <= 3, "{}", machine.output());
}
