//! rclone, the only room that calls it: the user's files to and from the crypt remote, and the
//! mount of it.
//!
//! The remotes are connection strings, so that no configuration file holds a password. rclone
//! repeats its input in every error and logs every parameter at DEBUG: nothing of an error leaves
//! this room but words that are looked for here.
//!
//! Refuses: a remote that does not encrypt, and to pass on a word of Go's unlooked at.
//! May import: `crypt`, `entry`, `fault`.

use crate::crypt;
use crate::fault::Fault;
use cvm_protocol::storage::{CryptSpec, StorageSpec};
use serde_json::{Value, json};
use std::panic::catch_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

/// The crypt remote of one bucket. There is no other kind.
pub(crate) struct Rclone {
    remote: Arc<Remote>,
    calls: AtomicU64,
}

struct Remote {
    /// The connection string; secret.
    text: Zeroizing<String>,
    /// When it was last asked for.
    used: Mutex<Option<Instant>>,
}

/// How far Go's heap may grow in haste, and by how much before it is collected.
const HASTE_MEMORY: i64 = 512 << 20;
const HASTE_PERCENT: i64 = 300;
/// rclone forgets a remote that was not used for 5 minutes.
const KEPT: Duration = Duration::from_mins(4);

/// What the bucket shows of one object, through rclone's eyes.
#[derive(Debug, Clone)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) size: u64,
    pub(crate) mtime_ns: i64,
}

/// Passwords of the crypt remote in clear.
pub(crate) struct Passwords {
    pub(crate) password: Zeroizing<Vec<u8>>,
    pub(crate) salt: Zeroizing<Vec<u8>>,
}

impl Passwords {
    pub(crate) fn of(spec: &CryptSpec) -> Result<Self, Fault> {
        let lost = || Fault::config("the crypt passwords did not arrive");
        let (CryptSpec::Clear { password, salt } | CryptSpec::Obscured { password, salt }) = spec;
        let (password, salt) = (password.unpack().ok_or_else(lost)?, salt.unpack().ok_or_else(lost)?);
        if matches!(spec, CryptSpec::Clear { .. }) {
            return Ok(Self { password, salt });
        }
        let reveal = |bytes: &[u8]| {
            crypt::reveal(bytes)
                .ok_or_else(|| Fault::config("RCLONE_CRYPT_PASSWORD is not in rclone's obscured form"))
        };
        Ok(Self { password: reveal(&password)?, salt: reveal(&salt)? })
    }
}

/// Options of the mount that do not come from the manifest.
pub(crate) struct MountModes {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) file: u32,
    pub(crate) directory: u32,
}

impl Rclone {
    pub(crate) fn new(spec: &StorageSpec, passwords: &Passwords) -> Result<Self, Fault> {
        librclone::initialize();
        let remote = connection_string(spec, passwords)?;
        let remote = Arc::new(Remote { text: remote, used: Mutex::default() });
        // No configuration file: an empty path keeps everything in memory, and nothing is saved.
        Self::call("config/setpath", &json!({ "path": "" }))?;
        // Its log goes to our standard error, past us: even an error quotes the remote that it could
        // not open, with every password in it.
        Self::call(
            "options/set",
            &json!({ "main": { "LogLevel": "EMERGENCY", "LowLevelRetries": 3, "Retries": 1,
            // A connection that says nothing for this long is dead. 10 s to connect.
            "Timeout": 60_000_000_000u64, "ConnectTimeout": 10_000_000_000u64,
            "BufferSize": 256 * 1024, "UseMmap": true, "MultiThreadStreams": 0, "UserAgent": "openclaw-cvm" } }),
        )?;
        // Beside whatever is done before the first object is wanted.
        let early = Arc::clone(&remote);
        std::thread::spawn(move || {
            early.made();
        });
        Ok(Self { remote, calls: AtomicU64::new(0) })
    }

    /// The next call waits for nothing but what it asks for.
    pub(crate) fn make_ready(&self) {
        self.remote.made();
    }

    /// Calls of rclone that went to the bucket, since the start.
    pub(crate) fn calls(&self) -> u64 {
        self.calls.load(Ordering::Relaxed)
    }

    /// One local file to its object. The file's modification time goes with it.
    pub(crate) fn upload(&self, directory: &std::path::Path, name: &str, object: &str) -> Result<(), Fault> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Self::call(
            "operations/copyfile",
            &json!({ "srcFs": directory, "srcRemote": name, "dstFs": self.remote.made(), "dstRemote": object,
                // Ours is the newer one, whatever rclone would make of sizes and times.
                // And once: a second try of rclone's own is not asked whether the bucket is still ours.
                // The server compares what arrives with the MD5 in the request. An `ETag` need not be one
                // (with SSE-KMS it never is), and rclone removes an object whose `ETag` is another.
                "_config": { "IgnoreTimes": true, "NoCheckDest": true, "LowLevelRetries": 1, "IgnoreChecksum": true },
                "_filter": no_filter() }),
        )
        .map(drop)
    }

    /// One object to a local file.
    pub(crate) fn download(
        &self,
        object: &str,
        directory: &std::path::Path,
        name: &str,
    ) -> Result<(), Fault> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        Self::call(
            "operations/copyfile",
            &json!({ "srcFs": self.remote.made(), "srcRemote": object, "dstFs": directory, "dstRemote": name,
                "_config": { "IgnoreTimes": true, "NoCheckDest": true, "Inplace": true, "MultiThreadStreams": 0 }, "_filter": no_filter() }),
        )
        .map(drop)
    }

    /// All objects but our own, or only those that the file names, to the same names below a
    /// directory, many at a time. What fails is seen by what is not there afterwards.
    pub(crate) fn download_many(
        &self,
        names: Option<&std::path::Path>,
        directory: &std::path::Path,
        parallel: u32,
    ) -> Result<(), Fault> {
        // With names, only the directories that lead to them are listed.
        let filter = match names {
            Some(names) => json!({ "FilesFrom": [], "FilesFromRaw": [names] }),
            None => json!({ "FilesFrom": [], "FilesFromRaw": [], "ExcludeRule": ["/.cvm/**"] }),
        };
        Self::call(
            "sync/copy",
            &json!({ "srcFs": self.remote.made(), "dstFs": directory,
                "_config": { "Transfers": parallel, "Checkers": parallel, "UseServerModTime": true,
                    "IgnoreExisting": true, "NoUpdateModTime": true, "MultiThreadStreams": 0, "Retries": 1 },
                "_filter": filter }),
        )
        .map(drop)
    }

    /// Work for which everything waits, and beside which nothing wants the memory: Go's collector,
    /// kept short otherwise, takes a part of the processor that is missed then.
    pub(crate) fn in_haste<R>(work: impl FnOnce() -> R) -> R {
        let limit = |limit: i64| {
            let answer = Self::call("debug/set-soft-memory-limit", &json!({ "mem-limit": limit }));
            answer.ok()?["existing-mem-limit"].as_i64()
        };
        let percent = |percent: i64| {
            let answer = Self::call("debug/set-gc-percent", &json!({ "gc-percent": percent }));
            answer.ok()?["existing-gc-percent"].as_i64()
        };
        // One below none only asks.
        let Some(usual) = limit(-1).filter(|usual| *usual < HASTE_MEMORY) else { return work() };
        limit(HASTE_MEMORY);
        let often = percent(HASTE_PERCENT);
        let result = work();
        often.and_then(percent);
        limit(usual);
        result
    }

    /// Bytes that rclone has transferred since the start.
    pub(crate) fn transferred() -> u64 {
        Self::call("core/stats", &json!({})).ok().and_then(|stats| stats["bytes"].as_u64()).unwrap_or(0)
    }

    /// Deletes an object; one that is not there is as good.
    pub(crate) fn delete(&self, object: &str) -> Result<(), Fault> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        match Self::call("operations/deletefile", &json!({ "fs": self.remote.made(), "remote": object })) {
            Ok(_) | Err(Fault::Missing) => Ok(()),
            Err(fault) => Err(fault),
        }
    }

    /// Every object whose name decrypts.
    pub(crate) fn list_all(&self, with_times: bool) -> Result<Vec<Listed>, Fault> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let answer = Self::call(
            "operations/list",
            &json!({ "fs": self.remote.made(), "remote": "", "_filter": no_filter(), "_config": { "UseServerModTime": !with_times },
                "opt": { "recurse": true, "filesOnly": true, "noModTime": !with_times, "noMimeType": true } }),
        );
        let answer = match answer {
            // An empty bucket has no directory of this name.
            Err(Fault::Missing) => return Ok(Vec::new()),
            other => other?,
        };
        let listed = answer["list"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(listed
            .iter()
            .filter_map(|item| {
                Some(Listed {
                    name: item["Path"].as_str()?.to_owned(),
                    size: item["Size"].as_u64()?,
                    mtime_ns: item["ModTime"].as_str().and_then(nanoseconds).unwrap_or_default(),
                })
            })
            .collect())
    }

    /// Shows, at `point` and read-only, exactly the objects named in the file, as they are now.
    pub(crate) fn mount(
        &self,
        point: &std::path::Path,
        names: &std::path::Path,
        modes: &MountModes,
    ) -> Result<(), Fault> {
        // The mount has no filter of its own; every other call brings its own with it.
        Self::call("options/set", &json!({ "filter": { "FilesFromRaw": [names] } }))?;
        // Longer than any uptime: the lower layer of an overlay must not change.
        let never = "87600h";
        Self::call(
            "mount/mount",
            &json!({ "fs": self.remote.made(), "mountPoint": point, "mountType": "mount",
                "vfsOpt": { "ReadOnly": true, "DirCacheTime": never, "PollInterval": "0s", "CacheMode": "off",
                    "UID": modes.uid, "GID": modes.gid, "Umask": "0", "FilePerms": format!("{:o}", modes.file), "DirPerms": format!("{:o}", modes.directory),
                    "NoSeek": false, "ReadAhead": 0, "ChunkSize": "16Mi", "ChunkSizeLimit": "64Mi" },
                "mountOpt": { "AllowOther": true, "AttrTimeout": never, "DeviceName": "openclaw-cvm" } }),
        )
        .map(drop)
    }

    /// The one place where rclone is called.
    fn call(method: &'static str, input: &Value) -> Result<Value, Fault> {
        let text = Zeroizing::new(input.to_string());
        // The crate unwraps what Go returns; a name that is no UTF-8 must not end the worker.
        let answer = catch_unwind(|| librclone::rpc(method, text.as_str()))
            .map_err(|_| Fault::other(format!("rclone's {method} gave no text")))?;
        match answer {
            Ok(text) => serde_json::from_str(&text)
                .map_err(|_| Fault::other(format!("rclone's {method} gave no JSON"))),
            Err(text) => {
                let text = Zeroizing::new(text);
                let said = serde_json::from_str::<Value>(&text).ok();
                let said = said.as_ref().and_then(|v| v["error"].as_str()).unwrap_or_default();
                Err(understood(method, said))
            }
        }
    }
}

fn no_filter() -> Value {
    json!({ "FilesFrom": [], "FilesFromRaw": [] })
}

impl Remote {
    /// Has rclone make it first, once: that takes a key derivation of 50 ms and 16 MiB, and of many
    /// who come at the same moment each would do one.
    fn made(&self) -> &str {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        if used.is_none_or(|at| at.elapsed() >= KEPT) {
            // What is wrong with it is said by the call that wants something of it.
            // It asks the server whether there is an object of the prefix's name, and a server that
            // hangs must not have all of us wait for long.
            let once = json!({ "fs": *self.text, "_config": { "LowLevelRetries": 1 } });
            let _ = Rclone::call("operations/fsinfo", &once);
        }
        *used = Some(Instant::now());
        &self.text
    }
}

/// What Go said, in words of ours. Its own are never passed on: they quote remotes with passwords.
fn understood(method: &str, said: &str) -> Fault {
    let has = |word: &str| said.contains(word);
    if has("object not found") || has("directory not found") {
        Fault::Missing
    } else if has("NoSuchBucket") {
        Fault::NoBucket
    } else if has("AccessDenied") || has("StatusCode: 403") || has("Forbidden") {
        Fault::Denied("AccessDenied".to_owned())
    } else if has("InvalidAccessKeyId") || has("SignatureDoesNotMatch") {
        Fault::Denied("the key is not accepted".to_owned())
    } else if has("RequestTimeTooSkewed") {
        Fault::Clock
    } else if has("x509:") || has("tls:") {
        Fault::Tls("the certificate is not accepted".to_owned())
    } else if has("connection refused") {
        Fault::Unreachable("the connection is refused".to_owned())
    } else if has("no such host") {
        Fault::Unreachable("the host name of S3_ENDPOINT is not found".to_owned())
    } else if has("timeout")
        || has("deadline exceeded")
        || has("connection reset")
        || has("EOF")
        || has("broken pipe")
    {
        Fault::Unreachable("the connection broke or gave no answer in time".to_owned())
    } else if has("StatusCode: 429") {
        Fault::Busy(429)
    } else if has("StatusCode: 50") || has("SlowDown") {
        Fault::Busy(503)
    } else if has("no space left") {
        Fault::Disk("no space left on device".to_owned())
    } else if has("being updated") || has("corrupted on transfer") {
        Fault::other("the file changed while it was sent")
    } else if has("fusermount") {
        Fault::other("fusermount3 cannot be run or refuses to mount")
    } else if [
        "bad block",
        "decrypt",
        "not an encrypted file",
        "too short to be encrypted",
        "truncated block",
    ]
    .into_iter()
    .any(has)
    {
        Fault::WrongKey("an object does not decrypt".to_owned())
    } else {
        Fault::other(format!("rclone's {method} failed for a reason that has no words here"))
    }
}

fn connection_string(spec: &StorageSpec, passwords: &Passwords) -> Result<Zeroizing<String>, Fault> {
    let text = |bytes: &cvm_secrets::base64_bytes::PackedBytes| {
        bytes
            .unpack()
            .and_then(|b| String::from_utf8(b.to_vec()).ok())
            .map(Zeroizing::new)
            .ok_or_else(|| Fault::config("the credentials did not arrive"))
    };
    let mut s3 =
        Zeroizing::new(format!(":s3,provider={},region={}", *quoted(&spec.provider), *quoted(&spec.region)));
    let mut add = |name: &str, value: &str| {
        s3.push_str(&Zeroizing::new(format!(",{name}={}", *quoted(value))));
    };
    if let Some(endpoint) = &spec.endpoint {
        add("endpoint", endpoint);
    }
    add("access_key_id", &text(&spec.access_key_id)?);
    add("secret_access_key", &text(&spec.secret_access_key)?);
    if let Some(token) = &spec.session_token {
        add("session_token", &text(token)?);
    }
    // The bucket is there or it is not; rclone never makes one. And one request for each upload
    // and download is enough: sizes and checksums go with it.
    for option in ["no_check_bucket", "no_head", "force_path_style"] {
        add(option, "true");
    }
    for option in ["env_auth", "use_multipart_etag"] {
        add(option, "false");
    }
    let root = Zeroizing::new(format!("{}:{}/{}", *s3, spec.bucket, spec.prefix));
    let random = |_| Fault::other("the kernel gives no random numbers");
    let password = crypt::obscure(&passwords.password).map_err(random)?;
    let salt = crypt::obscure(&passwords.salt).map_err(random)?;
    Ok(Zeroizing::new(format!(
        ":crypt,remote={},password={},password2={},filename_encryption=standard,directory_name_encryption=true,filename_encoding=base32:",
        *quoted(&root),
        *quoted(&password),
        *quoted(&salt)
    )))
}

/// As rclone's connection strings want it: in double quotes, which are doubled inside.
fn quoted(value: &str) -> Zeroizing<String> {
    Zeroizing::new(format!("\"{}\"", value.replace('"', "\"\"")))
}

/// RFC 3339 as Go writes it, to nanoseconds since 1970.
fn nanoseconds(text: &str) -> Option<i64> {
    let (date, rest) = text.split_once('T')?;
    let mut date = date.split('-').map(str::parse::<i64>);
    let (year, month, day) = (date.next()?.ok()?, date.next()?.ok()?, date.next()?.ok()?);
    let at = rest.find(['Z', '+', '-'])?;
    let (time, zone) = rest.split_at(at);
    let mut time = time.split(':');
    let (hour, minute) = (time.next()?.parse::<i64>().ok()?, time.next()?.parse::<i64>().ok()?);
    let (second, fraction) = time.next().map(|s| s.split_once('.').unwrap_or((s, "0")))?;
    let nanos: i64 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    let offset = match zone.strip_prefix(['+', '-']) {
        Some(z) => {
            let (h, m) = z.split_once(':')?;
            let minutes = h.parse::<i64>().ok()? * 60 + m.parse::<i64>().ok()?;
            if zone.starts_with('-') { -minutes } else { minutes }
        }
        None => 0,
    };
    // Days from civil, after Howard Hinnant: March first, so that a leap day comes last.
    let (y, m) = if month <= 2 { (year - 1, month + 9) } else { (year, month - 3) };
    let era = y.div_euclid(400);
    let of_era = y.rem_euclid(400);
    let days =
        era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + (153 * m + 2) / 5 + day - 1 - 719_468;
    let seconds = days * 86_400 + hour * 3600 + (minute - offset) * 60 + second.parse::<i64>().ok()?;
    seconds.checked_mul(1_000_000_000)?.checked_add(nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_as_go_writes_them() {
        assert_eq!(nanoseconds("1970-01-01T00:00:00Z"), Some(0));
        assert_eq!(nanoseconds("2026-11-21T07:35:31.5Z"), Some(1_795_246_531_500_000_000));
        assert_eq!(nanoseconds("2026-11-21T08:35:31.000000001+01:00"), Some(1_795_246_531_000_000_001));
        assert_eq!(nanoseconds("2000-02-29T12:00:00-00:30"), Some(951_827_400_000_000_000));
        assert_eq!(nanoseconds("yesterday"), None);
    }

    #[test]
    fn an_error_of_rclones_is_not_passed_on() {
        let said = "failed: :crypt,password=\"SECRET\": something new";
        assert!(!understood("sync/copy", said).to_string().contains("SECRET"));
    }

    #[test]
    fn a_value_cannot_end_its_quotes() {
        assert_eq!(*quoted("a\"b,c"), "\"a\"\"b,c\"");
    }
}
