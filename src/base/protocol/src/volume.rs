//! Decides whether a boot may use a volume, by what the volume remembers of the `MASTER_KEY` that it belongs to.
//!
//! ```text
//! empty                                   -> takes this boot's key, or (without dstack) the absence of one
//! remembers this boot's key               -> good
//! remembers another one, or a later epoch -> refused
//! holds state, remembers nothing, or that there was no key:
//!     good with a proven owner, or where there is no dstack; else refused
//! remembers something that cannot be read -> good with a proven owner, who is told; else refused
//! ```
//!
//! Without this check an environment that an attacker has written would boot on the old volume, with the attacker's
//! keys for SSH and the owner's files. On dstack the first boot of a version that remembers keys might be the
//! attacker's, so there the owner has to prove himself before an old volume is used.
//!
//! The caller reads and writes the files.

use cvm_secrets::secret::Secret;
use serde::{Deserialize, Serialize};

/// The file with the volume's memory, in our own directory on the volume, and the copy that is used if the file
/// cannot be read. Each is written whole, one after the other.
pub const MEMORIES: [&str; 2] = ["volume.json", "volume.json.copy"];
/// The file with this boot's [`Claim`], for `cvm volume`, in our directory of this boot.
pub const CLAIM: &str = "volume-claim.json";

/// What a volume remembers. Its field names are a file format, because a volume outlives the image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// The fingerprint of the key in hex; none if the volume was used without a key.
    pub key: Option<String>,
    /// The fingerprint of the next key, to which the volume belongs as soon as a boot has it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// The highest epoch of a proven owner.
    #[serde(default)]
    pub epoch: u32,
}

/// What a boot claims, to use the volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The fingerprint of its `MASTER_KEY`, in hex.
    pub key: Option<String>,
    /// Whether `CVM_OWNER` proves that the environment is the owner's.
    pub proven: bool,
    pub epoch: u32,
    /// Whether the machine runs on dstack.
    pub dstack: bool,
}

/// What a boot finds on the volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Found {
    /// No state at all.
    Nothing,
    /// State without a memory, from a version that remembered no keys.
    State,
    Memory(Memory),
    /// A memory of which neither the file nor the copy can be read.
    Damaged,
}

impl Found {
    /// The memory in the files of [`MEMORIES`], given in the same order; none if neither exists.
    pub fn in_files<T: AsRef<[u8]>>(files: &[Option<T>]) -> Option<Self> {
        let mut there = files.iter().flatten().map(AsRef::as_ref).peekable();
        there.peek()?;
        Some(there.find_map(|bytes| serde_json::from_slice(bytes).ok()).map_or(Self::Damaged, Self::Memory))
    }
}

/// A boot that may use the volume.
#[derive(Debug, PartialEq, Eq)]
pub struct Good {
    /// What the volume remembers from now on.
    pub memory: Memory,
    /// A line for the boot log.
    pub says: Option<&'static str>,
    /// A remark for `cvm status`, for as long as this boot lasts.
    pub remark: Option<&'static str>,
}

/// Why a boot may not use the volume. Then no key of its environment opens a shell, and nothing on the volume is
/// started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stranger {
    OtherKey,
    NoKey,
    OldEpoch,
    Unproven,
    /// As `Unproven`, if neither the volume nor the environment has a key.
    UnprovenKeyless,
    Keyless,
    Damaged,
}

impl Stranger {
    /// What is wrong and what to do, for the owner. Public.
    pub fn words(self) -> &'static str {
        match self {
            Self::OtherKey => {
                "the volume belongs to another MASTER_KEY than the one of this environment, so no shell is opened and \
                 no gateway started. Correct MASTER_KEY and deploy again. If the key is meant to change: deploy with the \
                 old one, and there tell the volume of the new one by `cvm volume adopt`; on a docker host of your own \
                 `docker exec -it CONTAINER cvm volume adopt` does it at once"
            }
            Self::NoKey => {
                "the volume belongs to a MASTER_KEY, and this environment has none, so no shell is opened and no gateway \
                 started. Set MASTER_KEY again and deploy; on a docker host of your own `docker exec -it CONTAINER cvm \
                 volume adopt` goes on without one"
            }
            Self::OldEpoch => {
                "CVM_OWNER_EPOCH is lower than one that this volume has seen, so this may be an old environment that \
                 somebody has put back: no shell is opened and no gateway started. Deploy with the epoch of your last \
                 deployment, or a higher one, and with the CVM_OWNER of that epoch set: without it an epoch counts as 0"
            }
            Self::Unproven => {
                "the volume holds a state and remembers no MASTER_KEY, and on dstack anybody who reaches the host can \
                 write an environment: no shell is opened and no gateway started before the owner has proven himself. \
                 Print CVM_OWNER with `cvm derive owner` on your own machine, write it into the compose file with \
                 `image/pin --owner`, and deploy again with the same MASTER_KEY; the state stays as it is"
            }
            Self::UnprovenKeyless => {
                "the volume holds a state and this environment has no MASTER_KEY, and on dstack anybody who reaches the \
                 host can write an environment: no shell is opened and no gateway started before the owner has proven \
                 himself. Make a key with `openssl rand -base64 32`, set it as MASTER_KEY, write CVM_OWNER (`cvm derive \
                 owner`) into the compose file with `image/pin --owner`, and deploy again: the state stays as it is, the \
                 gateway's token and the SSH host key change then. Or prove yourself by CVM_OWNER_TOKEN"
            }
            Self::Keyless => {
                "this environment has no MASTER_KEY, and on dstack the next boot on this volume could not be told from \
                 somebody else's: no shell is opened and no gateway started. Set MASTER_KEY and deploy again"
            }
            Self::Damaged => {
                "what the volume remembers of its MASTER_KEY is damaged (/data/.cvm/volume.json, and its copy beside it), so \
                 no shell is opened and no gateway started. Deploy with CVM_OWNER set, and the volume is this MASTER_KEY's \
                 again; on a docker host of your own `docker exec -it CONTAINER cvm volume adopt` makes it anew"
            }
        }
    }
}

const TAKEN_OVER: &str = "The volume holds a state of a version that remembered no key; from now on it belongs to this \
                          MASTER_KEY, and another one does not open it";
const NOW_KEYED: &str = "The volume was used without MASTER_KEY; from now on it belongs to this one";
const CHANGED: &str =
    "The volume belongs to the new MASTER_KEY from now on, and the old one does not open it any more";
const DAMAGED: &str = "What the volume remembered of its MASTER_KEY was damaged (/data/.cvm/volume.json and its copy), \
                       and so was the highest CVM_OWNER_EPOCH. The owner has proven himself, and from now on the volume \
                       belongs to this MASTER_KEY and epoch. Look at the disk: `cvm doctor`";

pub fn judge(claim: &Claim, found: Found) -> Result<Good, Stranger> {
    // Without dstack, anyone who writes the environment can read the volume anyway.
    let trusted = claim.proven || !claim.dstack;
    let own = |epoch: u32| Memory { key: claim.key.clone(), next: None, epoch };
    let good = |memory, says| Good { memory, says, remark: None };
    let unproven = if claim.key.is_some() { Stranger::Unproven } else { Stranger::UnprovenKeyless };
    let memory = match found {
        // An attacker may have damaged the memory, without dstack too.
        Found::Damaged if !claim.proven => return Err(Stranger::Damaged),
        Found::Damaged => {
            return Ok(Good { memory: own(claim.epoch()), says: None, remark: Some(DAMAGED) });
        }
        Found::Nothing if !trusted && claim.key.is_none() => return Err(Stranger::Keyless),
        Found::Nothing => return Ok(good(own(claim.epoch()), None)),
        Found::State if !trusted => return Err(unproven),
        Found::State => return Ok(good(own(claim.epoch()), claim.key.is_some().then_some(TAKEN_OVER))),
        Found::Memory(memory) => memory,
    };
    if claim.epoch() < memory.epoch {
        return Err(Stranger::OldEpoch);
    }
    let epoch = claim.epoch();
    match (&claim.key, &memory.key) {
        (None, Some(_)) => Err(Stranger::NoKey),
        (_, None) if !trusted => Err(unproven),
        (Some(key), Some(kept)) if same(key, kept) => Ok(good(Memory { epoch, ..memory }, None)),
        (Some(key), Some(_)) if memory.next.as_ref().is_some_and(|next| same(key, next)) => {
            Ok(good(own(epoch), Some(CHANGED)))
        }
        (Some(_), Some(_)) => Err(Stranger::OtherKey),
        (key, None) => Ok(good(own(epoch), key.is_some().then_some(NOW_KEYED))),
    }
}

impl Claim {
    /// The epoch, or 0 if it is not proven: an attacker's high epoch would lock the owner out.
    fn epoch(&self) -> u32 {
        if self.proven { self.epoch } else { 0 }
    }
}

fn same(a: &str, b: &str) -> bool {
    Secret::copy_of(a.as_bytes()).matches(b.as_bytes())
}

/// Whether an operator, who is root in this boot already, may give the volume to this boot's key.
pub fn may_adopt(claim: &Claim) -> Result<(), &'static str> {
    if claim.dstack && !claim.proven {
        return Err("this environment has not proven to be its owner's, and on dstack anybody can write one");
    }
    Ok(())
}

/// The memory that gives the volume to this boot's key, whatever it remembered.
pub fn adopted(claim: &Claim) -> Memory {
    Memory { key: claim.key.clone(), next: None, epoch: claim.epoch() }
}

/// The text of a fingerprint, as `cvm derive volume-fingerprint` prints it.
pub fn is_fingerprint(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim(key: &str) -> Claim {
        let key = (!key.is_empty()).then(|| key.repeat(64));
        Claim { key, proven: false, epoch: 0, dstack: true }
    }

    fn proven(key: &str, epoch: u32) -> Claim {
        Claim { proven: true, epoch, ..claim(key) }
    }

    fn at_home(key: &str) -> Claim {
        Claim { dstack: false, ..claim(key) }
    }

    fn remembers(key: &str, epoch: u32) -> Found {
        Found::Memory(Memory { key: claim(key).key, next: None, epoch })
    }

    fn refused(claim: &Claim, found: Found) -> Stranger {
        judge(claim, found).unwrap_err()
    }

    fn kept(claim: &Claim, found: Found) -> Memory {
        judge(claim, found).unwrap().memory
    }

    #[test]
    fn a_new_volume_belongs_to_whoever_comes_first_and_to_nobody_else() {
        for first in [claim("a"), at_home("a"), proven("a", 2)] {
            let memory = kept(&first, Found::Nothing);
            assert_eq!(memory, Memory { key: claim("a").key, next: None, epoch: first.epoch });
            assert_eq!(kept(&first, Found::Memory(memory.clone())), memory);
            for other in [claim("b"), at_home("b"), proven("b", 2)] {
                assert_eq!(
                    refused(&other, Found::Memory(memory.clone())),
                    match first.epoch {
                        2 if !other.proven => Stranger::OldEpoch,
                        _ => Stranger::OtherKey,
                    }
                );
            }
        }
        assert_eq!(refused(&claim(""), Found::Nothing), Stranger::Keyless, "it could not come back");
        assert_eq!(kept(&at_home(""), Found::Nothing), Memory::default());
        assert_eq!(refused(&claim(""), remembers("a", 0)), Stranger::NoKey);
        assert_eq!(refused(&proven("", 0), remembers("a", 0)), Stranger::NoKey);
        assert_eq!(refused(&at_home(""), remembers("a", 0)), Stranger::NoKey);
    }

    #[test]
    fn on_dstack_an_old_volume_waits_for_its_owner_to_prove_himself() {
        for found in [Found::State, remembers("", 0)] {
            assert_eq!(refused(&claim("b"), found.clone()), Stranger::Unproven, "{found:?}");
            assert_eq!(refused(&claim(""), found.clone()), Stranger::UnprovenKeyless, "{found:?}");
            // The control: an owner with a proof, and a boot without dstack.
            for owner in [proven("a", 0), at_home("a")] {
                let good = judge(&owner, found.clone()).unwrap();
                assert_eq!((good.memory.key, good.says.is_some()), (claim("a").key, true), "{found:?}");
            }
            assert_eq!(kept(&at_home(""), found).key, None);
        }
    }

    #[test]
    fn an_environment_from_before_the_epoch_was_raised_is_refused_whatever_it_proves() {
        for old in [proven("a", 1), proven("a", 0), claim("a"), at_home("a")] {
            assert_eq!(refused(&old, remembers("a", 2)), Stranger::OldEpoch);
        }
        assert_eq!(kept(&proven("a", 2), remembers("a", 2)).epoch, 2);
        assert_eq!(kept(&proven("a", 3), remembers("a", 2)).epoch, 3, "and the highest is kept");
        let unproven = Claim { epoch: 9, ..claim("a") };
        assert_eq!(kept(&unproven, remembers("a", 0)).epoch, 0, "or a forger could lock the owner out");
    }

    #[test]
    fn a_new_key_takes_over_once_it_was_announced_and_the_old_one_is_void() {
        let announced = Memory { next: claim("b").key, ..kept(&claim("a"), Found::Nothing) };
        assert_eq!(
            kept(&claim("a"), Found::Memory(announced.clone())),
            announced,
            "the old one goes on until then"
        );
        assert_eq!(refused(&claim("c"), Found::Memory(announced.clone())), Stranger::OtherKey);
        let good = judge(&claim("b"), Found::Memory(announced)).unwrap();
        assert!(good.says.is_some());
        assert_eq!(refused(&claim("a"), Found::Memory(good.memory)), Stranger::OtherKey);
    }

    #[test]
    fn a_memory_that_cannot_be_read_is_not_taken_for_none() {
        for any in [claim("a"), claim(""), at_home("a"), at_home("")] {
            assert_eq!(refused(&any, Found::Damaged), Stranger::Damaged);
        }
    }

    #[test]
    fn a_proven_owner_gets_a_volume_back_whose_memory_is_damaged_and_is_told() {
        let owner = proven("a", 3);
        let good = judge(&owner, Found::Damaged).unwrap();
        assert_eq!(good.memory, Memory { key: claim("a").key, next: None, epoch: 3 });
        assert!(good.remark.is_some_and(|text| text.contains("damaged") && text.contains("CVM_OWNER_EPOCH")));
        assert!(judge(&owner, Found::Memory(good.memory)).unwrap().remark.is_none(), "once");
    }

    #[test]
    fn the_copy_counts_when_the_file_cannot_be_read_and_nothing_when_neither_can() {
        let memory = |key: &str| Memory { key: claim(key).key, ..Memory::default() };
        let text = |key: &str| Some(serde_json::to_vec(&memory(key)).unwrap());
        let damaged = || Some(b"{\"key\"".to_vec());
        for (files, found) in [
            ([text("a"), text("b")], Some(Found::Memory(memory("a")))),
            ([text("a"), damaged()], Some(Found::Memory(memory("a")))),
            ([text("a"), None], Some(Found::Memory(memory("a")))),
            ([damaged(), text("b")], Some(Found::Memory(memory("b")))),
            ([None, text("b")], Some(Found::Memory(memory("b")))),
            ([damaged(), Some(Vec::new())], Some(Found::Damaged)),
            ([damaged(), None], Some(Found::Damaged)),
            ([None, damaged()], Some(Found::Damaged)),
            ([None, None], None),
        ] {
            assert_eq!(Found::in_files(&files), found, "{files:?}");
        }
    }

    #[test]
    fn who_is_root_here_gives_the_volume_to_a_key_but_not_on_an_unproven_dstack() {
        assert!(may_adopt(&claim("b")).is_err());
        assert!(may_adopt(&proven("b", 0)).is_ok() && may_adopt(&at_home("b")).is_ok());
        let memory = adopted(&at_home("b"));
        assert_eq!(kept(&at_home("b"), Found::Memory(memory.clone())), memory);
    }

    #[test]
    fn every_refusal_says_what_does_not_happen_and_what_to_do() {
        use Stranger::*;
        for stranger in [OtherKey, NoKey, OldEpoch, Unproven, UnprovenKeyless, Keyless, Damaged] {
            let words = stranger.words();
            assert!(words.contains("no shell is opened") && words.len() < 700, "{words}");
            assert!(words.contains("eploy"), "there is no docker exec on dstack: {words}");
            assert!(!words.contains("docker exec CONTAINER"), "it asks, and wants a terminal: {words}");
        }
        let of = |stranger: Stranger, named: &str| assert!(stranger.words().contains(named), "{stranger:?}");
        of(OldEpoch, "CVM_OWNER of that epoch");
        of(Damaged, "CVM_OWNER set");
        of(UnprovenKeyless, "CVM_OWNER_TOKEN");
        assert!(!UnprovenKeyless.words().contains("same MASTER_KEY"), "it has none");
    }

    #[test]
    fn a_memory_of_a_later_version_is_read_and_an_empty_file_is_none() {
        let text = r#"{"key":"aa","epoch":4,"more":{"x":1}}"#;
        let memory: Memory = serde_json::from_str(text).unwrap();
        assert_eq!((memory.key.as_deref(), memory.epoch, memory.next), (Some("aa"), 4, None));
        assert!(serde_json::from_str::<Memory>("").is_err());
    }
}
