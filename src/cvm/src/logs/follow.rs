//! Following a log across rotation.
//!
//! Waits for inotify on the directory, so nothing is polled while nothing is written; looks
//! again every [`LOOK_AGAIN_MS`] all the same, because inotify says nothing on some file systems.
//! A reader that goes away is noticed while waiting, not with the next line.
//!
//! May import: `sink`, `trouble`, and `super`.

use super::tail::{CopyError, copy_rest, is_same};
use super::{Log, unreadable};
use crate::sink::Sink;
use crate::trouble::{Trouble, warn};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::AsFd as _;

const LOOK_AGAIN_MS: u16 = 2000;

/// Until somebody interrupts it, or nobody reads any more.
pub(crate) fn go(log: &Log, current: &mut Option<File>, sink: &mut Sink) -> Result<(), Trouble> {
    let events = watch(log).ok();
    while wait(events.as_ref()) {
        catch_up(log, current, sink)?;
        sink.flush()?;
    }
    Ok(())
}

fn watch(log: &Log) -> nix::Result<Inotify> {
    let events = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let of_interest = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CREATE | AddWatchFlags::IN_MOVED_TO;
    events.add_watch(&log.directory, of_interest)?;
    Ok(events)
}

/// Whether anybody still reads.
fn wait(events: Option<&Inotify>) -> bool {
    let stdout = std::io::stdout();
    // Nothing is asked of it, so only its end wakes: POLLERR on a pipe without a reader.
    let mut fds = vec![PollFd::new(stdout.as_fd(), PollFlags::empty())];
    fds.extend(events.map(|events| PollFd::new(events.as_fd(), PollFlags::POLLIN)));
    match poll(&mut fds, PollTimeout::from(LOOK_AGAIN_MS)) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(_) => return false,
    }
    if let Some(events) = events {
        // What happened does not matter: the files are looked at.
        while events.read_events().is_ok_and(|some| !some.is_empty()) {}
    }
    let ended = PollFlags::POLLERR | PollFlags::POLLHUP | PollFlags::POLLNVAL;
    !fds[0].revents().is_some_and(|happened| happened.intersects(ended))
}

/// Shows what was written since the last call, in the current file and in those that followed it.
pub(crate) fn catch_up(log: &Log, current: &mut Option<File>, sink: &mut Sink) -> Result<(), Trouble> {
    // First which file is the current one, then the rest of ours: what is written into ours
    // after this is found in the next turn.
    let named = Log::open(&log.path())?;
    if let Some(ours) = current {
        rewind_if_cut(ours).map_err(|e| unreadable(&log.path(), &e))?;
        copy_rest(ours, sink).map_err(|e| e.trouble(log))?;
    }
    let Some(mut next) = named else { return Ok(()) };
    if current.as_ref().is_some_and(|ours| is_same(ours, &next)) {
        return Ok(());
    }
    if let Some(ours) = current {
        // The writer may have put a last line into it between the two looks.
        copy_rest(ours, sink).map_err(|e| e.trouble(log))?;
        show_skipped(log, ours, sink).map_err(|e| e.trouble(log))?;
    }
    copy_rest(&mut next, sink).map_err(|e| e.trouble(log))?;
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

/// If what is now the old file is not ours, there was more than one rotation since the last
/// look: the old one is new to us, and what came before it is gone.
fn show_skipped(log: &Log, ours: &File, sink: &mut Sink) -> Result<(), CopyError> {
    let Ok(Some(mut old)) = Log::open(&log.old_path()) else { return Ok(()) };
    if is_same(ours, &old) {
        return Ok(());
    }
    warn("the log rotated faster than it could be followed; lines may be missing here");
    copy_rest(&mut old, sink)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sink::tests::Heard;
    use std::fs::{OpenOptions, rename, write};
    use std::io::Write as _;

    struct Scene {
        _dir: tempfile::TempDir,
        log: Log,
        current: Option<File>,
        heard: Heard,
        sink: Sink,
    }

    impl Scene {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let log = Log { name: "s".into(), directory: dir.path().to_owned() };
            let heard = Heard::default();
            let sink = heard.sink(false);
            Self { _dir: dir, log, current: None, heard, sink }
        }

        fn append(&self, text: &str) {
            let mut file = OpenOptions::new().append(true).create(true).open(self.log.path()).unwrap();
            file.write_all(text.as_bytes()).unwrap();
        }

        fn rotate(&self) {
            rename(self.log.path(), self.log.old_path()).unwrap();
        }

        fn seen(&mut self) -> String {
            catch_up(&self.log, &mut self.current, &mut self.sink).unwrap();
            self.heard.text()
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
        // Between two files there is none of the name.
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
