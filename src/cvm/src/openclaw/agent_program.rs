//! Runs a program of the gateway's user for an operator, out of reach of the operator's terminal.
//!
//! Whatever the agent can change may run in that program. So where the operator has a terminal, the program
//! gets one of its own, and this process copies keys and output between the two. The program has a session of
//! its own, and every process that it leaves running ends with it. A pipe or a file in the place of the
//! terminal is handed on as it is.

use cvm_protocol::exit_status::End;
use cvm_protocol::keeper::AGENT_LIMITS;
use cvm_sys::process_tree;
use cvm_sys::reap::{self, Reaped};
use cvm_sys::signals::{self, Signals};
use cvm_sys::spawn::{Blocked, Identity, Limits, Program, Session, spawn};
use cvm_sys::terminal::{self, Pair, Raw};
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{Pid, fchown, getpgrp, isatty, read, tcgetpgrp, write};
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

const SIGNALS: [i32; 6] =
    [libc::SIGCHLD, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGWINCH];
const PIECE: usize = 16 * 1024;
/// No process outlives SIGKILL for longer, unless the kernel holds it.
const KILL_MAX: Duration = Duration::from_secs(5);
const KILL_INTERVAL: Duration = Duration::from_millis(5);

pub(super) struct AgentProgram {
    /// The first word is the program's path.
    pub(super) argv: Vec<CString>,
    pub(super) environment: Vec<Zeroizing<CString>>,
    pub(super) directory: CString,
    pub(super) identity: Identity,
}

/// Runs the program until nothing of it lives, and returns its exit status as a shell shows it.
pub(super) fn run(program: &AgentProgram) -> io::Result<u8> {
    let (input, output, errors) = (io::stdin(), io::stdout(), io::stderr());
    let standard = [input.as_fd(), output.as_fd(), errors.as_fd()];
    // The program's output goes to the first of these that is a terminal.
    let [input, output, errors] = standard;
    let operators = [output, errors, input].into_iter().find(|fd| is_terminal(*fd));
    let pair = operators.map(Pair::like).transpose()?;
    process_tree::adopt_orphans()?;
    let mut signals = Signals::take(&SIGNALS)?;
    let main = start(program, standard, pair.as_ref().map(|pair| &pair.slave))?;
    let mut screen = pair.zip(operators).map(|(pair, operators)| Screen::new(pair, operators, input));
    let end = run_until_end(main, &mut signals, screen.as_mut());
    end_all();
    if let Some(screen) = &mut screen {
        while screen.show() {}
    }
    Ok(end.shell_status())
}

fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    isatty(fd).unwrap_or(false)
}

fn start(program: &AgentProgram, standard: [BorrowedFd<'_>; 3], slave: Option<&OwnedFd>) -> io::Result<Pid> {
    if let Some(slave) = slave {
        fchown(slave, Some(program.identity.uid.into()), None)?;
    }
    let path = program.argv.first().ok_or(Errno::EINVAL)?;
    let spawned = Program {
        path,
        argv: &program.argv,
        environment: &program.environment,
        directory: &program.directory,
        descriptors: &standard.map(|fd| slave.filter(|_| is_terminal(fd)).map_or(fd, AsFd::as_fd)),
        identity: Some(&program.identity),
        oom_score_adj: None,
        limits: Some(Limits { processes: AGENT_LIMITS.processes }),
        session: Session::Terminal,
        dies_with_parent: true,
        blocked: Blocked::None,
        news: None,
    };
    let name = path.to_string_lossy();
    Ok(spawn(&spawned, |stage, errno, _| {
        let end = End::not_started(stage.to_byte(), errno as i32);
        eprintln!("cvm: openclaw: {name}: {end}");
        end.shell_status()
    })?)
}

/// Returns when the program has ended, or when the operator's terminal has gone.
fn run_until_end(main: Pid, signals: &mut Signals, mut screen: Option<&mut Screen<'_>>) -> End {
    loop {
        wait(signals, screen.as_deref());
        for signal in signals.drain() {
            match signal {
                libc::SIGCHLD => {}
                libc::SIGHUP => return End::Signal(libc::SIGHUP),
                libc::SIGWINCH => screen.iter().for_each(|screen| screen.resize()),
                // The program leads its session, and so its group.
                other => {
                    signals::send(Pid::from_raw(-main.as_raw()), other);
                }
            }
        }
        if let Some(screen) = &mut screen {
            screen.show();
            screen.type_in();
        }
        while let Reaped::One(pid, end) = reap::next() {
            if pid == main {
                return end.into();
            }
        }
    }
}

fn wait(signals: &Signals, screen: Option<&Screen<'_>>) {
    let mut fds = vec![PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
    fds.extend(screen.into_iter().flat_map(Screen::interests));
    // An interrupted or failed wait only makes the next round come sooner.
    let _ = poll(&mut fds, PollTimeout::NONE);
}

/// Kills and reaps every descendant of this process.
fn end_all() {
    let until = Instant::now() + KILL_MAX;
    while Instant::now() < until {
        match reap::next() {
            Reaped::One(..) => {}
            Reaped::Childless => return,
            Reaped::Later => {
                process_tree::kill_descendants();
                std::thread::sleep(KILL_INTERVAL);
            }
        }
    }
}

/// Copies between the operator's terminal and the program's.
struct Screen<'t> {
    master: OwnedFd,
    operators: BorrowedFd<'t>,
    /// The terminal whose keys go to the program, as long as they do.
    keys: Option<(BorrowedFd<'t>, Raw<'t>)>,
    /// Typed bytes that the program's terminal has not taken yet.
    typed: Vec<u8>,
    /// Nobody has the program's terminal open any more.
    is_closed: bool,
}

impl<'t> Screen<'t> {
    fn new(pair: Pair, operators: BorrowedFd<'t>, input: BorrowedFd<'t>) -> Self {
        // In the background, the keys belong to another program.
        let is_ours = tcgetpgrp(input).is_ok_and(|foreground| foreground == getpgrp());
        let keys = is_ours.then(|| Raw::make(input).ok()).flatten().map(|raw| (input, raw));
        Self { master: pair.master, operators, keys, typed: Vec::new(), is_closed: false }
    }

    fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let has_room = if self.typed.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        let master =
            (!self.is_closed).then(|| PollFd::new(self.master.as_fd(), PollFlags::POLLIN | has_room));
        let keys = self.keys.as_ref().filter(|_| self.typed.is_empty());
        master.into_iter().chain(keys.map(|(keys, _)| PollFd::new(*keys, PollFlags::POLLIN)))
    }

    fn resize(&self) {
        terminal::resize(&self.master, self.operators);
    }

    /// Shows a piece of the program's output; returns whether there was any.
    fn show(&mut self) -> bool {
        let mut piece = [0; PIECE];
        match read(&self.master, &mut piece) {
            Ok(count) if count > 0 => {
                write_all(self.operators, &piece[..count]);
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => false,
            Ok(_) | Err(_) => {
                self.is_closed = true;
                false
            }
        }
    }

    fn type_in(&mut self) {
        if self.typed.is_empty()
            && let Some((keys, _)) = &self.keys
            && is_readable(*keys)
        {
            let mut piece = [0; PIECE];
            match read(keys, &mut piece) {
                Ok(count) if count > 0 => self.typed.extend_from_slice(&piece[..count]),
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                // The operator's terminal has hung up.
                Ok(_) | Err(_) => self.keys = None,
            }
        }
        if let Ok(count) = write(&self.master, &self.typed) {
            self.typed.drain(..count);
        }
    }
}

fn is_readable(fd: BorrowedFd<'_>) -> bool {
    let mut fds = [PollFd::new(fd, PollFlags::POLLIN)];
    poll(&mut fds, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
}

/// Writes all of `bytes` to a terminal, unless the terminal has gone.
fn write_all(terminal: BorrowedFd<'_>, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        match write(terminal, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) => {
                let _ = poll(&mut [PollFd::new(terminal, PollFlags::POLLOUT)], PollTimeout::NONE);
            }
            Err(_) => return,
        }
    }
}
