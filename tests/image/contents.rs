//! What is in the image: its size, labels, programs, bill of materials and trust stores.

use crate::fixtures::{LABEL, say, turn};
use cvm_harness::engine::IMAGE;
use cvm_harness::machine::repository;
use cvm_harness::{Engine, Network, least_safe};
use serde_json::Value;
use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

/// All but Node and openclaw, in bytes.
const LARGEST: f64 = 450e6;

#[test]
fn the_image_is_small_and_says_what_it_is_and_holds_no_leftovers() {
    let Some(_turn) = turn() else { return };
    let engine = Engine::runner(&Network::new(), |host| host);
    let run = |words: &[&str]| {
        let options = ["run", "--rm", "--network", "none", "--entrypoint", "sh", IMAGE, "-c"];
        engine.docker(&[&options, words].concat())
    };

    let weights =
        fs::read_to_string(repository().join("target/image/weights.txt")).expect("image/build wrote it");
    say(&format!("\nWhat weighs how much in the image, in MB:\n{weights}"));
    let all_else = weights.lines().find_map(|l| l.strip_suffix("  all but Node and openclaw"));
    let all_else: f64 = all_else.and_then(|n| n.trim().parse().ok()).expect("the table ends with it");
    assert!(all_else * 1e6 <= LARGEST, "{all_else} MB");

    let label = |name: &str| engine.inspect(IMAGE, &format!("index .Config.Labels \"{LABEL}.{name}\""));
    let revision = label("revision");
    match git(&["log", "-1", "--format=%H %cd", "--date=format-local:%Y-%m-%dT%H:%M:%SZ"]) {
        Some(said) => {
            let (commit, date) = said.split_once(' ').expect("two words");
            assert_eq!(revision.trim_end_matches("-dirty"), commit);
            assert_eq!(label("created"), date);
        }
        None => assert_eq!(revision, "unknown"),
    }
    assert_eq!(label("version"), env!("CARGO_PKG_VERSION"));

    let leftovers =
        run(&["find /var/lib/apt/lists /var/cache/apt /var/log /tmp /var/tmp ~root/.npm ~root/.cargo \
         /etc/ssh/ssh_host_* /run/secrets ! -type d 2>/dev/null; true"]);
    assert_eq!(leftovers, "");
    let compilers = run(&["for each in cc c++ g++ gcc ld as clang make rustc cargo go npm python3; do \
         command -v $each; done; ls -d /opt/openclaw/node_modules/npm 2>/dev/null; true"]);
    assert_eq!(compilers, "");
    // With ours in place of a program of git's.
    let message = ". /usr/lib/git-core/git-sh-i18n; what=it; eval_gettext 'fills $what, ${what}!'";
    assert_eq!(run(&[message]), "fills it, it!");
    assert_eq!(run(&["id -u openclaw; id -g openclaw; id -u openclaw-mux"]), "990\n990\n18790");
    assert_eq!(run(&["ls /usr/local/lib/openclaw-cvm"]), run_names());

    // A control is found, and nothing else.
    let privileged = "touch /tmp/control && chmod 6755 /tmp/control && find / -xdev -perm /6000";
    assert_eq!(run(&[privileged]), "/tmp/control");

    let bill = bill();
    assert_eq!(bill["spdxVersion"], "SPDX-2.3");
    let locators: BTreeSet<&str> = bill["packages"]
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(|p| p["externalRefs"][0]["referenceLocator"].as_str())
        .collect();
    for expected in [
        "pkg:npm/openclaw@",
        "pkg:deb/debian/docker.io@",
        "pkg:cargo/serde@",
        "pkg:golang/github.com/rclone/rclone@",
        "pkg:golang/stdlib@1.",
        "pkg:generic/node@24.",
        "pkg:deb/debian/libstdc%2B%2B6@",
    ] {
        assert!(locators.iter().any(|l| l.starts_with(expected)), "no {expected}");
    }
    assert!(!locators.iter().any(|l| l.contains('+')), "a plus sign that is not escaped");
    let id = engine.inspect(IMAGE, ".Id");
    let id = id.trim_start_matches("sha256:");
    assert!(bill["documentNamespace"].as_str().is_some_and(|name| name.ends_with(id)));
    assert_eq!(bill["packages"][0]["checksums"][0]["checksumValue"], id);
}

fn bill() -> Value {
    let bill = fs::read(repository().join("target/image/sbom.spdx.json")).expect("image/build wrote it");
    serde_json::from_slice(&bill).expect("JSON")
}

/// Both trust stores of the image, Debian's for all and Node's own. What looks at them finds a root that
/// is put beside them.
#[test]
fn no_trust_store_of_the_image_has_a_key_that_has_become_public() {
    let Some(_turn) = turn() else { return };
    let engine = Engine::runner(&Network::new(), |host| host);
    let judge = fs::read_to_string(repository().join("image/distrusted")).expect("a script");
    let debian = "cat /etc/ssl/certs/ca-certificates.crt";
    let node = "node -p 'tls.rootCertificates.join(`\n`)'";
    let found = |store: &str| {
        let script = "eval \"$STORE\" | sh -c \"$JUDGE\"";
        let (store, judge) = (format!("STORE={store}"), format!("JUDGE={judge}"));
        let options = ["run", "--rm", "--network", "none", "--env", &store, "--env", &judge];
        let output =
            engine.try_docker(&[&options[..], &["--entrypoint", "sh", IMAGE, "-c", script]].concat());
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    for store in [debian, node] {
        assert_eq!(found(store), "", "{store}");
        let control = format!("{{ {store}; echo '{EMSIGN_G3}'; }}");
        assert_eq!(found(&control), "emSign ECC Root CA - G3\n", "{store}");
    }
    // Ours have no list of their own: they trust the system's.
    let ours = "grep -rl 'emSign' /usr/local/lib/openclaw-cvm; true";
    let lists = engine.docker(&["run", "--rm", "--network", "none", "--entrypoint", "sh", IMAGE, "-c", ours]);
    assert_eq!(lists, "");
}

/// As it was trusted until October 2026.
const EMSIGN_G3: &str = "-----BEGIN CERTIFICATE-----
MIICTjCCAdOgAwIBAgIKPPYHqWhwDtqLhDAKBggqhkjOPQQDAzBrMQswCQYDVQQG
EwJJTjETMBEGA1UECxMKZW1TaWduIFBLSTElMCMGA1UEChMcZU11ZGhyYSBUZWNo
bm9sb2dpZXMgTGltaXRlZDEgMB4GA1UEAxMXZW1TaWduIEVDQyBSb290IENBIC0g
RzMwHhcNMTgwMjE4MTgzMDAwWhcNNDMwMjE4MTgzMDAwWjBrMQswCQYDVQQGEwJJ
TjETMBEGA1UECxMKZW1TaWduIFBLSTElMCMGA1UEChMcZU11ZGhyYSBUZWNobm9s
b2dpZXMgTGltaXRlZDEgMB4GA1UEAxMXZW1TaWduIEVDQyBSb290IENBIC0gRzMw
djAQBgcqhkjOPQIBBgUrgQQAIgNiAAQjpQy4LRL1KPOxst3iAhKAnjlfSU2fySU0
WXTsuwYc58Byr+iuL+FBVIcUqEqy6HyC5ltqtdyzdc6LBtCGI79G1Y4PPwT01xyS
fvalY8L1X44uT6EYGQIrMgqCZH0Wk9GjQjBAMB0GA1UdDgQWBBR8XQKEE9TMipuB
zhccLikenEhjQjAOBgNVHQ8BAf8EBAMCAQYwDwYDVR0TAQH/BAUwAwEB/zAKBggq
hkjOPQQDAwNpADBmAjEAvvNhzwIQHWSVB7gYboiFBS+DCBeQyh+KTOgNG3qxrdWB
CUfvO6wIBHxcmbHtRwfSAjEAnbpV/KlK6O3t5nYBQnvI+GDZjVGLVTv7jHvrZQnD
+JbNR6iC8hZVdyR+EhCVBCyj
-----END CERTIFICATE-----";

/// Of Debian's packages, as the list of the least safe versions has them; `operator/pinning.rs` looks at the rest.
#[test]
fn no_package_of_the_image_is_older_than_the_least_safe_version() {
    let Some(_turn) = turn() else { return };
    let engine = Engine::runner(&Network::new(), |host| host);
    let bill = bill();
    let packages = bill["packages"].as_array().expect("a list");
    let locator =
        |package: &Value| package["externalRefs"][0]["referenceLocator"].as_str().map(str::to_owned);
    for line in least_safe().iter().filter(|line| line.ecosystem == "deb") {
        let prefix = format!("pkg:deb/debian/{}@", line.name);
        let here = packages.iter().find(|p| locator(p).is_some_and(|l| l.starts_with(&prefix)));
        let here = here.unwrap_or_else(|| panic!("{} is not in the image", line.name));
        let version = here["versionInfo"].as_str().expect("a version");
        let options =
            ["run", "--rm", "--network", "none", "--entrypoint", "dpkg", IMAGE, "--compare-versions"];
        let compared = engine.try_docker(&[&options[..], &[version, "ge", &line.version]].concat());
        assert!(
            compared.status.success(),
            "{} {version}: before {} it {}",
            line.name,
            line.version,
            line.why
        );
    }
}

/// What git says of this repository, where it is one.
fn git(words: &[&str]) -> Option<String> {
    let safe = format!("safe.directory={}", repository().display());
    let mut git = Command::new("git");
    git.args(["-c", &safe]).args(words).env("TZ", "UTC").current_dir(repository());
    let output = git.output().ok().filter(|output| output.status.success())?;
    Some(String::from_utf8_lossy(&output.stdout).trim_end().to_owned())
}

/// The binaries, as `ls` shows them.
fn run_names() -> String {
    let output = Command::new(repository().join("image/binaries")).output().expect("image/binaries runs");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}
