//! What `tests/setup` keeps for the next clone.

use cvm_harness::machine::repository;
use std::fs;
use std::path::Path;
use std::process::Command;

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
