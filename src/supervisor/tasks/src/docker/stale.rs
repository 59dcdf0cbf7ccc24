//! Removes what a dockerd or containerd of an earlier boot left behind: a pid file makes the
//! next one believe that it runs already.
//!
//! The pid file of a process that lives and has that name stays, and so does a socket that
//! is answered.

use crate::processes;
use crate::report::{self, Report, shown};
use crate::root_dir::RootDir;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// Docker's paths; `/var/run` may be a directory of its own.
const PID_FILES: [&str; 4] = [
    "/run/docker.pid",
    "/var/run/docker.pid",
    "/run/docker/containerd/containerd.pid",
    "/run/containerd/containerd.pid",
];
const SOCKETS: [&str; 8] = [
    "/run/docker.sock",
    "/var/run/docker.sock",
    "/run/docker/metrics.sock",
    "/run/docker/containerd/containerd.sock",
    "/run/docker/containerd/containerd.sock.ttrpc",
    "/run/docker/containerd/containerd-debug.sock",
    "/run/containerd/containerd.sock",
    "/run/containerd/containerd.sock.ttrpc",
];

pub(crate) fn remove(root_dir: &RootDir, report: &mut Report) {
    let real = |path: &str| fs::canonicalize(root_dir.at(path)).ok();
    let one_directory = real("/run") == real("/var/run");
    let counts = |path: &&str| !(one_directory && path.starts_with("/var/run/"));
    for path in PID_FILES.into_iter().filter(counts) {
        pid_file(root_dir, path, report);
    }
    for path in SOCKETS.into_iter().filter(counts) {
        socket(&root_dir.at(path));
    }
}

fn pid_file(root_dir: &RootDir, path: &str, report: &mut Report) {
    let at = root_dir.at(path);
    let Ok(text) = fs::read_to_string(&at) else {
        // It does not exist, or is not text: then it is stale.
        if at.is_file() {
            discard(&at, report);
        }
        return;
    };
    let running = text.trim().parse().ok().and_then(|pid| processes::look_up(root_dir, pid));
    match running {
        // A low pid soon belongs to another process, so the name is compared too.
        Some(p) if !p.is_dead() && ["dockerd", "containerd"].iter().any(|n| p.name.contains(n)) => {
            report.warn(format!("{path} names pid {} ({}), which runs; left alone", p.pid, p.name));
        }
        _ => discard(&at, report),
    }
}

/// Sockets matter less: dockerd replaces its own. So they are for the step's log only.
fn socket(path: &Path) {
    if !fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
        return;
    }
    match UnixStream::connect(path) {
        Ok(_) => report::detail(format!("something answers on {}; left alone", shown(path))),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            let outcome = fs::remove_file(path).map_or_else(|e| e.to_string(), |()| "removed".to_owned());
            report::detail(format!("nobody answers on {}: {outcome}", shown(path)));
        }
        // Its queue is full, or this process may not open it: a process listens there.
        Err(_) => {}
    }
}

fn discard(path: &Path, report: &mut Report) {
    match fs::remove_file(path) {
        Ok(()) => report.info(format!("removed {}, left by an earlier boot", shown(path))),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => report.warn(format!("cannot remove the stale {}: {error}", shown(path))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn room() -> (tempfile::TempDir, RootDir) {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir_all(temp.path().join("run/docker/containerd")).unwrap();
        let root_dir = RootDir::below(temp.path());
        (temp, root_dir)
    }

    fn fake_process(root: &Path, pid: i32, name: &str) {
        let dir = root.join(format!("proc/{pid}"));
        fs::create_dir_all(&dir).unwrap();
        let line = format!("{pid} ({name}) S 1 1 1 0 -1 0 0 0 0 0 0 0 0 0 20 0 1 0 99 0 0");
        fs::write(dir.join("stat"), line).unwrap();
    }

    #[test]
    fn stale_pid_files_go_whether_the_number_is_free_or_somebody_elses() {
        let (temp, root_dir) = room();
        fake_process(temp.path(), 7, "bash");
        fs::write(temp.path().join("run/docker.pid"), "7").unwrap();
        fs::write(temp.path().join("run/docker/containerd/containerd.pid"), "4711").unwrap();
        let mut report = Report::default();
        remove(&root_dir, &mut report);
        remove(&root_dir, &mut report);
        assert_eq!(report.notes.len(), 2);
        assert!(!temp.path().join("run/docker.pid").exists());
        assert!(!temp.path().join("run/docker/containerd/containerd.pid").exists());
    }

    #[test]
    fn a_pid_file_full_of_nothing_goes() {
        let (temp, root_dir) = room();
        fs::write(temp.path().join("run/docker.pid"), [0xff, 0xfe]).unwrap();
        remove(&root_dir, &mut Report::default());
        assert!(!temp.path().join("run/docker.pid").exists());
    }

    #[test]
    fn a_dockerd_that_runs_keeps_its_pid_file_and_its_socket() {
        let (temp, root_dir) = room();
        fake_process(temp.path(), 8, "dockerd");
        fs::write(temp.path().join("run/docker.pid"), "8\n").unwrap();
        let _listener = UnixListener::bind(temp.path().join("run/docker.sock")).unwrap();
        remove(&root_dir, &mut Report::default());
        assert!(temp.path().join("run/docker.pid").exists());
        assert!(temp.path().join("run/docker.sock").exists());
    }

    #[test]
    fn two_names_of_one_file_are_one_word_to_the_user() {
        let (temp, root_dir) = room();
        fs::create_dir_all(temp.path().join("var")).unwrap();
        std::os::unix::fs::symlink("../run", temp.path().join("var/run")).unwrap();
        fake_process(temp.path(), 8, "dockerd");
        fs::write(temp.path().join("run/docker.pid"), "8").unwrap();
        let mut report = Report::default();
        remove(&root_dir, &mut report);
        assert_eq!(report.notes.len(), 1);
    }

    #[test]
    fn a_socket_that_nobody_answers_on_goes() {
        let (temp, root_dir) = room();
        let path = temp.path().join("run/docker/containerd/containerd.sock");
        drop(UnixListener::bind(&path).unwrap());
        // What another test starts at that moment has the socket too, until it is another program.
        while UnixStream::connect(&path).is_ok() {
            std::thread::yield_now();
        }
        remove(&root_dir, &mut Report::default());
        assert!(!path.exists());
    }
}
