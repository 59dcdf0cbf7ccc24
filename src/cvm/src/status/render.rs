//! The page of `cvm status`. What is wrong comes first, and every state that needs attention
//! has its reason and its remedy on the lines below it.
//!
//! Refuses to read clocks and terminals: the same snapshot and look give the same page.
//! May import: `look`, `storage`, `table`, `words`.

use crate::look::{Look, Tone};
use crate::storage::{self, Glance};
use crate::table::{self, Cell, Column, NONE, Row, STAYS, labelled};
use crate::words::{clean, count, fine, span, width, wrap};
use cvm_protocol::mux::MuxStatus;
use cvm_protocol::status::{Phase, Service, Status, Step};

/// `glance` is what the storage worker says, where there has to be one; `now_ms` is since 1970.
pub(crate) fn page(status: &Status, glance: Option<&Glance>, now_ms: u64, look: Look) -> String {
    let label = format!("Storage ({})", clean(&status.storage.mode));
    let told = labelled(&label, &status.storage.meaning, Tone::Plain, 0, look);
    // Whether the data is safe comes before all else.
    let (lead, below) = match glance {
        None => (String::new(), told),
        Some(Glance::Away(cause)) => (storage::lead_away(cause, look), told),
        Some(Glance::Seen(seen)) => (storage::lead(seen, look), String::new()),
    };
    let sections = [
        lead + &head(status, look),
        below,
        services(&status.services, look),
        status.mux.as_ref().map(|mux| self::mux(mux, now_ms, look)).unwrap_or_default(),
        boot(status, look),
        doors(status, look),
        remarks(status, look),
        keys(status, look),
    ];
    let shown: Vec<String> = sections.into_iter().filter(|s| !s.is_empty()).collect();
    shown.join("\n")
}

fn head(status: &Status, look: Look) -> String {
    let (word, tone) = if status.healthy { ("HEALTHY", Tone::Good) } else { ("NOT HEALTHY", Tone::Bad) };
    let phase = match status.phase {
        Phase::Booting => "booting",
        Phase::Running => "running",
        Phase::Degraded => "degraded",
        Phase::Stopping => "stopping",
    };
    let about = format!("{phase}, up {}, openclaw-cvm {}", span(status.uptime_ms), clean(&status.version));
    let mut text = look.paint(word, tone);
    let room = look.width.saturating_sub(width(word) + 2);
    if width(&about) <= room {
        text.extend(["  ", &about, "\n"]);
    } else {
        text.push('\n');
        for line in wrap(&about, look.width - 2) {
            text.extend(["  ", &line, "\n"]);
        }
    }
    for complaint in &status.unhealthy {
        for (i, line) in wrap(&clean(complaint), look.width - 4).iter().enumerate() {
            text += if i == 0 { "  - " } else { "    " };
            text += line;
            text.push('\n');
        }
    }
    text
}

/// Services, with what is due. Those columns go below first that are longest.
fn services(services: &[Service], look: Look) -> String {
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
    if rows.is_empty() { String::new() } else { table::render(&COLUMNS, &rows, look) }
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
            Cell::new(&service.state, tone_of(service)),
            Cell::plain(&or_none(service.pid.map(|pid| pid.to_string()))),
            Cell::plain(&or_none(service.up_ms.map(span))),
            Cell::plain(&if service.restarts == 0 { NONE.to_owned() } else { service.restarts.to_string() }),
            Cell::plain(&or_none(last)),
            Cell::plain(&service.next_action),
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
    match service.state.as_str() {
        "ready" => Tone::Good,
        "up" if service.next_action == NONE => Tone::Good,
        "parked" | "stuck" => Tone::Bad,
        "blocked" if service.required => Tone::Bad,
        "waiting" if service.crash_loop => Tone::Bad,
        "stopped" if !service.required => Tone::Quiet,
        _ => Tone::Caution,
    }
}

/// What an operator can do about a state, beyond what its next action says.
fn remedy(service: &Service) -> Option<String> {
    let name = &service.name;
    match service.state.as_str() {
        "waiting" if service.crash_loop => {
            Some(format!("`cvm logs {name}` shows its last words; `cvm doctor` looks at the machine"))
        }
        "waiting" => {
            Some(format!("`cvm logs {name}` shows its last words; `cvm start {name}` tries at once"))
        }
        "parked" => Some(format!("`cvm logs {name}` shows its last words")),
        "blocked" => Some("see the boot step below".to_owned()),
        "up" if service.next_action != NONE => {
            Some(format!("if it stays so: `cvm logs {name}`, `cvm doctor`"))
        }
        _ => None,
    }
}

/// Whether messages come in and answers get out, and what is in the way.
fn mux(mux: &MuxStatus, now_ms: u64, look: Look) -> String {
    let ago = |at: u64| span(now_ms.saturating_sub(at));
    let mut text = look.paint("MUX", Tone::Strong) + "\n";
    let mut line = |label: &str, words: &str, tone| text += &labelled(label, words, tone, 2, look);
    let until = mux.registered_until_ms.filter(|at| *at > now_ms);
    match (until, &mux.register_error) {
        (Some(at), None) => line("registered", &format!("for {} more", span(at - now_ms)), Tone::Plain),
        (Some(at), Some(why)) => {
            line(
                "registered",
                &format!("for {} more, then no longer: {why}", span(at - now_ms)),
                Tone::Caution,
            );
        }
        (None, why) => line("not registered", why.as_deref().unwrap_or("not yet"), Tone::Bad),
    }
    let events = count(mux.waiting, "event waits for the agent", "events wait for the agent");
    let answers = count(mux.to_send, "answer is to be sent", "answers are to be sent");
    let oldest = mux.oldest_at_ms.map(|at| format!(", the oldest since {}", ago(at))).unwrap_or_default();
    line("queue", &format!("{events}, {answers}{oldest}"), Tone::Plain);
    let refused = count(mux.refused, "refused", "refused");
    let counted =
        format!("{} accepted, {} answered, {} ignored, {refused}", mux.accepted, mux.answered, mux.ignored);
    line("since start", &counted, if mux.refused > 0 { Tone::Caution } else { Tone::Plain });
    if let Some(why) = mux.gateway_error.as_ref().filter(|_| mux.waiting > 0) {
        line("gateway", why, Tone::Caution);
    }
    if let (Some(why), Some(at)) = (&mux.last_error, mux.last_error_at_ms) {
        line("last error", &format!("{why}; {} ago", ago(at)), Tone::Caution);
    }
    if let Some(at) = mux.last_unreplicated_ack_at_ms {
        let acks = count(mux.unreplicated_acks, "delivery", "deliveries");
        let words = format!(
            "{acks} answered 503 because the bucket did not have them in time, the last {} ago",
            ago(at)
        );
        line("bucket", &words, Tone::Caution);
    }
    text
}

/// Boot steps and first starts, in the order of time: where the seconds went.
fn boot(status: &Status, look: Look) -> String {
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
    // What has not begun comes last; the sort keeps the order of the plan.
    rows.sort_by_key(|(began, _)| began.unwrap_or(u64::MAX));
    let rows: Vec<Row> = rows.into_iter().map(|(_, row)| row).collect();
    if rows.is_empty() { String::new() } else { table::render(&COLUMNS, &rows, look) }
}

fn step_row(step: &Step) -> Row {
    let (tone, optional) = match step.state.as_str() {
        "done" => (Tone::Good, ""),
        "failed" if step.required => (Tone::Bad, ""),
        "failed" => (Tone::Caution, " (not required)"),
        _ => (Tone::Plain, ""),
    };
    let mut row = Row {
        cells: vec![
            Cell::new(&step.name, Tone::Strong),
            Cell::new(&format!("{}{optional}", step.state), tone),
            Cell::plain(&step.began_ms.map_or(NONE.to_owned(), fine)),
            Cell::plain(&step.took_ms.map_or(NONE.to_owned(), fine)),
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
        Some(ready) => ("ready", fine(ready.saturating_sub(exec))),
        None => ("started", NONE.to_owned()),
    };
    let cells = vec![
        Cell::new(&service.name, Tone::Plain),
        Cell::plain(result),
        Cell::plain(&fine(exec)),
        Cell::plain(&took),
        Cell::plain(NONE),
    ];
    Some(Row { cells, below: Vec::new() })
}

/// What the configuration opens, with how to shut it.
fn doors(status: &Status, look: Look) -> String {
    if status.doors.is_empty() {
        return String::new();
    }
    let mut text = look.paint("OPEN DOORS", Tone::Strong) + "\n";
    for door in &status.doors {
        let words = format!("{}. To shut it: {}", door.risk, door.remedy);
        text += &labelled(&clean(&door.name), &words, Tone::Caution, 2, look);
    }
    text
}

fn remarks(status: &Status, look: Look) -> String {
    if status.remarks.is_empty() {
        return String::new();
    }
    let title = look.paint("REMARKS", Tone::Strong) + "\n";
    let lines = status.remarks.iter().map(|r| labelled(&clean(&r.topic), &r.text, Tone::Caution, 2, look));
    title + &lines.collect::<String>()
}

fn keys(status: &Status, look: Look) -> String {
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
    if rows.is_empty() { String::new() } else { table::render(&COLUMNS, &rows, look) }
}

#[cfg(test)]
mod tests;
