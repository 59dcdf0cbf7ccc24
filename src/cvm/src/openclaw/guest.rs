//! Runs a program of the gateway's user for an operator, out of reach of the operator's terminal.
//!
//! Whatever the agent can change may run in that program. So where the operator has a terminal, the program
//! gets one of its own, and what is typed and shown goes through us; it has a session of its own; and what it
//! leaves running ends with it. A pipe or a file that stands in the terminal's place is handed on as it is.
//!
//! Refuses to return while anything that it started lives.

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

const HEARD: [i32; 6] =
    [libc::SIGCHLD, libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGWINCH];
const PIECE: usize = 16 * 1024;
/// Nothing outlives SIGKILL for longer, unless the kernel holds it.
const AFTER_KILL: Duration = Duration::from_secs(5);
const LOOK_EVERY: Duration = Duration::from_millis(5);

pub(super) struct Guest {
    /// The first word is the program's path.
    pub(super) argv: Vec<CString>,
    pub(super) environment: Vec<Zeroizing<CString>>,
    pub(super) directory: CString,
    pub(super) identity: Identity,
}

/// Runs it to its end, and yields its exit status as a shell shows it.
pub(super) fn run(guest: &Guest) -> io::Result<u8> {
    let (input, output, errors) = (io::stdin(), io::stdout(), io::stderr());
    let standard = [input.as_fd(), output.as_fd(), errors.as_fd()];
    // What is shown goes to the first of these.
    let [input, output, errors] = standard;
    let operators = [output, errors, input].into_iter().find(|fd| is_terminal(*fd));
    let pair = operators.map(Pair::like).transpose()?;
    process_tree::adopt_orphans()?;
    let mut signals = Signals::take(&HEARD)?;
    let main = start(guest, standard, pair.as_ref().map(|pair| &pair.slave))?;
    let mut screen = pair.zip(operators).map(|(pair, operators)| Screen::new(pair, operators, input));
    let end = attend(main, &mut signals, screen.as_mut());
    end_all();
    if let Some(screen) = &mut screen {
        while screen.show() {}
    }
    Ok(end.shell_status())
}

fn is_terminal(fd: BorrowedFd<'_>) -> bool {
    isatty(fd).unwrap_or(false)
}

fn start(guest: &Guest, standard: [BorrowedFd<'_>; 3], slave: Option<&OwnedFd>) -> io::Result<Pid> {
    if let Some(slave) = slave {
        fchown(slave, Some(guest.identity.uid.into()), None)?;
    }
    let path = guest.argv.first().ok_or(Errno::EINVAL)?;
    let program = Program {
        path,
        argv: &guest.argv,
        environment: &guest.environment,
        directory: &guest.directory,
        descriptors: &standard.map(|fd| slave.filter(|_| is_terminal(fd)).map_or(fd, AsFd::as_fd)),
        identity: Some(&guest.identity),
        oom_score_adj: None,
        limits: Some(Limits { processes: AGENT_LIMITS.processes }),
        session: Session::Terminal,
        dies_with_parent: true,
        blocked: Blocked::None,
        news: None,
    };
    let name = path.to_string_lossy();
    Ok(spawn(&program, |stage, errno, _| {
        let end = End::not_started(stage.to_byte(), errno as i32);
        eprintln!("cvm: openclaw: {name}: {end}");
        end.shell_status()
    })?)
}

/// Until the program itself has ended, or the operator has gone.
fn attend(main: Pid, signals: &mut Signals, mut screen: Option<&mut Screen<'_>>) -> End {
    loop {
        wait(signals, screen.as_deref());
        for signal in signals.drain() {
            match signal {
                libc::SIGCHLD => {}
                libc::SIGHUP => return End::Signal(libc::SIGHUP),
                libc::SIGWINCH => screen.iter().for_each(|screen| screen.resize()),
                // It leads its session, and so its group.
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
    // An interrupted or failed wait is a short one.
    let _ = poll(&mut fds, PollTimeout::NONE);
}

/// Everything below us.
fn end_all() {
    let until = Instant::now() + AFTER_KILL;
    while Instant::now() < until {
        match reap::next() {
            Reaped::One(..) => {}
            Reaped::Childless => return,
            Reaped::Later => {
                process_tree::kill_descendants();
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }
}

/// Between the operator's terminal and the program's.
struct Screen<'t> {
    master: OwnedFd,
    operators: BorrowedFd<'t>,
    /// Where keys come from, as long as they are for the program.
    keys: Option<(BorrowedFd<'t>, Raw<'t>)>,
    /// What has been typed and the program's terminal has no room for yet.
    typed: Vec<u8>,
    /// Nobody has the program's terminal open any more.
    is_left: bool,
}

impl<'t> Screen<'t> {
    fn new(pair: Pair, operators: BorrowedFd<'t>, input: BorrowedFd<'t>) -> Self {
        // In the background, keys are for somebody else.
        let is_ours = tcgetpgrp(input).is_ok_and(|foreground| foreground == getpgrp());
        let keys = is_ours.then(|| Raw::make(input).ok()).flatten().map(|raw| (input, raw));
        Self { master: pair.master, operators, keys, typed: Vec::new(), is_left: false }
    }

    fn interests(&self) -> impl Iterator<Item = PollFd<'_>> {
        let has_room = if self.typed.is_empty() { PollFlags::empty() } else { PollFlags::POLLOUT };
        let master = (!self.is_left).then(|| PollFd::new(self.master.as_fd(), PollFlags::POLLIN | has_room));
        let keys = self.keys.as_ref().filter(|_| self.typed.is_empty());
        master.into_iter().chain(keys.map(|(keys, _)| PollFd::new(*keys, PollFlags::POLLIN)))
    }

    fn resize(&self) {
        terminal::resize(&self.master, self.operators);
    }

    /// Shows a piece of what the program has written; says whether there was any.
    fn show(&mut self) -> bool {
        let mut piece = [0; PIECE];
        match read(&self.master, &mut piece) {
            Ok(count) if count > 0 => {
                write_all(self.operators, &piece[..count]);
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => false,
            Ok(_) | Err(_) => {
                self.is_left = true;
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
                // Hung up.
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

/// To a terminal. One that has gone shows nothing any more.
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
