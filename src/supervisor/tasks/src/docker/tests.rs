use super::*;
use nix::mount::{MsFlags, mount};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

/// Roots with a dockerd and with the capabilities given, as /proc shows them.
fn image(capabilities: &str) -> (tempfile::TempDir, RootDir) {
    let temp = tempfile::tempdir().unwrap();
    for dir in ["usr/sbin", "etc/docker", "run", "proc/self", "var/lib"] {
        fs::create_dir_all(temp.path().join(dir)).unwrap();
    }
    // A hierarchy of control groups, or the step would mount a real one into our tree.
    fs::create_dir_all(temp.path().join("sys/fs/cgroup/cpu")).unwrap();
    fs::write(temp.path().join("sys/fs/cgroup/cpu/cgroup.procs"), "").unwrap();
    let dockerd = temp.path().join("usr/sbin/dockerd");
    fs::write(&dockerd, "").unwrap();
    fs::set_permissions(&dockerd, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(temp.path().join("proc/self/status"), format!("Name:\tx\nCapEff:\t{capabilities}\n")).unwrap();
    let root_dir = RootDir::below(temp.path());
    (temp, root_dir)
}

const ALL: &str = "000001ffffffffff";
/// What a container has unless more is asked for.
const DEFAULT: &str = "00000000a80425fb";

fn config(root: &Path) -> Value {
    serde_json::from_slice(&fs::read(root.join("run/openclaw-cvm/dockerd.json")).unwrap()).unwrap()
}

#[test]
fn an_image_without_docker_says_how_to_do_without() {
    let (temp, root_dir) = image(ALL);
    fs::remove_file(temp.path().join("usr/sbin/dockerd")).unwrap();
    let failure = prepare(&root_dir, &mut Report::default()).unwrap_err();
    assert!(!failure.retry && failure.why.contains("ENABLE_DOCKER=0"), "{}", failure.why);
}

#[test]
fn missing_privileges_are_named_with_the_line_that_grants_them() {
    let (_temp, root_dir) = image(DEFAULT);
    let failure = prepare(&root_dir, &mut Report::default()).unwrap_err();
    assert!(!failure.retry);
    for words in ["CAP_NET_ADMIN and CAP_SYS_ADMIN are missing", "cap_add: [NET_ADMIN, SYS_ADMIN]"] {
        assert!(failure.why.contains(words), "{}", failure.why);
    }
}

#[test]
fn each_profile_is_named_for_what_it_forbids() {
    for (errno, option) in [(Errno::EPERM, "seccomp=unconfined"), (Errno::EACCES, "apparmor=unconfined")] {
        let why = refused(ContainerStep::PivotRoot, errno).why;
        assert!(why.contains("pivot_root is forbidden"), "{why}");
        assert!(why.contains(&format!("security_opt: [{option}]")), "{why}");
    }
}

#[test]
fn the_trial_changes_nothing_outside_its_thread() {
    let (temp, root_dir) = image(ALL);
    let seen = || {
        let at = Path::new("/proc/thread-self");
        let mounts = fs::read_to_string(at.join("mountinfo")).unwrap();
        (mounts.lines().map(str::to_owned).collect::<Vec<_>>(), fs::read_link(at.join("root")).unwrap())
    };
    // In a namespace of its own, for others mount beside it. What they unmount and whose directory
    // they remove is gone from here too.
    let (before, after) = std::thread::scope(|scope| {
        let alone = || {
            namespace::enter().unwrap();
            let before = seen();
            may_contain(&root_dir).unwrap();
            (before, seen())
        };
        scope.spawn(alone).join().unwrap()
    });
    assert_eq!(after.1, before.1);
    assert_eq!(after.0.first(), before.0.first());
    let new: Vec<_> = after.0.iter().filter(|mount| !before.0.contains(mount)).collect();
    assert!(new.is_empty(), "{new:?}");
    assert!(!temp.path().join("run/openclaw-cvm/mount-trial").exists());
}

#[test]
fn what_the_user_configured_counts() {
    let (temp, root_dir) = image(ALL);
    let own = r#"{"storage-driver":"btrfs","iptables":false,"ip6tables":true,"dns":["9.9.9.9"]}"#;
    fs::write(temp.path().join("etc/docker/daemon.json"), own).unwrap();
    prepare(&root_dir, &mut Report::default()).unwrap();
    let expected: Value = serde_json::from_str(own).unwrap();
    assert_eq!(config(temp.path()), expected);
}

#[test]
fn a_broken_file_of_the_users_is_said_and_gone_round() {
    let (temp, root_dir) = image(ALL);
    fs::write(temp.path().join("etc/docker/daemon.json"), "[1,").unwrap();
    let mut report = Report::default();
    prepare(&root_dir, &mut report).unwrap();
    assert!(report.notes.iter().any(|n| n.text.contains("not a JSON object")));
    // There is no iptables in this image.
    assert_eq!(config(temp.path())["iptables"], Value::Bool(false));
    assert!(report.notes.iter().any(|n| n.text.contains("do not reach the outside")));
}

#[test]
fn forwarding_that_is_off_for_good_is_said_and_gone_round() {
    let (temp, root_dir) = image(ALL);
    let setting = temp.path().join("proc/sys/net/ipv4/ip_forward");
    fs::create_dir_all(setting.parent().unwrap()).unwrap();
    let prepared = |text: &str| {
        fs::write(&setting, text).unwrap();
        let mut report = Report::default();
        prepare(&root_dir, &mut report).unwrap();
        (
            config(temp.path()).get("ip-forward").cloned(),
            report.notes.iter().any(|n| n.text.contains("sysctls:")),
        )
    };
    assert_eq!(prepared("1\n"), (None, false));
    // What can be written to is dockerd's business.
    assert_eq!(prepared("0\n"), (None, false));
    fs::write(&setting, "0\n").unwrap();
    let here = Some(setting.as_path());
    mount(here, &setting, None::<&str>, MsFlags::MS_BIND, None::<&str>).unwrap();
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, &setting, None::<&str>, read_only, None::<&str>).unwrap();
    let mut report = Report::default();
    let prepared = prepare(&root_dir, &mut report);
    nix::mount::umount2(&setting, nix::mount::MntFlags::MNT_DETACH).unwrap();
    prepared.unwrap();
    assert_eq!(config(temp.path())["ip-forward"], Value::Bool(false));
    assert!(report.notes.iter().any(|n| n.text.contains("sysctls: [net.ipv4.ip_forward=1]")));
}

#[test]
fn dockers_newer_image_store_is_the_users_to_choose() {
    let (temp, root_dir) = image(ALL);
    let own = r#"{"features":{"containerd-snapshotter":true}}"#;
    fs::write(temp.path().join("etc/docker/daemon.json"), own).unwrap();
    prepare(&root_dir, &mut Report::default()).unwrap();
    assert_eq!(config(temp.path()).get("storage-driver"), None);
}

#[test]
fn twice_is_as_good_as_once() {
    let (temp, root_dir) = image(ALL);
    prepare(&root_dir, &mut Report::default()).unwrap();
    let first = config(temp.path());
    prepare(&root_dir, &mut Report::default()).unwrap();
    assert_eq!(config(temp.path()), first);
    assert!(first.get("storage-driver").is_some());
    assert!(!temp.path().join("var/lib/docker/.cvm-trial").exists());
}
