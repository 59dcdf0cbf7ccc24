//! What operators ask and get.

use super::Tree;
use crate::desk::Desk;
use crate::fault::Fault;
use crate::review::Review;
use crate::s3::When;
use cvm_blueprint::storage::{Answer, Ask};
use std::collections::HashSet;
use std::sync::Arc;

/// Who waits for what was there when it was asked.
pub(super) enum Asked {
    Flush(tokio::sync::mpsc::UnboundedSender<Answer>),
    Verify { deep: bool, to: tokio::sync::mpsc::UnboundedSender<Answer> },
}

pub(super) fn done(to: &tokio::sync::mpsc::UnboundedSender<Answer>, text: impl Into<String>, good: bool) {
    // Whoever asked may be gone.
    let _ = to.send(Answer::Done { text: text.into(), good });
}

pub(super) fn answer(
    to: &tokio::sync::mpsc::UnboundedSender<Answer>,
    outcome: Result<(String, bool), Fault>,
) {
    match outcome {
        Ok((text, good)) => done(to, text, good),
        Err(fault) => done(to, format!("{fault}; {}", fault.remedy()), false),
    }
}

impl Tree<'_> {
    pub(super) fn answer(&mut self, ask: &Ask, to: &tokio::sync::mpsc::UnboundedSender<Answer>) {
        let outcome = match ask {
            Ask::Drill => return self.drill(Some(to.clone())),
            Ask::Accept { seen } => {
                if has_changed(&self.worker.desk, seen.as_deref(), to) {
                    return;
                }
                self.accept()
            }
            Ask::Takeover => Ok(("This instance owns the bucket already".to_owned(), true)),
            _ => Err(Fault::other("this is answered elsewhere")),
        };
        answer(to, outcome);
    }

    /// What the bucket does not have right is given up: it is gone from the manifest too. Only what
    /// has been named is.
    fn accept(&mut self) -> Result<(String, bool), Fault> {
        let open = self.open();
        let named: HashSet<String> = self.worker.desk.named().into_iter().map(|(path, _)| path).collect();
        let mut bad = open.index.bad()?;
        bad.retain(|(path, _)| named.contains(&path.to_string()));
        for (path, _) in &bad {
            open.index.set_bad(path, None)?;
            open.index.set_lower(std::slice::from_ref(path), false)?;
        }
        let mut tainted = open.index.tainted()?;
        tainted.retain(|(path, _)| named.contains(&path.to_string()));
        for (path, _) in &tainted {
            open.index.untaint(path)?;
        }
        for path in &named {
            self.worker.desk.settled(path);
        }
        self.everything = true;
        self.note_change();
        let taken = match tainted.len() {
            0 => String::new(),
            n => format!(", {n} are taken as they are"),
        };
        Ok((format!("{} files are given up{taken}", bad.len()), true))
    }

    pub(super) fn is_reviewing(&self) -> bool {
        self.reviewing.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Beside this loop: it may take as long as the bucket is large.
    pub(super) fn review(
        &mut self,
        to: Option<tokio::sync::mpsc::UnboundedSender<Answer>>,
        work: impl FnOnce(&Review) -> Result<(String, bool), Fault> + Send + 'static,
    ) {
        if self.is_reviewing() {
            to.as_ref().map(refuse_review);
            return;
        }
        let sender = self.worker.sender.clone();
        let review = Review { open: self.open(), desk: Arc::clone(&self.worker.desk), sender };
        self.reviewing = Some(std::thread::spawn(move || {
            let outcome = work(&review);
            match to {
                Some(to) => answer(&to, outcome),
                None => drop(outcome.inspect_err(|fault| review.desk.failed(fault, None))),
            }
        }));
    }

    pub(super) fn drill(&mut self, to: Option<tokio::sync::mpsc::UnboundedSender<Answer>>) {
        self.review(to.clone(), move |review| review.drill(&to));
    }

    pub(super) fn recall_drill(&self) -> Result<(), Fault> {
        let index = &self.ready.open.index;
        if let Some(drill) = index.meta("drill")?.and_then(|text| serde_json::from_str(&text).ok()) {
            self.worker.desk.drill(drill, index.number("drilled")?);
        }
        Ok(())
    }

    pub(super) fn last_words(&mut self) {
        let open = self.open();
        let boots = &mut self.worker.boots;
        let grown = boots.grown();
        if grown.is_empty() {
            return;
        }
        let sent = self.ready.lease.confirm(&open.bucket).and_then(|()| boots.send(&open.bucket, grown));
        if let Err(fault) = sent {
            tracing::warn!("logs are not in the bucket: {fault}");
        }
    }

    /// What somebody will want to know of this boot when it is over. In a thread, for the bucket may
    /// be slow, and this is no more than a courtesy; true when it is there.
    pub(super) fn last_word(&self, how: &str) -> std::thread::JoinHandle<bool> {
        let (open, lease, end) = (self.open(), Arc::clone(&self.ready.lease), self.worker.boots.end());
        let how = how.to_owned();
        std::thread::spawn(move || {
            let Some(end) = end else { return false };
            let write = || open.bucket.write(&end, how.as_bytes(), &When::Always);
            let sent = lease.confirm(&open.bucket).and_then(|()| write());
            sent.inspect_err(|fault| tracing::warn!("how this boot ends is not in the bucket: {fault}"))
                .is_ok()
        })
    }
}

/// Says so to an operator who has looked at something else than there is now.
pub(super) fn has_changed(
    desk: &Desk,
    seen: Option<&str>,
    to: &tokio::sync::mpsc::UnboundedSender<Answer>,
) -> bool {
    let changed = seen.is_some() && seen != desk.status().wrong.as_deref();
    if changed {
        let why = "what is wrong is not what it was when it was shown; look at it again".to_owned();
        let _ = to.send(Answer::Refused { why });
    }
    changed
}

pub(super) fn refuse_review(to: &tokio::sync::mpsc::UnboundedSender<Answer>) {
    let why = "a verify or a drill is running already; ask again when it is over".to_owned();
    let _ = to.send(Answer::Refused { why });
}
