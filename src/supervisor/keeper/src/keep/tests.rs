//! The keeper's loop runs over a fake kernel.

use super::*;
use cvm_secrets::base64_bytes::PackedEnvironment;
use cvm_sys::fake::{Fake, Manners, exited, killed_by};

fn s(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// A keeper whose program executes, and PID 1's end of its report pipe.
fn keeper(dir: &tempfile::TempDir, liveness: bool) -> (Keeper<Fake>, OwnedFd) {
    let (reports, theirs) = descriptor::pipe().unwrap();
    descriptor::set_nonblocking(&reports).unwrap();
    let file = dir.path().join("service.log").to_string_lossy().into_owned();
    let probe = cvm_protocol::keeper::ProbeSpec {
        probe: cvm_protocol::keeper::Probe::UnixHttp { socket: "/no/such".into(), path: "/".into() },
        eager_ms: 1000,
        calm_ms: 1000,
        timeout_ms: 1000,
    };
    let spec = KeeperSpec {
        name: "service".into(),
        run: "service/1".into(),
        argv: vec!["program".into()],
        environment: PackedEnvironment::pack(&[]),
        user: "root".into(),
        directory: "/".into(),
        leftovers: Leftovers::Kill,
        oom_score_adj: 0,
        limits: None,
        channel: Channel::None,
        log: Log { file, rotate_bytes: 1 << 20, copy_to_stdout: false, json: false },
        liveness: liveness.then_some(probe),
        readiness: None,
        startup: None,
    };
    let given = ProgramInput::of(&Channel::None).unwrap();
    let mut kernel = Fake::default();
    // The program does nothing by itself.
    kernel.manners = vec![("program", Manners::IgnoresTerm)];
    let mut keeper = begin(kernel, &spec, &given, Reporter::new(theirs).unwrap()).expect("it starts");
    // No process holds the program's ends of its output and exec pipes, so they are closed.
    keeper.kernel.started.clear();
    keeper.turn();
    (keeper, reports)
}

/// What PID 1 has been told so far.
fn told(reports: &OwnedFd) -> Vec<KeeperReport> {
    let (mut text, mut bytes) = (Vec::new(), [0u8; 4096]);
    while let Ok(n @ 1..) = nix::unistd::read(reports, &mut bytes) {
        text.extend_from_slice(&bytes[..n]);
    }
    let lines = text.split(|b| *b == b'\n').filter(|line| !line.is_empty());
    lines.map(|line| serde_json::from_slice(line).unwrap()).collect()
}

/// Writes into the pipe until it takes nothing more.
fn fill(pipe: &OwnedFd) {
    let own = descriptor::own_nonblocking(std::os::fd::AsRawFd::as_raw_fd(pipe)).unwrap();
    while descriptor::write_some(&own, &[b'\n'; 4096]).is_ok() {}
}

#[test]
fn twenty_thousand_deaths_at_one_instant_are_all_reaped_by_one_signal() {
    let dir = tempfile::tempdir().unwrap();
    let (mut keeper, _reports) = keeper(&dir, false);
    let orphans: Vec<Pid> = (0..20_000).map(|_| keeper.kernel.adopt(Manners::IgnoresTerm)).collect();
    for pid in orphans {
        keeper.kernel.dies(pid, killed_by(libc::SIGKILL));
    }
    // One signal has to be enough: the next one is far away.
    keeper.kernel.signal_at(s(3600), libc::SIGCHLD);
    while keeper.kernel.elapsed < s(5) {
        keeper.turn();
    }
    assert_eq!(keeper.kernel.children(), [keeper.main]);
}

#[test]
fn it_leaves_when_the_program_dies_with_twenty_thousand_of_its_orphans() {
    let dir = tempfile::tempdir().unwrap();
    let (mut keeper, reports) = keeper(&dir, false);
    let orphans: Vec<Pid> = (0..20_000).map(|_| keeper.kernel.adopt(Manners::IgnoresTerm)).collect();
    for pid in orphans.into_iter().chain([keeper.main]) {
        keeper.kernel.dies(pid, exited(3));
    }
    while matches!(keeper.turn(), Turn::Go) {}
    assert_eq!(told(&reports).last(), Some(&KeeperReport::TreeGone { end: End::Code(3), killed: 0 }));
}

#[test]
fn who_outlives_the_program_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (mut keeper, reports) = keeper(&dir, false);
    let child = keeper.kernel.adopt(Manners::IgnoresTerm);
    keeper.kernel.dies(keeper.main, exited(0));
    while matches!(keeper.turn(), Turn::Go) {}
    assert!(keeper.kernel.sent_at(child, libc::SIGKILL).is_some());
    assert_eq!(told(&reports).last(), Some(&KeeperReport::TreeGone { end: End::Code(0), killed: 1 }));
}

#[test]
fn a_report_pipe_that_is_full_delays_reports_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (mut keeper, reports) = keeper(&dir, true);
    assert_eq!(told(&reports), [KeeperReport::Started { pid: keeper.main.as_raw() }]);
    fill(keeper.reporter.pipe());
    // A minute of answers that nobody reads, then the order to end.
    keeper.kernel.signal_at(s(60), libc::SIGTERM);
    while keeper.kernel.sent_at(keeper.main, libc::SIGTERM).is_none() {
        keeper.turn();
    }
    assert_eq!(keeper.kernel.elapsed, s(60));
    keeper.kernel.dies(keeper.main, exited(0));
    keeper.kernel.adopt(Manners::EndsAfter(s(0)));
    keeper.turn();
    told(&reports);
    while matches!(keeper.turn(), Turn::Go) {}
    let silence = |report: &KeeperReport| matches!(report, KeeperReport::Liveness { .. });
    let last: Vec<_> = told(&reports).into_iter().skip_while(silence).collect();
    let end = End::Code(0);
    assert_eq!(
        last,
        [KeeperReport::MainEnded { end: end.clone() }, KeeperReport::TreeGone { end, killed: 1 }]
    );
}

#[test]
fn last_words_that_nobody_reads_are_given_up_on() {
    let dir = tempfile::tempdir().unwrap();
    let (mut keeper, _reports) = keeper(&dir, false);
    fill(keeper.reporter.pipe());
    keeper.kernel.dies(keeper.main, exited(0));
    while matches!(keeper.turn(), Turn::Go) {}
    assert_eq!(keeper.kernel.elapsed, LAST_REPORTS_WAIT);
}

#[test]
fn a_stage_that_fails_between_fork_and_exec_keeps_its_name_on_the_way_to_pid_1() {
    for stage in cvm_sys::spawn::Stage::ALL {
        let told = Stage::from_byte(stage.to_byte()).expect("it is one of the protocol's");
        assert_eq!(format!("{told:?}"), format!("{stage:?}"));
    }
}
