//! `cvm doctor`: what is wrong with this machine, and what to do about it.
//!
//! One room for each family of checks, and each room in a process of its own: a thread that
//! hangs on a dead disk could not be left behind, a process can. A room says what it is about
//! to check before it does, so the one that hangs is named. The overlay room needs a process
//! anyway, for its private mount namespace.
//!
//! Refuses to change anything that stays. May import: `args`, `look`, `out`, `socket`,
//! `trouble`, `words`; rooms may import `finding`, `facts`, `http`, `socket`, `storage`, `words`.

mod agent;
mod capabilities;
mod clock;
mod disk;
mod docker;
pub(crate) mod facts;
mod files;
mod finding;
mod fuse;
mod gateway;
mod iptables;
mod memory;
mod mux;
mod overlay;
mod ports;
mod report;
mod rooms;
mod ssh;
mod storage;
mod supervisor;

use crate::args::DoctorArgs;
use crate::look::Look;
use crate::out;
use crate::trouble::{Exit, Trouble};
use finding::{Notebook, Verdict};

type Room = fn(&mut Notebook<'_>);

/// All rooms, in the order in which they are shown.
const ROOMS: &[(&str, Room)] = &[
    ("supervisor", supervisor::check),
    ("ssh", ssh::check),
    ("gateway", gateway::check),
    ("mux", mux::check),
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

pub(crate) fn run(args: &DoctorArgs) -> Result<Exit, Trouble> {
    if !nix::unistd::geteuid().is_root() {
        let hint = "log in as root, or put sudo before it";
        return Err(Trouble::new(Exit::Usage, "doctor", "most of what it looks at is root's").hint(hint));
    }
    let findings = rooms::ask_all(&ROOMS.iter().map(|(name, _)| *name).collect::<Vec<_>>())?;
    let look = Look::of_stdout();
    out::print(&if args.json { report::json(&findings, look) } else { report::page(&findings, look) })?;
    let failed = findings.iter().any(|f| f.verdict == Verdict::Fail);
    Ok(if failed { Exit::Bad } else { Exit::Good })
}

/// The other side: one room, its findings as lines on standard output.
pub(crate) fn run_room(name: &str) -> Result<Exit, Trouble> {
    let Some((name, room)) = ROOMS.iter().find(|(known, _)| *known == name) else {
        return Err(Trouble::new(Exit::Usage, "doctor", format!("there is no room {name:?}")));
    };
    let mut stdout = std::io::stdout().lock();
    room(&mut Notebook::new(name, &mut stdout));
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
