//! The keepers: started here, listened to here, and gone from here when they are reaped.

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

/// Read from one pipe in one turn, in pieces of 4 KiB, before everything else gets its turn. More
/// than a pipe usually holds, so that nothing is left of one whose writer has ended.
const READS_A_TURN: usize = 64;

/// Whom a child belongs to.
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

/// Which part of a run a child plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Prepare,
    Main,
    Repair,
    Sweep,
}

pub(crate) struct Child {
    pub(crate) pid: Pid,
    pub(crate) owner: Owner,
    /// What the keeper says.
    reports: Option<ReportPipe>,
    /// What the program says that it keeps. The keeper does not write there, nor the program to the keeper's: a
    /// service that faces the network must not be able to say that it is gone.
    of_the_program: Option<ReportPipe>,
    /// The keeper's last word, if it came to say it.
    gone: Option<End>,
    /// What a task reported.
    pub(crate) task: Option<TaskReport>,
}

impl Child {
    /// How it ended, once its keeper has been reaped.
    pub(crate) fn end(&self) -> End {
        self.gone.clone().unwrap_or(End::Unseen)
    }
}

/// Something a keeper said, or the service it keeps.
pub(crate) struct Said {
    pub(crate) owner: Owner,
    pub(crate) words: Words,
}

pub(crate) enum Words {
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
    /// Theirs and ours.
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
                // The other end is closed; how it ended is said when it is reaped.
                Ok(_) | Err(_) => return false,
            }
            while let Some(end) = self.partial.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                if !std::mem::take(&mut self.skips) {
                    hear(&line);
                }
            }
            // After the whole lines in front of it: only the one that is too long is lost.
            if self.partial.len() > REPORT_MAX {
                self.partial.clear();
                self.skips = true;
            }
        }
        true
    }
}

pub(crate) struct Children {
    all: Vec<Child>,
    /// Where the binaries of this build lie: beside our own.
    home: PathBuf,
}

impl Children {
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
        self.all.push(Child { pid, owner, reports: Some(reports), of_the_program, gone: None, task: None });
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
        self.all.push(Child { pid, owner, reports: None, of_the_program: None, gone: None, task: None });
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
            // An order to end that comes before it listens waits for it.
            blocked: Blocked::All,
            news: usize::try_from(descriptors::REPORTS).ok().and_then(|at| handed.get(at)).copied(),
        };
        kernel.spawn(&program, |stage, errno, news| {
            // Standard error here is the container's: this is a broken installation.
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
            self.all.iter().flat_map(Child::pipes).map(|pipe| pipe.pipe.as_fd()).collect();
        look(&fds)
    }

    /// Reads what keepers have said.
    pub(crate) fn listen(&mut self) -> Vec<Said> {
        let mut said = Vec::new();
        for child in &mut self.all {
            child.listen(&mut said);
        }
        said
    }

    /// The child that was reaped, with its last words read.
    pub(crate) fn take(&mut self, pid: Pid, said: &mut Vec<Said>) -> Option<Child> {
        let index = self.all.iter().position(|c| c.pid == pid)?;
        let mut child = self.all.swap_remove(index);
        child.listen(said);
        Some(child)
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
            let keepers = self.all.iter().filter_map(|child| match child.owner {
                Owner::Service { id, .. } => Some((child.pid, of_order(id)?.service.grace)),
                Owner::Step(_) | Owner::Logger => None,
            });
            let (keepers, graces): (Vec<Pid>, Vec<Duration>) = keepers.unzip();
            Group { keepers, grace: graces.into_iter().max().unwrap_or_default() }
        }));
        groups
    }

    /// Reads what was said and forgets it, so that nobody waits for a reader.
    pub(crate) fn discard(&self) {
        let mut scrap = [0u8; 4096];
        for pipe in self.all.iter().flat_map(Child::pipes) {
            while nix::unistd::read(&pipe.pipe, &mut scrap).is_ok_and(|n| n > 0) {}
        }
    }

    /// The keeper that is alive for a run, whichever part of it that is.
    pub(crate) fn of_run(&self, wanted: ServiceId, of: Run) -> Option<Pid> {
        let owned =
            |c: &&Child| matches!(c.owner, Owner::Service { id, run, .. } if id == wanted && run == of);
        self.all.iter().find(owned).map(|c| c.pid)
    }
}

impl Child {
    fn pipes(&self) -> impl Iterator<Item = &ReportPipe> {
        self.reports.iter().chain(&self.of_the_program)
    }

    /// What the program has said comes first: its last report was written before the keeper's.
    fn listen(&mut self, said: &mut Vec<Said>) {
        let owner = self.owner;
        if let Some(pipe) = &mut self.of_the_program {
            let task = &mut self.task;
            let more = pipe.read(|line| match owner {
                Owner::Service { part: Part::Main, .. } => {
                    let report = serde_json::from_slice(line).ok().map(Words::Service);
                    said.extend(report.map(|words| Said { owner, words }));
                }
                _ => *task = serde_json::from_slice(line).ok().or(task.take()),
            });
            if !more {
                self.of_the_program = None;
            }
        }
        if let Some(pipe) = &mut self.reports {
            let gone = &mut self.gone;
            let more = pipe.read(|line| match serde_json::from_slice(line) {
                Ok(KeeperReport::TreeGone { end, .. }) => *gone = Some(end),
                Ok(report) => said.push(Said { owner, words: Words::Keeper(report) }),
                Err(_) => {}
            });
            if !more {
                self.reports = None;
            }
        }
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

    /// A child that was not started, with the other ends of its pipes: the keeper's and the program's.
    fn child(owner: Owner) -> (Child, OwnedFd, OwnedFd) {
        let (keeper, reports) = ReportPipe::new().expect("a pipe");
        let (program, of_the_program) = ReportPipe::new().expect("a pipe");
        let (reports, of_the_program) = (Some(reports), Some(of_the_program));
        let pid = Pid::from_raw(7);
        (Child { pid, owner, reports, of_the_program, gone: None, task: None }, keeper, program)
    }

    #[test]
    fn of_very_many_reports_at_once_none_is_lost() {
        let (mut child, keeper, _program) = child(main_of_a_service());
        let room = fcntl(&keeper, FcntlArg::F_SETPIPE_SZ(1 << 20)).expect("a pipe of 1 MiB");
        let line = line(&KeeperReport::Liveness { ok: true });
        let count = usize::try_from(room).expect("a size") / line.len() - 1000;
        let text = line.repeat(count);
        assert!(text.len() > 4 * REPORT_MAX);
        assert_eq!(nix::unistd::write(&keeper, &text), Ok(text.len()));
        let mut said = Vec::new();
        // Each call takes a part, so that nothing else has to wait for all of it.
        child.listen(&mut said);
        assert!(!said.is_empty() && said.len() < count);
        (0..10).for_each(|_| child.listen(&mut said));
        assert_eq!(said.len(), count);
    }

    #[test]
    fn a_service_cannot_speak_for_its_keeper_nor_a_keeper_for_its_service() {
        let (mut child, keeper, program) = child(main_of_a_service());
        let gone = line(&KeeperReport::TreeGone { end: End::Code(0), killed: 0 });
        let started = line(&KeeperReport::Started { pid: 1 });
        let drained = line(&ServiceReport::Drained { missing: None });
        for bytes in [&gone, &started, &drained] {
            nix::unistd::write(&program, bytes).expect("it has room");
        }
        nix::unistd::write(&keeper, &drained).expect("it has room");
        let mut said = Vec::new();
        child.listen(&mut said);
        assert_eq!(child.end(), End::Unseen);
        assert!(matches!(&said[..], [Said { words: Words::Service(ServiceReport::Drained { .. }), .. }]));
        // The same words of the keeper's count.
        nix::unistd::write(&keeper, &gone).expect("it has room");
        child.listen(&mut said);
        assert_eq!(child.end(), End::Code(0));
    }

    #[test]
    fn of_a_line_that_is_too_long_no_piece_is_heard_and_the_lines_around_it_are() {
        let (mut child, _keeper, program) = child(main_of_a_service());
        fcntl(&program, FcntlArg::F_SETPIPE_SZ(1 << 20)).expect("a pipe of 1 MiB");
        let note = |text: &str| line(&ServiceReport::Drained { missing: Some(text.to_owned()) });
        let mut long = b"x".repeat(2 * REPORT_MAX);
        long.extend_from_slice(&note("the end of the long line"));
        for bytes in [note("before").to_vec(), long, note("after").to_vec()] {
            assert_eq!(nix::unistd::write(&program, &bytes), Ok(bytes.len()));
        }
        let mut said = Vec::new();
        (0..10).for_each(|_| child.listen(&mut said));
        let heard = said.into_iter().map(|said| match said.words {
            Words::Service(ServiceReport::Drained { missing }) => missing.unwrap_or_default(),
            _ => panic!("nothing else was said"),
        });
        assert_eq!(heard.collect::<Vec<_>>(), ["before", "after"]);
    }
}
