//! Where operators ask: one question a connection, answered in lines.
//!
//! What only reads (status, lists, files, logs) is answered here, whatever the worker is doing;
//! the rest is an order for the worker's loop.
//!
//! Beside it the mux client asks the one question that it may: whether the bucket has what a file
//! holds now. It is not root, so it has a socket of its own.
//!
//! Refuses anybody else, lines over the limit, and to keep silent for long.
//! May import: `boots`, `desk`, `entry`, `fault`, `fetch`, `index`, `owner`, `worker`.

use crate::boots;
use crate::desk::{Desk, Open};
use crate::entry::{Kind, Path};
use crate::fault::Fault;
use crate::fetch::{Fetcher, Got, Wanted};
use crate::index::Row;
use crate::worker::Order;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use cvm_protocol::accounts::MUX_UID;
use cvm_protocol::storage::{Answer, Ask, Entry, EntryKind, QUESTION_MAX, Question, VERSION};
use cvm_protocol::{json_lines, paths};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc::{
    Receiver, Sender as BoundedSender, UnboundedReceiver, UnboundedSender, channel, unbounded_channel,
};

/// A question is one line of a local program's.
const PATIENCE: Duration = Duration::from_secs(10);
/// A sign of life while the work is long.
const ALIVE: Duration = Duration::from_secs(10);
const PIECE: usize = 48 * 1024;
/// Answers that wait for a reader who is slow: what makes them waits too.
const BACKLOG: usize = 16;
/// Reads of one file that is written to all the time, and the pause between them.
const TRIES: u32 = 30;
const AGAIN: Duration = Duration::from_millis(150);

pub(crate) async fn serve(desk: Arc<Desk>, orders: Sender<Order>) {
    tokio::join!(
        listen(paths::STORAGE_SOCKET, Guest::Operator, &desk, &orders),
        listen(paths::REPLICATION_SOCKET, Guest::MuxClient, &desk, &orders),
    );
}

/// Who may ask at a socket, and so what.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Guest {
    Operator,
    MuxClient,
}

impl Guest {
    fn uid(self) -> u32 {
        match self {
            Self::Operator => 0,
            Self::MuxClient => MUX_UID,
        }
    }

    fn may_ask(self, ask: &Ask) -> bool {
        self == Self::Operator || matches!(ask, Ask::Committed { .. })
    }
}

async fn listen(path: &str, guest: Guest, desk: &Arc<Desk>, orders: &Sender<Order>) {
    if let Some(parent) = std::path::Path::new(path).parent() {
        // Others may pass through; whether the supervisor lets them is its own affair.
        let _ = std::fs::DirBuilder::new().mode(0o755).create(parent);
    }
    loop {
        let _ = std::fs::remove_file(path);
        let listener = match UnixListener::bind(path) {
            Ok(listener) => listener,
            Err(error) => {
                tracing::error!("nobody can ask at {path}: {error}");
                tokio::time::sleep(ALIVE).await;
                continue;
            }
        };
        let _ = std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600));
        let _ = std::os::unix::fs::chown(path, Some(guest.uid()), None);
        while let Ok((stream, _)) = listener.accept().await {
            if stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == guest.uid()) {
                tokio::spawn(converse(stream, guest, Arc::clone(desk), orders.clone()));
            }
        }
    }
}

async fn converse(stream: UnixStream, guest: Guest, desk: Arc<Desk>, orders: Sender<Order>) {
    let (read, mut write) = stream.into_split();
    let mut line = Vec::new();
    let mut reader = BufReader::new(read.take(QUESTION_MAX as u64));
    let asked = tokio::time::timeout(PATIENCE, reader.read_until(b'\n', &mut line)).await;
    let question = match asked {
        Ok(Ok(_)) => serde_json::from_slice::<Question>(&line).ok(),
        _ => None,
    };
    let (sender, answers) = unbounded_channel();
    let mut answers = Answers::Few(answers);
    match question {
        Some(Question { v, .. }) if v != VERSION => {
            refuse(&sender, "this worker speaks another version; use the `cvm` of the same image");
        }
        None => refuse(&sender, "this is not a question; `cvm storage --help` lists what can be asked"),
        Some(Question { verb, .. }) if !guest.may_ask(&verb) => refuse(&sender, "this is not asked here"),
        Some(Question { verb, .. }) => {
            if let Some(many) = direct(verb, &desk, &orders, &sender) {
                answers = Answers::Many(many);
            }
        }
    }
    drop(sender);
    let _ = pass_on(answers, &mut write).await;
}

/// What comes from the worker's loop, which waits for nobody, and what is read for the asker.
enum Answers {
    Few(UnboundedReceiver<Answer>),
    Many(Receiver<Answer>),
}

impl Answers {
    async fn next(&mut self) -> Option<Answer> {
        match self {
            Self::Few(answers) => answers.recv().await,
            Self::Many(answers) => answers.recv().await,
        }
    }
}

fn refuse(to: &UnboundedSender<Answer>, why: &str) {
    let _ = to.send(Answer::Refused { why: why.to_owned() });
}

/// Until the last word, with something to read at least every few seconds.
async fn pass_on(mut answers: Answers, write: &mut tokio::net::unix::OwnedWriteHalf) -> std::io::Result<()> {
    let mut last = Answer::Progress(cvm_protocol::storage::Progress {
        what: "working".to_owned(),
        ..Default::default()
    });
    loop {
        let answer = match tokio::time::timeout(ALIVE, answers.next()).await {
            Ok(None) => return Ok(()),
            Ok(Some(answer)) => answer,
            Err(_) => last.clone(),
        };
        write.write_all(&json_lines::line(&answer)).await?;
        if matches!(answer, Answer::Progress(_)) {
            last = answer;
        }
    }
}

/// Yields where the answers come from, if that is not `to`.
fn direct(
    ask: Ask,
    desk: &Arc<Desk>,
    orders: &Sender<Order>,
    to: &UnboundedSender<Answer>,
) -> Option<Receiver<Answer>> {
    let look: fn(&Open, &Ask, &Reader) -> Result<String, Fault> = match &ask {
        Ask::Status => {
            let _ = to.send(Answer::Status(Box::new(desk.status())));
            return None;
        }
        Ask::List { .. } => list,
        Ask::Get { .. } => get,
        Ask::Boots => boots,
        Ask::BootLog { .. } => boot_log,
        _ => {
            if orders.send(Order::Ask(ask, to.clone())).is_err() {
                refuse(to, "the worker is ending");
            }
            return None;
        }
    };
    let Some(open) = desk.open() else {
        let why = desk.status().why.unwrap_or_else(|| "the bucket is not open yet".to_owned());
        refuse(to, &why);
        return None;
    };
    let (sender, answers) = channel(BACKLOG);
    tokio::task::spawn_blocking(move || {
        let reader = Reader(sender);
        let _ = reader.send(match look(&open, &ask, &reader) {
            Ok(text) => Answer::Done { text, good: true },
            Err(fault) => Answer::Done { text: fault.to_string(), good: false },
        });
    });
    Some(answers)
}

/// Who asked, at his own pace.
struct Reader(BoundedSender<Answer>);

impl Reader {
    /// Waits for him; fails when he has gone.
    fn send(&self, answer: Answer) -> Result<(), Fault> {
        self.0.blocking_send(answer).map_err(|_| Fault::other("nobody reads the answer"))
    }
}

fn list(open: &Open, ask: &Ask, to: &Reader) -> Result<String, Fault> {
    let Ask::List { path } = ask else { return Ok(String::new()) };
    let path = relative(path);
    let mut rows = match Path::new(path.as_bytes()) {
        None => open.index.all()?,
        Some(path) => match open.index.get(&path)? {
            Some(row) if row.entry.kind != Kind::Directory => vec![(path, row)],
            Some(_) => open.index.below(&path)?,
            None => return Err(Fault::other("the bucket has nothing of this name")),
        },
    };
    rows.sort_by(|(a, _), (b, _)| a.cmp(b));
    let count = rows.len();
    for (path, row) in rows {
        let kind = match row.entry.kind {
            Kind::File { database: true, .. } => EntryKind::Database,
            Kind::File { .. } => EntryKind::File,
            Kind::Directory => EntryKind::Directory,
            Kind::Symlink { .. } => EntryKind::Symlink,
        };
        to.send(Answer::Entry(Entry {
            path: String::from_utf8_lossy(path.as_bytes()).into_owned(),
            kind,
            size: row.entry.size(),
            mode: row.entry.mode,
            mtime_ms: row.entry.mtime_ns / 1_000_000,
        }))?;
    }
    Ok(format!("{count} entries"))
}

fn get(open: &Open, ask: &Ask, to: &Reader) -> Result<String, Fault> {
    let Ask::Get { path } = ask else { return Ok(String::new()) };
    let path = relative(path);
    let missing = || Fault::other("the bucket has no file of this name; `cvm storage ls` lists what it has");
    let path = Path::new(path.as_bytes()).ok_or_else(missing)?;
    let scratch = open.volume.staging().join(format!("get-{}", crate::owner::random_name()?));
    let look = || open.index.get(&path);
    for _ in 0..TRIES {
        let row = look()?.filter(|row| row.entry.is_file()).ok_or_else(missing)?;
        let fetched = fetch(open, &path, &row, &scratch);
        let changed = || look().map(|now| now.is_none_or(|now| now.unsure || now.entry != row.entry));
        let outcome = match fetched {
            // Pushed anew while it was read: the object is another one, and ours.
            Err(Fault::Suspicious(_)) if changed()? => {
                std::thread::sleep(AGAIN);
                continue;
            }
            Err(fault) => Err(fault),
            Ok(file) => send_file(&file, to),
        };
        let _ = std::fs::remove_dir_all(&scratch);
        return outcome.map(|()| "checked against the manifest".to_owned());
    }
    let _ = std::fs::remove_dir_all(&scratch);
    Err(Fault::other("the file changed each time that it was read; try again"))
}

fn fetch(
    open: &Open,
    path: &Path,
    row: &Row,
    scratch: &std::path::Path,
) -> Result<std::path::PathBuf, Fault> {
    std::fs::create_dir_all(scratch)?;
    let (whole, parts) = (open.index.totals()?, scratch.join("parts"));
    let fetcher = Fetcher { bucket: &open.bucket, whole, parts, progress: &|_, _| {} };
    let wanted = vec![Wanted { path: path.clone(), may_be: vec![row.entry.clone()] }];
    let root = scratch.join("tree");
    match fetcher.files(wanted, &root)?.pop() {
        Some(Got::Good(path, _)) => Ok(path.below(&root)),
        Some(Got::Bad(_, why)) => Err(Fault::Suspicious(why)),
        Some(Got::Later(_, fault)) => Err(fault),
        None => Err(Fault::other("nothing was fetched")),
    }
}

/// As the manifest has it, from a path below /data or relative to it.
pub(crate) fn relative(path: &str) -> &str {
    let rest = path.strip_prefix("/data").filter(|rest| rest.is_empty() || rest.starts_with('/'));
    rest.unwrap_or(path).trim_matches('/')
}

fn send_file(file: &std::path::Path, to: &Reader) -> Result<(), Fault> {
    use std::io::Read as _;
    let mut file = std::fs::File::open(file)?;
    let mut piece = vec![0u8; PIECE];
    loop {
        let n = file.read(&mut piece)?;
        let Some(bytes) = piece.get(..n).filter(|b| !b.is_empty()) else { return Ok(()) };
        to.send(Answer::Data { base64: BASE64_STANDARD.encode(bytes) })?;
    }
}

fn boots(open: &Open, _: &Ask, to: &Reader) -> Result<String, Fault> {
    let earlier = boots::before(&open.bucket, &open.boot)?;
    for (boot, n) in earlier.iter().zip(1..) {
        let when = cvm_protocol::time::rfc3339(boot.started_ms());
        let name = format!("--boot -{n}");
        to.send(Answer::Line { text: format!("{name:<12} {when}  {}", boot.end(&open.bucket)?) })?;
        to.send(Answer::Line { text: format!("{:<12} logs: {}", "", boot.logs.join(" ")) })?;
    }
    Ok(format!("{} boots", earlier.len()))
}

fn boot_log(open: &Open, ask: &Ask, to: &Reader) -> Result<String, Fault> {
    let Ask::BootLog { boot, log } = ask else { return Ok(String::new()) };
    let earlier = boots::before(&open.bucket, &open.boot)?;
    let number = usize::try_from(boot.unsigned_abs()).unwrap_or(0);
    let boot = number.checked_sub(1).and_then(|n| earlier.get(n)).ok_or_else(|| {
        Fault::other(format!("the bucket keeps no boot {boot}; `cvm logs --boots` lists them"))
    })?;
    let bytes = boots::read(&open.bucket, &boot.name, log)?.ok_or_else(|| {
        Fault::other(format!("that boot has no log {log}; it has: {}", boot.logs.join(", ")))
    })?;
    for piece in bytes.chunks(PIECE) {
        to.send(Answer::Data { base64: BASE64_STANDARD.encode(piece) })?;
    }
    Ok(String::new())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read_no_faster_than_its_reader_reads() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("large");
        std::fs::write(&file, vec![7u8; PIECE * BACKLOG * 3]).unwrap();
        let (sender, mut answers) = channel(BACKLOG);
        let sending = std::thread::spawn(move || send_file(&file, &Reader(sender)));
        while answers.len() < BACKLOG {
            std::thread::yield_now();
        }
        assert!(!sending.is_finished(), "two thirds of it have nowhere to wait");
        let mut pieces = 0;
        while let Some(Answer::Data { .. }) = answers.blocking_recv() {
            pieces += 1;
            assert!(answers.len() <= BACKLOG);
        }
        assert_eq!(pieces, BACKLOG * 3);
        sending.join().unwrap().unwrap();
    }

    #[test]
    fn a_file_is_not_read_on_for_a_reader_who_has_gone() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("large");
        std::fs::write(&file, vec![7u8; PIECE * 3]).unwrap();
        let (sender, answers) = channel(BACKLOG);
        drop(answers);
        assert!(send_file(&file, &Reader(sender)).is_err());
    }
}
