//! Room docker: can dockerd start containers, does it answer, and with which driver does it store layers?
//! Nothing waits for dockerd, so a fault is a warning.

use super::finding::{Checks, Outcome, ok, skip, warn};
use super::{overlay, proc_files, sources};
use crate::http;
use cvm_protocol::paths::DOCKER_SOCKET;
use cvm_protocol::status::Service;
use cvm_sys::namespace::{self, ContainerStep};
use nix::errno::Errno;
use std::path::Path;
use std::time::Duration;

const TIME: Duration = Duration::from_secs(4);
/// A directory of every image, covered in a mount namespace of its own.
const COVERED: &str = "/mnt";
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

pub(crate) fn check(checks: &mut Checks<'_>) {
    checks.begin("dockerd");
    let status = sources::status();
    let service = sources::service(status.as_ref(), "dockerd");
    if status.is_some() && service.is_none() {
        return checks.add("dockerd", skip("ENABLE_DOCKER is 0"));
    }
    checks.run("rights of its containers", || contains(tried()));
    checks.run("forwarding", || forwards(proc_files::read(FORWARDING).as_deref()));
    checks.begin("dockerd");
    let answer = http::get_unix(DOCKER_SOCKET, "/_ping", TIME);
    let up = matches!(&answer, Ok(answer) if answer.code == 200);
    checks.add("dockerd", if up { ok(format!("{DOCKER_SOCKET} answers")) } else { down(answer, service) });
    if up {
        checks.run("storage driver", || match http::get_unix(DOCKER_SOCKET, "/info", TIME) {
            Ok(answer) => driver(&answer.body),
            Err(why) => warn(format!("dockerd does not answer /info: {why}"), "`cvm logs dockerd`"),
        });
    }
}

/// Tries the steps that each container needs, in a thread whose mount namespace ends with it.
fn tried() -> Result<(), (ContainerStep, Errno)> {
    std::thread::spawn(|| namespace::change_root(Path::new(COVERED))).join().unwrap_or(Ok(()))
}

fn contains(tried: Result<(), (ContainerStep, Errno)>) -> Outcome {
    let Err((step, errno)) = tried else { return ok("mounts and pivot_root are allowed") };
    let remedy = match (step, errno) {
        (ContainerStep::PivotRoot, Errno::EPERM | Errno::ENOSYS) => {
            "in docker-compose.yml: security_opt: [seccomp=unconfined]"
        }
        _ => overlay::compose(errno),
    };
    warn(format!("{step} is forbidden ({}): dockerd starts no container", errno.desc()), remedy)
}

fn forwards(setting: Option<&str>) -> Outcome {
    if setting.is_none_or(|text| text.trim() == "0") {
        let found = "net.ipv4.ip_forward is not 1: dockerd's containers do not reach the outside";
        return warn(found, "in docker-compose.yml: sysctls: [net.ipv4.ip_forward=1]");
    }
    ok("net.ipv4.ip_forward is 1")
}

fn down(answer: Result<http::Answer, String>, service: Option<&Service>) -> Outcome {
    let found = match answer {
        Ok(answer) => format!("{DOCKER_SOCKET} answers {}", answer.code),
        Err(why) => format!("{DOCKER_SOCKET}: {why}"),
    };
    let Some(service) = service else { return warn(found, "`cvm status`, once the supervisor answers") };
    let why =
        service.why.as_ref().or(service.last_end.as_ref()).map(|w| format!(", {w}")).unwrap_or_default();
    let remedy = format!("`cvm logs dockerd` shows its last lines; next: {}", service.shown_action());
    warn(format!("{found}; dockerd is {}{why}", service.state), remedy)
}

fn driver(info: &[u8]) -> Outcome {
    let info: serde_json::Value = serde_json::from_slice(info).unwrap_or_default();
    match info["Driver"].as_str() {
        Some("vfs") => warn(
            "vfs: every layer is a whole copy of the one below",
            "give dockerd a volume: in docker-compose.yml: volumes: [docker:/var/lib/docker]; see overlay",
        ),
        Some(driver) => ok(driver),
        None => warn("dockerd does not name its driver", "`docker info`"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::finding::Verdict;
    use super::*;
    use crate::status::samples::service;
    use cvm_protocol::status::ServiceState;

    #[test]
    fn vfs_is_a_warning() {
        assert_eq!(driver(br#"{"Driver":"overlay2"}"#).verdict, Verdict::Ok);
        assert_eq!(driver(br#"{"Driver":"vfs"}"#).verdict, Verdict::Warn);
        assert_eq!(driver(b"garbage").verdict, Verdict::Warn);
    }

    #[test]
    fn a_right_that_containers_lack_comes_with_its_line_for_compose() {
        let line = |tried| contains(tried).remedy.unwrap();
        assert_eq!(contains(Ok(())).verdict, Verdict::Ok);
        assert!(
            line(Err((ContainerStep::PivotRoot, Errno::EPERM)))
                .ends_with("security_opt: [seccomp=unconfined]")
        );
        assert!(line(Err((ContainerStep::Mount, Errno::EACCES))).contains("apparmor=unconfined"));
        assert!(line(Err((ContainerStep::MountNamespace, Errno::EPERM))).contains("cap_add: [SYS_ADMIN]"));
        assert_eq!(forwards(Some("1\n")).verdict, Verdict::Ok);
        assert!(forwards(Some("0\n")).remedy.unwrap().contains("sysctls: [net.ipv4.ip_forward=1]"));
    }

    #[test]
    fn a_silent_dockerd_is_explained_by_the_supervisor() {
        let dockerd = Service {
            last_end: Some("exited with code 1".into()),
            ..service("dockerd", ServiceState::Waiting)
        };
        let outcome = down(Err("nobody listens there".into()), Some(&dockerd));
        assert_eq!(outcome.verdict, Verdict::Warn);
        assert!(outcome.found.ends_with("dockerd is waiting, exited with code 1"), "{}", outcome.found);
    }
}
