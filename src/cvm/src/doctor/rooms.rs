//! Runs all rooms at once, each in a process, with a time limit for each check.
//!
//! It does not wait for a process that it has killed, because the kernel may hold that process for ever.

use super::finding::{Finding, Line, Verdict};
use crate::failure::{Exit, Failure};
use crate::text;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// For one check: an operator waits this long without wondering.
pub(crate) const CHECK_TIME: Duration = Duration::from_secs(5);
/// For a whole room, with all of its checks.
const ROOM_TIME: Duration = Duration::from_secs(30);
/// This program, also after an update has replaced its file.
const OURSELVES: &str = "/proc/self/exe";

struct RunningRoom {
    name: String,
    child: Child,
    /// The name of the running check.
    at: Option<String>,
    check_due: Instant,
    room_due: Instant,
    over: bool,
}

/// The number of a room, and a line from it; None when the room has closed its output.
type RoomLine = (usize, Option<String>);

pub(crate) fn run_all(names: &[&str]) -> Result<Vec<Finding>, Failure> {
    let (sender, lines) = channel();
    let mut rooms = Vec::new();
    for (number, name) in names.iter().enumerate() {
        rooms.push(start(number, name, &sender)?);
    }
    drop(sender);
    let mut findings = listen(&mut rooms, &lines);
    // In the order of the rooms; the sort is stable, so each room keeps the order of its checks.
    findings.sort_by_key(|f| names.iter().position(|n| *n == f.room));
    Ok(findings)
}

fn start(number: usize, name: &str, sender: &Sender<RoomLine>) -> Result<RunningRoom, Failure> {
    let command = Command::new(OURSELVES)
        .args(["doctor-room", name])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    let mut child = command
        .map_err(|e| Failure::new(Exit::Bad, format!("doctor: starting {name}"), text::io_error(&e)))?;
    if let Some(stdout) = child.stdout.take() {
        let sender = sender.clone();
        // Ends with the room's output, or with this program.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if sender.send((number, Some(line))).is_err() {
                    return;
                }
            }
            let _ = sender.send((number, None));
        });
    }
    let now = Instant::now();
    Ok(RunningRoom {
        name: name.to_owned(),
        child,
        at: None,
        check_due: now + CHECK_TIME,
        room_due: now + ROOM_TIME,
        over: false,
    })
}

fn listen(rooms: &mut [RunningRoom], lines: &Receiver<RoomLine>) -> Vec<Finding> {
    let mut findings = Vec::new();
    while let Some(due) = rooms.iter().filter(|a| !a.over).map(|a| a.check_due.min(a.room_due)).min() {
        match lines.recv_timeout(due.saturating_duration_since(Instant::now())) {
            Ok((number, line)) => {
                if let Some(room) = rooms.get_mut(number).filter(|room| !room.over) {
                    room.receive(line.as_deref(), &mut findings);
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                let now = Instant::now();
                for room in rooms.iter_mut().filter(|r| !r.over && (now >= r.check_due || now >= r.room_due))
                {
                    room.give_up(&mut findings);
                }
            }
        }
    }
    findings
}

impl RunningRoom {
    fn receive(&mut self, line: Option<&str>, findings: &mut Vec<Finding>) {
        self.check_due = Instant::now() + CHECK_TIME;
        match line.map(serde_json::from_str::<Line>) {
            Some(Ok(Line::About { check })) => self.at = Some(check),
            Some(Ok(Line::Found(finding))) => {
                self.at = None;
                findings.push(finding);
            }
            Some(Ok(Line::Done)) => {
                self.over = true;
                let _ = self.child.wait();
            }
            Some(Err(_)) | None => {
                self.over = true;
                // It has closed its output, so it is ending.
                let how = self.child.wait().map_or_else(|e| text::io_error(&e), |status| status.to_string());
                findings.push(self.failure(&format!("the check ended before it had an answer: {how}")));
            }
        }
    }

    fn give_up(&mut self, findings: &mut Vec<Finding>) {
        self.over = true;
        let _ = self.child.kill();
        let time = cvm_protocol::time::words(CHECK_TIME);
        findings.push(self.failure(&format!("it did not answer within {time}")));
    }

    fn failure(&self, found: &str) -> Finding {
        Finding {
            room: self.name.clone(),
            check: self.at.clone().unwrap_or_else(|| "whole room".to_owned()),
            verdict: Verdict::Fail,
            found: found.to_owned(),
            remedy: Some(format!(
                "a disk, a mount or a program hangs: `dmesg | tail`, `uptime`; later checks of {} were not made",
                self.name
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A room whose process is a shell.
    fn room(number: usize, script: &str, sender: &Sender<RoomLine>) -> RunningRoom {
        let mut child = Command::new("/bin/sh").args(["-c", script]).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = child.stdout.take().unwrap();
        let sender = sender.clone();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = sender.send((number, Some(line)));
            }
            let _ = sender.send((number, None));
        });
        let due = Instant::now() + CHECK_TIME;
        RunningRoom {
            name: format!("room{number}"),
            child,
            at: None,
            check_due: due,
            room_due: due,
            over: false,
        }
    }

    #[test]
    fn a_room_that_hangs_fails_by_name_and_the_others_are_read_to_their_end() {
        let (sender, lines) = channel();
        let about = serde_json::to_string(&Line::About { check: "space".into() }).unwrap();
        let done = serde_json::to_string(&Line::Done).unwrap();
        let mut rooms = [
            room(0, &format!("echo '{about}'; exec sleep 1000"), &sender),
            room(1, &format!("echo '{done}'"), &sender),
            room(2, "exit 3", &sender),
        ];
        let before = Instant::now();
        let mut findings = listen(&mut rooms, &lines);
        assert!(before.elapsed() >= CHECK_TIME / 2);
        findings.sort_by(|a, b| a.room.cmp(&b.room));
        let failed: Vec<(&str, &str)> =
            findings.iter().map(|f| (f.room.as_str(), f.check.as_str())).collect();
        assert_eq!(failed, [("room0", "space"), ("room2", "whole room")]);
        assert!(findings[0].found.contains("did not answer within 5 s"), "{:?}", findings[0]);
        assert!(findings[1].found.contains("exit status: 3"), "{:?}", findings[1]);
        assert!(findings.iter().all(|f| f.verdict == Verdict::Fail && f.remedy.is_some()));
    }
}
