//! Who works beside the loop, and tells it: the watcher, the heartbeat, the hydrator, and whoever minds
//! a mount that may die.
//!
//! Refuses to write to the bucket but for the lease.

use super::{LOOK, Order, RETRY, Tree};
use crate::chain::now_ms;
use crate::fault::Fault;
use crate::owner::uptime;
use crate::watch::Watcher;
use crate::{hydrate, mount, parallel};
use cvm_protocol::storage::{Mode, WorkerPhase};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Between two full looks, where nobody gives hints.
const BLIND_RESCAN: Duration = Duration::from_secs(20);
/// While this passes hints gather in the kernel: who commits thousands of times a second must not
/// have us woken as often.
const GATHER: Duration = Duration::from_millis(20);

impl Tree<'_> {
    pub(super) fn watch(&mut self) -> Result<(), Fault> {
        let (sender, stop, open) = (self.worker.sender.clone(), Arc::clone(&self.stop), self.open());
        let hints = Arc::clone(&self.hints);
        let (tell, watching) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            // It looks at the merged tree.
            parallel::set_apart();
            let mut watcher = match Watcher::new(&open.volume) {
                Ok(watcher) => watcher,
                Err(fault) => return drop(tell.send(Err(fault))),
            };
            // From here on nothing is missed: the first scan may begin.
            let _ = tell.send(Ok(()));
            while let Ok(seen) = watcher.next() {
                let new = hints.note(seen);
                if stop.load(Ordering::Relaxed) || new && sender.send(Order::Hints).is_err() {
                    return;
                }
                std::thread::sleep(GATHER);
            }
        });
        if let Err(fault) = watching.recv().map_err(|_| Fault::other("the watcher did not start"))? {
            self.rescan = BLIND_RESCAN;
            self.rescan_at = uptime() + self.rescan;
            self.worker.desk.warn(format!(
                "The kernel does not say what changes ({fault}; fs.inotify.max_user_instances?): changes are found by a scan every {} s",
                self.rescan.as_secs()
            ));
        }
        Ok(())
    }

    pub(super) fn help(&self) {
        self.beat();
        self.mind_what_was_inherited();
        if !self.hydrated {
            let (open, desk, stop, sender) = (
                self.open(),
                Arc::clone(&self.worker.desk),
                Arc::clone(&self.stop),
                self.worker.sender.clone(),
            );
            std::thread::spawn(move || {
                loop {
                    match hydrate::run(&open, &desk, &stop) {
                        Ok(true) => return drop(sender.send(Order::Hydrated)),
                        Ok(false) => return,
                        // What it had is closed.
                        Err(_) if stop.load(Ordering::Relaxed) => return,
                        Err(fault) => {
                            desk.failed(&fault, Some(RETRY.0));
                            std::thread::sleep(RETRY.0);
                        }
                    }
                }
            });
        }
    }

    fn beat(&self) {
        let (open, lease, stop, fenced, sender, desk) = (
            self.open(),
            Arc::clone(&self.ready.lease),
            Arc::clone(&self.stop),
            Arc::clone(&self.fenced),
            self.worker.sender.clone(),
            Arc::clone(&self.worker.desk),
        );
        let beat = Duration::from_secs(u64::from(self.worker.spec.heartbeat_s.max(1)));
        std::thread::spawn(move || {
            let mut due = uptime() + beat;
            while !stop.load(Ordering::Relaxed) {
                // Short sleeps, so that a stop is not waited for, on a clock that counts sleep.
                std::thread::sleep(Duration::from_millis(200).min(beat));
                if uptime() < due {
                    continue;
                }
                due = match lease.renew(&open.bucket) {
                    Ok(()) => uptime() + beat,
                    Err(Fault::Fenced(why)) => {
                        // A round may be long, and nobody may stand on the tree until it ends: its
                        // next write asks the lease, and fails.
                        fenced.store(true, Ordering::Relaxed);
                        desk.refused(WorkerPhase::Fenced, &Fault::Fenced(why.clone()));
                        return drop(sender.send(Order::Fenced(why)));
                    }
                    Err(fault) => {
                        desk.failed(&fault, None);
                        uptime() + (beat / 4).max(Duration::from_secs(1))
                    }
                };
            }
        });
    }

    /// A mount that an earlier worker left is answered by the stand-in, which may die too. Whoever
    /// asks may have to wait for the answer, and so does nothing else.
    fn mind_what_was_inherited(&self) {
        let inherited = self.ready.mode == Mode::Fuse
            && self.ready.stand_in.is_none()
            && mount::is_mount(cvm_protocol::paths::BUCKET_MOUNT);
        if !inherited {
            return;
        }
        let (stop, sender) = (Arc::clone(&self.stop), self.worker.sender.clone());
        std::thread::spawn(move || {
            let mut number = now_ms();
            while !stop.load(Ordering::Relaxed) {
                number += 1;
                if mount::is_dead(number) && !stop.load(Ordering::Relaxed) {
                    return drop(sender.send(Order::TreeIsDead));
                }
                std::thread::sleep(LOOK);
            }
        });
    }

    /// One that has died is succeeded by one that has to be told.
    pub(super) fn mind_the_stand_in(&mut self) {
        if self.ready.stand_in.as_ref().is_some_and(mount::StandIn::is_there) {
            return;
        }
        let told = mount::StandIn::hand_over(&self.ready.open.volume).and_then(|stand_in| {
            if self.whole {
                stand_in.tree_is_whole()?;
            }
            Ok(stand_in)
        });
        self.ready.stand_in = match told {
            Ok(stand_in) => {
                self.worker.desk.info("The stand-in for the mount was told again");
                Some(stand_in)
            }
            // Not up yet: it is looked at again.
            Err(fault) => {
                tracing::debug!("the stand-in does not answer: {fault}");
                None
            }
        };
    }
}
