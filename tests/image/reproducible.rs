//! Two builds of one commit are the same.

use crate::fixtures::{LABEL, from_nothing, say, turn};
use cvm_harness::engine::{IMAGE, SECRET_MARK};
use cvm_harness::machine::{binaries, repository};
use cvm_harness::{Engine, difference, digest, soaks};
use cvm_needs::{Need, skip};
use std::collections::BTreeSet;
use std::process::{Command, Stdio};

/// Paths that are not the same in two builds of one commit. May only become shorter: none is left,
/// and that is part of its type.
const NOT_REPRODUCIBLE: [&str; 0] = [];

/// What an engine lays into every container, and the directory whose time that changes.
const OF_THE_ENGINE: &[&str] = &["etc", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf"];

#[test]
fn two_builds_of_one_commit_are_the_same() {
    let Some(_turn) = turn() else { return };
    let given = binaries().display().to_string();
    builds_are_the_same(&["--given", &given], from_nothing().then_some(IMAGE));
}

/// Both without what an engine keeps of earlier builds: files that only differ in their times are
/// the same to it. One of them may be there already.
#[track_caller]
fn builds_are_the_same(options: &[&str], built: Option<&str>) {
    let engine = Engine::builder();
    let first = built.unwrap_or("openclaw-cvm:first");
    let fresh: Vec<&str> =
        built.is_none().then_some(first).into_iter().chain(["openclaw-cvm:second"]).collect();
    for tag in &fresh {
        engine.build(tag, &[&["--no-cache", "--to", "target/image/again"], options].concat());
    }
    assert_same_trees(&engine, first, "openclaw-cvm:second");
    assert!(!has_secrets(&engine, first), "the certificates of the build are in a layer");
    for tag in fresh {
        engine.docker(&["rmi", "--force", tag]);
    }
}

/// Whether the build's certificates lie in any layer.
fn has_secrets(engine: &Engine, image: &str) -> bool {
    let mut save = engine.client(&["save", image]).stdout(Stdio::piped()).spawn().expect("docker runs");
    let layers = save.stdout.take().expect("stdout is piped");
    let found = Command::new("grep").args(["--quiet", "--text", SECRET_MARK]).stdin(layers).status();
    let found = found.expect("grep runs").success();
    assert!(save.wait().expect("docker is our child").success() || found);
    found
}

/// The stage that compiles, from nothing, twice.
#[test]
fn two_builds_with_the_compilers_of_the_image_are_the_same() {
    if !soaks() {
        skip(Need::Time, "half an hour is left to `make soak`");
        return;
    }
    let Some(_turn) = turn() else { return };
    builds_are_the_same(&[], None);
}

#[track_caller]
fn assert_same_trees(engine: &Engine, first: &str, second: &str) {
    let (first, second) = (tree(engine, first), tree(engine, second));
    let difference = difference(&first, &second);
    let path = |line: &str| line.split('"').nth(1).unwrap_or_default().to_owned();
    let found: BTreeSet<String> = difference.lines().map(path).collect();
    let known: BTreeSet<String> = NOT_REPRODUCIBLE.iter().map(|p| (*p).to_owned()).collect();
    say(&format!("\nNot reproducible in the image: {known:?}"));
    assert_eq!(found, known, "a path that is not known, or one that is reproducible by now:\n{difference}");
}

/// Everything in an image, a line for each path.
#[track_caller]
fn tree(engine: &Engine, image: &str) -> Vec<String> {
    let place = tempfile::tempdir_in(repository().join("target/image")).expect("target/ is writable");
    let container = engine.docker(&["create", "--network", "none", image]);
    let mut export = engine.client(&["export", &container]);
    let mut export = export.stdout(Stdio::piped()).spawn().expect("docker runs");
    let tar = Command::new("tar")
        .args(["--extract", "--same-owner", "--same-permissions", "--numeric-owner", "--directory"])
        .arg(place.path())
        .stdin(export.stdout.take().expect("stdout is piped"))
        .status();
    assert!(tar.expect("tar runs").success() && export.wait().expect("docker is our child").success());
    engine.docker(&["rm", "--volumes", &container]);
    let created = engine.inspect(image, &format!("index .Config.Labels \"{LABEL}.created\""));
    let date = Command::new("date").args(["+%s", "--date", &created]).output();
    let date: i64 =
        String::from_utf8_lossy(&date.expect("date runs").stdout).trim().parse().expect("a number");
    let lines = digest(place.path(), &[".dockerenv", "dev", "proc", "sys"]);
    let lines = lines.into_iter().filter(|line| {
        !OF_THE_ENGINE.contains(&line.split('"').nth(1).unwrap_or_default()) && !line.starts_with("\"\"")
    });
    let lines: Vec<String> = lines.collect();
    for line in &lines {
        let time = line.split(' ').find_map(|word| word.split_once('.')?.0.parse::<i64>().ok());
        assert!(time.is_none_or(|t| t <= date), "younger than the commit: {line}");
    }
    lines
}
