//! Whether the crates use each other as `docs/architecture.md` says.

use crate::machine::repository;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

type Arrows = BTreeMap<String, BTreeSet<String>>;

/// Of the manifests: every crate of ours but the tests, with those of ours that it depends on. What only its
/// tests depend on does not count.
fn drawn() -> Arrows {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(repository())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let packages = list(&metadata["packages"]);
    let ours: BTreeSet<String> = packages.iter().map(|package| text(&package["name"])).collect();
    let uses = |package: &Value| {
        let all = list(&package["dependencies"]);
        let of_the_program = all.iter().filter(|dependency| dependency["kind"] != "dev");
        of_the_program
            .map(|dependency| text(&dependency["name"]))
            .filter(|name| ours.contains(name))
            .collect()
    };
    let program = packages.iter().filter(|package| {
        !["cvm-tests", "cvm-needs"].contains(&package["name"].as_str().unwrap_or_default())
    });
    program.map(|package| (text(&package["name"]), uses(package))).collect()
}

/// The lines `crate -> crate, crate` of a document.
fn listed(document: &str) -> Arrows {
    let lines = document.lines().filter(|line| line.starts_with("cvm"));
    let arrow = lines.filter_map(|line| line.split_once("->"));
    arrow
        .map(|(from, to)| {
            (from.trim().to_owned(), to.split(',').map(|name| name.trim().to_owned()).collect())
        })
        .collect()
}

#[test]
fn crates_use_each_other_as_the_document_says() {
    let document = std::fs::read_to_string(repository().join("docs/architecture.md")).expect("the document");
    let (mut drawn, listed) = (drawn(), listed(&document));
    assert!(drawn.len() > 10, "{drawn:?}");
    for name in drawn.keys() {
        assert!(
            document.contains(&format!("| `{name}` |")),
            "docs/architecture.md does not say what {name} is for"
        );
    }
    drawn.retain(|_, uses| !uses.is_empty());
    assert_eq!(drawn, listed, "left: the manifests, right: docs/architecture.md");
}

#[test]
fn lists_are_read_as_they_are_meant() {
    let listed = listed("a -> b\ncvm-a -> cvm-b, cvm-c\ntext\ncvm  -> cvm-a\n");
    let named = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<BTreeSet<_>>();
    assert_eq!(listed.len(), 2);
    assert_eq!((&listed["cvm-a"], &listed["cvm"]), (&named(&["cvm-b", "cvm-c"]), &named(&["cvm-a"])));
}
