//! `cvm logs`: the files that keepers write, listed, shown from the end, and followed.
//!
//! It works without the supervisor, because the last lines of one that is gone matter most. On a terminal
//! it obeys no control sequence of a log: the text comes from programs that an agent may steer.

mod boots;
mod file;
mod follow;
mod list;
mod tail;

pub(crate) use list::newest_stamp;

use crate::args::LogsArgs;
use crate::failure::{Exit, Failure};
use crate::safe_output::SafeOutput;
use crate::stdout;
use crate::style::Style;
use crate::units;
use file::{Log, unreadable};

pub(crate) fn run(args: &LogsArgs) -> Result<Exit, Failure> {
    if args.boots {
        return boots::list();
    }
    if let Some(boot) = args.boot {
        return boots::show(boot, args.service.as_deref(), args.lines);
    }
    let style = Style::of_stdout();
    let Some(service) = &args.service else {
        stdout::print(
            &list::page(&args.directory, units::now_ms(), style)
                .map_err(|e| unreadable(&args.directory, &e))?,
        )?;
        return Ok(Exit::Good);
    };
    let log = Log::find(&args.directory, service)?;
    let mut output = SafeOutput::new(style.is_terminal);
    let mut current = tail::show(&log, args.lines, &mut output)?;
    output.flush()?;
    if args.follow {
        follow::go(&log, &mut current, &mut output)?;
    }
    Ok(Exit::Good)
}
