//! PID 1's log: tracing events as lines on standard output and in its own log file, through
//! buffers that drop lines and count them rather than wait.
//!
//! Standard output of a container may be public, and may be a pipe that nobody reads: nothing
//! here ever blocks on it.

use cvm_protocol::time::rfc3339;
use cvm_sys::descriptor;
use cvm_system::config::{LogFormat, LogLevel};
use nix::errno::Errno;
use std::collections::VecDeque;
use std::fmt::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// Bytes that may wait for a reader. A boot prints a few kilobytes.
const WAITING_MAX: usize = 64 * 1024;

/// A descriptor, and the lines that it has not taken yet.
struct Sink {
    fd: Option<OwnedFd>,
    waiting: VecDeque<u8>,
    dropped: u64,
}

impl Sink {
    fn new(fd: Option<OwnedFd>) -> Self {
        Self { fd, waiting: VecDeque::new(), dropped: 0 }
    }

    fn put(&mut self, line: &str) {
        if self.fd.is_none() {
            return;
        }
        self.flush();
        let note = match self.dropped {
            0 => String::new(),
            n => format!("[cvm] {n} lines dropped: nobody was reading\n"),
        };
        if self.waiting.len() + note.len() + line.len() > WAITING_MAX {
            self.dropped += 1;
            return;
        }
        self.dropped = 0;
        self.waiting.extend(note.bytes().chain(line.bytes()));
        self.flush();
    }

    fn flush(&mut self) {
        let Some(fd) = &self.fd else { return };
        while !self.waiting.is_empty() {
            match descriptor::write_some(fd, self.waiting.as_slices().0) {
                Ok(n) => drop(self.waiting.drain(..n)),
                Err(Errno::EAGAIN | Errno::EINTR) => return,
                // The reader is gone for good. Waiting for room would be a busy loop:
                // the kernel calls a broken pipe writable.
                Err(_) => {
                    self.waiting.clear();
                    self.fd = None;
                    return;
                }
            }
        }
    }
}

struct Inner {
    stdout: Sink,
    file: Sink,
    json: bool,
}

/// All lines of PID 1 go through here. Clones share the buffers.
#[derive(Clone)]
pub(crate) struct Log(Arc<Mutex<Inner>>);

impl Log {
    /// Makes it the receiver of all tracing events at or above `level`.
    pub(crate) fn start(level: LogLevel, format: LogFormat) -> Self {
        let log = Self::into(descriptor::own_nonblocking(1).ok(), format);
        let max = match level {
            LogLevel::Error => Level::ERROR,
            LogLevel::Warn => Level::WARN,
            LogLevel::Info => Level::INFO,
            LogLevel::Debug => Level::DEBUG,
            LogLevel::Trace => Level::TRACE,
        };
        // It fails when one is set already, which only a second call could do.
        let _ = tracing::subscriber::set_global_default(log.subscriber(max));
        log
    }

    /// A log that writes to `stdout`.
    pub(crate) fn into(stdout: Option<OwnedFd>, format: LogFormat) -> Self {
        let (stdout, file, json) = (Sink::new(stdout), Sink::new(None), matches!(format, LogFormat::Json));
        Self(Arc::new(Mutex::new(Inner { stdout, file, json })))
    }

    /// The subscriber that hands tracing events to this log.
    pub(crate) fn subscriber(&self, max: Level) -> impl Subscriber + use<> {
        LogSubscriber { log: self.clone(), max }
    }

    /// From now on lines also go into `pipe`, at whose other end they are written to a file.
    pub(crate) fn write_also_to(&self, pipe: Option<OwnedFd>) {
        self.lock().file = Sink::new(pipe);
    }

    /// Called when a descriptor may have become writable.
    pub(crate) fn flush(&self) {
        let mut inner = self.lock();
        inner.stdout.flush();
        inner.file.flush();
    }

    /// The descriptors that have lines waiting, to be polled for writing.
    pub(crate) fn with_waiting<T>(&self, look: impl FnOnce(&[BorrowedFd<'_>]) -> T) -> T {
        let inner = self.lock();
        let waiting = [&inner.stdout, &inner.file].into_iter().filter(|s| !s.waiting.is_empty());
        let fds: Vec<BorrowedFd<'_>> = waiting.filter_map(|s| s.fd.as_ref()).map(AsFd::as_fd).collect();
        look(&fds)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, level: Level, message: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamp = rfc3339(u64::try_from(now.as_millis()).unwrap_or(u64::MAX));
        let mut inner = self.lock();
        let line = if inner.json {
            let level = level.as_str().to_ascii_lowercase();
            format!("{}\n", serde_json::json!({ "time": stamp, "level": level, "message": message }))
        } else {
            // One event is one line, whatever is in it.
            format!("{stamp} {level:<5} {}\n", message.replace('\n', "\\n"))
        };
        inner.stdout.put(&line);
        inner.file.put(&line);
    }
}

/// The tracing side. Spans are not used here.
struct LogSubscriber {
    log: Log,
    max: Level,
}

impl Subscriber for LogSubscriber {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= self.max
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        self.log.write(*event.metadata().level(), &message.0);
    }
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}
