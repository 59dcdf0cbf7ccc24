//! The keepers of this machine: starts them, reads their reports, and forgets them when they are reaped.

use crate::last_net::Group;
use cvm_machine::machine::{ServiceId, ServiceRecord, Try};
use cvm_machine::service::Run;
use cvm_protocol::exit_status::End;
use cvm_protocol::json_lines;
use cvm_protocol::keeper::{Channel, KeeperReport, KeeperSpec, descriptors};
use cvm_protocol::report::{REPORT_MAX, ServiceReport};
use cvm_protocol::task::TaskReport;
use cvm_sys::kernel::Kernel;
use cvm_sys::spawn::{Blocked, Program, Session};
use cvm_sys::{descriptor, memfd};
use nix::errno::Errno;
use nix::unistd::Pid;
use std::collections::BTreeSet;
use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Pieces of 4 KiB that are read from one pipe in one turn of the loop. More than a pipe usually holds, so that
/// a pipe whose writer has ended is read to its end.
const READS_A_TURN: usize = 64;

/// What a keeper was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    Step(Try),
    Service {
        id: ServiceId,
        run: Run,
        part: Part,
    },
    /// Writes the supervisor's own log.
    Logger,
}

/// What a keeper does for a run of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Prepare,
    Main,
    Repair,
    Sweep,
}

pub(crate) struct Keeper {
    pub(crate) pid: Pid,
    pub(crate) owner: Owner,
    /// What the keeper reports.
    reports: Option<ReportPipe>,
    /// What the program reports. The keeper does not write into this pipe, and the program not into the keeper's: a
    /// service that faces the network must not be able to report its own end.
    of_the_program: Option<ReportPipe>,
    /// The keeper's last report, if there was one.
    gone: Option<End>,
    /// What a task reported.
    pub(crate) task: Option<TaskReport>,
}

impl Keeper {
    /// How it ended, once its keeper has been reaped.
    pub(crate) fn end(&self) -> End {
        self.gone.clone().unwrap_or(End::Unseen)
    }
}

/// A report of a keeper, or of the service that it keeps.
pub(crate) struct Received {
    pub(crate) owner: Owner,
    pub(crate) report: Report,
}

pub(crate) enum Report {
    Keeper(KeeperReport),
    Service(ServiceReport),
}

/// Our end of a pipe with reports, a line each.
struct ReportPipe {
    pipe: OwnedFd,
    partial: Vec<u8>,
    /// The rest of a line that was too long.
    skips: bool,
}

impl ReportPipe {
    /// The other end and ours.
    fn new() -> nix::Result<(OwnedFd, Self)> {
        let (pipe, theirs) = descriptor::pipe()?;
        descriptor::set_nonblocking(&pipe)?;
        Ok((theirs, Self { pipe, partial: Vec::new(), skips: false }))
    }

    /// Hands the whole lines that have come to `hear`. Returns whether more may come.
    fn read(&mut self, mut hear: impl FnMut(&[u8])) -> bool {
        let mut bytes = [0u8; 4096];
        for _ in 0..READS_A_TURN {
            match nix::unistd::read(&self.pipe, &mut bytes) {
                Ok(n) if n > 0 => self.partial.extend(bytes.iter().take(n)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return true,
                // The other end is closed; the keeper's end is known when it is reaped.
                Ok(_) | Err(_) => return false,
            }
            while let Some(end) = self.partial.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                if !std::mem::take(&mut self.skips) {
                    hear(&line);
                }
            }
            // After the whole lines before it: only the line that is too long is lost.
            if self.partial.len() > REPORT_MAX {
                self.partial.clear();
                self.skips = true;
            }
        }
        true
    }
}

pub(crate) struct Keepers {
    all: Vec<Keeper>,
    /// Where the binaries of this build lie: beside our own.
    home: PathBuf,
}

impl Keepers {
    pub(crate) fn new() -> Self {
        let exe = std::fs::read_link("/proc/self/exe").unwrap_or_default();
        let home = exe.parent().unwrap_or(Path::new("/usr/local/lib/openclaw-cvm")).to_owned();
        Self { all: Vec::new(), home }
    }

    pub(crate) fn home(&self) -> &Path {
        &self.home
    }

    /// Starts a keeper for `spec`. `specification` goes to a service of ours.
    pub(crate) fn keep(
        &mut self,
        kernel: &mut impl Kernel,
        owner: Owner,
        spec: &KeeperSpec,
        specification: Option<BorrowedFd<'_>>,
    ) -> Result<(), String> {
        let words = |e: Errno| e.desc().to_owned();
        let input = memfd::sealed(c"spec", &json_lines::line(spec)).map_err(|e| e.to_string())?;
        let (theirs, reports) = ReportPipe::new().map_err(words)?;
        let (out, errors) = (std::io::stdout(), std::io::stderr());
        let mut handed = vec![input.as_fd(), out.as_fd(), errors.as_fd(), theirs.as_fd()];
        let program = match spec.channel {
            Channel::None => None,
            Channel::Task(_) | Channel::Service => Some(ReportPipe::new().map_err(words)?),
        };
        handed.extend(program.iter().map(|(theirs, _)| theirs.as_fd()));
        if let Channel::Service = spec.channel {
            let missing =
                || "there is no specification for it: see the first lines of the boot log".to_owned();
            handed.push(specification.ok_or_else(missing)?);
        }
        let pid = self.start(kernel, &["cvm-keeper", &spec.name], &handed).map_err(words)?;
        let of_the_program = program.map(|(_, ours)| ours);
        self.all.push(Keeper { pid, owner, reports: Some(reports), of_the_program, gone: None, task: None });
        Ok(())
    }

    /// Starts the process that writes our own log, and yields the pipe to write into.
    pub(crate) fn keep_log(&mut self, kernel: &mut impl Kernel, file: &str) -> Result<OwnedFd, String> {
        let words = |e: Errno| e.desc().to_owned();
        let (theirs, ours) = descriptor::pipe().map_err(words)?;
        descriptor::set_nonblocking(&ours).map_err(words)?;
        let (out, errors) = (std::io::stdout(), std::io::stderr());
        let descriptors = [theirs.as_fd(), out.as_fd(), errors.as_fd()];
        let pid = self.start(kernel, &["cvm-keeper", "--log", file], &descriptors).map_err(words)?;
        let owner = Owner::Logger;
        self.all.push(Keeper { pid, owner, reports: None, of_the_program: None, gone: None, task: None });
        Ok(ours)
    }

    fn start(
        &self,
        kernel: &mut impl Kernel,
        words: &[&str],
        handed: &[BorrowedFd<'_>],
    ) -> Result<Pid, Errno> {
        let path =
            CString::new(self.home.join("cvm-keeper").as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
        let argv: Vec<CString> = words.iter().filter_map(|w| CString::new(*w).ok()).collect();
        let program = Program {
            path: &path,
            argv: &argv,
            environment: &[],
            directory: c"/",
            descriptors: handed,
            identity: None,
            oom_score_adj: None,
            limits: None,
            session: Session::Own,
            dies_with_parent: false,
            // A signal that comes before the keeper has its handlers stays pending.
            blocked: Blocked::All,
            news: usize::try_from(descriptors::REPORTS).ok().and_then(|at| handed.get(at)).copied(),
        };
        kernel.spawn(&program, |stage, errno, news| {
            // Not to standard error, which is the container's: the installation is broken.
            let end = End::not_started(stage.to_byte(), errno as i32);
            let line = json_lines::line(&KeeperReport::TreeGone { end, killed: 0 });
            if let Some(pipe) = news {
                let _ = nix::unistd::write(pipe, &line);
            }
            127
        })
    }

    pub(crate) fn with_reports<T>(&self, look: impl FnOnce(&[BorrowedFd<'_>]) -> T) -> T {
        let fds: Vec<BorrowedFd<'_>> =
            self.all.iter().flat_map(Keeper::pipes).map(|pipe| pipe.pipe.as_fd()).collect();
        look(&fds)
    }

    /// Reads the reports that have come.
    pub(crate) fn listen(&mut self) -> Vec<Received> {
        let mut received = Vec::new();
        for keeper in &mut self.all {
            keeper.listen(&mut received);
        }
        received
    }

    /// The keeper that was reaped, with its last reports read.
    pub(crate) fn take(&mut self, pid: Pid, received: &mut Vec<Received>) -> Option<Keeper> {
        let index = self.all.iter().position(|c| c.pid == pid)?;
        let mut keeper = self.all.swap_remove(index);
        keeper.listen(received);
        Some(keeper)
    }

    pub(crate) fn find(&self, owner: Owner) -> Option<Pid> {
        self.all.iter().find(|c| c.owner == owner).map(|c| c.pid)
    }

    /// In the order in which they are to end: steps first, then services by their stop order.
    pub(crate) fn groups(&self, services: &[ServiceRecord]) -> Vec<Group> {
        let steps = self.all.iter().filter(|c| matches!(c.owner, Owner::Step(_))).map(|c| c.pid).collect();
        let mut groups = vec![Group { keepers: steps, grace: Duration::ZERO }];
        let orders: BTreeSet<u8> = services.iter().map(|s| s.service.stop_order).collect();
        groups.extend(orders.into_iter().map(|order| {
            let of_order = |id: ServiceId| services.get(id.0).filter(|s| s.service.stop_order == order);
            let keepers = self.all.iter().filter_map(|keeper| match keeper.owner {
                Owner::Service { id, .. } => Some((keeper.pid, of_order(id)?.service.grace)),
                Owner::Step(_) | Owner::Logger => None,
            });
            let (keepers, graces): (Vec<Pid>, Vec<Duration>) = keepers.unzip();
            Group { keepers, grace: graces.into_iter().max().unwrap_or_default() }
        }));
        groups
    }

    /// Reads all reports and forgets them, so that no writer waits for a reader.
    pub(crate) fn discard(&self) {
        let mut scrap = [0u8; 4096];
        for pipe in self.all.iter().flat_map(Keeper::pipes) {
            // Bounded: a program may write faster than this reads.
            for _ in 0..READS_A_TURN {
                if !nix::unistd::read(&pipe.pipe, &mut scrap).is_ok_and(|n| n > 0) {
                    break;
                }
            }
        }
    }

    /// The keeper that is alive for a run, whichever part of it that is.
    pub(crate) fn of_run(&self, wanted: ServiceId, of: Run) -> Option<Pid> {
        let owned =
            |c: &&Keeper| matches!(c.owner, Owner::Service { id, run, .. } if id == wanted && run == of);
        self.all.iter().find(owned).map(|c| c.pid)
    }
}

impl Keeper {
    fn pipes(&self) -> impl Iterator<Item = &ReportPipe> {
        self.reports.iter().chain(&self.of_the_program)
    }

    /// The program's reports are heard before the keeper's. The keeper's pipe is read first all the same: what the
    /// program has written before its end is there when the keeper has reported that end.
    fn listen(&mut self, received: &mut Vec<Received>) {
        let owner = self.owner;
        let mut of_the_keeper = Vec::new();
        if let Some(pipe) = &mut self.reports {
            let gone = &mut self.gone;
            let more = pipe.read(|line| match serde_json::from_slice(line) {
                Ok(KeeperReport::TreeGone { end, .. }) => *gone = Some(end),
                Ok(report) => of_the_keeper.push(Received { owner, report: Report::Keeper(report) }),
                Err(_) => {}
            });
            if !more {
                self.reports = None;
            }
        }
        if let Some(pipe) = &mut self.of_the_program {
            let task = &mut self.task;
            let more = pipe.read(|line| match owner {
                Owner::Service { part: Part::Main, .. } => {
                    let report = serde_json::from_slice(line).ok().map(Report::Service);
                    received.extend(report.map(|report| Received { owner, report }));
                }
                _ => *task = serde_json::from_slice(line).ok().or(task.take()),
            });
            if !more {
                self.of_the_program = None;
            }
        }
        received.append(&mut of_the_keeper);
    }
}

#[cfg(test)]
#[allow(clippy::expect_used, clippy::panic)]
mod tests {
    use super::*;
    use cvm_protocol::json_lines::line;
    use nix::fcntl::{FcntlArg, fcntl};

    fn main_of_a_service() -> Owner {
        Owner::Service { id: ServiceId(0), run: Run(1), part: Part::Main }
    }

    /// A keeper that was not started, with the other ends of the two pipes: its own and the program's.
    fn not_started(owner: Owner) -> (Keeper, OwnedFd, OwnedFd) {
        let (its_pipe, reports) = ReportPipe::new().expect("a pipe");
        let (program, of_the_program) = ReportPipe::new().expect("a pipe");
        let (reports, of_the_program) = (Some(reports), Some(of_the_program));
        let pid = Pid::from_raw(7);
        (Keeper { pid, owner, reports, of_the_program, gone: None, task: None }, its_pipe, program)
    }

    #[test]
    fn of_very_many_reports_at_once_none_is_lost() {
        let (mut keeper, its_pipe, _program) = not_started(main_of_a_service());
        let room = fcntl(&its_pipe, FcntlArg::F_SETPIPE_SZ(1 << 20)).expect("a pipe of 1 MiB");
        let line = line(&KeeperReport::Liveness { ok: true });
        let count = usize::try_from(room).expect("a size") / line.len() - 1000;
        let text = line.repeat(count);
        assert!(text.len() > 4 * REPORT_MAX);
        assert_eq!(nix::unistd::write(&its_pipe, &text), Ok(text.len()));
        let mut received = Vec::new();
        // Each call takes a part, so that nothing else has to wait for all of it.
        keeper.listen(&mut received);
        assert!(!received.is_empty() && received.len() < count);
        (0..10).for_each(|_| keeper.listen(&mut received));
        assert_eq!(received.len(), count);
    }

    #[test]
    fn a_service_cannot_speak_for_its_keeper_nor_a_keeper_for_its_service() {
        let (mut keeper, its_pipe, program) = not_started(main_of_a_service());
        let gone = line(&KeeperReport::TreeGone { end: End::Code(0), killed: 0 });
        let started = line(&KeeperReport::Started { pid: 1 });
        let drained = line(&ServiceReport::Drained { missing: None });
        for bytes in [&gone, &started, &drained] {
            nix::unistd::write(&program, bytes).expect("it has room");
        }
        nix::unistd::write(&its_pipe, &drained).expect("it has room");
        let mut received = Vec::new();
        keeper.listen(&mut received);
        assert_eq!(keeper.end(), End::Unseen);
        assert!(matches!(
            &received[..],
            [Received { report: Report::Service(ServiceReport::Drained { .. }), .. }]
        ));
        // The same words of the keeper's count.
        nix::unistd::write(&its_pipe, &gone).expect("it has room");
        keeper.listen(&mut received);
        assert_eq!(keeper.end(), End::Code(0));
    }

    #[test]
    fn of_a_line_that_is_too_long_no_piece_is_heard_and_the_lines_around_it_are() {
        let (mut keeper, _its_pipe, program) = not_started(main_of_a_service());
        fcntl(&program, FcntlArg::F_SETPIPE_SZ(1 << 20)).expect("a pipe of 1 MiB");
        let note = |text: &str| line(&ServiceReport::Drained { missing: Some(text.to_owned()) });
        let mut long = b"x".repeat(2 * REPORT_MAX);
        long.extend_from_slice(&note("the end of the long line"));
        for bytes in [note("before").to_vec(), long, note("after").to_vec()] {
            assert_eq!(nix::unistd::write(&program, &bytes), Ok(bytes.len()));
        }
        let mut received = Vec::new();
        (0..10).for_each(|_| keeper.listen(&mut received));
        let heard = received.into_iter().map(|received| match received.report {
            Report::Service(ServiceReport::Drained { missing }) => missing.unwrap_or_default(),
            _ => panic!("nothing else was said"),
        });
        assert_eq!(heard.collect::<Vec<_>>(), ["before", "after"]);
    }
}
