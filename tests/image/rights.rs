//! A container that may not do everything: what is said of it, and what works all the same.

use crate::fixtures::{CVM, Laptop, clean, compose_file, compose_lines, exec, healthy, log, of_bucket, turn};
use cvm_harness::engine::IMAGE;
use cvm_harness::machine::{MASTER_KEY, PATIENCE};
use cvm_harness::{Engine, Garage, Network, Proxy, until};
use cvm_needs::{Need, skip};

#[test]
fn what_a_container_may_not_do_is_said_and_the_rest_works() {
    let Some(_turn) = turn() else { return };
    let (garage, network) = (Garage::start(), Network::new());
    let proxy = Proxy::open_in(&network, garage.address());
    let engine = Laptop::new().engine(&network);
    // As a plain `docker run` has it: no capability, no device, no option more than the engine's own.
    let mut words = vec!["run".to_owned(), "--detach".into(), "--name".into(), CVM.into()];
    let bucket = of_bucket(&garage, &proxy);
    words.extend(bucket.iter().map(|(name, value)| format!("--env={name}={value}")));
    words.extend([
        format!("--env=MASTER_KEY={MASTER_KEY}"),
        "--env=ENABLE_DOCKER=1".into(),
        IMAGE.to_owned(),
    ]);
    engine.docker(&words.iter().map(String::as_str).collect::<Vec<_>>());
    healthy(&engine);
    let said = log(&engine, CVM);
    assert!(said.contains("FUSE mount failed, falling back to sync mode."), "{said}");
    until("dockerd's failure is a warning", PATIENCE, || warned(&engine, "dockerd").then_some(()));
    clean(&engine);
}

/// Each line of the compose file that grants something is taken out, alone: what the log warns of, and what
/// the doctor says, both with the name of the line.
#[test]
fn each_right_that_is_missing_is_named_in_the_log_and_by_the_doctor() {
    let Some(_turn) = turn() else { return };
    let (garage, network) = (Garage::start(), Network::new());
    let proxy = Proxy::open_in(&network, garage.address());
    let engine = Laptop::new().engine(&network);
    let profiles = engine.docker(&["info", "--format", "{{.SecurityOptions}}"]);
    for (number, (line, named)) in [
        ("- SYS_ADMIN", "SYS_ADMIN"),
        ("- NET_ADMIN", "NET_ADMIN"),
        ("- DAC_READ_SEARCH", "DAC_READ_SEARCH"),
        ("- \"c 10:229 rwm\"", "device_cgroup_rules"),
        ("- seccomp=unconfined", "seccomp=unconfined"),
        ("- apparmor=unconfined", "apparmor=unconfined"),
    ]
    .into_iter()
    .enumerate()
    {
        let profile = named.strip_suffix("=unconfined");
        if let Some(absent) = profile.filter(|profile| !profiles.contains(&format!("name={profile}"))) {
            skip(Need::Profiles, &format!("this host has no {absent}, and what it forbids is not looked at"));
            continue;
        }
        let lines = without(compose_lines(), line);
        let mut given = of_bucket(&garage, &proxy);
        given.extend([("S3_PREFIX", format!("without-{number}")), ("ENABLE_DOCKER", "1".into())]);
        let given: Vec<(&str, &str)> = given.iter().map(|(name, value)| (*name, value.as_str())).collect();
        compose_file(&engine, &lines, &given, &["up", "--detach"]);
        until(&format!("the log warns of {named}"), PATIENCE, || warned(&engine, named).then_some(()));
        let told = exec(&engine, &["cvm", "doctor"]).stdout;
        let told = String::from_utf8_lossy(&told);
        assert!(told.contains(named), "the doctor does not say {named}:\n{told}");
        engine.docker(&["rm", "--force", "--volumes", CVM]);
        clean(&engine);
    }
}

/// The compose file without one entry, and without the key that it leaves empty.
fn without(mut lines: Vec<String>, entry: &str) -> Vec<String> {
    let at =
        lines.iter().position(|line| line.trim() == entry).unwrap_or_else(|| panic!("no line `{entry}`"));
    lines.remove(at);
    let is_comment = |line: &String| line.trim_start().starts_with('#');
    let is_entry = |line: &String| line.starts_with("      ") && !is_comment(line);
    let key = lines[..at].iter().rposition(|line| !line.starts_with("      ")).expect("an entry has a key");
    let rest = lines[key + 1..].iter().take_while(|line| is_entry(line) || is_comment(line));
    if !rest.into_iter().any(is_entry) {
        lines.remove(key);
    }
    lines
}

/// A warning with this in it; the reason of a fallback counts as one.
fn warned(engine: &Engine, text: &str) -> bool {
    let is_warning = |line: &str| line.contains("WARN") || line.contains("Reason: ");
    log(engine, CVM).lines().any(|line| is_warning(line) && line.contains(text))
}
