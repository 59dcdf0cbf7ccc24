use super::*;
use std::fs;
use std::os::unix::fs::PermissionsExt;

struct Room {
    temp: tempfile::TempDir,
    own: Dir,
    state: Dir,
}

fn room() -> Room {
    let temp = tempfile::tempdir().unwrap();
    let own = Dir::ensure(&temp.path().join(".cvm"), 0o700, None).unwrap();
    let state = Dir::ensure(&temp.path().join("openclaw"), 0o700, None).unwrap();
    Room { temp, own, state }
}

const SEED: [u8; 32] = [9; 32];

impl Room {
    fn settle(&self) -> Report {
        let mut report = Report::default();
        let owner = Owner { uid: nix::unistd::geteuid().as_raw(), gid: nix::unistd::getegid().as_raw() };
        settle(&self.own, &self.state, &SEED, owner, &mut report).unwrap();
        report
    }

    fn file(&self) -> std::path::PathBuf {
        self.temp.path().join("openclaw/identity/device.json")
    }

    fn put(&self, name: &str, text: &str) {
        fs::create_dir_all(self.temp.path().join("openclaw/identity")).unwrap();
        fs::write(self.temp.path().join("openclaw/identity").join(name), text).unwrap();
    }
}

fn derived() -> String {
    DeviceSeed::from_bytes(&SEED).device_id()
}

#[test]
fn a_fresh_state_gets_the_derived_device_once_and_privately() {
    let room = room();
    assert!(room.settle().notes.is_empty());
    let first = fs::read(room.file()).unwrap();
    let written: Value = serde_json::from_slice(&first).unwrap();
    assert_eq!(written["deviceId"], Value::from(derived()));
    assert_eq!(fs::metadata(room.file()).unwrap().permissions().mode() & 0o7777, 0o600);
    assert!(room.settle().notes.is_empty());
    assert_eq!(fs::read(room.file()).unwrap(), first);
}

#[test]
fn another_device_is_told_and_not_changed() {
    let room = room();
    let other = r#"{"version":1,"deviceId":"ffeeddccbbaa9988"}"#;
    room.put("device.json", other);
    let report = room.settle();
    assert_eq!(report.facts.remarks[0].topic, "device identity");
    assert!(report.notes[0].text.contains("ffeeddccbbaa…"), "{}", report.notes[0].text);
    assert_eq!(fs::read_to_string(room.file()).unwrap(), other);
}

#[test]
fn an_import_that_was_interrupted_is_left_to_the_gateway() {
    for name in CLAIMED {
        let room = room();
        room.put(name, "{}");
        assert!(room.settle().notes[0].text.contains("goes on at its next start"));
        assert!(!room.file().exists());
    }
}

#[test]
fn a_file_that_is_not_understood_is_left_alone() {
    let room = room();
    room.put("device.json", "{ half");
    assert!(room.settle().notes[0].text.contains("cannot be told"));
    assert_eq!(fs::read_to_string(room.file()).unwrap(), "{ half");
}

#[test]
fn the_database_counts_and_no_file_is_laid_beside_it() {
    let room = room();
    fs::create_dir(room.temp.path().join("openclaw/state")).unwrap();
    let connection =
        rusqlite::Connection::open(room.temp.path().join("openclaw/state/openclaw.sqlite")).unwrap();
    connection
        .execute_batch(&format!(
            "CREATE TABLE device_identities (identity_key TEXT, device_id TEXT); \
             INSERT INTO device_identities VALUES ('primary', '{}')",
            derived()
        ))
        .unwrap();
    assert!(room.settle().notes.is_empty());
    assert!(!room.file().exists());
}

const SCHEMA: &str = "CREATE TABLE device_identities (identity_key TEXT NOT NULL PRIMARY KEY, device_id TEXT NOT NULL, \
    public_key_pem TEXT NOT NULL, private_key_pem TEXT NOT NULL, created_at_ms INTEGER NOT NULL, \
    updated_at_ms INTEGER NOT NULL) STRICT";

fn with_database(schema: &str) -> (Room, rusqlite::Connection) {
    let room = room();
    fs::create_dir(room.temp.path().join("openclaw/state")).unwrap();
    let path = room.temp.path().join("openclaw/state/openclaw.sqlite");
    let connection = rusqlite::Connection::open(path).unwrap();
    connection.pragma_update(None, "journal_mode", "wal").unwrap();
    connection.execute_batch(schema).unwrap();
    (room, connection)
}

fn device_in(connection: &rusqlite::Connection) -> String {
    connection.query_row("SELECT device_id FROM device_identities", [], |row| row.get(0)).unwrap()
}

#[test]
fn a_database_without_a_device_gets_the_derived_one_and_no_file_is_left() {
    // The second: a first start that was killed before the import.
    for file in [None, Some(format!(r#"{{"version":1,"deviceId":"{}"}}"#, derived()))] {
        let (room, connection) = with_database(SCHEMA);
        if let Some(text) = &file {
            room.put("device.json", text);
        }
        let report = room.settle();
        assert!(report.facts.remarks.is_empty(), "{:?}", report.notes);
        assert!(report.notes[0].text.contains("was put in"), "{}", report.notes[0].text);
        assert_eq!(device_in(&connection), derived());
        assert!(!room.file().exists());
        assert!(room.settle().notes.is_empty());
    }
}

#[test]
fn a_file_of_another_device_beside_an_empty_database_is_told_and_nothing_is_put_in() {
    let (room, connection) = with_database(SCHEMA);
    room.put("device.json", r#"{"version":1,"deviceId":"ffeeddccbbaa9988"}"#);
    assert_eq!(room.settle().facts.remarks.len(), 1);
    assert!(room.file().exists());
    let rows: i64 =
        connection.query_row("SELECT count(*) FROM device_identities", [], |row| row.get(0)).unwrap();
    assert_eq!(rows, 0);
}

#[test]
fn a_database_without_a_place_for_devices_is_left_alone_and_no_file_is_written() {
    let (room, _connection) = with_database("CREATE TABLE other (a)");
    let report = room.settle();
    assert_eq!(report.facts.remarks[0].topic, TOPIC);
    assert!(report.notes[0].text.contains("has no place for a device"), "{}", report.notes[0].text);
    assert!(!room.file().exists());
}

#[test]
fn a_table_that_takes_no_such_row_is_a_remark_and_no_failure() {
    let (room, _connection) = with_database(
        "CREATE TABLE device_identities (identity_key TEXT, device_id TEXT, more TEXT NOT NULL)",
    );
    let report = room.settle();
    assert!(report.notes[0].text.contains("cannot be put in"), "{}", report.notes[0].text);
    assert_eq!(report.facts.remarks.len(), 1);
    assert!(!room.file().exists());
}

#[test]
fn a_name_of_the_agents_making_cannot_speak_in_the_log() {
    assert_eq!(short("\u{1b}[2J<b>ab\ncd"), "2babcd…");
}
