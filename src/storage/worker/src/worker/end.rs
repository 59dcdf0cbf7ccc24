//! The end of a life with a bucket: what is pending goes up in the time there is, or is named.

use super::answers::Asked;
use super::rounds::{Round, have_to_wait};
use super::{AGAIN_AND_AGAIN, Tree};
use crate::ending;
use crate::entry::Path;
use crate::fault::Fault;
use crate::opening::setback;
use crate::owner::uptime;
use crate::push::Rest;
use crate::scan::{Change, Scanner};
use cvm_protocol::storage::{Answer, WorkerPhase};
use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

impl Tree<'_> {
    /// Pushes what is pending, and gives the bucket away. True when it has everything.
    pub(super) fn drain(&mut self) -> bool {
        self.worker.desk.phase(WorkerPhase::Draining);
        // Some of the time is for what is told of it afterwards.
        let until = self.worker.ending.until_the_last_words();
        let open = self.open();
        self.waiting.clear();
        self.round = None;
        let mut left = (0u64, 0u64);
        let mut failed = Failed::default();
        // Who ends this process when its time is over can say nothing any more.
        let first = self.last_word("stopped before everything was in the bucket: the time for that was over");
        let (clean, answers) = loop {
            let mut round = failed.round();
            let outcome = self.look_around(&mut round, &HashSet::new()).map(|(urgent, unread)| {
                let rest = self.slice(&mut round, urgent, unread, Duration::MAX);
                self.note_damage(&mut round, &rest);
                failed.learn(&rest, &round);
                rest
            });
            let of_old = outcome.as_ref().map_or_else(|_| HashSet::new(), |rest| rest.stays.clone());
            let stops = outcome.as_ref().map_or_else(Some, |rest| rest.fault.as_ref());
            let answers = !stops.is_some_and(Fault::is_outage);
            let fault = match outcome {
                Ok(rest) if rest.fault.is_none() && rest.later.is_empty() => None,
                Ok(rest) => {
                    let later = || have_to_wait(rest.later.iter().map(|(path, why)| (path, why.as_str())));
                    Some(rest.fault.unwrap_or_else(later))
                }
                Err(fault) => Some(fault),
            };
            if let Some(fault) = &fault {
                self.worker.desk.failed(fault, None);
            } else {
                self.settle(&round);
            }
            let clean = fault.is_none();
            let scanned = Scanner::new(&open.volume, &open.index, &open.bucket.prefix, &self.fetched).full();
            left = match scanned {
                Ok(mut found) => {
                    // A file whose name cannot be there is counted by that one.
                    if !found.impossible.is_empty() {
                        found.changes.retain(
                            |change| !matches!(change, Change::Gone { path } if of_old.contains(path)),
                        );
                    }
                    ending::missing(&open.volume, &found)
                }
                Err(_) => (left.0.max(1), left.1),
            };
            // No round mends what is damaged, or gives what cannot be named a name.
            let stays = round.troubles.len() as u64;
            let fenced = matches!(fault, Some(Fault::Fenced(_)));
            if clean && left.0 <= stays || fenced || uptime() >= until {
                break (clean, answers);
            }
            std::thread::sleep(Duration::from_millis(if clean { 10 } else { 500 }));
        };
        if !clean {
            left.0 = left.0.max(1);
        }
        if left.0 == 0 {
            self.worker.ending.all_is_there();
        }
        // Of a bucket that did not answer until now nothing more is asked.
        if answers && first.join().unwrap_or(false) {
            let last = self.last_word(&match left {
                (0, _) => "stopped, with everything in the bucket".to_owned(),
                (files, bytes) => format!("stopped, with {files} files ({bytes} bytes) not in the bucket"),
            });
            drop(last.join());
        }
        if answers {
            self.last_words();
        }
        if left.0 == 0
            && let Err(fault) = setback::is_left_in_order(&open.index)
        {
            self.worker.desk.failed(&fault, None);
        }
        self.leave();
        self.ready.lease.has_come_to(self.ready.chain.head.generation);
        if left.0 == 0
            && let Err(fault) = self.ready.lease.release(&open.bucket)
        {
            self.worker.desk.failed(&fault, None);
        }
        self.worker.desk.drained(left.0, left.1);
        left.0 == 0
    }

    pub(super) fn leave(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.answering.append(&mut self.asked);
        for asked in self.answering.drain(..) {
            let (Asked::Flush(to) | Asked::Verify { to, .. }) = asked;
            let why = "the storage was closed before this was done".to_owned();
            let _ = to.send(Answer::Refused { why });
        }
        self.worker.desk.opened(None);
        // A hydrator or a review that is still on its way must write nothing into the next life.
        self.ready.open.index.close();
    }
}

/// What a stop could not send. One file that the server refuses is not to keep others out.
#[derive(Default)]
struct Failed {
    tries: HashMap<Path, (u32, String)>,
    others_are_left: bool,
}

impl Failed {
    fn round(&self) -> Round {
        let often = self.tries.iter().filter(|(_, (tries, _))| *tries >= AGAIN_AND_AGAIN);
        let failing = often.map(|(path, (_, why))| (path.clone(), why.clone())).collect();
        Round::of_everything(failing, self.others_are_left)
    }

    fn learn(&mut self, rest: &Rest, round: &Round) {
        let before = std::mem::take(&mut self.tries);
        for (path, why) in &rest.later {
            let tries = before.get(path).map_or(0, |(tries, _)| *tries) + 1;
            self.tries.insert(path.clone(), (tries, why.clone()));
        }
        let others = rest.later.iter().any(|(path, _)| !round.failing.contains_key(path));
        self.others_are_left = rest.fault.is_some() || others;
    }
}
