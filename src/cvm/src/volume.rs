//! `cvm volume adopt`: an operator gives the volume to another key.
//!
//! The supervisor does not touch a volume, so this command writes the volume's memory of its key itself,
//! and asks the supervisor to look again. On dstack it refuses an environment that has not proven its
//! owner: a forger who has come this far must not keep the volume.

use crate::args::{AdoptArgs, VolumeCommand};
use crate::control_socket;
use crate::failure::{Exit, Failure};
use crate::prompt;
use crate::stdout;
use crate::text;
use cvm_protocol::control::Verb;
use cvm_protocol::paths;
use cvm_protocol::volume::{CLAIM, Claim, Found, MEMORIES, Memory, adopted, judge, may_adopt};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

const WHAT: &str = "volume adopt";

pub(crate) fn run(what: &VolumeCommand) -> Result<Exit, Failure> {
    let VolumeCommand::Adopt(args) = what;
    let claim = claim(&Path::new(paths::RUN).join(CLAIM))?;
    // While an overlay is mounted at /data, the volume itself is mounted elsewhere.
    let roots = [paths::VOLUME, paths::DATA].map(|root| Path::new(root).join(".cvm"));
    adopt(args, &claim, &roots)
}

fn adopt(args: &AdoptArgs, claim: &Claim, roots: &[PathBuf]) -> Result<Exit, Failure> {
    let own = roots.iter().find(|own| MEMORIES.iter().any(|name| own.join(name).exists()));
    let own = own.or(roots.last()).ok_or_else(|| Failure::new(Exit::Bad, WHAT, "there is no volume"))?;
    // A file that the disk cannot read counts as damaged; the other one counts if it is whole.
    let files = MEMORIES.map(|name| match fs::read(own.join(name)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        read => Some(read.unwrap_or_default()),
    });
    let found = Found::in_files(&files).unwrap_or(Found::State);
    let is_damaged = found == Found::Damaged;
    let good = judge(claim, found);
    if let Some(next) = &args.fingerprint {
        let Ok(good) = good else {
            let cause = "the volume refuses this boot's key, so this boot cannot announce the next one";
            let hint = "announce it in a boot with the present key; `cvm status` shows the fault of this one";
            return Err(Failure::new(Exit::Refused, WHAT, cause).hint(hint));
        };
        write(own, &Memory { next: Some(next.clone()), ..good.memory }).map_err(|e| of_volume(&e))?;
        let text = "The next boot with that key takes the volume over. Until then the volume belongs to the present key.\n";
        return stdout::print(text).map(|()| Exit::Good);
    }
    if good.is_ok() && !is_damaged {
        return stdout::print("The volume belongs to this boot's key already; nothing was done.\n")
            .map(|()| Exit::Good);
    }
    may_adopt(claim).map_err(|cause| {
        let hint = "set CVM_OWNER in the compose file, and deploy again with the key that the volume knows";
        Failure::new(Exit::Refused, WHAT, cause).hint(hint)
    })?;
    if !args.yes {
        let whom = if claim.key.is_some() {
            "this environment's MASTER_KEY"
        } else {
            "a machine without MASTER_KEY"
        };
        let now = if is_damaged {
            "The volume's memory of its MASTER_KEY cannot be read, and neither can its copy"
        } else {
            "The volume belongs to another environment"
        };
        let question = format!(
            "{now}. If you go on, it belongs to {whom}, and no other environment can open it any more.\nGo on?"
        );
        prompt::confirm(WHAT, &question)?;
    }
    write(own, &adopted(claim)).map_err(|e| of_volume(&e))?;
    control_socket::ask(WHAT, Verb::Start { service: "gateway".to_owned() })?;
    stdout::print(
        "The volume belongs to this environment; services that waited for it start now: `cvm status`\n",
    )
    .map(|()| Exit::Good)
}

fn claim(path: &Path) -> Result<Claim, Failure> {
    let hint = "run it as root in the machine, where `cvm status` works; on a laptop there is no volume";
    let bytes = fs::read(path).map_err(|e| {
        Failure::new(Exit::Usage, WHAT, format!("{}: {}", path.display(), text::io_error(&e))).hint(hint)
    })?;
    serde_json::from_slice(&bytes).map_err(|_| {
        Failure::new(Exit::Usage, WHAT, format!("{} is not whole", path.display()))
            .hint("use the `cvm` of the same image")
    })
}

fn of_volume(error: &io::Error) -> Failure {
    Failure::new(Exit::Bad, WHAT, format!("the volume: {}", text::io_error(error)))
        .hint("look at the disk with `cvm doctor`")
}

/// Writes all copies. At whatever moment the power goes, each copy is the old one or the new one.
fn write(own: &Path, memory: &Memory) -> io::Result<()> {
    MEMORIES.iter().try_for_each(|name| write_to(own, name, memory))
}

fn write_to(own: &Path, name: &str, memory: &Memory) -> io::Result<()> {
    let draft = own.join(format!(".{name}.cvm-new"));
    match fs::remove_file(&draft) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft)?;
    file.write_all(&serde_json::to_vec(memory)?)?;
    file.sync_all()?;
    fs::rename(&draft, own.join(name))?;
    File::open(own)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(key: &str, proven: bool) -> Claim {
        Claim { key: Some(key.repeat(64)), proven, epoch: 0, dstack: true }
    }

    fn room() -> (tempfile::TempDir, Vec<PathBuf>) {
        let temp = tempfile::tempdir().unwrap();
        let own = temp.path().join("data/.cvm");
        fs::create_dir_all(&own).unwrap();
        let roots = vec![temp.path().join("volume/.cvm"), own];
        (temp, roots)
    }

    fn memory(own: &Path) -> Memory {
        serde_json::from_slice(&fs::read(own.join(MEMORIES[0])).unwrap()).unwrap()
    }

    fn of(fingerprint: Option<&str>) -> AdoptArgs {
        AdoptArgs { fingerprint: fingerprint.map(|key| key.repeat(64)), yes: true }
    }

    #[test]
    fn a_key_is_announced_in_a_boot_that_the_volume_accepts_and_in_no_other() {
        let (_temp, roots) = room();
        write(&roots[1], &adopted(&claim("a", false))).unwrap();
        assert!(adopt(&of(Some("b")), &claim("a", false), &roots).is_ok());
        assert_eq!(memory(&roots[1]).next, claim("b", false).key);
        let refused = adopt(&of(Some("c")), &claim("c", true), &roots).unwrap_err();
        assert_eq!(refused.exit, Exit::Refused);
        assert_eq!(memory(&roots[1]).next, claim("b", false).key);
        assert!(judge(&claim("b", false), Found::Memory(memory(&roots[1]))).is_ok());
    }

    #[test]
    fn an_environment_that_proves_nothing_does_not_get_the_volume_on_dstack() {
        let (_temp, roots) = room();
        write(&roots[1], &adopted(&claim("a", false))).unwrap();
        assert_eq!(adopt(&of(None), &claim("b", false), &roots).unwrap_err().exit, Exit::Refused);
        assert_eq!(memory(&roots[1]).key, claim("a", false).key);
        assert!(
            adopt(&of(None), &claim("a", false), &roots).is_ok(),
            "the owner of the volume may adopt it again"
        );
    }

    #[test]
    fn a_damaged_memory_is_written_anew_unless_it_has_a_good_copy() {
        let (_temp, roots) = room();
        write(&roots[1], &adopted(&claim("a", false))).unwrap();
        let home = Claim { dstack: false, ..claim("b", false) };
        fs::write(roots[1].join(MEMORIES[0]), "{").unwrap();
        let refused = adopt(&of(None), &claim("b", false), &roots).unwrap_err();
        assert_eq!(refused.exit, Exit::Refused);
        fs::write(roots[1].join(MEMORIES[1]), "{").unwrap();
        // Without a supervisor its start order fails, after the memory was written.
        let _ = adopt(&of(None), &home, &roots);
        for name in MEMORIES {
            let memory: Memory = serde_json::from_slice(&fs::read(roots[1].join(name)).unwrap()).unwrap();
            assert_eq!(memory, adopted(&home));
        }
    }

    #[test]
    fn a_memory_that_the_disk_does_not_give_is_replaced_and_the_other_one_counts() {
        let home = Claim { dstack: false, ..claim("b", false) };
        for hit in MEMORIES {
            let (_temp, roots) = room();
            write(&roots[1], &adopted(&claim("a", false))).unwrap();
            unreadable(&roots[1].join(hit));
            let stranger = adopt(&of(None), &claim("b", false), &roots).unwrap_err();
            assert_eq!(stranger.exit, Exit::Refused, "{hit}: it is known whose it is");
            adopt(&of(Some("c")), &claim("a", false), &roots).unwrap();
            assert_eq!(memory(&roots[1]).next, claim("c", false).key, "{hit}");
            assert!(fs::read(roots[1].join(hit)).is_ok(), "{hit}");
        }
        let (_temp, roots) = room();
        for name in MEMORIES {
            unreadable(&roots[1].join(name));
        }
        let refused = adopt(&of(Some("c")), &claim("a", false), &roots).unwrap_err();
        assert_eq!(refused.exit, Exit::Refused);
        // Without a supervisor the order to it fails; what comes before is done.
        let _ = adopt(&of(None), &home, &roots);
        assert_eq!(memory(&roots[1]), adopted(&home));
    }

    /// Reading it fails, as from a bad sector, and a rename can take its place.
    fn unreadable(file: &Path) {
        let _ = fs::remove_file(file);
        std::os::unix::fs::symlink(file, file).unwrap();
    }

    #[test]
    fn the_volume_is_found_behind_an_overlay() {
        let (_temp, roots) = room();
        fs::create_dir_all(&roots[0]).unwrap();
        write(&roots[0], &adopted(&claim("a", false))).unwrap();
        adopt(&of(Some("b")), &claim("a", false), &roots).unwrap();
        assert!(memory(&roots[0]).next.is_some() && !roots[1].join(MEMORIES[0]).exists());
    }
}
