//! Ends what a run left behind after its keeper was killed.
//!
//! A keeper ends its own process tree. When the keeper itself is killed, its processes become children of PID 1. What
//! still shows that they belong together is the variable `CVM_RUN` in their environment, their sessions and groups,
//! and who descends from whom.
//!
//! PID 1, this process and its ancestors are never ended. It is done when two looks in a row have found nobody.

use crate::port;
use crate::processes::{self, Process, Table};
use crate::report::{Failure, Outcome, Report};
use crate::root_dir::RootDir;
use cvm_sys::as_user::AsUser;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid};
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// SIGKILL is immediate unless the kernel is stuck; a fork bomb takes some passes.
const LIMIT: Duration = Duration::from_secs(20);
const BETWEEN: Duration = Duration::from_millis(5);
/// The kernel's limit for one environment is below this.
const ENVIRONMENT_MAX: u64 = 8 * 1024 * 1024;

/// With `listens_on`: only those processes of the run that listen on that port.
pub(crate) fn end(
    root_dir: &RootDir,
    run: &str,
    listens_on: Option<u16>,
    report: &mut Report,
) -> Outcome<()> {
    let until = Instant::now() + LIMIT;
    let mut ended = BTreeSet::new();
    let mut quiet_looks = 0;
    while quiet_looks < 2 {
        let left = match listens_on {
            None => of_run(root_dir, run),
            Some(port) => listeners(root_dir, run, port),
        };
        if left.is_empty() {
            quiet_looks += 1;
        } else {
            quiet_looks = 0;
            // Stopped first, all of them: a process that forks faster than one look takes would
            // outrun SIGKILL for ever, and a stopped one cannot fork.
            for process in left.iter().filter(|p| !ended.contains(&(p.pid, p.started))) {
                processes::send(root_dir, process, Signal::SIGSTOP);
            }
            for process in &left {
                processes::send(root_dir, process, Signal::SIGKILL);
                ended.insert((process.pid, process.started));
            }
            if Instant::now() > until {
                return Err(survivors(run, &left));
            }
            std::thread::sleep(BETWEEN);
        }
    }
    if !ended.is_empty() {
        report.info(format!("ended {} processes that run {run} had left behind", ended.len()));
    }
    Ok(())
}

fn survivors(run: &str, left: &[Process]) -> Failure {
    let names: Vec<String> =
        left.iter().take(5).map(|p| format!("pid {} ({}, state {})", p.pid, p.name, p.state)).collect();
    Failure::again(format!("{} processes of run {run} do not end: {}", left.len(), names.join(", ")))
}

/// Every living process that belongs to `run`.
fn of_run(root_dir: &RootDir, run: &str) -> Vec<Process> {
    let table = Table::read(root_dir);
    let spared = table.lineage(processes::own_pid());
    let marked = marked(root_dir, &table, &spared, run).map(|p| p.pid).collect();
    members(&table, &marked, &spared).into_iter().filter(|p| !p.is_dead()).cloned().collect()
}

/// Those of the run's own processes that listen on `port`.
fn listeners(root_dir: &RootDir, run: &str, port: u16) -> Vec<Process> {
    let sockets = port::listeners(root_dir, port);
    let table = Table::read(root_dir);
    let spared = table.lineage(processes::own_pid());
    marked(root_dir, &table, &spared, run)
        .filter(|p| port::holds(root_dir, p.pid, &sockets))
        .cloned()
        .collect()
}

fn marked<'a>(
    root_dir: &'a RootDir,
    table: &'a Table,
    spared: &'a [i32],
    run: &'a str,
) -> impl Iterator<Item = &'a Process> {
    table.all().filter(move |p| !spared.contains(&p.pid) && !p.is_dead() && is_marked(root_dir, p.pid, run))
}

/// The marked processes, the members of sessions and groups that one of them led, and all descendants: a process can
/// clear its environment, and a leader may have ended before.
fn members<'a>(table: &'a Table, marked: &BTreeSet<i32>, spared: &[i32]) -> Vec<&'a Process> {
    let foreign = |leader: i32| leader <= 1 || spared.contains(&leader) || is_unmarked(table, leader, marked);
    let mine = table.all().filter(|p| marked.contains(&p.pid));
    let circles: BTreeSet<i32> = mine.flat_map(|p| [p.session, p.group]).filter(|id| !foreign(*id)).collect();
    let near = table.all().filter(|p| circles.contains(&p.session) || circles.contains(&p.group));
    let roots: BTreeSet<i32> = near.map(|p| p.pid).chain(marked.iter().copied()).collect();
    let all = table.with_descendants(roots.into_iter().filter(|pid| !spared.contains(pid)));
    all.into_iter().filter(|pid| !spared.contains(pid)).filter_map(|pid| table.get(pid)).collect()
}

/// Whether the leader lives and is not of this run: then the session or group belongs to somebody else.
fn is_unmarked(table: &Table, leader: i32, marked: &BTreeSet<i32>) -> bool {
    table.get(leader).is_some_and(|p| !p.is_dead()) && !marked.contains(&leader)
}

fn is_marked(root_dir: &RootDir, pid: i32, run: &str) -> bool {
    let wanted = format!("CVM_RUN={run}");
    environment(root_dir, pid)
        .is_some_and(|all| all.split(|b| *b == 0).any(|entry| entry == wanted.as_bytes()))
}

/// The environment of a process. It holds secrets and is wiped.
fn environment(root_dir: &RootDir, pid: i32) -> Option<Zeroizing<Vec<u8>>> {
    let path = processes::proc_file(root_dir, pid, "environ");
    let file = File::open(&path).or_else(|error| {
        // Without CAP_SYS_PTRACE, as in a container without privileges, root may not read this of another user's
        // process; as that user it may.
        let owner = std::fs::metadata(path.parent().unwrap_or(&path)).map_err(|_| error)?;
        let _acting = AsUser::of(Uid::from_raw(owner.uid()), Gid::from_raw(owner.gid()))?;
        File::open(&path)
    });
    let mut bytes = Zeroizing::new(Vec::new());
    file.ok()?.take(ENVIRONMENT_MAX).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processes::process;
    use std::process::{Child, Command};

    /// In a session of its own: the one of whoever runs this test may have no leader any more, and
    /// then all of it would be the run's.
    fn sleeper(run: &str, script: &str) -> Child {
        Command::new("setsid").args(["sh", "-c", script]).env("CVM_RUN", run).spawn().unwrap()
    }

    /// A run that no other test and no supervisor on this machine has.
    fn own_run(name: &str) -> String {
        format!("test-{name}/{}", std::process::id())
    }

    #[test]
    fn everything_of_the_run_ends_and_nobody_else() {
        let (mine, other) = (own_run("mine"), own_run("mine") + "-sweep");
        let mut marked = sleeper(&mine, "sleep 60 & exec setsid sleep 60");
        let mut spared = sleeper(&other, "exec sleep 60");
        // Until the shell has started what it is to start.
        while of_run(&RootDir::default(), &mine).len() < 2 {
            std::thread::sleep(BETWEEN);
        }
        let mut report = Report::default();
        end(&RootDir::default(), &mine, None, &mut report).unwrap();
        assert!(of_run(&RootDir::default(), &mine).is_empty());
        assert!(spared.try_wait().unwrap().is_none());
        assert!(report.notes[0].text.contains("had left behind"));
        marked.wait().unwrap();
        spared.kill().unwrap();
        spared.wait().unwrap();
    }

    #[test]
    fn what_cleared_its_environment_is_found_by_its_parent() {
        let run = own_run("cleared");
        let mut shell = sleeper(&run, "env -i sh -c 'sleep 60; true' & sleep 60; true");
        while of_run(&RootDir::default(), &run).len() < 4 {
            std::thread::sleep(BETWEEN);
        }
        end(&RootDir::default(), &run, None, &mut Report::default()).unwrap();
        shell.wait().unwrap();
        assert!(of_run(&RootDir::default(), &run).is_empty());
    }

    #[test]
    fn of_a_run_whose_leftovers_stay_only_the_listener_ends() {
        let run = own_run("listener");
        // Its child has neither the port nor another session.
        let script = "exec python3 -c 'import os,socket,sys,time\n\
            s=socket.socket(); s.bind((\"127.0.0.1\",0)); s.listen()\n\
            if os.fork(): print(s.getsockname()[1], flush=True); time.sleep(60)\n\
            s.close(); time.sleep(60)'";
        let mut listener = Command::new("setsid");
        listener.args(["sh", "-c", script]).env("CVM_RUN", &run).stdout(std::process::Stdio::piped());
        let mut listener = listener.spawn().unwrap();
        let mut line = String::new();
        let output = std::io::BufReader::new(listener.stdout.take().unwrap());
        std::io::BufRead::read_line(&mut { output }, &mut line).unwrap();
        let port = line.trim().parse().unwrap();
        while of_run(&RootDir::default(), &run).len() < 2 {
            std::thread::sleep(BETWEEN);
        }
        end(&RootDir::default(), &run, Some(port), &mut Report::default()).unwrap();
        listener.wait().unwrap();
        let left = of_run(&RootDir::default(), &run);
        assert_eq!(left.len(), 1, "{left:?}");
        assert!(port::listeners(&RootDir::default(), port).is_empty());
        end(&RootDir::default(), &run, None, &mut Report::default()).unwrap();
    }

    #[test]
    fn nothing_to_sweep_is_done_without_a_word() {
        let mut report = Report::default();
        end(&RootDir::default(), &own_run("nobody"), None, &mut report).unwrap();
        assert!(report.notes.is_empty());
    }

    #[test]
    fn a_dead_leaders_session_counts_and_a_strangers_does_not() {
        let table = Table::of([
            process(1, 0, 1),
            process(50, 1, 50), // a login of somebody's
            process(51, 1, 40), // marked, in a session whose leader is gone
            process(52, 1, 40), // cleared its environment, in the same session
            process(53, 50, 50),
            process(54, 1, 50), // marked, in the stranger's session
            process(55, 54, 50),
        ]);
        let found = members(&table, &BTreeSet::from([51, 54]), &[1]);
        let mut pids: Vec<i32> = found.iter().map(|p| p.pid).collect();
        pids.sort_unstable();
        assert_eq!(pids, [51, 52, 54, 55]);
    }

    #[test]
    fn the_sweeper_and_its_ancestors_are_spared_whatever_they_are_marked_with() {
        let table =
            Table::of([process(1, 0, 1), process(60, 1, 60), process(61, 60, 60), process(62, 60, 60)]);
        let found = members(&table, &BTreeSet::from([60, 61, 62]), &[1, 60, 61]);
        assert_eq!(found.iter().map(|p| p.pid).collect::<Vec<_>>(), [62]);
    }
}
