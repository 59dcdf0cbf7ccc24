//! What a flush waits for while files are renamed.
//!
//! A round may miss what is renamed while it looks, and with a busy tree each round misses something.
//! A flush does not wait for one that misses nothing, which may never come: it waits until every file
//! that was missed by the round which began after the question has been met since, or is gone. What
//! that round has not even listed, because it went from where the look came later to where it had
//! been, is known to nobody here: the next round sends it.
//!
//! Refuses to go on for ever. May import: `entry`, `push`, `rules`, `scan`, `cvm-sys`, and its own worker.

use super::Tree;
use super::rounds::Round;
use crate::entry::Path;
use crate::push::Rest;
use crate::{rules, scan};
use cvm_sys::file_handle::{Fate, Handle};
use std::collections::HashSet;
use std::fs::File;

/// Rounds for which one goes on.
const MOST: u32 = 20;
/// So many of them may be its beginning because a look let something slip: with many files, and one
/// that comes and goes beside them, each look does.
const BEGINNINGS: u32 = 3;

#[derive(Debug, Default)]
pub(super) struct Chase {
    /// This round is the first since somebody asked, or the one before could not say what it missed.
    begins: bool,
    rounds: u32,
    /// Those that were a beginning.
    beginnings: u32,
    missing: HashSet<Handle>,
    /// Not all of them are where they hold nobody up.
    misses: bool,
}

/// What a round has missed.
#[derive(Debug, Default)]
struct Missed {
    known: HashSet<Handle>,
    /// And there was something of which nothing is known.
    lost_sight: bool,
    /// A look may have passed something by.
    slipped: bool,
}

/// What has become of a file that was missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Now {
    /// It is in the bucket under its name of now, or gone.
    Met,
    Missing,
    /// Where it need not, or cannot, be in the bucket; it may be renamed again.
    Excused,
}

impl Chase {
    /// Somebody has asked: what the round that begins now misses has to be met.
    pub(super) fn begin(&mut self) {
        (self.begins, self.beginnings) = (true, 0);
    }

    fn ends(&mut self, missed: &Missed, now: impl Fn(&Handle) -> Now) {
        self.rounds += 1;
        self.misses = false;
        self.missing.retain(|handle| {
            // Where it went to while we looked, nobody has looked yet.
            let now = if missed.known.contains(handle) { Now::Missing } else { now(handle) };
            self.misses |= now == Now::Missing;
            now != Now::Met
        });
        if self.begins {
            self.beginnings += 1;
            self.begins = missed.lost_sight || missed.slipped && self.beginnings < BEGINNINGS;
            self.missing.extend(missed.known.iter().cloned());
            self.misses |= self.begins || !missed.known.is_empty();
        }
    }

    /// Something that was there when somebody asked may be in the bucket under no name yet.
    pub(super) fn misses(&self) -> bool {
        self.misses
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
    /// At the end of a round, when it is known what is in order.
    pub(super) fn go_on_with_the_chase(&mut self, rest: &Rest, round: &Round) {
        if !self.is_asked() {
            return;
        }
        let top = File::open(&self.ready.open.volume.upper);
        let (moved, lost_sight) = rest.missing();
        let missed = Missed {
            known: moved.union(&round.unseen).cloned().collect(),
            lost_sight: lost_sight || round.unconfirmed > 0,
            slipped: round.slipped,
        };
        let mut chase = std::mem::take(&mut self.chase);
        chase.ends(&missed, |handle| top.as_ref().map_or(Now::Missing, |top| self.now(handle, top)));
        self.chase = chase;
    }

    fn now(&self, handle: &Handle, top: &File) -> Now {
        let open = &self.ready.open;
        // Where nobody can be asked, it is enough that no round has missed it again.
        let Fate::Lives(name) = handle.fate(top) else { return Now::Met };
        let settled = open.index.settled_as(handle).unwrap_or_default();
        // The kernel may say the name of a link that is gone.
        let is_its = |path: &Path| scan::handle_of(&path.below(&open.volume.upper)).as_ref() == Some(handle);
        match open.volume.path_of(&name) {
            Some(path) if !is_its(&path) && !settled.is_empty() => Now::Met,
            Some(path) if settled.contains(&path) => Now::Met,
            Some(path) if rules::may_stay_out(&path) || self.troubled.contains_key(&path) => Now::Excused,
            Some(_) => Now::Missing,
            // The kernel knows it by no name, or by one outside of the tree.
            None if name == b"/" => {
                if settled.is_empty() {
                    Now::Missing
                } else {
                    Now::Met
                }
            }
            None => Now::Excused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn these(names: &[&str]) -> HashSet<Handle> {
        names.iter().map(|name| Handle::from_bytes(name.as_bytes().to_vec())).collect()
    }

    fn missed(names: &[&str]) -> Missed {
        Missed { known: these(names), ..Missed::default() }
    }

    /// One round: what it missed, and what of the rest the bucket has.
    fn round(chase: &mut Chase, missed: &Missed, met: &[&str]) -> bool {
        let met = these(met);
        chase.ends(missed, |handle| if met.contains(handle) { Now::Met } else { Now::Missing });
        chase.misses()
    }

    #[test]
    fn only_what_was_missed_after_the_question_is_waited_for() {
        let mut chase = Chase::default();
        assert!(!round(&mut chase, &missed(&["nobody asks"]), &[]));
        chase.begin();
        assert!(round(&mut chase, &missed(&["a", "b"]), &[]));
        // One is met, the other is missed once more, and so is what is new.
        assert!(round(&mut chase, &missed(&["b", "new"]), &["a"]));
        assert!(!round(&mut chase, &missed(&["new"]), &["b"]));
    }

    #[test]
    fn what_was_missed_is_waited_for_though_no_round_misses_it_again() {
        let mut chase = Chase::default();
        chase.begin();
        assert!(round(&mut chase, &missed(&["a"]), &[]));
        assert!(round(&mut chase, &missed(&[]), &[]), "it was seen nowhere");
        assert!(!round(&mut chase, &missed(&[]), &["a"]));
    }

    #[test]
    fn what_is_where_it_holds_nobody_up_does_so_in_the_round_that_missed_it() {
        let mut chase = Chase::default();
        chase.begin();
        for missed_then in ["a", "a"] {
            chase.ends(&missed(&[missed_then]), |_| Now::Excused);
            assert!(chase.misses());
            chase.ends(&missed(&[]), |_| Now::Excused);
            assert!(!chase.misses());
        }
    }

    #[test]
    fn a_round_that_cannot_say_what_it_missed_is_no_beginning() {
        let mut chase = Chase::default();
        chase.begin();
        for _ in 0..=BEGINNINGS {
            assert!(round(&mut chase, &Missed { lost_sight: true, ..Missed::default() }, &[]));
        }
        assert!(round(&mut chase, &missed(&["a"]), &[]));
        assert!(!round(&mut chase, &Missed { lost_sight: true, ..Missed::default() }, &["a"]));
    }

    #[test]
    fn a_look_that_lets_something_slip_is_repeated_a_few_times_for_each_question() {
        let mut chase = Chase::default();
        for _ in 0..2 {
            chase.begin();
            for number in 1..=BEGINNINGS {
                let goes_on = round(&mut chase, &Missed { slipped: true, ..Missed::default() }, &[]);
                assert_eq!(goes_on, number < BEGINNINGS);
            }
        }
    }

    #[test]
    fn it_has_an_end() {
        let mut chase = Chase::default();
        chase.begin();
        while chase.may_go_on() {
            assert!(round(&mut chase, &missed(&["a"]), &[]));
        }
        chase.is_over();
        assert!(chase.may_go_on() && !chase.misses());
    }
}
