//! The gateway's command line, as the gateway's user and with the gateway's environment.
//!
//! Run as root it would write root's files into the gateway's state, which the gateway then
//! cannot read; without its environment it would look for another state and have no token. And the
//! agent decides what it does: through its settings, plugins and databases.
//!
//! So root asks the supervisor as whom and with what, and runs it as a guest: see `guest`.
//!
//! Refuses to run it as root, and to hand on more of the caller's environment than the terminal and
//! the language. May import: `socket`, `trouble`, `words`, `guest`.

mod guest;

use crate::socket;
use crate::trouble::{Exit, Trouble, warn};
use crate::words;
use cvm_protocol::accounts::{Account, GATEWAY_ID};
use cvm_protocol::control::{Body, Verb};
use cvm_protocol::paths;
use cvm_secrets::base64_bytes::PackedEnvironment;
use cvm_sys::as_user::AsUser;
use cvm_sys::spawn::Identity;
use cvm_system::env::variable;
use guest::Guest;
use nix::unistd::geteuid;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use zeroize::Zeroizing;

/// What belongs to the caller's terminal and language, not to the gateway.
const OF_THE_CALLER: &[&str] = &["TERM", "LANG", "COLORTERM", "NO_COLOR", "SSH_TTY"];
const OF_THE_CALLER_PREFIX: &str = "LC_";
const WHAT: &str = "openclaw";

/// Whether this program was called by its other name.
pub(crate) fn is_meant_by(argv0: Option<&OsStr>) -> bool {
    argv0.and_then(|name| Path::new(name).file_name()).is_some_and(|name| name == "openclaw")
}

/// As root it yields the exit status of openclaw; as anybody else it becomes openclaw.
pub(crate) fn run(arguments: Vec<OsString>) -> Result<Exit, Trouble> {
    let (node, script) = (Path::new(paths::NODE), Path::new(paths::OPENCLAW));
    for part in [node, script] {
        if !part.exists() {
            let hint = "run it inside the VM: `ssh -p 1022 root@HOST openclaw ...`";
            let cause = format!("the gateway is not installed here: {} is not there", part.display());
            return Err(Trouble::new(Exit::Bad, WHAT, cause).hint(hint));
        }
    }
    let failed = |error: std::io::Error| {
        Trouble::new(Exit::Bad, WHAT, format!("{}: {}", node.display(), words::of_io(&error)))
    };
    if geteuid().is_root() {
        let argv = [node.into(), script.into()].into_iter().chain(arguments);
        return guest::run(&guest(argv)?).map(Exit::Of).map_err(failed);
    }
    // What the agent runs itself is its own, with its own terminal and environment. `exec` also gives SIGPIPE
    // its default action back, which Rust's start-up took away.
    Err(failed(Command::new(node).arg(script).args(arguments).exec()))
}

fn guest(argv: impl Iterator<Item = OsString>) -> Result<Guest, Trouble> {
    let (account, given) = account_and_environment()?;
    let environment = combined(given, &account.home, std::env::vars_os());
    let pairs =
        environment.into_iter().map(|(name, value)| [name.as_bytes(), b"=", value.as_bytes()].concat());
    let words = |bytes: Vec<u8>| {
        CString::new(bytes).map_err(|_| Trouble::new(Exit::Usage, WHAT, "an argument holds a zero byte"))
    };
    let identity = Identity { uid: account.uid, gid: account.gid, groups: account.groups };
    Ok(Guest {
        argv: argv.map(|word| words(word.into_vec())).collect::<Result<_, _>>()?,
        environment: pairs.map(|pair| words(pair).map(Zeroizing::new)).collect::<Result<_, _>>()?,
        directory: words(directory(&identity, account.home).into_os_string().into_vec())?,
        identity,
    })
}

type Pairs = Vec<(OsString, OsString)>;

/// As whom the gateway runs, and with what.
fn account_and_environment() -> Result<(Account, Pairs), Trouble> {
    match socket::ask(WHAT, Verb::GatewayAccess) {
        Ok(Body::GatewayAccess { user, environment }) => {
            let given = unpacked(&environment)
                .ok_or_else(|| Trouble::new(Exit::Away, WHAT, "the supervisor's answer cannot be read"))?;
            let account = account_of(&user)?.filter(|account| account.uid != 0);
            let account = account.ok_or_else(|| {
                let cause = format!("there is no user {user:?} that is not root");
                let hint = "the boot step `home` makes it: `cvm status` shows whether it was done";
                Trouble::new(Exit::Bad, WHAT, cause).hint(hint)
            })?;
            Ok((account, given))
        }
        Ok(_) => Err(Trouble::new(Exit::Away, WHAT, "the supervisor's answer does not fit the question")),
        // A refusal has a reason; to go around it would be no help.
        Err(trouble) if trouble.exit == Exit::Refused => Err(trouble),
        Err(trouble) => without_supervisor(&trouble),
    }
}

/// `openclaw --version` must work whatever is broken: as the default account, which is the gateway's unless the
/// owner has chosen another, or under its number where the account is missing.
fn without_supervisor(trouble: &Trouble) -> Result<(Account, Pairs), Trouble> {
    warn(&format!(
        "{}; going on without it: what needs the gateway or its token will not work",
        trouble.cause
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

fn account_of(user: &str) -> Result<Option<Account>, Trouble> {
    let read = |path: &str| {
        std::fs::read_to_string(path)
            .map_err(|e| Trouble::new(Exit::Bad, WHAT, format!("{path}: {}", words::of_io(&e))))
    };
    Ok(Account::find(&read("/etc/passwd")?, &read("/etc/group")?, user))
}

/// The caller's directory if that user may be in it, else its home, else the root directory.
fn directory(user: &Identity, home: String) -> PathBuf {
    let Ok(_acting) = AsUser::of(user.uid.into(), user.gid.into()) else { return home.into() };
    // Entered anew by its path: being in it already says nothing about another user.
    let caller = std::env::current_dir().ok().filter(|caller| std::env::set_current_dir(caller).is_ok());
    caller.unwrap_or_else(|| if Path::new(&home).is_dir() { home.into() } else { "/".into() })
}

fn unpacked(environment: &PackedEnvironment) -> Option<Pairs> {
    let pair = |entry: &[u8]| {
        let at = entry.iter().position(|b| *b == b'=')?;
        let text = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
        Some((text(&entry[..at]), text(&entry[at + 1..])))
    };
    Some(environment.unpack()?.iter().filter_map(|entry| pair(entry)).collect())
}

/// The gateway's environment, with what is the caller's in it.
fn combined(gateway: Pairs, home: &str, caller: impl Iterator<Item = (OsString, OsString)>) -> Pairs {
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

    #[test]
    fn an_environment_of_any_bytes_is_unpacked() {
        let given: [(&[u8], &[u8]); 2] = [(b"A", b"\xff=\n"), (b"B", b"")];
        let packed = PackedEnvironment::pack(&given);
        let pairs = unpacked(&packed).unwrap();
        assert_eq!(pairs[0].1.as_bytes(), b"\xff=\n");
        assert_eq!(pairs[1], ("B".into(), "".into()));
    }
}
