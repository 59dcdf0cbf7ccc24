//! Plain mode: `cvm-init -- CMD ARG...`, the smallest honest init.
//!
//! Forwards every signal to the command, reaps whatever is orphaned, waits until nothing is
//! left of what the command started, and passes its exit status on. No configuration, no log,
//! no control socket. May import: `cvm-process`.

use cvm_blueprint::ending::{End, Stage};
use cvm_process::kernel::{Kernel, Linux};
use cvm_process::reap::Reaped;
use cvm_process::spawn::{Blocked, Program, Session};
use cvm_process::{signals, tree};
use nix::errno::Errno;
use nix::unistd::Pid;
use std::ffi::{CString, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use zeroize::Zeroizing;

/// Runs `command`, and yields the exit status to leave with.
pub(crate) fn run(command: &[OsString]) -> u8 {
    let Some(name) = command.first() else {
        eprintln!("cvm-init: a command is missing after `--`: cvm-init -- CMD ARG...");
        return crate::exit::USAGE;
    };
    // As PID 1 orphans come to us anyway; elsewhere this makes them.
    let _ = tree::adopt_orphans();
    let mut kernel = match Linux::taking(&signals::forwardable()) {
        Ok(kernel) => kernel,
        Err(error) => {
            eprintln!("cvm-init: taking signals: {error}");
            return crate::exit::INTERNAL;
        }
    };
    let main = match start(&mut kernel, command) {
        Ok(pid) => pid,
        Err(why) => {
            eprintln!("cvm-init: {}: {why}", name.to_string_lossy());
            return crate::exit::INTERNAL;
        }
    };
    // A working directory of ours would keep a volume from being unmounted.
    let _ = nix::unistd::chdir("/");
    attend(&mut kernel, main)
}

/// Until nothing is left of what the command started. Yields the command's own status.
fn attend(kernel: &mut impl Kernel, main: Pid) -> u8 {
    let mut end = None;
    loop {
        match kernel.reap() {
            Reaped::One(pid, how) if pid == main => end = Some(how),
            Reaped::One(..) => {}
            Reaped::Childless => break,
            Reaped::Later => {
                kernel.wait(Vec::new(), None);
                for signal in kernel.signals().into_iter().filter(|s| *s != libc::SIGCHLD) {
                    // To the command while it lives, and then to whatever it left behind.
                    if end.is_some() {
                        kernel.signal_descendants(signal);
                    } else {
                        kernel.kill(main, signal);
                    }
                }
            }
        }
    }
    end.unwrap_or(End::Unseen).shell_status()
}

fn start(kernel: &mut impl Kernel, command: &[OsString]) -> Result<Pid, String> {
    let paths = candidates(command.first().map(OsString::as_os_str).unwrap_or_default());
    let environment: Vec<Zeroizing<CString>> = std::env::vars_os()
        .filter_map(|(name, value)| {
            let mut entry = name.into_vec();
            entry.push(b'=');
            entry.extend_from_slice(value.as_bytes());
            CString::new(entry).ok().map(Zeroizing::new)
        })
        .collect();
    let mut argv: Vec<CString> = command.iter().filter_map(|a| CString::new(a.as_bytes()).ok()).collect();
    let path =
        paths.into_iter().find(|p| nix::unistd::access(p.as_c_str(), nix::unistd::AccessFlags::X_OK).is_ok());
    let words = argv.clone();
    if let (Some(path), Some(first)) = (path, argv.first_mut()) {
        *first = path;
    }
    let directory =
        std::env::current_dir().ok().and_then(|d| CString::new(d.into_os_string().into_vec()).ok());
    let (input, output, errors) = (std::io::stdin(), std::io::stdout(), std::io::stderr());
    let program = Program {
        path: argv.first().ok_or("no command")?,
        argv: &words,
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
    let name = words.first().map(|w| w.to_string_lossy()).unwrap_or_default();
    kernel
        .spawn(&program, |stage, errno, _| fail_as_a_shell_would(&name, stage, errno))
        .map_err(|e| format!("creating the process: {}", e.desc()))
}

/// In the child: 127 for a command that is not there, 126 for one that cannot be run.
fn fail_as_a_shell_would(name: &str, stage: Stage, errno: Errno) -> u8 {
    let end = End::NotStarted { stage, errno: errno as i32 };
    eprintln!("cvm-init: {name}: {end}");
    end.shell_status()
}

/// Where the command may lie: as given if it holds a slash, else along PATH.
fn candidates(name: &std::ffi::OsStr) -> Vec<CString> {
    if name.as_bytes().contains(&b'/') {
        return CString::new(name.as_bytes()).into_iter().collect();
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| cvm_blueprint::paths::PATH.into());
    std::env::split_paths(&path)
        .filter_map(|dir| CString::new(dir.join(name).into_os_string().into_vec()).ok())
        .collect()
}
