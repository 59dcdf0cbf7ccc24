//! Prepares the start of dockerd: removes what an earlier dockerd left behind, and tries out what dockerd needs from this
//! kernel, so that it is told what works instead of failing on what does not.
//!
//! A dockerd that runs is not touched, and what the user wrote into `/etc/docker/daemon.json` counts.

mod cgroups;
mod iptables;
mod stale;
mod storage;

use crate::files::{self, Dir, Kind};
use crate::programs;
use crate::report::{Failure, Outcome, Report};
use crate::root_dir::RootDir;
use cvm_protocol::paths;
use cvm_sys::namespace::{self, ContainerStep};
use nix::errno::Errno;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

const DOCKERD: &str = "/usr/sbin/dockerd";
const USERS_CONFIG: &str = "/etc/docker/daemon.json";
const USERS_CONFIG_MAX: usize = 1024 * 1024;
const DATA_ROOT: &str = "/var/lib/docker";

pub(crate) fn prepare(root_dir: &RootDir, report: &mut Report) -> Outcome<()> {
    if !programs::is_executable(&root_dir.at(DOCKERD)) {
        return Err(Failure::for_good(format!(
            "there is no {DOCKERD} in this image; add Docker to it, or set ENABLE_DOCKER=0"
        )));
    }
    privileges(root_dir)?;
    let users = users_config(root_dir, report);
    stale::remove(root_dir, report);
    cgroups::prepare(root_dir, report);
    let mut config = users.clone();
    firewall(root_dir, &mut config, report)?;
    forwarding(root_dir, &mut config, report);
    let data_root = users.get("data-root").and_then(Value::as_str).unwrap_or(DATA_ROOT);
    storage(&root_dir.at(data_root), &mut config, report)?;
    if !users.is_empty() {
        let names: Vec<&str> = users.keys().map(String::as_str).collect();
        report.info(format!("dockerd keeps what {USERS_CONFIG} says ({})", names.join(", ")));
    }
    write_config(root_dir, &config)
}

/// Capabilities by number, with what dockerd does with them.
const NEEDED: [(u32, &str); 2] = [(12, "CAP_NET_ADMIN"), (21, "CAP_SYS_ADMIN")];

fn privileges(root_dir: &RootDir) -> Outcome<()> {
    let status = std::fs::read_to_string(root_dir.at("/proc/self/status")).unwrap_or_default();
    let effective = status
        .lines()
        .find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok())
        .unwrap_or(u64::MAX);
    let missing: Vec<&str> =
        NEEDED.iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| *name).collect();
    if !missing.is_empty() {
        let verb = if missing.len() == 1 { "is" } else { "are" };
        let names: Vec<&str> = missing.iter().map(|name| name.trim_start_matches("CAP_")).collect();
        return Err(not_allowed(
            &format!("{} {verb} missing", missing.join(" and ")),
            &format!("cap_add: [{}]", names.join(", ")),
        ));
    }
    may_contain(root_dir)
}

/// A process can have a capability and still be forbidden to use it, by a seccomp or `AppArmor` profile. So what
/// dockerd does for each container is tried, in a thread whose mount namespace ends with it.
fn may_contain(root_dir: &RootDir) -> Outcome<()> {
    let trial = Dir::ensure(&root_dir.at(paths::RUN).join("mount-trial"), 0o700, None)?;
    let tried = std::thread::scope(|scope| scope.spawn(|| namespace::change_root(trial.path())).join());
    let _ = std::fs::remove_dir(trial.path());
    match tried {
        Ok(Err((step, errno))) => Err(refused(step, errno)),
        _ => Ok(()),
    }
}

/// `AppArmor` says EACCES, where a right or seccomp says EPERM; and the rights have been looked at.
fn refused(step: ContainerStep, errno: Errno) -> Failure {
    let profile = if errno == Errno::EACCES { "apparmor" } else { "seccomp" };
    not_allowed(
        &format!("{step} is forbidden ({})", errno.desc()),
        &format!("security_opt: [{profile}=unconfined]"),
    )
}

fn not_allowed(what: &str, line: &str) -> Failure {
    Failure::for_good(format!(
        "dockerd cannot run in this container: {what}. Set `{line}` for it in docker-compose.yml, or set ENABLE_DOCKER=0"
    ))
}

/// The user's own configuration. One that is not understood is left to the user to repair: dockerd
/// would not start with it, so it starts without.
fn users_config(root_dir: &RootDir, report: &mut Report) -> Map<String, Value> {
    let bytes = match files::read_following(&root_dir.at(USERS_CONFIG), USERS_CONFIG_MAX) {
        Ok(None) => return Map::new(),
        Ok(Some(bytes)) => bytes,
        Err(error) => {
            report.warn(format!("{error}; dockerd starts without it"));
            return Map::new();
        }
    };
    if let Ok(Value::Object(config)) = serde_json::from_slice(&bytes) {
        return config;
    }
    report.warn(format!("{USERS_CONFIG} is not a JSON object; dockerd starts without it"));
    Map::new()
}

/// The iptables that works on this kernel comes first in dockerd's PATH.
fn firewall(root_dir: &RootDir, config: &mut Map<String, Value>, report: &mut Report) -> Outcome<()> {
    let bin = Dir::ensure(&root_dir.at(paths::DOCKERD_BIN), 0o755, None)?;
    if config.get("iptables") == Some(&Value::Bool(false)) {
        return Ok(());
    }
    let choice = iptables::choose(root_dir);
    iptables::link(&bin, &choice)?;
    if let Err(reasons) = &choice.v4 {
        report.warn(format!(
            "no iptables works on this kernel ({reasons}); dockerd runs without. Containers do not reach the outside \
             unless they use the host's network, and published ports go through docker's slower proxy"
        ));
        config.entry("iptables").or_insert(Value::Bool(false));
    }
    if choice.v6.is_err() {
        config.entry("ip6tables").or_insert(Value::Bool(false));
    }
    Ok(())
}

/// dockerd turns it on itself where it may write there, and does not start where it may not.
fn forwarding(root_dir: &RootDir, config: &mut Map<String, Value>, report: &mut Report) {
    let setting = root_dir.at("/proc/sys/net/ipv4/ip_forward");
    let is_off = std::fs::read_to_string(&setting).is_ok_and(|text| text.trim() == "0");
    // The mode of a file of /proc may allow writing while its file system is read-only.
    if !is_off || std::fs::OpenOptions::new().write(true).open(&setting).is_ok() {
        return;
    }
    report.warn(
        "net.ipv4.ip_forward is 0 and read-only here: dockerd's containers do not reach the outside. Set \
         `sysctls: [net.ipv4.ip_forward=1]` in docker-compose.yml",
    );
    config.entry("ip-forward").or_insert(Value::Bool(false));
}

/// A storage driver that works, unless the user chose. Naming one also keeps Docker 29 and later
/// from its other image store, so nothing needs to be said about that.
fn storage(data_root: &Path, config: &mut Map<String, Value>, report: &mut Report) -> Outcome<()> {
    let containerd_store =
        config.get("features").and_then(|f| f.get("containerd-snapshotter")) == Some(&Value::Bool(true));
    if config.contains_key("storage-driver") || containerd_store {
        return Ok(());
    }
    std::fs::create_dir_all(data_root).map_err(files::trouble("make", data_root))?;
    let choice = storage::choose(data_root)?;
    if let Some(why) = choice.remark {
        report.warn(why);
    }
    config.insert("storage-driver".into(), Value::from(choice.driver));
    Ok(())
}

fn write_config(root_dir: &RootDir, config: &Map<String, Value>) -> Outcome<()> {
    let path: PathBuf = root_dir.at(paths::DOCKERD_CONFIG);
    let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|n| n.to_str())) else {
        return Ok(());
    };
    // serde_json refuses only maps whose keys are no strings.
    let text = serde_json::to_vec_pretty(config).unwrap_or_default();
    // The user's file may hold the password of a proxy.
    Dir::ensure(dir, 0o700, None)?.write(name, &text, Kind::OF_THIS_BOOT)?;
    Ok(())
}

#[cfg(test)]
mod tests;
