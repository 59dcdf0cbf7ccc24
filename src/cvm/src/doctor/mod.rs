//! `cvm doctor`: what is wrong with this machine, and what to do about it.
//!
//! A room is one family of checks, run in a process of its own: a thread that hangs on a dead disk cannot
//! be ended, a process can. A room names each check before it makes it, so the doctor knows the name of
//! one that hangs. The overlay room needs a process anyway, for its mount namespace. No check changes
//! anything for good.

mod agent;
mod capabilities;
mod clock;
mod disk;
mod docker;
mod files;
mod finding;
mod fuse;
mod gateway;
mod iptables;
mod memory;
mod mux;
mod overlay;
mod ports;
mod proc_files;
mod report;
mod rooms;
mod services;
mod sources;
mod ssh;
mod storage;
mod supervisor;

use crate::args::DoctorArgs;
use crate::failure::{Exit, Failure};
use crate::stdout;
use crate::style::Style;
use finding::{Checks, Verdict};

type Room = fn(&mut Checks<'_>);

/// All rooms, in the order in which they are shown.
const ROOMS: &[(&str, Room)] = &[
    ("supervisor", supervisor::check),
    ("ssh", ssh::check),
    ("gateway", gateway::check),
    ("mux", mux::check),
    ("services", services::check),
    ("files", files::check),
    ("storage", storage::check),
    ("disk", disk::check),
    ("memory", memory::check),
    ("clock", clock::check),
    ("ports", ports::check),
    ("capabilities", capabilities::check),
    ("agent", agent::check),
    ("fuse", fuse::check),
    ("overlay", overlay::check),
    ("iptables", iptables::check),
    ("docker", docker::check),
];

pub(crate) fn run(args: &DoctorArgs) -> Result<Exit, Failure> {
    if !nix::unistd::geteuid().is_root() {
        let hint = "log in as root, or put sudo before it";
        return Err(
            Failure::new(Exit::Usage, "doctor", "only root may look at most of the machine").hint(hint)
        );
    }
    let findings = rooms::run_all(&ROOMS.iter().map(|(name, _)| *name).collect::<Vec<_>>())?;
    let style = Style::of_stdout();
    stdout::print(&if args.json { report::json(&findings, style) } else { report::page(&findings, style) })?;
    let failed = findings.iter().any(|f| f.verdict == Verdict::Fail);
    Ok(if failed { Exit::Bad } else { Exit::Good })
}

/// The process of one room: prints its findings as lines on standard output.
pub(crate) fn run_room(name: &str) -> Result<Exit, Failure> {
    let Some((name, room)) = ROOMS.iter().find(|(known, _)| *known == name) else {
        return Err(Failure::new(Exit::Usage, "doctor", format!("there is no room {name:?}")));
    };
    let mut stdout = std::io::stdout().lock();
    room(&mut Checks::new(name, &mut stdout));
    Ok(Exit::Good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_rooms_have_one_name() {
        let mut names: Vec<&str> = ROOMS.iter().map(|(name, _)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ROOMS.len());
    }
}
