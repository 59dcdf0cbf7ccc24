//! Types of checked values: each has one constructor, which checks its rule.
//!
//! The caller adds the name of the variable. No message shows a value that may hold a credential, such as a URL.

use cvm_protocol::text::shown;
use cvm_secrets::owner::{Epoch, OwnerWord};

/// A broken rule, without the name of the variable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub(super) rule: String,
    pub(super) hint: String,
}

impl Fault {
    pub(super) fn new(rule: impl Into<String>, hint: impl Into<String>) -> Self {
        Self { rule: rule.into(), hint: hint.into() }
    }

    /// For values that are no secret: the message shows the value.
    fn with_value(rule: &str, value: &str, hint: impl Into<String>) -> Self {
        Self::new(format!("{rule}, not \"{}\"", shown(value)), hint)
    }
}

/// The name of a bucket. S3 itself allows less (3 to 63 lower-case letters, digits, dots, hyphens) and other stores
/// more, so only names are refused that no store allows or that would change a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BucketName(String);

impl BucketName {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let rule = "must be 3 to 255 letters, digits, dots, hyphens or underscores";
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if (3..=255).contains(&text.len()) && text.chars().all(allowed) {
            Ok(Self(text.to_owned()))
        } else if text.contains('/') {
            Err(Fault::with_value(rule, text, "a folder of the bucket goes into S3_PREFIX"))
        } else {
            Err(Fault::with_value(rule, text, "give the bucket's name alone, without s3:// or a path"))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// The folder of the bucket that is the crypt root, without slashes at either end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix(String);

impl Prefix {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        const LEN_MAX: usize = 512; // of the 1024 that S3 gives a key; names grow by encryption
        let trimmed = text.trim_matches('/');
        let hint = "give a folder such as openclaw-data or team/agent-1";
        if trimmed.is_empty() {
            Err(Fault::new("must name a folder of the bucket", hint))
        } else if trimmed.len() > LEN_MAX {
            Err(Fault::new(format!("must be at most {LEN_MAX} bytes long"), hint))
        } else if trimmed.chars().any(char::is_control) {
            Err(Fault::with_value("must not contain control characters", text, hint))
        } else if trimmed.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
            Err(Fault::with_value("must not contain empty, \".\" or \"..\" segments", text, hint))
        } else {
            Ok(Self(trimmed.to_owned()))
        }
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A region in the store's own words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region(String);

impl Region {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if text.len() <= 64 && text.chars().all(allowed) && !text.is_empty() {
            return Ok(Self(text.to_owned()));
        }
        let rule = "must be 1 to 64 letters, digits, dots, hyphens or underscores";
        Err(Fault::with_value(rule, text, "for stores without regions leave it unset"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An S3 provider as rclone names it. rclone treats a name that it does not know as `Other`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider(String);

impl Provider {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        if !(1..=64).contains(&text.len()) || !text.chars().all(|c| c.is_ascii_alphanumeric()) {
            let rule = "must be a word of letters and digits";
            return Err(Fault::with_value(rule, text, "for example AWS, Cloudflare, Minio or Other"));
        }
        // rclone compares with case, but many people write "aws".
        let name = if text.eq_ignore_ascii_case("AWS") { "AWS" } else { text };
        Ok(Self(name.to_owned()))
    }

    /// Whether it is AWS, whose endpoints follow from the region. Other providers need an `S3_ENDPOINT`.
    pub fn is_aws(&self) -> bool {
        self.0 == "AWS"
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An `http` or `https` URL without credentials, query or fragment, and without slashes at
/// its end, so that a path can be appended.
///
/// Parsed by hand: nearly all rules are stricter than the grammar of URLs, and would be needed beside a library too,
/// which would make PID 1 15 kB (`http::Uri`) or 240 kB (`url`) larger. Every accepted URL is valid for `http::Uri`,
/// which the mux client uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpUrl(String);

impl HttpUrl {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let hint = "give http://HOST or https://HOST, with a port or path where needed";
        let lower = text.get(..8).unwrap_or(text).to_ascii_lowercase();
        let scheme = ["https://", "http://"].into_iter().find(|scheme| lower.starts_with(scheme));
        let Some(scheme) = scheme else {
            return Err(Fault::new("must be an http or https URL", hint));
        };
        let rest = &text[scheme.len()..];
        // Checked first, and the value is never shown: people put passwords there.
        if rest.contains('@') {
            return Err(Fault::new("must not contain a user name or password", hint));
        }
        if rest.contains(['?', '#']) {
            return Err(Fault::new("must not contain a query or fragment", hint));
        }
        let rest = rest.trim_end_matches('/');
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        if !is_authority(authority) {
            return Err(Fault::new("must name a host, and a port from 1 to 65535 if any", hint));
        }
        if text.len() > 2048
            || !path.chars().all(|c| c.is_ascii_graphic() && !matches!(c, '"' | '\\' | '<' | '>' | '`'))
        {
            return Err(Fault::new("must have a path of visible ASCII characters, 2048 at most", hint));
        }
        Ok(Self(format!("{scheme}{authority}{path}")))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn has_path(&self) -> bool {
        self.0.splitn(4, '/').count() == 4
    }

    /// Whether requests to this URL leave this machine unencrypted.
    pub fn is_exposed(&self) -> bool {
        let Some(rest) = self.0.strip_prefix("http://") else { return false };
        let authority = rest.split('/').next().unwrap_or(rest);
        let host = match authority.strip_prefix('[') {
            Some(rest) => rest.split(']').next().unwrap_or(rest),
            None => authority.split(':').next().unwrap_or(authority),
        };
        // Only hosts that are loopback to every resolver count as loopback; 127.1 is one to some of them only.
        let is_loopback = host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback());
        !is_loopback && !host.eq_ignore_ascii_case("localhost")
    }
}

/// Whether a text is a host name, an IPv4 or a bracketed IPv6 address, with or without a port.
fn is_authority(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, port)) = rest.split_once(']') else { return false };
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            (None, if port.is_empty() { None } else { Some(port.strip_prefix(':').unwrap_or("-")) })
        }
        None => match text.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(text), None),
        },
    };
    // Underscores are not legal in host names, but compose makes such names.
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let host_ok = host.is_none_or(|host| {
        (1..=253).contains(&host.len())
            && host.chars().all(allowed)
            && host.starts_with(|c: char| c.is_ascii_alphanumeric())
    });
    host_ok && port.is_none_or(|port| Port::parse(port).is_ok())
}

/// Where the S3 service is: a URL without a path. A bare `host[:port]` means https, as it
/// does for rclone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(HttpUrl);

impl Endpoint {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let hint = "give https://HOST or HOST:PORT; the bucket goes into S3_BUCKET";
        let url = if text.contains("://") {
            HttpUrl::parse(text)
        } else {
            HttpUrl::parse(&format!("https://{text}"))
        };
        let url = url.map_err(|fault| Fault::new(fault.rule, hint))?;
        if url.has_path() {
            return Err(Fault::new("must not contain a path", hint));
        }
        Ok(Self(url))
    }

    /// The URL with its scheme, without a slash at the end.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    pub fn url(&self) -> &HttpUrl {
        &self.0
    }
}

/// The oldest state of a bucket that a boot accepts: a generation and its digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Anchor {
    generation: u64,
    /// In lower case.
    digest: String,
    /// The name of the state, in lower case. Anchors of older versions lack it.
    state: Option<String>,
}

impl Anchor {
    const DIGEST_LEN: usize = 64;
    const STATE_LEN: usize = 32;

    pub fn parse(text: &str) -> Result<Self, Fault> {
        let rule = "must be a generation above 0, 64 hex digits, and 32 hex digits, with colons between them";
        let is_hex = |text: &str, length| text.len() == length && text.bytes().all(|b| b.is_ascii_hexdigit());
        let parsed = text.split_once(':').and_then(|(generation, rest)| {
            let (digest, state) = rest.split_once(':').map_or((rest, None), |(digest, s)| (digest, Some(s)));
            let decimal = generation.bytes().all(|byte| byte.is_ascii_digit());
            let generation = generation.parse().ok().filter(|number| decimal && *number > 0)?;
            let right = is_hex(digest, Self::DIGEST_LEN) && state.is_none_or(|s| is_hex(s, Self::STATE_LEN));
            let state = state.map(str::to_ascii_lowercase);
            right.then(|| Self { generation, digest: digest.to_ascii_lowercase(), state })
        });
        parsed.ok_or_else(|| Fault::with_value(rule, text, "take the anchor that `cvm status` shows"))
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn digest(&self) -> &str {
        &self.digest
    }
}

impl std::fmt::Display for Anchor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.generation, self.digest)?;
        self.state.as_ref().map_or(Ok(()), |state| write!(f, ":{state}"))
    }
}

/// Parses a word that `cvm derive owner` has printed.
pub(super) fn owner_word(text: &str) -> Result<OwnerWord, Fault> {
    let hint = "take what `cvm derive owner` prints, on your own machine";
    OwnerWord::from_hex(text).ok_or_else(|| Fault::new("must be 64 hex digits", hint))
}

pub(super) fn epoch(text: &str) -> Result<Epoch, Fault> {
    let rule = "must be a whole number from 0 to 1000000";
    digits(text)
        .and_then(Epoch::new)
        .ok_or_else(|| Fault::with_value(rule, text, "digits only, one more than before"))
}

/// The public URL under which the mux-server reaches the mux client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InboundUrl(HttpUrl);

impl InboundUrl {
    pub const PATH: &str = "/v1/mux/inbound";

    pub fn parse(text: &str) -> Result<Self, Fault> {
        let url = HttpUrl::parse(text)?;
        // `HttpUrl` trims a slash at the end, but the server would post to the URL as given.
        if url.as_str().ends_with(Self::PATH) && text.ends_with(Self::PATH) {
            return Ok(Self(url));
        }
        let rule = format!("must end in {}", Self::PATH);
        Err(Fault::new(rule, "give the public URL of port 18790 with that path"))
    }

    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    pub fn url(&self) -> &HttpUrl {
        &self.0
    }
}

/// A TCP port from 1 to 65535.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Port(u16);

impl Port {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let port = digits(text).and_then(|number| u16::try_from(number).ok()).filter(|port| *port != 0);
        port.map(Self).ok_or_else(|| {
            Fault::with_value("must be a port from 1 to 65535", text, "digits only, such as 18789")
        })
    }

    pub fn get(self) -> u16 {
        self.0
    }
}

/// A span of whole seconds, a day at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Seconds(u32);

impl Seconds {
    pub const MAX: u32 = 86_400;

    /// Parses a number of seconds that is at least `min`.
    pub fn parse(text: &str, min: u32) -> Result<Self, Fault> {
        Self::within(text, min, Self::MAX)
    }

    pub fn within(text: &str, min: u32, max: u32) -> Result<Self, Fault> {
        let seconds = digits(text).filter(|seconds| (min..=max).contains(seconds));
        seconds.map(Self).ok_or_else(|| {
            let rule = format!("must be whole seconds from {min} to {max}");
            Fault::with_value(&rule, text, "digits only, without a unit")
        })
    }

    pub fn get(self) -> u32 {
        self.0
    }
}

/// Parses a number of digits only: `str::parse` would also accept "+5".
fn digits(text: &str) -> Option<u32> {
    let only_digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if only_digits { text.parse().ok() } else { None }
}

/// A user of the image, as `useradd` accepts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserName(String);

impl UserName {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        let first = |c: char| c.is_ascii_lowercase() || c == '_';
        let rest = |c: char| first(c) || c.is_ascii_digit() || c == '-';
        if text == "root" {
            let rule =
                "must not be root: the agent would have every key and everything else in this container";
            return Err(Fault::new(rule, "unset it; openclaw is made for this"));
        }
        if text.len() <= 32 && text.starts_with(first) && text.chars().all(rest) {
            return Ok(Self(text.to_owned()));
        }
        let rule = "must be a user name: a-z, 0-9, _ and -, 32 at most, not beginning with a digit or -";
        Err(Fault::with_value(rule, text, "for example openclaw"))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Parses `0`, `1`, `true` or `false`.
pub(super) fn switch(text: &str) -> Result<bool, Fault> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err(Fault::with_value("must be 0, 1, true or false", text, "lower case, without spaces")),
    }
}

/// How the boot log is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

impl LogFormat {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(Fault::with_value("must be text or json", text, "lower case")),
        }
    }
}

/// The least important line that is still written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub fn parse(text: &str) -> Result<Self, Fault> {
        match text {
            "error" => Ok(Self::Error),
            "warn" => Ok(Self::Warn),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(Fault::with_value("must be error, warn, info, debug or trace", text, "lower case")),
        }
    }

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}
