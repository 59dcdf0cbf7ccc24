//! The processes of this machine, as /proc shows them, and ending some of them.
//!
//! A process is identified by its pid and the time it started, so that a pid that was given to
//! another process meanwhile is never signalled. PID 1, this process and its ancestors are never signalled.

use crate::root_dir::RootDir;
pub(crate) use cvm_sys::process_stat::Process;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

/// All processes, by pid.
pub(crate) struct Table(BTreeMap<i32, Process>);

impl Table {
    pub(crate) fn read(root_dir: &RootDir) -> Self {
        let entries = fs::read_dir(root_dir.at("/proc")).into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        Self(pids.filter_map(|pid| Some((pid, look_up(root_dir, pid)?))).collect())
    }

    #[cfg(test)]
    pub(crate) fn of(processes: impl IntoIterator<Item = Process>) -> Self {
        Self(processes.into_iter().map(|p| (p.pid, p)).collect())
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Process> {
        self.0.values()
    }

    pub(crate) fn get(&self, pid: i32) -> Option<&Process> {
        self.0.get(&pid)
    }

    /// This process, and everything it descends from.
    pub(crate) fn lineage(&self, pid: i32) -> Vec<i32> {
        let mut line = vec![1];
        let mut at = pid;
        // A table read while processes come and go could show a circle.
        while at > 1 && !line.contains(&at) {
            line.push(at);
            at = self.get(at).map_or(0, |p| p.parent);
        }
        line
    }

    /// `roots` with everything below them.
    pub(crate) fn with_descendants(&self, roots: impl IntoIterator<Item = i32>) -> Vec<i32> {
        let mut found: Vec<i32> = roots.into_iter().collect();
        let mut next = 0;
        while let Some(&parent) = found.get(next) {
            next += 1;
            let below = self.all().filter(|p| p.parent == parent).map(|p| p.pid);
            let fresh: Vec<i32> = below.filter(|pid| !found.contains(pid)).collect();
            found.extend(fresh);
        }
        found
    }
}

/// The process `pid`, if there is one.
pub(crate) fn look_up(root_dir: &RootDir, pid: i32) -> Option<Process> {
    Process::read(&proc_file(root_dir, pid, "stat"))
}

pub(crate) fn own_pid() -> i32 {
    nix::unistd::getpid().as_raw()
}

pub(crate) fn proc_file(root_dir: &RootDir, pid: i32, name: &str) -> PathBuf {
    root_dir.at(&format!("/proc/{pid}/{name}"))
}

/// Whether `process` is still what it was and still runs.
pub(crate) fn still_runs(root_dir: &RootDir, process: &Process) -> bool {
    look_up(root_dir, process.pid).is_some_and(|now| now.started == process.started && !now.is_dead())
}

/// Sends `signal` if `process` is still what it was.
pub(crate) fn send(root_dir: &RootDir, process: &Process, signal: Signal) {
    if process.pid > 1 && still_runs(root_dir, process) {
        // It may have ended at this moment, which is what the signal is for.
        let _ = kill(Pid::from_raw(process.pid), signal);
    }
}

#[cfg(test)]
pub(crate) fn process(pid: i32, parent: i32, session: i32) -> Process {
    Process {
        pid,
        name: format!("p{pid}"),
        state: 'S',
        parent,
        group: session,
        session,
        processor_ticks: 0,
        started: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_process_is_in_the_table_and_descends_from_pid_1() {
        let table = Table::read(&RootDir::default());
        let me = i32::try_from(std::process::id()).unwrap();
        assert!(table.get(me).is_some());
        let lineage = table.lineage(me);
        assert!(lineage.contains(&1) && lineage.contains(&me));
    }

    #[test]
    fn descendants_are_found_at_any_depth_and_circles_end() {
        let table =
            Table::of([process(10, 1, 10), process(11, 10, 10), process(12, 11, 12), process(13, 1, 13)]);
        assert_eq!(table.with_descendants([10]), [10, 11, 12]);
        let circle = Table::of([process(20, 21, 20), process(21, 20, 20)]);
        assert_eq!(circle.with_descendants([20]), [20, 21]);
        assert_eq!(circle.lineage(20), [1, 20, 21]);
    }
}
