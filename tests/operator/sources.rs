//! What the tree of sources promises: its top level, its walls, and what an image says of its commit.

use crate::fixtures::{git, read, rust_files};
use cvm_harness::machine::repository;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

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

/// A file that no `mod` names is not compiled, and its tests never run.
#[test]
fn every_file_of_tests_belongs_to_a_program() {
    let manifests = read("tests/Cargo.toml") + &read("tests/fuzz/Cargo.toml");
    let files = rust_files("tests");
    let text = |file: &PathBuf| fs::read_to_string(file).expect("a source file");
    for file in &files {
        let program = file.strip_prefix(repository().join("tests")).expect("it lies there");
        let program = program.strip_prefix("fuzz").unwrap_or(program);
        if manifests.contains(&format!("path = \"{}\"", program.display()))
            || file.ends_with("needs/src/lib.rs")
        {
            continue;
        }
        // The module, and the folder in which another file names it.
        let module = if file.ends_with("mod.rs") { file.parent().expect("a folder") } else { file };
        let name = module.file_stem().expect("it has a name").display();
        let mut beside = files.iter().filter(|other| other.parent() == module.parent());
        let is_named = beside.any(|other| text(other).contains(&format!("mod {name};\n")));
        assert!(is_named, "no program has {}", file.display());
    }
}
