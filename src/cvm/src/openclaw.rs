//! The gateway's command line, as the gateway's user and with the gateway's environment.
//!
//! Run as root it would write root's files into the gateway's state, which the gateway then
//! cannot read; without its environment it would look for another state and have no token.
//! So root asks the supervisor as whom and with what, becomes that user, and executes it.
//!
//! Refuses to stay root where the gateway is not, and to keep running: what follows is openclaw,
//! with its own exit status. May import: `socket`, `trouble`, `words`.

use crate::socket;
use crate::trouble::{Exit, Trouble, warn};
use crate::words;
use cvm_blueprint::accounts::Account;
use cvm_blueprint::env::variable;
use cvm_blueprint::paths;
use cvm_blueprint::wire::{Body, PackedEnvironment, Verb};
use nix::unistd::{Gid, Uid, geteuid, setgid, setgroups, setuid};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

/// What belongs to the caller's terminal and language, not to the gateway.
const OF_THE_CALLER: &[&str] = &["TERM", "LANG", "COLORTERM", "NO_COLOR", "SSH_TTY"];
const OF_THE_CALLER_PREFIX: &str = "LC_";
const WHAT: &str = "openclaw";

/// Whether this program was called by its other name.
pub(crate) fn is_meant_by(argv0: Option<&OsStr>) -> bool {
    argv0.and_then(|name| Path::new(name).file_name()).is_some_and(|name| name == "openclaw")
}

/// Does not return when it succeeds.
pub(crate) fn run(arguments: Vec<OsString>) -> Result<Exit, Trouble> {
    let (node, script) = (Path::new(paths::NODE), Path::new(paths::OPENCLAW));
    for part in [node, script] {
        if !part.exists() {
            let hint = "run it inside the VM: `ssh -p 1022 root@HOST openclaw ...`";
            let cause = format!("the gateway is not installed here: {} is not there", part.display());
            return Err(Trouble::new(Exit::Bad, WHAT, cause).hint(hint));
        }
    }
    let mut command = Command::new(node);
    command.arg(script).args(arguments);
    if geteuid().is_root() {
        let environment = become_gateway()?;
        command.env_clear().envs(environment);
    }
    // `exec` also gives SIGPIPE its default action back, which Rust's start-up took away.
    let error = command.exec();
    Err(Trouble::new(Exit::Bad, WHAT, format!("{}: {}", node.display(), words::of_io(&error))))
}

/// Changes to the gateway's user, and yields the environment to run with.
fn become_gateway() -> Result<Vec<(OsString, OsString)>, Trouble> {
    match socket::ask(WHAT, Verb::GatewayAccess) {
        Ok(Body::GatewayAccess { user, environment }) => {
            let account = account_of(&user)?;
            become_user(&user, &account)?;
            let given = unpacked(&environment)
                .ok_or_else(|| Trouble::new(Exit::Away, WHAT, "the supervisor's answer cannot be read"))?;
            Ok(combined(given, &account.home, std::env::vars_os()))
        }
        Ok(_) => Err(Trouble::new(Exit::Away, WHAT, "the supervisor's answer does not fit the question")),
        // A refusal has a reason; to go around it would be no help.
        Err(trouble) if trouble.exit == Exit::Refused => Err(trouble),
        Err(trouble) => without_supervisor(&trouble),
    }
}

/// `openclaw --version` must work whatever is broken. Still not as root, if that can be avoided:
/// the default account is the gateway's unless the owner has chosen another.
fn without_supervisor(trouble: &Trouble) -> Result<Vec<(OsString, OsString)>, Trouble> {
    warn(&format!(
        "{}; going on with your own environment: what needs the gateway or its token will not work",
        trouble.cause
    ));
    let mut environment: Vec<(OsString, OsString)> = std::env::vars_os().collect();
    let default = variable("OPENCLAW_GATEWAY_USER").and_then(|v| v.default);
    if let Some(user) = default
        && let Ok(account) = account_of(user)
    {
        become_user(user, &account)?;
        environment.retain(|(name, _)| name != "HOME");
        environment.push(("HOME".into(), account.home.into()));
    }
    Ok(environment)
}

fn account_of(user: &str) -> Result<Account, Trouble> {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .map_err(|e| Trouble::new(Exit::Bad, WHAT, format!("{path}: {}", words::of_io(&e))))
    };
    Account::find(&read("/etc/passwd")?, &read("/etc/group")?, user).ok_or_else(|| {
        let cause = format!("there is no user {user:?}");
        let hint = "the boot step `home` makes it: `cvm status` shows whether it was done";
        Trouble::new(Exit::Bad, WHAT, cause).hint(hint)
    })
}

/// Groups first: without root they cannot be changed any more.
fn become_user(user: &str, account: &Account) -> Result<(), Trouble> {
    if account.uid == 0 {
        return Ok(());
    }
    let at = |stage: &'static str| {
        move |errno: nix::errno::Errno| {
            let cause = format!("becoming {user}: {stage}: {}", errno.desc());
            let hint = "the container needs the capabilities SETGID and SETUID";
            Trouble::new(Exit::Bad, WHAT, cause).hint(hint)
        }
    };
    let groups: Vec<Gid> = account.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).map_err(at("its groups"))?;
    setgid(Gid::from_raw(account.gid)).map_err(at("its group"))?;
    setuid(Uid::from_raw(account.uid)).map_err(at("its user id"))?;
    enter_directory(&account.home);
    Ok(())
}

/// The caller's directory if the new user may be in it, else its home.
fn enter_directory(home: &str) {
    // Entered anew by its path: being in it already says nothing about the new user.
    let stays = std::env::current_dir().and_then(std::env::set_current_dir).is_ok();
    if !stays && std::env::set_current_dir(home).is_err() {
        // Nothing is left that could be wrong with the root directory.
        let _ = std::env::set_current_dir("/");
    }
}

fn unpacked(environment: &PackedEnvironment) -> Option<Vec<(OsString, OsString)>> {
    let pair = |entry: &[u8]| {
        let at = entry.iter().position(|b| *b == b'=')?;
        let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        Some((text(&entry[..at]), text(&entry[at + 1..])))
    };
    Some(environment.unpack()?.iter().filter_map(|entry| pair(entry)).collect())
}

/// The gateway's environment, with what is the caller's in it.
fn combined(
    gateway: Vec<(OsString, OsString)>,
    home: &str,
    caller: impl Iterator<Item = (OsString, OsString)>,
) -> Vec<(OsString, OsString)> {
    let is_callers = |name: &OsStr| {
        OF_THE_CALLER.iter().any(|own| name == *own)
            || name.as_bytes().starts_with(OF_THE_CALLER_PREFIX.as_bytes())
    };
    let theirs: Vec<_> = caller.filter(|(name, _)| is_callers(name)).collect();
    let replaced = |name: &OsStr| name == "HOME" || theirs.iter().any(|(own, _)| own == name);
    let mut all: Vec<_> = gateway.into_iter().filter(|(name, _)| !replaced(name)).collect();
    all.push(("HOME".into(), home.into()));
    all.extend(theirs);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_it_is_called_by_decides() {
        let meant = |name: &str| is_meant_by(Some(OsStr::new(name)));
        assert!(meant("openclaw") && meant("/usr/local/bin/openclaw"));
        assert!(!meant("cvm") && !meant("/opt/openclaw/cvm") && !meant("") && !is_meant_by(None));
    }

    #[test]
    fn the_environment_is_the_gateways_with_the_terminal_of_the_caller() {
        let pairs = |pairs: &[(&str, &str)]| -> Vec<(OsString, OsString)> {
            pairs.iter().map(|(n, v)| (n.into(), v.into())).collect()
        };
        let gateway = pairs(&[("PATH", "/bin"), ("HOME", "/wrong"), ("LANG", "C.UTF-8"), ("TOKEN", "t")]);
        let caller = pairs(&[
            ("TERM", "xterm"),
            ("LANG", "de_DE.UTF-8"),
            ("LC_TIME", "C"),
            ("PATH", "/root/bin"),
            ("MASTER_KEY", "no"),
            ("LD_PRELOAD", "no"),
        ]);
        let mut all = combined(gateway, "/home/openclaw", caller.into_iter());
        all.sort();
        let expected = pairs(&[
            ("HOME", "/home/openclaw"),
            ("LANG", "de_DE.UTF-8"),
            ("LC_TIME", "C"),
            ("PATH", "/bin"),
            ("TERM", "xterm"),
            ("TOKEN", "t"),
        ]);
        assert_eq!(all, expected);
    }

    #[test]
    fn an_environment_of_any_bytes_is_unpacked() {
        let given: [(&[u8], &[u8]); 2] = [(b"A", b"\xff=\n"), (b"B", b"")];
        let packed = PackedEnvironment::pack(&given);
        let pairs = unpacked(&packed).unwrap();
        assert_eq!(pairs[0].1.as_bytes(), b"\xff=\n");
        assert_eq!(pairs[1], ("B".into(), "".into()));
    }
}
