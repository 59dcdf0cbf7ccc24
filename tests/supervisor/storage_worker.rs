//! PID 1 and a storage worker, with a script in the worker's place: who waits for whom, who is stopped when the tree
//! is lost, what the last line says, and where the credentials are not.

use cvm_harness::evidence::{assert_process_1_has_forgotten, contains};
use cvm_harness::machine::{CRYPT_PASSWORD, HEALTHY, MASTER_KEY, PATIENCE};
use cvm_harness::{Builder, Machine, until};

const ACCESS: &str = "access-canary-0a91c7";
const SECRET: &str = "secret-canary-93f0d2c4b7e1";
const LIB: &str = "/usr/local/lib/openclaw-cvm";

/// Leaves traces, says what `first` says, passes on what the test writes into its pipe, and ends
/// with `last` when its descriptor 4 does.
fn worker(first: &str, last: &str) -> String {
    format!(
        r#"#!/bin/sh
W=/data/worker
mkdir -p $W
trap 'touch $W/terminated' TERM
say() {{ printf '%s\n' "$1" >&3; }}
[ -e /data/openclaw/alive ] && touch $W/overlap
echo start >> $W/starts
wc -c < /proc/self/fd/0 >> $W/spec
env > $W/environment
[ -p /run/say ] || mkfifo /run/say
(while :; do while read -r line; do say "$line"; done < /run/say; done) &
{first}
cat <&4 > /dev/null
{last}
exit 0
"#
    )
}

const READY: &str = r#"{"report":"gate","gate":"storage","state":"open","outlives":false}"#;
const INDEPENDENT: &str = r#"{"report":"gate","gate":"storage","state":"open","outlives":true}"#;
const LOST: &str = r#"{"report":"gate","gate":"storage","state":"closed","why":"another instance has the bucket","retry":true}"#;
const DRAINED: &str = r#"say '{"report":"drained","missing":null}'"#;

fn bucket(worker: &str, gateway: &str) -> Builder {
    Builder::product()
        .fake_gateway(gateway)
        .file(&format!("{LIB}/cvm-storage"), worker, 0o755)
        .file(&format!("{LIB}/cvm-standin"), "#!/bin/sh\nexec sleep 100000\n", 0o755)
        .environment("MASTER_KEY", MASTER_KEY)
        .environment("OPENCLAW_GATEWAY_RESTART_DELAY", "0")
        .environment("S3_BUCKET", "bucket-of-mine")
        .environment("S3_ENDPOINT", "https://s3.example.org")
        .environment("AWS_ACCESS_KEY_ID", ACCESS)
        .environment("AWS_SECRET_ACCESS_KEY", SECRET)
}

/// A machine whose worker has its tree at once.
fn on_a_tree(ready: &str, gateway: &str) -> Machine {
    bucket(&worker(&format!("say '{ready}'"), DRAINED), gateway).ready()
}

/// Makes the worker say a line.
fn say(machine: &Machine, line: &str) {
    machine.ok(&["timeout", "20", "sh", "-c", &format!("echo '{line}' > /run/say")]);
}

fn step(machine: &Machine, name: &str) -> serde_json::Value {
    let status = machine.status();
    let steps = status["boot"].as_array().cloned().unwrap_or_default();
    steps.into_iter().find(|s| s["name"] == name).unwrap_or_else(|| panic!("no step {name} in {status:#}"))
}

fn starts(machine: &Machine) -> usize {
    machine.read("/data/worker/starts").lines().count()
}

fn second_worker(machine: &Machine) {
    until("a second worker runs", PATIENCE, || {
        (starts(machine) == 2 && machine.service("storage")["state"] == "up").then_some(())
    });
}

#[test]
fn the_gateway_waits_until_the_worker_has_the_tree_and_ssh_does_not() {
    let note = r#"say '{"report":"note","level":"info","text":"Attempting FUSE mount..."}'"#;
    let machine = bucket(&worker(note, DRAINED), HEALTHY).start();
    machine.line("SSH daemon started.");
    machine.line("S3 storage configured (bucket: bucket-of-mine), setting up rclone...");
    machine.line("Attempting FUSE mount...");
    machine.service_in("standin", &["up"]);
    assert_eq!(machine.service("gateway")["why"], "boot step storage is not done yet");
    assert_eq!(machine.status()["phase"], "booting");
    assert!(!machine.path("/data/openclaw").exists());
    say(&machine, INDEPENDENT);
    machine.service_in("gateway", &["ready"]);
    let status = machine.status();
    assert_eq!(status["healthy"], true, "{status:#}");
    assert_eq!(status["storage"]["mode"], "s3");
    say(&machine, r#"{"report":"status","facts":[{"label":"mode","value":{"text":"sync"}}]}"#);
    until("the worker's fact is shown", PATIENCE, || {
        (machine.fact("storage", "mode")?["text"] == "sync").then_some(())
    });
}

#[test]
fn a_bucket_that_cannot_be_opened_leaves_ssh_up_and_the_gateway_down_and_says_why() {
    let refusal = r#"say '{"report":"gate","gate":"storage","state":"closed","why":"the key does not open this bucket","retry":false}'"#;
    let mut machine = bucket(&worker(refusal, DRAINED), HEALTHY).start();
    machine.line("SSH daemon started.");
    machine.line("Boot step storage failed: the key does not open this bucket; an operator is needed");
    let gateway = machine.service("gateway");
    assert_eq!(gateway["state"], "blocked");
    assert_eq!(gateway["why"], "boot step storage: the key does not open this bucket");
    let status = machine.status();
    assert_eq!((&status["healthy"], &status["phase"]), (&false.into(), &"degraded".into()));
    // Not by way of an operator either.
    machine.exec(&["cvm", "start", "gateway", "--no-wait"]);
    assert_eq!(machine.service("gateway")["state"], "blocked");
    assert!(!machine.path("/data/openclaw").exists());
    assert_eq!(machine.stop(), 0, "there was no tree, so nothing is missing:\n{}", machine.output());
}

#[test]
fn a_lost_tree_stops_the_gateway_and_the_next_one_starts_it_again() {
    let machine = on_a_tree(READY, HEALTHY);
    let first = machine.pid_of("gateway");
    say(&machine, LOST);
    machine.line("The storage is lost: another instance has the bucket");
    machine.service_in("gateway", &["blocked"]);
    assert!(machine.find("cvm-victim http").is_none());
    assert_eq!(step(&machine, "home")["state"], "waiting");
    say(&machine, READY);
    assert_ne!(machine.pid_of("gateway"), first);
    assert_eq!(step(&machine, "home")["tries"], 2);
    assert_eq!(starts(&machine), 1, "the worker stayed");
}

/// Says that it is there as long as it is, and takes a second to go.
const SLOW: &str = "#!/bin/sh\n\
    trap 'sleep 1; rm /data/openclaw/alive; exit 0' TERM\n\
    touch /data/openclaw/alive\ncvm-victim http 18789 &\nwhile :; do wait; done\n";

#[test]
fn a_worker_that_dies_with_its_tree_is_not_started_again_before_the_gateway_is_gone() {
    let machine = on_a_tree(READY, SLOW);
    let first = machine.pid_of("gateway");
    machine.kill(machine.pid_of("storage"), "KILL");
    machine.line("the storage worker ended and is started again");
    second_worker(&machine);
    assert_ne!(machine.pid_of("gateway"), first);
    assert!(!machine.path("/data/worker/overlap").exists(), "{}", machine.output());
    // Each has read the same specification.
    let lengths = machine.read("/data/worker/spec");
    let lengths: Vec<usize> = lengths.lines().filter_map(|l| l.trim().parse().ok()).collect();
    assert!(matches!(lengths[..], [one, two] if one == two && one > 300), "{lengths:?}");
}

#[test]
fn a_worker_that_dies_under_an_independent_tree_disturbs_nobody() {
    let machine = on_a_tree(INDEPENDENT, HEALTHY);
    let first = machine.pid_of("gateway");
    machine.kill(machine.pid_of("storage"), "KILL");
    second_worker(&machine);
    assert_eq!(machine.pid_of("gateway"), first);
    assert_eq!(step(&machine, "storage")["state"], "done");
}

#[test]
fn a_worker_that_dies_in_an_outage_disturbs_nobody_on_an_independent_tree() {
    let machine = on_a_tree(INDEPENDENT, HEALTHY);
    let first = machine.pid_of("gateway");
    let silent =
        r#"{"report":"gate","gate":"storage","state":"unknown","why":"the bucket cannot be reached"}"#;
    let script = worker(&format!("say '{silent}'"), DRAINED);
    std::fs::write(machine.path(&format!("{LIB}/cvm-storage")), script).expect("it can be replaced");
    machine.kill(machine.pid_of("storage"), "KILL");
    second_worker(&machine);
    machine.line("Nothing is replicated: the bucket cannot be reached");
    assert_eq!(machine.pid_of("gateway"), first);
    assert_eq!(step(&machine, "storage")["state"], "done");
    say(&machine, LOST);
    machine.service_in("gateway", &["blocked"]);
}

#[test]
fn an_operator_restarts_the_worker_and_the_gateway_comes_back_by_itself() {
    let machine = on_a_tree(READY, SLOW);
    let first = machine.pid_of("gateway");
    machine.exec(&["cvm", "restart", "storage", "--no-wait"]);
    second_worker(&machine);
    assert_ne!(machine.pid_of("gateway"), first);
    assert!(!machine.path("/data/worker/overlap").exists());
    assert!(
        !machine.path("/data/worker/terminated").exists(),
        "its descriptor is closed, and no signal sent"
    );
}

#[test]
fn a_stop_after_which_the_bucket_has_everything_is_status_0() {
    let mut machine = on_a_tree(READY, HEALTHY);
    let data = machine.data();
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    assert!(data.join("worker/starts").exists());
    assert!(!data.join("worker/terminated").exists(), "the worker is ended without a signal");
}

#[test]
fn a_stop_after_which_the_bucket_lacks_something_is_status_75_and_the_last_line_says_what() {
    let ready = format!("say '{READY}'");
    let lacking = r#"say '{"report":"drained","missing":"Not everything is in the bucket: 3 files are missing there"}'"#;
    let silent = "";
    for (last, line) in [
        (lacking, "Not everything is in the bucket: 3 files are missing there"),
        (silent, "the storage worker ended without saying what is missing"),
    ] {
        let mut machine = bucket(&worker(&ready, last), HEALTHY).ready();
        assert_eq!(machine.stop(), 75, "{}", machine.output());
        let output = machine.output();
        assert!(output.lines().last().is_some_and(|l| l.contains(line)), "{output}");
    }
}

#[test]
fn the_worker_goes_on_while_a_busy_gateway_drains_and_is_told_to_end_after_it() {
    let beats = format!(
        "chmod 777 $W; say '{READY}'; (while [ ! -e /data/worker/over ]; do echo >> /data/worker/beats; sleep 0.05; done) &"
    );
    let last = format!("echo storage >> /data/worker/order; touch /data/worker/over; {DRAINED}");
    // It does not end before the worker has worked on.
    let gateway = "#!/bin/sh\ncvm-victim http 18789 & V=$!\n\
        drain() { n=$(wc -c < /data/worker/beats)\n\
        until [ $(wc -c < /data/worker/beats) -gt $((n + 3)) ]; do sleep 0.05; done\n\
        echo gateway >> /data/worker/order; kill $V; exit 0; }\n\
        trap drain TERM; while :; do sleep 0.05; done\n";
    let mut machine = bucket(&worker(&beats, &last), gateway).ready();
    let data = machine.data();
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    let order = std::fs::read_to_string(data.join("worker/order")).unwrap();
    assert_eq!(order, "gateway\nstorage\n", "{}", machine.output());
}

#[test]
fn a_second_sigterm_does_not_wait_for_the_bucket() {
    let never = "while :; do sleep 1; done";
    let mut machine = bucket(&worker(&format!("say '{READY}'"), never), HEALTHY)
        .environment("S3_DRAIN_TIMEOUT", "3600")
        .ready();
    machine.signal(nix::sys::signal::Signal::SIGTERM);
    machine.line("Stopping");
    machine.signal(nix::sys::signal::Signal::SIGTERM);
    assert_eq!(machine.wait(), 75, "{}", machine.output());
}

/// As they are, and as they travel.
fn canaries() -> Vec<String> {
    let packed = |text: &str| {
        let packed = cvm_secrets::base64_bytes::PackedBytes::pack(text.as_bytes());
        serde_json::to_string(&packed).expect("a string").trim_matches('"').to_owned()
    };
    [SECRET, ACCESS, CRYPT_PASSWORD].iter().flat_map(|text| [(*text).to_owned(), packed(text)]).collect()
}

#[test]
fn the_credentials_of_the_bucket_are_in_no_environment_command_line_or_log() {
    let mut machine = on_a_tree(READY, HEALTHY);
    machine.kill(machine.pid_of("storage"), "KILL");
    second_worker(&machine);
    machine.service_in("gateway", &["ready"]);
    let mut looked_at = 0;
    for process in machine.processes() {
        for file in ["environ", "cmdline"] {
            let Ok(bytes) = std::fs::read(machine.path(&format!("/proc/{}/{file}", process.pid))) else {
                continue;
            };
            looked_at += 1;
            for secret in canaries() {
                assert!(!contains(&bytes, &secret), "{secret} is in {file} of {}", process.arguments);
            }
        }
    }
    assert!(looked_at > 10, "{looked_at} files");
    let environment = machine.read("/data/worker/environment");
    assert!(environment.contains("PATH=") && !environment.contains("S3_"), "{environment}");
    assert_eq!(machine.stop(), 0, "{}", machine.output());
    for secret in canaries() {
        assert!(!machine.output().contains(&secret), "{secret} was printed");
    }
}

#[test]
fn the_credentials_of_the_bucket_are_not_in_the_memory_of_process_1() {
    let machine = on_a_tree(READY, HEALTHY);
    machine.kill(machine.pid_of("storage"), "KILL");
    second_worker(&machine);
    assert_process_1_has_forgotten(&machine, &canaries());
}
