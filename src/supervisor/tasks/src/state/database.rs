//! The gateway's database: looks into it for its device without leaving a trace, and gives it one.
//!
//! To look: the database is in WAL mode: what was committed last may be in its `-wal` only, and nobody but
//! `SQLite` may put the two together. `SQLite` in turn would make an index beside the log, owned by
//! us. So it is shown the database under a second name, in a directory of our own, with a copy of
//! the log: it reads everything and can change nothing.
//!
//! To write: as the gateway's user, who owns the tree. Root would leave files of root's there, or
//! follow a link of the agent's to a file that only root can open.
//!
//! No row is changed, no table is made, and root writes nothing where the gateway is not root.

use crate::files::{Dir, FileResult, Owner, is_kind, trouble};
use cvm_sys::as_user::AsUser;
use nix::errno::Errno;
use nix::sys::stat::{FileStat, SFlag};
use nix::unistd::{Gid, Uid};
use rusqlite::config::DbConfig;
use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DIRECTORY: &str = "state";
const DATABASE: &str = "openclaw.sqlite";
const LOG: &str = "openclaw.sqlite-wal";
const JOURNAL: &str = "openclaw.sqlite-journal";
/// One row by its key takes a few dozen steps of `SQLite`'s machine. A program that takes more is not
/// the gateway's, and is broken off.
const STEPS_MAX: i32 = 100_000;
/// The gateway's schema: one row for each identity, the device's own is `primary`.
const QUERY: &str = "SELECT device_id FROM device_identities WHERE identity_key = 'primary'";
/// The same row out of the legacy file's text, so that the private key needs no other copy of ours.
const INSERT: &str = "INSERT INTO device_identities \
    (identity_key, device_id, public_key_pem, private_key_pem, created_at_ms, updated_at_ms) \
    SELECT 'primary', json_extract(?1, '$.deviceId'), json_extract(?1, '$.publicKeyPem'), \
    json_extract(?1, '$.privateKeyPem'), json_extract(?1, '$.createdAtMs'), json_extract(?1, '$.createdAtMs')";
/// The gateway does not run yet: whoever holds a lock now does not let go of it soon.
const BUSY: Duration = Duration::from_secs(2);
/// Where the second name is: below our own state, which the agent cannot enter.
const SIDE_ROOM: &str = "look";
/// What may be copied where no second name can be given. The gateway's own file is some MB.
const COPY_MAX: i64 = 512 * 1024 * 1024;

/// What the state says about its device.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// No database, and no file either.
    None,
    /// The database has the table and no device in it.
    NoRow,
    /// The database has no such table.
    NoTable,
    Id(String),
    Unclear(String),
}

pub(crate) fn device(own: &Dir, state: &Dir) -> FileResult<Found> {
    if !state.has(DIRECTORY)? {
        return Ok(Found::None);
    }
    let unclear = |why: &str| Ok(Found::Unclear(why.to_owned()));
    let Ok(directory) = state.sub(OsStr::new(DIRECTORY)) else { return unclear("state/ is not a directory") };
    let Some(database) = directory.stat(OsStr::new(DATABASE))? else { return Ok(Found::None) };
    if !is_kind(&database, SFlag::S_IFREG) {
        return unclear("state/openclaw.sqlite is not a file");
    }
    if has_content(directory.stat(OsStr::new(JOURNAL))?) {
        return unclear(
            "state/openclaw.sqlite was not closed in order and waits for the gateway to repair it",
        );
    }
    if !has_content(directory.stat(OsStr::new(LOG))?) {
        // Nothing is anywhere but in the file: SQLite may take it for unchangeable, and then
        // it opens nothing else.
        return Ok(ask(&directory.path().join(DATABASE), "immutable=1"));
    }
    let room = SideRoom::fill(own, &directory, &database);
    Ok(match room {
        Ok(room) => ask(&room.path.join(DATABASE), "mode=ro"),
        Err(why) => Found::Unclear(why),
    })
}

fn has_content(stat: Option<FileStat>) -> bool {
    stat.is_some_and(|s| s.st_size > 0)
}

fn ask(path: &Path, how: &str) -> Found {
    let read = || -> rusqlite::Result<Option<String>> {
        let flags =
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_URI | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(uri(path, how), flags)?;
        distrust(&connection)?;
        connection.query_row(QUERY, [], |row| row.get(0)).optional()
    };
    match read() {
        Ok(Some(id)) => Found::Id(id),
        Ok(None) => Found::NoRow,
        Err(error) if has_no_such_table(&error) => Found::NoTable,
        Err(error) => Found::Unclear(why(&error)),
    }
}

/// Puts the device of a legacy file's text into a database that has the table and not the row.
/// The gateway must not be running.
pub(crate) fn insert_device(state: &Dir, legacy: &[u8], owner: Owner) -> Result<(), String> {
    let directory = state.sub(OsStr::new(DIRECTORY)).map_err(|e| e.to_string())?;
    let path = directory.path().join(DATABASE);
    let legacy = std::str::from_utf8(legacy).map_err(|_| "the derived device is no text: this is a bug")?;
    let write = move || {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(path, flags)?;
        connection.busy_timeout(BUSY)?;
        distrust(&connection)?;
        connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_TRIGGER, false)?;
        connection.execute(INSERT, [legacy])?;
        // Closing takes the log into the database and removes it; so its errors count.
        connection.close().map_err(|(_, error)| error)
    };
    as_owner(owner, write)?.map_err(|error| why(&error))
}

/// Does `work` with the rights that the owner has to files.
fn as_owner<T>(owner: Owner, work: impl FnOnce() -> T) -> Result<T, String> {
    let (uid, gid) = (Uid::from_raw(owner.uid), Gid::from_raw(owner.gid));
    let acting = (uid != Uid::effective()).then(|| AsUser::of(uid, gid)).transpose();
    let _acting = acting.map_err(|_| {
        "the rights of the gateway's user cannot be had; the container needs the capabilities SETGID and SETUID"
    })?;
    Ok(work())
}

/// The file is the agent's: what looks like a table may be a view, which can compute anything.
fn distrust(connection: &Connection) -> rusqlite::Result<()> {
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.progress_handler(STEPS_MAX, Some(|| true))
}

/// An error's text may quote the file's content; its code does not.
fn why(error: &rusqlite::Error) -> String {
    let code = error.sqlite_error_code().map_or("unreadable", words);
    format!("state/openclaw.sqlite: {code}")
}

/// A database without the table was made by another gateway than ours, or is brand-new.
fn has_no_such_table(error: &rusqlite::Error) -> bool {
    let generic = error.sqlite_error_code() == Some(ErrorCode::Unknown);
    generic && error.to_string().contains("no such table: device_identities")
}

fn words(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::NotADatabase => "not a database",
        ErrorCode::DatabaseCorrupt => "damaged",
        ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => "in use",
        ErrorCode::DiskFull => "no room on the volume",
        ErrorCode::ReadOnly => "not the gateway's to write",
        ErrorCode::ConstraintViolation | ErrorCode::Unknown => "not as this gateway's version makes it",
        ErrorCode::CannotOpen | ErrorCode::PermissionDenied => "cannot be opened",
        _ => "unreadable",
    }
}

/// `file:/path?mode=ro`; the path is ours, but what is special in a URI is escaped all the same.
fn uri(path: &Path, how: &str) -> String {
    let escaped: String = path
        .to_string_lossy()
        .chars()
        .map(|c| match c {
            '%' => "%25".to_owned(),
            '?' => "%3f".to_owned(),
            '#' => "%23".to_owned(),
            c => c.to_string(),
        })
        .collect();
    format!("file:{escaped}?{how}")
}

/// A directory with the database under a second name and a copy of its log. Gone when dropped.
struct SideRoom {
    path: PathBuf,
}

impl SideRoom {
    fn fill(own: &Dir, directory: &Dir, database: &FileStat) -> Result<Self, String> {
        let room = Self { path: own.path().join(SIDE_ROOM) };
        room.clear();
        own.ensure_sub(OsStr::new(SIDE_ROOM), 0o700, None).map_err(|e| e.to_string())?;
        let from = |name: &str| directory.path().join(name);
        let to = |name: &str| room.path.join(name);
        match fs::hard_link(from(DATABASE), to(DATABASE)) {
            Ok(()) => {}
            Err(_) if database.st_size > COPY_MAX => {
                return Err("state/openclaw.sqlite is too large to look into".into());
            }
            Err(_) => copy(&from(DATABASE), &to(DATABASE))?,
        }
        copy(&from(LOG), &to(LOG))?;
        Ok(room)
    }

    fn clear(&self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Drop for SideRoom {
    fn drop(&mut self) {
        self.clear();
    }
}

fn copy(from: &Path, to: &Path) -> Result<(), String> {
    match fs::copy(from, to) {
        Ok(_) => Ok(()),
        Err(error) if error.raw_os_error() == Some(Errno::ENOSPC as i32) => {
            Err("no room to look into it".into())
        }
        Err(error) => Err(trouble("copy", from)(error).to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};

    const SCHEMA: &str = "CREATE TABLE device_identities (identity_key TEXT NOT NULL PRIMARY KEY, device_id TEXT NOT NULL, \
        public_key_pem TEXT NOT NULL, private_key_pem TEXT NOT NULL, created_at_ms INTEGER NOT NULL, \
        updated_at_ms INTEGER NOT NULL) STRICT";
    const ROW: &str = "INSERT INTO device_identities VALUES ('primary', 'abc123', '', '', 0, 0)";

    struct Room {
        _temp: tempfile::TempDir,
        own: Dir,
        state: Dir,
        database: PathBuf,
    }

    fn room() -> Room {
        let temp = tempfile::tempdir().unwrap();
        let own = Dir::ensure(&temp.path().join(".cvm"), 0o700, None).unwrap();
        let state = Dir::ensure(&temp.path().join("openclaw"), 0o700, None).unwrap();
        fs::create_dir(temp.path().join("openclaw/state")).unwrap();
        let database = temp.path().join("openclaw/state").join(DATABASE);
        Room { _temp: temp, own, state, database }
    }

    impl Room {
        fn look(&self) -> Found {
            let before = self.names();
            let found = device(&self.own, &self.state).unwrap();
            assert_eq!(self.names(), before, "it left something beside the database");
            assert_eq!(
                fs::read_dir(self.own.path()).unwrap().count(),
                0,
                "it left something in its side room"
            );
            found
        }

        fn names(&self) -> Vec<PathBuf> {
            let mut names: Vec<PathBuf> =
                fs::read_dir(self.database.parent().unwrap()).unwrap().map(|e| e.unwrap().path()).collect();
            names.sort();
            names
        }

        fn open(&self) -> Connection {
            let connection = Connection::open(&self.database).unwrap();
            connection.pragma_update(None, "journal_mode", "wal").unwrap();
            connection
        }
    }

    #[test]
    fn no_database_no_table_and_no_row_are_told_apart() {
        let room = room();
        assert_eq!(room.look(), Found::None);
        fs::write(&room.database, "").unwrap();
        assert_eq!(room.look(), Found::NoTable);
        room.open().execute_batch("CREATE TABLE other (a)").unwrap();
        assert_eq!(room.look(), Found::NoTable);
        room.open().execute_batch(SCHEMA).unwrap();
        assert_eq!(room.look(), Found::NoRow);
    }

    const LEGACY: &[u8] =
        br#"{"version":1,"deviceId":"abc123","publicKeyPem":"a\nb\n","privateKeyPem":"c\n","createdAtMs":7}"#;

    fn myself() -> Owner {
        Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() }
    }

    #[test]
    fn a_device_is_put_in_and_nothing_beside_the_database() {
        let room = room();
        room.open().execute_batch(SCHEMA).unwrap();
        let before = room.names();
        insert_device(&room.state, LEGACY, myself()).unwrap();
        assert_eq!(room.names(), before);
        assert_eq!(room.look(), Found::Id("abc123".into()));
        let row: (String, String, i64, i64) = room
            .open()
            .query_row(
                "SELECT public_key_pem, private_key_pem, created_at_ms, updated_at_ms FROM device_identities",
                [],
                |r| Ok((r.get(0)?, r.get(1)?, r.get(2)?, r.get(3)?)),
            )
            .unwrap();
        assert_eq!(row, ("a\nb\n".into(), "c\n".into(), 7, 7));
        // A row that is there is never changed.
        assert!(insert_device(&room.state, LEGACY, myself()).is_err());
    }

    #[test]
    fn what_a_killed_gateway_left_in_its_log_stays() {
        let room = room();
        let connection = room.open();
        connection.execute_batch(&format!("{SCHEMA}; CREATE TABLE other (a)")).unwrap();
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        connection.execute_batch("INSERT INTO other VALUES (1)").unwrap();
        let log = room.database.with_file_name(LOG);
        let (log_bytes, bytes) = (fs::read(&log).unwrap(), fs::read(&room.database).unwrap());
        drop(connection);
        fs::write(&log, log_bytes).unwrap();
        fs::write(&room.database, bytes).unwrap();
        insert_device(&room.state, LEGACY, myself()).unwrap();
        assert!(!log.exists());
        assert_eq!(room.look(), Found::Id("abc123".into()));
        let rows: i64 = room.open().query_row("SELECT count(*) FROM other", [], |r| r.get(0)).unwrap();
        assert_eq!(rows, 1);
    }

    #[test]
    fn it_is_written_as_the_gateways_user_and_with_no_more_rights() {
        if cvm_needs::lacks_root() {
            return;
        }
        let room = room();
        room.open().execute_batch(SCHEMA).unwrap();
        let state = room.database.parent().unwrap();
        let top = state.parent().unwrap().parent().unwrap();
        fs::set_permissions(top, fs::Permissions::from_mode(0o755)).unwrap();
        let agent = Owner { uid: 4242, gid: 4243 };
        // Root's file: the gateway's user may not write it, so neither do we.
        for path in [state.parent().unwrap(), state] {
            chown(path, Some(4242), Some(4243)).unwrap();
        }
        assert!(insert_device(&room.state, LEGACY, agent).is_err());
        assert_eq!(room.look(), Found::NoRow);
        chown(&room.database, Some(4242), Some(4243)).unwrap();
        // A log that leads to a file of root's is not written through.
        let precious = top.join("precious");
        fs::write(&precious, "precious").unwrap();
        fs::set_permissions(&precious, fs::Permissions::from_mode(0o600)).unwrap();
        let log = room.database.with_file_name(LOG);
        let _ = fs::remove_file(&log); // an empty one, of the try before
        std::os::unix::fs::symlink(&precious, &log).unwrap();
        assert!(insert_device(&room.state, LEGACY, agent).is_err());
        let stat = fs::metadata(&precious).unwrap();
        assert_eq!((fs::read(&precious).unwrap().as_slice(), stat.uid()), (&b"precious"[..], 0));
        fs::remove_file(&log).unwrap();
        insert_device(&room.state, LEGACY, agent).unwrap();
        for name in room.names() {
            assert_eq!(fs::metadata(&name).unwrap().uid(), 4242, "{}", name.display());
        }
        assert_eq!(room.look(), Found::Id("abc123".into()));
    }

    #[test]
    fn it_is_written_without_the_groups_that_root_has() {
        if cvm_needs::lacks_root() {
            return;
        }
        let group = Gid::from_raw(4711);
        let mut groups = nix::unistd::getgroups().unwrap();
        groups.push(group);
        nix::unistd::setgroups(&groups).unwrap();
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let file = dir.path().join("of-the-group");
        fs::write(&file, "1").unwrap();
        chown(&file, Some(0), Some(group.as_raw())).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
        let read = || fs::read(&file).is_ok();
        assert_eq!(as_owner(Owner { uid: 4242, gid: 4243 }, read), Ok(false));
        assert_eq!(as_owner(Owner { uid: 4242, gid: 4711 }, read), Ok(true), "by the group alone it may be");
    }

    #[test]
    fn a_database_that_was_closed_is_read() {
        let room = room();
        room.open().execute_batch(&format!("{SCHEMA}; {ROW}")).unwrap();
        assert!(!room.database.with_file_name(LOG).exists());
        assert_eq!(room.look(), Found::Id("abc123".into()));
    }

    #[test]
    fn what_is_only_in_the_log_of_a_killed_gateway_is_found() {
        let room = room();
        let connection = room.open();
        connection.execute_batch(SCHEMA).unwrap();
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        connection.execute_batch(ROW).unwrap();
        // Killed: the connection never closes, its index goes.
        let (log, database) = (room.database.with_file_name(LOG), &room.database);
        let (log_bytes, bytes) = (fs::read(&log).unwrap(), fs::read(database).unwrap());
        drop(connection);
        fs::write(&log, &log_bytes).unwrap();
        fs::write(database, &bytes).unwrap();
        assert!(log.metadata().unwrap().len() > 0);
        assert_eq!(room.look(), Found::Id("abc123".into()));
        assert_eq!((fs::read(&log).unwrap(), fs::read(database).unwrap()), (log_bytes, bytes));
    }

    #[test]
    fn a_log_that_is_cut_off_is_read_as_far_as_it_is_whole() {
        let room = room();
        let connection = room.open();
        connection.execute_batch(&format!("{SCHEMA}; {ROW}")).unwrap();
        connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        connection.execute_batch("UPDATE device_identities SET device_id = 'later'").unwrap();
        let (log, bytes) = (room.database.with_file_name(LOG), fs::read(&room.database).unwrap());
        let cut = fs::read(&log).unwrap();
        drop(connection);
        fs::write(&log, &cut[..cut.len() / 2]).unwrap();
        fs::write(&room.database, &bytes).unwrap();
        assert_eq!(room.look(), Found::Id("abc123".into()));
    }

    #[test]
    fn what_cannot_be_read_is_unclear_and_not_empty() {
        let room = room();
        fs::write(&room.database, "this is no database, it is only text that is long enough".repeat(100))
            .unwrap();
        assert_eq!(room.look(), Found::Unclear("state/openclaw.sqlite: not a database".into()));
        fs::remove_file(&room.database).unwrap();
        std::os::unix::fs::symlink("/nowhere", &room.database).unwrap();
        assert!(matches!(room.look(), Found::Unclear(_)));
        fs::remove_file(&room.database).unwrap();
        room.open().execute_batch(&format!("{SCHEMA}; {ROW}")).unwrap();
        fs::write(room.database.with_file_name(JOURNAL), "hot").unwrap();
        assert!(matches!(room.look(), Found::Unclear(_)));
    }

    #[test]
    fn a_view_that_never_ends_is_broken_off() {
        let room = room();
        let endless = "CREATE VIEW device_identities AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) \
            SELECT x AS device_id, CAST(x AS TEXT) AS identity_key FROM n";
        room.open().execute_batch(endless).unwrap();
        assert!(matches!(room.look(), Found::Unclear(_)));
    }

    #[test]
    fn a_path_with_what_is_special_in_a_uri_stays_a_path() {
        assert_eq!(uri(Path::new("/a?b#c%d"), "mode=ro"), "file:/a%3fb%23c%25d?mode=ro");
    }
}
