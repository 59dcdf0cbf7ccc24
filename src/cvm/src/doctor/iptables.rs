//! Room iptables: which backend works on this kernel? Some CVM kernels have no `nf_tables`, some no legacy
//! tables; dockerd needs one of the two. The check lists a table and changes nothing.

use super::finding::{Checks, Outcome, ok, skip, warn};
use super::sources;
use crate::text::clean;
use cvm_protocol::paths;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PLACES: [&str; 2] = ["/usr/sbin", "/sbin"];
/// How much of a program's complaint is shown.
const WORDS_MAX: usize = 200;

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.begin("backends");
    let status = sources::status();
    if status.is_some() && sources::service(status.as_ref(), "dockerd").is_none() {
        return checks.add("backends", skip("ENABLE_DOCKER is 0"));
    }
    let mut works = Vec::new();
    for backend in ["nft", "legacy"] {
        checks.begin(backend);
        let outcome = list(&format!("iptables-{backend}"));
        if outcome.is_ok() {
            works.push(backend);
        }
        let outcome = outcome
            .map_or_else(|why| skip(format!("does not work here: {why}")), |()| ok("lists the nat table"));
        checks.add(backend, outcome);
    }
    checks.run("one of them works", || judge(&works, chosen().as_deref()));
}

fn list(program: &str) -> Result<(), String> {
    let path = PLACES.iter().map(|place| Path::new(place).join(program)).find(|path| path.exists());
    let path = path.ok_or_else(|| format!("{program} is not installed"))?;
    let output = Command::new(path)
        .args(["-w", "2", "-t", "nat", "-S"])
        .env_clear()
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| crate::text::io_error(&e))?;
    if output.status.success() {
        return Ok(());
    }
    let complaint = String::from_utf8_lossy(&output.stderr);
    let line = complaint.lines().map(str::trim).find(|l| !l.is_empty()).unwrap_or("it prints nothing");
    Err(clean(line).chars().take(WORDS_MAX).collect())
}

/// The backend that the supervisor has put into dockerd's PATH.
fn chosen() -> Option<String> {
    let link: PathBuf = std::fs::read_link(Path::new(paths::DOCKERD_BIN).join("iptables")).ok()?;
    Some(link.file_name()?.to_string_lossy().into_owned())
}

fn judge(works: &[&str], chosen: Option<&str>) -> Outcome {
    if works.is_empty() {
        let remedy = "in docker-compose.yml: cap_add: [NET_ADMIN]; if that is there, this kernel has neither backend: \
                      set ENABLE_DOCKER=0, because dockerd cannot work here";
        return warn("none: dockerd cannot make its bridge", remedy);
    }
    let works = works.join(", ");
    match chosen {
        Some(name)
            if name.contains("legacy") && !works.contains("legacy")
                || name.contains("nft") && !works.contains("nft") =>
        {
            warn(
                format!("dockerd was given {name}, but only {works} works"),
                "`cvm restart dockerd` chooses again",
            )
        }
        Some(name) => ok(format!("{works}; dockerd uses {name}")),
        None => ok(works),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;

    #[test]
    fn dockerd_needs_a_backend_that_works() {
        let verdict = |works: &[&str], chosen| judge(works, chosen).verdict;
        assert_eq!(verdict(&[], None), Verdict::Warn);
        assert_eq!(verdict(&["nft"], None), Verdict::Ok);
        assert_eq!(verdict(&["legacy"], Some("iptables-legacy")), Verdict::Ok);
        assert_eq!(verdict(&["legacy"], Some("iptables-nft")), Verdict::Warn);
        assert_eq!(verdict(&["nft"], Some("xtables-legacy-multi")), Verdict::Warn);
        assert_eq!(verdict(&["nft"], Some("xtables-nft-multi")), Verdict::Ok);
    }
}
