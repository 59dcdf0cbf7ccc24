//! The gateway's user: found, or made; and in the group `docker`, if the agent may use docker.
//!
//! The files are edited here rather than by `useradd`: that takes a hundred times as long, does
//! more (mail spool, skeleton, its own log), and is not in every image. The lock is the one that
//! `useradd`, `passwd` and the C library take (lckpwdf(3)), so nobody edits at the same time.
//!
//! An account that exists is not changed. Names that would break the files' format are refused, and so are accounts
//! that the agent must not be: root, a system account, the mux client's.

use crate::files::{Dir, Kind, Owner, read_following};
use crate::programs;
use crate::report::{Failure, Outcome, Report};
use crate::root_dir::RootDir;
use cvm_protocol::accounts::{Account, GATEWAY_ID, MADE_IDS, group_id};
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

const ETC: &str = "/etc";
const DOCKER: &str = "docker";
const FILE_MAX: usize = 16 * 1024 * 1024;
/// As long as lckpwdf(3) waits.
const LOCK_WAIT: Duration = Duration::from_secs(15);

pub(crate) fn ensure(root_dir: &RootDir, name: &str, docker: bool, report: &mut Report) -> Outcome<Account> {
    check_name(name)?;
    let files = Files::read(root_dir)?;
    let account = match files.account(name) {
        Some(account) => account,
        None => create(root_dir, name, report)?,
    };
    if let Some(why) = account.unfit_for_the_agent() {
        return Err(Failure::for_good(format!(
            "the gateway does not run as {name}, because that account {why}; unset OPENCLAW_GATEWAY_USER, or name a user \
             with a number from 1000 on, or one that does not exist and is made"
        )));
    }
    if docker {
        join_docker(root_dir, &files, name, &account)?;
    }
    let home = root_dir.at(&account.home);
    if !home.exists() {
        Dir::ensure(&home, 0o700, Some(Owner { uid: account.uid, gid: account.gid }))?;
    }
    Ok(account)
}

fn check_name(name: &str) -> Outcome<()> {
    let first = name.chars().next().is_some_and(|c| c.is_ascii_lowercase() || c == '_');
    let rest = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '_' | '-'));
    if first && rest && name.len() <= 32 {
        return Ok(());
    }
    Err(Failure::for_good(
        "the gateway's user must have a name of at most 32 characters of a-z 0-9 _ -, the first no digit and no -",
    ))
}

/// The texts that describe accounts. Bytes that are no UTF-8 (an old comment) are kept as they
/// are when a file is written back: only whole lines are added or replaced.
struct Files {
    passwd: Vec<u8>,
    group: Vec<u8>,
}

impl Files {
    fn read(root_dir: &RootDir) -> Outcome<Self> {
        let text = |name: &str| -> Outcome<Vec<u8>> {
            let bytes = read_following(&root_dir.at(&format!("{ETC}/{name}")), FILE_MAX)?;
            Ok(bytes.map(|b| b.to_vec()).unwrap_or_default())
        };
        Ok(Self { passwd: text("passwd")?, group: text("group")? })
    }

    fn account(&self, name: &str) -> Option<Account> {
        Account::find(&String::from_utf8_lossy(&self.passwd), &String::from_utf8_lossy(&self.group), name)
    }

    /// A number that is neither a user's nor a group's.
    fn free_id(&self) -> Option<u32> {
        let column = |text: &[u8]| -> Vec<u32> {
            let text = String::from_utf8_lossy(text);
            text.lines().filter_map(|line| line.split(':').nth(2)?.parse().ok()).collect()
        };
        let taken: BTreeSet<u32> = column(&self.passwd).into_iter().chain(column(&self.group)).collect();
        [GATEWAY_ID].into_iter().chain(MADE_IDS).find(|id| !taken.contains(id))
    }
}

fn create(root_dir: &RootDir, name: &str, report: &mut Report) -> Outcome<Account> {
    let etc = Dir::open(&root_dir.at(ETC))?;
    let _lock = lock(root_dir)?;
    // Looked up again: another process may have made it while this one waited for the lock.
    let files = Files::read(root_dir)?;
    if let Some(account) = files.account(name) {
        return Ok(account);
    }
    let Some(uid) = files.free_id() else {
        return Err(Failure::for_good(format!("no number from 1000 to 1999 is left for the user {name}")));
    };
    let gid = group_id(&String::from_utf8_lossy(&files.group), name);
    if gid.is_none() {
        append(&etc, "gshadow", &format!("{name}:!::"), name)?;
        append(&etc, "group", &format!("{name}:x:{uid}:"), name)?;
    }
    let gid = gid.unwrap_or(uid);
    let home = format!("/home/{name}");
    let shell = ["/bin/bash", "/bin/sh"].into_iter().find(|s| programs::is_executable(&root_dir.at(s)));
    append(&etc, "shadow", &format!("{name}:!:::::::"), name)?;
    // The line in passwd comes last: with it the account exists.
    let shell = shell.unwrap_or("/bin/sh");
    append(&etc, "passwd", &format!("{name}:x:{uid}:{gid}:OpenClaw gateway:{home}:{shell}"), name)?;
    report.info(format!("made the user {name} (uid {uid}, gid {gid})"));
    Ok(Account { uid, gid, groups: vec![gid], home })
}

/// Adds a line for `name` to a file of accounts, unless there is one or there is no such file.
fn append(etc: &Dir, file: &str, line: &str, name: &str) -> Outcome<()> {
    edit(etc, file, |text| {
        let start = format!("{name}:");
        if text.split(|b| *b == b'\n').any(|l| l.starts_with(start.as_bytes())) {
            return None;
        }
        let mut text = text.to_vec();
        if !text.is_empty() && !text.ends_with(b"\n") {
            text.push(b'\n');
        }
        text.extend_from_slice(line.as_bytes());
        text.push(b'\n');
        Some(text)
    })
}

fn join_docker(root_dir: &RootDir, files: &Files, name: &str, account: &Account) -> Outcome<()> {
    let docker = group_id(&String::from_utf8_lossy(&files.group), DOCKER);
    if docker.is_none_or(|gid| account.groups.contains(&gid)) {
        return Ok(());
    }
    let etc = Dir::open(&root_dir.at(ETC))?;
    let _lock = lock(root_dir)?;
    for file in ["gshadow", "group"] {
        edit(&etc, file, |text| with_member(text, DOCKER, name))?;
    }
    Ok(())
}

/// The text with `member` in the line of `group`, whose last field lists the members.
fn with_member(text: &[u8], group: &str, member: &str) -> Option<Vec<u8>> {
    let start = format!("{group}:");
    let mut changed = false;
    let lines = text.split(|b| *b == b'\n').map(|line| {
        let mut line = line.to_vec();
        let members = line.rsplit(|b| *b == b':').next().unwrap_or_default();
        let is_in = members.split(|b| *b == b',').any(|m| m == member.as_bytes());
        if !changed && !is_in && line.starts_with(start.as_bytes()) {
            changed = true;
            if !members.is_empty() {
                line.push(b',');
            }
            line.extend_from_slice(member.as_bytes());
        }
        line
    });
    let text = lines.collect::<Vec<_>>().join(&b'\n');
    changed.then_some(text)
}

/// Replaces a file in one step, with the mode and owner it had. A file that is missing stays so.
fn edit(etc: &Dir, file: &str, change: impl FnOnce(&[u8]) -> Option<Vec<u8>>) -> Outcome<()> {
    let Some(stat) = etc.stat(OsStr::new(file))? else {
        return match file {
            "passwd" | "group" => {
                Err(Failure::for_good(format!("there is no /etc/{file} to add the gateway's user to")))
            }
            _ => Ok(()),
        };
    };
    let old = etc.read(file, FILE_MAX)?.unwrap_or_default();
    if let Some(new) = change(&old) {
        let owner = Owner { uid: stat.st_uid, gid: stat.st_gid };
        etc.write(file, &new, Kind { mode: stat.st_mode & 0o7777, owner: Some(owner), durable: true })?;
    }
    Ok(())
}

/// Held until dropped.
fn lock(root_dir: &RootDir) -> Outcome<File> {
    let path = root_dir.at("/etc/.pwd.lock");
    let mut options = OpenOptions::new();
    let file = options
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .map_err(crate::files::trouble("open", &path))?;
    // Both are small numbers by POSIX; the types of the structure are narrower than the constants'.
    let narrow = |number: i32| libc::c_short::try_from(number).unwrap_or_default();
    let wanted = libc::flock {
        l_type: narrow(libc::F_WRLCK),
        l_whence: narrow(libc::SEEK_SET),
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    let until = Instant::now() + LOCK_WAIT;
    while fcntl(&file, FcntlArg::F_SETLK(&wanted)).is_err() {
        if Instant::now() > until {
            return Err(Failure::again("/etc/.pwd.lock is held by another program that edits accounts"));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::path::Path;

    fn etc(files: &[(&str, &str)]) -> (tempfile::TempDir, RootDir) {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("etc")).unwrap();
        fs::create_dir_all(temp.path().join("home")).unwrap();
        for (name, text) in files {
            fs::write(temp.path().join("etc").join(name), text).unwrap();
        }
        let root_dir = RootDir::below(temp.path());
        (temp, root_dir)
    }

    fn text(root: &Path, name: &str) -> String {
        fs::read_to_string(root.join("etc").join(name)).unwrap()
    }

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash";
    const GROUP: &str = "root:x:0:\ndocker:x:998:alice\n";

    #[test]
    fn a_missing_user_is_made_once_and_can_use_docker() {
        if cvm_needs::lacks_root() {
            return;
        }
        let files = [
            ("passwd", PASSWD),
            ("group", GROUP),
            ("shadow", "root:*:1::::::\n"),
            ("gshadow", "docker:!::\n"),
        ];
        let (temp, root_dir) = etc(&files);
        let account = ensure(&root_dir, "openclaw", true, &mut Report::default()).unwrap();
        assert_eq!((account.uid, account.gid, account.home.as_str()), (990, 990, "/home/openclaw"));
        assert_eq!(ensure(&root_dir, "openclaw", true, &mut Report::default()).unwrap().groups, [990, 998]);
        assert_eq!(
            text(temp.path(), "passwd"),
            format!("{PASSWD}\nopenclaw:x:990:990:OpenClaw gateway:/home/openclaw:/bin/sh\n")
        );
        assert_eq!(text(temp.path(), "group"), "root:x:0:\ndocker:x:998:alice,openclaw\nopenclaw:x:990:\n");
        assert_eq!(text(temp.path(), "shadow"), "root:*:1::::::\nopenclaw:!:::::::\n");
        assert_eq!(text(temp.path(), "gshadow"), "docker:!::openclaw\nopenclaw:!::\n");
        assert!(temp.path().join("home/openclaw").is_dir());
    }

    #[test]
    fn a_half_made_account_is_completed() {
        if cvm_needs::lacks_root() {
            return;
        }
        let files = [("passwd", PASSWD), ("group", "openclaw:x:700:\n"), ("shadow", "openclaw:!:::::::\n")];
        let (temp, root_dir) = etc(&files);
        let account = ensure(&root_dir, "openclaw", true, &mut Report::default()).unwrap();
        assert_eq!((account.uid, account.gid), (990, 700));
        assert_eq!(text(temp.path(), "shadow"), "openclaw:!:::::::\n");
    }

    #[test]
    fn a_taken_number_is_not_given_twice() {
        let files = |passwd: &str, group: &str| Files { passwd: passwd.into(), group: group.into() };
        assert_eq!(files("", "").free_id(), Some(990));
        assert_eq!(files("a:x:990:1::/:/", "b:x:1000:").free_id(), Some(1001));
        let all: Vec<String> = MADE_IDS.map(|id| format!("u{id}:x:{id}:1::/:/")).collect();
        assert_eq!(files(&format!("a:x:990:1::/:/\n{}", all.join("\n")), "").free_id(), None);
    }

    #[test]
    fn the_agent_is_not_made_of_an_account_that_has_more_than_it_should() {
        let passwd =
            format!("{PASSWD}\nwww-data:x:33:33::/var/www:/bin/sh\nopenclaw-mux:x:18790:18790::/:/bin/sh");
        let (_temp, root_dir) = etc(&[("passwd", &passwd), ("group", GROUP)]);
        for name in ["root", "www-data", "openclaw-mux"] {
            let failure = ensure(&root_dir, name, true, &mut Report::default()).unwrap_err();
            assert!(!failure.retry && failure.why.contains("OPENCLAW_GATEWAY_USER"), "{}", failure.why);
        }
    }

    #[test]
    fn who_may_not_use_docker_is_not_in_its_group() {
        let passwd = format!("{PASSWD}\nnode:x:1000:1000::/tmp:/bin/zsh\n");
        let (temp, root_dir) = etc(&[("passwd", &passwd), ("group", GROUP)]);
        fs::create_dir(temp.path().join("tmp")).unwrap();
        ensure(&root_dir, "node", false, &mut Report::default()).unwrap();
        assert_eq!(text(temp.path(), "group"), GROUP);
        ensure(&root_dir, "node", true, &mut Report::default()).unwrap();
        assert!(text(temp.path(), "group").contains("docker:x:998:alice,node"));
    }

    #[test]
    fn an_account_that_exists_is_left_as_it_is() {
        let passwd = format!("{PASSWD}\nnode:x:1000:1000::/tmp:/bin/zsh\n");
        let (temp, root_dir) = etc(&[("passwd", &passwd), ("group", "node:x:1000:\n")]);
        fs::create_dir(temp.path().join("tmp")).unwrap();
        assert_eq!(ensure(&root_dir, "node", false, &mut Report::default()).unwrap().uid, 1000);
        assert_eq!(text(temp.path(), "passwd"), passwd);
        assert!(!temp.path().join("etc/.pwd.lock").exists());
    }

    #[test]
    fn a_name_that_would_break_the_files_is_refused() {
        for name in ["", "a:b", "a\nb", "../x", "-x", "1x", &"x".repeat(33)] {
            assert!(!check_name(name).unwrap_err().retry);
        }
    }

    #[test]
    fn joining_twice_changes_nothing() {
        let once = with_member(b"docker:x:1:\n", "docker", "u").unwrap();
        assert_eq!(once, b"docker:x:1:u\n");
        assert_eq!(with_member(&once, "docker", "u"), None);
        assert_eq!(with_member(b"dock:x:1:", "docker", "u"), None);
    }
}
