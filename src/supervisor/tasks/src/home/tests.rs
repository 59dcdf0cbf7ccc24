use super::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

/// A user whose files these tests can make: root makes anybody's, and is not fit to be the agent.
fn agent() -> (u32, u32) {
    match nix::unistd::geteuid() {
        root if root.is_root() => (1000, 1000),
        user => (user.as_raw(), nix::unistd::getegid().as_raw()),
    }
}

/// An image with root's home, a user of our own number, and a volume.
fn image() -> (tempfile::TempDir, RootDir) {
    let temp = tempfile::tempdir().unwrap();
    for dir in ["etc", "root", "home/agent", "data", "proc/self"] {
        fs::create_dir_all(temp.path().join(dir)).unwrap();
    }
    let (uid, gid) = agent();
    fs::write(temp.path().join("etc/passwd"), format!("agent:x:{uid}:{gid}::/home/agent:/bin/sh\n")).unwrap();
    fs::write(temp.path().join("etc/group"), format!("agent:x:{gid}:\n")).unwrap();
    mounted(temp.path(), &["/data"]);
    let root_dir = RootDir::below(temp.path());
    (temp, root_dir)
}

fn mounted(root: &Path, points: &[&str]) {
    let lines: Vec<String> =
        points.iter().map(|p| format!("36 35 98:0 / {p} rw - ext4 /dev/vda rw\n")).collect();
    fs::write(root.join("proc/self/mountinfo"), lines.concat()).unwrap();
}

fn run(root_dir: &RootDir) -> Report {
    let mut report = Report::default();
    prepare(root_dir, "agent", DockerUse::None, &mut report).unwrap();
    report
}

fn said(report: &Report, words: &str) -> bool {
    report.notes.iter().any(|n| n.text.contains(words))
}

const LINKS: [(&str, &str); 3] = [
    ("root/.openclaw", "/data/openclaw"),
    ("home/agent/.openclaw", "/data/openclaw"),
    ("home/agent/.config", "/data/.config"),
];

fn assert_linked(root: &Path) {
    for (link, target) in LINKS {
        assert_eq!(fs::read_link(root.join(link)).unwrap(), Path::new(target), "{link}");
    }
}

#[test]
fn a_fresh_machine_is_linked_without_a_word_and_twice_changes_nothing() {
    let (temp, root_dir) = image();
    for _ in 0..2 {
        let report = run(&root_dir);
        assert!(report.notes.is_empty(), "{:?}", report.notes);
        assert_linked(temp.path());
    }
    for dir in ["data/openclaw", "data/.config"] {
        assert_eq!(fs::metadata(temp.path().join(dir)).unwrap().mode() & 0o7777, 0o700);
    }
}

#[test]
fn what_lay_in_both_homes_moves_in() {
    let (temp, root_dir) = image();
    for (home, text) in [("root", "root's"), ("home/agent", "agent's")] {
        let dir = temp.path().join(home).join(".openclaw");
        fs::create_dir_all(dir.join("agents")).unwrap();
        fs::write(dir.join("openclaw.json"), text).unwrap();
        fs::write(dir.join("agents").join(home.replace('/', "-")), text).unwrap();
    }
    let report = run(&root_dir);
    assert_linked(temp.path());
    let state = temp.path().join("data/openclaw");
    // The gateway's user comes first, and what it had is what counts.
    assert_eq!(fs::read_to_string(state.join("openclaw.json")).unwrap(), "agent's");
    assert_eq!(fs::read_to_string(state.join("openclaw.json.from-home-1")).unwrap(), "root's");
    assert_eq!(fs::read_dir(state.join("agents")).unwrap().count(), 2);
    assert!(said(&report, "1 entries") && said(&report, "NAME.from-home-N"));
    // The names of the agent's files are not for the public log.
    assert!(!said(&report, "openclaw.json"));
}

#[test]
fn a_link_of_somebodys_is_kept_under_another_name() {
    let (temp, root_dir) = image();
    symlink("/mnt/elsewhere", temp.path().join("home/agent/.openclaw")).unwrap();
    fs::write(temp.path().join("home/agent/.config"), "a file").unwrap();
    let report = run(&root_dir);
    assert_linked(temp.path());
    let aside = |name: &str| temp.path().join("home/agent").join(name);
    assert_eq!(fs::read_link(aside(".openclaw.before-openclaw-cvm-1")).unwrap(), Path::new("/mnt/elsewhere"));
    assert_eq!(fs::read_to_string(aside(".config.before-openclaw-cvm-1")).unwrap(), "a file");
    assert!(said(&report, "a link to somewhere else") && said(&report, "was a file"));
}

#[test]
fn roots_settings_are_not_the_agents() {
    let (temp, root_dir) = image();
    let settings = temp.path().join("root/.config");
    run(&root_dir);
    assert!(fs::symlink_metadata(&settings).is_err(), "nothing is made there");
    // As versions before made it, on a container that is only restarted.
    for words in ["/data/.config", "../data/.config"] {
        fs::write(temp.path().join("data/.config/kept"), "1").unwrap();
        symlink(words, &settings).unwrap();
        assert!(said(&run(&root_dir), "does not lead to /data/.config any more"), "{words}");
        assert!(fs::symlink_metadata(&settings).is_err(), "{words}");
        assert!(temp.path().join("data/.config/kept").exists());
    }
    // Root's own stay as they are.
    fs::create_dir_all(settings.join("git")).unwrap();
    run(&root_dir);
    assert!(settings.join("git").is_dir());
    fs::remove_dir_all(&settings).unwrap();
    symlink("/mnt/elsewhere", &settings).unwrap();
    assert!(run(&root_dir).notes.is_empty());
    assert_eq!(fs::read_link(&settings).unwrap(), Path::new("/mnt/elsewhere"));
}

#[test]
fn a_link_that_comes_there_by_another_way_is_fine() {
    let (temp, root_dir) = image();
    run(&root_dir);
    fs::remove_file(temp.path().join("root/.openclaw")).unwrap();
    symlink("../data/openclaw", temp.path().join("root/.openclaw")).unwrap();
    assert!(run(&root_dir).notes.is_empty());
    assert_eq!(fs::read_link(temp.path().join("root/.openclaw")).unwrap(), Path::new("../data/openclaw"));
}

#[test]
fn a_mount_in_a_home_stays_and_stops_the_boot_only_where_the_state_belongs() {
    let (temp, root_dir) = image();
    fs::create_dir_all(temp.path().join("home/agent/.config/gcloud")).unwrap();
    mounted(temp.path(), &["/data", "/home/agent/.config/gcloud"]);
    let report = run(&root_dir);
    assert!(said(&report, "stays as it is"));
    assert!(temp.path().join("home/agent/.config/gcloud").is_dir());

    fs::remove_file(temp.path().join("home/agent/.openclaw")).unwrap();
    fs::create_dir_all(temp.path().join("home/agent/.openclaw")).unwrap();
    mounted(temp.path(), &["/data", "/home/agent/.openclaw"]);
    let failure = prepare(&root_dir, "agent", DockerUse::None, &mut Report::default()).unwrap_err();
    assert!(!failure.retry && failure.why.contains("mount it at /data/openclaw"), "{}", failure.why);
}

#[test]
fn data_that_is_no_volume_is_a_standing_remark() {
    let (temp, root_dir) = image();
    mounted(temp.path(), &["/"]);
    let report = run(&root_dir);
    assert_eq!(report.facts.remarks[0].topic, "storage");
    assert!(said(&report, "does not survive this container"));
}

#[test]
fn a_volume_of_the_old_product_changes_hands_once() {
    if cvm_needs::lacks_root() {
        return;
    }
    let (temp, root_dir) = image();
    fs::write(temp.path().join("etc/passwd"), "agent:x:4242:4243::/home/agent:/bin/sh\n").unwrap();
    fs::create_dir_all(temp.path().join("data/openclaw/agents")).unwrap();
    fs::write(temp.path().join("data/openclaw/agents/f"), "x").unwrap();
    assert!(said(&run(&root_dir), "3 entries now belong"));
    let given = fs::metadata(temp.path().join("data/openclaw/agents/f")).unwrap();
    assert_eq!((given.uid(), given.gid()), (4242, 4243));
    assert!(run(&root_dir).notes.is_empty());
}

#[test]
fn what_moves_in_belongs_to_the_agent() {
    if cvm_needs::lacks_root() {
        return;
    }
    let (temp, root_dir) = image();
    fs::write(temp.path().join("etc/passwd"), "agent:x:4242:4243::/home/agent:/bin/sh\n").unwrap();
    fs::create_dir_all(temp.path().join("root/.openclaw/d")).unwrap();
    fs::write(temp.path().join("root/.openclaw/d/f"), "x").unwrap();
    run(&root_dir);
    for name in ["d", "d/f"] {
        assert_eq!(fs::metadata(temp.path().join("data/openclaw").join(name)).unwrap().uid(), 4242);
    }
}

#[test]
fn a_volume_that_only_root_may_enter_is_opened_for_passing() {
    let (temp, root_dir) = image();
    fs::set_permissions(temp.path().join("data"), fs::Permissions::from_mode(0o700)).unwrap();
    assert!(said(&run(&root_dir), "its mode is corrected"));
    assert_eq!(fs::metadata(temp.path().join("data")).unwrap().mode() & 0o7777, 0o711);
    assert!(run(&root_dir).notes.is_empty());
}

#[test]
fn a_home_on_the_volume_does_not_lead_to_itself() {
    let (temp, root_dir) = image();
    let (uid, gid) = agent();
    fs::write(temp.path().join("etc/passwd"), format!("agent:x:{uid}:{gid}::/data:/bin/sh\n")).unwrap();
    run(&root_dir);
    run(&root_dir);
    assert!(fs::symlink_metadata(temp.path().join("data/.config")).unwrap().is_dir());
    assert_eq!(fs::read_link(temp.path().join("data/.openclaw")).unwrap(), Path::new("/data/openclaw"));
}

#[test]
fn a_state_directory_that_is_a_file_is_named() {
    let (temp, root_dir) = image();
    fs::write(temp.path().join("data/openclaw"), "x").unwrap();
    let failure = prepare(&root_dir, "agent", DockerUse::None, &mut Report::default()).unwrap_err();
    assert!(!failure.retry && failure.why.contains("/data/openclaw is not a directory"));
}

#[test]
fn who_had_containers_is_told_that_dockerd_is_off_by_default() {
    let (temp, root_dir) = image();
    let remarks = |docker| {
        let mut report = Report::default();
        prepare(&root_dir, "agent", docker, &mut report).unwrap();
        report.facts.remarks
    };
    // What dockerd makes for itself is no sign of use.
    let docker = temp.path().join("var/lib/docker");
    let images = docker.join("image/overlay2/imagedb/content/sha256");
    for dir in [&docker.join("containers"), &images] {
        fs::create_dir_all(dir).unwrap();
        assert_eq!(remarks(DockerUse::NoneByDefault), []);
    }
    for used in [docker.join("containers/0123"), images.join("4567")] {
        fs::create_dir(&used).unwrap();
        let said = remarks(DockerUse::NoneByDefault);
        assert!(said.len() == 1 && said[0].text.contains("ENABLE_DOCKER=1"), "{said:?}");
        assert_eq!([remarks(DockerUse::None), remarks(DockerUse::Allowed)], [[], []]);
        fs::remove_dir(&used).unwrap();
    }
}
