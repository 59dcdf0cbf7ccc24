//! Whose volume this is, and with it who may come in.
//!
//! PID 1 does not touch a volume, and this task may be killed at its deadline: until it has said that
//! the volume is this environment's, the environment's keys open no shell, and nothing that stands on
//! the volume is started. Whoever has put back an older state of the disk, or has none that answers,
//! gains nothing by it.
//!
//! Refuses to judge: `blueprint::volume` does. May import: `blueprint::{paths, volume, wire}`, `files`,
//! `places`, `report`, `ssh` (who may log in).

use crate::files::{Dir, Kind, trouble};
use crate::places::Places;
use crate::report::{Failure, Outcome, Report};
use crate::ssh::{self, Keys};
use cvm_blueprint::paths;
use cvm_blueprint::volume::{CLAIM, Claim, Found, MEMORY, judge};
use cvm_blueprint::wire;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::path::Path;

const MEMORY_MAX: usize = 64 * 1024;

pub(crate) fn open(places: &Places, claim: &Claim, keys: Keys<'_>, report: &mut Report) -> Outcome<()> {
    let run = Dir::ensure(&places.at(paths::RUN), 0o700, None)?;
    // Before the volume is looked at, which may take for ever: a former life may have left keys here.
    ssh::admit_nobody(&run)?;
    run.write(CLAIM, &wire::line(claim), Kind::OF_THIS_BOOT)?;
    let found = find(places)?;
    let good = judge(claim, found.clone()).map_err(|stranger| Failure::for_good(stranger.words()))?;
    ssh::admit(places, &run, keys, report)?;
    if found != Found::Memory(good.memory.clone()) {
        // A volume that takes nothing costs the gateway; who may mend it is in already.
        let own = Dir::ensure(&places.at(paths::OWN_STATE), 0o700, None)?;
        own.write(MEMORY, &wire::line(&good.memory), Kind::KEPT)?;
    }
    if let Some(line) = good.says {
        report.info(line);
    }
    Ok(())
}

fn find(places: &Places) -> Outcome<Found> {
    let own = places.at(paths::OWN_STATE);
    let bytes = match Dir::open(&own) {
        Ok(own) => own.read(MEMORY, MEMORY_MAX)?,
        Err(error) if error.errno == nix::errno::Errno::ENOENT => None,
        Err(error) => return Err(error.into()),
    };
    if let Some(bytes) = bytes {
        return Ok(serde_json::from_slice(&bytes).map_or(Found::Damaged, Found::Memory));
    }
    let data = places.at(paths::DATA);
    let holds = holds_state(&data).map_err(trouble("read", &data))?;
    Ok(if holds { Found::State } else { Found::Nothing })
}

/// Whether anything on the volume is more than what the engine or this very boot has put there: a
/// machine without `MASTER_KEY` keeps a host key, which the step beside this one may have just made.
fn holds_state(data: &Path) -> io::Result<bool> {
    let of_this_boot = |name: &OsStr| {
        let name = name.to_string_lossy();
        // With what a kill has left of writing them.
        [ssh::SEED, MEMORY].iter().any(|own| name.trim_start_matches('.').starts_with(own))
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
    use cvm_blueprint::volume::{Memory, Stranger};

    const KEY: &str = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIF2IEYeE/uIsINsUkH2mMuP5KUdr4bDd5mRqBOnvyJlo";

    struct Machine {
        temp: tempfile::TempDir,
        places: Places,
    }

    impl Machine {
        fn new() -> Self {
            let temp = tempfile::tempdir().unwrap();
            for dir in ["run", "data", "root"] {
                fs::create_dir(temp.path().join(dir)).unwrap();
            }
            let places = Places::below(temp.path());
            Self { temp, places }
        }

        fn with(self, path: &str, text: &str) -> Self {
            let path = self.temp.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
            self
        }

        fn boot(&self, claim: &Claim) -> Outcome<()> {
            open(&self.places, claim, Keys { given: KEY, trust_host_keys: false }, &mut Report::default())
        }

        fn admitted(&self) -> String {
            fs::read_to_string(self.places.at(paths::AUTHORIZED_KEYS)).unwrap()
        }

        fn memory(&self) -> Option<Memory> {
            let path = self.places.at(paths::OWN_STATE).join(MEMORY);
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
            machine.refuses(&on_dstack("", false), Stranger::Unproven);
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
    fn a_damaged_memory_is_refused_and_kept() {
        let machine = Machine::new().with("data/.cvm/volume.json", "{\"key\"");
        let failure = machine.boot(&on_dstack("a", true)).unwrap_err();
        assert_eq!((failure.why.as_str(), machine.admitted().as_str()), (Stranger::Damaged.words(), ""));
        assert_eq!(fs::read(machine.temp.path().join("data/.cvm/volume.json")).unwrap(), b"{\"key\"");
    }

    #[test]
    fn who_owns_a_volume_that_takes_nothing_is_let_in_to_mend_it() {
        // Something that cannot be replaced, in the place of a draft.
        let machine = Machine::new().with("data/.cvm/.volume.json.cvm-new/x", "");
        assert!(machine.boot(&on_dstack("a", false)).unwrap_err().retry);
        assert_eq!((machine.admitted(), machine.memory()), (format!("{KEY}\n"), None));
    }
}
