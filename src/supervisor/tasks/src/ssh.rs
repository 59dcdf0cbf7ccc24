//! Everything that sshd needs: its directory, its host key and its configuration. Also the keys that may log in, which
//! the task `volume` writes.
//!
//! This task comes before everything that can fail, because SSH is the way in when something else fails. So
//! nothing here waits long for a disk: the volume and the mounted keys are read by
//! threads that are left behind when they do not answer.
//!
//! `sshd -t` is not run: it takes 6 ms, a fifth of what the whole boot may take, and it repeats
//! what sshd does when it starts and writes into its log. What it could find is looked up here
//! (program, account, directory) or is written here and tested (configuration, key).
//!
//! Keys that the CVM's host has mounted count only if the configuration says so: otherwise the host would get a
//! root shell. A `*.pub` file in `~/.ssh` is no permission: it is the public half of a key of this machine.

use crate::files::{self, Dir, Kind};
use crate::programs;
use crate::report::{Failure, Outcome, Report};
use crate::root_dir::RootDir;
use crate::sshd_config::{SshdSettings, merge_authorized_keys, sshd_config};
use cvm_protocol::accounts::Account;
use cvm_protocol::authorized_keys::AuthorizedKey;
use cvm_protocol::paths;
use cvm_secrets::base64_bytes::PackedBytes;
use cvm_secrets::keys::HostKeySeed;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;
use zeroize::Zeroizing;

const SSHD: &str = "/usr/sbin/sshd";
/// The account that sshd's unprivileged half runs as, and the empty directory it lives in.
const SSHD_USER: &str = "sshd";
const SSHD_DIRECTORY: &str = "/run/sshd";
/// As sshd's own table of options has it, from 9.8 on.
const SOURCE_PENALTIES: &[u8] = b"persourcepenalties";
/// Where the keys of the CVM's host are mounted, read-only and with any owner.
const MOUNTED: &str = "/root/.ssh";
/// The topic of remarks about them.
const TOPIC: &str = "ssh keys";
const MOUNTED_NAMES: [&str; 2] = ["authorized_keys", "authorized_keys2"];
const KEYS_MAX: usize = 1024 * 1024;
/// On the volume, or in /run for this boot.
pub(crate) const SEED: &str = "ssh-host-key-seed";
/// Suffix of a file that holds no seed; a number follows.
const DAMAGED: &str = "damaged";
/// How long a disk may take to answer. One that works needs less than a millisecond.
const PATIENCE: Duration = Duration::from_secs(3);

type Seed = Zeroizing<[u8; 32]>;

/// Who may log in.
#[derive(Clone, Copy)]
pub(crate) struct Keys<'a> {
    /// The lines of `SSH_AUTHORIZED_KEYS`.
    pub(crate) given: &'a str,
    pub(crate) trust_host_keys: bool,
}

pub(crate) fn prepare(
    root_dir: &RootDir,
    port: u16,
    seed: Option<&PackedBytes>,
    trust_host_keys: bool,
    report: &mut Report,
) -> Outcome<()> {
    check_sshd(root_dir)?;
    let given = seed.map(derived).transpose()?;
    let run = Dir::ensure(&root_dir.at(paths::RUN), 0o700, None)?;
    Dir::ensure(&root_dir.at(SSHD_DIRECTORY), 0o755, None)?;
    let seed = match given {
        Some(seed) => seed,
        None => kept(root_dir, &run, report)?,
    };
    let key = HostKeySeed::from_bytes(&seed);
    run.write(name_of(paths::SSH_HOST_KEY), key.private_key_file().expose(), Kind::OF_THIS_BOOT)?;
    report.facts.host_key = Some(key.ssh_fingerprint());
    let text = |path: &str| root_dir.at(path).to_string_lossy().into_owned();
    let mounted = text(&format!("{MOUNTED}/{}", MOUNTED_NAMES[0]));
    let copied = text(paths::AUTHORIZED_KEYS);
    // The second, so that a key that is added later counts too, if sshd accepts its owner.
    let both = [copied.as_str(), mounted.as_str()];
    let config = sshd_config(&SshdSettings {
        port,
        listen_address: None,
        host_key_path: &text(paths::SSH_HOST_KEY),
        knows_source_penalties: programs::mentions(&root_dir.at(SSHD), SOURCE_PENALTIES),
        authorized_keys_paths: if trust_host_keys { &both } else { &both[..1] },
    });
    run.write(name_of(paths::SSHD_CONFIG), config.as_bytes(), Kind::OF_THIS_BOOT)?;
    Ok(())
}

/// Checks what `sshd -t` could complain about and this program does not write.
fn check_sshd(root_dir: &RootDir) -> Outcome<()> {
    if !programs::is_executable(&root_dir.at(SSHD)) {
        return Err(Failure::for_good(format!("there is no {SSHD} in this image; add openssh-server to it")));
    }
    let passwd = std::fs::read(root_dir.at("/etc/passwd")).unwrap_or_default();
    if Account::find(&String::from_utf8_lossy(&passwd), "", SSHD_USER).is_none() {
        return Err(Failure::for_good(
            "sshd does not start without a user of its own name; add to the image: useradd --system --home-dir \
             /run/sshd --shell /usr/sbin/nologin sshd",
        ));
    }
    Ok(())
}

/// The file's name, for a path of ours in /run.
fn name_of(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn derived(packed: &PackedBytes) -> Outcome<Seed> {
    let bug = || Failure::for_good("the seed of the SSH host key did not arrive whole: this is a bug");
    as_seed(&packed.unpack().ok_or_else(bug)?).ok_or_else(bug)
}

fn as_seed(bytes: &[u8]) -> Option<Seed> {
    let mut seed = Seed::default();
    if bytes.len() != seed.len() {
        return None;
    }
    seed.copy_from_slice(bytes);
    Some(seed)
}

/// The seed of a machine without `MASTER_KEY`: the volume's, or one for this boot.
fn kept(root_dir: &RootDir, run: &Dir, report: &mut Report) -> Outcome<Seed> {
    // Chosen before the volume is asked, so that a volume that answers too late stores the seed that is in use.
    let candidate = match run.read(SEED, KEYS_MAX)?.and_then(|bytes| as_seed(&bytes)) {
        Some(seed) => seed,
        None => random()?,
    };
    let (own_state, proposed) = (root_dir.at(paths::OWN_STATE), candidate.clone());
    let why = match within(PATIENCE, move || on_volume(&own_state, &proposed)) {
        Some(Ok((seed, None))) => return Ok(seed),
        Some(Ok((seed, Some(warning)))) => {
            report.warn(warning);
            return Ok(seed);
        }
        Some(Err(why)) => why,
        None => "the volume does not answer".to_owned(),
    };
    report.warn(format!(
        "the SSH host key is random and for this boot alone: {why}. Clients will see it change; set MASTER_KEY to have \
         the same one always"
    ));
    run.write(SEED, &candidate[..], Kind::OF_THIS_BOOT)?;
    Ok(candidate)
}

fn random() -> Outcome<Seed> {
    let mut seed = Seed::default();
    getrandom::fill(&mut seed[..])
        .map_err(|e| Failure::again(format!("this machine gives no random numbers ({e})")))?;
    Ok(seed)
}

/// The seed that the volume holds, or else `proposed`, stored there.
fn on_volume(own_state: &Path, proposed: &Seed) -> Result<(Seed, Option<String>), String> {
    let words = |e: files::FileError| e.to_string();
    let own = Dir::ensure(own_state, 0o700, None).map_err(words)?;
    let mut warning = None;
    if let Some(bytes) = own.read(SEED, KEYS_MAX).map_err(words)? {
        if let Some(seed) = as_seed(&bytes) {
            return Ok((seed, None));
        }
        let aside = own.set_aside(OsStr::new(SEED), DAMAGED).map_err(words)?;
        warning = Some(format!(
            "the stored seed of the SSH host key is damaged and kept as {}; clients will see a new host key",
            own.path().join(aside).display()
        ));
    }
    own.write(SEED, &proposed[..], Kind::KEPT).map_err(words)?;
    Ok((proposed.clone(), warning))
}

/// Removes every key: nobody may log in until it is known whose volume this is.
pub(crate) fn admit_nobody(run: &Dir) -> Outcome<()> {
    let name = name_of(paths::AUTHORIZED_KEYS);
    // Removed first: if the write fails, no key is left.
    run.remove(OsStr::new(name))?;
    Ok(run.write(name, b"", Kind::OF_THIS_BOOT)?)
}

/// Writes the keys that may log in, once it is known that the volume belongs to this environment.
pub(crate) fn admit(root_dir: &RootDir, run: &Dir, keys: Keys<'_>, report: &mut Report) -> Outcome<()> {
    let mounted = root_dir.at(MOUNTED);
    let (texts, complaints) = within(PATIENCE, move || mounted_keys(&mounted))
        .unwrap_or_else(|| (Vec::new(), vec![format!("{MOUNTED} does not answer")]));
    let mut sources: Vec<&str> = texts.iter().map(String::as_str).collect();
    if keys.trust_host_keys {
        for complaint in complaints {
            report.warn(format!("keys that are mounted are not taken: {complaint}"));
        }
        sources.push(keys.given);
    } else {
        forget_the_hosts(root_dir, &sources, keys.given, report);
        sources = vec![keys.given];
    }
    let merged = merge_authorized_keys(&sources, &[]);
    run.write(name_of(paths::AUTHORIZED_KEYS), merged.as_bytes(), Kind::OF_THIS_BOOT)?;
    if count(&merged) == 0 {
        report.remark(
            "ssh login",
            "nobody can log in over SSH: there is no key; set SSH_AUTHORIZED_KEYS to your public key",
        );
    }
    Ok(())
}

/// Makes everything void that the host has mounted: its keys, and its `config` and `rc`, which programs
/// that an operator runs as root would obey. A remark tells operators who relied on it.
fn forget_the_hosts(root_dir: &RootDir, mounted: &[&str], given: &str, report: &mut Report) {
    // A key that is also in the environment still counts.
    let all = merge_authorized_keys(&[&[given], mounted].concat(), &[]);
    let lost = count(&all).saturating_sub(count(&merge_authorized_keys(&[given], &[])));
    if lost > 0 {
        report.remark(
            TOPIC,
            &format!(
                "the CVM's host has mounted keys at {MOUNTED} ({lost}), and they open no shell any more: whoever runs the host can write them. Put the \
                 same lines into SSH_AUTHORIZED_KEYS and take the mount of {MOUNTED} out of the compose file. On a machine \
                 whose host you trust, docker-compose.dev.yml brings the old way back"
            ),
        );
    }
    let place = root_dir.at(MOUNTED);
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    match within(PATIENCE, move || umount2(&place, flags)) {
        // Where nothing is mounted there is nothing of the host's.
        Some(Ok(()) | Err(Errno::EINVAL | Errno::ENOENT)) => {}
        _ if lost == 0 => {}
        _ => report.warn(format!(
            "{MOUNTED} stays mounted, because this container may not unmount it (SYS_ADMIN): as root, do not use ssh \
             or git over ssh here; the host can write their settings"
        )),
    }
}

/// Lines that sshd would take.
fn count(keys: &str) -> usize {
    keys.lines().filter(|line| AuthorizedKey::parse(line).is_ok()).count()
}

/// The mounted keys, whatever user they belong to: root may read them, and only sshd would object to the owner.
fn mounted_keys(directory: &Path) -> (Vec<String>, Vec<String>) {
    let (mut texts, mut complaints) = (Vec::new(), Vec::new());
    for path in MOUNTED_NAMES.map(|name| PathBuf::from(directory).join(name)) {
        match files::read_following(&path, KEYS_MAX) {
            Ok(None) => {}
            Ok(Some(bytes)) => texts.push(String::from_utf8_lossy(&bytes).into_owned()),
            Err(error) => complaints.push(error.to_string()),
        }
    }
    (texts, complaints)
}

/// The result of `work`, if it comes in time. A result that comes later is thrown away.
fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || sender.send(work()));
    receiver.recv_timeout(limit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Report;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF2IEYeE/uIsINsUkH2mMuP5KUdr4bDd5mRqBOnvyJlo";

    fn image() -> (tempfile::TempDir, RootDir) {
        let temp = tempfile::tempdir().unwrap();
        for dir in ["usr/sbin", "etc", "run", "root/.ssh", "data"] {
            fs::create_dir_all(temp.path().join(dir)).unwrap();
        }
        fs::write(temp.path().join("usr/sbin/sshd"), "").unwrap();
        fs::set_permissions(temp.path().join("usr/sbin/sshd"), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(temp.path().join("etc/passwd"), "sshd:x:102:65534::/run/sshd:/usr/sbin/nologin\n").unwrap();
        let root_dir = RootDir::below(temp.path());
        (temp, root_dir)
    }

    fn run(root_dir: &RootDir, seed: Option<[u8; 32]>, given: &str) -> Report {
        run_with(root_dir, seed, Keys { given, trust_host_keys: false })
    }

    fn run_with(root_dir: &RootDir, seed: Option<[u8; 32]>, keys: Keys<'_>) -> Report {
        let mut report = Report::default();
        let seed = seed.map(|s| PackedBytes::pack(&s));
        prepare(root_dir, 2222, seed.as_ref(), keys.trust_host_keys, &mut report).unwrap();
        let run = Dir::open(&root_dir.at(paths::RUN)).unwrap();
        admit(root_dir, &run, keys, &mut report).unwrap();
        report
    }

    fn read(root: &Path, name: &str) -> String {
        fs::read_to_string(root.join("run/openclaw-cvm").join(name)).unwrap()
    }

    fn mode(path: PathBuf) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn the_same_seed_gives_the_same_host_key_at_every_boot() {
        let (temp, root_dir) = image();
        let first = run(&root_dir, Some([7; 32]), KEY);
        let key = read(temp.path(), "ssh_host_ed25519_key");
        let second = run(&root_dir, Some([7; 32]), KEY);
        assert_eq!(read(temp.path(), "ssh_host_ed25519_key"), key);
        assert!(first.facts.host_key.as_ref().unwrap().starts_with("SHA256:"));
        assert_eq!(first.facts.host_key, second.facts.host_key);
        assert!(first.notes.is_empty(), "{:?}", first.notes);
        assert!(!temp.path().join("data/.cvm").exists());
    }

    #[test]
    fn everything_is_for_root_alone_but_the_directory_of_sshd() {
        let (temp, root_dir) = image();
        run(&root_dir, Some([7; 32]), KEY);
        let at = |path: &str| mode(temp.path().join(path));
        assert_eq!((at("run/openclaw-cvm"), at("run/sshd")), (0o700, 0o755));
        for name in ["ssh_host_ed25519_key", "authorized_keys", "sshd_config"] {
            assert_eq!(at(&format!("run/openclaw-cvm/{name}")), 0o600, "{name}");
        }
    }

    #[test]
    fn without_a_master_key_the_host_key_lives_on_the_volume() {
        let (temp, root_dir) = image();
        let first = run(&root_dir, None, KEY);
        assert_eq!(mode(temp.path().join("data/.cvm")), 0o700);
        assert_eq!(mode(temp.path().join("data/.cvm").join(SEED)), 0o600);
        fs::remove_dir_all(temp.path().join("run/openclaw-cvm")).unwrap();
        assert_eq!(run(&root_dir, None, KEY).facts.host_key, first.facts.host_key);
    }

    #[test]
    fn a_volume_that_cannot_be_used_costs_the_key_and_not_the_way_in() {
        let (temp, root_dir) = image();
        fs::remove_dir(temp.path().join("data")).unwrap();
        fs::write(temp.path().join("data"), "not a directory").unwrap();
        let first = run(&root_dir, None, KEY);
        assert!(first.notes.iter().any(|n| n.text.contains("for this boot alone")), "{:?}", first.notes);
        // A second try in the same boot has the same key, and a volume that comes back gets it.
        fs::remove_file(temp.path().join("data")).unwrap();
        fs::create_dir(temp.path().join("data")).unwrap();
        assert_eq!(run(&root_dir, None, KEY).facts.host_key, first.facts.host_key);
        assert_eq!(fs::read(temp.path().join("data/.cvm").join(SEED)).unwrap().len(), 32);
    }

    #[test]
    fn a_volume_that_does_not_answer_is_not_waited_for() {
        let started = std::time::Instant::now();
        assert!(within(Duration::from_millis(20), || std::thread::sleep(Duration::from_secs(60))).is_none());
        assert!(started.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_damaged_seed_is_kept_aside_and_said() {
        let (temp, root_dir) = image();
        fs::create_dir(temp.path().join("data/.cvm")).unwrap();
        fs::write(temp.path().join("data/.cvm").join(SEED), "short").unwrap();
        let report = run(&root_dir, None, KEY);
        assert!(report.notes[0].text.contains("damaged"));
        assert_eq!(fs::read(temp.path().join("data/.cvm/ssh-host-key-seed.damaged-1")).unwrap(), b"short");
    }

    /// A host that has mounted this text.
    fn host_keys(root: &Path, text: &str) {
        let ssh = root.join("root/.ssh");
        fs::write(ssh.join("authorized_keys"), text).unwrap();
        fs::set_permissions(ssh.join("authorized_keys"), fs::Permissions::from_mode(0o666)).unwrap();
        fs::write(ssh.join("id_ed25519.pub"), format!("{KEY}x outbound\n")).unwrap();
    }

    #[test]
    fn the_hosts_keys_open_nothing_unless_they_are_trusted() {
        let (temp, root_dir) = image();
        host_keys(temp.path(), &format!("{KEY} mounted\r\n"));
        let other = KEY.replace("IF2I", "IF2J");
        let files = |config: &str| {
            let line = config.lines().find_map(|l| l.strip_prefix("AuthorizedKeysFile ")).unwrap();
            line.replace(&temp.path().display().to_string(), "")
        };
        run(&root_dir, Some([1; 32]), &other);
        assert_eq!(read(temp.path(), "authorized_keys"), format!("{other}\n"));
        assert_eq!(files(&read(temp.path(), "sshd_config")), "/run/openclaw-cvm/authorized_keys");

        let report = run_with(&root_dir, Some([1; 32]), Keys { given: &other, trust_host_keys: true });
        assert!(report.notes.is_empty(), "{:?}", report.notes);
        assert_eq!(read(temp.path(), "authorized_keys"), format!("{KEY} mounted\n{other}\n"));
        assert_eq!(
            files(&read(temp.path(), "sshd_config")),
            "/run/openclaw-cvm/authorized_keys /root/.ssh/authorized_keys"
        );
    }

    #[test]
    fn who_relied_on_the_hosts_keys_is_told_what_to_do() {
        let (temp, root_dir) = image();
        let topics = |report: &Report| -> Vec<String> {
            report.facts.remarks.iter().map(|remark| remark.topic.clone()).collect()
        };
        host_keys(temp.path(), &format!("{KEY} mounted\n# a comment\n"));
        let report = run(&root_dir, Some([1; 32]), "");
        assert_eq!(topics(&report), [TOPIC, "ssh login"]);
        let text = &report.facts.remarks[0].text;
        assert!(
            text.contains("(1), and they open no shell any more") && text.contains("SSH_AUTHORIZED_KEYS"),
            "{text}"
        );
        assert!(text.contains("docker-compose.dev.yml") && !text.contains("AAAA"), "{text}");
        // Of what is given as well, nothing is lost.
        assert_eq!(topics(&run(&root_dir, Some([1; 32]), &format!("{KEY} mine"))), [""; 0]);
        host_keys(temp.path(), "");
        assert_eq!(topics(&run(&root_dir, Some([1; 32]), "")), ["ssh login"]);
    }

    #[test]
    fn no_key_at_all_is_said_with_the_remedy() {
        let (_temp, root_dir) = image();
        let report = run(&root_dir, Some([1; 32]), "");
        assert!(
            report.notes[0].text.contains("nobody can log in")
                && report.notes[0].text.contains("SSH_AUTHORIZED_KEYS")
        );
    }

    #[test]
    fn an_image_without_sshd_or_its_user_says_what_to_add() {
        let (temp, root_dir) = image();
        fs::write(temp.path().join("etc/passwd"), "").unwrap();
        let no_user = prepare(&root_dir, 22, None, false, &mut Report::default()).unwrap_err();
        assert!(!no_user.retry && no_user.why.contains("useradd"));
        fs::remove_file(temp.path().join("usr/sbin/sshd")).unwrap();
        let no_sshd = prepare(&root_dir, 22, None, false, &mut Report::default()).unwrap_err();
        assert!(!no_sshd.retry && no_sshd.why.contains("openssh-server"));
    }

    #[test]
    fn no_secret_is_in_any_note() {
        let (temp, root_dir) = image();
        let report = run(&root_dir, None, KEY);
        let seed = fs::read(temp.path().join("data/.cvm").join(SEED)).unwrap();
        let said = format!("{:?}{:?}", report.notes, report.facts.host_key);
        let packed = serde_json::to_string(&PackedBytes::pack(&seed)).unwrap();
        assert!(!said.contains(packed.trim_matches('"')) && !said.contains("PRIVATE KEY"));
    }

    #[test]
    fn an_sshd_that_locks_out_addresses_is_told_not_to() {
        let (temp, root_dir) = image();
        fs::write(temp.path().join("usr/sbin/sshd"), b"\x7fELF\0persourcepenalties\0").unwrap();
        run(&root_dir, Some([7; 32]), KEY);
        assert!(read(temp.path(), "sshd_config").contains("PerSourcePenalties no"));
    }

    /// The real sshd reads what is written here.
    #[test]
    fn sshd_accepts_its_configuration_and_its_key() {
        let (temp, root_dir) = image();
        let _ = fs::copy(SSHD, temp.path().join("usr/sbin/sshd"));
        run(&root_dir, Some([7; 32]), KEY);
        if cvm_needs::lacks_root() {
            return;
        }
        let config = temp.path().join("run/openclaw-cvm/sshd_config");
        fs::create_dir_all(SSHD_DIRECTORY).unwrap();
        programs::must(Path::new(SSHD), &["-t", "-f", &config.to_string_lossy()], "").unwrap();
    }
}
