//! Follows the answer of the storage worker to its last line. Only then an order is done.

use super::client::{Client, Patience, unexpected_answer};
use super::progress::ProgressLine;
use crate::failure::{Exit, Failure};
use crate::stdout;
use crate::text::clean;
use cvm_protocol::storage::{Answer, Ask};
use std::time::Duration;

pub(super) fn run(order: &str, verb: Ask, total: Option<Duration>) -> Result<Exit, Failure> {
    let what = format!("storage {order}");
    print_to_the_end(Client::ask(&what, verb, Patience::working(total))?)
}

/// Prints the lines of an answer, and its conclusion.
pub(crate) fn print_to_the_end(client: Client) -> Result<Exit, Failure> {
    let print = |text: &str| stdout::print(&(clean(text) + "\n"));
    let conclusion = to_the_end(client, |answer| match answer {
        Answer::Line { text } => Some(print(&text)),
        _ => None,
    })?;
    if !conclusion.is_empty() {
        print(&conclusion)?;
    }
    Ok(Exit::Good)
}

/// Shows progress, gives every other answer to `take`, and returns the conclusion if it is good.
/// `take` returns None for an answer that does not fit.
pub(crate) fn to_the_end(
    mut client: Client,
    mut take: impl FnMut(Answer) -> Option<Result<(), Failure>>,
) -> Result<String, Failure> {
    let mut line = ProgressLine::new();
    loop {
        let answer = client.answer().inspect_err(|_| line.clear())?;
        match answer {
            Answer::Progress(progress) => line.show(&progress),
            Answer::Done { text, good } => {
                line.clear();
                let hint = "`cvm storage status` shows what to do now";
                return if good {
                    Ok(text)
                } else {
                    Err(Failure::new(Exit::Bad, client.what(), text).hint(hint))
                };
            }
            other => {
                line.clear();
                take(other).unwrap_or_else(|| Err(unexpected_answer(client.what())))?;
            }
        }
    }
}
