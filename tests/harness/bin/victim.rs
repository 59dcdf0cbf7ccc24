//! `cvm-victim`: small programs that misbehave on request, for tests of what keeps them.

mod load;

use nix::sys::signal::{SigHandler, Signal, raise, signal};
use nix::unistd::{ForkResult, Pid, fork, pause, setsid};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, exit};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const USAGE: &str = "\
cvm-victim signals            print blocked, ignored and caught signals
cvm-victim exit CODE | die SIGNAL
cvm-victim stubborn           ignore every signal that can be ignored
cvm-victim orphans N          leave N short-lived orphans behind, as fast as possible, then exit 0
cvm-victim escape             leave a grandchild behind with its own session and an empty environment
cvm-victim chatty N LENGTH    write N lines
cvm-victim http PORT          answer 200 to everything; SIGUSR1 makes it hang
cvm-victim relay PORT TARGET   pass on what comes to a port of the loopback to another
cvm-victim hog MEBIBYTES      take that much memory, and wait
cvm-victim stamp FILE CMD...  append the monotonic clock in microseconds to FILE, then execute CMD
cvm-victim load DIR LOG SEED  make, change, rename and delete files in DIR, and note it in LOG first and last
cvm-victim rows DB MODE MS LOG  commit a row every MS milliseconds in that journal mode, and note it in LOG
cvm-victim sql DB SQL         execute it, say \"done\", and keep the database open
cvm-victim wait               wait for a signal
Under the name `node` it takes the gateway's place.
";

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if std::env::args().next().is_some_and(|name| name.ends_with("/node")) {
        return gateway(&words);
    }
    let number = |text: &str| text.parse::<i32>().unwrap_or_else(|_| usage());
    match words.as_slice() {
        ["signals"] => print_signals(),
        ["exit", code] => leave(number(code)),
        ["die", which] => die(number(which)),
        ["stubborn"] => stubborn(),
        ["orphans", count] => orphans(number(count)),
        ["escape"] => escape(),
        ["chatty", count, length] => chatty(number(count), number(length)),
        ["http", port] => http(port),
        ["relay", port, target] => relay(port, target),
        ["hog", size] => hog(number(size)),
        ["stamp", file, command @ ..] => stamp(file, command),
        ["load", dir, log, seed] => load::files(dir, log, number(seed)),
        ["rows", database, mode, every, log] => load::rows(database, mode, number(every), log),
        ["sql", database, sql] => load::sql(database, sql),
        ["wait"] => loop {
            pause();
        },
        _ => usage(),
    }
}

fn usage() -> ! {
    eprint!("{USAGE}");
    leave(64)
}

/// Without running anything at exit: these programs are about their status.
#[allow(clippy::exit)]
fn leave(code: i32) -> ! {
    exit(code)
}

fn print_signals() {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines().filter(|l| l.starts_with("Sig") || l.starts_with("ShdPnd")) {
        println!("{line}");
    }
}

#[allow(unsafe_code)]
fn die(which: i32) {
    // No core file for a death that was asked for.
    let _ = nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0);
    match Signal::try_from(which) {
        Ok(fault) => {
            // Rust's runtime catches stack overflows, and with them these signals.
            // SAFETY: the default action runs no code of ours.
            let _ = unsafe { signal(fault, SigHandler::SigDfl) };
            let _ = raise(fault);
        }
        // Real-time signals have no name in nix.
        Err(_) => {
            drop(Command::new("kill").arg(format!("-{which}")).arg(std::process::id().to_string()).status());
        }
    }
    // A signal whose default is not death.
    leave(0);
}

#[allow(unsafe_code)]
fn stubborn() {
    for number in Signal::iterator().filter(|s| !matches!(s, Signal::SIGKILL | Signal::SIGSTOP)) {
        // SAFETY: ignoring a signal runs no code.
        let _ = unsafe { signal(number, SigHandler::SigIgn) };
    }
    println!("ready");
    loop {
        pause();
    }
}

#[allow(unsafe_code)]
fn child(work: impl FnOnce()) -> Pid {
    // SAFETY: this program has one thread.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            work();
            leave(0)
        }
        Ok(ForkResult::Parent { child }) => child,
        Err(error) => {
            eprintln!("fork: {error}");
            leave(70)
        }
    }
}

/// The middle process dies before its children, so they are orphans when they end.
fn orphans(count: i32) {
    let mut left = count;
    while left > 0 {
        let batch = left.min(100);
        let middle = child(|| {
            for _ in 0..batch {
                child(|| {});
            }
        });
        let _ = nix::sys::wait::waitpid(middle, None);
        left -= batch;
    }
}

fn escape() {
    let middle = child(|| {
        child(|| {
            let _ = setsid();
            let error = Command::new("/proc/self/exe").arg0("escaped").arg("wait").env_clear().exec();
            eprintln!("escape: {error}");
        });
    });
    let _ = nix::sys::wait::waitpid(middle, None);
    loop {
        pause();
    }
}

fn chatty(count: i32, length: i32) {
    let line = "x".repeat(usize::try_from(length).unwrap_or(0));
    let mut out = std::io::stdout().lock();
    for n in 0..count {
        let _ = writeln!(out, "{n} {line}");
    }
}

static HANGS: AtomicBool = AtomicBool::new(false);

extern "C" fn start_hanging(_: i32) {
    HANGS.store(true, Ordering::SeqCst);
}

#[allow(unsafe_code)]
fn http(port: &str) {
    // SAFETY: the handler stores one atomic.
    let _ = unsafe { signal(Signal::SIGUSR1, SigHandler::Handler(start_hanging)) };
    let listener = TcpListener::bind(format!("127.0.0.1:{port}")).unwrap_or_else(|error| {
        eprintln!("port {port}: {error}");
        leave(70)
    });
    println!("listening");
    let mut held = Vec::new();
    for stream in listener.incoming().flatten() {
        if HANGS.load(Ordering::SeqCst) {
            held.push(stream);
            continue;
        }
        let mut stream = stream;
        let mut request = [0u8; 1024];
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        let _ = stream.read(&mut request);
        let _ = stream
            .write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nConnection: close\r\n\r\n{\"ok\":true}");
    }
}

/// Its end is the end of everything that it passes on.
fn relay(port: &str, target: &str) {
    let listener = TcpListener::bind(format!("0.0.0.0:{port}")).unwrap_or_else(|error| {
        eprintln!("port {port}: {error}");
        leave(70)
    });
    for near in listener.incoming().flatten() {
        let Ok(far) = TcpStream::connect(format!("127.0.0.1:{target}")) else { continue };
        for (from, to) in [(&near, &far), (&far, &near)] {
            let (Ok(mut from), Ok(mut to)) = (from.try_clone(), to.try_clone()) else { continue };
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
                let _ = from.shutdown(Shutdown::Both);
            });
        }
    }
}

/// In the place of the Node that runs the gateway: notes when it was executed, and answers.
fn gateway(words: &[&str]) {
    stamp("/data/openclaw/executed", &[]);
    let port = words.iter().skip_while(|w| **w != "--port").nth(1);
    http(port.copied().unwrap_or("18789"));
}

fn hog(mebibytes: i32) {
    let mut held = Vec::new();
    for n in 0..mebibytes {
        // Not zeroes, so that every page is really taken.
        held.push(vec![u8::try_from(n % 251 + 1).unwrap_or(1); 1024 * 1024]);
    }
    println!("took {} MiB", held.len());
    loop {
        pause();
    }
}

fn stamp(file: &str, command: &[&str]) {
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map_or(0, |t| t.tv_sec() * 1_000_000 + t.tv_nsec() / 1000);
    let line = format!("{now}\n");
    let written = std::fs::OpenOptions::new().create(true).append(true).open(file);
    if let Err(error) = written.and_then(|mut f| f.write_all(line.as_bytes())) {
        eprintln!("stamp: {file}: {error}");
    }
    if let Some((program, rest)) = command.split_first() {
        let error = Command::new(program).args(rest).exec();
        eprintln!("stamp: {program}: {error}");
        leave(127);
    }
}
