//! An order to the storage worker, followed to its end.
//!
//! Refuses to count an order as done before the worker's last word. May import: `out`,
//! `trouble`, `words`, `client`, `progress`.

use super::client::{Client, Patience, no_answer_fits};
use super::progress::Shower;
use crate::out;
use crate::trouble::{Exit, Trouble};
use crate::words::clean;
use cvm_protocol::storage::{Answer, Ask};
use std::time::Duration;

pub(super) fn run(order: &str, verb: Ask, total: Option<Duration>) -> Result<Exit, Trouble> {
    let what = format!("storage {order}");
    print_to_the_end(Client::ask(&what, verb, Patience::working(total))?)
}

/// Prints lines and the last word.
pub(crate) fn print_to_the_end(client: Client) -> Result<Exit, Trouble> {
    let print = |text: &str| out::print(&(clean(text) + "\n"));
    let last = to_the_end(client, |answer| match answer {
        Answer::Line { text } => Some(print(&text)),
        _ => None,
    })?;
    if !last.is_empty() {
        print(&last)?;
    }
    Ok(Exit::Good)
}

/// Shows progress, gives everything else to `take`, and yields the last word if it is a good one.
/// `take` yields None for what it does not know.
pub(crate) fn to_the_end(
    mut client: Client,
    mut take: impl FnMut(Answer) -> Option<Result<(), Trouble>>,
) -> Result<String, Trouble> {
    let mut shower = Shower::new();
    loop {
        let answer = client.answer().inspect_err(|_| shower.clear())?;
        match answer {
            Answer::Progress(progress) => shower.show(&progress),
            Answer::Done { text, good } => {
                shower.clear();
                let hint = "`cvm storage status` shows what there is to do";
                return if good {
                    Ok(text)
                } else {
                    Err(Trouble::new(Exit::Bad, client.what(), text).hint(hint))
                };
            }
            other => {
                shower.clear();
                take(other).unwrap_or_else(|| Err(no_answer_fits(client.what())))?;
            }
        }
    }
}
