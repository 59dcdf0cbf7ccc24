//! Finds an iptables that works on the running kernel: some kernels have no `nf_tables`, some no
//! legacy tables, and the program starts in both cases.
//!
//! An iptables works if it can make a chain of our own in the tables that dockerd uses, with the kinds of
//! rule that dockerd writes, and remove it again. No other chain is touched. A backend that holds docker's chains already
//! is preferred, since rules in two backends contradict each other.

use crate::files::{Dir, FileError, FileResult};
use crate::programs;
use crate::root_dir::RootDir;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

/// Of 28 characters at most; a number follows.
const TRIAL_CHAIN: &str = "CVM-TRIAL";
/// As dockerd does: wait for whoever holds the lock of the tables. The number needs the sign; apart
/// from it it would be taken for a file to read.
const WAIT: &str = "--wait=5";
const DIRECTORIES: [&str; 2] = ["/usr/sbin", "/sbin"];

/// One way of talking to the kernel: the suffix of its programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Backend {
    Nft,
    Legacy,
    /// The image has one iptables and no choice.
    Plain,
}

impl Backend {
    /// `iptables-nft-restore` for (`iptables`, `-restore`).
    fn program(self, family: &str, tool: &str) -> String {
        match self {
            Self::Nft => format!("{family}-nft{tool}"),
            Self::Legacy => format!("{family}-legacy{tool}"),
            Self::Plain => format!("{family}{tool}"),
        }
    }

    fn find(self, root_dir: &RootDir, family: &str, tool: &str) -> Option<PathBuf> {
        let name = self.program(family, tool);
        programs::find(DIRECTORIES.iter().map(|dir| root_dir.at(dir).join(&name)))
    }
}

pub(crate) struct Choice {
    /// Why none works, in words.
    pub(crate) v4: Result<Works, String>,
    pub(crate) v6: Result<Works, String>,
}

/// A backend with the paths of its programs, by the names under which dockerd looks for them.
#[derive(Debug)]
pub(crate) struct Works {
    #[cfg_attr(not(test), expect(dead_code, reason = "what a test asks for; the links are what counts"))]
    backend: Backend,
    programs: Vec<(String, PathBuf)>,
}

pub(crate) fn choose(root_dir: &RootDir) -> Choice {
    let candidates = order(root_dir);
    // IPv4 and IPv6 at once: neither depends on the other, and each mostly waits for programs.
    std::thread::scope(|scope| {
        let v6 = scope.spawn(|| first_that_works(root_dir, "ip6tables", &candidates));
        let v4 = first_that_works(root_dir, "iptables", &candidates);
        Choice { v4, v6: v6.join().unwrap_or_else(|_| Err("the trial broke off".into())) }
    })
}

/// nft first, because it is what kernels keep; legacy first if docker's chains are there and not
/// in nft. Asking legacy would load its modules, so the kernel is asked whether they are.
fn order(root_dir: &RootDir) -> Vec<Backend> {
    let legacy_tables = fs::read_to_string(root_dir.at("/proc/net/ip_tables_names")).unwrap_or_default();
    let has_docker = |backend: Backend| {
        let saved = backend.find(root_dir, "iptables", "-save").map(|p| programs::must(&p, &[], ""));
        saved.is_some_and(|text| text.is_ok_and(|t| t.contains(":DOCKER")))
    };
    let legacy_first =
        !legacy_tables.trim().is_empty() && has_docker(Backend::Legacy) && !has_docker(Backend::Nft);
    let order = if legacy_first { [Backend::Legacy, Backend::Nft] } else { [Backend::Nft, Backend::Legacy] };
    order.into_iter().chain([Backend::Plain]).collect()
}

fn first_that_works(root_dir: &RootDir, family: &str, candidates: &[Backend]) -> Result<Works, String> {
    let mut reasons = Vec::new();
    for &backend in candidates {
        let Some(restore) = backend.find(root_dir, family, "-restore") else { continue };
        // The plain name is one of the two that have been tried, unless there are no others.
        if backend == Backend::Plain && !reasons.is_empty() {
            continue;
        }
        match trial(&restore) {
            Ok(()) => return Ok(works(root_dir, family, backend)),
            Err(why) => reasons.push(why),
        }
    }
    if reasons.is_empty() { Err(format!("no {family} in this image")) } else { Err(reasons.join("; ")) }
}

/// Makes the chains and removes them. The removal runs in any case: one of two may be there.
fn trial(restore: &std::path::Path) -> Result<(), String> {
    let chain = format!("{TRIAL_CHAIN}-{}", std::process::id());
    let run = |script: String| programs::must(restore, &["--noflush", WAIT], &script).map(drop);
    let made = run(format!(
        "*filter\n:{chain} - [0:0]\n\
         -A {chain} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n\
         COMMIT\n\
         *nat\n:{chain} - [0:0]\n\
         -A {chain} -m addrtype --dst-type LOCAL -j RETURN\n\
         -A {chain} -j MASQUERADE\n\
         COMMIT\n"
    ));
    let removed =
        run(format!("*filter\n-F {chain}\n-X {chain}\nCOMMIT\n*nat\n-F {chain}\n-X {chain}\nCOMMIT\n"));
    if made.is_err() && removed.is_err() {
        // The filter table alone: the nat table may be what both failed at.
        let _ = run(format!("*filter\n-F {chain}\n-X {chain}\nCOMMIT\n"));
    }
    made.and(removed)
}

fn works(root_dir: &RootDir, family: &str, backend: Backend) -> Works {
    let tools = ["", "-save", "-restore"].into_iter();
    let programs =
        tools.filter_map(|tool| Some((format!("{family}{tool}"), backend.find(root_dir, family, tool)?)));
    Works { backend, programs: programs.collect() }
}

/// Fills the directory that comes first in dockerd's PATH, and empties it of an earlier choice.
pub(crate) fn link(bin: &Dir, choice: &Choice) -> FileResult<()> {
    for family in ["iptables", "ip6tables"] {
        for tool in ["", "-save", "-restore"] {
            bin.remove(format!("{family}{tool}").as_ref())?;
        }
    }
    let working = [&choice.v4, &choice.v6].into_iter().flatten().flat_map(|works| &works.programs);
    for (name, program) in working {
        let at = bin.path().join(name);
        let failed = |e: std::io::Error| FileError {
            what: "make the link",
            path: at.clone(),
            errno: e.raw_os_error().map_or(nix::errno::Errno::EIO, nix::errno::Errno::from_raw),
        };
        symlink(program, &at).map_err(failed)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::path::Path;
    use std::process::{Command, Stdio};

    /// By another process: what another test starts while we have a file open for writing has it open
    /// too for a moment, and the kernel runs no program that is.
    fn install(path: &Path, text: &str) {
        let mut install = Command::new("install")
            .args(["-m", "755", "/dev/stdin"])
            .arg(path)
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        install.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        assert!(install.wait().unwrap().success());
    }

    /// An image with programs that behave as told: a shell script each.
    fn image(programs: &[(&str, &str)]) -> (tempfile::TempDir, RootDir) {
        let temp = tempfile::tempdir().unwrap();
        let sbin = temp.path().join("usr/sbin");
        fs::create_dir_all(&sbin).unwrap();
        for (name, script) in programs {
            install(&sbin.join(name), &format!("#!/bin/sh\n{script}\n"));
        }
        let root_dir = RootDir::below(temp.path());
        (temp, root_dir)
    }

    fn legacy_tables(root: &Path) {
        fs::create_dir_all(root.join("proc/net")).unwrap();
        fs::write(root.join("proc/net/ip_tables_names"), "filter\nnat\n").unwrap();
    }

    fn backend(root_dir: &RootDir) -> Result<Backend, String> {
        choose(root_dir).v4.map(|works| works.backend)
    }

    const WORKS: &str = "cat >/dev/null";
    const FAILS: &str = "cat >/dev/null; echo 'Protocol not supported' >&2; exit 1";

    #[test]
    fn nft_is_taken_when_both_work() {
        let (_temp, root_dir) = image(&[("iptables-nft-restore", WORKS), ("iptables-legacy-restore", WORKS)]);
        assert_eq!(backend(&root_dir), Ok(Backend::Nft));
    }

    #[test]
    fn legacy_is_taken_when_the_kernel_has_no_nf_tables() {
        let (_temp, root_dir) = image(&[("iptables-nft-restore", FAILS), ("iptables-legacy-restore", WORKS)]);
        assert_eq!(backend(&root_dir), Ok(Backend::Legacy));
    }

    #[test]
    fn the_one_with_dockers_chains_is_kept() {
        let (temp, root_dir) = image(&[
            ("iptables-nft-restore", WORKS),
            ("iptables-nft-save", WORKS),
            ("iptables-legacy-restore", WORKS),
            ("iptables-legacy-save", "echo ':DOCKER - [0:0]'"),
        ]);
        assert_eq!(backend(&root_dir), Ok(Backend::Nft));
        legacy_tables(temp.path());
        assert_eq!(backend(&root_dir), Ok(Backend::Legacy));
    }

    #[test]
    fn an_image_with_one_iptables_gets_it() {
        let (_temp, root_dir) = image(&[("iptables-restore", WORKS), ("iptables", WORKS)]);
        assert_eq!(backend(&root_dir), Ok(Backend::Plain));
    }

    #[test]
    fn when_none_works_the_words_of_each_are_kept() {
        let (_temp, root_dir) = image(&[("iptables-nft-restore", FAILS), ("iptables-legacy-restore", FAILS)]);
        let why = backend(&root_dir).unwrap_err();
        assert_eq!(why.matches("Protocol not supported").count(), 2, "{why}");
        assert_eq!(choose(&root_dir).v6.err().unwrap(), "no ip6tables in this image");
    }

    #[test]
    fn the_links_of_an_earlier_choice_do_not_stay() {
        let (temp, root_dir) = image(&[("iptables-legacy-restore", WORKS), ("iptables-legacy", WORKS)]);
        let bin = Dir::ensure(&temp.path().join("bin"), 0o755, None).unwrap();
        symlink("/old", temp.path().join("bin/ip6tables")).unwrap();
        symlink("/old", temp.path().join("bin/iptables")).unwrap();
        link(&bin, &choose(&root_dir)).unwrap();
        link(&bin, &choose(&root_dir)).unwrap();
        assert!(fs::symlink_metadata(temp.path().join("bin/ip6tables")).is_err());
        assert!(
            fs::read_link(temp.path().join("bin/iptables")).unwrap().ends_with("usr/sbin/iptables-legacy")
        );
    }
}
