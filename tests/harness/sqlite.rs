//! Databases that the test programs write to: numbered rows, each with a sum of its own.

use rusqlite::{Connection, OpenFlags};
use std::path::Path;

/// The table that [`examine`] looks at.
pub const TABLE: &str = "CREATE TABLE IF NOT EXISTS t (n INTEGER PRIMARY KEY, writer TEXT, sum INTEGER)";

/// What has to be in the row.
pub fn sum_of(n: i64) -> i64 {
    n.wrapping_mul(0x9e37_79b9_7f4a_7c15_u64.cast_signed()).rotate_left(17) >> 1
}

/// How many rows there are when all of them from 1 on are, and the database is whole; or what is wrong.
pub fn examine(file: &Path) -> Result<i64, String> {
    let words = |error: rusqlite::Error| format!("{}: {error}", file.display());
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let db = Connection::open_with_flags(file, flags).map_err(words)?;
    db.busy_timeout(std::time::Duration::from_secs(10)).map_err(words)?;
    let verdict: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).map_err(words)?;
    if verdict != "ok" {
        return Err(format!("{}: {verdict}", file.display()));
    }
    let mut statement = db.prepare("SELECT n, sum FROM t ORDER BY n").map_err(words)?;
    let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).map_err(words)?;
    let mut last = 0;
    for row in rows {
        let (n, sum): (i64, i64) = row.map_err(words)?;
        if n != last + 1 || sum != sum_of(n) {
            return Err(format!("{}: row {n} with sum {sum} after row {last}", file.display()));
        }
        last = n;
    }
    Ok(last)
}

/// The bytes of a database alone, with no log beside it.
pub fn examine_bytes(bytes: &[u8]) -> Result<i64, String> {
    let scratch = tempfile::tempdir().map_err(|e| e.to_string())?;
    let file = scratch.path().join("db");
    std::fs::write(&file, bytes).map_err(|e| e.to_string())?;
    examine(&file)
}
