//! What the README and the compose file say, held against the code.

use crate::fixtures::read;
use cvm_harness::machine::repository;
use cvm_machine::machine::{ENGINE_WAITS, Machine, STOP_AT_MOST};
use cvm_system::config::Config;
use cvm_system::env::{Environment, SSH_TRUST_HOST_KEYS, VARIABLES};
use cvm_system::roles::{self, Given};
use std::fs;
use std::process::Command;
use std::time::Duration;

#[test]
fn every_variable_is_in_the_readme_and_in_the_compose_file() {
    let (readme, compose) = (read("README.md"), read("docker-compose.yml"));
    for variable in VARIABLES {
        assert!(readme.contains(&format!("`{}`", variable.name)), "README.md lacks {}", variable.name);
        let line = format!("{0}: ${{{0}:-}}", variable.name);
        let literal = [SSH_TRUST_HOST_KEYS, "CVM_OWNER"].contains(&variable.name);
        assert_eq!(compose.contains(&line), !literal, "docker-compose.yml: `{line}`");
    }
    assert!(
        compose.contains("      CVM_OWNER: \"\"\n"),
        "whoever writes the environment must not say who may"
    );
}

#[test]
fn the_readme_gives_each_variable_the_default_that_it_has() {
    // Said in words there, since they depend on others.
    const IN_WORDS: [(&str, &str); 3] = [
        ("RCLONE_CRYPT_PASSWORD", "derived"),
        ("RCLONE_CRYPT_PASSWORD2", "derived"),
        ("MUX_INBOUND_URL", "built from the two below"),
    ];
    let readme = read("README.md");
    let rows: Vec<(&str, &str)> = readme
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` | "))
        .filter_map(|(names, rest)| Some((names, rest.split(" |").next()?.trim_matches('`'))))
        .collect();
    for variable in VARIABLES {
        let row = rows.iter().find(|(names, _)| names.split("` `").any(|name| name == variable.name));
        let (_, said) = row.unwrap_or_else(|| panic!("README.md has no row for {}", variable.name));
        let in_words = IN_WORDS.iter().find(|(name, _)| *name == variable.name).map(|(_, words)| *words);
        assert_eq!(*said, in_words.or(variable.default).unwrap_or("none"), "{}", variable.name);
    }
}

/// What is written into the compose file cannot be forged on dstack, what is interpolated can.
#[test]
fn the_hosts_keys_are_trusted_by_the_override_file_alone_and_literally() {
    let (compose, dev) = (read("docker-compose.yml"), read("docker-compose.dev.yml"));
    for word in [SSH_TRUST_HOST_KEYS, "/root/.ssh"] {
        assert!(!compose.contains(word), "docker-compose.yml names {word}");
    }
    for line in ["      - /home/root/.ssh:/root/.ssh:ro", "      SSH_TRUST_HOST_KEYS: \"1\""] {
        assert!(dev.lines().any(|l| l == line), "docker-compose.dev.yml lacks `{line}`");
    }
}

/// The longest plan there is, with a bucket and a mux-server, and this besides.
fn longest(more: &[(&str, &str)]) -> Machine {
    let given = [
        ("MASTER_KEY", cvm_harness::machine::MASTER_KEY),
        ("S3_BUCKET", "claws"),
        ("S3_ENDPOINT", "https://s3.example.org"),
        ("AWS_ACCESS_KEY_ID", "id"),
        ("AWS_SECRET_ACCESS_KEY", "key"),
        ("MUX_BASE_URL", "https://mux.example.org"),
        ("MUX_REGISTER_KEY", "key"),
        ("MUX_INBOUND_URL", "https://claw.example.org/v1/mux/inbound"),
        ("ENABLE_DOCKER", "1"),
    ];
    let given = given.iter().chain(more).map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
    let (config, _) =
        Config::parse(&Environment::new(given)).unwrap_or_else(|_| panic!("this is a configuration"));
    let given = Given { config: &config, keys: None, owner_epoch: 0, has_preload: false };
    let (plan, _) = roles::gateway(&given).unwrap_or_else(|why| panic!("{why}"));
    let machine = Machine::new(plan);
    assert!(["dockerd", "storage", "mux"].iter().all(|name| machine.find(name).is_some()));
    machine
}

#[test]
fn a_stop_by_the_defaults_fits_what_dstack_and_the_compose_file_give_it() {
    let machine = longest(&[]);
    let compose = read("docker-compose.yml");
    let default = compose.lines().find_map(|l| {
        let word = l.trim().strip_prefix("stop_grace_period: ${STOP_GRACE_PERIOD:-")?;
        word.strip_suffix("s}")?.parse::<u64>().ok().map(Duration::from_secs)
    });
    assert_eq!(default, Some(ENGINE_WAITS));
    let budget = machine.stop_budget();
    assert_eq!(ENGINE_WAITS, Duration::from_secs(90), "as systemd gives a unit without TimeoutStopSec");
    assert!(budget <= STOP_AT_MOST && STOP_AT_MOST < ENGINE_WAITS, "a budget of {budget:?}");
    assert!(read("README.md").contains(&format!("a stop ends within {} seconds", budget.as_secs())));
    assert!(read("README.md").contains(&format!("--stop-timeout {}", ENGINE_WAITS.as_secs())));
}

#[test]
fn a_stop_that_may_outlast_the_engines_patience_is_said_with_what_to_set() {
    assert_eq!(longest(&[]).warning_of_a_long_stop(), None);
    for name in ["OPENCLAW_GATEWAY_STOP_TIMEOUT", "S3_DRAIN_TIMEOUT"] {
        let machine = longest(&[(name, "900")]);
        let said = machine.warning_of_a_long_stop().expect("a warning");
        let seconds = machine.stop_budget().as_secs() + 10;
        assert!(said.contains(&format!("STOP_GRACE_PERIOD={seconds}s")), "{said}");
    }
}

#[test]
fn compose_grants_single_rights_each_with_its_reason() {
    let compose = read("docker-compose.yml");
    assert!(!compose.contains("privileged:"), "the whole machine is more than is needed");
    let lines: Vec<&str> = compose.lines().collect();
    // A host that lacks one of them would not make the container.
    assert!(!lines.contains(&"    devices:"));
    for key in ["cap_add", "device_cgroup_rules", "security_opt", "sysctls", "volumes", "tmpfs"] {
        let start = lines.iter().position(|l| *l == format!("    {key}:"));
        let start = start.unwrap_or_else(|| panic!("docker-compose.yml lacks {key}"));
        let below = lines[start..].windows(2).take_while(|pair| pair[1].starts_with("      "));
        for pair in below.filter(|pair| pair[1].starts_with("      - ")) {
            assert!(pair[0].starts_with("      # "), "{key}: no reason for `{}`", pair[1].trim());
        }
    }
    for line in [
        "    restart: unless-stopped",
        "    hostname: openclaw",
        // As the ports inside are named.
        "      - \"1022:${SSH_PORT:-22}\"",
        "      - \"18789:${OPENCLAW_GATEWAY_PORT:-18789}\"",
        "      - \"18790:18790\"",
        "      - data:/data",
        "      - docker:/var/lib/docker",
        "      - /var/run/dstack.sock:/run/cvm-dstack/dstack.sock",
        "      test: [\"CMD\", \"cvm\", \"health\"]",
    ] {
        assert!(lines.contains(&line), "docker-compose.yml lacks `{line}`");
    }
}

#[test]
fn the_image_has_the_binaries_and_the_numbers_that_the_code_expects() {
    let debian = read("image/debian");
    assert!(debian.contains(&format!("\nGATEWAY_ID={}\n", cvm_protocol::accounts::GATEWAY_ID)));
    assert!(debian.contains(&format!("\nMUX_ID={}\n", cvm_protocol::accounts::MUX_UID)));
    let names = Command::new(repository().join("image/binaries")).output().expect("it runs");
    let names = String::from_utf8_lossy(&names.stdout).into_owned();
    let rooms = fs::read_dir(repository().join("src")).expect("src/ is there").flatten();
    for room in rooms.filter(|room| room.path().join("src/main.rs").exists()) {
        let room = room.file_name().to_string_lossy().into_owned();
        let name = if room == "cvm" { room } else { format!("cvm-{room}") };
        assert!(names.lines().any(|n| n == name), "image/binaries lacks {name}");
    }
}
