//! One path of the tree, as the manifest knows it.
//!
//! Refuses: paths that are absolute, that climb (`..`), or that name what is ours (`.cvm`).
//! May import: `manifest::Digest`.

use crate::manifest::Digest;
use cvm_protocol::accounts::CONTAINER_IDS;
use cvm_protocol::paths;
use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

/// What is ours at the top of the volume and of the bucket, and never replicated.
pub(crate) const RESERVED: &[u8] = b".cvm";

/// What may be restored of a mode: whoever runs a file gets no rights of its owner's.
pub(crate) const HARMLESS: u32 = 0o1777;

/// The agent's directories at the top of the volume.
const AGENTS: [&str; 2] = [paths::STATE, paths::CONFIG_HOME];

/// A path relative to /data: any bytes but NUL, in segments that are neither empty, `.` nor `..`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Path(Box<[u8]>);

impl Path {
    pub(crate) fn new(bytes: &[u8]) -> Option<Self> {
        let fine = |s: &[u8]| !s.is_empty() && s != b"." && s != b".." && s.len() <= 255 && !s.contains(&0);
        let reserved = bytes.split(|b| *b == b'/').next() == Some(RESERVED);
        (!reserved && bytes.split(|b| *b == b'/').all(fine)).then(|| Self(bytes.into()))
    }

    pub(crate) fn child(parent: Option<&Self>, name: &[u8]) -> Option<Self> {
        match parent {
            Some(parent) => Self::new(&[&parent.0, &b"/"[..], name].concat()),
            None => Self::new(name),
        }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    pub(crate) fn as_str(&self) -> Option<&str> {
        std::str::from_utf8(&self.0).ok()
    }

    /// The directory part, and the last segment.
    pub(crate) fn split(&self) -> (&[u8], &[u8]) {
        match self.0.iter().rposition(|b| *b == b'/') {
            Some(at) => (self.0.get(..at).unwrap_or_default(), self.0.get(at + 1..).unwrap_or_default()),
            None => (b"", &self.0),
        }
    }

    pub(crate) fn parent(&self) -> Option<Self> {
        let (parent, _) = self.split();
        (!parent.is_empty()).then(|| Self(parent.into()))
    }

    pub(crate) fn name(&self) -> &[u8] {
        self.split().1
    }

    /// Below a directory of the machine.
    pub(crate) fn below(&self, root: &std::path::Path) -> PathBuf {
        root.join(OsStr::from_bytes(&self.0))
    }

    /// Whether it lies in a directory of the agent's.
    fn is_agents(&self) -> bool {
        let top = self.0.split(|byte| *byte == b'/').next();
        AGENTS.iter().any(|path| path.strip_prefix("/data/").map(str::as_bytes) == top)
    }

    pub(crate) fn starts_with(&self, prefix: &[u8]) -> bool {
        self.0.strip_prefix(prefix).is_some_and(|rest| rest.first() == Some(&b'/'))
    }

    /// How rclone names the object: bytes that are no UTF-8 become `‛` and two digits, as its
    /// local backend has it, and a `‛` that could be mistaken for that is doubled.
    pub(crate) fn object(&self) -> String {
        if let Some(text) = self.as_str()
            && !text.contains(QUOTE)
        {
            return text.to_owned();
        }
        let mut name = String::with_capacity(self.0.len() + 8);
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c == QUOTE {
                    name.push(QUOTE);
                }
                name.push(c);
            }
            for byte in chunk.invalid() {
                let _ = fmt::Write::write_fmt(&mut name, format_args!("{QUOTE}{byte:02X}"));
            }
        }
        name
    }

    /// Whether the mount of the bucket shows it under its own name, and a line can name it.
    pub(crate) fn is_plain(&self) -> bool {
        self.as_str().is_some_and(|t| !t.contains(QUOTE) && !t.contains(['\n', '\r']) && t.trim() == t)
    }
}

const QUOTE: char = '\u{201b}';

/// For people, and so that no two paths look the same: an operator gives one back to name it.
impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                if c.is_control() || c == '\\' {
                    write!(f, "{}", c.escape_default())?;
                } else {
                    write!(f, "{c}")?;
                }
            }
            chunk.invalid().iter().try_for_each(|byte| write!(f, "\\x{byte:02x}"))?;
        }
        Ok(())
    }
}

impl fmt::Debug for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{self}\"")
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File {
        size: u64,
        /// None only in a bucket that was adopted and not yet read.
        sha: Option<Digest>,
        database: bool,
    },
    Directory,
    Symlink {
        target: Vec<u8>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_ns: i64,
    /// Paths with the same number are one file.
    pub(crate) link: Option<u64>,
}

impl Entry {
    pub(crate) fn size(&self) -> u64 {
        match self.kind {
            Kind::File { size, .. } => size,
            _ => 0,
        }
    }

    pub(crate) fn is_file(&self) -> bool {
        matches!(self.kind, Kind::File { .. })
    }

    pub(crate) fn is_database(&self) -> bool {
        matches!(self.kind, Kind::File { database: true, .. })
    }

    pub(crate) fn sha(&self) -> Option<Digest> {
        match self.kind {
            Kind::File { sha, .. } => sha,
            _ => None,
        }
    }

    /// As it may be restored on any machine. What lies in a directory of the agent's is the agent's, or a user's
    /// of its containers: a file of root's there would be trusted as root's, and what is in it may be the agent's.
    pub(crate) fn without_rights(mut self, path: &Path, agent: (u32, u32)) -> Self {
        self.mode &= HARMLESS;
        if path.is_agents() {
            let own = |id: u32, agent: u32| if CONTAINER_IDS.contains(&id) { id } else { agent };
            (self.uid, self.gid) = (own(self.uid, agent.0), own(self.gid, agent.1));
        }
        self
    }

    /// Whether both have the same object behind them.
    pub(crate) fn same_content(&self, other: &Self) -> bool {
        match (&self.kind, &other.kind) {
            (Kind::File { size: a, sha: Some(x), .. }, Kind::File { size: b, sha: Some(y), .. }) => {
                a == b && x == y
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_cannot_leave_the_tree_or_name_what_is_ours() {
        for bad in
            [&b""[..], b"/etc", b"a/../b", b"..", b"a//b", b"a/", b"./a", b"a\0", b".cvm", b".cvm/index"]
        {
            assert_eq!(Path::new(bad), None, "{bad:?}");
        }
        for good in [&b"a"[..], b".cvmx", b"a/.cvm", b"..a", b"a/b c/\n", b"\xff"] {
            assert!(Path::new(good).is_some(), "{good:?}");
        }
    }

    #[test]
    fn what_lies_in_the_agents_directories_is_restored_as_the_agents() {
        let entry = |mode: u32, uid: u32, gid: u32| Entry {
            kind: Kind::Directory,
            mode,
            uid,
            gid,
            mtime_ns: 0,
            link: None,
        };
        let restored = |path: &str, entry: Entry| {
            let entry = entry.without_rights(&Path::new(path.as_bytes()).unwrap(), (990, 991));
            (entry.mode, entry.uid, entry.gid)
        };
        for path in ["openclaw", "openclaw/workspace/x", ".config/git"] {
            assert_eq!(restored(path, entry(0o6755, 0, 0)), (0o755, 990, 991), "{path}");
            assert_eq!(restored(path, entry(0o600, 999, 200_999)), (0o600, 990, 200_999), "{path}");
            assert_eq!(restored(path, entry(0o1777, 200_001, 991)), (0o1777, 200_001, 991), "{path}");
        }
        // What an operator keeps beside them stays out of the agent's reach.
        for path in ["backup", "openclaw-mux/queue", "x/openclaw", "openclawx"] {
            assert_eq!(restored(path, entry(0o4700, 0, 18790)), (0o700, 0, 18790), "{path}");
        }
    }

    #[test]
    fn names_that_are_no_utf8_have_the_objects_that_rclone_gives_them() {
        assert_eq!(Path::new(b"a\xff\xfe/b").unwrap().object(), "a\u{201b}FF\u{201b}FE/b");
        assert_eq!(Path::new("x\u{201b}y".as_bytes()).unwrap().object(), "x\u{201b}\u{201b}y");
        assert_eq!(Path::new("größe".as_bytes()).unwrap().object(), "größe");
    }

    #[test]
    fn no_two_paths_look_the_same() {
        let all = [&b"a\xff"[..], b"a\xfe", b"a\\xff", "a\u{fffd}".as_bytes(), b"a\n", b"a\\n", b"a\\\\n"];
        let shown: std::collections::BTreeSet<String> =
            all.iter().map(|bytes| Path::new(bytes).unwrap().to_string()).collect();
        assert_eq!(shown.len(), all.len(), "{shown:?}");
        assert_eq!(Path::new("größe\u{9b}".as_bytes()).unwrap().to_string(), "größe\\u{9b}");
    }

    #[test]
    fn a_path_splits_where_it_should() {
        let path = Path::new(b"a/b/c").unwrap();
        assert_eq!(
            (path.split(), path.parent().unwrap().as_bytes()),
            ((&b"a/b"[..], &b"c"[..]), &b"a/b"[..])
        );
        assert!(path.starts_with(b"a/b") && path.starts_with(b"a") && !path.starts_with(b"a/b/c"));
        assert!(Path::new(b"top").unwrap().parent().is_none());
    }
}
