//! The life of one service: the complete table of states and events, stories in virtual time,
//! and a simulated simulation that does to it whatever real processes may do.

use super::*;
use cvm_protocol::exit_status::Stage;
use proptest::prelude::*;
use std::collections::VecDeque;

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Rules with everything in them, and the numbers of the gateway.
fn gateway() -> Rules {
    Rules {
        backoff: Backoff::seconds(5, 60, 600),
        grace: s(330),
        prepare: Some(s(60)),
        repair: Some(s(300)),
        liveness: Some(Liveness { start: s(300), start_at_most: s(3600), silence: s(120) }),
        has_startup: false,
        has_readiness: true,
    }
}

/// Rules with nothing in them but a backoff and a grace.
fn plain() -> Rules {
    Rules { prepare: None, repair: None, liveness: None, has_readiness: false, ..gateway() }
}

// === The table ===

const NOW: Moment = Moment::from_millis(1_000_000_000);
const OLD: Run = Run(6);
const RUN: Run = Run(7);
const PID: i32 = 4711;

fn ago(seconds: u64) -> Moment {
    Moment::from_millis(NOW.as_millis() - seconds * 1000)
}

const STATES: [&str; 13] = [
    "idle",
    "preparing",
    "starting",
    "running",
    "repairing",
    "term",
    "tree",
    "keeper",
    "orphans",
    "stuck",
    "waiting",
    "parked",
    "down",
];

/// No wildcard: a new state does not compile without a name, and fails without a sample.
fn state_index(state: &State) -> usize {
    match state {
        State::Idle => 0,
        State::Preparing { .. } => 1,
        State::Starting { .. } => 2,
        State::Running { .. } => 3,
        State::Repairing { .. } => 4,
        State::Ending { phase: Phase::Term, .. } => 5,
        State::Ending { phase: Phase::Tree, .. } => 6,
        State::Ending { phase: Phase::Keeper, .. } => 7,
        State::Ending { phase: Phase::Orphans, .. } => 8,
        State::Ending { phase: Phase::Stuck, .. } => 9,
        State::Waiting { .. } => 10,
        State::Parked { .. } => 11,
        State::Down => 12,
    }
}

fn name(state: &State) -> &'static str {
    STATES[state_index(state)]
}

fn ending(phase: Phase, then: Then, end: Option<End>) -> State {
    let (pid, started, until) = (Some(PID), Some(ago(20)), NOW + s(3));
    State::Ending { run: RUN, pid, started, phase, until, then, end }
}

/// One of each, as it is 20 s after it began.
fn samples() -> Vec<State> {
    let since = ago(20);
    let ending = |phase| ending(phase, Then::Fail("hung".into()), None);
    vec![
        State::Idle,
        State::Preparing { run: RUN, since },
        State::Starting { run: RUN, since },
        State::Running {
            run: RUN,
            pid: PID,
            since,
            ready: false,
            life: Life::Starting { progress: since, answered: false },
        },
        State::Repairing { run: RUN, since },
        ending(Phase::Term),
        ending(Phase::Tree),
        ending(Phase::Keeper),
        ending(Phase::Orphans),
        ending(Phase::Stuck),
        State::Waiting { until: NOW + s(3) },
        State::Parked { why: "code 78".into() },
        State::Down,
    ]
}

const EVENTS: [&str; 17] = [
    "start",
    "stop",
    "restart",
    "close",
    "withdraw",
    "hurry",
    "prepared",
    "exec",
    "main-ended",
    "gone",
    "swept",
    "alive",
    "works",
    "start-over",
    "failing",
    "ready",
    "tick",
];

/// No wildcard, for the same reason.
fn event_index(event: &Event) -> usize {
    match event {
        Event::Start => 0,
        Event::Stop => 1,
        Event::Restart => 2,
        Event::Close => 3,
        Event::Withdraw => 4,
        Event::Hurry => 5,
        Event::Prepared { .. } => 6,
        Event::Exec { .. } => 7,
        Event::MainEnded { .. } => 8,
        Event::Gone { .. } => 9,
        Event::Swept { .. } => 10,
        Event::Alive { .. } => 11,
        Event::Works { .. } => 12,
        Event::StartOver { .. } => 13,
        Event::Failing { .. } => 14,
        Event::Readiness { .. } => 15,
        Event::Tick => 16,
    }
}

/// The events that carry a run.
fn events_of(run: Run) -> Vec<(&'static str, Event)> {
    let refused = |retry| Err(Refusal { why: "port held".into(), retry });
    vec![
        ("prepared", Event::Prepared { run, outcome: Ok(()) }),
        ("refused-once", Event::Prepared { run, outcome: refused(true) }),
        ("refused-for-good", Event::Prepared { run, outcome: refused(false) }),
        ("exec", Event::Exec { run, pid: PID }),
        ("main-ended", Event::MainEnded { run, end: End::Code(1) }),
        ("gone", Event::Gone { run, end: End::Code(1) }),
        ("gone-unseen", Event::Gone { run, end: End::Unseen }),
        ("swept", Event::Swept { run }),
        ("alive", Event::Alive { run }),
        ("works", Event::Works { run }),
        ("start-over", Event::StartOver { run }),
        ("failing", Event::Failing { run, parts: vec!["agent-database:main".into()] }),
        ("ready", Event::Readiness { run, ready: true }),
    ]
}

/// Every row: its name, the event, and how long before (or at) the deadline it comes.
fn rows() -> Vec<(&'static str, Event, Option<Duration>)> {
    let orders = vec![
        ("start", Event::Start),
        ("stop", Event::Stop),
        ("restart", Event::Restart),
        ("close", Event::Close),
        ("withdraw", Event::Withdraw),
        ("hurry", Event::Hurry),
    ];
    let mut rows: Vec<_> = orders.into_iter().chain(events_of(RUN)).map(|(n, e)| (n, e, None)).collect();
    rows.push(("tick-early", Event::Tick, Some(Duration::from_millis(1))));
    rows.push(("tick-due", Event::Tick, Some(Duration::ZERO)));
    rows
}

fn unit_in(state: State) -> Unit {
    let mut unit = Unit::new(gateway());
    (unit.runs, unit.state) = (RUN.0, state);
    unit
}

/// `.` when nothing happens at all; otherwise the state that follows, and what is done.
fn cell(state: &State, event: Event, before_deadline: Option<Duration>) -> String {
    let mut unit = unit_in(state.clone());
    let now = match (before_deadline, unit.deadline()) {
        (Some(early), Some(due)) => {
            Moment::from_millis(due.as_millis() - u64::try_from(early.as_millis()).unwrap())
        }
        _ => NOW,
    };
    let actions = unit.step(event, now);
    if unit.state == *state && actions.is_empty() {
        return ".".into();
    }
    let done = actions.iter().map(|action| format!("+{}", word(action)));
    std::iter::once(name(&unit.state).to_owned()).chain(done).collect()
}

fn word(action: &Action) -> &'static str {
    match action {
        Action::Prepare(_) => "prepare",
        Action::Launch(_) => "launch",
        Action::Repair(_) => "repair",
        Action::Term(_) => "TERM",
        Action::KillTree(_) => "TREE",
        Action::KillKeeper(_) => "KEEPER",
        Action::Sweep(_) => "sweep",
        Action::Say(Level::Error, _) => "error",
        Action::Say(Level::Warn, _) => "warn",
        Action::Say(Level::Info, _) => "info",
        Action::Say(Level::Debug, _) => "debug",
    }
}

/// Compares a table of words, the first line naming its columns, with what really happens.
fn check_table(table: &str, rows: &[&str], columns: &[&str], real: impl Fn(&str, &str) -> String) {
    let mut lines = table.lines().map(|l| l.split_whitespace().collect::<Vec<_>>()).filter(|l| !l.is_empty());
    assert_eq!(lines.next().unwrap(), columns, "the columns of the table");
    let lines: Vec<_> = lines.collect();
    assert_eq!(lines.iter().map(|l| l[0]).collect::<Vec<_>>(), rows, "the rows of the table");
    let mut wrong = Vec::new();
    for line in &lines {
        assert_eq!(line.len(), columns.len() + 1, "{} has a cell for each column", line[0]);
        for (column, expected) in columns.iter().zip(&line[1..]) {
            let real = real(line[0], column);
            if real != *expected {
                wrong.push(format!("{} when {column}: expected {expected}, got {real}", line[0]));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}\n", wrong.join("\n"));
}

const AT_REST: &str = "
                      idle               waiting            parked             down
    start             preparing+prepare  preparing+prepare  preparing+prepare  preparing+prepare
    stop              down               down               down               .
    restart           preparing+prepare  preparing+prepare  preparing+prepare  preparing+prepare
    close             down               down               down               .
    withdraw          .                  idle               .                  .
    hurry             .                  .                  .                  .
    prepared          .                  .                  .                  .
    refused-once      .                  .                  .                  .
    refused-for-good  .                  .                  .                  .
    exec              .                  .                  .                  .
    main-ended        .                  .                  .                  .
    gone              .                  .                  .                  .
    gone-unseen       .                  .                  .                  .
    swept             .                  .                  .                  .
    alive             .                  .                  .                  .
    works             .                  .                  .                  .
    start-over        .                  .                  .                  .
    failing           .                  .                  .                  .
    ready             .                  .                  .                  .
    tick-early        .                  .                  .                  .
    tick-due          .                  preparing+prepare  .                  .
";

const ALIVE: &str = "
                      preparing        starting         running          repairing
    start             .                .                .                .
    stop              tree+TREE        tree+TREE        term+TERM        tree+TREE
    restart           tree+TREE        tree+TREE        term+TERM        tree+TREE
    close             tree+TREE        tree+TREE        term+TERM        tree+TREE
    withdraw          tree+TREE        tree+TREE        term+TERM        tree+TREE
    hurry             tree+TREE        tree+TREE        tree+TREE        tree+TREE
    prepared          starting+launch  .                .                .
    refused-once      waiting+error    .                .                .
    refused-for-good  parked+error     .                .                .
    exec              .                running          .                .
    main-ended        .                .                tree             .
    gone              .                waiting+error    waiting+error    preparing+warn+prepare
    gone-unseen       .                orphans+sweep    orphans+sweep    orphans+sweep
    swept             .                .                .                .
    alive             .                .                running          .
    works             .                .                running          .
    start-over        .                .                running          .
    failing           .                .                .                .
    ready             .                .                running+info     .
    tick-early        .                .                .                .
    tick-due          tree+TREE        tree+TREE        term+error+TERM  tree+warn+TREE
";

/// Each is being ended because it was hung.
const ENDING: &str = "
                      term            tree           keeper         orphans        stuck
    start             .               .              .              .              .
    stop              term            tree           keeper         orphans        stuck
    restart           term            tree           keeper         orphans        stuck
    close             term            tree           keeper         orphans        stuck
    withdraw          term            tree           keeper         orphans        stuck
    hurry             tree+TREE       .              .              .              .
    prepared          waiting+error   waiting+error  waiting+error  waiting+error  waiting+error
    refused-once      waiting+error   waiting+error  waiting+error  waiting+error  waiting+error
    refused-for-good  waiting+error   waiting+error  waiting+error  waiting+error  waiting+error
    exec              .               .              .              .              .
    main-ended        tree+TREE       tree           keeper         orphans        stuck
    gone              waiting+error   waiting+error  waiting+error  waiting+error  waiting+error
    gone-unseen       orphans+sweep   orphans+sweep  orphans+sweep  .              .
    swept             .               .              .              waiting+error  waiting+error
    alive             .               .              .              .              .
    works             .               .              .              .              .
    start-over        .               .              .              .              .
    failing           .               .              .              .              .
    ready             .               .              .              .              .
    tick-early        .               .              .              .              .
    tick-due          tree+warn+TREE  keeper+KEEPER  orphans+sweep  stuck+error    .
";

#[test]
fn the_table_names_every_state_and_every_event() {
    let mut states: Vec<usize> = samples().iter().map(state_index).collect();
    states.sort_unstable();
    assert_eq!(states, (0..STATES.len()).collect::<Vec<_>>(), "one sample for each state");
    let mut events: Vec<usize> = rows().iter().map(|(_, e, _)| event_index(e)).collect();
    events.sort_unstable();
    events.dedup();
    assert_eq!(events, (0..EVENTS.len()).collect::<Vec<_>>(), "a row for each event");
    let shown: Vec<&str> = [AT_REST, ALIVE, ENDING]
        .iter()
        .flat_map(|t| t.lines().find(|l| !l.trim().is_empty()).unwrap().split_whitespace())
        .collect();
    let mut all = STATES.to_vec();
    all.retain(|state| !shown.contains(state));
    assert!(all.is_empty() && shown.len() == STATES.len(), "a column for each state, missing: {all:?}");
}

#[test]
fn every_event_does_in_every_state_what_the_table_says() {
    let samples = samples();
    let rows = rows();
    let names: Vec<&str> = rows.iter().map(|(n, ..)| *n).collect();
    for table in [AT_REST, ALIVE, ENDING] {
        let header = table.lines().find(|l| !l.trim().is_empty()).unwrap();
        let columns: Vec<&str> = header.split_whitespace().collect();
        check_table(table, &names, &columns, |row, column| {
            let state = samples.iter().find(|st| name(st) == column).unwrap();
            let (_, event, when) = rows.iter().find(|(n, ..)| *n == row).unwrap();
            cell(state, event.clone(), *when)
        });
    }
}

#[test]
fn events_of_an_older_run_change_nothing_in_any_state() {
    for state in samples() {
        for (row, event) in events_of(OLD) {
            assert_eq!(cell(&state, event, None), ".", "{row} of an older run when {}", name(&state));
        }
    }
}

/// What follows when nothing of a run is left: by why it was ended, and how it ended after 20 s.
const WHAT_FOLLOWS: &str = "
                         open                    going-down
    judged-code-0        preparing+warn+prepare  down+info
    judged-code-1        waiting+error           down+info
    judged-code-78       repairing+error+repair  down+info
    judged-signal        waiting+error           down+info
    judged-out-of-memory waiting+error           down+info
    judged-not-started   waiting+error           down+info
    judged-unseen        waiting+error           down+info
    failed               waiting+error           down+info
    restart              preparing+prepare       down+info
    stay-down            down                    down
    withdrawn            idle                    down+info
    after-repair         preparing+warn+prepare  down+info
";

#[test]
fn what_follows_a_run_depends_on_why_it_was_ended_and_never_starts_anything_on_the_way_down() {
    let judged = |end: End| (Then::Judge, end);
    let cases = [
        ("judged-code-0", judged(End::Code(0))),
        ("judged-code-1", judged(End::Code(1))),
        ("judged-code-78", judged(End::Code(EXIT_CONFIG))),
        ("judged-signal", judged(End::Signal(11))),
        ("judged-out-of-memory", judged(End::OutOfMemory)),
        ("judged-not-started", judged(End::NotStarted { stage: Stage::Exec, errno: 2 })),
        ("judged-unseen", judged(End::Unseen)),
        ("failed", (Then::Fail("hung".into()), End::Signal(9))),
        ("restart", (Then::Restart, End::Code(0))),
        ("stay-down", (Then::StayDown, End::Code(0))),
        ("withdrawn", (Then::Withdrawn, End::Code(0))),
        ("after-repair", (Then::AfterRepair, End::Code(0))),
    ];
    for (_, (then, end)) in &cases {
        // No wildcard: a new reason or a new end does not compile without a row.
        match then {
            Then::Judge | Then::Fail(_) | Then::Restart => {}
            Then::StayDown | Then::Withdrawn | Then::AfterRepair => {}
        }
        match end {
            End::Code(_) | End::Signal(_) | End::OutOfMemory | End::NotStarted { .. } | End::Unseen => {}
        }
    }
    let names = cases.each_ref().map(|(n, _)| *n);
    check_table(WHAT_FOLLOWS, &names, &["open", "going-down"], |row, column| {
        let (_, (then, end)) = cases.iter().find(|(n, _)| *n == row).unwrap();
        let mut unit = unit_in(ending(Phase::Orphans, then.clone(), Some(end.clone())));
        unit.closed = column == "going-down";
        let actions = unit.step(Event::Swept { run: RUN }, NOW);
        let done = actions.iter().map(|action| format!("+{}", word(action)));
        std::iter::once(name(&unit.state).to_owned()).chain(done).collect()
    });
}

/// What an order makes of the reason for which a run is being ended.
const CHANGED_MINDS: &str = "
                  start         start-on-the-way-down  stop       restart  close      withdraw
    judged        judged        judged                 stay-down  restart  stay-down  withdrawn
    failed        failed        failed                 stay-down  restart  stay-down  withdrawn
    restart       restart       restart                stay-down  restart  stay-down  withdrawn
    stay-down     restart       stay-down              stay-down  restart  stay-down  stay-down
    withdrawn     withdrawn     withdrawn              stay-down  restart  stay-down  withdrawn
    after-repair  after-repair  after-repair           stay-down  restart  stay-down  withdrawn
";

#[test]
fn an_order_changes_what_follows_and_never_how_hard_a_run_is_being_ended() {
    fn reason(then: &Then) -> &'static str {
        match then {
            Then::Judge => "judged",
            Then::Fail(_) => "failed",
            Then::Restart => "restart",
            Then::StayDown => "stay-down",
            Then::Withdrawn => "withdrawn",
            Then::AfterRepair => "after-repair",
        }
    }
    let reasons = [
        Then::Judge,
        Then::Fail("hung".into()),
        Then::Restart,
        Then::StayDown,
        Then::Withdrawn,
        Then::AfterRepair,
    ];
    let rows = reasons.each_ref().map(reason);
    let orders = ["start", "start-on-the-way-down", "stop", "restart", "close", "withdraw"];
    for before in [Phase::Term, Phase::Tree, Phase::Keeper, Phase::Orphans, Phase::Stuck] {
        check_table(CHANGED_MINDS, &rows, &orders, |row, order| {
            let then = reasons.iter().find(|t| reason(t) == row).unwrap();
            let mut unit = unit_in(ending(before, then.clone(), None));
            unit.closed = order == "start-on-the-way-down";
            let event = match order {
                "stop" => Event::Stop,
                "restart" => Event::Restart,
                "close" => Event::Close,
                "withdraw" => Event::Withdraw,
                _ => Event::Start,
            };
            assert_eq!(unit.step(event, NOW), [], "{order} when {row} in {before:?}");
            let State::Ending { phase, then, .. } = &unit.state else { panic!("no longer ending") };
            assert_eq!(*phase, before);
            reason(then).to_owned()
        });
    }
}

// === Stories ===

/// A service, and the loop around it: time passes, deadlines are met.
struct Story {
    unit: Unit,
    now: Moment,
}

impl Story {
    fn of(rules: Rules) -> Self {
        Self { unit: Unit::new(rules), now: Moment::from_millis(60_000) }
    }

    /// Already running, with whatever it takes to get there.
    fn running(rules: Rules) -> Self {
        let mut story = Self::of(rules);
        story.send(Event::Start);
        story.gets_running();
        story
    }

    fn send(&mut self, event: Event) -> Vec<Action> {
        self.unit.step(event, self.now)
    }

    fn run(&self) -> Run {
        self.unit.run().expect("something of it is alive")
    }

    /// Lets time pass as the loop does: a tick at each deadline, and one at the end.
    fn pass(&mut self, span: Duration) -> Vec<Action> {
        let until = self.now + span;
        let mut done = Vec::new();
        while let Some(due) = self.unit.deadline().filter(|due| *due <= until) {
            self.now = due;
            done.extend(self.send(Event::Tick));
            assert!(
                self.unit.deadline().is_none_or(|next| next > due),
                "a tick leaves no deadline behind it"
            );
        }
        self.now = until;
        done.extend(self.send(Event::Tick));
        done
    }

    fn is(&self) -> &'static str {
        name(&self.unit.state)
    }

    fn gets_prepared(&mut self) -> Vec<Action> {
        let run = self.run();
        self.send(Event::Prepared { run, outcome: Ok(()) })
    }

    fn gets_running(&mut self) -> Vec<Action> {
        let mut done = Vec::new();
        if self.is() == "preparing" {
            done = self.gets_prepared();
        }
        assert_eq!(self.is(), "starting");
        let run = self.run();
        done.extend(self.send(Event::Exec { run, pid: PID }));
        done
    }

    /// The main process ends, and its keeper reports that nothing is left.
    fn ends(&mut self, end: End) -> Vec<Action> {
        let run = self.run();
        let mut done = self.send(Event::MainEnded { run, end: end.clone() });
        done.extend(self.send(Event::Gone { run, end }));
        done
    }

    /// Runs for a while and ends.
    fn runs_for(&mut self, span: Duration, end: End) -> Vec<Action> {
        if self.is() != "running" {
            self.gets_running();
        }
        let mut done = self.pass(span);
        done.extend(self.ends(end));
        done
    }

    /// How long it waits now.
    fn waits(&self) -> Option<u64> {
        match self.unit.state {
            State::Waiting { until } => Some(until.since(self.now).as_secs()),
            _ => None,
        }
    }

    /// Fails after a second, `times` in a row, and waits out every wait but the last.
    fn fails(&mut self, times: usize) -> Vec<Action> {
        let mut done = Vec::new();
        for _ in 0..times {
            if let Some(wait) = self.waits() {
                done.extend(self.pass(s(wait)));
            }
            done.extend(self.runs_for(s(1), End::Code(1)));
        }
        done
    }
}

fn words_of(actions: &[Action]) -> Vec<&'static str> {
    actions.iter().map(word).collect()
}

/// What is done, without what is said.
fn deeds(actions: &[Action]) -> Vec<&'static str> {
    actions.iter().filter(|a| !matches!(a, Action::Say(..))).map(word).collect()
}

fn said(actions: &[Action]) -> String {
    let texts = actions.iter().filter_map(|a| match a {
        Action::Say(_, text) => Some(text.as_str()),
        _ => None,
    });
    texts.collect::<Vec<_>>().join("\n")
}

#[test]
fn failures_wait_5_10_20_40_60_60_and_a_run_of_reset_after_leads_back_to_5() {
    let mut story = Story::running(plain());
    let mut waits = Vec::new();
    for _ in 0..6 {
        story.fails(1);
        waits.push(story.waits().unwrap());
    }
    assert_eq!(waits, [5, 10, 20, 40, 60, 60]);
    story.pass(s(60));
    story.runs_for(Duration::from_millis(599_999), End::Code(1));
    assert_eq!(story.waits(), Some(60), "a millisecond too short");
    story.pass(s(60));
    story.runs_for(s(600), End::Code(1));
    assert_eq!(story.waits(), Some(5));
}

#[test]
fn a_wait_ends_at_its_deadline_and_not_a_millisecond_earlier() {
    let mut story = Story::running(plain());
    story.fails(1);
    assert_eq!(story.pass(Duration::from_millis(4_999)), []);
    assert_eq!(words_of(&story.pass(Duration::from_millis(1))), ["launch"]);
    assert_eq!(story.unit.restarts(), 1);
}

#[test]
fn the_end_of_the_wait_is_announced_with_the_failure() {
    let mut story = Story::running(plain());
    assert_eq!(
        said(&story.fails(2)),
        "exited with code 1; next start in 5 s\nexited with code 1; next start in 10 s"
    );
}

#[test]
fn exit_0_without_being_asked_to_starts_it_again_at_once_and_is_no_failure() {
    let mut story = Story::running(plain());
    let done = story.runs_for(s(10), End::Code(0));
    assert_eq!(words_of(&done), ["warn", "launch"]);
    assert!(said(&done).contains("exited with code 0 after 10 s without being asked to"));
    assert_eq!(story.unit.failures(), 0);
    assert_eq!(story.unit.last().unwrap().end, Some(End::Code(0)));
}

#[test]
fn quick_ends_with_0_are_restarted_at_once_three_times_and_then_wait_like_failures() {
    let mut story = Story::running(plain());
    for _ in 0..3 {
        let done = story.runs_for(Duration::from_millis(9_999), End::Code(0));
        assert_eq!(words_of(&done), ["warn", "launch"]);
    }
    story.runs_for(s(1), End::Code(0));
    assert_eq!(story.waits(), Some(5));
    story.pass(s(5));
    story.runs_for(s(1), End::Code(0));
    assert_eq!(story.waits(), Some(10), "waiting does not buy three more");
    story.pass(s(10));
    assert_eq!(words_of(&story.runs_for(s(10), End::Code(0))), ["warn", "launch"], "a run of 10 s does");
    assert_eq!(words_of(&story.runs_for(s(1), End::Code(0))), ["warn", "launch"]);
}

#[test]
fn an_operators_start_buys_three_more_quick_ends_with_0() {
    let mut story = Story::running(plain());
    for _ in 0..4 {
        story.runs_for(s(1), End::Code(0));
    }
    assert_eq!(words_of(&story.send(Event::Start)), ["launch"]);
    for _ in 0..3 {
        assert_eq!(words_of(&story.runs_for(s(1), End::Code(0))), ["warn", "launch"]);
    }
    story.runs_for(s(1), End::Code(0));
    assert_eq!(story.waits(), Some(5));
}

#[test]
fn code_78_is_repaired_once_retried_once_and_then_parked_with_its_reason() {
    let mut story = Story::running(gateway());
    let first = story.run();
    let done = story.runs_for(s(3), End::Code(78));
    assert_eq!(words_of(&done), ["error", "repair"]);
    assert!(story.run() > first, "the repair command is a run of its own");
    let done = story.ends(End::Code(0));
    assert_eq!(words_of(&done), ["warn", "prepare"]);
    assert_eq!(said(&done), "repair command exited with code 0; starting once more");
    let done = story.runs_for(s(3), End::Code(78));
    assert_eq!(words_of(&done), ["error"]);
    let State::Parked { why } = &story.unit.state else { panic!("{}", story.is()) };
    assert_eq!(why, "it refuses its configuration (code 78), also after its own repair command ran");
    assert_eq!(story.unit.last().unwrap().end, Some(End::Code(78)));
    assert_eq!(story.unit.failures(), 0, "it is no crash");
    assert_eq!(story.pass(s(1_000_000)), [], "parked until somebody acts");
}

#[test]
fn the_service_is_tried_again_whatever_came_of_its_repair() {
    for end in [End::Code(1), End::Signal(9), End::NotStarted { stage: Stage::Exec, errno: 2 }] {
        let mut story = Story::running(gateway());
        story.runs_for(s(3), End::Code(78));
        let run = story.run();
        let done = story.send(Event::Gone { run, end: end.clone() });
        assert_eq!(words_of(&done), ["warn", "prepare"]);
        assert_eq!(said(&done), format!("repair command {end}; starting once more"));
    }
}

#[test]
fn a_repair_that_takes_too_long_is_ended_and_said_to_have_taken_too_long() {
    let mut story = Story::running(gateway());
    story.runs_for(s(3), End::Code(78));
    assert_eq!(story.pass(Duration::from_millis(299_999)), []);
    let done = story.pass(Duration::from_millis(1));
    assert_eq!(words_of(&done), ["warn", "TREE"]);
    assert_eq!(said(&done), "its repair command did not end within 5 min; ending it");
    let run = story.run();
    let done = story.send(Event::Gone { run, end: End::Signal(9) });
    assert_eq!(words_of(&done), ["warn", "prepare"]);
}

#[test]
fn an_operators_start_gives_a_parked_service_a_fresh_chance_with_a_fresh_repair() {
    for order in [Event::Start, Event::Restart] {
        let mut story = Story::running(gateway());
        story.runs_for(s(3), End::Code(78));
        story.ends(End::Code(0));
        story.runs_for(s(3), End::Code(78));
        assert_eq!(story.is(), "parked");
        assert_eq!(words_of(&story.send(order)), ["prepare"]);
        assert_eq!(words_of(&story.runs_for(s(3), End::Code(78))), ["error", "repair"]);
    }
}

#[test]
fn a_stable_run_restores_the_chance_of_a_repair_and_a_short_one_does_not() {
    let tried_again_after = |span: Duration| {
        let mut story = Story::running(Rules { liveness: None, ..gateway() });
        story.runs_for(s(3), End::Code(78));
        story.ends(End::Code(0));
        story.runs_for(span, End::Code(78));
        story.is()
    };
    assert_eq!(tried_again_after(s(600)), "repairing");
    assert_eq!(tried_again_after(Duration::from_millis(599_999)), "parked");
}

#[test]
fn code_78_of_a_service_without_a_repair_command_is_a_failure_like_any_other() {
    let mut story = Story::running(plain());
    assert_eq!(said(&story.runs_for(s(1), End::Code(78))), "exited with code 78; next start in 5 s");
}

#[test]
fn every_way_to_die_is_told_apart_in_the_log_and_in_the_last_end() {
    let mut ends = vec![End::Code(1), End::Signal(11), End::Signal(9), End::OutOfMemory, End::Unseen];
    ends.extend(Stage::ALL.map(|stage| End::NotStarted { stage, errno: 13 }));
    let mut told = Vec::new();
    for end in ends {
        let mut story = Story::of(plain());
        story.send(Event::Start);
        let run = story.run();
        let mut done = Vec::new();
        if !matches!(end, End::NotStarted { .. }) {
            done.extend(story.gets_running());
        }
        if end == End::Unseen {
            story.send(Event::Gone { run, end: End::Unseen });
            done.extend(story.send(Event::Swept { run }));
        } else {
            done.extend(story.ends(end.clone()));
        }
        assert_eq!(words_of(&done), ["error"], "{end}");
        let past = story.unit.last().unwrap();
        assert_eq!((past.end.as_ref(), past.why.as_deref()), (Some(&end), Some(end.to_string().as_str())));
        assert!(said(&done).starts_with(&end.to_string()), "{}", said(&done));
        told.push(said(&done));
    }
    let all = told.len();
    told.sort();
    told.dedup();
    assert_eq!(told.len(), all, "no two read alike");
}

#[test]
fn a_failed_exec_names_its_stage_and_its_cause() {
    let mut story = Story::of(plain());
    story.send(Event::Start);
    let done = story.ends(End::NotStarted { stage: Stage::User, errno: 1 });
    assert_eq!(
        said(&done),
        "could not start: setting its user id: Operation not permitted (os error 1); next start in 5 s"
    );
}

#[test]
fn a_crash_loop_is_called_one_at_the_fifth_failure_and_once() {
    let mut story = Story::running(plain());
    let quiet = story.fails(4);
    assert!(!said(&quiet).contains("crash loop") && !story.unit.in_crash_loop());
    let fifth = story.fails(1);
    // 1 s of running each, and the waits of 5, 10, 20 and 40 s between.
    assert!(said(&fifth).ends_with("next start in 1 min. This is a crash loop: 5 failures in 1 min 19 s"));
    assert!(story.unit.in_crash_loop());
    let later = story.fails(20);
    assert!(!said(&later).contains("crash loop"));
    assert_eq!(story.unit.failures(), 25);
}

#[test]
fn a_crash_loop_is_over_as_soon_as_a_run_is_stable_and_the_next_one_is_called_again() {
    let mut story = Story::running(plain());
    story.fails(5);
    story.pass(s(60));
    story.gets_running();
    assert_eq!(story.pass(Duration::from_millis(599_999)), []);
    assert!(story.unit.in_crash_loop(), "not yet");
    assert_eq!(said(&story.pass(Duration::from_millis(1))), "has run for 10 min; the crash loop is over");
    assert!(!story.unit.in_crash_loop());
    assert_eq!(story.pass(s(600)), [], "said once");
    story.ends(End::Code(1));
    let again = story.fails(4);
    assert_eq!(said(&again).matches("crash loop").count(), 1);
    assert!(said(&again).ends_with("5 failures in 1 min 19 s"), "counted from the first of this loop");
}

#[test]
fn a_gateway_that_never_answers_is_ended_after_exactly_the_start_limit() {
    let mut story = Story::running(gateway());
    assert_eq!(story.pass(Duration::from_millis(299_999)), []);
    let done = story.pass(Duration::from_millis(1));
    assert_eq!(words_of(&done), ["error", "TERM"]);
    assert_eq!(
        said(&done),
        "no first answer to its liveness probe after 5 min, and no sign of work for 5 min; ending it"
    );
}

/// A gateway that says by itself when its start is over.
fn with_startup() -> Rules {
    Rules { has_startup: true, ..gateway() }
}

#[test]
fn a_start_that_works_is_not_ended_before_its_stated_end_and_an_idle_one_is() {
    let mut story = Story::running(with_startup());
    let run = story.run();
    for _ in 0..11 {
        assert_eq!(story.pass(s(299)), []);
        assert_eq!(story.send(Event::Works { run }), [], "17 minutes were seen, and more");
    }
    let done = story.pass(s(300));
    assert_eq!(words_of(&done), ["error", "TERM"]);
    assert_eq!(
        said(&done),
        "no first answer to its liveness probe after 59 min 49 s, and no sign of work for 5 min; ending it"
    );
    let mut story = Story::running(with_startup());
    let run = story.run();
    for _ in 0..14 {
        story.pass(s(250));
        story.send(Event::Works { run });
    }
    let done = story.pass(s(100));
    assert_eq!(
        said(&done),
        "no first answer to its liveness probe within 1 h 0 min, although it works; ending it"
    );
}

#[test]
fn a_gateway_that_answers_may_take_as_long_as_it_likes_until_its_start_is_over() {
    let mut story = Story::running(with_startup());
    let run = story.run();
    for _ in 0..100 {
        assert_eq!(story.send(Event::Alive { run }), []);
        assert_eq!(story.pass(s(299)), [], "longer than the silence allowed later");
    }
    let done = story.pass(s(1));
    assert_eq!(said(&done), "its start is not over, and it has shown no sign of work for 5 min; ending it");
}

#[test]
fn once_its_start_is_over_work_is_no_answer() {
    let mut story = Story::running(with_startup());
    let run = story.run();
    story.send(Event::StartOver { run });
    story.pass(s(119));
    assert_eq!(story.send(Event::Works { run }), []);
    assert_eq!(said(&story.pass(s(1))), "no answer to its liveness probe for 2 min; ending it");
}

#[test]
fn a_gateway_that_falls_silent_is_ended_after_exactly_the_silence_limit() {
    let mut story = Story::running(gateway());
    story.pass(s(10));
    let run = story.run();
    assert_eq!(story.send(Event::Alive { run }), []);
    assert_eq!(story.pass(Duration::from_millis(119_999)), []);
    let done = story.pass(Duration::from_millis(1));
    assert_eq!(words_of(&done), ["error", "TERM"]);
    assert_eq!(said(&done), "no answer to its liveness probe for 2 min; ending it");
}

#[test]
fn every_answer_buys_the_whole_silence_limit_again() {
    let mut story = Story::running(gateway());
    let run = story.run();
    for _ in 0..100 {
        assert_eq!(story.pass(Duration::from_millis(119_999)), []);
        assert_eq!(story.send(Event::Alive { run }), []);
    }
    assert_eq!(words_of(&story.pass(s(120))), ["error", "TERM"]);
}

#[test]
fn a_hung_process_gets_ten_seconds_and_its_silence_is_the_reason_that_is_kept() {
    let mut story = Story::running(gateway());
    story.pass(s(300));
    assert_eq!(story.pass(Duration::from_millis(9_999)), []);
    assert_eq!(words_of(&story.pass(Duration::from_millis(1))), ["warn", "TREE"]);
    let done = story.ends(End::Signal(9));
    assert_eq!(
        said(&done),
        "no first answer to its liveness probe after 5 min, and no sign of work for 5 min; next start in 5 s"
    );
    let past = story.unit.last().unwrap();
    assert_eq!(
        past.why.as_deref(),
        Some("no first answer to its liveness probe after 5 min, and no sign of work for 5 min")
    );
    assert_eq!((past.end.as_ref(), past.ran), (Some(&End::Signal(9)), s(310)));
}

#[test]
fn a_hung_process_gets_no_more_than_its_own_grace() {
    let mut story = Story::running(Rules { grace: s(4), ..gateway() });
    story.pass(s(300));
    assert_eq!(words_of(&story.pass(s(4))), ["warn", "TREE"]);
}

#[test]
fn an_answer_after_the_verdict_changes_nothing() {
    let mut story = Story::running(gateway());
    story.pass(s(300));
    let run = story.run();
    assert_eq!(story.send(Event::Alive { run }), []);
    assert_eq!(story.is(), "term");
}

#[test]
fn a_service_without_probes_may_be_silent_for_ever_and_is_ready_when_it_runs() {
    let mut story = Story::running(plain());
    assert!(matches!(story.unit.state, State::Running { ready: true, .. }));
    assert_eq!((story.pass(s(10_000_000)), story.unit.deadline()), (vec![], None));
}

#[test]
fn what_a_run_names_as_failing_is_kept_until_it_names_something_else_or_is_over() {
    let mut story = Story::running(gateway());
    let run = story.run();
    let failing = |run, parts: &[&str]| {
        let parts = parts.iter().map(|part| (*part).to_owned()).collect();
        Event::Failing { run, parts }
    };
    assert_eq!(story.send(failing(run, &["agent-database:main"])), [], "the log is public");
    assert_eq!(story.unit.failing(), ["agent-database:main"]);
    story.send(failing(Run(run.0 - 1), &["of an older run"]));
    assert_eq!(story.unit.failing(), ["agent-database:main"]);
    story.send(failing(run, &[]));
    assert_eq!(story.unit.failing(), [""; 0]);
    story.send(failing(run, &["telegram"]));
    story.fails(1);
    story.pass(s(60));
    story.gets_running();
    assert_eq!(story.unit.failing(), [""; 0]);
}

#[test]
fn readiness_is_said_when_it_changes_and_not_when_it_is_repeated() {
    let mut story = Story::running(gateway());
    let run = story.run();
    story.pass(s(8));
    assert_eq!(said(&story.send(Event::Readiness { run, ready: true })), "ready 8 s after its start");
    assert_eq!(story.send(Event::Readiness { run, ready: true }), []);
    assert_eq!(said(&story.send(Event::Readiness { run, ready: false })), "no longer ready");
    assert_eq!(story.is(), "running", "not being ready ends nothing");
}

#[test]
fn a_stop_goes_from_term_to_tree_to_keeper_to_sweep_to_stuck_each_once_and_each_in_its_time() {
    let mut story = Story::running(plain());
    assert_eq!(words_of(&story.send(Event::Stop)), ["TERM"]);
    let mut ladder = Vec::new();
    for span in [330, 5, 5, 5] {
        assert_eq!(story.pass(s(span).saturating_sub(Duration::from_millis(1))), []);
        ladder.extend(words_of(&story.pass(Duration::from_millis(1))));
    }
    assert_eq!(ladder, ["warn", "TREE", "KEEPER", "sweep", "error"]);
    assert!(story.unit.is_finished() && !story.unit.is_at_rest());
    assert_eq!((story.pass(s(1_000_000)), story.unit.deadline()), (vec![], None));
    assert_eq!(story.send(Event::Start), [], "nothing is started over a process that lives");
}

#[test]
fn a_stop_that_is_obeyed_ends_main_alone_first_and_then_its_tree() {
    let mut story = Story::running(plain());
    story.send(Event::Stop);
    story.pass(s(2));
    let run = story.run();
    assert_eq!(words_of(&story.send(Event::MainEnded { run, end: End::Code(0) })), ["TREE"]);
    assert_eq!(story.send(Event::Gone { run, end: End::Code(0) }), []);
    assert_eq!(story.is(), "down");
    let past = story.unit.last().unwrap();
    assert_eq!(past.why.as_deref(), Some("stopped on request"));
    assert_eq!((past.end.as_ref(), past.ran), (Some(&End::Code(0)), s(2)));
}

#[test]
fn a_second_stop_neither_repeats_a_signal_nor_starts_the_grace_anew() {
    let mut story = Story::running(plain());
    story.send(Event::Stop);
    story.pass(s(329));
    assert_eq!(story.send(Event::Stop), []);
    assert_eq!(words_of(&story.pass(s(1))), ["warn", "TREE"]);
}

#[test]
fn main_ending_in_the_last_moment_of_its_grace_does_not_kill_the_tree_twice() {
    let mut story = Story::running(plain());
    story.send(Event::Stop);
    story.pass(Duration::from_millis(329_999));
    let run = story.run();
    assert_eq!(words_of(&story.send(Event::MainEnded { run, end: End::Code(0) })), ["TREE"]);
    assert_eq!(story.pass(Duration::from_millis(4_999)), []);
    assert_eq!(words_of(&story.pass(Duration::from_millis(1))), ["KEEPER"]);
}

#[test]
fn helpers_that_outlive_a_crashed_main_process_are_gone_before_the_next_start() {
    let mut story = Story::running(plain());
    let run = story.run();
    assert_eq!(story.send(Event::MainEnded { run, end: End::Signal(11) }), [], "the keeper ends them itself");
    assert_eq!(story.pass(Duration::from_millis(4_999)), []);
    assert_eq!(words_of(&story.pass(Duration::from_millis(1))), ["KEEPER"], "unless it is stuck");
    assert_eq!(words_of(&story.send(Event::Gone { run, end: End::Unseen })), ["sweep"]);
    let done = story.send(Event::Swept { run });
    assert_eq!(said(&done), "killed by SIGSEGV; next start in 5 s", "how main ended is not forgotten");
}

#[test]
fn what_a_killed_keeper_left_behind_is_swept_before_the_next_start() {
    let mut story = Story::running(plain());
    let run = story.run();
    assert_eq!(words_of(&story.send(Event::Gone { run, end: End::Unseen })), ["sweep"]);
    assert_eq!(story.is(), "orphans");
    assert_eq!(
        said(&story.send(Event::Swept { run })),
        "ended unseen (its keeper was killed); next start in 5 s"
    );
}

#[test]
fn a_stuck_service_goes_on_when_the_kernel_lets_go() {
    let stuck = || {
        let mut story = Story::running(plain());
        story.send(Event::Restart);
        story.pass(s(345));
        assert_eq!(story.is(), "stuck");
        story
    };
    let mut story = stuck();
    let run = story.run();
    assert_eq!(story.send(Event::Gone { run, end: End::Unseen }), [], "a dead keeper proves nothing");
    assert_eq!(words_of(&story.send(Event::Swept { run })), ["launch"]);
    let mut story = stuck();
    let run = story.run();
    let done = story.send(Event::Gone { run, end: End::Signal(9) });
    assert_eq!(words_of(&done), ["launch"], "a keeper that saw everything end does");
    assert_eq!(story.send(Event::Swept { run }), [], "and the sweep comes too late to matter");
}

#[test]
fn a_stop_is_obeyed_whatever_it_interrupts() {
    let mut waiting = Story::running(gateway());
    waiting.fails(1);
    assert_eq!((waiting.send(Event::Stop), waiting.is()), (vec![], "down"));
    assert_eq!(waiting.pass(s(1_000_000)), [], "the wait that was cut short starts nothing");

    let mut preparing = Story::of(gateway());
    preparing.send(Event::Start);
    let run = preparing.run();
    assert_eq!(words_of(&preparing.send(Event::Stop)), ["TREE"]);
    assert_eq!((preparing.send(Event::Prepared { run, outcome: Ok(()) }), preparing.is()), (vec![], "down"));

    let mut starting = Story::of(gateway());
    starting.send(Event::Start);
    starting.gets_prepared();
    assert_eq!(words_of(&starting.send(Event::Stop)), ["TREE"]);
    assert_eq!(starting.send(Event::Exec { run, pid: PID }), [], "it executes in the same moment");
    assert!(matches!(starting.unit.state, State::Ending { pid: Some(PID), .. }));
    assert_eq!((starting.ends(End::Signal(9)), starting.is()), (vec![], "down"));

    let mut repairing = Story::running(gateway());
    repairing.runs_for(s(1), End::Code(78));
    let run = repairing.run();
    assert_eq!(words_of(&repairing.send(Event::Stop)), ["TREE"]);
    assert_eq!((repairing.send(Event::Gone { run, end: End::Signal(9) }), repairing.is()), (vec![], "down"));
}

#[test]
fn a_preparation_that_hangs_is_ended_after_its_deadline_and_fails_the_start() {
    let mut story = Story::of(gateway());
    story.send(Event::Start);
    assert_eq!(story.pass(Duration::from_millis(59_999)), []);
    assert_eq!(words_of(&story.pass(Duration::from_millis(1))), ["TREE"]);
    let run = story.run();
    let done = story.send(Event::Prepared { run, outcome: Ok(()) });
    assert_eq!(
        said(&done),
        "its preparation took too long; next start in 5 s",
        "a late success comes too late"
    );
}

#[test]
fn an_exec_that_hangs_on_its_disk_is_ended_after_30_s() {
    let mut story = Story::of(plain());
    story.send(Event::Start);
    assert_eq!(story.pass(Duration::from_millis(29_999)), []);
    assert_eq!(words_of(&story.pass(Duration::from_millis(1))), ["TREE"]);
    assert_eq!(
        said(&story.ends(End::Signal(9))),
        "the program was not executing after 30 s; next start in 5 s"
    );
}

#[test]
fn a_preparation_that_cannot_succeed_parks_the_service_with_its_reason() {
    let mut story = Story::of(gateway());
    story.send(Event::Start);
    let (run, why) = (story.run(), "the port belongs to PID 1".to_owned());
    let done = story.send(Event::Prepared { run, outcome: Err(Refusal { why: why.clone(), retry: false }) });
    assert_eq!(said(&done), "parked: the port belongs to PID 1");
    assert_eq!(story.unit.state, State::Parked { why });
}

#[test]
fn a_start_while_it_is_being_stopped_gives_a_fresh_one_when_the_old_one_is_gone() {
    let mut story = Story::running(plain());
    story.fails(4);
    story.pass(s(40));
    story.gets_running();
    story.send(Event::Stop);
    assert_eq!(story.send(Event::Start), []);
    let done = story.ends(End::Code(0));
    assert_eq!(deeds(&done), ["TREE", "launch"]);
    assert_eq!(story.unit.failures(), 0, "with a fresh backoff");
    story.runs_for(s(1), End::Code(1));
    assert_eq!(story.waits(), Some(5));
}

#[test]
fn the_last_order_given_while_it_ends_is_the_one_that_counts() {
    let mut story = Story::running(plain());
    for order in [Event::Stop, Event::Start, Event::Restart, Event::Stop, Event::Restart, Event::Stop] {
        story.send(order);
    }
    story.ends(End::Code(0));
    assert_eq!(story.is(), "down");
}

#[test]
fn a_restart_ends_the_old_one_in_order_and_begins_with_a_fresh_backoff() {
    let mut story = Story::running(plain());
    story.fails(3);
    story.pass(s(20));
    story.gets_running();
    assert_eq!(words_of(&story.send(Event::Restart)), ["TERM"]);
    assert_eq!(deeds(&story.ends(End::Code(0))), ["TREE", "launch"]);
    assert_eq!(story.unit.last().unwrap().why.as_deref(), Some("restarted on request"));
    assert_eq!((story.unit.failures(), story.unit.restarts()), (0, 4));
}

#[test]
fn an_operators_start_cuts_a_wait_short_and_forgets_the_failures() {
    let mut story = Story::running(plain());
    story.fails(4);
    assert_eq!(words_of(&story.send(Event::Start)), ["launch"]);
    story.runs_for(s(1), End::Code(1));
    assert_eq!(story.waits(), Some(5));
}

#[test]
fn after_close_nothing_is_ever_started_again() {
    for (state, order) in samples().into_iter().zip([Event::Start, Event::Restart].into_iter().cycle()) {
        let mut unit = unit_in(state);
        unit.step(Event::Close, NOW);
        unit.step(order, NOW);
        unit.rearm();
        let mut done = unit.step(Event::Start, NOW);
        let rest = [Event::Gone { run: RUN, end: End::Code(0) }, Event::Swept { run: RUN }, Event::Restart];
        done.extend(rest.into_iter().flat_map(|event| unit.step(event, NOW)));
        assert!(!deeds(&done).iter().any(|d| matches!(*d, "prepare" | "launch" | "repair")), "{done:?}");
    }
}

#[test]
fn while_starts_are_refused_it_runs_on_and_whatever_ends_stays_down() {
    let mut running = Story::running(gateway());
    running.unit.refuse_starts();
    assert_eq!((running.pass(s(100)), running.is()), (vec![], "running"));
    let done = running.ends(End::Code(0));
    assert_eq!(said(&done), "exited with code 0; not started again, everything is being stopped");
    assert_eq!(running.is(), "down");
    assert_eq!(running.unit.last().unwrap().end, Some(End::Code(0)), "its last end is kept");

    let mut preparing = Story::of(gateway());
    preparing.send(Event::Start);
    preparing.unit.refuse_starts();
    assert_eq!((preparing.gets_prepared(), preparing.is()), (vec![], "down"));
}

#[test]
fn hurry_skips_the_grace_and_nothing_else() {
    let mut story = Story::running(plain());
    story.send(Event::Close);
    story.pass(s(1));
    assert_eq!(words_of(&story.send(Event::Hurry)), ["TREE"]);
    assert_eq!(story.send(Event::Hurry), [], "once");
    assert_eq!(words_of(&story.pass(s(15))), ["KEEPER", "sweep", "error"]);
    assert!(story.unit.is_finished());
}

#[test]
fn with_a_delay_of_zero_a_failed_run_is_followed_by_the_next_in_the_same_step() {
    let mut story = Story::running(Rules { backoff: Backoff::seconds(0, 0, 600), ..plain() });
    for _ in 0..10 {
        assert_eq!(deeds(&story.runs_for(s(1), End::Code(1))), ["launch"]);
    }
    assert_eq!(story.unit.failures(), 10);
}

/// A fork that fails is reported within the call that asked for it: with a wait of zero the
/// two would call each other for ever, and PID 1 would never look at a signal again.
#[test]
fn a_start_in_which_nothing_ran_waits_a_second_even_with_a_delay_of_zero() {
    let impatient = |rules| Story::of(Rules { backoff: Backoff::seconds(0, 0, 600), ..rules });
    let mut unprepared = impatient(gateway());
    unprepared.send(Event::Start);
    let run = unprepared.run();
    let outcome = Err(Refusal { why: "creating its process: EAGAIN".into(), retry: true });
    assert_eq!(deeds(&unprepared.send(Event::Prepared { run, outcome })), [""; 0]);
    assert_eq!(unprepared.waits(), Some(1));

    let mut unforked = impatient(plain());
    unforked.send(Event::Start);
    let run = unforked.run();
    assert_eq!(deeds(&unforked.send(Event::Gone { run, end: End::Code(70) })), [""; 0]);
    assert_eq!(unforked.waits(), Some(1));
}

#[test]
fn a_service_stopped_before_its_first_start_can_be_armed_again_unless_everything_is_being_stopped() {
    let mut story = Story::of(plain());
    story.send(Event::Stop);
    story.unit.rearm();
    assert_eq!(story.is(), "idle");
    story.send(Event::Close);
    story.unit.rearm();
    assert_eq!(story.is(), "down");
}

#[test]
fn a_withdrawn_service_ends_in_its_grace_and_is_ready_to_start_anew() {
    let mut story = Story::running(plain());
    assert_eq!(words_of(&story.send(Event::Withdraw)), ["TERM"]);
    assert_eq!(words_of(&story.ends(End::Code(0))), ["TREE"]);
    assert_eq!(story.is(), "idle");
    assert_eq!((story.unit.failures(), story.unit.deadline()), (0, None));
    assert_eq!(deeds(&story.send(Event::Start)), ["launch"]);
}

#[test]
fn a_stop_that_an_operator_takes_back_while_it_cannot_start_leaves_it_ready_to_start() {
    let mut story = Story::running(plain());
    story.send(Event::Stop);
    story.send(Event::Withdraw);
    story.unit.rearm();
    story.ends(End::Code(0));
    assert_eq!(story.is(), "idle");
}

#[test]
fn a_held_service_waits_past_its_time_without_a_deadline_and_starts_when_it_is_released() {
    let mut story = Story::running(plain());
    story.unit.hold(true);
    story.ends(End::Code(1));
    assert_eq!((story.is(), story.unit.deadline()), ("waiting", None));
    assert_eq!(deeds(&story.pass(s(1_000))), [""; 0]);
    story.unit.hold(false);
    assert_eq!(deeds(&story.send(Event::Tick)), ["launch"], "its time has come long ago");
}

#[test]
fn nothing_starts_a_held_service() {
    for before in samples() {
        let mut unit = unit_in(before);
        unit.hold(true);
        let mut done = Vec::new();
        for event in [
            Event::Start,
            Event::Restart,
            Event::MainEnded { run: RUN, end: End::Code(0) },
            Event::Gone { run: RUN, end: End::Code(0) },
            Event::Swept { run: RUN },
            Event::Tick,
        ] {
            done.extend(unit.step(event, NOW));
        }
        assert!(!deeds(&done).iter().any(|d| matches!(*d, "prepare" | "launch")), "{done:?}");
    }
}

// === A simulation that does what it likes ===

/// What a keeper keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Prepare,
    Main,
    Repair,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Program {
    Forked,
    Executing,
    /// Main is gone, its helpers are not.
    Helpers,
    Gone,
}

/// One keeper with its tree, as it really is, and what of that has not been reported yet.
#[derive(Debug)]
struct Kept {
    run: Run,
    part: Part,
    program: Program,
    keeper_lives: bool,
    /// Ends with main, so that helpers know how it ended.
    end: End,
    /// Reports in the pipe, in their order; the reaping of the keeper comes after all of them.
    pipe: VecDeque<Event>,
}

impl Kept {
    fn new(run: Run, part: Part) -> Self {
        let (program, end) = (Program::Forked, End::Code(0));
        Self { run, part, program, keeper_lives: true, end, pipe: VecDeque::new() }
    }

    fn say(&mut self, event: Event) {
        if self.keeper_lives && self.part == Part::Main {
            self.pipe.push_back(event);
        }
    }

    fn main_ends(&mut self, end: End) {
        if matches!(self.program, Program::Forked | Program::Executing) {
            self.program = Program::Helpers;
            self.end = end.clone();
            self.say(Event::MainEnded { run: self.run, end });
        }
    }

    fn tree_ends(&mut self) {
        if self.program == Program::Helpers {
            self.program = Program::Gone;
            if std::mem::take(&mut self.keeper_lives) {
                self.last_word(self.end.clone());
            }
        }
    }

    fn keeper_dies(&mut self) {
        if std::mem::take(&mut self.keeper_lives) {
            // A step is one process and dies with its keeper; a service has helpers that do not.
            if self.part == Part::Prepare {
                self.program = Program::Gone;
            }
            self.last_word(End::Unseen);
        }
    }

    fn last_word(&mut self, end: End) {
        let run = self.run;
        let refusal = |end: &End| Refusal { why: end.to_string(), retry: *end != End::Code(2) };
        self.pipe.push_back(match self.part {
            Part::Prepare if end == End::Code(0) => Event::Prepared { run, outcome: Ok(()) },
            Part::Prepare => Event::Prepared { run, outcome: Err(refusal(&end)) },
            Part::Main | Part::Repair => Event::Gone { run, end },
        });
    }
}

/// One thing that happens.
#[derive(Debug, Clone)]
enum Move {
    /// Time passes, past deadlines too: a machine can be suspended.
    Pass(u32),
    ToDeadline,
    Order(Event),
    Exec,
    MainEnds(End),
    TreeEnds,
    KeeperDies,
    Answer {
        alive: bool,
        ready: bool,
    },
    /// Reports arrive.
    Deliver(u8),
    /// Somebody looked for orphans of a killed keeper and found and ended them.
    SweepEnds,
    /// The disk hangs: no process does anything, not even die, until it is over.
    Freeze(bool),
    /// SIGTERM is ignored from now on, or not.
    Stubborn(bool),
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let order = prop_oneof![Just(Event::Start), Just(Event::Stop), Just(Event::Restart)];
    let end = prop_oneof![
        3 => Just(End::Code(0)),
        3 => Just(End::Code(1)),
        1 => Just(End::Code(2)),
        3 => Just(End::Code(EXIT_CONFIG)),
        1 => Just(End::Signal(11)),
        1 => Just(End::OutOfMemory),
        1 => Just(End::NotStarted { stage: Stage::Exec, errno: 2 }),
    ];
    let one = prop_oneof![
        4 => (0u32..1_000).prop_map(Move::Pass),
        2 => (0u32..2_000_000).prop_map(Move::Pass),
        4 => Just(Move::ToDeadline),
        2 => order.prop_map(Move::Order),
        1 => Just(Move::Order(Event::Hurry)),
        1 => Just(Move::Order(Event::Withdraw)),
        4 => Just(Move::Exec),
        4 => end.prop_map(Move::MainEnds),
        4 => Just(Move::TreeEnds),
        1 => Just(Move::KeeperDies),
        2 => (any::<bool>(), any::<bool>()).prop_map(|(alive, ready)| Move::Answer { alive, ready }),
        8 => (1u8..5).prop_map(Move::Deliver),
        2 => Just(Move::SweepEnds),
        1 => any::<bool>().prop_map(Move::Freeze),
        1 => any::<bool>().prop_map(Move::Stubborn),
    ];
    proptest::collection::vec(one, 0..200)
}

fn rules() -> impl Strategy<Value = Rules> {
    let optional = |most: u64| proptest::option::of((1..most).prop_map(s));
    let liveness = proptest::option::of((1u64..400, 1u64..200));
    let waits = (0u64..20, 0u64..100, 0u64..700);
    let probes = (liveness, any::<bool>(), any::<bool>());
    (waits, 1u64..400, optional(100), optional(400), probes).prop_map(
        |((first, more, reset), grace, prepare, repair, (liveness, has_startup, has_readiness))| Rules {
            backoff: Backoff::seconds(first, first + more, reset),
            grace: s(grace),
            prepare,
            repair,
            liveness: liveness.map(|(start, silence)| Liveness {
                start: s(start),
                start_at_most: s(2 * start),
                silence: s(silence),
            }),
            has_startup,
            has_readiness,
        },
    )
}

struct Simulation {
    unit: Unit,
    now: Moment,
    /// The keepers that have not been reaped. More than one only when an old one is held by
    /// the kernel after all that it kept was swept.
    kept: Vec<Kept>,
    sweep: Option<Run>,
    frozen: bool,
    stubborn: bool,
    closed: bool,
    launches: usize,
}

impl Simulation {
    fn new(rules: Rules) -> Self {
        Self {
            unit: Unit::new(rules),
            now: Moment::from_millis(1),
            kept: Vec::new(),
            sweep: None,
            frozen: false,
            stubborn: false,
            closed: false,
            launches: 0,
        }
    }

    fn feed(&mut self, event: Event) {
        let before = self.unit.state.clone();
        let tick = event == Event::Tick;
        self.closed |= event == Event::Close;
        let actions = self.unit.step(event, self.now);
        self.check(&before, tick);
        for action in actions {
            self.act(&action);
        }
    }

    fn check(&self, before: &State, tick: bool) {
        if tick {
            let due = self.unit.deadline();
            assert!(due.is_none_or(|due| due > self.now), "busy loop in {:?}", self.unit.state);
        }
        if let State::Waiting { until } = self.unit.state {
            let (least, most) = (self.unit.rules.backoff.wait(1), self.unit.rules.backoff.wait(u32::MAX));
            let wait = until.since(self.now);
            assert!(wait <= most.max(NOTHING_RAN_WAIT), "waits {wait:?} of at most {most:?}");
            if *before != self.unit.state {
                assert!(wait >= least && !wait.is_zero(), "waits {wait:?} of at least {least:?}");
            }
        }
        if self.unit.is_at_rest() {
            assert!(self.unit.run().is_none());
        }
    }

    fn act(&mut self, action: &Action) {
        match *action {
            Action::Prepare(run) => self.begin(run, Part::Prepare),
            Action::Launch(run) => self.begin(run, Part::Main),
            Action::Repair(run) => self.begin(run, Part::Repair),
            Action::Term(run) => {
                let obeys = !self.frozen && !self.stubborn;
                if let Some(kept) = self.keeper_of(run).filter(|_| obeys) {
                    kept.main_ends(End::Code(0));
                }
            }
            Action::KillTree(run) => {
                let frozen = self.frozen;
                if let Some(kept) = self.keeper_of(run).filter(|_| !frozen) {
                    kept.main_ends(End::Signal(9));
                    kept.tree_ends();
                }
            }
            Action::KillKeeper(run) => {
                let frozen = self.frozen;
                if let Some(kept) = self.keeper_of(run).filter(|_| !frozen) {
                    kept.keeper_dies();
                }
            }
            Action::Sweep(run) => {
                assert_eq!(self.sweep.replace(run).filter(|old| *old == run), None, "one sweep for a run");
            }
            Action::Say(..) => {}
        }
    }

    fn begin(&mut self, run: Run, part: Part) {
        assert!(!self.closed, "started after it was closed");
        let alive = self.kept.iter().find(|k| k.program != Program::Gone);
        assert!(alive.is_none(), "{run:?} begins while there is {alive:?}");
        assert!(self.kept.iter().all(|k| k.run < run || k.part != part), "{run:?} begins twice");
        self.launches += 1;
        self.kept.push(Kept::new(run, part));
    }

    fn keeper_of(&mut self, run: Run) -> Option<&mut Kept> {
        self.kept.iter_mut().find(|k| k.run == run && k.keeper_lives)
    }

    fn current(&mut self) -> Option<&mut Kept> {
        let frozen = self.frozen;
        self.kept.last_mut().filter(|_| !frozen)
    }

    fn happens(&mut self, what: Move) {
        match what {
            Move::Pass(ms) => {
                let mut until = self.now + Duration::from_millis(u64::from(ms));
                if self.closed {
                    // The way down is measured with a loop that meets its deadlines.
                    until = self.unit.deadline().map_or(until, |due| due.min(until));
                }
                self.now = until;
                self.feed(Event::Tick);
            }
            Move::ToDeadline => {
                if let Some(due) = self.unit.deadline() {
                    self.now = self.now.max(due);
                    self.feed(Event::Tick);
                }
            }
            Move::Order(order) => self.feed(order),
            Move::Exec => {
                if let Some(kept) = self.current().filter(|k| k.program == Program::Forked) {
                    kept.program = Program::Executing;
                    let run = kept.run;
                    kept.say(Event::Exec { run, pid: PID });
                }
            }
            Move::MainEnds(end) => {
                if let Some(kept) = self.current() {
                    kept.main_ends(end);
                }
            }
            Move::TreeEnds => {
                if let Some(kept) = self.current() {
                    kept.tree_ends();
                }
            }
            Move::KeeperDies => {
                if let Some(kept) = self.current() {
                    kept.keeper_dies();
                }
            }
            Move::Answer { alive, ready } => {
                if let Some(kept) = self.current().filter(|k| k.program == Program::Executing) {
                    let run = kept.run;
                    if alive {
                        kept.say(Event::Alive { run });
                    }
                    kept.say(Event::Readiness { run, ready });
                }
            }
            Move::Deliver(count) => self.deliver(usize::from(count)),
            Move::SweepEnds => self.end_sweep(),
            Move::Freeze(frozen) => self.frozen = frozen,
            Move::Stubborn(stubborn) => self.stubborn = stubborn,
        }
    }

    /// Reports of different keepers come in any order, those of one in theirs.
    fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            let Some(kept) = self.kept.iter_mut().find(|k| !k.pipe.is_empty()) else { return };
            let Some(event) = kept.pipe.pop_front() else { return };
            self.kept.retain(|k| k.keeper_lives || !k.pipe.is_empty() || k.program != Program::Gone);
            self.feed(event);
        }
    }

    fn end_sweep(&mut self) {
        if self.frozen {
            return;
        }
        if let Some(run) = self.sweep.take() {
            for kept in self.kept.iter_mut().filter(|k| k.run == run) {
                // The keeper is not marked as one of the run, and dies when it is let.
                kept.program = Program::Gone;
            }
            self.kept.retain(|k| k.keeper_lives || !k.pipe.is_empty());
            self.feed(Event::Swept { run });
        }
    }
}

proptest! {
    /// Two of one service never live at once, waits stay within their bounds, a tick leaves no
    /// deadline behind it, and a close ends in its time, whatever the simulation does and whether or
    /// not it ever answers again.
    #[test]
    fn whatever_the_world_does_one_run_lives_at_most_and_every_close_ends_in_time(
        rules in rules(),
        before in moves(),
        after in moves(),
        hurry in any::<bool>(),
    ) {
        let grace = rules.grace;
        let mut simulation = Simulation::new(rules);
        simulation.feed(Event::Start);
        for what in before {
            simulation.happens(what);
        }
        let closed_at = simulation.now;
        simulation.feed(Event::Close);
        if hurry {
            simulation.feed(Event::Hurry);
        }
        for what in after {
            simulation.happens(what);
        }
        // From here on nothing answers.
        let mut ticks = 0;
        let mut finished_at = simulation.now;
        while !simulation.unit.is_finished() {
            let due = simulation.unit.deadline();
            prop_assert!(due.is_some(), "waits for ever in {:?}", simulation.unit.state);
            simulation.happens(Move::ToDeadline);
            finished_at = simulation.now;
            ticks += 1;
            prop_assert!(ticks <= 4, "more phases than there are");
        }
        let bound = if hurry { KILL_DEADLINE * 3 } else { grace + KILL_DEADLINE * 3 };
        if ticks > 0 {
            prop_assert!(finished_at <= closed_at + bound, "ended {:?} after the close", finished_at.since(closed_at));
        }
    }

    /// The same with a simulation that never refuses to die: it ends down, and never stuck.
    #[test]
    fn in_a_world_where_processes_die_a_close_leaves_nothing_alive(rules in rules(), before in moves()) {
        let mut simulation = Simulation::new(rules);
        simulation.feed(Event::Start);
        for what in before.into_iter().filter(|m| !matches!(m, Move::Freeze(_) | Move::Stubborn(_))) {
            simulation.happens(what);
        }
        simulation.feed(Event::Close);
        for _ in 0..50 {
            simulation.happens(Move::Deliver(5));
            simulation.happens(Move::SweepEnds);
            simulation.happens(Move::TreeEnds);
        }
        prop_assert_eq!(&simulation.unit.state, &State::Down);
        prop_assert!(simulation.kept.iter().all(|k| k.program == Program::Gone), "{:?}", simulation.kept);
    }

    /// Nobody is left behind: a service that is wanted and whose processes behave comes up again.
    #[test]
    fn after_any_past_an_operators_start_brings_the_service_up(rules in rules(), before in moves()) {
        let mut simulation = Simulation::new(rules);
        simulation.feed(Event::Start);
        for what in before {
            simulation.happens(what);
        }
        (simulation.frozen, simulation.stubborn) = (false, false);
        for _ in 0..100 {
            if matches!(simulation.unit.state, State::Running { .. }) {
                break;
            }
            if simulation.unit.is_at_rest() {
                simulation.feed(Event::Start);
            }
            simulation.happens(Move::Deliver(5));
            simulation.happens(Move::SweepEnds);
            let starting = matches!(simulation.unit.state, State::Starting { .. });
            match simulation.kept.last().map(|k| (k.part, k.program)) {
                Some((Part::Main, Program::Forked)) if starting => simulation.happens(Move::Exec),
                Some(_) => {
                    simulation.happens(Move::MainEnds(End::Code(0)));
                    simulation.happens(Move::TreeEnds);
                }
                None => {}
            }
            simulation.happens(Move::Deliver(5));
        }
        let up = matches!(simulation.unit.state, State::Running { .. });
        let Simulation { unit, kept, launches, .. } = &simulation;
        prop_assert!(up, "{:?} with {:?} after {} launches", unit.state, kept, launches);
    }
}
