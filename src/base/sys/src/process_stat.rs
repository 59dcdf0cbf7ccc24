//! Reads one process from its line in /proc/PID/stat, for all our programs except PID 1.
//!
//! Written by hand, because the crate `procfs` would bring four more crates for this one line.

use std::fs;
use std::path::Path;

/// A process at one moment. Another process may have its pid later, but never with the same start time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub name: String,
    pub state: char,
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    /// User and system time of the process and of the children that it has waited for.
    pub processor_ticks: u64,
    /// Ticks since the machine booted.
    pub started: u64,
}

impl Process {
    /// The process `pid`, if there is one.
    pub fn of(pid: i32) -> Option<Self> {
        Self::read(Path::new(&format!("/proc/{pid}/stat")))
    }

    /// Reads a `stat` file. The name in it may be any bytes, because a process can choose its own name.
    pub fn read(stat: &Path) -> Option<Self> {
        Self::parse(&String::from_utf8_lossy(&fs::read(stat).ok()?))
    }

    /// `pid (name) state parent …`. The name may hold spaces and brackets.
    fn parse(line: &str) -> Option<Self> {
        let (head, tail) = line.rsplit_once(')')?;
        let (pid, name) = head.split_once('(')?;
        let mut fields = tail.split_ascii_whitespace();
        let state = fields.next()?.chars().next()?;
        let mut number = |skipped: usize| fields.nth(skipped)?.parse::<i64>().ok();
        let mut id = |skipped| i32::try_from(number(skipped)?).ok();
        Some(Self {
            pid: pid.trim().parse().ok()?,
            name: name.to_owned(),
            state,
            parent: id(0)?,
            group: id(0)?,
            session: id(0)?,
            processor_ticks: (number(7)? + number(0)? + number(0)? + number(0)?).try_into().ok()?,
            started: number(4)?.try_into().ok()?,
        })
    }

    /// Whether it has ended, and its parent has not reaped it yet.
    pub fn is_dead(&self) -> bool {
        matches!(self.state, 'Z' | 'X')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_full_of_brackets_hides_nothing() {
        let line = "12 (a) (b c) S 7 11 10 0 -1 4194560 1 2 3 4 100 20 3 1 20 0 1 0 4711 100 200";
        let process = Process::parse(line).unwrap();
        assert_eq!((process.pid, process.name.as_str(), process.state), (12, "a) (b c", 'S'));
        assert_eq!((process.parent, process.group, process.session), (7, 11, 10));
        assert_eq!((process.processor_ticks, process.started), (124, 4711));
        assert_eq!(Process::parse("12 (cut"), None);
    }

    #[test]
    fn a_name_that_is_no_text_hides_nothing() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(&file, b"12 (\xff\xfe) Z 7 11 10 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 4711 100 200").unwrap();
        let process = Process::read(file.path()).unwrap();
        assert!(process.is_dead());
        assert_eq!(process.started, 4711);
    }
}
