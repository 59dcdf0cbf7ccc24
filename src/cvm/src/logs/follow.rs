//! Follows a log across rotations.
//!
//! It waits for inotify on the directory, and reads the files every [`INTERVAL_MS`] all the same, because
//! inotify reports nothing on some file systems. It notices at once that its reader has left, not at the
//! next line.

use super::file::{Log, unreadable};
use super::tail::{CopyError, copy_rest, is_same};
use crate::failure::{Failure, warn};
use crate::safe_output::SafeOutput;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd as _;

const INTERVAL_MS: u16 = 2000;

/// Follows the log until the operator interrupts it, or the reader has left.
pub(crate) fn go(log: &Log, current: &mut Option<File>, output: &mut SafeOutput) -> Result<(), Failure> {
    let events = watch(log).ok();
    while wait(events.as_ref()) {
        catch_up(log, current, output)?;
        output.flush()?;
    }
    Ok(())
}

fn watch(log: &Log) -> nix::Result<Inotify> {
    let events = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let of_interest = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
    events.add_watch(&log.directory, of_interest)?;
    Ok(events)
}

/// Waits for a change, and returns whether there is still a reader.
fn wait(events: Option<&Inotify>) -> bool {
    let stdout = std::io::stdout();
    // Without requested events only the end of the pipe wakes this: POLLERR once it has no reader.
    let mut fds = vec![PollFd::new(stdout.as_fd(), PollFlags::empty())];
    fds.extend(events.map(|events| PollFd::new(events.as_fd(), PollFlags::POLLIN)));
    match poll(&mut fds, PollTimeout::from(INTERVAL_MS)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(_) => return false,
    }
    if let Some(events) = events {
        // The events themselves do not matter, because the files are read anyway.
        while events.read_events().is_ok_and(|some| !some.is_empty()) {}
    }
    let ended = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    !fds[0].revents().is_some_and(|happened| happened.intersects(ended))
}

/// Shows the lines since the last call, in the current file and in those that followed it.
pub(crate) fn catch_up(
    log: &Log,
    current: &mut Option<File>,
    output: &mut SafeOutput,
) -> Result<(), Failure> {
    // The named file is opened before ours is read: a line that is written into ours afterwards is found
    // by the next call.
    let named = Log::open(&log.path())?;
    if let Some(ours) = current {
        rewind_if_cut(ours).map_err(|e| unreadable(&log.path(), &e))?;
        copy_rest(ours, output).map_err(|e| e.into_failure(log))?;
    }
    let Some(mut next) = named else { return Ok(()) };
    if current.as_ref().is_some_and(|ours| is_same(ours, &next)) {
        return Ok(());
    }
    if let Some(ours) = current {
        // The writer may have added a last line before it rotated.
        copy_rest(ours, output).map_err(|e| e.into_failure(log))?;
        show_skipped(log, ours, output).map_err(|e| e.into_failure(log))?;
    }
    copy_rest(&mut next, output).map_err(|e| e.into_failure(log))?;
    *current = Some(next);
    Ok(())
}

fn rewind_if_cut(file: &mut File) -> std::io::Result<()> {
    if file.metadata()?.len() < file.stream_position()? {
        warn("the log was cut; going on from its beginning");
        file.seek(SeekFrom::Start(0))?;
    }
    Ok(())
}

/// If the old file is not ours, the log has rotated more than once since the last call: the old file was
/// not shown yet, and the files before it are gone.
fn show_skipped(log: &Log, ours: &File, output: &mut SafeOutput) -> Result<(), CopyError> {
    let Ok(Some(mut old)) = Log::open(&log.old_path()) else { return Ok(()) };
    if is_same(ours, &old) {
        return Ok(());
    }
    warn("the log rotated faster than it could be followed; lines may be missing here");
    copy_rest(&mut old, output)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::safe_output::tests::Written;
    use std::fs::{OpenOptions, rename, write};
    use std::io::Write as _;

    struct Scene {
        _dir: tempfile::TempDir,
        log: Log,
        current: Option<File>,
        written: Written,
        output: SafeOutput,
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let log = Log { name: "s".into(), directory: dir.path().to_owned() };
            let written = Written::default();
            let output = written.output(false);
            Self { _dir: dir, log, current: None, written, output }
        }

        fn append(&self, text: &str) {
            let mut file = OpenOptions::new().append(true).create(true).open(self.log.path()).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }

        fn rotate(&self) {
            rename(self.log.path(), self.log.old_path()).unwrap();
        }

        fn seen(&mut self) -> String {
            catch_up(&self.log, &mut self.current, &mut self.output).unwrap();
            self.written.text()
        }
    }

    #[test]
    fn nothing_is_lost_or_seen_twice_across_a_rotation() {
        let mut scene = Scene::new();
        assert_eq!(scene.seen(), "");
        scene.append("1\n");
        assert_eq!(scene.seen(), "1\n");
        assert_eq!(scene.seen(), "1\n");
        scene.append("2\n");
        scene.rotate();
        // During a rotation no file has the name.
        assert_eq!(scene.seen(), "1\n2\n");
        scene.append("3\n");
        assert_eq!(scene.seen(), "1\n2\n3\n");
        scene.append("4\n");
        scene.rotate();
        scene.append("5\n");
        assert_eq!(scene.seen(), "1\n2\n3\n4\n5\n");
    }

    #[test]
    fn of_two_rotations_at_once_the_last_is_shown_whole() {
        let mut scene = Scene::new();
        scene.append("1\n");
        scene.seen();
        scene.append("2\n");
        scene.rotate();
        scene.append("3\n");
        scene.rotate();
        scene.append("4\n");
        assert_eq!(scene.seen(), "1\n2\n3\n4\n");
    }

    #[test]
    fn a_file_that_was_cut_is_read_from_its_beginning() {
        let mut scene = Scene::new();
        scene.append("a long first line\n");
        scene.seen();
        write(scene.log.path(), "new\n").unwrap();
        assert_eq!(scene.seen(), "a long first line\nnew\n");
    }

    #[test]
    fn a_write_wakes_the_follower_at_once() {
        let scene = Scene::new();
        let events = watch(&scene.log).unwrap();
        let before = std::time::Instant::now();
        scene.append("x");
        let mut fds = [PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(10_000u16)), Ok(1));
        assert!(before.elapsed().as_secs() < 10);
    }
}
