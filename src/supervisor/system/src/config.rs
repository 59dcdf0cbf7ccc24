//! Turns the environment into a checked configuration.
//!
//! Every variable is checked before anything is refused, so that the user sees all mistakes of
//! one boot together, each with its variable and rule.
//!
//! Nothing is guessed: an incomplete S3 bucket is a mistake, not a local volume. No message holds a secret. The
//! machine is not looked at: whether a user or a file exists is not known here.

mod initial;
mod strength;
mod values;

use base64::Engine as _;
use base64::alphabet::URL_SAFE;
use base64::engine::{GeneralPurpose, general_purpose::NO_PAD};

pub use initial::{InitialConfig, WorkspaceFiles};
pub use strength::{MAKE_STRONG, STRONG, is_strong};
pub use values::{
    Anchor, BucketName, Endpoint, Fault, HttpUrl, InboundUrl, LogFormat, LogLevel, Port, Prefix, Provider,
    Region, Seconds, UserName,
};

use crate::env::{Environment, Given, SET_BY_SUPERVISOR, SSH_TRUST_HOST_KEYS, file_twin, variable};
pub use crate::env::{Problem, Warning};
use cvm_machine::backoff::Backoff;
use cvm_protocol::accounts;
use cvm_protocol::authorized_keys::{AuthorizedKey, key_lines};
use cvm_protocol::doors::Door;
use cvm_protocol::mux::MUX_INBOUND_PORT;
use cvm_secrets::keys::MasterKey;
use cvm_secrets::owner::{Epoch, OwnerWord};
use cvm_secrets::secret::Secret;

/// A replacement waits for three missed heartbeats, so a longer interval would keep it from starting.
const HEARTBEAT_S_MAX: u32 = 3600;

/// We tell the mux-server to give a delivery up after 15 s.
const ACK_WAIT_S_MAX: u32 = 13;

/// rclone puts 16 bytes of initialisation vector before the text it obscures.
const OBSCURED_IV_LEN: usize = 16;

/// Everything that the user decides. Outside of this crate only [`Config::parse`] makes one.
///
/// It holds secrets, so it cannot be printed.
#[non_exhaustive]
pub struct Config {
    pub storage: Storage,
    /// Never none in S3 mode.
    pub master_key: Option<MasterKey>,
    /// The owner that this environment has to prove, if the compose file names one: see `owner`.
    pub owner: Option<Owner>,
    pub first_boot: FirstBoot,
    pub gateway: Gateway,
    pub mux: Option<Mux>,
    pub ssh: Ssh,
    pub docker: Docker,
    pub log: Log,
    /// Protections that this configuration turns off.
    pub doors: Vec<Door>,
}

/// The owner, who alone may write this machine's environment: `CVM_OWNER` of the compose file, and the token that
/// proves it. Without a token the `MASTER_KEY` proves it, and is then neither missing nor weak.
pub struct Owner {
    pub word: OwnerWord,
    pub token: Option<Secret>,
    pub epoch: Epoch,
}

/// Where the state is kept.
pub enum Storage {
    /// On the volume only: it is lost with the machine.
    Local,
    /// On the volume, and encrypted in a bucket.
    S3(Box<S3>),
}

/// The bucket and how to reach it.
pub struct S3 {
    pub bucket: BucketName,
    pub prefix: Prefix,
    pub region: Region,
    pub provider: Provider,
    /// Never none, except with AWS.
    pub endpoint: Option<Endpoint>,
    pub access_key_id: Secret,
    pub secret_access_key: Secret,
    pub session_token: Option<Secret>,
    /// Replaces the derived password and salt.
    pub crypt_override: Option<CryptOverride>,
    /// A bucket with an older state is refused.
    pub anchor: Option<Anchor>,
    /// Whether a bucket that cannot be checked is taken over as it is.
    pub adopt: bool,
    /// The interval between renewals of the ownership record.
    pub heartbeat_s: Seconds,
    /// How long a stop may take to push changes that the bucket lacks.
    pub drain_s: Seconds,
    /// The interval between restore drills; with 0 there are none.
    pub drill_s: Seconds,
}

/// Password and salt of the crypt remote in rclone's obscured form, for a bucket that was not
/// made with keys derived from `MASTER_KEY`.
pub struct CryptOverride {
    pub password: Secret,
    pub salt: Secret,
}

/// The files that an instance without state begins with.
pub struct FirstBoot {
    pub config: Option<InitialConfig>,
    pub workspace: Option<WorkspaceFiles>,
}

/// How the gateway is run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    pub port: Port,
    pub user: UserName,
    pub restart: Restart,
    pub start_timeout_s: Seconds,
    pub liveness_timeout_s: Seconds,
    pub stop_timeout_s: Seconds,
    /// Whether `REDPILL_API_KEY` is set. The key itself is passed to the gateway unread.
    pub redpill: bool,
}

/// The waits between restarts; `delay_s` is at most `max_delay_s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restart {
    pub delay_s: u32,
    pub max_delay_s: u32,
    pub reset_after_s: u32,
}

impl Restart {
    /// The backoff of the gateway and of the mux client.
    pub fn backoff(self) -> Backoff {
        Backoff::seconds(u64::from(self.delay_s), u64::from(self.max_delay_s), u64::from(self.reset_after_s))
    }
}

/// The mux client's settings.
pub struct Mux {
    pub base_url: HttpUrl,
    pub register_key: Secret,
    pub inbound_url: InboundUrl,
    /// How long an acknowledgement waits for the bucket, in S3 mode.
    pub ack_wait_s: Seconds,
}

/// How operators log in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ssh {
    pub port: Port,
    pub authorized_keys: Vec<AuthorizedKey>,
    /// Whether the keys that the host mounts at `/root/.ssh` may log in too.
    pub trust_host_keys: bool,
}

/// Whether dockerd runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Docker {
    On,
    Off,
    /// `ENABLE_DOCKER` is not set. Earlier versions ran dockerd then.
    OffByDefault,
}

/// What is written to the container's log.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Log {
    pub format: LogFormat,
    pub level: LogLevel,
    pub services: bool,
}

impl Config {
    /// The configuration with its warnings, or all problems of the environment.
    pub fn parse(env: &Environment) -> Result<(Self, Vec<Warning>), Vec<Problem>> {
        Self::read(env, false)
    }

    /// The same, on a machine that reads an existing state and starts no gateway, such as a laptop. There a weak
    /// `MASTER_KEY` is only a warning, because refusing it would protect nothing.
    pub fn parse_elsewhere(env: &Environment) -> Result<(Self, Vec<Warning>), Vec<Problem>> {
        Self::read(env, true)
    }

    fn read(env: &Environment, elsewhere: bool) -> Result<(Self, Vec<Warning>), Vec<Problem>> {
        let mut reader = Reader {
            env,
            elsewhere,
            problems: env.problems(),
            warnings: env.warnings().to_vec(),
            doors: Vec::new(),
            unencrypted: Vec::new(),
        };
        let config = reader.config();
        match config {
            Some(config) if reader.problems.is_empty() => {
                Ok((Self { doors: reader.doors, ..config }, reader.warnings))
            }
            _ => Err(reader.problems),
        }
    }

    /// Whether the account of the gateway's user is fit for the agent, by the text of `/etc/passwd` and `/etc/group`.
    /// An account that does not exist yet will be created, and is always fit.
    pub fn check_account(&self, passwd: &str, group: &str) -> Option<Problem> {
        let account = accounts::Account::find(passwd, group, self.gateway.user.as_str())?;
        let rule = account.unfit_for_the_agent()?;
        Some(Problem::new(
            "OPENCLAW_GATEWAY_USER",
            format!("names an account that {rule}"),
            "unset it, or name a user with a number from 1000 on, or one that does not exist and is made",
        ))
    }
}

/// Reads variables and collects their problems. Its methods return `None` only if the value is absent or a problem
/// has been noted.
struct Reader<'e> {
    env: &'e Environment,
    /// Whether this is another machine than the one that the environment configures: see [`Config::parse_elsewhere`].
    elsewhere: bool,
    problems: Vec<Problem>,
    warnings: Vec<Warning>,
    doors: Vec<Door>,
    /// Variables whose URL is http and leads out of this machine.
    unencrypted: Vec<&'static str>,
}

impl<'e> Reader<'e> {
    /// First reads every part, and only then returns none for a missing one, so that all problems are found.
    fn config(&mut self) -> Option<Config> {
        let storage = self.storage();
        let master_key = self.master_key();
        let owner = self.owner();
        let first_boot = self.first_boot();
        let gateway = self.gateway();
        let mux = self.mux();
        let ssh = self.ssh();
        let docker = self.docker();
        let log = self.log();
        self.check_http();
        self.check_ports();
        self.check_supervisors_own();
        Some(Config {
            storage: storage?,
            master_key,
            owner,
            first_boot,
            gateway: gateway?,
            mux,
            ssh: ssh?,
            docker: docker?,
            log: log?,
            doors: Vec::new(),
        })
    }

    fn storage(&mut self) -> Option<Storage> {
        if !self.env.is_given("S3_BUCKET") {
            self.check_left_over_s3();
            return Some(Storage::Local);
        }
        for name in ["MASTER_KEY"].into_iter().chain(S3_CREDENTIALS) {
            self.require(name, "is needed in S3 mode", "set it, or unset S3_BUCKET to keep the state local");
        }
        let bucket = self.text("S3_BUCKET").and_then(|text| self.check("S3_BUCKET", BucketName::parse(text)));
        let prefix = self.with_default("S3_PREFIX", Prefix::parse);
        let region = self.with_default("S3_REGION", Region::parse);
        let provider = self.with_default("S3_PROVIDER", Provider::parse);
        let endpoint =
            self.text("S3_ENDPOINT").and_then(|text| self.check("S3_ENDPOINT", Endpoint::parse(text)));
        self.note_url("S3_ENDPOINT", endpoint.as_ref().map(Endpoint::url));
        if provider.as_ref().is_some_and(|provider| !provider.is_aws()) {
            let hint = "set the URL of the S3 service, or S3_PROVIDER=AWS";
            self.require("S3_ENDPOINT", "is needed unless S3_PROVIDER is AWS", hint);
        }
        let access_key_id = self.word("AWS_ACCESS_KEY_ID");
        let secret_access_key = self.word("AWS_SECRET_ACCESS_KEY");
        let session_token = self.word("AWS_SESSION_TOKEN");
        let crypt_override = self.crypt_override();
        let anchor = self.text("STATE_ANCHOR").and_then(|t| self.check("STATE_ANCHOR", Anchor::parse(t)));
        let adopt = self.with_default("S3_ADOPT", values::switch);
        if adopt == Some(true) {
            let risk = "a bucket that nobody can check is taken over as it is, whoever wrote it";
            let remedy = "unset it as soon as `cvm storage status` says that everything is in the bucket";
            self.open("S3_ADOPT=1", risk, remedy);
            if self.env.is_given("STATE_ANCHOR") {
                // Otherwise an attacker could delete the manifest and get past the anchor.
                let hint = "unset it: the bucket of an anchor has a manifest; or unset STATE_ANCHOR for a bucket \
                            that you know has none";
                self.problems.push(Problem::new("S3_ADOPT", "must not be 1 beside STATE_ANCHOR", hint));
            }
        }
        let heartbeat = self.with_default("S3_HEARTBEAT", |t| Seconds::within(t, 1, HEARTBEAT_S_MAX));
        // With 0 every stop would lose the changes that are not pushed yet.
        let drain = self.with_default("S3_DRAIN_TIMEOUT", |t| Seconds::parse(t, 1));
        let drill = self.with_default("S3_DRILL_INTERVAL", |t| Seconds::parse(t, 0));
        if self.env.is_given("AWS_CA_BUNDLE") {
            let says = "does not reach the storage worker: rclone's S3 backend refuses to start with it. \
                        Add the certificate to the image's certificates instead";
            self.warn("AWS_CA_BUNDLE", says);
        }
        Some(Storage::S3(Box::new(S3 {
            bucket: bucket?,
            prefix: prefix?,
            region: region?,
            provider: provider?,
            endpoint,
            access_key_id: access_key_id?,
            secret_access_key: secret_access_key?,
            session_token,
            crypt_override,
            anchor,
            adopt: adopt?,
            heartbeat_s: heartbeat?,
            drain_s: drain?,
            drill_s: drill?,
        })))
    }

    /// Refuses variables of S3 mode without `S3_BUCKET`, which turns it on.
    fn check_left_over_s3(&mut self) {
        for name in ["S3_ENDPOINT", "S3_PREFIX"] {
            if self.env.is_given(name) {
                // The user meant S3: a local volume would lose the state with the machine.
                let hint = "set S3_BUCKET, or unset this to keep the state on the local volume";
                self.problems.push(Problem::new(name, "is set, but S3_BUCKET is not", hint));
            }
        }
        let without_effect = [
            "S3_REGION",
            "S3_PROVIDER",
            "RCLONE_CRYPT_PASSWORD",
            "RCLONE_CRYPT_PASSWORD2",
            "STATE_ANCHOR",
            "S3_ADOPT",
            "S3_HEARTBEAT",
            "S3_DRAIN_TIMEOUT",
            "S3_DRILL_INTERVAL",
        ];
        for name in without_effect {
            if self.env.is_given(name) {
                self.warn(name, "has no effect without S3_BUCKET");
            }
        }
        for name in S3_CREDENTIALS.into_iter().chain(["AWS_SESSION_TOKEN"]) {
            if self.env.is_given(name) {
                self.warn(name, "has no effect without S3_BUCKET, and is not passed to the gateway");
            }
        }
    }

    fn crypt_override(&mut self) -> Option<CryptOverride> {
        let names = ["RCLONE_CRYPT_PASSWORD", "RCLONE_CRYPT_PASSWORD2"];
        self.all_or_none(&names, "a salt belongs to a password; take both from the same rclone.conf");
        let [password, salt] = names.map(|name| {
            let value = self.bytes(name)?;
            if is_obscured(value.expose()) {
                return Some(value.duplicate());
            }
            let hint = "make it with: rclone obscure, or take it from rclone.conf";
            self.problems.push(Problem::new(name, "must be in rclone's obscured form", hint));
            None
        });
        Some(CryptOverride { password: password?, salt: salt? })
    }

    fn master_key(&mut self) -> Option<MasterKey> {
        if !self.env.is_given("MASTER_KEY") {
            if self.env.is_given("ALLOW_WEAK_MASTER_KEY") {
                self.warn("ALLOW_WEAK_MASTER_KEY", "has no effect without MASTER_KEY");
            }
            if !self.env.is_given("S3_BUCKET") {
                let says = "is not set: token, device identity and SSH host key are random, and live and die with \
                            the volume";
                self.warn("MASTER_KEY", says);
            }
            return None;
        }
        let key = self.bytes("MASTER_KEY")?;
        self.check_strength(key);
        let bytes = key.expose();
        let is_blank = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_whitespace);
        if is_blank(bytes.first()) || is_blank(bytes.last()) {
            self.warn("MASTER_KEY", "begins or ends with white space, which counts as part of the key");
        }
        MasterKey::new(key.duplicate())
    }

    /// The public SSH host key follows from `MASTER_KEY` alone, so an attacker can check guesses against it, as fast
    /// as a machine can hash. An instance that has state cannot get another key.
    fn check_strength(&mut self, key: &Secret) {
        const NAME: &str = "ALLOW_WEAK_MASTER_KEY";
        let is_strong = is_strong(key.expose());
        if self.elsewhere {
            if !is_strong {
                self.warn("MASTER_KEY", "can be guessed, and who has guessed it has everything");
            }
            return;
        }
        match (self.with_default(NAME, values::switch), is_strong) {
            (Some(true), true) => self.warn(NAME, "is 1 and MASTER_KEY is not weak; unset it"),
            (Some(true), false) => {
                let risk = "MASTER_KEY is a weak one: everybody who sees the SSH host key can guess it offline, and has then \
                            everything";
                let remedy =
                    "move the state to a new instance with a MASTER_KEY from: openssl rand -base64 32";
                self.open("ALLOW_WEAK_MASTER_KEY=1", risk, remedy);
            }
            (Some(false), false) => {
                let hint = format!(
                    "for a new instance, {MAKE_STRONG}. One that has state needs the key that it has: set {NAME}=1, below `environment` in the compose file, until \
                     you have moved"
                );
                self.problems.push(Problem::new(
                    "MASTER_KEY",
                    format!("{STRONG}, or it can be guessed"),
                    hint,
                ));
            }
            (Some(false), true) | (None, _) => {}
        }
    }

    fn owner(&mut self) -> Option<Owner> {
        const TOKEN: &str = "CVM_OWNER_TOKEN";
        if self.elsewhere {
            return None;
        }
        let epoch = self.with_default("CVM_OWNER_EPOCH", values::epoch);
        if !self.env.is_given("CVM_OWNER") {
            for name in ["CVM_OWNER_EPOCH", TOKEN] {
                if self.env.is_given(name) {
                    self.warn(name, "has no effect without CVM_OWNER");
                }
            }
            return None;
        }
        let word = self.text("CVM_OWNER").and_then(|text| self.check("CVM_OWNER", values::owner_word(text)));
        let token = self.bytes(TOKEN);
        if token.is_some_and(|token| !is_strong(token.expose())) {
            self.problems.push(Problem::new(TOKEN, STRONG, MAKE_STRONG));
        }
        if !self.env.is_given(TOKEN) {
            let key = self.bytes("MASTER_KEY");
            if !self.env.is_given("MASTER_KEY") {
                let rule = "is set, and there is no MASTER_KEY with which this environment could prove that it is its owner's";
                self.problems.push(Problem::new("CVM_OWNER", rule, "give the MASTER_KEY of this machine"));
            } else if key.is_some_and(|key| !is_strong(key.expose())) {
                let rule = "is needed: this MASTER_KEY can be guessed, and CVM_OWNER, which everybody can read, would show who has guessed it";
                let hint =
                    "set it to the output of: openssl rand -base64 32, and CVM_OWNER to its SHA-256 in hex";
                self.problems.push(Problem::new(TOKEN, rule, hint));
            }
        }
        Some(Owner { word: word?, token: token.map(Secret::duplicate), epoch: epoch? })
    }

    fn first_boot(&mut self) -> FirstBoot {
        let config = self.bytes("OPENCLAW_CONFIG_B64").map(|value| InitialConfig::parse(value.expose()));
        let config = config.and_then(|parsed| self.check("OPENCLAW_CONFIG_B64", parsed));
        let name = "OPENCLAW_WORKSPACE_FILES_B64";
        let workspace = self.bytes(name).map(|value| WorkspaceFiles::parse(value.expose()));
        let workspace = workspace.and_then(|parsed| match parsed {
            Ok(files) => Some(files),
            Err(faults) => {
                self.problems
                    .extend(faults.into_iter().map(|fault| Problem::new(name, fault.rule, fault.hint)));
                None
            }
        });
        FirstBoot { config, workspace }
    }

    fn gateway(&mut self) -> Option<Gateway> {
        let port = self.with_default("OPENCLAW_GATEWAY_PORT", Port::parse);
        let user = self.with_default("OPENCLAW_GATEWAY_USER", UserName::parse);
        let restart = self.restart();
        // 0 would kill a healthy gateway, or lose the work that it is doing.
        let mut timeout = |name| self.with_default(name, |text| Seconds::parse(text, 1));
        let start_timeout = timeout("OPENCLAW_GATEWAY_START_TIMEOUT");
        let liveness_timeout = timeout("OPENCLAW_GATEWAY_LIVENESS_TIMEOUT");
        let stop_timeout = timeout("OPENCLAW_GATEWAY_STOP_TIMEOUT");
        let redpill = self.word("REDPILL_API_KEY").is_some();
        Some(Gateway {
            port: port?,
            user: user?,
            restart: restart?,
            start_timeout_s: start_timeout?,
            liveness_timeout_s: liveness_timeout?,
            stop_timeout_s: stop_timeout?,
            redpill,
        })
    }

    fn restart(&mut self) -> Option<Restart> {
        let mut seconds = |name| self.with_default(name, |text| Seconds::parse(text, 0)).map(Seconds::get);
        let delay = seconds("OPENCLAW_GATEWAY_RESTART_DELAY");
        let max_delay = seconds("OPENCLAW_GATEWAY_RESTART_MAX_DELAY");
        let reset_after = seconds("OPENCLAW_GATEWAY_RESTART_RESET_AFTER");
        let (delay_s, max_delay_s) = (delay?, max_delay?);
        if delay_s > max_delay_s {
            let rule =
                format!("is {delay_s} s, more than OPENCLAW_GATEWAY_RESTART_MAX_DELAY ({max_delay_s} s)");
            let hint = "lower it, or raise the other";
            self.problems.push(Problem::new("OPENCLAW_GATEWAY_RESTART_DELAY", rule, hint));
            return None;
        }
        Some(Restart { delay_s, max_delay_s, reset_after_s: reset_after? })
    }

    fn mux(&mut self) -> Option<Mux> {
        let names = ["MUX_BASE_URL", "MUX_REGISTER_KEY"];
        self.all_or_none(&names, "the mux client needs both; unset both to leave it out");
        let base_url =
            self.text("MUX_BASE_URL").and_then(|text| self.check("MUX_BASE_URL", HttpUrl::parse(text)));
        let register_key = self.word("MUX_REGISTER_KEY");
        let wanted = names.iter().all(|name| self.env.is_given(name));
        self.note_url("MUX_BASE_URL", base_url.as_ref());
        let inbound_url = match self.text("MUX_INBOUND_URL") {
            Some(text) => self.check("MUX_INBOUND_URL", InboundUrl::parse(text)),
            None if wanted && !self.env.is_given("MUX_INBOUND_URL") => self.dstack_inbound_url(),
            None => None,
        };
        self.note_url("MUX_INBOUND_URL", inbound_url.as_ref().map(InboundUrl::url));
        let ack_wait =
            self.with_default("MUX_ACK_REPLICATION_WAIT", |t| Seconds::within(t, 0, ACK_WAIT_S_MAX));
        for name in ["MUX_INBOUND_URL", "MUX_GATEWAY_DOMAIN", "MUX_ACK_REPLICATION_WAIT"] {
            if self.env.is_given(name) && !names.iter().any(|name| self.env.is_given(name)) {
                self.warn(name, "has no effect without MUX_BASE_URL and MUX_REGISTER_KEY");
            }
        }
        if wanted && !self.env.is_given("MASTER_KEY") {
            let rule = "is needed for the mux client: the id by which the mux-server knows this instance is derived from it";
            let hint = "set it, or unset MUX_BASE_URL and MUX_REGISTER_KEY";
            self.problems.push(Problem::new("MASTER_KEY", rule, hint));
        }
        Some(Mux {
            base_url: base_url?,
            register_key: register_key?,
            inbound_url: inbound_url?,
            ack_wait_s: ack_wait?,
        })
    }

    /// The address that dstack's gateway gives to a port of an app. `DSTACK_GATEWAY_DOMAIN` holds the same domain,
    /// but the host writes it, and could have every chat sent to itself.
    fn dstack_inbound_url(&mut self) -> Option<InboundUrl> {
        let (id, domain) = (self.text("DSTACK_APP_ID"), self.text("MUX_GATEWAY_DOMAIN"));
        let (Some(id), Some(domain)) = (id, domain) else {
            let mut rule = String::from(
                "is needed for the mux client where DSTACK_APP_ID and MUX_GATEWAY_DOMAIN are not both set",
            );
            if self.env.is_given("DSTACK_GATEWAY_DOMAIN") {
                rule += "; DSTACK_GATEWAY_DOMAIN is ignored, because the CVM's host writes it";
            }
            let hint = "set MUX_GATEWAY_DOMAIN to the domain of your app's public address, without the app's id and \
                        port, or set this to the public URL of port 18790, ending in /v1/mux/inbound";
            self.problems.push(Problem::new("MUX_INBOUND_URL", rule, hint));
            return None;
        };
        let url = format!("https://{id}-{MUX_INBOUND_PORT}.{domain}{}", InboundUrl::PATH);
        // With a slash in either part, the rest would be a path and the host another one.
        if id.contains('/') || domain.contains('/') {
            let rule =
                "cannot be built from DSTACK_APP_ID and MUX_GATEWAY_DOMAIN, which are no parts of a host";
            self.problems.push(Problem::new("MUX_INBOUND_URL", rule, "set it, or correct those two"));
            return None;
        }
        self.check("MUX_INBOUND_URL", InboundUrl::parse(&url))
    }

    fn note_url(&mut self, name: &'static str, url: Option<&HttpUrl>) {
        if url.is_some_and(HttpUrl::is_exposed) {
            self.unencrypted.push(name);
        }
    }

    /// Over http, an attacker on the network reads the register key and presigned URLs, and can answer in the
    /// server's name.
    fn check_http(&mut self) {
        const NAME: &str = "ALLOW_HTTP";
        match (self.with_default(NAME, values::switch), self.unencrypted.is_empty()) {
            (Some(true), true) => self.warn(NAME, "is 1 and no URL needs it; unset it"),
            (Some(true), false) => {
                let risk = format!(
                    "{} is not encrypted: the host and everybody on the way reads and changes what is sent",
                    self.unencrypted.join(", ")
                );
                self.open("ALLOW_HTTP=1", risk, "give https:// URLs and unset ALLOW_HTTP");
            }
            (Some(false), _) => {
                for name in std::mem::take(&mut self.unencrypted) {
                    let rule = "must be https, unless it is an address of this machine's loopback: over http \
                                everybody on the way reads and changes what is sent";
                    let hint = "give https://HOST; where there is no other way, set ALLOW_HTTP=1, in the compose file below `environment`";
                    self.problems.push(Problem::new(name, rule, hint));
                }
            }
            (None, _) => {}
        }
    }

    fn docker(&mut self) -> Option<Docker> {
        if !self.env.is_given("ENABLE_DOCKER") {
            return Some(Docker::OffByDefault);
        }
        if !self.with_default("ENABLE_DOCKER", values::switch)? {
            return Some(Docker::Off);
        }
        let risk = "the agent may use docker, and who may use docker is root in this container: it can read the keys, \
                    and change or stop everything here";
        self.open("ENABLE_DOCKER=1", risk, "set ENABLE_DOCKER=0 if the agent needs no containers");
        Some(Docker::On)
    }

    fn ssh(&mut self) -> Option<Ssh> {
        let authorized_keys = self.authorized_keys();
        let trust_host_keys = self.with_default(SSH_TRUST_HOST_KEYS, values::switch);
        if trust_host_keys == Some(true) {
            let risk = "the keys mounted at /root/.ssh open a root shell here, and whoever runs the CVM's host writes them";
            let remedy = "set SSH_AUTHORIZED_KEYS to your public keys and take SSH_TRUST_HOST_KEYS out of the compose file";
            self.open("SSH_TRUST_HOST_KEYS=1", risk, remedy);
        }
        let port = self.with_default("SSH_PORT", Port::parse);
        Some(Ssh { port: port?, authorized_keys, trust_host_keys: trust_host_keys? })
    }

    fn authorized_keys(&mut self) -> Vec<AuthorizedKey> {
        const NAME: &str = "SSH_AUTHORIZED_KEYS";
        let mut keys = Vec::new();
        for (number, line) in self.text(NAME).into_iter().flat_map(key_lines) {
            match AuthorizedKey::parse(line) {
                Ok(key) => keys.push(key),
                Err(fault) => {
                    let rule = format!("line {number} {}", fault.rule);
                    self.problems.push(Problem::new(NAME, rule, fault.hint));
                }
            }
        }
        keys
    }

    fn log(&mut self) -> Option<Log> {
        let format = self.with_default("LOG_FORMAT", LogFormat::parse);
        let level = self.with_default("LOG_LEVEL", LogLevel::parse);
        let services = self.with_default("LOG_SERVICES", values::switch);
        if services == Some(true) {
            let risk = "what the services print, chats among it, goes to the container's log, which is public on dstack \
                        unless you say otherwise";
            self.open("LOG_SERVICES=1", risk, "set LOG_SERVICES=0; `cvm logs` shows it over SSH");
        }
        Some(Log { format: format?, level: level?, services: services? })
    }

    fn check_ports(&mut self) {
        let port = |name: &str| {
            let given = match self.env.given(name) {
                Given::As(value) => value.expose_str(),
                Given::Not => variable(name).and_then(|variable| variable.default),
                Given::Unusable => None,
            };
            Port::parse(given?).ok().map(Port::get)
        };
        let (gateway, ssh) = (port("OPENCLAW_GATEWAY_PORT"), port("SSH_PORT"));
        let mut taken = |name, rule: String| {
            self.problems.push(Problem::new(name, rule, "choose another port"));
        };
        for (name, port) in [("OPENCLAW_GATEWAY_PORT", gateway), ("SSH_PORT", ssh)] {
            if port == Some(MUX_INBOUND_PORT) {
                taken(name, format!("is {MUX_INBOUND_PORT}, the port of the mux client"));
            }
        }
        if let (Some(gateway), Some(ssh)) = (gateway, ssh)
            && gateway == ssh
        {
            taken("SSH_PORT", format!("is {ssh}, the same as OPENCLAW_GATEWAY_PORT"));
        }
    }

    /// Checks variables that the supervisor itself sets for the gateway. A token from outside is refused, because
    /// clients derive another one from `MASTER_KEY`. The others are only a warning.
    fn check_supervisors_own(&mut self) {
        const TOKEN: &str = "OPENCLAW_GATEWAY_TOKEN";
        for name in [TOKEN.to_owned(), file_twin(TOKEN)] {
            if self.env.is_given(&name) {
                let rule = "cannot be set: the token is derived from MASTER_KEY, or generated without one";
                self.problems.push(Problem::new(
                    &name,
                    rule,
                    "unset it, and give clients the token derived from MASTER_KEY",
                ));
            }
        }
        for name in SET_BY_SUPERVISOR.iter().filter(|name| **name != TOKEN) {
            if self.env.is_given(name) {
                self.warn(name, "is set by openclaw-cvm for the gateway; your value is not used");
            }
        }
    }

    fn bytes(&self, name: &str) -> Option<&'e Secret> {
        match self.env.given(name) {
            Given::As(value) => Some(value),
            Given::Not | Given::Unusable => None,
        }
    }

    fn text(&mut self, name: &str) -> Option<&'e str> {
        let value = self.bytes(name)?;
        let text = value.expose_str();
        if text.is_none() {
            self.problems.push(Problem::new(name, "must be UTF-8 text", "type the value again"));
        }
        text
    }

    /// A key for an HTTP header. White space at its ends comes from careless pasting.
    fn word(&mut self, name: &str) -> Option<Secret> {
        let value = self.bytes(name)?;
        if value.expose().iter().all(u8::is_ascii_graphic) {
            return Some(value.duplicate());
        }
        let rule = "must be visible ASCII without white space";
        self.problems.push(Problem::new(name, rule, "look for a space or line break at its ends"));
        None
    }

    fn check<T>(&mut self, name: &str, parsed: Result<T, Fault>) -> Option<T> {
        parsed.map_err(|fault| self.problems.push(Problem::new(name, fault.rule, fault.hint))).ok()
    }

    fn with_default<T>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, Fault>) -> Option<T> {
        let text = if self.env.is_given(name) { self.text(name)? } else { variable(name)?.default? };
        self.check(name, parse(text))
    }

    fn require(&mut self, name: &str, rule: &str, hint: &str) {
        if !self.env.is_given(name) {
            self.problems.push(Problem::new(name, rule, hint));
        }
    }

    fn all_or_none(&mut self, names: &[&str], hint: &str) {
        let (given, missing): (Vec<&str>, Vec<&str>) = names.iter().partition(|name| self.env.is_given(name));
        if given.is_empty() {
            return;
        }
        for name in missing {
            let rule = format!("is needed together with {}", given.join(", "));
            self.problems.push(Problem::new(name, rule, hint));
        }
    }

    fn open(&mut self, name: &str, risk: impl Into<String>, remedy: &str) {
        self.doors.push(Door::new(name, risk, remedy));
    }

    fn warn(&mut self, name: &str, says: &str) {
        self.warnings.push(Warning::new(name, says));
    }
}

const S3_CREDENTIALS: [&str; 2] = ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"];

/// Whether a text has rclone's obscured form: base64url without padding, and longer than its initialisation vector,
/// which is all that an empty password has. Anyone can obscure a text, so this checks the form only.
fn is_obscured(text: &[u8]) -> bool {
    // Like Go's decoder, this one ignores the unused bits of the last character.
    const RCLONE: GeneralPurpose =
        GeneralPurpose::new(&URL_SAFE, NO_PAD.with_decode_allow_trailing_bits(true));
    let room_len = text.len().div_ceil(4) * 3;
    let mut decoded = None;
    drop(Secret::filled(room_len, |room| decoded = RCLONE.decode_slice(text, room).ok()));
    decoded.is_some_and(|len| len > OBSCURED_IV_LEN)
}

#[cfg(test)]
mod tests;
