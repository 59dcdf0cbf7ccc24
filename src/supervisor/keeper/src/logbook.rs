//! The log of one service: a bounded queue, and a thread that writes it out.
//!
//! The loop that reads the program's output only puts lines into the queue. When the disk is slow the queue fills,
//! and further lines are dropped and counted, until the log can say how many. So the program never waits for a disk.

use cvm_protocol::keeper::Log;
use cvm_protocol::time::rfc3339;
use cvm_sys::descriptor;
use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The most bytes that wait for the disk: about one second of a service that writes very much.
const QUEUE_BYTES_MAX: usize = 1024 * 1024;
/// How long the last lines of a dead service may take to reach the disk.
const FAREWELL: Duration = Duration::from_secs(1);

/// One line in the queue, with the time at which it was read.
struct Entry {
    unix_ms: u64,
    line: Vec<u8>,
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    bytes: usize,
    dropped: u64,
    closed: bool,
    idle: bool,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // A panic of the writer cannot leave the queue half changed.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(crate) struct Logbook {
    shared: Arc<Shared>,
    _writer: Option<JoinHandle<()>>,
}

impl Logbook {
    /// Starts the writer thread. With `stamped`, lines begin with their time already.
    pub(crate) fn open(name: &str, log: &Log, stamped: bool) -> Self {
        let shared = Arc::new(Shared::default());
        let output = Output {
            file: RotatingFile::new(Path::new(&log.file), log.rotate_bytes),
            copy: log.copy_to_stdout.then(|| Copy::new(name, log.json)),
            stamped,
        };
        let theirs = Arc::clone(&shared);
        let writer = std::thread::Builder::new()
            .name("log".into())
            .stack_size(64 * 1024)
            .spawn(move || write_out(&theirs, output))
            .ok();
        Self { shared, _writer: writer }
    }

    /// Queues a line, or drops it if the queue is full. Never waits for the disk.
    pub(crate) fn put(&self, line: &[u8]) {
        let unix_ms = now_ms();
        let mut queue = self.shared.lock();
        let size = line.len() + size_of::<Entry>();
        if queue.bytes + size > QUEUE_BYTES_MAX {
            queue.dropped += 1;
            return;
        }
        queue.bytes += size;
        queue.entries.push_back(Entry { unix_ms, line: line.to_vec() });
        self.shared.changed.notify_one();
    }

    /// How many lines were dropped so far.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.lock().dropped
    }

    /// Waits until everything is written, at most [`FAREWELL`].
    pub(crate) fn close(&self) {
        let mut queue = self.shared.lock();
        queue.closed = true;
        self.shared.changed.notify_one();
        let written = |q: &mut Queue| !(q.entries.is_empty() && q.idle);
        let _ = self.shared.changed.wait_timeout_while(queue, FAREWELL, written);
    }
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn write_out(shared: &Shared, mut output: Output) {
    let mut said = 0;
    loop {
        let mut queue = shared.lock();
        while queue.entries.is_empty() && !queue.closed {
            queue.idle = true;
            shared.changed.notify_all();
            queue = shared.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let batch = std::mem::take(&mut queue.entries);
        queue.bytes = 0;
        queue.idle = batch.is_empty();
        let dropped = queue.dropped;
        let closed = queue.closed;
        shared.changed.notify_all();
        drop(queue);
        if batch.is_empty() && closed {
            return;
        }
        for entry in batch {
            output.write(entry.unix_ms, &entry.line);
        }
        if dropped > said {
            let text =
                format!("[cvm] {} lines dropped: the disk was slower than the service", dropped - said);
            output.write(now_ms(), text.as_bytes());
            said = dropped;
        }
    }
}

struct Output {
    file: RotatingFile,
    copy: Option<Copy>,
    stamped: bool,
}

impl Output {
    fn write(&mut self, unix_ms: u64, line: &[u8]) {
        let stamp = rfc3339(unix_ms);
        let mut text = Vec::with_capacity(stamp.len() + line.len() + 2);
        if !self.stamped {
            text.extend_from_slice(stamp.as_bytes());
            text.push(b' ');
        }
        text.extend_from_slice(line);
        text.push(b'\n');
        self.file.write(&text);
        if let Some(copy) = &mut self.copy {
            copy.write(&stamp, line);
        }
    }
}

/// A file that is renamed to `.1` when it is full. After a failed write the file is opened again for the next line:
/// a full disk must not end a service.
struct RotatingFile {
    path: PathBuf,
    limit: u64,
    open: Option<(File, u64)>,
}

impl RotatingFile {
    fn new(path: &Path, limit: u64) -> Self {
        Self { path: path.to_owned(), limit, open: None }
    }

    fn write(&mut self, bytes: &[u8]) {
        let size = bytes.len() as u64;
        if matches!(&self.open, Some((_, used)) if used + size > self.limit) {
            self.open = None;
            let mut old = self.path.clone().into_os_string();
            old.push(".1");
            let _ = std::fs::rename(&self.path, old);
        }
        if self.open.is_none() {
            self.open = self.reopen();
        }
        if let Some((file, used)) = &mut self.open {
            match file.write_all(bytes) {
                Ok(()) => *used += size,
                Err(_) => self.open = None,
            }
        }
    }

    fn reopen(&self) -> Option<(File, u64)> {
        let options = || {
            let mut options = OpenOptions::new();
            options.append(true).create(true).mode(0o600);
            options
        };
        let file = options().open(&self.path).or_else(|_| {
            std::fs::create_dir_all(self.path.parent().unwrap_or(Path::new("/")))?;
            options().open(&self.path)
        });
        let file = file.ok()?;
        let used = file.metadata().ok()?.len();
        Some((file, used))
    }
}

/// The copy of the log on the container's standard output, which never waits and may lose lines.
struct Copy {
    name: String,
    json: bool,
    stdout: Option<OwnedFd>,
    /// The rest of a line of which standard output took a part.
    rest: Vec<u8>,
    dropped: u64,
}

impl Copy {
    fn new(name: &str, json: bool) -> Self {
        let stdout = descriptor::own_nonblocking(1).ok();
        Self { name: name.to_owned(), json, stdout, rest: Vec::new(), dropped: 0 }
    }

    fn write(&mut self, stamp: &str, line: &[u8]) {
        if !self.push_rest() {
            self.dropped += 1;
            return;
        }
        if self.dropped > 0 {
            let text = format!("[cvm] {} lines not shown: nobody was reading", self.dropped);
            self.dropped = 0;
            self.rest = self.render(stamp, text.as_bytes());
            if !self.push_rest() {
                return;
            }
        }
        self.rest = self.render(stamp, line);
        self.push_rest();
    }

    fn render(&self, stamp: &str, line: &[u8]) -> Vec<u8> {
        let line = String::from_utf8_lossy(line);
        let text = if self.json {
            serde_json::json!({ "time": stamp, "service": self.name, "line": line }).to_string()
        } else {
            format!("{stamp} {} | {line}", self.name)
        };
        (text + "\n").into_bytes()
    }

    /// Writes the rest of the previous line. Returns whether nothing is left of it.
    fn push_rest(&mut self) -> bool {
        let Some(stdout) = &self.stdout else { return false };
        while !self.rest.is_empty() {
            match descriptor::write_some(stdout, &self.rest) {
                Ok(n) => drop(self.rest.drain(..n)),
                Err(_) => return false,
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log_into(dir: &Path, rotate_bytes: u64) -> Log {
        let file = dir.join("deep/service.log").to_string_lossy().into_owned();
        Log { file, rotate_bytes, copy_to_stdout: false, json: false }
    }

    #[test]
    fn a_full_file_is_rotated_and_one_old_one_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let log = log_into(dir.path(), 1000);
        let book = Logbook::open("service", &log, true);
        for n in 0..100 {
            book.put(format!("line {n:03} {}", "x".repeat(80)).as_bytes());
        }
        book.close();
        let new = std::fs::read_to_string(&log.file).unwrap();
        let old = std::fs::read_to_string(format!("{}.1", log.file)).unwrap();
        assert!(new.len() <= 1000 && old.len() <= 1000);
        assert!(new.ends_with(&format!("line 099 {}\n", "x".repeat(80))));
        assert_eq!(std::fs::read_dir(dir.path().join("deep")).unwrap().count(), 2);
    }

    #[test]
    fn a_log_that_has_no_place_is_taken_all_the_same_and_its_end_is_not_waited_for() {
        let mut log = log_into(Path::new("/"), 1000);
        log.file = "/proc/no-such-place/x.log".into();
        let book = Logbook::open("service", &log, true);
        for n in 0..100 {
            book.put(format!("line {n}").as_bytes());
        }
        book.close();
        assert_eq!(book.shared.lock().bytes, 0, "what cannot be written is let go");
    }

    #[test]
    fn a_log_that_is_not_written_drops_and_counts_and_does_not_grow() {
        // Without a writer thread, as if the disk never answered.
        let book = Logbook { shared: Arc::new(Shared::default()), _writer: None };
        for _ in 0..3 * QUEUE_BYTES_MAX / 1024 {
            book.put(&[b'x'; 1024]);
        }
        assert!(book.dropped() > 1000);
        assert!(book.shared.lock().bytes <= QUEUE_BYTES_MAX);
    }
}
