//! Whether the gateway of this image knows the databases of this state. A gateway that is older than the databases
//! must not be started on them: a migration cannot be undone.
//!
//! `SQLite` keeps the number of a schema in the first page, and what was committed last may be in the
//! log. Both are read without `SQLite`: the first bytes of each database and all of its log, so that no database
//! of many gigabytes has to be fetched, copied or changed for it.
//!
//! A file that cannot be read is no reason to refuse: the gateway will say what is wrong with it.

use crate::files::{Dir, read_following};
use crate::report::{Failure, Outcome, detail};
use crate::root_dir::RootDir;
use cvm_protocol::paths;
use cvm_sqlite_log::{Log, Next};
use serde_json::Value;
use std::ffi::OsStr;
use std::io::Read;

/// The package's own file says which schemas it knows.
const PACKAGE: &str = "package.json";
const PACKAGE_MAX: usize = 4 * 1024 * 1024;
const SHARED: (&str, &str) = ("state", "openclaw.sqlite");
const AGENTS: &str = "agents";
const OF_AGENT: (&str, &str) = ("agent", "openclaw-agent.sqlite");
/// A limit for the number of agents; no machine has that many.
const AGENTS_MAX: usize = 10_000;

/// Of the first page of a database: what it begins with, and where the number is.
const MAGIC: &[u8] = b"SQLite format 3\0";
const NUMBER: std::ops::Range<usize> = 60..64;

/// What a gateway knows.
struct Known {
    version: String,
    shared: u32,
    agent: u32,
}

/// Fails where the state is newer than the gateway.
pub(crate) fn check(root_dir: &RootDir, state: &Dir) -> Outcome<()> {
    let Some(known) = known(root_dir) else { return Ok(()) };
    let shared = state.sub(OsStr::new(SHARED.0)).ok().and_then(|dir| number(&dir, SHARED.1));
    let newer: Vec<u32> = agents(state).into_iter().filter(|found| *found > known.agent).collect();
    let mut found = Vec::new();
    if let Some(number) = shared.filter(|number| *number > known.shared) {
        found.push(format!("state/openclaw.sqlite has schema {number} and it knows {}", known.shared));
    }
    if let Some(highest) = newer.iter().max() {
        found.push(format!(
            "the databases of {} agents have schemas up to {highest} and it knows {}",
            newer.len(),
            known.agent
        ));
    }
    if found.is_empty() {
        return Ok(());
    }
    Err(Failure::for_good(format!(
        "the state is newer than the gateway of this image, {}, which is not started and has touched nothing: {}. \
         Use the image that wrote the state, or a newer one; there is no way back but a copy of the state from before \
         that update",
        known.version,
        found.join(", and ")
    )))
}

/// None for a gateway that does not say it.
fn known(root_dir: &RootDir) -> Option<Known> {
    let file = root_dir.at(paths::OPENCLAW).with_file_name(PACKAGE);
    let bytes = read_following(&file, PACKAGE_MAX).ok()??;
    let package: Value = serde_json::from_slice(&bytes).ok()?;
    let number = |name: &str| {
        let number = package.pointer(&format!("/openclaw/schemaVersions/{name}"))?.as_u64()?;
        u32::try_from(number).ok()
    };
    let version = format!("openclaw {}", package.get("version")?.as_str()?);
    Some(Known { version, shared: number("state")?, agent: number("agent")? })
}

/// The numbers of the agents' databases.
fn agents(state: &Dir) -> Vec<u32> {
    let Ok(all) = state.sub(OsStr::new(AGENTS)) else { return Vec::new() };
    let names = std::fs::read_dir(all.path()).into_iter().flatten().flatten().take(AGENTS_MAX);
    let one = |name: &OsStr| number(&all.sub(name).ok()?.sub(OsStr::new(OF_AGENT.0)).ok()?, OF_AGENT.1);
    names.filter_map(|entry| one(&entry.file_name())).collect()
}

/// The number of a database's schema: of the newest first page that was committed.
fn number(dir: &Dir, name: &str) -> Option<u32> {
    let open = |suffix: &str| dir.open_plain(OsStr::new(&format!("{name}{suffix}"))).ok().flatten();
    let has_journal = open("-journal").is_some_and(|file| file.metadata().is_ok_and(|about| about.len() > 0));
    if has_journal {
        detail(format!("{name} waits for the gateway to repair it: its schema is not looked at"));
        return None;
    }
    let mut head = [0; NUMBER.end];
    open("")?.read_exact(&mut head).ok()?;
    let in_file = head.starts_with(MAGIC).then(|| word(head.get(NUMBER)?))??;
    let in_log = open("-wal").and_then(|file| committed(std::io::BufReader::new(file)));
    Some(in_log.unwrap_or(in_file))
}

fn word(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// The number in the last committed first page of a log.
fn committed(log: impl Read) -> Option<u32> {
    let mut log = Log::open(log).ok()??;
    let (mut seen, mut committed) = (None, None);
    while let Ok(Next::Frame(frame)) = log.next_frame() {
        if frame.page == 1 {
            seen = frame.content.get(NUMBER).and_then(word);
        }
        if frame.commits {
            committed = seen.or(committed);
        }
    }
    committed
}

#[cfg(test)]
mod tests {
    use super::*;
    use rusqlite::Connection;
    use std::fs;
    use std::path::PathBuf;

    struct Room {
        temp: tempfile::TempDir,
        root_dir: RootDir,
        state: Dir,
    }

    /// A gateway that knows schema 18 of the state and 23 of agents.
    fn room() -> Room {
        let temp = tempfile::tempdir().unwrap();
        let package = temp.path().join("opt/openclaw/node_modules/openclaw");
        for dir in [&package, &temp.path().join("data/openclaw/state")] {
            fs::create_dir_all(dir).unwrap();
        }
        let text = r#"{"name":"openclaw","version":"2026.9.6","openclaw":{"schemaVersions":{"state":18,"agent":23}}}"#;
        fs::write(package.join(PACKAGE), text).unwrap();
        let root_dir = RootDir::below(temp.path());
        let state = Dir::open(&temp.path().join("data/openclaw")).unwrap();
        Room { temp, root_dir, state }
    }

    impl Room {
        fn shared(&self) -> PathBuf {
            self.temp.path().join("data/openclaw/state/openclaw.sqlite")
        }

        fn agent(&self, id: &str) -> PathBuf {
            let dir = self.temp.path().join("data/openclaw/agents").join(id).join("agent");
            fs::create_dir_all(&dir).unwrap();
            dir.join(OF_AGENT.1)
        }

        /// What is said, if it is refused.
        fn says(&self) -> Option<String> {
            let files = || {
                let all = walk(self.temp.path());
                all.into_iter().map(|file| (fs::read(&file).unwrap(), file)).collect::<Vec<_>>()
            };
            let before = files();
            let said = check(&self.root_dir, &self.state).err().map(|failure| {
                assert!(!failure.retry, "trying again does not help");
                failure.why
            });
            assert!(files() == before, "it has changed something");
            said
        }
    }

    fn walk(dir: &std::path::Path) -> Vec<PathBuf> {
        let mut files = Vec::new();
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                files.extend(walk(&path));
            } else if entry.file_type().unwrap().is_file() {
                files.push(path);
            }
        }
        files.sort();
        files
    }

    /// A database that was closed.
    fn make(file: &std::path::Path, number: u32) {
        let db = Connection::open(file).unwrap();
        db.pragma_update(None, "journal_mode", "wal").unwrap();
        db.execute_batch(&format!("CREATE TABLE IF NOT EXISTS t (a); PRAGMA user_version = {number}"))
            .unwrap();
    }

    #[test]
    fn a_state_as_old_as_the_gateway_or_older_is_its_own() {
        let room = room();
        assert_eq!(room.says(), None);
        make(&room.shared(), 18);
        make(&room.agent("main"), 23);
        make(&room.agent("bob"), 1);
        assert_eq!(room.says(), None);
    }

    #[test]
    fn a_newer_state_is_refused_with_what_to_do() {
        let room = room();
        make(&room.shared(), 19);
        let said = room.says().unwrap();
        for wanted in
            ["openclaw 2026.9.6", "state/openclaw.sqlite has schema 19 and it knows 18", "a newer one"]
        {
            assert!(said.contains(wanted), "{said}");
        }
        make(&room.shared(), 18);
        make(&room.agent("main"), 23);
        make(&room.agent("secret-name"), 25);
        let said = room.says().unwrap();
        assert!(
            said.contains("the databases of 1 agents have schemas up to 25 and it knows 23")
                && !said.contains("secret-name"),
            "{said}"
        );
    }

    /// A database whose number `last` is in the log of a gateway that was killed, after `before` bytes of
    /// it were cut off at the end.
    fn killed(file: &std::path::Path, first: u32, last: &str, cut: usize) {
        make(file, first);
        let db = Connection::open(file).unwrap();
        db.execute_batch("PRAGMA wal_autocheckpoint = 0").unwrap();
        db.execute_batch(last).unwrap();
        let log = file.with_file_name(format!("{}-wal", file.file_name().unwrap().to_string_lossy()));
        let (mut log_bytes, bytes) = (fs::read(&log).unwrap(), fs::read(file).unwrap());
        let _ = db.execute_batch("ROLLBACK");
        drop(db);
        log_bytes.truncate(log_bytes.len() - cut);
        fs::write(&log, log_bytes).unwrap();
        fs::write(file, bytes).unwrap();
    }

    #[test]
    fn what_is_only_in_the_log_counts_as_far_as_it_was_committed() {
        let newer = "INSERT INTO t VALUES (1); PRAGMA user_version = 19";
        let case = |first, last: &str, cut| {
            let room = room();
            killed(&room.shared(), first, last, cut);
            room.says().is_some()
        };
        assert!(case(18, newer, 0));
        assert!(
            case(18, &format!("{newer}; INSERT INTO t VALUES (2)"), 0),
            "a commit without a first page came after it"
        );
        assert!(!case(18, newer, 1), "the last commit is cut off");
        assert!(!case(19, "PRAGMA user_version = 18", 0), "the newest one counts");
        assert!(case(19, "INSERT INTO t VALUES (1)", 0), "none in the log");
        // More than the cache holds goes to the log before it is committed.
        let large = "PRAGMA cache_size = 1; PRAGMA cache_spill = 1; BEGIN; PRAGMA user_version = 19; \
            WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 500) \
            INSERT INTO t SELECT randomblob(2000) FROM n";
        assert!(!case(18, large, 0), "it was never committed");
        assert!(case(18, &format!("{large}; COMMIT"), 0));
    }

    #[test]
    fn what_is_no_database_is_left_to_the_gateway() {
        let room = room();
        for text in ["", "this is no database, it is only text that is long enough to have a number in it"] {
            fs::write(room.shared(), text).unwrap();
            assert_eq!(room.says(), None);
        }
        fs::remove_file(room.shared()).unwrap();
        std::os::unix::fs::symlink("/dev/zero", room.shared()).unwrap();
        std::os::unix::fs::symlink("/", room.temp.path().join("data/openclaw/agents")).unwrap();
        assert_eq!(room.says(), None);
        fs::remove_file(room.shared()).unwrap();
        make(&room.shared(), 19);
        fs::write(room.shared().with_file_name("openclaw.sqlite-journal"), "hot").unwrap();
        assert_eq!(room.says(), None);
    }

    #[test]
    fn a_gateway_that_does_not_say_what_it_knows_is_not_judged() {
        let room = room();
        make(&room.shared(), 19);
        let package = room.temp.path().join("opt/openclaw/node_modules/openclaw").join(PACKAGE);
        for text in [
            r#"{"version":"2026.7.1"}"#,
            "no JSON",
            r#"{"version":"1","openclaw":{"schemaVersions":{"state":-1,"agent":2}}}"#,
        ] {
            fs::write(&package, text).unwrap();
            assert_eq!(room.says(), None);
        }
        fs::remove_file(&package).unwrap();
        assert_eq!(room.says(), None);
    }
}
