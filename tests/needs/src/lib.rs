//! What a test needs of the machine it runs on. Where that is lacking the test is skipped: it says so, and
//! `tests/run` lists and counts it at the end.
//!
//! libtest knows no skip while a test runs, and counts such a test as passed. So the line and the count are
//! all there can be. `CVM_REQUIRED` names needs, or `all`: where one of those is lacking the test fails.

use std::fs::File;
use std::io::Write as _;

/// Something that a machine may not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// To act as other users, to mount, and to make namespaces.
    Root,
    /// A container engine that can run here.
    Engine,
    /// A memory cgroup of one's own.
    MemoryCgroup,
    /// A kernel that lets a program type into its terminal.
    Tiocsti,
    /// A kernel and an engine that restrict containers by these.
    Profiles,
    /// No gateway where the image has it.
    Bare,
    /// An hour: `CVM_SOAK` is set.
    Time,
}

impl Need {
    /// Its name in `CVM_REQUIRED`.
    fn name(self) -> &'static str {
        match self {
            Self::Root => "root",
            Self::Engine => "engine",
            Self::MemoryCgroup => "memory-cgroup",
            Self::Tiocsti => "tiocsti",
            Self::Profiles => "profiles",
            Self::Bare => "bare",
            Self::Time => "time",
        }
    }

    /// Whether a test fails where it is lacking.
    pub fn is_required(self) -> bool {
        let required = std::env::var("CVM_REQUIRED").unwrap_or_default();
        required.split([' ', ',']).any(|word| word == self.name() || word == "all")
    }
}

/// Whether this is not root; the test, which returns then, is skipped.
#[track_caller]
pub fn lacks_root() -> bool {
    let lacks = !nix::unistd::geteuid().is_root();
    if lacks {
        skip(Need::Root, "this is not root");
    }
    lacks
}

/// Skips the test of this thread, or the part of it that begins here.
#[track_caller]
pub fn skip(need: Need, why: &str) {
    let name = need.name();
    assert!(!need.is_required(), "CVM_REQUIRED names `{name}`, and it is lacking: {why}");
    let here = std::panic::Location::caller();
    let thread = std::thread::current();
    // The test's name, unless tests run on one thread.
    let test = thread.name().filter(|name| *name != "main").map_or_else(|| here.to_string(), str::to_owned);
    let line = format!("{test}: {why}\n");
    // Past the test runner, which keeps what a test prints to itself.
    let _ = std::io::stderr().write_all(format!("SKIPPED {line}").as_bytes());
    if let Some(file) = std::env::var_os("CVM_SKIPS") {
        let mut file = File::options().create(true).append(true).open(file).expect("CVM_SKIPS names a file");
        file.write_all(line.as_bytes()).expect("the file of skips takes a line");
    }
}
