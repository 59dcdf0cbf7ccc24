//! Findings as a page and as JSON. Rooms with faults come last, because the end of a long page is what a
//! terminal shows; the last line sums up.

use super::finding::{Finding, Verdict};
use crate::json;
use crate::style::{Style, Tone};
use crate::table::{hanging, labelled};
use crate::text::clean;
use crate::units::count;

/// The column in which the names of checks begin.
const HANG: usize = 7;

pub(crate) fn page(findings: &[Finding], style: Style) -> String {
    let mut rooms: Vec<&str> = Vec::new();
    for finding in findings {
        if !rooms.contains(&finding.room.as_str()) {
            rooms.push(&finding.room);
        }
    }
    let of = |room: &str| findings.iter().filter(move |f| f.room == room).collect::<Vec<_>>();
    // A stable sort: rooms of one verdict stay in their order.
    rooms.sort_by_key(|room| of(room).iter().map(|f| severity(f.verdict)).max());
    let mut text = String::new();
    for room in rooms {
        text += &style.paint(room, Tone::Strong);
        text.push('\n');
        text.extend(of(room).iter().map(|finding| entry(finding, style)));
        text.push('\n');
    }
    text + &summary(findings, style)
}

/// A check that was not made is no fault.
fn severity(verdict: Verdict) -> u8 {
    match verdict {
        Verdict::Ok | Verdict::Skip => 0,
        Verdict::Warn => 1,
        Verdict::Fail => 2,
    }
}

fn entry(finding: &Finding, style: Style) -> String {
    let (verdict, tone) = match finding.verdict {
        Verdict::Ok => ("ok  ", Tone::Good),
        Verdict::Skip => ("-   ", Tone::Quiet),
        Verdict::Warn => ("warn", Tone::Caution),
        Verdict::Fail => ("FAIL", Tone::Bad),
    };
    let head = format!("  {verdict} {}: ", clean(&finding.check));
    let found = hanging(&head, &finding.found, HANG, Tone::Plain, style);
    let mut text = format!("  {} {}: {found}", style.paint(verdict, tone), clean(&finding.check));
    if let Some(remedy) = &finding.remedy {
        text += &labelled("do", remedy, Tone::Plain, HANG, style);
    }
    text
}

fn summary(findings: &[Finding], style: Style) -> String {
    let number = |verdict| findings.iter().filter(|f| f.verdict == verdict).count() as u64;
    let (failed, warned) = (number(Verdict::Fail), number(Verdict::Warn));
    let text = format!(
        "{} failed, {}, {} ok, {} not made",
        count(failed, "check", "checks"),
        count(warned, "warning", "warnings"),
        number(Verdict::Ok),
        number(Verdict::Skip)
    );
    let tone = match (failed, warned) {
        (0, 0) => Tone::Good,
        (0, _) => Tone::Caution,
        _ => Tone::Bad,
    };
    style.paint(&text, tone) + "\n"
}

pub(crate) fn json(findings: &[Finding], style: Style) -> String {
    let number = |verdict| findings.iter().filter(|f| f.verdict == verdict).count();
    let value = serde_json::json!({
        "failed": number(Verdict::Fail),
        "warned": number(Verdict::Warn),
        "findings": findings,
    });
    json::shown(&value.to_string(), style)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(room: &str, check: &str, verdict: Verdict, found: &str) -> Finding {
        let remedy = (verdict >= Verdict::Warn).then(|| format!("mend {check}"));
        Finding { room: room.into(), check: check.into(), verdict, found: found.into(), remedy }
    }

    #[test]
    fn faults_come_last_and_the_last_line_sums_up() {
        let findings = [
            finding(
                "disk",
                "space on /data",
                Verdict::Fail,
                "12.0 MiB free of 20.0 GiB, which is not enough for anything",
            ),
            finding("disk", "inodes", Verdict::Ok, "90 % free"),
            finding("fuse", "/dev/fuse", Verdict::Ok, "opens"),
            finding("docker", "driver", Verdict::Warn, "vfs\u{1b}[2J"),
            finding("docker", "socket", Verdict::Skip, "ENABLE_DOCKER is 0"),
        ];
        let expected = "\
fuse
  ok   /dev/fuse: opens

docker
  warn driver: vfs\u{fffd}[2J
       do: mend driver
  -    socket: ENABLE_DOCKER is 0

disk
  FAIL space on /data: 12.0 MiB free of 20.0 GiB, which is
       not enough for anything
       do: mend space on /data
  ok   inodes: 90 % free

1 check failed, 1 warning, 2 ok, 1 not made
";
        let text = page(&findings, Style::plain(60));
        assert_eq!(text, expected, "\n{text}");
        let painted = page(&findings, Style { colour: true, ..Style::plain(60) });
        assert!(painted.contains("  \x1b[1;31mFAIL\x1b[0m space on /data: "), "{painted}");
    }

    #[test]
    fn json_counts_and_lists() {
        let findings = [finding("disk", "space", Verdict::Fail, "none")];
        let value: serde_json::Value = serde_json::from_str(&json(&findings, Style::plain(80))).unwrap();
        assert_eq!((&value["failed"], &value["findings"][0]["verdict"]), (&1.into(), &"fail".into()));
    }
}
