//! The page of `cvm status`. Faults come first, and every state that needs attention has its reason and
//! its remedy on the lines below it.
//!
//! Pure: the same snapshot, time and style give the same page.

use crate::facts;
use crate::storage::{self, WorkerAnswer};
use crate::style::{Style, Tone};
use crate::table::{self, Cell, Column, NONE, Row, STAYS, labelled};
use crate::text::{clean, width, wrap};
use crate::units::{count, precise_span, span};
use cvm_protocol::status::{Service, ServiceState, Status, Step, StepState};

/// `worker` is the storage worker's answer, in the mode that has one; `now_ms` is since 1970.
pub(crate) fn page(status: &Status, worker: Option<&WorkerAnswer>, now_ms: u64, style: Style) -> String {
    let label = format!("Storage ({})", status.storage.mode);
    let meaning = labelled(&label, &status.storage.meaning, Tone::Plain, 0, style);
    // Whether the data is safe comes before all else.
    let (first, below) = match worker {
        None => (String::new(), meaning),
        Some(WorkerAnswer::None(cause)) => (storage::first_lines_without(cause, style), meaning),
        Some(WorkerAnswer::Status(status)) => (storage::first_lines(status, style), String::new()),
    };
    let sections = [
        first + &head(status, style),
        below,
        services(&status.services, style),
        facts_of(&status.services, now_ms, style),
        boot(status, style),
        doors(status, style),
        remarks(status, style),
        keys(status, style),
    ];
    let shown: Vec<String> = sections.into_iter().filter(|s| !s.is_empty()).collect();
    shown.join("\n")
}

fn head(status: &Status, style: Style) -> String {
    let (health, tone) = if status.healthy { ("HEALTHY", Tone::Good) } else { ("NOT HEALTHY", Tone::Bad) };
    let frozen = if status.frozen { ", frozen" } else { "" };
    let up = span(status.uptime_ms);
    let about = format!("{}{frozen}, up {up}, openclaw-cvm {}", status.phase, clean(&status.version));
    let mut text = style.paint(health, tone);
    if width(&about) + width(health) + 2 <= style.width {
        text.extend(["  ", &about, "\n"]);
    } else {
        text.push('\n');
        for line in wrap(&about, style.width - 2) {
            text.extend(["  ", &line, "\n"]);
        }
    }
    for complaint in &status.unhealthy {
        for (i, line) in wrap(&clean(complaint), style.width - 4).iter().enumerate() {
            text += if i == 0 { "  - " } else { "    " };
            text += line;
            text.push('\n');
        }
    }
    text
}

/// The services, with the next action of each.
fn services(services: &[Service], style: Style) -> String {
    const COLUMNS: [Column; 7] = [
        Column { title: "SERVICE", right: false, keep: STAYS },
        Column { title: "STATE", right: false, keep: STAYS },
        Column { title: "PID", right: true, keep: 3 },
        Column { title: "UP", right: true, keep: 5 },
        Column { title: "RESTARTS", right: true, keep: 4 },
        Column { title: "LAST END", right: false, keep: 1 },
        Column { title: "NEXT", right: false, keep: 2 },
    ];
    let rows: Vec<Row> = services.iter().map(service_row).collect();
    if rows.is_empty() { String::new() } else { table::render(&COLUMNS, &rows, style) }
}

fn service_row(service: &Service) -> Row {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| NONE.to_owned());
    let last = service.last_end.as_ref().map(|end| match service.last_end_ago_ms {
        Some(ago) => format!("{end}; {} ago", span(ago)),
        None => end.clone(),
    });
    let mut row = Row {
        cells: vec![
            Cell::new(&service.name, Tone::Strong),
            Cell::new(service.state.as_str(), tone_of(service)),
            Cell::plain(&or_none(service.pid.map(|pid| pid.to_string()))),
            Cell::plain(&or_none(service.up_ms.map(span))),
            Cell::plain(&if service.restarts == 0 { NONE.to_owned() } else { service.restarts.to_string() }),
            Cell::plain(&or_none(last)),
            Cell::plain(service.shown_action()),
        ],
        below: Vec::new(),
    };
    if let Some(why) = &service.why {
        row.below.push(("why", why.clone(), tone_of(service)));
    }
    if service.crash_loop {
        let failures = count(u64::from(service.failures_in_a_row), "failure", "failures");
        row.below.push(("crash loop", format!("{failures} in a row"), Tone::Bad));
    }
    if service.dropped_lines > 0 {
        let lines = count(service.dropped_lines, "line", "lines");
        row.below.push((
            "log",
            format!("{lines} dropped: the disk was slower than the service"),
            Tone::Caution,
        ));
    }
    if let Some(remedy) = remedy(service) {
        row.below.push(("do", remedy, Tone::Plain));
    }
    row
}

fn tone_of(service: &Service) -> Tone {
    match service.state {
        _ if service.is_ready() => Tone::Good,
        ServiceState::Parked | ServiceState::Stuck => Tone::Bad,
        ServiceState::Blocked if service.required => Tone::Bad,
        ServiceState::Waiting if service.crash_loop => Tone::Bad,
        ServiceState::Stopped if !service.required => Tone::Quiet,
        _ => Tone::Caution,
    }
}

/// What an operator can do about a state, beyond its next action.
fn remedy(service: &Service) -> Option<String> {
    let name = &service.name;
    match service.state {
        ServiceState::Waiting if service.crash_loop => {
            Some(format!("`cvm logs {name}` shows its last lines; `cvm doctor` looks at the machine"))
        }
        ServiceState::Waiting => {
            Some(format!("`cvm logs {name}` shows its last lines; `cvm start {name}` tries at once"))
        }
        ServiceState::Parked => Some(format!("`cvm logs {name}` shows its last lines")),
        ServiceState::Blocked => Some("see the boot step below".to_owned()),
        ServiceState::Up if !service.is_ready() => {
            Some(format!("if it stays so: `cvm logs {name}`, `cvm doctor`"))
        }
        _ => None,
    }
}

/// What services report about themselves.
fn facts_of(services: &[Service], now_ms: u64, style: Style) -> String {
    let mut text = String::new();
    for service in services.iter().filter(|service| !service.facts.is_empty()) {
        text += &(style.paint(&clean(&service.name).to_uppercase(), Tone::Strong) + "\n");
        for fact in &service.facts {
            let tone = facts::tone(fact.severity_at(now_ms));
            text += &labelled(&clean(&fact.label), &facts::line(fact, now_ms), tone, 2, style);
        }
    }
    text
}

/// Boot steps and first starts, in the order of time.
fn boot(status: &Status, style: Style) -> String {
    const COLUMNS: [Column; 5] = [
        Column { title: "BOOT", right: false, keep: STAYS },
        Column { title: "RESULT", right: false, keep: STAYS },
        Column { title: "AT", right: true, keep: 3 },
        Column { title: "TOOK", right: true, keep: 2 },
        Column { title: "TRIES", right: true, keep: 1 },
    ];
    let steps = status.boot.iter().map(|step| (step.began_ms, step_row(step)));
    let starts =
        status.services.iter().filter_map(|service| Some((service.first_exec_ms, start_row(service)?)));
    let mut rows: Vec<(Option<u64>, Row)> = steps.chain(starts).collect();
    // Steps that have not begun come last, in the order of the plan, because the sort is stable.
    rows.sort_by_key(|(began, _)| began.unwrap_or(u64::MAX));
    let rows: Vec<Row> = rows.into_iter().map(|(_, row)| row).collect();
    if rows.is_empty() { String::new() } else { table::render(&COLUMNS, &rows, style) }
}

fn step_row(step: &Step) -> Row {
    let (tone, optional) = match step.state {
        StepState::Done => (Tone::Good, ""),
        StepState::Failed if step.required => (Tone::Bad, ""),
        StepState::Failed => (Tone::Caution, " (not required)"),
        _ => (Tone::Plain, ""),
    };
    let mut row = Row {
        cells: vec![
            Cell::new(&step.name, Tone::Strong),
            Cell::new(&format!("{}{optional}", step.state), tone),
            Cell::plain(&step.began_ms.map_or(NONE.to_owned(), precise_span)),
            Cell::plain(&step.took_ms.map_or(NONE.to_owned(), precise_span)),
            Cell::plain(&if step.tries > 1 { step.tries.to_string() } else { NONE.to_owned() }),
        ],
        below: Vec::new(),
    };
    if let Some(why) = &step.why {
        row.below.push(("why", why.clone(), tone));
    }
    if let Some(ms) = step.next_try_in_ms {
        row.below.push(("next", format!("tried again in {}", span(ms)), Tone::Plain));
    }
    row
}

fn start_row(service: &Service) -> Option<Row> {
    let exec = service.first_exec_ms?;
    let (result, took) = match service.first_ready_ms {
        Some(ready) => ("ready", precise_span(ready.saturating_sub(exec))),
        None => ("started", NONE.to_owned()),
    };
    let cells = vec![
        Cell::new(&service.name, Tone::Plain),
        Cell::plain(result),
        Cell::plain(&precise_span(exec)),
        Cell::plain(&took),
        Cell::plain(NONE),
    ];
    Some(Row { cells, below: Vec::new() })
}

/// The doors that the configuration opens, each with how to shut it.
fn doors(status: &Status, style: Style) -> String {
    if status.doors.is_empty() {
        return String::new();
    }
    let mut text = style.paint("OPEN DOORS", Tone::Strong) + "\n";
    for door in &status.doors {
        let risk = format!("{}. To shut it: {}", door.risk, door.remedy);
        text += &labelled(&clean(&door.name), &risk, Tone::Caution, 2, style);
    }
    text
}

fn remarks(status: &Status, style: Style) -> String {
    if status.remarks.is_empty() {
        return String::new();
    }
    let title = style.paint("REMARKS", Tone::Strong) + "\n";
    let lines = status.remarks.iter().map(|r| labelled(&clean(&r.topic), &r.text, Tone::Caution, 2, style));
    title + &lines.collect::<String>()
}

fn keys(status: &Status, style: Style) -> String {
    const COLUMNS: [Column; 2] = [
        Column { title: "KEY", right: false, keep: STAYS },
        Column { title: "FINGERPRINT", right: false, keep: 1 },
    ];
    let cells = |name, fingerprint| vec![Cell::plain(name), Cell::plain(fingerprint)];
    let rows: Vec<Row> = status
        .keys
        .iter()
        .map(|k| Row { cells: cells(&k.name, &k.fingerprint), below: Vec::new() })
        .collect();
    if rows.is_empty() { String::new() } else { table::render(&COLUMNS, &rows, style) }
}

#[cfg(test)]
mod tests;
