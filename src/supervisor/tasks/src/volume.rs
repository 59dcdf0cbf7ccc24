//! Decides whose volume this is, and so whose keys may log in.
//!
//! PID 1 does not touch a volume, and this task may be killed at its deadline. Until it has reported that
//! the volume belongs to this environment, the environment's keys open no shell, and nothing that needs
//! the volume is started. So an attacker gains nothing by putting back an older state of the disk, or by a disk that
//! does not answer.
//!
//! The rules are in `cvm_protocol::volume`.

use crate::files::{Dir, Kind, trouble};
use crate::report::{Failure, Outcome, Report};
use crate::root_dir::RootDir;
use crate::ssh::{self, Keys};
use cvm_protocol::json_lines;
use cvm_protocol::paths;
use cvm_protocol::volume::{CLAIM, Claim, Found, MEMORIES, judge};
use nix::errno::Errno;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::Path;
use zeroize::Zeroizing;

const MEMORY_MAX: usize = 64 * 1024;

pub(crate) fn open(root_dir: &RootDir, claim: &Claim, keys: Keys<'_>, report: &mut Report) -> Outcome<()> {
    let run = Dir::ensure(&root_dir.at(paths::RUN), 0o700, None)?;
    // Before the volume is looked at, which may take for ever: a former life may have left keys here.
    ssh::admit_nobody(&run)?;
    run.write(CLAIM, &json_lines::line(claim), Kind::OF_THIS_BOOT)?;
    shut_the_top(root_dir, report)?;
    let files = read(root_dir, claim)?;
    let found = match Found::in_files(&files) {
        Some(found) => found,
        None => without_memory(root_dir)?,
    };
    let good = judge(claim, found).map_err(|stranger| Failure::for_good(stranger.words()))?;
    ssh::admit(root_dir, &run, keys, report)?;
    if let Some(text) = good.remark {
        report.remark("volume", text);
    }
    // On a volume that cannot be written to, no gateway starts; the operators who may repair it can log in already.
    let kept = Some(Found::Memory(good.memory.clone()));
    for (name, there) in MEMORIES.into_iter().zip(files) {
        if Found::in_files(&[there]) != kept {
            let own = Dir::ensure(&root_dir.at(paths::OWN_STATE), 0o700, None)?;
            own.write(name, &json_lines::line(&good.memory), Kind::KEPT)?;
        }
    }
    if let Some(line) = good.says {
        report.info(line);
    }
    Ok(())
}

/// Makes sure that only root can rename our own directory on the volume and put another in its place: who may write
/// into the directory above it could, unless that is sticky.
fn shut_the_top(root_dir: &RootDir, report: &mut Report) -> Outcome<()> {
    for path in [paths::DATA, paths::OWN_STATE] {
        let directory = match Dir::open(&root_dir.at(path)) {
            Ok(directory) => directory,
            Err(error) if error.errno == Errno::ENOENT => continue,
            Err(error) => return Err(error.into()),
        };
        let was_open = directory.shut().map_err(|error| {
            Failure::again(format!(
                "{error}. Others than root may write there, and could put another {} into its place, so no shell is \
                 opened and no gateway started: on the host, make it root's, with mode 0755",
                paths::OWN_STATE
            ))
        })?;
        if was_open {
            report.remark(
                "volume",
                &format!(
                    "{path} could be changed by others than root, so the agent may have put files of its own into {}; \
                     now {path} is root's, and only root writes there",
                    paths::OWN_STATE
                ),
            );
        }
    }
    Ok(())
}

/// What lies in [`MEMORIES`].
fn read(root_dir: &RootDir, claim: &Claim) -> Outcome<[Option<Zeroizing<Vec<u8>>>; 2]> {
    let own = match Dir::open(&root_dir.at(paths::OWN_STATE)) {
        Ok(own) => own,
        Err(error) if error.errno == Errno::ENOENT => return Ok([None, None]),
        Err(error) => return Err(error.into()),
    };
    match MEMORIES.map(|name| own.read(name, MEMORY_MAX)) {
        [Ok(file), Ok(copy)] => Ok([file, copy]),
        // What the disk does not give is asked for again, unless the other one is good.
        [Ok(Some(good)), Err(_)] if Found::in_files(&[Some(&*good)]) != Some(Found::Damaged) => {
            Ok([Some(good), None])
        }
        [Err(_), Ok(Some(good))] if Found::in_files(&[Some(&*good)]) != Some(Found::Damaged) => {
            Ok([None, Some(good)])
        }
        // A disk that never gives them must not lock the owner out, who has no other way in on dstack.
        [Err(_), _] | [_, Err(_)] if claim.proven => Ok([Some(Zeroizing::default()), None]),
        [Err(error), _] | [_, Err(error)] => Err(Failure::again(format!(
            "{error}; there is no good copy of it either, so no shell is opened and no gateway started. Look at the \
             disk. Deploy with CVM_OWNER set, and the volume is this MASTER_KEY's again; on a docker host of your own \
             `docker exec -it CONTAINER cvm volume adopt` makes it anew"
        ))),
    }
}

fn without_memory(root_dir: &RootDir) -> Outcome<Found> {
    let data = root_dir.at(paths::DATA);
    let holds = holds_state(&data).map_err(trouble("read", &data))?;
    Ok(if holds { Found::State } else { Found::Nothing })
}

/// Whether anything on the volume is more than what the engine or this very boot has put there: a
/// machine without `MASTER_KEY` keeps a host key, which the step beside this one may have just made.
fn holds_state(data: &Path) -> io::Result<bool> {
    let of_this_boot = |name: &OsStr| {
        let name = name.to_string_lossy();
        // With what a kill has left of writing them.
        [ssh::SEED, MEMORIES[0]].iter().any(|own| name.trim_start_matches('.').starts_with(own))
    };
    let own = Path::new(paths::OWN_STATE).file_name().unwrap_or_default();
    for name in names(data)? {
        let path = data.join(&name);
        let counts = if name == own {
            names(&path)?.iter().any(|name| !of_this_boot(name))
        } else {
            name != "lost+found" && !(fs::symlink_metadata(&path)?.is_dir() && names(&path)?.is_empty())
        };
        if counts {
            return Ok(true);
        }
    }
    Ok(false)
}

fn names(directory: &Path) -> io::Result<Vec<OsString>> {
    match fs::read_dir(directory) {
        Ok(entries) => entries.map(|entry| Ok(entry?.file_name())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cvm_protocol::volume::{Memory, Stranger};

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF2IEYeE/uIsINsUkH2mMuP5KUdr4bDd5mRqBOnvyJlo";

    struct Machine {
        temp: tempfile::TempDir,
        root_dir: RootDir,
    }

    impl Machine {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            for dir in ["run", "data", "root"] {
                fs::create_dir(temp.path().join(dir)).unwrap();
            }
            let root_dir = RootDir::below(temp.path());
            Self { temp, root_dir }
        }

        fn with(self, path: &str, text: &str) -> Self {
            let path = self.temp.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        fn boot(&self, claim: &Claim) -> Outcome<()> {
            open(&self.root_dir, claim, Keys { given: KEY, trust_host_keys: false }, &mut Report::default())
        }

        fn admitted(&self) -> String {
            fs::read_to_string(self.root_dir.at(paths::AUTHORIZED_KEYS)).unwrap()
        }

        fn memory(&self) -> Option<Memory> {
            let path = self.root_dir.at(paths::OWN_STATE).join(MEMORIES[0]);
            fs::read(path).ok().map(|bytes| serde_json::from_slice(&bytes).unwrap())
        }

        /// Refused: nobody is let in, and the volume is as it was.
        #[track_caller]
        fn refuses(&self, claim: &Claim, stranger: Stranger) {
            let before = self.memory();
            let failure = self.boot(claim).unwrap_err();
            assert_eq!((failure.why.as_str(), failure.retry), (stranger.words(), false));
            assert_eq!((self.admitted().as_str(), self.memory()), ("", before));
        }

        #[track_caller]
        fn admits(&self, claim: &Claim) {
            self.boot(claim).unwrap();
            assert_eq!(self.admitted(), format!("{KEY}\n"));
        }
    }

    fn on_dstack(key: &str, proven: bool) -> Claim {
        let key = (!key.is_empty()).then(|| key.repeat(64));
        Claim { key, proven, epoch: 0, dstack: true }
    }

    #[test]
    fn the_first_key_is_remembered_and_the_keys_of_another_environment_are_taken_away() {
        let machine = Machine::new();
        machine.admits(&on_dstack("a", false));
        machine.admits(&on_dstack("a", false));
        // In the same /run, where the owner's keys still lie.
        machine.refuses(&on_dstack("b", false), Stranger::OtherKey);
        machine.refuses(&on_dstack("", false), Stranger::NoKey);
        machine.admits(&on_dstack("a", false));
    }

    #[test]
    fn what_the_version_before_has_left_is_state_and_what_this_boot_makes_is_not() {
        for state in
            ["data/openclaw/openclaw.json", "data/.cvm/gateway-token", "data/.cvm/storage/index", "data/file"]
        {
            let machine = Machine::new().with(state, "{}");
            machine.refuses(&on_dstack("b", false), Stranger::Unproven);
            machine.refuses(&on_dstack("", false), Stranger::UnprovenKeyless);
            machine.admits(&on_dstack("a", true));
            machine.refuses(&on_dstack("b", true), Stranger::OtherKey);
        }
        let mut fresh = Machine::new();
        for made in ["ssh-host-key-seed", ".ssh-host-key-seed.cvm-new", ".volume.json.cvm-new"] {
            fresh = fresh.with(&format!("data/.cvm/{made}"), "x");
        }
        fs::create_dir(fresh.temp.path().join("data/lost+found")).unwrap();
        fs::create_dir(fresh.temp.path().join("data/openclaw")).unwrap();
        fresh.admits(&on_dstack("a", false));
        assert_eq!(fresh.memory(), Some(Memory { key: on_dstack("a", false).key, ..Memory::default() }));
    }

    #[test]
    fn a_volume_that_cannot_be_read_lets_nobody_in_and_is_asked_again() {
        let machine = Machine::new();
        machine.admits(&on_dstack("a", false));
        let (data, aside) = (machine.temp.path().join("data"), machine.temp.path().join("aside"));
        fs::rename(&data, &aside).unwrap();
        fs::write(&data, "not a directory").unwrap();
        assert!(machine.boot(&on_dstack("a", false)).unwrap_err().retry);
        assert_eq!(machine.admitted(), "");
        fs::remove_file(&data).unwrap();
        fs::rename(&aside, &data).unwrap();
        machine.admits(&on_dstack("a", false));
    }

    #[test]
    fn a_damaged_memory_is_refused_and_kept_until_the_owner_proves_himself() {
        let files = MEMORIES.map(|name| format!("data/.cvm/{name}"));
        let machine = Machine::new().with(&files[0], "{\"key\"").with(&files[1], "");
        let failure = machine.boot(&on_dstack("a", false)).unwrap_err();
        assert_eq!((failure.why.as_str(), machine.admitted().as_str()), (Stranger::Damaged.words(), ""));
        assert_eq!(fs::read(machine.temp.path().join(&files[0])).unwrap(), b"{\"key\"");
        let mut report = Report::default();
        let keys = Keys { given: KEY, trust_host_keys: false };
        open(&machine.root_dir, &on_dstack("a", true), keys, &mut report).unwrap();
        assert!(report.facts.remarks[0].text.contains("damaged"), "{:?}", report.facts.remarks);
        machine.admits(&on_dstack("a", false));
        machine.refuses(&on_dstack("b", true), Stranger::OtherKey);
    }

    #[test]
    fn one_of_the_two_memories_is_enough_and_brings_the_other_back() {
        let files = MEMORIES.map(|name| format!("data/.cvm/{name}"));
        let machine = Machine::new();
        machine.admits(&on_dstack("a", false));
        let at = |path: &str| machine.temp.path().join(path);
        let whole = fs::read(at(&files[0])).unwrap();
        for hit in &files {
            let harms: [&dyn Fn(); 3] = [
                &|| fs::write(at(hit), "{\"key\"").unwrap(),
                &|| fs::remove_file(at(hit)).unwrap(),
                // Nothing that can be read.
                &|| fs::write(at(hit), vec![b' '; MEMORY_MAX + 1]).unwrap(),
            ];
            for harm in harms {
                harm();
                let failure = machine.boot(&on_dstack("b", false)).unwrap_err();
                assert_eq!(failure.why, Stranger::OtherKey.words(), "{hit}");
                machine.admits(&on_dstack("a", false));
                assert_eq!(files.each_ref().map(|file| fs::read(at(file)).unwrap()), [&*whole, &*whole]);
            }
        }
        for file in &files {
            fs::write(at(file), vec![b' '; MEMORY_MAX + 1]).unwrap();
        }
        let failure = machine.boot(&on_dstack("a", false)).unwrap_err();
        assert!(failure.retry && failure.why.contains("cvm volume adopt"), "{}", failure.why);
        assert_eq!(machine.admitted(), "");
        let mut report = Report::default();
        let keys = Keys { given: KEY, trust_host_keys: false };
        open(&machine.root_dir, &on_dstack("a", true), keys, &mut report).unwrap();
        assert!(report.facts.remarks[0].text.contains("damaged"), "{:?}", report.facts.remarks);
        assert_eq!(files.each_ref().map(|file| fs::read(at(file)).unwrap()), [&*whole, &*whole]);
    }

    #[test]
    fn the_agent_cannot_put_a_directory_of_its_own_into_the_place_of_ours() {
        use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
        const AGENT: u32 = 1000;
        let owner = |path: &Path| {
            let meta = fs::metadata(path).unwrap();
            (meta.uid(), meta.gid(), meta.mode() & 0o7777)
        };
        let open_tops: [(u32, u32, u32); 4] =
            [(AGENT, AGENT, 0o755), (0, 0, 0o777), (0, AGENT, 0o775), (AGENT, AGENT, 0o1777)];
        for (uid, gid, mode) in open_tops {
            let machine = Machine::new();
            machine.admits(&on_dstack("a", false));
            let data = machine.temp.path().join("data");
            chown(&data, Some(uid), Some(gid)).expect("this test needs root");
            fs::set_permissions(&data, fs::Permissions::from_mode(mode)).unwrap();
            let mut report = Report::default();
            let keys = Keys { given: KEY, trust_host_keys: false };
            open(&machine.root_dir, &on_dstack("a", false), keys, &mut report).unwrap();
            let (now, _, bits) = owner(&data);
            assert_eq!((now, bits & 0o022), (0, 0), "{uid} {mode:o}");
            assert!(report.facts.remarks[0].text.contains("only root writes"), "{:?}", report.facts.remarks);
        }
        // Its own directory, of a time when the top was open.
        let machine = Machine::new();
        machine.admits(&on_dstack("a", false));
        let own = machine.root_dir.at(paths::OWN_STATE);
        chown(&own, Some(AGENT), Some(AGENT)).unwrap();
        machine.admits(&on_dstack("a", false));
        assert_eq!(owner(&own).0, 0);
        // Root's and sticky: nobody renames what is another's, and whoever made it so may need it.
        let data = machine.temp.path().join("data");
        fs::set_permissions(&data, fs::Permissions::from_mode(0o1777)).unwrap();
        machine.admits(&on_dstack("a", false));
        assert_eq!(owner(&data).2, 0o1777);
    }

    #[test]
    fn in_a_run_that_takes_nothing_the_keys_of_a_former_life_open_nothing() {
        let machine = Machine::new();
        machine.admits(&on_dstack("a", false));
        let keys = machine.root_dir.at(paths::AUTHORIZED_KEYS);
        // Something that cannot be replaced, in the place of a draft.
        fs::create_dir(keys.with_file_name(".authorized_keys.cvm-new")).unwrap();
        assert!(machine.boot(&on_dstack("b", false)).unwrap_err().retry);
        assert!(!keys.exists());
    }

    #[test]
    fn who_owns_a_volume_that_takes_nothing_is_let_in_to_mend_it() {
        // Something that cannot be replaced, in the place of a draft.
        let machine = Machine::new().with("data/.cvm/.volume.json.cvm-new/x", "");
        assert!(machine.boot(&on_dstack("a", false)).unwrap_err().retry);
        assert_eq!((machine.admitted(), machine.memory()), (format!("{KEY}\n"), None));
    }
}
