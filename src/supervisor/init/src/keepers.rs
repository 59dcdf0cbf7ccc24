//! The keepers: started here, listened to here, and gone from here when they are reaped.

use crate::last_net::Group;
use cvm_machine::machine::{ServiceId, ServiceRecord, Try};
use cvm_machine::service::Run;
use cvm_protocol::exit_status::End;
use cvm_protocol::json_lines;
use cvm_protocol::keeper::{KeeperReport, KeeperSpec};
use cvm_protocol::mux::MuxReport;
use cvm_protocol::report::REPORT_MAX;
use cvm_protocol::storage::StorageReport;
use cvm_protocol::task::TaskReport;
use cvm_sys::kernel::Kernel;
use cvm_sys::spawn::{Blocked, Program, Session};
use cvm_sys::{descriptor, memfd};
use nix::errno::Errno;
use nix::unistd::Pid;
use serde::Deserialize;
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

/// A line on a report pipe. A step shares the pipe of its keeper, and so do the services that speak.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Keeper(KeeperReport),
    Task(TaskReport),
    Storage(StorageReport),
    Mux(MuxReport),
}

pub(crate) struct Child {
    pub(crate) pid: Pid,
    pub(crate) owner: Owner,
    reports: Option<OwnedFd>,
    partial: Vec<u8>,
    /// The keeper's last word, if it came to say it.
    gone: Option<End>,
    /// What a step reported.
    pub(crate) task: Option<TaskReport>,
}

impl Child {
    /// How it ended, once its keeper has been reaped.
    pub(crate) fn end(&self) -> End {
        self.gone.clone().unwrap_or(End::Unseen)
    }
}

/// Something a keeper said, or the program it keeps.
pub(crate) struct Said {
    pub(crate) owner: Owner,
    pub(crate) words: Words,
}

pub(crate) enum Words {
    Keeper(KeeperReport),
    Storage(StorageReport),
    Mux(MuxReport),
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

    /// Starts a keeper for `spec`. `handed` is what [`Input::Descriptor`] speaks of.
    ///
    /// [`Input::Descriptor`]: cvm_protocol::keeper::Input::Descriptor
    pub(crate) fn keep(
        &mut self,
        kernel: &mut impl Kernel,
        owner: Owner,
        spec: &KeeperSpec,
        handed: Option<BorrowedFd<'_>>,
    ) -> Result<(), String> {
        let words = |e: Errno| e.desc().to_owned();
        let input = memfd::sealed(c"spec", &json_lines::line(spec)).map_err(|e| e.to_string())?;
        let (reports, theirs) = descriptor::pipe().map_err(words)?;
        descriptor::set_nonblocking(&reports).map_err(words)?;
        let (out, errors) = (std::io::stdout(), std::io::stderr());
        let mut descriptors = vec![input.as_fd(), out.as_fd(), errors.as_fd(), theirs.as_fd()];
        descriptors.extend(handed);
        let pid = self.start(kernel, &["cvm-keeper", &spec.name], &descriptors).map_err(words)?;
        self.all.push(Child {
            pid,
            owner,
            reports: Some(reports),
            partial: Vec::new(),
            gone: None,
            task: None,
        });
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
        self.all.push(Child { pid, owner, reports: None, partial: Vec::new(), gone: None, task: None });
        Ok(ours)
    }

    fn start(
        &self,
        kernel: &mut impl Kernel,
        words: &[&str],
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<Pid, Errno> {
        let path =
            CString::new(self.home.join("cvm-keeper").as_os_str().as_bytes()).map_err(|_| Errno::EINVAL)?;
        let argv: Vec<CString> = words.iter().filter_map(|w| CString::new(*w).ok()).collect();
        let program = Program {
            path: &path,
            argv: &argv,
            environment: &[],
            directory: c"/",
            descriptors,
            identity: None,
            oom_score_adj: None,
            limits: None,
            session: Session::Own,
            dies_with_parent: false,
            // An order to end that comes before it listens waits for it.
            blocked: Blocked::All,
            news: descriptors.get(3).copied(),
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
            self.all.iter().filter_map(|c| c.reports.as_ref()).map(AsFd::as_fd).collect();
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
        for pipe in self.all.iter().filter_map(|c| c.reports.as_ref()) {
            while nix::unistd::read(pipe, &mut scrap).is_ok_and(|n| n > 0) {}
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
    fn listen(&mut self, said: &mut Vec<Said>) {
        let mut bytes = [0u8; 4096];
        for _ in 0..READS_A_TURN {
            let Some(pipe) = &self.reports else { return };
            match nix::unistd::read(pipe, &mut bytes) {
                Ok(n) if n > 0 => self.partial.extend(bytes.iter().take(n)),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return,
                // The other end is closed; how it ended is said when it is reaped.
                Ok(_) | Err(_) => self.reports = None,
            }
            while let Some(end) = self.partial.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.partial.drain(..=end).collect();
                self.hear(&line, said);
            }
            if self.partial.len() > REPORT_MAX {
                self.partial.clear();
            }
        }
    }

    fn hear(&mut self, line: &[u8], said: &mut Vec<Said>) {
        let words = match serde_json::from_slice(line) {
            Ok(Line::Keeper(KeeperReport::TreeGone { end, .. })) => {
                self.gone = Some(end);
                return;
            }
            Ok(Line::Task(report)) => {
                self.task = Some(report);
                return;
            }
            Ok(Line::Keeper(report)) => Words::Keeper(report),
            Ok(Line::Storage(report)) => Words::Storage(report),
            Ok(Line::Mux(report)) => Words::Mux(report),
            Err(_) => return,
        };
        said.push(Said { owner: self.owner, words });
    }
}

#[cfg(test)]
#[allow(clippy::expect_used)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, fcntl};

    #[test]
    fn of_very_many_reports_at_once_none_is_lost() {
        let (reports, theirs) = descriptor::pipe().expect("a pipe");
        let room = fcntl(&theirs, FcntlArg::F_SETPIPE_SZ(1 << 20)).expect("a pipe of 1 MiB");
        descriptor::set_nonblocking(&reports).expect("it is open");
        let line = json_lines::line(&KeeperReport::Liveness { ok: true });
        let count = usize::try_from(room).expect("a size") / line.len() - 1000;
        let text = line.repeat(count);
        assert!(text.len() > 4 * REPORT_MAX);
        assert_eq!(nix::unistd::write(&theirs, &text), Ok(text.len()));
        let owner = Owner::Service { id: ServiceId(0), run: Run(1), part: Part::Main };
        let (partial, gone, task) = (Vec::new(), None, None);
        let mut child = Child { pid: Pid::from_raw(7), owner, reports: Some(reports), partial, gone, task };
        let mut said = Vec::new();
        // Each call takes a part, so that nothing else has to wait for all of it.
        child.listen(&mut said);
        assert!(!said.is_empty() && said.len() < count);
        (0..10).for_each(|_| child.listen(&mut said));
        assert_eq!(said.len(), count);
    }
}
