//! The manifest: what the bucket should hold, and what rclone's layout cannot say of it.
//!
//! It binds every path to size, hash, mode, owner and times, grows by one *segment* for each
//! batch of changes, and authenticates all of it under a key of its own:
//!
//! ```text
//! .cvm/manifest/FROM-TO-EPOCH   a segment: everything that changed between generation FROM and TO
//! a segment                "openclaw-cvm-manifest 2 HMAC\n" and a gzip of JSON lines
//! the first line           the header: from, to, epoch, the chain of digests, and of what it is: prefix and state
//! every other line         one path: an entry, an intent, or a removal
//! ```
//!
//! The state is the chain of segments from 0 to the newest generation, later lines over earlier
//! ones. A segment of many generations replaces those it was merged from. An *intent* is written
//! before the object that it speaks of, so that whichever of two objects a crash leaves behind,
//! the manifest knows it; the *entry* follows when the object is there.
//!
//! Refuses: I/O, a segment whose HMAC is not right (before a byte of it is unpacked), a chain
//! with a gap, and a path that leads out of the tree.
//! May import: `entry`.

use crate::entry::{Entry, Kind, Path};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use hmac::{Hmac, KeyInit, Mac};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fmt;
use std::io::{BufRead, BufReader, Read, Write};
use zeroize::Zeroizing;

const MAGIC: &str = "openclaw-cvm-manifest 2 ";
/// Of versions that did not say of what prefix a segment is.
const UNBOUND_MAGIC: &str = "openclaw-cvm-manifest 1 ";
/// Unpacked; a million entries are a fifth of it.
const UNPACKED_MAX: u64 = 2 << 30;

/// 32 bytes that only a holder of `MASTER_KEY` can make.
pub(crate) struct ManifestKey(Zeroizing<Vec<u8>>);

impl ManifestKey {
    pub(crate) fn new(bytes: Zeroizing<Vec<u8>>) -> Self {
        Self(bytes)
    }

    /// Under a word for the purpose, so that no tag of one kind can stand for another.
    pub(crate) fn tag(&self, purpose: &str, parts: &[&[u8]]) -> Digest {
        // HMAC takes a key of any length.
        let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(&self.0) else { return Digest([0; 32]) };
        mac.update(purpose.as_bytes());
        for part in parts {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part);
        }
        Digest(mac.finalize().into_bytes().into())
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct Digest(pub(crate) [u8; 32]);

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Digest {
    pub(crate) fn parse(hex: &str) -> Option<Self> {
        let mut bytes = [0u8; 32];
        if hex.len() != 64 || !hex.is_ascii() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(hex.as_bytes().chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Self::parse(&text).ok_or_else(|| serde::de::Error::custom("a digest is 64 hexadecimal digits"))
    }
}

/// Where the chain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Head {
    pub(crate) generation: u64,
    pub(crate) digest: Digest,
}

impl Head {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (generation, digest) = text.split_once(':')?;
        Some(Self { generation: generation.parse().ok()?, digest: Digest::parse(digest)? })
    }
}

/// `GENERATION:DIGEST`.
impl fmt::Display for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.generation, self.digest)
    }
}

/// What an operator keeps of a bucket: where it stood, and which state it is. Older versions did not
/// know the second.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Anchor {
    pub(crate) head: Head,
    pub(crate) state: Option<String>,
}

impl Anchor {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (head, state) = match text.match_indices(':').nth(1) {
            Some((at, _)) => (text.get(..at)?, Some(text.get(at + 1..)?.to_owned())),
            None => (text, None),
        };
        Some(Self { head: Head::parse(head)?, state })
    }
}

/// `GENERATION:DIGEST:STATE`.
impl fmt::Display for Anchor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.head)?;
        self.state.as_ref().map_or(Ok(()), |state| write!(f, ":{state}"))
    }
}

/// Of what a segment is. No provider can show it as one of another prefix, or of a state that was
/// begun anew under the same one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Binding {
    pub(crate) prefix: String,
    /// Random, for as long as there is a manifest.
    pub(crate) state: String,
}

/// Which part of the history a segment holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Header {
    pub(crate) from: u64,
    pub(crate) to: u64,
    /// The owner's, when it was written.
    pub(crate) epoch: u64,
    pub(crate) time_ms: u64,
    /// The chain before and after.
    pub(crate) prev: Digest,
    pub(crate) head: Digest,
    /// Older versions did not say.
    #[serde(flatten)]
    pub(crate) of: Option<Binding>,
}

/// What one line says of one path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Word {
    /// The object is there, and is this.
    Is(Entry),
    /// The object is about to become this.
    WillBe(Entry),
    /// The path is gone. Its object may still be there.
    Gone,
    /// And now the object is gone too.
    Deleted,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Line {
    pub(crate) path: Path,
    pub(crate) word: Word,
}

impl Line {
    /// As it may be restored: see [`Entry::without_rights`].
    pub(crate) fn without_rights(self, agent: (u32, u32)) -> Self {
        let Self { path, word } = self;
        let word = match word {
            Word::Is(entry) => Word::Is(entry.without_rights(&path, agent)),
            Word::WillBe(entry) => Word::WillBe(entry.without_rights(&path, agent)),
            word => word,
        };
        Self { path, word }
    }
}

/// Why a segment is not believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Broken {
    /// No segment at all.
    NotOne,
    /// Changed, or made with another key.
    Forged,
    /// Ours by its tag, and yet not understood: written by a newer version.
    Newer,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotOne => "it is no segment of a manifest",
            Self::Forged => "its HMAC is wrong: it was changed, or made with another MASTER_KEY",
            Self::Newer => "it was written by a newer version of openclaw-cvm; use that version",
        })
    }
}

/// The name of a segment below `.cvm/manifest/`. The epoch keeps an owner that lost the bucket
/// from writing over a segment of its successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Name {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) epoch: u64,
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:012}-{:012}-{:06}", self.from, self.to, self.epoch)
    }
}

impl Name {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split('-').map(str::parse);
        let name =
            Self { from: numbers.next()?.ok()?, to: numbers.next()?.ok()?, epoch: numbers.next()?.ok()? };
        (numbers.next().is_none() && name.from < name.to).then_some(name)
    }
}

/// The segments that lead from 0 to the newest generation: of the latest owner, and then the
/// longest first. What is not among them has been merged into one that is, or was written by an
/// owner that did not know yet that it had a successor: epochs never go down along the chain.
pub(crate) fn chain(names: &[Name]) -> Vec<Name> {
    let (mut at, mut epoch) = (0, 0);
    let mut chain = Vec::new();
    while let Some(next) =
        names.iter().filter(|n| n.from == at && n.epoch >= epoch).max_by_key(|n| (n.epoch, n.to))
    {
        chain.push(*next);
        (at, epoch) = (next.to, next.epoch);
    }
    chain
}

/// The next segment after `prev`: its bytes and where the chain stands with it.
pub(crate) fn next_segment(
    key: &ManifestKey,
    prev: Head,
    epoch: u64,
    time_ms: u64,
    lines: &[Line],
    owner: (u32, u32),
    of: &Binding,
) -> std::io::Result<(Vec<u8>, Head)> {
    let body = body_of(lines.iter(), owner);
    let head = Head {
        generation: prev.generation + 1,
        digest: key.tag("chain", &[&prev.digest.0, &Sha256::digest(&body)]),
    };
    let header = Header {
        from: prev.generation,
        to: head.generation,
        epoch,
        time_ms,
        prev: prev.digest,
        head: head.digest,
        of: Some(of.clone()),
    };
    Ok((seal(key, &header, &body)?, head))
}

/// One segment in place of several; `lines` are what is left of them.
pub(crate) fn merged_segment<'a>(
    key: &ManifestKey,
    header: &Header,
    lines: impl Iterator<Item = &'a Line>,
    owner: (u32, u32),
) -> std::io::Result<Vec<u8>> {
    seal(key, header, &body_of(lines, owner))
}

fn seal(key: &ManifestKey, header: &Header, body: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    serde_json::to_writer(&mut gzip, header)?;
    gzip.write_all(b"\n")?;
    gzip.write_all(body)?;
    let packed = gzip.finish()?;
    let magic = if header.of.is_some() { MAGIC } else { UNBOUND_MAGIC };
    let mut segment = format!("{magic}{}\n", key.tag("segment", &[&packed])).into_bytes();
    segment.extend_from_slice(&packed);
    Ok(segment)
}

fn body_of<'a>(lines: impl Iterator<Item = &'a Line>, owner: (u32, u32)) -> Vec<u8> {
    let mut body = Vec::new();
    for line in lines {
        // Into memory, and with keys that are strings: neither can fail.
        let _ = serde_json::to_writer(&mut body, &Written::of(line, owner));
        body.push(b'\n');
    }
    body
}

/// Reads a segment. `owner` is the gateway's user on this machine: entries that were its own
/// elsewhere are its own here, whatever its number is.
pub(crate) fn read_segment(
    key: &ManifestKey,
    bytes: &[u8],
    owner: (u32, u32),
    mut take: impl FnMut(Line),
) -> Result<Header, Broken> {
    let end = bytes.iter().take(200).position(|b| *b == b'\n').ok_or(Broken::NotOne)?;
    let (first, packed) = bytes.split_at_checked(end + 1).ok_or(Broken::NotOne)?;
    let first = std::str::from_utf8(first).map_err(|_| Broken::NotOne)?;
    let (is_bound, tag) = match (first.strip_prefix(MAGIC), first.strip_prefix(UNBOUND_MAGIC)) {
        (Some(tag), _) => (true, tag),
        (_, Some(tag)) => (false, tag),
        (None, None) => return Err(Broken::NotOne),
    };
    let tag = Digest::parse(tag.trim_end()).ok_or(Broken::NotOne)?;
    if key.tag("segment", &[packed]) != tag {
        return Err(Broken::Forged);
    }
    let mut lines = BufReader::new(GzDecoder::new(packed).take(UNPACKED_MAX));
    let mut text = Vec::new();
    let mut header: Option<Header> = None;
    loop {
        text.clear();
        if lines.read_until(b'\n', &mut text).map_err(|_| Broken::Newer)? == 0 {
            break;
        }
        if header.is_none() {
            header = Some(serde_json::from_slice(&text).map_err(|_| Broken::Newer)?);
            continue;
        }
        let written: Written<'_> = serde_json::from_slice(&text).map_err(|_| Broken::Newer)?;
        take(written.line(owner).ok_or(Broken::Newer)?);
    }
    header.filter(|header| header.of.is_some() == is_bound).ok_or(Broken::Newer)
}

/// A line as it is written. Names are short because there are a hundred thousand of them.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written<'a> {
    /// The path, or its bytes in base64 where it is no UTF-8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    p: Option<std::borrow::Cow<'a, str>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pb: Option<String>,
    /// `f` file, `s` `SQLite` database, `d` directory, `l` symbolic link, `x` gone, `xx` deleted.
    t: std::borrow::Cow<'a, str>,
    /// 1: not yet, but soon.
    #[serde(default, skip_serializing_if = "is_zero")]
    i: u8,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sha: Option<Digest>,
    /// Base64 of where a symbolic link leads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mode: Option<u32>,
    /// Absent for the gateway's user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    uid: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gid: Option<u32>,
    /// Modification time in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mt: Option<i64>,
    /// Paths with the same number are one file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ln: Option<u64>,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde calls it so
fn is_zero(n: &u8) -> bool {
    *n == 0
}

impl<'a> Written<'a> {
    fn of(line: &'a Line, owner: (u32, u32)) -> Self {
        let utf8 = line.path.as_str();
        let mut written = Self {
            pb: utf8.is_none().then(|| STANDARD.encode(line.path.as_bytes())),
            p: utf8.map(Into::into),
            t: "x".into(),
            i: 0,
            size: None,
            sha: None,
            to: None,
            mode: None,
            uid: None,
            gid: None,
            mt: None,
            ln: None,
        };
        let entry = match &line.word {
            Word::Gone => return written,
            Word::Deleted => {
                written.t = "xx".into();
                return written;
            }
            Word::Is(entry) => entry,
            Word::WillBe(entry) => {
                written.i = 1;
                entry
            }
        };
        match &entry.kind {
            Kind::File { size, sha, database } => {
                written.t = if *database { "s".into() } else { "f".into() };
                written.size = Some(*size);
                written.sha = *sha;
            }
            Kind::Directory => written.t = "d".into(),
            Kind::Symlink { target } => {
                written.t = "l".into();
                written.to = Some(STANDARD.encode(target));
            }
        }
        written.mode = Some(entry.mode);
        written.uid = (entry.uid != owner.0).then_some(entry.uid);
        written.gid = (entry.gid != owner.1).then_some(entry.gid);
        written.mt = Some(entry.mtime_ns);
        written.ln = entry.link;
        written
    }

    fn line(self, owner: (u32, u32)) -> Option<Line> {
        let path = match (self.p, self.pb) {
            (Some(text), None) => Path::new(text.as_bytes())?,
            (None, Some(bytes)) => Path::new(&STANDARD.decode(bytes).ok()?)?,
            _ => return None,
        };
        let kind = match &*self.t {
            "x" => return Some(Line { path, word: Word::Gone }),
            "xx" => return Some(Line { path, word: Word::Deleted }),
            kind @ ("f" | "s") => Kind::File { size: self.size?, sha: self.sha, database: kind == "s" },
            "d" => Kind::Directory,
            "l" => Kind::Symlink { target: STANDARD.decode(self.to?).ok()? },
            _ => return None,
        };
        let entry = Entry {
            kind,
            mode: self.mode? & 0o7777,
            uid: self.uid.unwrap_or(owner.0),
            gid: self.gid.unwrap_or(owner.1),
            mtime_ns: self.mt?,
            link: self.ln,
        };
        Some(Line { path, word: if self.i == 1 { Word::WillBe(entry) } else { Word::Is(entry) } })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn key() -> ManifestKey {
        ManifestKey::new(Zeroizing::new(vec![7; 32]))
    }

    const ME: (u32, u32) = (990, 990);

    fn of() -> Binding {
        Binding { prefix: "p".to_owned(), state: "s".to_owned() }
    }

    fn file(path: &[u8], uid: u32) -> Line {
        let kind = Kind::File { size: 3, sha: Some(Digest([1; 32])), database: false };
        let entry = Entry { kind, mode: 0o640, uid, gid: 990, mtime_ns: -5, link: Some(4) };
        Line { path: Path::new(path).unwrap(), word: Word::Is(entry) }
    }

    fn read(bytes: &[u8], owner: (u32, u32)) -> Result<(Header, Vec<Line>), Broken> {
        let mut lines = Vec::new();
        let header = read_segment(&key(), bytes, owner, |line| lines.push(line))?;
        Ok((header, lines))
    }

    #[test]
    fn a_segment_reads_back_as_it_was_written() {
        let mut lines = vec![file(b"a/b\n\xff", 990), file("größe".as_bytes(), 0)];
        lines.push(Line { path: Path::new(b"gone").unwrap(), word: Word::Gone });
        lines.push(Line { path: Path::new(b"deleted").unwrap(), word: Word::Deleted });
        let mut soon = file(b"soon", 990);
        soon.word = match soon.word {
            Word::Is(entry) => Word::WillBe(entry),
            word => word,
        };
        lines.push(soon);
        let (bytes, head) = next_segment(&key(), Head::default(), 3, 17, &lines, ME, &of()).unwrap();
        let (header, back) = read(&bytes, ME).unwrap();
        assert_eq!(back, lines);
        assert_eq!((header.from, header.to, header.epoch, header.head), (0, 1, 3, head.digest));
    }

    #[test]
    fn the_gateways_files_are_its_own_whatever_its_number_is() {
        let (bytes, _) =
            next_segment(&key(), Head::default(), 1, 0, &[file(b"a", 990), file(b"b", 0)], ME, &of())
                .unwrap();
        let (_, lines) = read(&bytes, (1234, 5)).unwrap();
        let owners: Vec<_> = lines
            .iter()
            .map(|l| match &l.word {
                Word::Is(e) => (e.uid, e.gid),
                _ => (9, 9),
            })
            .collect();
        assert_eq!(owners, [(1234, 5), (0, 5)]);
    }

    #[test]
    fn a_forged_segment_is_not_unpacked() {
        let (mut bytes, _) =
            next_segment(&key(), Head::default(), 1, 0, &[file(b"a", 990)], ME, &of()).unwrap();
        let other = ManifestKey::new(Zeroizing::new(vec![8; 32]));
        assert_eq!(read_segment(&other, &bytes, ME, |_| ()).unwrap_err(), Broken::Forged);
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        assert_eq!(read(&bytes, ME).unwrap_err(), Broken::Forged);
        assert_eq!(read(b"something else\n", ME).unwrap_err(), Broken::NotOne);
    }

    #[test]
    fn the_chain_prefers_the_latest_owner_then_the_longest_and_ends_at_a_gap() {
        let chained = |names: &[(u64, u64, u64)]| -> Vec<(u64, u64, u64)> {
            let names: Vec<Name> =
                names.iter().map(|(from, to, epoch)| Name { from: *from, to: *to, epoch: *epoch }).collect();
            chain(&names).iter().map(|n| (n.from, n.to, n.epoch)).collect()
        };
        assert_eq!(chained(&[(0, 1, 1), (1, 2, 1), (2, 3, 1)]), [(0, 1, 1), (1, 2, 1), (2, 3, 1)]);
        assert_eq!(chained(&[(0, 1, 1), (1, 2, 1), (0, 2, 1), (2, 3, 1)]), [(0, 2, 1), (2, 3, 1)]);
        assert_eq!(chained(&[(0, 1, 1), (1, 2, 1), (1, 2, 2)]), [(0, 1, 1), (1, 2, 2)]);
        assert_eq!(chained(&[(0, 1, 1), (2, 3, 1)]), [(0, 1, 1)]);
        assert_eq!(chained(&[(1, 2, 1)]), []);
        let name = Name { from: 3, to: 40, epoch: 2 };
        assert_eq!(Name::parse(&name.to_string()), Some(name));
    }

    #[test]
    fn an_anchor_reads_back() {
        let head = Head { generation: 12, digest: Digest([0xab; 32]) };
        assert_eq!(Head::parse(&head.to_string()), Some(head));
        // Those that older versions have shown, and ours.
        for state in [None, Some("0123".to_owned())] {
            let anchor = Anchor { head, state };
            assert_eq!(Anchor::parse(&anchor.to_string()), Some(anchor));
        }
        for bad in ["12:ab", "12", &format!("{head}").replace(':', "-")] {
            assert_eq!(Anchor::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_segment_says_of_what_it_is_or_is_one_of_an_older_version() {
        let sealed = |of: Option<Binding>| {
            let Head { digest, .. } = Head::default();
            let header = Header { from: 0, to: 1, epoch: 1, time_ms: 0, prev: digest, head: digest, of };
            seal(&key(), &header, b"").unwrap()
        };
        let (bound, unbound) = (sealed(Some(of())), sealed(None));
        assert_eq!(read(&bound, ME).unwrap().0.of, Some(of()));
        assert_eq!(read(&unbound, ME).unwrap().0.of, None);
        // Neither passes for the other.
        let passed_off = |bytes: &[u8], from: &str, to: &str| {
            assert!(bytes.starts_with(from.as_bytes()));
            read(&[to.as_bytes(), &bytes[from.len()..]].concat(), ME).unwrap_err()
        };
        assert_eq!(passed_off(&bound, MAGIC, UNBOUND_MAGIC), Broken::Newer);
        assert_eq!(passed_off(&unbound, UNBOUND_MAGIC, MAGIC), Broken::Newer);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = read(&bytes, ME);
        }
    }
}
