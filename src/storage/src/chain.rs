//! The manifest in the bucket: reading the chain, writing the next segment, merging old ones.
//!
//! Refuses to write without the lease's word (the caller asks for it), and to delete a segment
//! that is not covered by another. May import: `bucket`, `entry`, `fault`, `index`, `manifest`,
//! `parallel`, `s3`.

use crate::bucket::{Bucket, MANIFEST as DIRECTORY};
use crate::entry::Path;
use crate::fault::{Accepted, Fault};
use crate::index::Index;
use crate::manifest::{self, Head, Header, Line, Name, Word};
use crate::parallel;
use crate::s3::When;
use std::collections::{BTreeMap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

/// Segments after the merged ones before they are merged too: how many a boot has to read.
const LOOSE_MAX: usize = 48;
/// Lines in memory. Above this, or above half of all files, everything is written anew instead.
const TAIL_MAX: usize = 20_000;
/// Lines in one segment where there can be as many as there are files.
pub(crate) const LINES: usize = 5000;
/// Segments that are fetched at once.
const PARALLEL: usize = 8;

pub(crate) struct Chain {
    pub(crate) head: Head,
    pub(crate) owner: (u32, u32),
    segments: Vec<Name>,
    /// Where the chain stood before the lines in `tail`.
    base: Head,
    /// What was written since the segment that starts at 0: the last word on each path.
    tail: BTreeMap<Path, Last>,
    /// The newest one, when nobody knows whether it has arrived.
    unsure: Option<Segment>,
}

struct Segment {
    name: Name,
    bytes: Vec<u8>,
    head: Head,
    lines: Vec<Line>,
}

#[derive(Default)]
struct Last {
    settled: Option<Word>,
    /// Each of them may have arrived: an answer that was lost says nothing.
    intents: Vec<Word>,
}

/// What loading found.
pub(crate) struct Loaded {
    pub(crate) chain: Chain,
    /// Paths whose object may be either of two.
    pub(crate) intents: Vec<Line>,
    /// Whether the volume knew this chain up to here.
    pub(crate) continued: bool,
    /// The operator has accepted that it is not all there was.
    pub(crate) is_cut: bool,
}

impl Chain {
    /// Where a bucket without a manifest starts.
    pub(crate) fn empty(owner: (u32, u32)) -> Self {
        Self {
            head: Head::default(),
            owner,
            segments: Vec::new(),
            base: Head::default(),
            tail: BTreeMap::new(),
            unsure: None,
        }
    }

    fn names(bucket: &Bucket) -> Result<Vec<Name>, Fault> {
        Ok(bucket.list(DIRECTORY)?.iter().filter_map(|(n, _)| Name::parse(n)).collect())
    }

    /// The latest owner that has written anything, and how far it has come.
    pub(crate) fn newest(bucket: &Bucket) -> Result<(u64, u64), Fault> {
        Ok(Self::names(bucket)?.iter().map(|n| (n.epoch, n.to)).max().unwrap_or_default())
    }

    /// What is wrong with a manifest that does not go as far as its last owner had come.
    pub(crate) fn lacks(&self, reached: u64) -> Option<String> {
        let has = self.head.generation;
        (has < reached).then(|| {
            format!(
                "the end of the manifest is missing: it is at generation {has}, and its last owner had come to {reached}"
            )
        })
    }

    /// Reads what the index does not know yet.
    pub(crate) fn load(
        bucket: &Bucket,
        index: &Index,
        owner: (u32, u32),
        anchor: Option<Head>,
        accepted: &Accepted,
    ) -> Result<Loaded, Fault> {
        let known = index.head()?;
        let names = Self::names(bucket)?;
        let chain = manifest::chain(&names);
        let generation = chain.last().map_or(0, |n| n.to);
        let last_epoch = chain.last().map_or(0, |n| n.epoch);
        let newest = names.iter().filter(|n| n.epoch >= last_epoch).map(|n| n.to).max().unwrap_or(0);
        let mut is_cut = false;
        if newest > generation {
            accepted.or_refuse(format!(
                "the manifest has a gap: generation {newest} is there, and what leads to it is not complete after {generation}"
            ))?;
            is_cut = true;
        }
        if generation < known.generation {
            accepted.or_refuse(format!(
                "the bucket is older than this volume: it is at generation {generation}, and {} was written from here",
                known.generation
            ))?;
            is_cut = true;
        }
        let anchor = match anchor {
            Some(anchor) if generation < anchor.generation => {
                accepted.or_refuse(format!(
                    "the bucket is older than STATE_ANCHOR: it is at generation {generation}, the anchor is {}",
                    anchor.generation
                ))?;
                is_cut = true;
                None
            }
            other => other,
        };
        let mut this = Self { segments: chain.clone(), ..Self::empty(owner) };
        // From the segment that ends where the index stands; its digest is checked on the way. A bucket
        // that has but the first, of our own, is one of which a crash has cut off the answer.
        let at_boundary = match known.generation {
            0 => matches!(&chain[..], [only] if Some(only.epoch) == index.own_epoch()?),
            known => chain.iter().any(|n| n.to == known),
        };
        let continued = at_boundary
            && match this.read_on(bucket, index, known, anchor) {
                Err(fault) if accepted.includes(&fault) => false,
                other => other?,
            };
        if !continued {
            index.clear_for_another_tree()?;
            this = Self { segments: chain.clone(), ..Self::empty(owner) };
            match this.read_all(bucket, index, anchor) {
                Err(fault) if accepted.includes(&fault) => {
                    // Whatever the anchor says.
                    index.clear_for_another_tree()?;
                    this = Self { segments: chain, ..Self::empty(owner) };
                    match this.read_all(bucket, index, None) {
                        Err(fault) if accepted.includes(&fault) => {
                            this.cut_here();
                            is_cut = true;
                        }
                        other => other?,
                    }
                }
                other => other?,
            }
        }
        if accepted.is_any() {
            this.only_these(bucket, &names)?;
        }
        let intents = this.open_intents();
        Ok(Loaded { chain: this, intents, continued, is_cut })
    }

    /// Reads all of the tail, and gives the index only what is new to it. False when the chain is
    /// not the one that the index knows.
    fn read_on(
        &mut self,
        bucket: &Bucket,
        index: &Index,
        known: Head,
        anchor: Option<Head>,
    ) -> Result<bool, Fault> {
        let mut fresh: Vec<(Vec<Line>, Head)> = Vec::new();
        // The great first one is only read when the index ends with it.
        let is_read = |name: &&Name| name.from != 0 || name.to >= known.generation;
        let names: Vec<Name> = self.segments.iter().filter(is_read).copied().collect();
        let mut bytes = fetch(bucket, &names);
        for name in names {
            let Name { from, to, .. } = name;
            let (header, lines) = self.read(bucket, name, bytes.remove(&name))?;
            let head = Head { generation: to, digest: header.head };
            if to == known.generation && header.head != known.digest {
                return Ok(false);
            }
            check_anchor(anchor, head)?;
            if from == 0 {
                (self.head, self.base) = (head, head);
                if known.generation == 0 {
                    fresh.push((lines, head));
                }
                continue;
            }
            if self.head == Head::default() {
                (self.head, self.base) = (
                    Head { generation: from, digest: header.prev },
                    Head { generation: from, digest: header.prev },
                );
            }
            self.follows(&header)?;
            self.remember(&lines);
            self.head = head;
            if to > known.generation {
                fresh.push((lines, head));
            }
        }
        index.apply_each(fresh.into_iter().map(Ok))?;
        Ok(true)
    }

    fn read_all(&mut self, bucket: &Bucket, index: &Index, anchor: Option<Head>) -> Result<(), Fault> {
        let names = self.segments.clone();
        let mut bytes = fetch(bucket, &names);
        index.apply_each(names.into_iter().map(|name| {
            let Name { from, to, .. } = name;
            let (header, lines) = self.read(bucket, name, bytes.remove(&name))?;
            self.follows(&header)?;
            let head = Head { generation: to, digest: header.head };
            check_anchor(anchor, head)?;
            self.head = head;
            if from == 0 {
                self.base = self.head;
            } else {
                self.remember(&lines);
            }
            Ok((lines, head))
        }))
    }

    /// What was read is the chain from now on.
    fn cut_here(&mut self) {
        let end = self.head.generation;
        self.segments.retain(|n| n.to <= end);
    }

    /// Deletes what does not belong to the chain: the next segments take the numbers of those that
    /// were given up, and must not be mistaken for theirs.
    fn only_these(&self, bucket: &Bucket, names: &[Name]) -> Result<(), Fault> {
        let foreign = names.iter().filter(|n| !self.segments.contains(n));
        foreign.into_iter().try_for_each(|name| bucket.delete(&format!("{DIRECTORY}/{name}")))
    }

    fn follows(&self, header: &Header) -> Result<(), Fault> {
        if header.from == self.head.generation && header.prev == self.head.digest {
            return Ok(());
        }
        Err(Fault::Suspicious(format!(
            "the manifest does not hang together at generation {}: segments of two histories are mixed",
            header.from
        )))
    }

    fn read(
        &self,
        bucket: &Bucket,
        name: Name,
        fetched: Option<Result<Option<Vec<u8>>, Fault>>,
    ) -> Result<(Header, Vec<Line>), Fault> {
        let broken = |why: &str| Fault::Suspicious(format!("the manifest's segment {name}: {why}"));
        let Some(bytes) = fetched.transpose()?.flatten() else {
            return Err(broken("it vanished while it was read"));
        };
        let mut lines = Vec::new();
        let header = manifest::read_segment(&bucket.key, &bytes, self.owner, |line| {
            lines.push(line.without_rights(self.owner));
        })
        .map_err(|e| broken(&e.to_string()))?;
        if (header.from, header.to, header.epoch) != (name.from, name.to, name.epoch) {
            return Err(broken("it was swapped for another one"));
        }
        Ok((header, lines))
    }

    fn remember(&mut self, lines: &[Line]) {
        for Line { path, word } in lines {
            let last = self.tail.entry(path.clone()).or_default();
            match word {
                Word::WillBe(_) if last.intents.contains(word) => {}
                Word::WillBe(_) => last.intents.push(word.clone()),
                _ => *last = Last { settled: Some(word.clone()), intents: Vec::new() },
            }
        }
    }

    /// Writes the next segment, and then into the index what it says. When it is uncertain whether
    /// both have happened, it has to be settled before the next one.
    pub(crate) fn append(
        &mut self,
        bucket: &Bucket,
        index: &Index,
        epoch: u64,
        lines: &[Line],
    ) -> Result<(), Fault> {
        if self.unsure.is_some() {
            return Err(Fault::other("it is not settled yet whether the last segment has arrived"));
        }
        // What begins at 0 is skipped by whoever knows its end: no intent may be in it.
        if self.head.generation == 0 && lines.iter().any(|line| matches!(line.word, Word::WillBe(_))) {
            self.append(bucket, index, epoch, &[])?;
        }
        let (bytes, head) =
            manifest::next_segment(&bucket.key, self.head, epoch, now_ms(), lines, self.owner)?;
        let name = Name { from: self.head.generation, to: head.generation, epoch };
        self.unsure = Some(Segment { name, bytes, head, lines: lines.to_vec() });
        self.settle(bucket, index)
    }

    pub(crate) fn is_unsure(&self) -> bool {
        self.unsure.is_some()
    }

    /// Writes a segment that may have arrived once more, byte for byte, and believes in it from then
    /// on. Another one of the same name would be changed into this one by a request that was given
    /// up here, and that something on the way has kept until then.
    pub(crate) fn settle(&mut self, bucket: &Bucket, index: &Index) -> Result<(), Fault> {
        let Some(Segment { name, bytes, head, lines }) = &self.unsure else { return Ok(()) };
        bucket.write(&format!("{DIRECTORY}/{name}"), bytes, &When::Always)?;
        index.apply(lines, Some(*head))?;
        if let Some(Segment { name, head, lines, .. }) = self.unsure.take() {
            if self.head.generation == 0 {
                self.base = head;
            } else {
                self.remember(&lines);
            }
            self.segments.push(name);
            self.head = head;
        }
        Ok(())
    }

    /// Whether a boot would have to read many segments.
    pub(crate) fn wants_merging(&self) -> bool {
        self.segments.len() > LOOSE_MAX
    }

    /// One segment in place of many. What it replaces is deleted afterwards.
    pub(crate) fn merge(&mut self, bucket: &Bucket, index: &Index, epoch: u64) -> Result<(), Fault> {
        let files = usize::try_from(index.totals()?.files).unwrap_or(usize::MAX);
        let all = self.tail.len() > TAIL_MAX.min(files / 2 + 500);
        let to = self.head;
        let (from, lines) =
            if all { (Head::default(), everything(index)?) } else { (self.base, self.tail_lines()) };
        // Intents have no place in a summary of the index: they are said anew after it.
        let open = if all { self.open_intents() } else { Vec::new() };
        if !open.is_empty() {
            self.append(bucket, index, epoch, &open)?;
        }
        let header = Header {
            from: from.generation,
            to: to.generation,
            epoch,
            time_ms: now_ms(),
            prev: from.digest,
            head: to.digest,
        };
        let bytes = manifest::merged_segment(&bucket.key, &header, lines.iter(), self.owner)?;
        let name = Name { from: header.from, to: header.to, epoch };
        bucket.write(&format!("{DIRECTORY}/{name}"), &bytes, &When::Always)?;
        self.segments.retain(|n| n.from < header.from || n.from >= header.to);
        self.segments.push(name);
        if all {
            self.base = to;
            self.forget_settled();
        }
        // Those too that an earlier merge could not delete; not those of a successor.
        let is_covered =
            |old: &Name| old.to <= header.to && old.epoch <= epoch && !self.segments.contains(old);
        for old in Self::names(bucket)?.iter().filter(|old| is_covered(old)) {
            bucket.delete(&format!("{DIRECTORY}/{old}"))?;
        }
        Ok(())
    }

    fn forget_settled(&mut self) {
        self.tail.retain(|_, last| {
            last.settled = None;
            !last.intents.is_empty()
        });
    }

    fn open_intents(&self) -> Vec<Line> {
        let intents = |(path, last): (&Path, &Last)| {
            last.intents
                .iter()
                .map(|word| Line { path: path.clone(), word: word.clone() })
                .collect::<Vec<_>>()
        };
        self.tail.iter().flat_map(intents).collect()
    }

    fn tail_lines(&self) -> Vec<Line> {
        let words = |path: &Path, last: &Last| {
            let line = |word: &Word| Line { path: path.clone(), word: word.clone() };
            last.settled.iter().chain(&last.intents).map(line).collect::<Vec<_>>()
        };
        self.tail.iter().flat_map(|(path, last)| words(path, last)).collect()
    }
}

/// The bytes of segments; `None` for one that is not there.
fn fetch(bucket: &Bucket, names: &[Name]) -> HashMap<Name, Result<Option<Vec<u8>>, Fault>> {
    let one = |name: Name| {
        let found = bucket.read(&format!("{DIRECTORY}/{name}"));
        (name, found.map(|found| found.map(|(bytes, _)| bytes)))
    };
    parallel::each(names.to_vec(), PARALLEL, one).into_iter().collect()
}

fn everything(index: &Index) -> Result<Vec<Line>, Fault> {
    // What is at a path now comes after what was: a directory may stand where a file was.
    let tombs = index.tombs(usize::MAX)?;
    let mut lines: Vec<Line> = tombs.into_iter().map(|path| Line { path, word: Word::Gone }).collect();
    // What was only promised is no entry.
    let rows = index.all()?.into_iter().filter(|(_, row)| !row.promised);
    lines.extend(rows.map(|(path, row)| Line { path, word: Word::Is(row.entry) }));
    Ok(lines)
}

fn check_anchor(anchor: Option<Head>, head: Head) -> Result<(), Fault> {
    if anchor.is_none_or(|a| a.generation != head.generation || a.digest == head.digest) {
        return Ok(());
    }
    Err(Fault::Suspicious(format!(
        "the bucket's history is not the one of STATE_ANCHOR: generation {} has another digest",
        head.generation
    )))
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Entry, Kind};
    use crate::manifest::Digest;

    fn entry(size: u64) -> Entry {
        let kind = Kind::File { size, sha: Some(Digest([1; 32])), database: false };
        Entry { kind, mode: 0o600, uid: 0, gid: 0, mtime_ns: 0, link: None }
    }

    fn line(path: &str, word: Word) -> Line {
        Line { path: Path::new(path.as_bytes()).unwrap(), word }
    }

    #[test]
    fn a_summary_has_no_promises_and_the_tail_behind_it_has_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open(&dir.path().join("index")).unwrap();
        let mut chain = Chain::empty((0, 0));
        let lines = [
            line("was", Word::Is(entry(1))),
            line("was", Word::WillBe(entry(2))),
            line("never", Word::WillBe(entry(3))),
            line("is", Word::WillBe(entry(4))),
            line("is", Word::Is(entry(4))),
        ];
        chain.remember(&lines);
        index.apply(&lines, None).unwrap();
        let summary = everything(&index).unwrap();
        assert_eq!(summary, [line("is", Word::Is(entry(4))), line("was", Word::Is(entry(1)))]);
        let open = [line("never", Word::WillBe(entry(3))), line("was", Word::WillBe(entry(2)))];
        assert_eq!(chain.open_intents(), open);
        chain.forget_settled();
        assert_eq!(chain.tail_lines(), open);
    }
}
