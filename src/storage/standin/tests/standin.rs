//! An overlay whose lower layer has lost its server: a FUSE server of a few files is killed, and
//! the overlay above it is used. As root, in mount namespaces of their own, which take every mount
//! with them when they end.

// Lint exceptions for tests reach only into functions marked as tests, not into their helpers.
#![allow(clippy::unwrap_used)]

mod server;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

/// Whatever takes longer hangs: with FUSE that is the usual failure.
const PATIENCE: Duration = Duration::from_secs(60);
const ENOTCONN: i32 = 107;
const ECONNABORTED: i32 = 103;

/// One server, one overlay above it, and one stand-in.
struct World {
    directory: tempfile::TempDir,
    server: Child,
    orders: ChildStdin,
    replies: BufReader<ChildStdout>,
    standin: Child,
    step: Arc<Mutex<String>>,
    children: Arc<Mutex<Vec<Pid>>>,
}

/// Runs `scenario` on a thread with mounts of its own. One that hangs fails with the step it
/// hangs at, and its processes are killed, so that the kernel lets go of it.
fn in_a_world(scenario: impl FnOnce(&mut World) + Send + 'static) {
    if cvm_needs::lacks_root() {
        return;
    }
    let step = Arc::new(Mutex::new(String::from("starting")));
    let children = Arc::new(Mutex::new(Vec::new()));
    let (ended, end) = mpsc::channel::<()>();
    let thread = std::thread::spawn({
        let (step, children) = (Arc::clone(&step), Arc::clone(&children));
        move || {
            let _ended = ended;
            scenario(&mut World::new(step, children));
        }
    });
    let outcome = end.recv_timeout(PATIENCE);
    let hangs = matches!(outcome, Err(mpsc::RecvTimeoutError::Timeout));
    let at = step.lock().unwrap().clone();
    if hangs {
        for pid in children.lock().unwrap().iter() {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
    let failed = thread.join();
    assert!(!hangs, "hangs at: {at}");
    if let Err(panic) = failed {
        eprintln!("failed at: {at}");
        std::panic::resume_unwind(panic);
    }
}

impl World {
    fn new(step: Arc<Mutex<String>>, children: Arc<Mutex<Vec<Pid>>>) -> Self {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        // An upper layer needs a file system that can be one, wherever this runs.
        fs::create_dir(at("disk")).unwrap();
        mount(Some("disk"), &at("disk"), Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        for name in ["lower", "disk/upper", "disk/work", "merged"] {
            fs::create_dir(at(name)).unwrap();
        }
        let standin = Command::new(env!("CARGO_BIN_EXE_cvm-standin")).arg(at("socket")).spawn().unwrap();
        children.lock().unwrap().push(Pid::from_raw(standin.id().cast_signed()));
        wait_until("the socket is there", || UnixStream::connect(at("socket")).is_ok());
        let mut server = Command::new(std::env::current_exe().unwrap())
            .args(["the_server_of_the_other_tests", "--exact", "--ignored", "--nocapture"])
            .env("STANDIN_TEST_PLACE", directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        children.lock().unwrap().push(Pid::from_raw(server.id().cast_signed()));
        let (orders, replies) = (server.stdin.take().unwrap(), server.stdout.take().unwrap());
        let mut world =
            Self { directory, server, orders, replies: BufReader::new(replies), standin, step, children };
        world.order("mount");
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            world.at("lower").display(),
            world.at("disk/upper").display(),
            world.at("disk/work").display()
        );
        mount(
            Some("overlay"),
            &world.at("merged"),
            Some("overlay"),
            MsFlags::empty(),
            Some(options.as_str()),
        )
        .unwrap();
        world
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn merged(&self, name: &str) -> PathBuf {
        self.at("merged").join(name)
    }

    fn step(&self, what: &str) {
        what.clone_into(&mut self.step.lock().unwrap());
    }

    /// Has the server do something, and waits until it has.
    fn order(&mut self, what: &str) -> String {
        self.step(&format!("the server's {what}"));
        writeln!(self.orders, "{what}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.replies.read_line(&mut line).unwrap() > 0, "the server has ended");
            // libtest writes to the same stream.
            if let Some((_, reply)) = line.trim_end().split_once("reply ") {
                return reply.to_owned();
            }
        }
    }

    /// Copies everything up, as the hydrator does.
    fn hydrate(&self) {
        self.step("hydrating");
        let mut left = vec![self.merged("")];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    fs::set_permissions(&path, fs::metadata(&path).unwrap().permissions()).unwrap();
                    left.push(path);
                } else {
                    OpenOptions::new().read(true).write(true).open(&path).unwrap();
                }
            }
        }
    }

    fn kill_server(&mut self) {
        self.step("the server's death");
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }

    fn ask(&self, word: u8) -> char {
        self.step("asking the stand-in");
        let mut socket = UnixStream::connect(self.at("socket")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(&[word]).unwrap();
        let mut reply = [0];
        socket.read_exact(&mut reply).unwrap();
        reply[0].into()
    }

    fn wait_for(&self, state: char) {
        wait_until("the stand-in knows", || self.ask(b'?') == state);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for child in [&mut self.standin, &mut self.server] {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.children.lock().unwrap().clear();
        // The directories below are emptied with their mounts gone.
        for name in ["merged", "lower", "disk"] {
            let _ = nix::mount::umount2(&self.at(name), nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "2").unwrap();
}

fn names_in(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn kind_of<T>(outcome: std::io::Result<T>) -> Option<ErrorKind> {
    outcome.err().map(|e| e.kind())
}

fn number_of<T>(outcome: std::io::Result<T>) -> Option<i32> {
    outcome.err().and_then(|e| e.raw_os_error())
}

/// What programs do with a directory of which everything has been copied up. It ends empty-handed:
/// each round needs a directory of its own.
fn use_everything(world: &World, round: &str) {
    let at = |name: &str| world.merged(round).join(name);
    let say = |what: &str| world.step(&format!("{round}: {what}"));
    say("listing");
    assert!(names_in(&world.merged("")).contains(&round.to_owned()));
    assert_eq!(names_in(&at("")), ["a", "b", "c", "sub"]);
    assert_eq!(names_in(&at("sub")), ["x"]);
    assert_eq!(names_in(&world.merged("deep/er")), ["z"]);
    say("looking");
    assert_eq!(fs::metadata(at("a")).unwrap().len(), 9);
    assert!(fs::metadata(at("sub")).unwrap().is_dir());
    assert_eq!(fs::read_to_string(at("a")).unwrap(), "content a");
    assert_eq!(fs::read_to_string(at("sub/x")).unwrap(), "content x");
    assert_eq!(fs::read_to_string(world.merged("deep/er/z")).unwrap(), "content z");
    assert_eq!(kind_of(fs::metadata(at("absent"))), Some(ErrorKind::NotFound));
    assert_eq!(kind_of(fs::metadata(at("sub/absent/deeper"))), Some(ErrorKind::NotFound));
    say("making what is there");
    assert_eq!(kind_of(fs::create_dir(at("sub"))), Some(ErrorKind::AlreadyExists));
    fs::create_dir_all(at("sub")).unwrap();
    fs::create_dir_all(world.merged("deep/er")).unwrap();
    assert_eq!(kind_of(File::create_new(at("b"))), Some(ErrorKind::AlreadyExists));
    say("making what is new");
    fs::write(at("new"), "new").unwrap();
    fs::create_dir_all(at("sub/one/two")).unwrap();
    fs::write(at("sub/one/two/three"), "3").unwrap();
    fs::rename(at("sub/one"), at("one")).unwrap();
    assert_eq!(fs::read_to_string(at("one/two/three")).unwrap(), "3");
    fs::remove_dir_all(at("one")).unwrap();
    say("replacing by rename");
    fs::rename(at("new"), at("a")).unwrap();
    assert_eq!(fs::read_to_string(at("a")).unwrap(), "new");
    fs::rename(at("c"), at("b")).unwrap();
    assert_eq!(fs::read_to_string(at("b")).unwrap(), "content c");
    fs::rename(at("b"), at("b2")).unwrap();
    assert_eq!(kind_of(File::create_new(at("b2"))), Some(ErrorKind::AlreadyExists));
    fs::write(at("c"), "c again").unwrap();
    say("removing");
    fs::remove_file(at("a")).unwrap();
    assert_eq!(kind_of(fs::metadata(at("a"))), Some(ErrorKind::NotFound));
    assert_eq!(names_in(&at("")), ["b2", "c", "sub"]);
    fs::remove_file(at("sub/x")).unwrap();
    fs::remove_dir(at("sub")).unwrap();
    fs::create_dir(at("sub")).unwrap();
    assert!(names_in(&at("sub")).is_empty());
    fs::remove_dir_all(at("")).unwrap();
    assert_eq!(kind_of(fs::metadata(at(""))), Some(ErrorKind::NotFound));
}

#[test]
#[ignore = "a program of the other tests: a FUSE server"]
fn the_server_of_the_other_tests() {
    let place = std::env::var_os("STANDIN_TEST_PLACE").expect("started by another test");
    server::work(Path::new(&place));
}

#[test]
fn the_overlay_lives_on_without_the_server_of_its_lower_layer() {
    in_a_world(|world| {
        world.hydrate();
        assert_eq!(world.order("F3"), "k");
        assert_eq!(world.ask(b'?'), 'h');
        assert_eq!(world.order("H"), "k");
        // Between the two, the kernel forgets and asks anew: other nodes than those of before.
        drop_caches();
        world.hydrate();
        let open = File::open(world.merged("used/sub/x")).unwrap();
        let directory = File::open(world.merged("used/sub")).unwrap();
        world.kill_server();
        world.wait_for('s');
        use_everything(world, "round1");

        world.step("dropping caches");
        drop_caches();
        use_everything(world, "round2");

        world.step("what was in use all along");
        use_in_use(world, &open, &directory);
        world.step("the disk full of nothing");
        let _ = nix::sys::statvfs::statvfs(&world.merged("")).unwrap();

        world.step("once more");
        drop_caches();
        drop((open, directory));
        drop_caches();
        use_everything(world, "round3");
    });
}

/// Dentries that no cache drop reaches still have their lower halves.
fn use_in_use(world: &World, open: &File, directory: &File) {
    let at = |name: &str| world.merged("used").join(name);
    let mut bytes = [0; 9];
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"content x");
    assert!(directory.metadata().unwrap().is_dir());
    assert_eq!(kind_of(fs::create_dir(at("sub"))), Some(ErrorKind::AlreadyExists));
    fs::write(at("sub/new"), "new").unwrap();
    fs::rename(at("sub/new"), at("sub/x")).unwrap();
    assert_eq!(fs::read_to_string(at("sub/x")).unwrap(), "new");
    assert_eq!(open.metadata().unwrap().len(), 9);
}

/// What the names are gathered for.
#[test]
fn without_names_what_is_there_cannot_be_made_or_replaced() {
    in_a_world(|world| {
        world.hydrate();
        assert_eq!(world.order("F1"), "k");
        assert_eq!(world.order("H"), "k");
        // In use, so that its lower half stays whoever drops caches meanwhile.
        let _used = File::open(world.merged("round1/sub")).unwrap();
        world.kill_server();
        world.wait_for('s');
        world.step("looking");
        assert_eq!(fs::read_to_string(world.merged("round1/a")).unwrap(), "content a");
        assert_eq!(number_of(fs::create_dir(world.merged("round1/sub"))), Some(116), "ESTALE");
        drop_caches();
        use_everything(world, "round2");
    });
}

#[test]
fn what_is_removed_leaves_a_whiteout_or_it_would_come_back_with_the_next_mount() {
    in_a_world(|world| {
        world.hydrate();
        world.order("F3");
        world.order("H");
        // Replaced and recreated: nothing in the upper layer says that they are below as well.
        fs::write(world.merged("round1/new"), "new").unwrap();
        fs::rename(world.merged("round1/new"), world.merged("round1/b")).unwrap();
        fs::remove_file(world.merged("round1/c")).unwrap();
        fs::create_dir(world.merged("round1/c")).unwrap();
        fs::write(world.merged("round1/c/only above"), "").unwrap();
        fs::remove_dir_all(world.merged("used")).unwrap();
        // Now the kernel knows nothing of what is below, but that its root is there.
        drop_caches();
        world.kill_server();
        world.wait_for('s');
        world.step("removing");
        fs::remove_file(world.merged("round1/a")).unwrap();
        fs::remove_file(world.merged("round1/b")).unwrap();
        fs::rename(world.merged("round1/c"), world.merged("round1/d")).unwrap();
        fs::remove_file(world.merged("round1/d/only above")).unwrap();
        assert_eq!(names_in(&world.at("disk/upper/round1/d")), [""; 0]);
        fs::rename(world.merged("deep/er/z"), world.merged("z")).unwrap();
        fs::create_dir(world.merged("used")).unwrap();
        fs::remove_dir(world.merged("used")).unwrap();
        for name in ["round1/a", "round1/b", "round1/c", "deep/er/z", "used"] {
            let left = fs::symlink_metadata(world.at("disk/upper").join(name));
            assert!(left.is_ok_and(|data| data.file_type().is_char_device()), "{name}");
            drop_caches();
            assert_eq!(kind_of(fs::metadata(world.merged(name))), Some(ErrorKind::NotFound), "{name}");
        }
        fs::rename(world.merged("z"), world.merged("deep/er/z")).unwrap();
        use_everything(world, "round2");
    });
}

#[test]
fn a_request_that_the_server_had_read_is_answered_all_the_same() {
    in_a_world(|world| {
        world.hydrate();
        world.order("F3");
        world.order("H");
        // It reads requests and no longer answers them.
        world.order("mute");
        let name = world.merged("deep/asked at the last moment");
        let asking = std::thread::spawn(move || kind_of(fs::metadata(name)));
        world.order("muted");
        assert!(!asking.is_finished());
        let other = world.merged("asked of nobody");
        kill(Pid::from_raw(world.server.id().cast_signed()), Signal::SIGSTOP).unwrap();
        let queued = std::thread::spawn(move || kind_of(fs::metadata(other)));
        std::thread::sleep(Duration::from_millis(50));
        world.kill_server();
        world.step("waiting for the answers");
        assert_eq!(asking.join().unwrap(), Some(ErrorKind::NotFound));
        assert_eq!(queued.join().unwrap(), Some(ErrorKind::NotFound));
    });
}

/// With a thread that waits for its own mount a killed process stays, and with it every
/// descriptor it has.
fn kill_a_server_that_waits_for_itself(world: &mut World) {
    world.order("mute");
    world.order("ask itself");
    world.order("muted");
    world.kill_server();
}

#[test]
fn a_server_that_waits_for_itself_can_die() {
    in_a_world(|world| {
        world.hydrate();
        world.order("F3");
        world.order("H");
        kill_a_server_that_waits_for_itself(world);
        world.wait_for('s');
        use_everything(world, "round1");
    });
}

#[test]
fn a_server_that_waits_for_itself_can_die_before_everything_is_copied() {
    in_a_world(|world| {
        world.order("F3");
        kill_a_server_that_waits_for_itself(world);
        world.wait_for('n');
        world.step("asking a dead mount");
        assert_eq!(number_of(fs::read_dir(world.at("lower"))), Some(ENOTCONN));
    });
}

#[test]
fn before_everything_is_copied_a_death_is_felt_at_once() {
    in_a_world(|world| {
        world.order("F3");
        world.order("mute");
        let name = world.merged("deep/asked at the last moment");
        let asking = std::thread::spawn(move || number_of(fs::metadata(name)));
        world.order("muted");
        world.kill_server();
        world.step("asking a dead mount");
        assert!(matches!(asking.join().unwrap(), Some(ENOTCONN | ECONNABORTED)));
        assert_eq!(number_of(fs::metadata(world.merged("round1/a"))), Some(ENOTCONN));
        assert_eq!(number_of(fs::read_dir(world.at("lower"))), Some(ENOTCONN));
        world.wait_for('n');
    });
}

#[test]
fn what_is_dropped_is_answered_for_no_more() {
    in_a_world(|world| {
        world.hydrate();
        world.order("F3");
        world.order("H");
        world.kill_server();
        world.wait_for('s');
        assert_eq!(world.ask(b'D'), 'k');
        assert_eq!(world.ask(b'?'), 'n');
        world.step("asking a dead mount");
        assert_eq!(number_of(fs::read_dir(world.at("lower"))), Some(ENOTCONN));
    });
}

#[test]
fn a_mount_that_ends_is_let_go() {
    in_a_world(|world| {
        world.hydrate();
        world.order("F3");
        world.order("H");
        world.kill_server();
        world.wait_for('s');
        for name in ["merged", "lower"] {
            nix::mount::umount(&world.at(name)).unwrap();
        }
        world.wait_for('n');
    });
}

#[test]
fn only_the_worker_is_heard_and_nonsense_is_refused() {
    in_a_world(|world| {
        assert_eq!(world.ask(b'?'), 'n');
        assert_eq!(world.ask(b'H'), 'x');
        assert_eq!(world.ask(b'F'), 'x');
        assert_eq!(world.ask(0xff), 'x');
        assert_eq!(world.ask(b'D'), 'k');
        assert_eq!(world.order("F-garbage"), "x");
        assert_eq!(world.order("F1"), "k");
        assert_eq!(world.ask(b'H'), 'x');
        assert_eq!(world.ask(b'D'), 'x');
        // Many who ask and stay take nothing from the worker.
        let crowd: Vec<UnixStream> =
            (0..40).map(|_| UnixStream::connect(world.at("socket")).unwrap()).collect();
        assert_eq!(world.ask(b'?'), 'h');
        drop(crowd);
        assert_eq!(world.order("H"), "k");
        assert_eq!(world.order("F1"), "k", "the same mount anew, and not hydrated");
        world.kill_server();
        world.wait_for('n');
    });
}
