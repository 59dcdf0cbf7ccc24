//! The manifest in the bucket: reading the chain, writing the next segment, merging old ones.
//!
//! Refuses to write without the lease's word (the caller asks for it), and to delete a segment
//! that is not covered by another. May import: `bucket`, `entry`, `fault`, `index`, `manifest`,
//! `owner` (its names), `parallel`, `s3`.

use crate::bucket::{Bucket, MANIFEST as DIRECTORY};
use crate::entry::Path;
use crate::fault::{Accepted, Fault};
use crate::index::Index;
use crate::manifest::{self, Anchor, Binding, Head, Header, Line, Name, Word};
use crate::owner;
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
    /// Of what it is.
    binding: Binding,
    /// It begins with what an older version has written, which says of no prefix. It is written anew.
    is_unbound: bool,
    /// The volume has written down which state it is.
    is_noted: bool,
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
    pub(crate) fn empty(owner: (u32, u32), binding: Binding) -> Self {
        Self {
            head: Head::default(),
            owner,
            binding,
            is_unbound: false,
            is_noted: false,
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

    /// Which state it is; not known before a manifest of an older version was written anew.
    pub(crate) fn state(&self) -> Option<&str> {
        (!self.is_unbound).then_some(self.binding.state.as_str())
    }

    /// To be kept by an operator.
    pub(crate) fn anchor(&self) -> Anchor {
        Anchor { head: self.head, state: self.state().map(str::to_owned) }
    }

    /// Reads what the index does not know yet. `adopt`: a manifest of an older version is taken over
    /// by who does not know it.
    pub(crate) fn load(
        bucket: &Bucket,
        index: &Index,
        owner: (u32, u32),
        anchor: Option<Anchor>,
        accepted: &Accepted,
        adopt: bool,
    ) -> Result<Loaded, Fault> {
        let (anchor, anchored) = anchor.map_or((None, None), |Anchor { head, state }| (Some(head), state));
        let fresh = || Ok::<_, Fault>(Self::empty(owner, begun_anew(&bucket.prefix)?));
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
        let mut this = Self { segments: chain.clone(), ..fresh()? };
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
            this = Self { segments: chain.clone(), ..fresh()? };
            match this.read_all(bucket, index, anchor) {
                Err(fault) if accepted.includes(&fault) => {
                    // Whatever the anchor says.
                    index.clear_for_another_tree()?;
                    this = Self { segments: chain, ..fresh()? };
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
        let volume = index.meta("state")?;
        // The first one need not be read where it is known.
        this.is_unbound |= volume.is_none() && chain_begins_unread(&this, continued, known);
        let is_known = continued && !index.is_of_another_tree()?;
        let expected = Expected { is_known, volume, anchor: anchored, adopt };
        match expected.allows(this.state()) {
            Err(fault) if accepted.includes(&fault) => {}
            other => other?,
        }
        this.note_state(index)?;
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
        let (mut bytes, mut is_bound) = (fetch(bucket, &names), false);
        for name in names {
            let Name { from, to, .. } = name;
            let (header, lines) = self.read(bucket, name, bytes.remove(&name))?;
            self.is_of(&header, &mut is_bound)?;
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
        let (mut bytes, mut is_bound) = (fetch(bucket, &names), false);
        index.apply_each(names.into_iter().map(|name| {
            let Name { from, to, .. } = name;
            let (header, lines) = self.read(bucket, name, bytes.remove(&name))?;
            self.is_of(&header, &mut is_bound)?;
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

    /// What this manifest is of: of one state of this prefix, and once it says so it always does.
    fn is_of(&mut self, header: &Header, is_bound: &mut bool) -> Result<(), Fault> {
        match &header.of {
            Some(of) if of.prefix != self.binding.prefix => Err(Fault::config(format!(
                "the manifest in the bucket is that of S3_PREFIX={}, and opens under no other prefix: somebody has copied it, or serves one for the other",
                of.prefix
            ))),
            Some(of) if *is_bound && *of != self.binding => Err(Self::mixed(header)),
            Some(of) => {
                *is_bound = true;
                self.binding = of.clone();
                Ok(())
            }
            None if *is_bound => Err(Self::mixed(header)),
            None => {
                self.is_unbound = true;
                Ok(())
            }
        }
    }

    fn mixed(header: &Header) -> Fault {
        Fault::Suspicious(format!(
            "the manifest does not hang together at generation {}: segments of two histories are mixed",
            header.from
        ))
    }

    /// From here on the volume takes no manifest for its own that does not say of what it is.
    fn note_state(&mut self, index: &Index) -> Result<(), Fault> {
        if !self.is_noted
            && self.head.generation > 0
            && let Some(state) = self.state()
        {
            index.set_meta("state", state)?;
            self.is_noted = true;
        }
        Ok(())
    }

    fn follows(&self, header: &Header) -> Result<(), Fault> {
        if header.from == self.head.generation && header.prev == self.head.digest {
            return Ok(());
        }
        Err(Self::mixed(header))
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
        let (bytes, head) = manifest::next_segment(
            &bucket.key,
            self.head,
            epoch,
            now_ms(),
            lines,
            self.owner,
            &self.binding,
        )?;
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
        self.note_state(index)
    }

    /// Whether a boot would have to read many segments.
    pub(crate) fn wants_merging(&self) -> bool {
        self.segments.len() > LOOSE_MAX || self.is_unbound
    }

    /// One segment in place of many. What it replaces is deleted afterwards.
    pub(crate) fn merge(&mut self, bucket: &Bucket, index: &Index, epoch: u64) -> Result<(), Fault> {
        let files = usize::try_from(index.totals()?.files).unwrap_or(usize::MAX);
        let all = self.is_unbound || self.tail.len() > TAIL_MAX.min(files / 2 + 500);
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
            of: Some(self.binding.clone()),
        };
        let bytes = manifest::merged_segment(&bucket.key, &header, lines.iter(), self.owner)?;
        let name = Name { from: header.from, to: header.to, epoch };
        bucket.write(&format!("{DIRECTORY}/{name}"), &bytes, &When::Always)?;
        self.segments.retain(|n| n.from < header.from || n.from >= header.to);
        self.segments.push(name);
        if all {
            self.base = to;
            self.is_unbound = false;
            self.note_state(index)?;
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

/// Another state than any before.
pub(crate) fn begun_anew(prefix: &str) -> Result<Binding, Fault> {
    Ok(Binding { prefix: prefix.to_owned(), state: owner::random_name()? })
}

/// Whether what the volume knows spared it the beginning.
fn chain_begins_unread(chain: &Chain, continued: bool, known: Head) -> bool {
    continued && chain.segments.first().is_some_and(|first| first.to < known.generation)
}

/// Which manifests are taken for the one that is meant.
struct Expected {
    /// The volume has read it, or written it, up to some generation.
    is_known: bool,
    /// The state that the volume has last seen.
    volume: Option<String>,
    /// The state that the operator has kept.
    anchor: Option<String>,
    adopt: bool,
}

impl Expected {
    fn allows(&self, state: Option<&str>) -> Result<(), Fault> {
        let suspicious = |why: &str| Err(Fault::Suspicious(why.to_owned()));
        match (state, &self.anchor) {
            (Some(state), Some(anchor)) if state != anchor => suspicious(
                "the bucket holds another state than that of STATE_ANCHOR: one that was begun anew",
            ),
            (Some(_), _) => Ok(()),
            (None, Some(_)) => suspicious(
                "the manifest in the bucket is one of an older version, and STATE_ANCHOR is of a newer one: the bucket was set back",
            ),
            (None, None) if self.volume.is_some() => suspicious(
                "the manifest in the bucket is one of an older version, and this volume knows a newer one: the bucket was set back",
            ),
            (None, None) if self.is_known || self.adopt => Ok(()),
            (None, None) => Err(Fault::unadopted(
                "the manifest in the bucket is one of an older version, which does not say of which S3_PREFIX it is: a new machine cannot tell it from another one of this MASTER_KEY",
            )),
        }
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

    fn header(of: Option<&Binding>) -> Header {
        let digest = Head::default().digest;
        Header { from: 0, to: 1, epoch: 1, time_ms: 0, prev: digest, head: digest, of: of.cloned() }
    }

    #[test]
    fn a_manifest_is_of_one_state_of_one_prefix_and_never_goes_back_to_saying_nothing() {
        let [one, other] = ["p", "p"].map(|prefix| begun_anew(prefix).unwrap());
        let elsewhere = begun_anew("elsewhere").unwrap();
        assert_ne!(one, other, "two states of one prefix");
        let read = |segments: &[Option<&Binding>]| {
            let mut chain = Chain::empty((0, 0), begun_anew("p").unwrap());
            let mut is_bound = false;
            let all = segments.iter().try_for_each(|of| chain.is_of(&header(*of), &mut is_bound));
            all.map(|()| (chain.state().map(str::to_owned), chain.wants_merging()))
        };
        assert_eq!(read(&[Some(&one), Some(&one)]), Ok((Some(one.state.clone()), false)));
        assert!(matches!(read(&[Some(&one), Some(&other)]), Err(Fault::Suspicious(_))));
        assert!(matches!(read(&[Some(&one), None]), Err(Fault::Suspicious(_))));
        // One of an older version is written anew, also when that was cut short.
        assert_eq!(read(&[None, None]), Ok((None, true)));
        assert_eq!(read(&[None, Some(&one)]), Ok((None, true)));
        // The attack, and the same without what stands in its way.
        let says = |said| matches!(said, Err(Fault::Config(why)) if why.contains("S3_PREFIX=elsewhere"));
        assert!(says(read(&[Some(&elsewhere)])) && says(read(&[None, Some(&elsewhere)])));
        assert!(read(&[None]).is_ok(), "whatever prefix it is of");
    }

    #[test]
    fn who_has_seen_that_a_manifest_says_of_what_it_is_takes_none_that_does_not() {
        let some = |text: &str| Some(text.to_owned());
        let expected = |is_known, volume, anchor, adopt| Expected { is_known, volume, anchor, adopt };
        let adopts = |said| matches!(said, Err(Fault::Unadopted { .. }));
        let suspects = |said| matches!(said, Err(Fault::Suspicious(_)));
        // A volume that an older version has left goes on; a new machine is told to adopt.
        assert_eq!(expected(true, None, None, false).allows(None), Ok(()));
        assert!(adopts(expected(false, None, None, false).allows(None)));
        assert_eq!(expected(false, None, None, true).allows(None), Ok(()));
        for adopt in [false, true] {
            assert!(suspects(expected(true, some("a"), None, adopt).allows(None)));
            assert!(suspects(expected(true, None, some("a"), adopt).allows(None)));
            assert!(suspects(expected(true, some("a"), some("a"), adopt).allows(Some("b"))));
            assert_eq!(expected(false, None, some("a"), adopt).allows(Some("a")), Ok(()));
            // Another machine may have begun anew meanwhile; then the volume has another past.
            assert_eq!(expected(false, some("a"), None, adopt).allows(Some("b")), Ok(()));
        }
    }

    #[test]
    fn a_summary_has_no_promises_and_the_tail_behind_it_has_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let index = Index::open(&dir.path().join("index")).unwrap();
        let mut chain = Chain::empty((0, 0), begun_anew("p").unwrap());
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
