//! Whole pages, frozen. After a wanted change `CVM_WRITE_PAGES=1 cargo test -p cvm pages` writes them
//! anew; read the difference.

use super::*;
use crate::status::samples;
use crate::storage::samples as worker;
use cvm_protocol::status::{Phase, StorageMode};
use std::path::PathBuf;

const NOW: u64 = 1_800_000_000_000;
const WIDTHS: [usize; 3] = [120, 80, 40];

fn machines() -> [(&'static str, Status, Option<WorkerAnswer>); 6] {
    let s3 = |mut status: Status| {
        status.storage.mode = StorageMode::S3;
        status.storage.meaning = "encrypted in bucket agent-state, and on the volume".to_owned();
        status
    };
    let answers = |status| Some(WorkerAnswer::Status(Box::new(status)));
    let cause = "there is no storage worker here (/run/openclaw-cvm/storage.sock: nobody listens)";
    [
        ("healthy", samples::healthy(), None),
        ("troubled", samples::troubled(), None),
        ("mux", samples::with_mux(NOW), None),
        ("s3-pending", s3(samples::healthy()), answers(worker::pending())),
        ("s3-troubled", s3(samples::troubled()), answers(worker::troubled())),
        ("s3-away", s3(samples::troubled()), Some(WorkerAnswer::None(cause.into()))),
    ]
}

#[test]
fn pages_are_as_they_were_promised() {
    for (name, status, worker) in machines() {
        for width in WIDTHS {
            let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
                .join(format!("src/status/pages/{name}-{width}.txt"));
            let text = page(&status, worker.as_ref(), NOW, Style::plain(width));
            if std::env::var_os("CVM_WRITE_PAGES").is_some() {
                std::fs::write(&path, &text).unwrap();
            }
            let promised = std::fs::read_to_string(&path).unwrap();
            assert_eq!(text, promised, "{}:\n{text}", path.display());
        }
    }
}

#[test]
fn no_width_breaks_a_page_or_loses_a_word_of_it() {
    let squeezed = |text: &str| text.split_whitespace().collect::<String>();
    for (_, status, worker) in machines() {
        for columns in 30..220 {
            let text = page(&status, worker.as_ref(), NOW, Style::plain(columns));
            let too_wide = text.lines().find(|line| width(line) > columns);
            assert_eq!(too_wide, None, "at {columns}");
            let found = squeezed(&text);
            let told =
                status.services.iter().flat_map(|s| [s.name.as_str(), s.state.as_str(), s.shown_action()]);
            for word in told.chain(status.unhealthy.iter().map(String::as_str)).filter(|w| *w != NONE) {
                assert!(found.contains(&squeezed(&clean(word))), "{word} is lost at {columns}:\n{text}");
            }
        }
    }
}

#[test]
fn every_state_has_its_tone_and_those_in_need_a_remedy() {
    let states = [
        (ServiceState::Blocked, Tone::Bad, true),
        (ServiceState::Preparing, Tone::Caution, false),
        (ServiceState::Starting, Tone::Caution, false),
        (ServiceState::Up, Tone::Caution, true),
        (ServiceState::Ready, Tone::Good, false),
        (ServiceState::Repairing, Tone::Caution, false),
        (ServiceState::Stopping, Tone::Caution, false),
        (ServiceState::Waiting, Tone::Caution, true),
        (ServiceState::Parked, Tone::Bad, true),
        (ServiceState::Stopped, Tone::Caution, false),
        (ServiceState::Stuck, Tone::Bad, false),
    ];
    for (state, tone, needs) in states {
        let service =
            Service { next_action: Some("something is due".into()), ..samples::service("gateway", state) };
        assert_eq!(tone_of(&service), tone, "{state}");
        assert_eq!(remedy(&service).is_some(), needs, "{state}");
    }
    assert_eq!(tone_of(&samples::service("sshd", ServiceState::Up)), Tone::Good);
    // A stopped optional service is no fault.
    let optional = Service { required: false, ..samples::service("dockerd", ServiceState::Stopped) };
    assert_eq!(tone_of(&optional), Tone::Quiet);
}

#[test]
fn colours_change_nothing_but_colours() {
    let style = Style { colour: true, ..Style::plain(80) };
    let painted = page(&samples::troubled(), None, NOW, style);
    let mut plain = painted.clone();
    for code in ["0", "1", "2", "32", "33", "1;31"] {
        plain = plain.replace(&format!("\x1b[{code}m"), "");
    }
    assert_ne!(painted, plain);
    assert_eq!(plain, page(&samples::troubled(), None, NOW, Style::plain(80)));
    assert!(painted.starts_with("\x1b[1;31mNOT HEALTHY\x1b[0m"));
}

#[test]
fn a_phase_and_an_empty_machine_are_shown_too() {
    let mut status = Status { services: vec![], boot: vec![], keys: vec![], ..samples::healthy() };
    for (phase, word) in [(Phase::Booting, "booting"), (Phase::Stopping, "stopping")] {
        status.phase = phase;
        let text = page(&status, None, NOW, Style::plain(80));
        assert!(text.starts_with(&format!("HEALTHY  {word}, up 3 h 12 min")), "{text}");
        assert!(!text.contains("BOOT") && !text.contains("KEY"), "{text}");
    }
}
