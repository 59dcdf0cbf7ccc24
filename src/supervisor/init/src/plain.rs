//! Plain mode: `cvm-init -- CMD ARG...`, the smallest honest init.
//!
//! Forwards every signal to the command, reaps whatever is orphaned, waits until nothing is
//! left of what the command started, and passes its exit status on. What is left after a stop
//! signal gets that signal too, and SIGKILL some seconds later. No configuration, no log, no
//! control socket.

use cvm_protocol::exit_status::End;
use cvm_sys::kernel::{Kernel, Linux};
use cvm_sys::reap::Reaped;
use cvm_sys::spawn::{Blocked, Program, Session, Stage};
use cvm_sys::{process_tree, signals};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, Pid, access};
use std::ffi::{CStr, CString, OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::time::Duration;
use zeroize::Zeroizing;

/// Signals that ask for an end.
const STOPS: [i32; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT];
/// From the end of a command that was asked to stop to the end of what it left behind. An engine
/// waits 10 s for all of it.
const LEFT_BEHIND: Duration = Duration::from_secs(5);
/// SIGKILL is immediate unless the kernel is stuck.
const KILL_AGAIN: Duration = Duration::from_secs(1);

/// Runs `command`, and yields the exit status to leave with.
pub(crate) fn run(command: &[OsString]) -> u8 {
    let Some(name) = command.first() else {
        eprintln!("cvm-init: a command is missing after `--`: cvm-init -- CMD ARG...");
        return crate::exit::USAGE;
    };
    let shown = name.to_string_lossy();
    let Some(path) = find(name, std::env::var_os("PATH")) else {
        return fail_as_a_shell_would(&shown, Stage::Exec, Errno::ENOENT);
    };
    // As PID 1 orphans come to us anyway; elsewhere this makes them.
    let _ = process_tree::adopt_orphans();
    let mut kernel = match Linux::taking(&signals::forwardable()) {
        Ok(kernel) => kernel,
        Err(error) => {
            eprintln!("cvm-init: taking signals: {error}");
            return crate::exit::INTERNAL;
        }
    };
    let main = match start(&mut kernel, &path, &shown, command) {
        Ok(pid) => pid,
        Err(why) => {
            eprintln!("cvm-init: {shown}: {why}");
            return crate::exit::INTERNAL;
        }
    };
    // A working directory of ours would keep a volume from being unmounted.
    let _ = nix::unistd::chdir("/");
    attend(&mut kernel, main)
}

/// Waits until nothing is left of what the command started. Returns the command's own status.
fn attend(kernel: &mut impl Kernel, main: Pid) -> u8 {
    let (mut end, mut asked, mut until) = (None, None, None);
    loop {
        match kernel.reap() {
            Reaped::One(pid, how) if pid == main => {
                end = Some(End::from(how));
                // The command was asked to stop, so what it left behind has to stop too.
                if let Some(signal) = asked {
                    kernel.signal_descendants(signal);
                    until = Some(kernel.now() + LEFT_BEHIND);
                }
            }
            Reaped::One(..) => {}
            Reaped::Childless => break,
            Reaped::Later => {
                if until.is_some_and(|until| kernel.now() >= until) {
                    kernel.kill_descendants();
                    // Children of the killed processes become ours now.
                    until = Some(kernel.now() + KILL_AGAIN);
                }
                kernel.wait(Vec::new(), until);
                for signal in kernel.signals().into_iter().filter(|s| *s != libc::SIGCHLD) {
                    if STOPS.contains(&signal) {
                        asked = Some(signal);
                    }
                    // To the command while it lives, and then to whatever it left behind.
                    if end.is_none() {
                        kernel.kill(main, signal);
                        continue;
                    }
                    kernel.signal_descendants(signal);
                    if asked == Some(signal) {
                        until.get_or_insert(kernel.now() + LEFT_BEHIND);
                    }
                }
            }
        }
    }
    end.unwrap_or(End::Unseen).shell_status()
}

fn start(kernel: &mut impl Kernel, path: &CStr, name: &str, command: &[OsString]) -> Result<Pid, String> {
    let environment: Vec<Zeroizing<CString>> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let mut entry = name.into_vec();
            entry.push(b'=');
            entry.extend_from_slice(value.as_bytes());
            CString::new(entry).ok().map(Zeroizing::new)
        })
        .collect();
    let argv: Vec<CString> = command.iter().filter_map(|a| CString::new(a.as_bytes()).ok()).collect();
    let directory =
        std::env::current_dir().ok().and_then(|d| CString::new(d.into_os_string().into_vec()).ok());
    let (input, output, errors) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let program = Program {
        path,
        argv: &argv,
        environment: &environment,
        directory: directory.as_deref().unwrap_or(c"/"),
        descriptors: &[input.as_fd(), output.as_fd(), errors.as_fd()],
        identity: None,
        oom_score_adj: None,
        limits: None,
        session: Session::Foreground,
        dies_with_parent: false,
        blocked: Blocked::None,
        news: None,
    };
    kernel
        .spawn(&program, |stage, errno, _| fail_as_a_shell_would(name, stage, errno))
        .map_err(|e| format!("creating the process: {}", e.desc()))
}

/// Also in the child: 127 for a command that is not there, 126 for one that cannot be run.
fn fail_as_a_shell_would(name: &str, stage: Stage, errno: Errno) -> u8 {
    let end = End::not_started(stage.to_byte(), errno as i32);
    eprintln!("cvm-init: {name}: {end}");
    end.shell_status()
}

/// Where the command lies: as given if it holds a slash, else along PATH. A file that may not be
/// executed is found when there is no other.
fn find(name: &OsStr, path: Option<OsString>) -> Option<CString> {
    if name.as_bytes().contains(&b'/') {
        return CString::new(name.as_bytes()).ok();
    }
    let path = path.filter(|path| !path.is_empty()).unwrap_or_else(|| cvm_protocol::paths::PATH.into());
    // Neither an empty name nor an empty entry means the working directory.
    let directories = std::env::split_paths(&path).filter(|dir| dir.is_absolute() && !name.is_empty());
    let files: Vec<PathBuf> = directories.map(|dir| dir.join(name)).filter(|file| file.is_file()).collect();
    let executable = |file: &&PathBuf| access(*file, AccessFlags::X_OK).is_ok();
    let file = files.iter().find(executable).or(files.first())?;
    CString::new(file.as_os_str().as_bytes()).ok()
}

#[cfg(test)]
#[allow(clippy::expect_used)]
mod tests {
    use super::*;
    use cvm_sys::fake::{Fake, Manners, exited};
    use std::os::unix::fs::PermissionsExt as _;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// A command that ends 2 s after SIGTERM, which comes at 1 s, and a child of its.
    fn stopped(child: Manners) -> (Fake, Pid, Pid) {
        let mut kernel = Fake::default();
        let main = kernel.adopt(Manners::EndsAfter(s(2)));
        let left = kernel.adopt(child);
        kernel.signal_at(s(1), libc::SIGTERM);
        (kernel, main, left)
    }

    #[test]
    fn what_a_stopped_command_leaves_behind_gets_the_signal_when_it_has_ended() {
        let (mut kernel, main, left) = stopped(Manners::EndsAfter(s(3)));
        assert_eq!(attend(&mut kernel, main), 0, "the command's own status");
        assert_eq!(kernel.sent_at(main, libc::SIGTERM), Some(s(1)));
        assert_eq!(kernel.sent_at(left, libc::SIGTERM), Some(s(3)));
        assert_eq!((kernel.sent_at(left, libc::SIGKILL), kernel.elapsed), (None, s(6)));
    }

    #[test]
    fn what_ignores_the_signal_is_killed_after_the_stated_time() {
        let (mut kernel, main, left) = stopped(Manners::IgnoresTerm);
        assert_eq!(attend(&mut kernel, main), 0);
        assert_eq!(kernel.sent_at(left, libc::SIGKILL), Some(s(3) + LEFT_BEHIND));
        assert_eq!(kernel.elapsed, s(3) + LEFT_BEHIND);
    }

    #[test]
    fn without_a_stop_signal_whatever_is_left_is_waited_for() {
        let mut kernel = Fake::default();
        let main = kernel.adopt(Manners::IgnoresTerm);
        let left = kernel.adopt(Manners::EndsAfter(s(0)));
        kernel.dies(main, exited(3));
        kernel.signal_at(s(1), libc::SIGHUP);
        kernel.signal_at(s(1000), libc::SIGTERM);
        assert_eq!(attend(&mut kernel, main), 3);
        assert_eq!(kernel.sent_at(left, libc::SIGHUP), Some(s(1)), "it is forwarded, and stops nothing");
        assert_eq!((kernel.sent_at(left, libc::SIGKILL), kernel.elapsed), (None, s(1000)));
    }

    #[test]
    fn a_stop_signal_that_comes_when_the_command_has_ended_counts_too() {
        let mut kernel = Fake::default();
        let main = kernel.adopt(Manners::IgnoresTerm);
        let left = kernel.adopt(Manners::IgnoresTerm);
        kernel.dies(main, exited(3));
        kernel.signal_at(s(10), libc::SIGTERM);
        kernel.signal_at(s(12), libc::SIGTERM);
        assert_eq!(attend(&mut kernel, main), 3);
        assert_eq!(kernel.sent_at(left, libc::SIGKILL), Some(s(10) + LEFT_BEHIND));
    }

    #[test]
    fn a_bare_word_is_found_along_path_and_nowhere_else() {
        let dir = tempfile::tempdir().expect("a directory");
        let put = |name: &str, mode| {
            let file = dir.path().join(name);
            std::fs::create_dir_all(file.parent().expect("a directory")).expect("a directory");
            std::fs::write(&file, "").expect("a file");
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("a mode");
        };
        put("first/tool", 0o644);
        put("second/tool", 0o755);
        put("first/text", 0o644);
        std::fs::create_dir_all(dir.path().join("first/sub")).expect("a directory");
        let at = |name: &str| dir.path().join(name).into_os_string();
        let path = [at("first"), at("second"), "".into(), ".".into()].join(OsStr::new(":"));
        let found = |name: &str| find(OsStr::new(name), Some(path.clone())).map(CString::into_bytes);
        assert_eq!(found("tool"), Some(at("second/tool").into_vec()), "not one that cannot be run");
        assert_eq!(found("text"), Some(at("first/text").into_vec()), "if only to say why it does not run");
        assert_eq!(found("sub"), None, "a directory is no program");
        // The working directory of this test has one.
        assert_eq!(found("Cargo.toml"), None);
        assert_eq!(found(""), None);
        assert_eq!(found("./Cargo.toml"), Some(b"./Cargo.toml".to_vec()));
        assert!(find(OsStr::new("sh"), Some(OsString::new())).is_some(), "an empty PATH is as none");
    }
}
