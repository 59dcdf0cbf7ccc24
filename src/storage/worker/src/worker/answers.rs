//! What operators ask and get.

use super::Tree;
use crate::desk::Desk;
use crate::fault::Fault;
use crate::index::Row;
use crate::review::Review;
use crate::s3::When;
use crate::serve::relative;
use cvm_protocol::storage::{Answer, Ask};
use std::sync::Arc;

/// Who waits for what was there when it was asked.
pub(super) enum Asked {
    Flush(tokio::sync::mpsc::UnboundedSender<Answer>),
    Verify { deep: bool, to: tokio::sync::mpsc::UnboundedSender<Answer> },
}

type Outcome = Result<(String, bool), Fault>;

pub(super) fn done(to: &tokio::sync::mpsc::UnboundedSender<Answer>, text: impl Into<String>, good: bool) {
    // Whoever asked may be gone.
    let _ = to.send(Answer::Done { text: text.into(), good });
}

pub(super) fn answer(to: &tokio::sync::mpsc::UnboundedSender<Answer>, outcome: Outcome) {
    match outcome {
        Ok((text, good)) => done(to, text, good),
        Err(fault) => done(to, format!("{fault}; {}", fault.remedy()), false),
    }
}

impl Tree<'_> {
    pub(super) fn answer(&mut self, ask: &Ask, to: &tokio::sync::mpsc::UnboundedSender<Answer>) {
        let outcome = match ask {
            Ask::Drill => return self.drill(Some(to.clone())),
            Ask::Forget { paths, seen } => {
                let seen = is_as_seen(&self.worker.desk, seen.as_deref());
                return refused_or(to, seen.and_then(|()| self.forget(paths)));
            }
            Ask::Keep { paths, seen } => {
                let seen = is_as_seen(&self.worker.desk, seen.as_deref());
                return refused_or(to, seen.and_then(|()| self.keep(paths)));
            }
            Ask::AcceptOlder { .. } | Ask::Adopt { .. } => {
                return refused_or(to, Err("nothing is refused: this instance has its tree".to_owned()));
            }
            Ask::Takeover => Ok(("This instance owns the bucket already".to_owned(), true)),
            _ => Err(Fault::other("this is answered elsewhere")),
        };
        answer(to, outcome);
    }

    /// What the bucket does not have right, and the tree does not have, is given up: it goes from the
    /// manifest, and what there is of it from the bucket.
    fn forget(&mut self, paths: &[String]) -> Result<Outcome, String> {
        let (open, named) = (self.open(), named(&self.worker.desk, paths)?);
        let rows = open.index.all().map_err(|fault| fault.to_string())?;
        let is_given_up = |shown: &str| {
            let lacks = |row: &Row| row.bad.is_some() || row.lower;
            rows.iter()
                .find(|(path, row)| path.to_string() == shown && lacks(row))
                .map(|(path, _)| path.clone())
        };
        let mut given_up = Vec::new();
        for (shown, _) in &named {
            given_up.push(is_given_up(shown).ok_or_else(|| {
                format!("the tree has {shown}, so that there is nothing to give up: what to do about it is in `cvm storage status`")
            })?);
        }
        Ok(self.settle_incidents(&named, || {
            given_up.iter().try_for_each(|path| open.index.set_bad(path, None))?;
            open.index.set_lower(&given_up, false)?;
            Ok(format!("{} files are given up", given_up.len()))
        }))
    }

    /// What may be built on what was wrong is taken as it is.
    fn keep(&mut self, paths: &[String]) -> Result<Outcome, String> {
        let (open, named) = (self.open(), named(&self.worker.desk, paths)?);
        let tainted = open.index.tainted().map_err(|fault| fault.to_string())?;
        let mut kept = Vec::new();
        for (shown, _) in &named {
            let found = tainted.iter().find(|(path, _)| path.to_string() == *shown);
            let (path, _) = found.ok_or_else(|| {
                format!("{shown} is not in doubt, so that there is nothing to keep: what to do about it is in `cvm storage status`")
            })?;
            kept.push(path);
        }
        Ok(self.settle_incidents(&named, || {
            kept.iter().try_for_each(|path| open.index.untaint(path))?;
            Ok(format!("{} files are taken as they are", kept.len()))
        }))
    }

    fn settle_incidents(
        &mut self,
        named: &[(String, String)],
        decide: impl FnOnce() -> Result<String, Fault>,
    ) -> Outcome {
        let outcome = decide();
        if outcome.is_ok() {
            for (path, _) in named {
                self.worker.desk.settled(path);
            }
            self.everything = true;
            self.note_change();
        }
        outcome.map(|text| (text, true))
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

/// The incidents of these paths: only what is shown to operators is for them to decide.
pub(super) fn named(desk: &Desk, paths: &[String]) -> Result<Vec<(String, String)>, String> {
    let shown = desk.named();
    let find = |path: &String| {
        let path = relative(path);
        let known = shown.iter().find(|(shown, _)| shown == path).cloned();
        known.ok_or_else(|| format!("no incident names {path}; `cvm storage status` lists them"))
    };
    paths.iter().map(find).collect()
}

/// Refuses what an operator says who has looked at something else than there is now.
pub(super) fn is_as_seen(desk: &Desk, seen: Option<&str>) -> Result<(), String> {
    if seen.is_some() && seen != desk.status().wrong.as_deref() {
        return Err("what is wrong is not what it was when it was shown; look at it again".to_owned());
    }
    Ok(())
}

fn refused_or(to: &tokio::sync::mpsc::UnboundedSender<Answer>, outcome: Result<Outcome, String>) {
    match outcome {
        Ok(outcome) => answer(to, outcome),
        Err(why) => drop(to.send(Answer::Refused { why })),
    }
}

pub(super) fn refuse_review(to: &tokio::sync::mpsc::UnboundedSender<Answer>) {
    let why = "a verify or a drill is running already; ask again when it is over".to_owned();
    let _ = to.send(Answer::Refused { why });
}
