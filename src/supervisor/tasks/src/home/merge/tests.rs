use super::*;
use std::path::PathBuf;

struct Room {
    /// What is removed with the room.
    _temps: Vec<tempfile::TempDir>,
    from: PathBuf,
    to: PathBuf,
}

/// Two directories of one file system, and of two where this machine has them.
fn rooms() -> Vec<Room> {
    let near = tempfile::tempdir().unwrap();
    let mut rooms = vec![room(near.path().join("from"), near.path().join("to"), vec![near])];
    if let Ok(there) = tempfile::tempdir_in("/dev/shm") {
        let here = tempfile::tempdir().unwrap();
        rooms.push(room(here.path().join("from"), there.path().join("to"), vec![here, there]));
    }
    rooms
}

fn room(from: PathBuf, to: PathBuf, temps: Vec<tempfile::TempDir>) -> Room {
    fs::create_dir_all(&from).unwrap();
    fs::create_dir_all(&to).unwrap();
    Room { _temps: temps, from, to }
}

impl Room {
    fn fill(&self, files: &[(&str, &str)]) -> &Self {
        for (path, text) in files {
            let path = self.from.parent().unwrap().join(path);
            // `to/…` may be on the other file system.
            let path = path
                .strip_prefix(self.from.parent().unwrap().join("to"))
                .map_or(path.clone(), |p| self.to.join(p));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        self
    }

    /// All files of the target with their texts, sorted.
    fn result(&self) -> Vec<(String, String)> {
        let mut found = Vec::new();
        walk(&self.to, &self.to, &mut found);
        found.sort();
        found
    }
}

fn walk(top: &Path, dir: &Path, found: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && !path.is_symlink() {
            walk(top, &path, found);
        } else {
            let text = fs::read_to_string(&path).unwrap_or_else(|_| "unreadable".into());
            found.push((path.strip_prefix(top).unwrap().display().to_string(), text));
        }
    }
}

fn pairs(expected: &[(&str, &str)]) -> Vec<(String, String)> {
    expected.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect()
}

#[test]
fn everything_moves_into_an_empty_target_with_mode_and_time() {
    for room in rooms() {
        room.fill(&[("from/a", "1"), ("from/d/e/f", "2")]);
        let file = room.from.join("d/e/f");
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
        File::open(&file).unwrap().set_times(FileTimes::new().set_modified(old)).unwrap();
        symlink("nowhere", room.from.join("link")).unwrap();
        into(&room.from, &room.to).unwrap();
        assert!(!room.from.exists());
        let moved = fs::metadata(room.to.join("d/e/f")).unwrap();
        assert_eq!((moved.permissions().mode() & 0o7777, moved.modified().unwrap()), (0o640, old));
        assert_eq!(fs::read_link(room.to.join("link")).unwrap(), Path::new("nowhere"));
    }
}

#[test]
fn nothing_is_overwritten_and_nothing_is_lost() {
    for room in rooms() {
        room.fill(&[
            ("from/d/same", "x"),
            ("to/d/same", "x"),
            ("from/d/other", "home"),
            ("to/d/other", "volume"),
        ]);
        room.fill(&[("from/kind/f", "dir"), ("to/kind", "file"), ("from/g", "file"), ("to/g/h", "dir")]);
        let moved = into(&room.from, &room.to).unwrap();
        let expected = [
            ("d/other", "volume"),
            ("d/other.from-home-1", "home"),
            ("d/same", "x"),
            ("g.from-home-1", "file"),
            ("g/h", "dir"),
            ("kind", "file"),
            ("kind.from-home-1/f", "dir"),
        ];
        assert_eq!(room.result(), pairs(&expected));
        assert_eq!(moved.kept_beside, 3);
    }
}

#[test]
fn a_second_home_is_kept_beside_the_first() {
    for room in rooms() {
        room.fill(&[("to/f", "volume"), ("to/f.from-home-1", "first"), ("from/f", "second")]);
        into(&room.from, &room.to).unwrap();
        assert_eq!(
            room.result(),
            pairs(&[("f", "volume"), ("f.from-home-1", "first"), ("f.from-home-2", "second")])
        );
    }
}

#[test]
fn what_an_interrupted_run_copied_already_is_not_kept_twice() {
    for room in rooms() {
        room.fill(&[("from/f", "home"), ("to/f", "volume"), ("to/f.from-home-1", "home")]);
        room.fill(&[("from/g", "x"), ("to/g", "x"), ("to/.cvm-moving", "half"), ("from/h", "y")]);
        into(&room.from, &room.to).unwrap();
        let expected = [("f", "volume"), ("f.from-home-1", "home"), ("g", "x"), ("h", "y")];
        assert_eq!(room.result(), pairs(&expected));
        assert!(!room.from.exists());
    }
}

#[test]
fn a_database_and_its_log_stay_together_on_a_clash() {
    for room in rooms() {
        room.fill(&[("to/db", "volume"), ("from/db", "home"), ("from/db-wal", "home's log")]);
        into(&room.from, &room.to).unwrap();
        let expected = [("db", "volume"), ("db.from-home-1", "home"), ("db.from-home-1-wal", "home's log")];
        assert_eq!(room.result(), pairs(&expected));
    }
}

#[test]
fn a_log_never_comes_beside_a_database_that_is_not_its_own() {
    for room in rooms() {
        // The volume's database, closed in order; a stray log in the home.
        room.fill(&[("to/db", "volume"), ("from/db-wal", "stray")]);
        // A stray log on the volume; a database in the home.
        room.fill(&[("to/e-wal", "stray"), ("from/e", "home")]);
        into(&room.from, &room.to).unwrap();
        let expected = [
            ("db", "volume"),
            ("db.from-home-1-wal", "stray"),
            ("e-wal", "stray"),
            ("e.from-home-1", "home"),
        ];
        assert_eq!(room.result(), pairs(&expected));
    }
}

#[test]
fn a_database_is_completed_after_a_kill_at_any_point() {
    let whole = [("db", "pages"), ("db-shm", "index"), ("db-wal", "log")];
    // What has been placed, and what has been removed, by a run that was killed: in its order.
    let placed: [&[&str]; 4] = [&[], &["db-wal"], &["db-wal", "db-shm"], &["db-wal", "db-shm", "db"]];
    let removed: [&[&str]; 3] = [&[], &["db-wal"], &["db-wal", "db-shm"]];
    let states = placed.iter().map(|p| (*p, &[][..])).chain(removed.iter().map(|r| (placed[3], *r)));
    for (placed, removed) in states {
        for room in rooms() {
            for (name, text) in whole {
                if !removed.contains(&name) {
                    fs::write(room.from.join(name), text).unwrap();
                }
                if placed.contains(&name) {
                    fs::write(room.to.join(name), text).unwrap();
                }
            }
            into(&room.from, &room.to).unwrap();
            assert_eq!(room.result(), pairs(&whole), "{placed:?} {removed:?}");
        }
    }
}

#[test]
fn names_that_only_look_like_a_log_are_ordinary() {
    for room in rooms() {
        room.fill(&[("from/great-wal", "china"), ("from/-wal", "nameless")]);
        into(&room.from, &room.to).unwrap();
        assert_eq!(room.result(), pairs(&[("-wal", "nameless"), ("great-wal", "china")]));
    }
}

#[test]
fn sockets_are_dropped_and_do_not_hold_up_the_rest() {
    for room in rooms() {
        drop(std::os::unix::net::UnixListener::bind(room.from.join("s")).unwrap());
        room.fill(&[("from/t", "x")]);
        assert_eq!(into(&room.from, &room.to).unwrap().dropped, 1);
        assert_eq!(room.result(), pairs(&[("t", "x")]));
    }
}

#[test]
fn a_link_on_the_volume_is_not_walked_through() {
    for room in rooms() {
        let outside = room.to.parent().unwrap().join("outside");
        fs::create_dir_all(&outside).unwrap();
        symlink(&outside, room.to.join("d")).unwrap();
        room.fill(&[("from/d/f", "x")]);
        into(&room.from, &room.to).unwrap();
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        assert!(room.to.join("d.from-home-1/f").exists());
    }
}

#[test]
fn the_longest_name_can_be_kept_beside() {
    for room in rooms() {
        let name = "n".repeat(255);
        fs::write(room.from.join(&name), "home").unwrap();
        fs::write(room.to.join(&name), "volume").unwrap();
        into(&room.from, &room.to).unwrap();
        assert_eq!(fs::read_dir(&room.to).unwrap().count(), 2);
    }
}
