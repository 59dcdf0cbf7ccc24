//! `cvm openclaw`: the gateway's command line, as the gateway's user and with the gateway's environment.
//!
//! As root it would write root's files into the gateway's state, which the gateway then cannot read;
//! without the gateway's environment it would look for another state and have no token. And the agent
//! decides what it does: through its settings, plugins and databases.
//!
//! So root asks the supervisor for the user and the environment, and runs it as an agent's program: see
//! `agent_program`. Of the caller's environment only the terminal and the language go along.

mod agent_program;

use crate::control_socket;
use crate::failure::{Exit, Failure, warn};
use crate::gateway_access::GatewayAccess;
use crate::text;
use agent_program::AgentProgram;
use cvm_protocol::accounts::{Account, GATEWAY_ID};
use cvm_protocol::paths;
use cvm_sys::as_user::AsUser;
use cvm_sys::spawn::Identity;
use cvm_system::env::variable;
use nix::unistd::geteuid;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use zeroize::Zeroizing;

/// Variables of the caller's terminal and language, which replace the gateway's.
const CALLERS: &[&str] = &["TERM", "LANG", "COLORTERM", "NO_COLOR", "SSH_TTY"];
const CALLERS_PREFIX: &str = "LC_";
const WHAT: &str = "openclaw";

/// Whether this program was called by its other name, `openclaw`.
pub(crate) fn is_meant_by(argv0: Option<&OsStr>) -> bool {
    argv0.and_then(|name| Path::new(name).file_name()).is_some_and(|name| name == "openclaw")
}

/// As root it returns the exit status of openclaw; as anybody else it becomes openclaw.
pub(crate) fn run(arguments: Vec<OsString>) -> Result<Exit, Failure> {
    let (node, script) = (Path::new(paths::NODE), Path::new(paths::OPENCLAW));
    for part in [node, script] {
        if !part.exists() {
            let hint = "run it inside the VM: `ssh -p 1022 root@HOST openclaw ...`";
            let cause = format!("the gateway is not installed here: {} is not there", part.display());
            return Err(Failure::new(Exit::Bad, WHAT, cause).hint(hint));
        }
    }
    let failed = |error: std::io::Error| {
        Failure::new(Exit::Bad, WHAT, format!("{}: {}", node.display(), text::io_error(&error)))
    };
    if geteuid().is_root() {
        let argv = [node.into(), script.into()].into_iter().chain(arguments);
        return agent_program::run(&program(argv)?).map(Exit::Program).map_err(failed);
    }
    // The agent runs its own program, with its own terminal and environment. `exec` also gives SIGPIPE
    // its default action back, which Rust's start-up took away.
    Err(failed(Command::new(node).arg(script).args(arguments).exec()))
}

fn program(argv: impl Iterator<Item = OsString>) -> Result<AgentProgram, Failure> {
    let (account, given) = account_and_environment()?;
    let environment = combined(given, &account.home, std::env::vars_os());
    let pairs =
        environment.into_iter().map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
    let words = |bytes: Vec<u8>| {
        CString::new(bytes).map_err(|_| Failure::new(Exit::Usage, WHAT, "an argument holds a zero byte"))
    };
    let identity = Identity { uid: account.uid, gid: account.gid, groups: account.groups };
    Ok(AgentProgram {
        argv: argv.map(|word| words(word.into_vec())).collect::<Result<_, _>>()?,
        environment: pairs.map(|pair| words(pair).map(Zeroizing::new)).collect::<Result<_, _>>()?,
        directory: words(directory(&identity, account.home).into_os_string().into_vec())?,
        identity,
    })
}

type Pairs = Vec<(OsString, OsString)>;

/// The account and the environment with which the gateway runs.
fn account_and_environment() -> Result<(Account, Pairs), Failure> {
    let access = match GatewayAccess::ask(WHAT, control_socket::PATIENCE) {
        Ok(access) => access,
        // A refusal has a reason, which going on would hide.
        Err(failure) if failure.exit == Exit::Refused => return Err(failure),
        Err(failure) => return without_supervisor(&failure),
    };
    let account = account_of(&access.user)?.filter(|account| account.uid != 0);
    let account = account.ok_or_else(|| {
        let cause = format!("there is no user {:?} that is not root", access.user);
        let hint = "the boot step `home` makes it: `cvm status` shows whether it was done";
        Failure::new(Exit::Bad, WHAT, cause).hint(hint)
    })?;
    let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let given = access.variables().map(|(name, value)| (text(name), text(value))).collect();
    Ok((account, given))
}

/// `openclaw --version` must work whatever is broken: as the default account, which is the gateway's unless the
/// owner has chosen another, or under its number where the account is missing.
fn without_supervisor(failure: &Failure) -> Result<(Account, Pairs), Failure> {
    warn(&format!(
        "{}; going on without it: commands that need the gateway or its token will not work",
        failure.cause
    ));
    let user = variable("OPENCLAW_GATEWAY_USER").and_then(|v| v.default).unwrap_or_default();
    let account = account_of(user)?.filter(|account| account.uid != 0).unwrap_or_else(|| Account {
        uid: GATEWAY_ID,
        gid: GATEWAY_ID,
        groups: Vec::new(),
        home: "/".to_owned(),
    });
    let plain = [("PATH", paths::PATH), ("USER", user), ("LOGNAME", user), ("LANG", "C.UTF-8")];
    Ok((account, plain.map(|(name, value)| (name.into(), value.into())).into()))
}

fn account_of(user: &str) -> Result<Option<Account>, Failure> {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .map_err(|e| Failure::new(Exit::Bad, WHAT, format!("{path}: {}", text::io_error(&e))))
    };
    Ok(Account::find(&read("/etc/passwd")?, &read("/etc/group")?, user))
}

/// The caller's directory if that user may be in it, else its home, else the root directory.
fn directory(user: &Identity, home: String) -> PathBuf {
    let Ok(_acting) = AsUser::of(user.uid.into(), user.gid.into()) else { return home.into() };
    // Entered anew by its path, because a process may stand in a directory that its new user cannot enter.
    let caller = std::env::current_dir().ok().filter(|caller| std::env::set_current_dir(caller).is_ok());
    caller.unwrap_or_else(|| if Path::new(&home).is_dir() { home.into() } else { "/".into() })
}

/// The gateway's environment, with the caller's terminal and language in it.
fn combined(gateway: Pairs, home: &str, caller: impl Iterator<Item = (OsString, OsString)>) -> Pairs {
    let is_callers = |name: &OsStr| {
        CALLERS.iter().any(|own| name == *own) || name.as_bytes().starts_with(CALLERS_PREFIX.as_bytes())
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
        let pairs =
            |pairs: &[(&str, &str)]| -> Pairs { pairs.iter().map(|(n, v)| (n.into(), v.into())).collect() };
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
}
