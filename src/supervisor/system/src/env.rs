//! The environment of the container, and the table of all variables that the product knows.
//!
//! Documentation, boot log and the variables for the gateway are made from the table, [`VARIABLES`]. All values are
//! wiped when they are dropped, because any variable may hold a secret of the user.
//!
//! `config` judges the values, and the caller reads the files. No message tells anything about a value, not even its
//! length.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fmt;
use std::os::unix::ffi::OsStringExt as _;
use std::path::PathBuf;

use zeroize::Zeroize;

use cvm_protocol::text::shown;
use cvm_secrets::secret::Secret;

/// The process that receives a variable. No other process gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// PID 1 alone: it derives something from the value, or acts on it.
    Supervisor,
    /// The gateway, unchanged, besides PID 1.
    Gateway,
    /// The storage worker, over its pipe.
    Storage,
    /// The mux client.
    Mux,
}

/// One row of the table of variables.
#[derive(Clone, Copy, Debug)]
pub struct Variable {
    pub name: &'static str,
    /// A secret may also come as `NAME_FILE`, and its value is never printed.
    pub secret: bool,
    /// The value that an unset variable has; with `None` it has none.
    pub default: Option<&'static str>,
    pub audience: Audience,
    /// One line for the documentation.
    pub meaning: &'static str,
}

const fn plain(
    name: &'static str,
    default: Option<&'static str>,
    audience: Audience,
    meaning: &'static str,
) -> Variable {
    Variable { name, secret: false, default, audience, meaning }
}

const fn secret(name: &'static str, audience: Audience, meaning: &'static str) -> Variable {
    Variable { name, secret: true, default: None, audience, meaning }
}

use Audience::{Gateway, Mux, Storage, Supervisor};

/// Every variable of the product, in the order of the documentation.
pub const VARIABLES: &[Variable] = &[
    secret("MASTER_KEY", Supervisor, "the one secret; everything else is derived from it"),
    plain(
        "ALLOW_WEAK_MASTER_KEY",
        Some("0"),
        Supervisor,
        "1 accepts a MASTER_KEY that can be guessed, such as a phrase",
    ),
    plain("CVM_OWNER", None, Supervisor, "who may write this environment; literally in the compose file"),
    plain("CVM_OWNER_EPOCH", Some("0"), Supervisor, "raise it to make all older environments void"),
    secret("CVM_OWNER_TOKEN", Supervisor, "proves the owner in place of MASTER_KEY"),
    plain("S3_BUCKET", None, Storage, "the bucket; its presence turns S3 mode on"),
    plain("S3_ENDPOINT", None, Storage, "URL of the S3 service; needed unless S3_PROVIDER is AWS"),
    plain("S3_REGION", Some("us-east-1"), Storage, "region of the bucket"),
    plain("S3_PROVIDER", Some("Other"), Storage, "S3 provider as rclone names it"),
    plain("S3_PREFIX", Some("openclaw-data"), Storage, "folder of the bucket that holds the state"),
    secret("AWS_ACCESS_KEY_ID", Storage, "access key of the bucket"),
    secret("AWS_SECRET_ACCESS_KEY", Storage, "secret key of the bucket"),
    secret("AWS_SESSION_TOKEN", Storage, "session token, with temporary credentials"),
    secret("RCLONE_CRYPT_PASSWORD", Storage, "replaces the derived crypt password; rclone-obscured"),
    secret("RCLONE_CRYPT_PASSWORD2", Storage, "replaces the derived crypt salt; rclone-obscured"),
    plain("STATE_ANCHOR", None, Storage, "GENERATION:DIGEST:STATE; a bucket older than this is refused"),
    plain(
        "S3_ADOPT",
        Some("0"),
        Storage,
        "1 takes over a bucket without a manifest, or with one of an older version, unchecked",
    ),
    // Long enough to cost almost nothing, and short enough that a replacement starts soon.
    plain(
        "S3_HEARTBEAT",
        Some("60"),
        Storage,
        "seconds between two renewals of the ownership record; after three, another instance may take over",
    ),
    plain(
        "S3_DRAIN_TIMEOUT",
        Some("20"),
        Storage,
        "how long a stop may spend on pushing what the bucket lacks, in seconds",
    ),
    plain(
        "S3_DRILL_INTERVAL",
        Some("86400"),
        Storage,
        "seconds between two restore drills; 0 is never by itself",
    ),
    secret("OPENCLAW_CONFIG_B64", Supervisor, "base64 of an openclaw.json, written on first boot only"),
    secret(
        "OPENCLAW_WORKSPACE_FILES_B64",
        Supervisor,
        "base64 of a JSON object path -> text, written into the workspace on first boot only",
    ),
    // Passed to the gateway, because its own command line tools read this variable.
    plain("OPENCLAW_GATEWAY_PORT", Some("18789"), Gateway, "port of the gateway"),
    plain(
        "OPENCLAW_GATEWAY_USER",
        Some("openclaw"),
        Supervisor,
        "user the gateway runs as; never root or a system's own",
    ),
    plain("OPENCLAW_GATEWAY_RESTART_DELAY", Some("5"), Supervisor, "first wait before a restart, in seconds"),
    plain(
        "OPENCLAW_GATEWAY_RESTART_MAX_DELAY",
        Some("60"),
        Supervisor,
        "longest wait before a restart, in seconds",
    ),
    plain(
        "OPENCLAW_GATEWAY_RESTART_RESET_AFTER",
        Some("600"),
        Supervisor,
        "how long a run must last for the wait to fall back to the first, in seconds",
    ),
    // The gateway is ready after about 10 s on two idle cores. With hundreds of agents or a migration it works for
    // many minutes first.
    plain(
        "OPENCLAW_GATEWAY_START_TIMEOUT",
        Some("300"),
        Supervisor,
        "how long a starting gateway may show no sign of work, in seconds",
    ),
    // Long enough for a synchronous SQLite migration or a host that stalls, and short enough that a dead gateway is
    // restarted before a user misses it.
    plain(
        "OPENCLAW_GATEWAY_LIVENESS_TIMEOUT",
        Some("120"),
        Supervisor,
        "how long a running gateway may leave /healthz unanswered before it is restarted, in seconds",
    ),
    // The gateway itself would drain for up to 315 s, but dstack gives a whole machine 90 s. Interrupted work goes on
    // at the gateway's next start.
    plain(
        "OPENCLAW_GATEWAY_STOP_TIMEOUT",
        Some("30"),
        Supervisor,
        "how long the gateway may drain on stop before it is killed, in seconds",
    ),
    secret("REDPILL_API_KEY", Gateway, "model provider key for https://api.redpill.ai/v1"),
    plain(
        "MUX_BASE_URL",
        None,
        Mux,
        "URL of the mux-server; with MUX_REGISTER_KEY it turns the mux client on",
    ),
    secret("MUX_REGISTER_KEY", Mux, "key with which the mux client registers"),
    plain("MUX_INBOUND_URL", None, Mux, "public URL of the mux client, ending in /v1/mux/inbound"),
    // Below the 15 s after which the mux-server gives up a delivery.
    plain(
        "MUX_ACK_REPLICATION_WAIT",
        Some("10"),
        Mux,
        "with a bucket: seconds an acknowledgement waits for the bucket at most; 0 is not at all",
    ),
    plain("DSTACK_APP_ID", None, Gateway, "set by dstack; part of the default MUX_INBOUND_URL"),
    plain(
        "MUX_GATEWAY_DOMAIN",
        None,
        Supervisor,
        "domain of dstack's gateway; part of the default MUX_INBOUND_URL",
    ),
    plain("ALLOW_HTTP", Some("0"), Supervisor, "1 accepts http:// URLs that leave this machine"),
    plain("SSH_AUTHORIZED_KEYS", None, Supervisor, "public keys that may log in, one a line"),
    plain(
        SSH_TRUST_HOST_KEYS,
        Some("0"),
        Supervisor,
        "1 also lets the keys in that are mounted at /root/.ssh: the host's",
    ),
    plain("SSH_PORT", Some("22"), Supervisor, "port of sshd inside the container"),
    // The agent is in dockerd's group, and a rootful dockerd makes it root.
    plain("ENABLE_DOCKER", Some("0"), Supervisor, "1 runs dockerd, which makes the agent root here"),
    plain("LOG_FORMAT", Some("text"), Supervisor, "text, or json for one object a line"),
    plain("LOG_LEVEL", Some("info"), Supervisor, "error, warn, info, debug or trace"),
    plain("LOG_SERVICES", Some("0"), Supervisor, "1 also copies the services' output to stdout"),
];

/// A variable that may be set only in the compose file itself, because a value from the environment could be forged.
pub const SSH_TRUST_HOST_KEYS: &str = "SSH_TRUST_HOST_KEYS";

/// Variables that the supervisor itself sets for the gateway. A value from outside is not passed on.
pub const SET_BY_SUPERVISOR: &[&str] = &[
    "OPENCLAW_GATEWAY_TOKEN",
    "OPENCLAW_NO_RESPAWN",
    "OPENCLAW_SERVICE_REPAIR_POLICY",
    "OPENCLAW_SUPERVISOR_MODE",
    "OPENCLAW_DISABLE_BONJOUR",
    "OPENCLAW_STATE_DIR",
    "OPENCLAW_CONFIG_PATH",
];

/// Variables that are never passed on, because they describe the process that received them.
pub const NEVER_PASSED: &[&str] =
    &["PATH", "HOME", "USER", "LOGNAME", "SHELL", "PWD", "OLDPWD", "HOSTNAME", "TERM", "_"];

/// Variables that only the operator's `cvm pair` reads. No service gets them.
pub const OPERATORS: &[&str] = &["MUX_ADMIN_TOKEN", "MUX_ADMIN_TOKEN_FILE"];

const FILE_SUFFIX: &str = "_FILE";

/// A name longer than this counts as misspelt if it differs from a name of the table in at most two letters. In a
/// shorter one, two letters make another word.
const SHORT_NAME_LEN_MAX: usize = 8;

/// The most names of foreign variables that the boot log lists.
const NAMES_SHOWN_MAX: usize = 64;

/// A mistake that stops the boot: the variable, the rule that it breaks, and what to do.
///
/// `rule` and `hint` may be public: they hold no value of a secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub variable: String,
    pub rule: String,
    pub hint: String,
}

impl Problem {
    pub fn new(variable: &str, rule: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { variable: variable.to_owned(), rule: rule.into(), hint: hint.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} ({})", self.variable, self.rule, self.hint)
    }
}

/// A setting that the user may not have meant. The boot goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// The variable, escaped and shortened.
    pub variable: String,
    /// The rest of the sentence that begins with the variable.
    pub says: String,
}

impl Warning {
    pub fn new(variable: &str, says: impl Into<String>) -> Self {
        Self { variable: shown(variable), says: says.into() }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.variable, self.says)
    }
}

/// How one variable of the table was given.
#[derive(Clone, Copy)]
pub enum Given<'e> {
    /// Unset, or empty.
    Not,
    /// Set.
    As(&'e Secret),
    /// Set, but unusable. That is among the problems already, and must not be treated as unset.
    Unusable,
}

/// The environment of the container, read once.
pub struct Environment {
    values: BTreeMap<Vec<u8>, Secret>,
    /// Secrets whose `NAME_FILE` the caller has yet to read.
    awaited: BTreeSet<&'static str>,
    /// Secrets that were given in an unusable way.
    unusable: BTreeSet<&'static str>,
    problems: Vec<Problem>,
    warnings: Vec<Warning>,
}

impl Environment {
    /// Makes an environment from raw pairs. An empty value means unset (compose passes `${VAR:-}`), also for foreign
    /// variables. If a name occurs twice the last value is used, as by `docker run -e`, with a warning.
    pub fn new(pairs: impl IntoIterator<Item = (Vec<u8>, Vec<u8>)>) -> Self {
        let mut values = BTreeMap::new();
        let mut warnings = Vec::new();
        for (name, value) in pairs {
            let value = Secret::from(value);
            // Such names can neither be set by a shell nor passed by `execve`.
            if name.is_empty() || name.contains(&b'=') || name.contains(&0) {
                continue;
            }
            let text = String::from_utf8_lossy(&name).into_owned();
            if values.insert(name, value).is_some() {
                warnings.push(Warning::new(&text, "is set more than once; the last value counts"));
            }
        }
        values.retain(|_, value: &mut Secret| !value.is_empty());
        let mut environment = Self {
            values,
            awaited: BTreeSet::new(),
            unusable: BTreeSet::new(),
            problems: Vec::new(),
            warnings,
        };
        environment.find_files();
        environment.find_slips();
        environment
    }

    /// The secrets that were given as a path: the caller reads each file and hands the result
    /// to [`Self::with_file`].
    pub fn wanted_files(&self) -> Vec<(&'static str, PathBuf)> {
        let path = |name: &str| self.values.get(file_twin(name).as_bytes());
        self.awaited
            .iter()
            .filter_map(|name| {
                Some((*name, PathBuf::from(OsString::from_vec(path(name)?.expose().to_vec()))))
            })
            .collect()
    }

    /// Takes the content of the file of secret `name`, or the operating system's reason why there is none. A name
    /// that was not wanted is ignored.
    ///
    /// All line breaks at the end are cut off, as by `$(cat FILE)`, because editors and `echo` add one, and the same
    /// key has to result however it was written.
    ///
    /// No message shows the path: a user may have put the secret itself there.
    pub fn with_file(&mut self, name: &str, content: Result<Vec<u8>, String>) {
        let Some(name) = self.awaited.take(name) else { return };
        let twin = file_twin(name);
        let mut content = match content {
            Ok(content) => content,
            Err(cause) => {
                let rule = format!("cannot be read: {}", shown(&cause));
                return self.refuse(
                    name,
                    &twin,
                    rule,
                    "give the path of a readable file, not the value itself",
                );
            }
        };
        let kept = content.iter().rposition(|byte| !matches!(byte, b'\n' | b'\r')).map_or(0, |last| last + 1);
        let value = Secret::copy_of(&content[..kept]);
        content.zeroize();
        if value.is_empty() {
            self.refuse(
                name,
                &twin,
                "names an empty file",
                "write the value into the file, or unset the variable",
            );
        } else if value.expose().contains(&0) {
            // Not dropped in silence: the secret would be another one.
            self.refuse(
                name,
                &twin,
                "names a file with NUL bytes",
                "use text, such as from: openssl rand -base64 32",
            );
        } else {
            self.values.insert(name.as_bytes().to_vec(), value);
        }
    }

    /// Takes note that the agent could read the file of secret `name`, and why the file cannot be hidden.
    pub fn with_exposed_file(&mut self, name: &str, cause: &str) {
        let Some(name) = self.awaited.take(name) else { return };
        let rule = format!(
            "names a file that others than root can read, and it cannot be hidden from them ({})",
            shown(cause)
        );
        let hint = "make the file root's, with mode 0400, or give the container SYS_ADMIN as docker-compose.yml does";
        self.refuse(name, &file_twin(name), rule, hint);
    }

    /// How a variable of the table was given.
    pub fn given(&self, name: &str) -> Given<'_> {
        if self.unusable.contains(name) || self.awaited.contains(name) {
            return Given::Unusable;
        }
        self.values.get(name.as_bytes()).map_or(Given::Not, Given::As)
    }

    /// Whether the user gave this variable, even in an unusable way.
    pub fn is_given(&self, name: &str) -> bool {
        !matches!(self.given(name), Given::Not)
    }

    /// The problems with how the variables were given, among them files that the caller has not read.
    pub fn problems(&self) -> Vec<Problem> {
        let unread = self.awaited.iter().map(|name| {
            Problem::new(
                &file_twin(name),
                "was not read",
                "this is a mistake of openclaw-cvm; please report it",
            )
        });
        self.problems.iter().cloned().chain(unread).collect()
    }

    pub fn warnings(&self) -> &[Warning] {
        &self.warnings
    }

    /// The variables that the gateway receives from outside: all foreign ones, and those of the table that are for
    /// the gateway.
    pub fn passthrough(&self) -> impl Iterator<Item = (&[u8], &Secret)> {
        self.values.iter().filter(|(name, _)| passes(name)).map(|(name, value)| (name.as_slice(), value))
    }

    /// One line for the boot log with the names of all variables that are set. It tells nothing about their values,
    /// not even a length, because standard output may be public.
    pub fn inventory(&self) -> String {
        let known = VARIABLES.iter().filter_map(|variable| match self.given(variable.name) {
            Given::Not => None,
            Given::As(_) => Some(variable.name.to_owned()),
            Given::Unusable => Some(format!("{} (unusable)", variable.name)),
        });
        let mut others = Vec::new();
        let mut more = 0;
        for name in self.values.keys().filter(|name| lookup(name).is_none() && passes(name)) {
            if others.len() < NAMES_SHOWN_MAX {
                others.push(shown(&String::from_utf8_lossy(name)));
            } else {
                more += 1;
            }
        }
        let listed = |names: Vec<String>| {
            if names.is_empty() { String::from("none") } else { names.join(", ") }
        };
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        format!(
            "Variables set: {}; passed on to the gateway besides: {}{more}.",
            listed(known.collect()),
            listed(others)
        )
    }

    fn refuse(&mut self, name: &'static str, variable: &str, rule: impl Into<String>, hint: &str) {
        self.problems.push(Problem::new(variable, rule, hint));
        self.unusable.insert(name);
    }

    fn find_files(&mut self) {
        for variable in VARIABLES {
            let twin = file_twin(variable.name);
            if !self.values.contains_key(twin.as_bytes()) {
                continue;
            }
            if !variable.secret {
                self.warnings.push(Warning::new(&twin, "has no effect; only secrets can be given as a file"));
            } else if self.values.contains_key(variable.name.as_bytes()) {
                // Guessing which of the two is meant could open the wrong bucket with the wrong key.
                let rule = format!("is set together with {twin}");
                self.refuse(variable.name, variable.name, rule, "unset one of the two");
            } else {
                self.awaited.insert(variable.name);
            }
        }
    }

    fn find_slips(&mut self) {
        for name in self.values.keys() {
            let Some((meant, variable)) = slip_of(name) else { continue };
            let fate = if withheld(variable) { " It is not passed to the gateway." } else { "" };
            let says = format!("is not a variable of openclaw-cvm; did you mean {meant}?{fate}");
            self.warnings.push(Warning::new(&String::from_utf8_lossy(name), says));
        }
    }
}

/// The row of a variable, if it is in the table.
pub fn variable(name: &str) -> Option<&'static Variable> {
    lookup(name.as_bytes())
}

/// The name of the variable that gives a secret as a path.
pub fn file_twin(name: &str) -> String {
    format!("{name}{FILE_SUFFIX}")
}

fn lookup(name: &[u8]) -> Option<&'static Variable> {
    VARIABLES.iter().find(|variable| variable.name.as_bytes() == name)
}

fn twin_of_secret(name: &[u8]) -> Option<&'static Variable> {
    lookup(name.strip_suffix(FILE_SUFFIX.as_bytes())?).filter(|variable| variable.secret)
}

fn passes(name: &[u8]) -> bool {
    let listed = |list: &[&str]| list.iter().any(|entry| entry.as_bytes() == name);
    let kept = [SET_BY_SUPERVISOR, NEVER_PASSED, OPERATORS].into_iter().any(listed);
    if kept || twin_of_secret(name).is_some() {
        return false;
    }
    match lookup(name) {
        Some(variable) => variable.audience == Gateway,
        None => !slip_of(name).is_some_and(|(_, variable)| withheld(variable)),
    }
}

/// Whether a variable with a misspelt name is kept from the gateway, because the secret that was meant is.
fn withheld(meant: &Variable) -> bool {
    meant.secret && meant.audience != Gateway
}

/// The variable of the table for which `name` is probably a misspelling.
fn slip_of(name: &[u8]) -> Option<(String, &'static Variable)> {
    let known = lookup(name).is_some()
        || twin_of_secret(name).is_some()
        || [SET_BY_SUPERVISOR, NEVER_PASSED, OPERATORS].concat().iter().any(|entry| entry.as_bytes() == name);
    if known {
        return None;
    }
    let upper = name.to_ascii_uppercase();
    let candidates = VARIABLES.iter().flat_map(|variable| {
        let twin = variable.secret.then(|| file_twin(variable.name));
        std::iter::once(variable.name.to_owned()).chain(twin).map(move |candidate| (candidate, variable))
    });
    candidates
        .filter_map(|(candidate, variable)| {
            let allowed = if candidate.len() > SHORT_NAME_LEN_MAX { 2 } else { 1 };
            let distance = distance(&upper, candidate.as_bytes(), allowed)?;
            Some((distance, candidate, variable))
        })
        .min_by_key(|(distance, ..)| *distance)
        .map(|(_, candidate, variable)| (candidate, variable))
}

/// Damerau-Levenshtein distance (optimal string alignment: insert, delete, replace, swap
/// neighbours), if it is at most `limit`.
fn distance(a: &[u8], b: &[u8], limit: usize) -> Option<usize> {
    // Also limits the work: a name may be 128 KiB long, those of the table are shorter than 40 bytes.
    if a.len().abs_diff(b.len()) > limit {
        return None;
    }
    let mut before_last: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, to) in b.iter().enumerate() {
            let replaced = last[j] + usize::from(from != to);
            let mut best = replaced.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *from == b[j - 1] && a[i - 1] == *to {
                best = best.min(before_last[j - 1] + 1);
            }
            row.push(best);
        }
        before_last = std::mem::replace(&mut last, row);
    }
    last.last().copied().filter(|distance| *distance <= limit)
}

#[cfg(test)]
mod tests;
