//! What a flush waits for while files are renamed.
//!
//! A round may miss what is renamed while it looks, and with a busy tree each round misses something.
//! A flush does not wait for one that misses nothing, which may never come: it waits until every file
//! that was missed by the round which began after the question has been met since, or is gone.
//!
//! Refuses to go on for ever. May import: `push`, `rules`, `cvm-process`.

use super::Tree;
use crate::push::Rest;
use crate::rules;
use cvm_process::handle::{Fate, Handle};
use std::collections::HashSet;
use std::fs::File;

/// Rounds for which one goes on.
const MOST: u32 = 20;

#[derive(Debug, Default)]
pub(super) struct Chase {
    /// This round is the first since somebody asked, or the one before could not say what it missed.
    begins: bool,
    rounds: u32,
    missing: HashSet<Handle>,
}

impl Chase {
    /// Somebody has asked: what the round that begins now misses has to be met.
    pub(super) fn begin(&mut self) {
        self.begins = true;
    }

    /// A round has ended that missed these, and, if it `lost_sight`, others that nobody knows.
    pub(super) fn ends(
        &mut self,
        missed: &HashSet<Handle>,
        lost_sight: bool,
        is_met: impl Fn(&Handle) -> bool,
    ) {
        self.rounds += 1;
        self.missing.retain(|handle| missed.contains(handle) || !is_met(handle));
        if self.begins {
            self.missing.extend(missed.iter().cloned());
            self.begins = lost_sight;
        }
    }

    /// Something that was there when somebody asked may be in the bucket under no name yet.
    pub(super) fn misses(&self) -> bool {
        self.begins || !self.missing.is_empty()
    }

    /// It is worth another round.
    pub(super) fn may_go_on(&self) -> bool {
        self.rounds < MOST
    }

    /// Who asked has an answer.
    pub(super) fn is_over(&mut self) {
        *self = Self::default();
    }
}

impl Tree<'_> {
    /// At the end of a round. What was moved while it looked, and is `unconfirmed`, is known by nothing.
    pub(super) fn go_on_with_the_chase(&mut self, rest: &Rest, unconfirmed: bool) {
        if !self.is_asked() {
            return;
        }
        let top = File::open(&self.ready.open.volume.upper);
        let (moved, lost_sight) = rest.missing();
        let mut chase = std::mem::take(&mut self.chase);
        chase.ends(moved, lost_sight || unconfirmed, |handle| {
            top.as_ref().is_ok_and(|top| self.is_met(handle, top))
        });
        self.chase = chase;
    }

    /// The bucket has it under the name that it has now, or why it does not is said elsewhere.
    fn is_met(&self, handle: &Handle, top: &File) -> bool {
        let open = &self.ready.open;
        // Where nobody can be asked, it is enough that no round has missed it again.
        let Fate::Lives(name) = handle.fate(top) else { return true };
        let settled = open.index.settled_as(handle).unwrap_or_default();
        match open.volume.path_of(&name) {
            Some(path) => {
                settled.contains(&path)
                    || rules::may_stay_out(&path)
                    || self.troubled.contains_key(&path)
                    || self.waiting.contains_key(&path)
            }
            // The kernel knows it by no name, or by one outside of the tree.
            None => name != b"/" || !settled.is_empty(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn these(names: &[&str]) -> HashSet<Handle> {
        names.iter().map(|name| Handle::from_bytes(name.as_bytes().to_vec())).collect()
    }

    /// One round: what it missed, and what of the rest the bucket has.
    fn round(chase: &mut Chase, missed: &[&str], lost_sight: bool, met: &[&str]) -> bool {
        let met = these(met);
        chase.ends(&these(missed), lost_sight, |handle| met.contains(handle));
        chase.misses()
    }

    #[test]
    fn only_what_was_missed_after_the_question_is_waited_for() {
        let mut chase = Chase::default();
        assert!(!round(&mut chase, &["nobody asks"], false, &[]));
        chase.begin();
        assert!(round(&mut chase, &["a", "b"], false, &[]));
        // One is met, the other is missed once more, and so is what is new.
        assert!(round(&mut chase, &["b", "new"], false, &["a"]));
        assert!(!round(&mut chase, &["new"], false, &["b"]));
    }

    #[test]
    fn what_was_missed_is_waited_for_though_no_round_misses_it_again() {
        let mut chase = Chase::default();
        chase.begin();
        assert!(round(&mut chase, &["a"], false, &[]));
        assert!(round(&mut chase, &[], false, &[]), "it was seen nowhere");
        assert!(!round(&mut chase, &[], false, &["a"]));
    }

    #[test]
    fn a_round_that_cannot_say_what_it_missed_is_no_beginning() {
        let mut chase = Chase::default();
        chase.begin();
        assert!(round(&mut chase, &[], true, &[]));
        assert!(round(&mut chase, &["a"], false, &[]));
        assert!(!round(&mut chase, &[], true, &["a"]));
    }

    #[test]
    fn it_has_an_end() {
        let mut chase = Chase::default();
        chase.begin();
        while chase.may_go_on() {
            assert!(round(&mut chase, &["a"], false, &[]));
        }
        chase.is_over();
        assert!(chase.may_go_on() && !chase.misses());
    }
}
