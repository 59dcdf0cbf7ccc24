use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

const TOKEN: &str = "abcdefghijklmnopqrstuvwxyz012345";
const SEED: [u8; 32] = [3; 32];

struct Room {
    temp: tempfile::TempDir,
    root_dir: RootDir,
}

fn room() -> Room {
    let temp = tempfile::tempdir().unwrap();
    for dir in ["etc", "data/openclaw"] {
        fs::create_dir_all(temp.path().join(dir)).unwrap();
    }
    let (uid, gid) = (nix::unistd::geteuid(), nix::unistd::getegid());
    fs::write(temp.path().join("etc/passwd"), format!("agent:x:{uid}:{gid}::/home/agent:/bin/sh\n")).unwrap();
    let root_dir = RootDir::below(temp.path());
    Room { temp, root_dir }
}

fn task() -> StateTask {
    StateTask {
        user: "agent".into(),
        port: 18789,
        redpill: false,
        config: None,
        workspace: None,
        device_seed: Some(PackedBytes::pack(&SEED)),
        token: Some(PackedBytes::pack(TOKEN.as_bytes())),
    }
}

impl Room {
    fn run(&self, task: &StateTask) -> Report {
        let mut report = Report::default();
        prepare(&self.root_dir, task, &mut report).unwrap();
        report
    }

    fn at(&self, path: &str) -> std::path::PathBuf {
        self.temp.path().join("data").join(path)
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.at(path)).unwrap()
    }
}

fn with_workspace() -> StateTask {
    StateTask { workspace: Some(PackedBytes::pack(br#"{"AGENTS.md":"be kind"}"#)), ..task() }
}

#[test]
fn a_first_boot_writes_everything_and_a_second_nothing() {
    let room = room();
    let first = room.run(&with_workspace());
    assert!(room.read("openclaw/openclaw.json").contains("${OPENCLAW_GATEWAY_TOKEN}"));
    assert_eq!(room.read("openclaw/workspace/AGENTS.md"), "be kind");
    assert!(room.at("openclaw/identity/device.json").exists());
    assert!(first.facts.token.is_none() && first.facts.remarks.is_empty());
    for (path, mode) in [(".cvm", 0o700), ("openclaw/openclaw.json", 0o600), (".cvm/first-boot", 0o600)] {
        assert_eq!(fs::metadata(room.at(path)).unwrap().mode() & 0o7777, mode, "{path}");
    }
    let second = room.run(&with_workspace());
    assert!(second.notes.is_empty(), "{:?}", second.notes);
}

#[test]
fn a_state_that_a_newer_gateway_has_written_is_left_as_it_is() {
    let room = room();
    let package = room.temp.path().join("opt/openclaw/node_modules/openclaw");
    for dir in [&package, &room.at("openclaw/state")] {
        fs::create_dir_all(dir).unwrap();
    }
    let text = r#"{"version":"2026.9.6","openclaw":{"schemaVersions":{"state":18,"agent":23}}}"#;
    fs::write(package.join("package.json"), text).unwrap();
    let file = room.at("openclaw/state/openclaw.sqlite");
    let number =
        |n: u32| rusqlite::Connection::open(&file).unwrap().pragma_update(None, "user_version", n).unwrap();
    number(19);
    let failure = prepare(&room.root_dir, &with_workspace(), &mut Report::default()).unwrap_err();
    assert!(!failure.retry && failure.why.contains("schema 19"), "{failure:?}");
    let names = |path: &str| {
        let entries = fs::read_dir(room.at(path)).unwrap();
        entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!((names("openclaw"), names(".cvm")), (vec!["state".to_owned()], vec![]));
    number(18);
    room.run(&with_workspace());
    assert!(room.at("openclaw/openclaw.json").exists());
}

#[test]
fn everything_belongs_to_the_gateways_user() {
    if cvm_needs::lacks_root() {
        return;
    }
    let room = room();
    fs::write(room.temp.path().join("etc/passwd"), "agent:x:4242:4243::/home/agent:/bin/sh\n").unwrap();
    room.run(&with_workspace());
    for path in ["openclaw.json", "workspace", "workspace/AGENTS.md", "identity", "identity/device.json"] {
        let stat = fs::metadata(room.at("openclaw").join(path)).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (4242, 4243), "{path}");
    }
    assert_eq!(fs::metadata(room.at(".cvm/first-boot")).unwrap().uid(), 0);
}

#[test]
fn the_users_configuration_is_written_as_it_is_and_once() {
    let room = room();
    let own = StateTask { config: Some(PackedBytes::pack(b"{ /* mine */ }")), ..task() };
    room.run(&own);
    assert_eq!(room.read("openclaw/openclaw.json"), "{ /* mine */ }");
    let other = StateTask { config: Some(PackedBytes::pack(b"{}")), ..task() };
    room.run(&other);
    assert_eq!(room.read("openclaw/openclaw.json"), "{ /* mine */ }");
}

#[test]
fn what_the_agent_deleted_from_the_workspace_does_not_come_back() {
    let room = room();
    room.run(&with_workspace());
    fs::remove_file(room.at("openclaw/workspace/AGENTS.md")).unwrap();
    fs::remove_file(room.at("openclaw/openclaw.json")).unwrap();
    room.run(&with_workspace());
    assert!(room.at("openclaw/openclaw.json").exists());
    assert!(!room.at("openclaw/workspace/AGENTS.md").exists());
}

#[test]
fn a_volume_that_was_booted_before_this_product_gets_no_workspace_files() {
    let room = room();
    fs::write(room.at("openclaw/openclaw.json"), "{}").unwrap();
    room.run(&with_workspace());
    assert!(!room.at("openclaw/workspace").exists());
}

#[test]
fn a_first_boot_that_was_killed_anywhere_is_finished() {
    // What had been written when it was killed, in its order.
    let states: [&[(&str, &str)]; 4] = [
        &[(".cvm/first-boot", "begun\n")],
        &[(".cvm/first-boot", "begun\n"), ("openclaw/workspace/.AGENTS.md.cvm-new", "be k")],
        &[(".cvm/first-boot", "begun\n"), ("openclaw/workspace/AGENTS.md", "be kind")],
        &[
            (".cvm/first-boot", "begun\n"),
            ("openclaw/workspace/AGENTS.md", "be kind"),
            ("openclaw/openclaw.json", "{}"),
        ],
    ];
    for files in states {
        let room = room();
        for (path, text) in files {
            fs::create_dir_all(room.at(path).parent().unwrap()).unwrap();
            fs::write(room.at(path), text).unwrap();
        }
        room.run(&with_workspace());
        assert_eq!(room.read("openclaw/workspace/AGENTS.md"), "be kind");
        assert_eq!(room.read(".cvm/first-boot"), "done\n");
        assert!(room.at("openclaw/openclaw.json").exists());
        assert_eq!(fs::read_dir(room.at("openclaw/workspace")).unwrap().count(), 1);
    }
}

#[test]
fn a_configuration_that_is_a_link_to_nowhere_counts_as_there() {
    let room = room();
    symlink("/nowhere/openclaw.json", room.at("openclaw/openclaw.json")).unwrap();
    room.run(&with_workspace());
    assert_eq!(
        fs::read_link(room.at("openclaw/openclaw.json")).unwrap(),
        Path::new("/nowhere/openclaw.json")
    );
}

#[test]
fn another_token_in_the_configuration_is_a_standing_remark_and_stays() {
    let room = room();
    let own =
        r#"{"gateway":{"port":1234,"auth":{"mode":"token","token":"somebody-elses-token-1234567890"}}}"#;
    fs::write(room.at("openclaw/openclaw.json"), own).unwrap();
    let report = room.run(&task());
    let topics: Vec<&str> = report.facts.remarks.iter().map(|r| r.topic.as_str()).collect();
    assert_eq!(topics, ["gateway token", "gateway port"]);
    assert!(!report.notes.iter().any(|n| n.text.contains("somebody")));
    assert_eq!(room.read("openclaw/openclaw.json"), own);
}

#[test]
fn an_unreadable_configuration_is_a_remark_and_no_failure() {
    let room = room();
    fs::write(room.at("openclaw/openclaw.json"), [0xff, 0x00, b'{']).unwrap();
    assert_eq!(room.run(&task()).facts.remarks[0].topic, "gateway token");
    fs::remove_file(room.at("openclaw/openclaw.json")).unwrap();
    fs::create_dir(room.at("openclaw/openclaw.json")).unwrap();
    assert!(!room.run(&task()).facts.remarks.is_empty());
}

#[test]
fn without_a_master_key_the_token_lives_on_the_volume_and_is_reported() {
    let room = room();
    let keyless = StateTask { token: None, device_seed: None, ..task() };
    let token = |report: &Report| report.facts.token.as_ref().unwrap().unpack().unwrap().to_vec();
    let first = room.run(&keyless);
    let second = room.run(&keyless);
    assert_eq!(token(&first), token(&second));
    assert_eq!(token(&first), fs::read(room.at(".cvm/gateway-token")).unwrap());
    assert_eq!(fs::metadata(room.at(".cvm/gateway-token")).unwrap().mode() & 0o7777, 0o600);
    assert!(first.notes.iter().any(|n| n.text.contains("losing the volume loses them")));
    assert!(!room.at("openclaw/identity").exists());
    // The file holds it and nothing that is printed does.
    let text = String::from_utf8(token(&first)).unwrap();
    assert!(!first.notes.iter().any(|n| n.text.contains(&text)));
    assert!(!room.read("openclaw/openclaw.json").contains(&text));
}

#[test]
fn a_damaged_token_is_kept_aside_and_replaced() {
    let room = room();
    fs::create_dir_all(room.at(".cvm")).unwrap();
    fs::write(room.at(".cvm/gateway-token"), "shor").unwrap();
    let keyless = StateTask { token: None, device_seed: None, ..task() };
    let report = room.run(&keyless);
    assert!(report.notes.iter().any(|n| n.text.contains("is damaged")));
    assert_eq!(room.read(".cvm/gateway-token.damaged-1"), "shor");
    assert!(report.facts.token.is_some());
}

#[test]
fn a_user_that_does_not_exist_is_named() {
    let room = room();
    let failure =
        prepare(&room.root_dir, &StateTask { user: "ghost".into(), ..task() }, &mut Report::default())
            .unwrap_err();
    assert!(failure.retry && failure.why.contains("ghost"));
}

#[test]
fn no_secret_is_in_any_note() {
    let room = room();
    let secret = StateTask { config: Some(PackedBytes::pack(br#"{"key":"sk-hidden"}"#)), ..with_workspace() };
    let report = room.run(&secret);
    let said = format!("{:?}", report.notes);
    for word in [TOKEN, "sk-hidden", "be kind", "PRIVATE KEY"] {
        assert!(!said.contains(word), "{word}");
    }
}
