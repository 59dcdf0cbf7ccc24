//! A small HTTP server on threads, and a client as small: what stands in for the mux-server, the
//! gateway and the model.
//!
//! A server can be stopped as a power cut stops it, and be started again at the same address.

use crate::http::Head;
use crate::network::Network;
use crate::wait::lock;
use nix::sys::socket::{Shutdown, shutdown};
use std::collections::HashMap;
use std::io::{BufReader, Error, ErrorKind, Result, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// What came in.
pub(crate) struct Request<'a> {
    pub(crate) head: Head,
    pub(crate) body: Vec<u8>,
    stream: &'a TcpStream,
    life: &'a Life,
}

impl Request<'_> {
    pub(crate) fn method(&self) -> &str {
        self.head.word(0)
    }

    /// Without the query.
    pub(crate) fn path(&self) -> &str {
        self.head.word(1).split('?').next().unwrap_or_default()
    }

    /// Whether there is still somebody to answer: the server runs, and the client waits.
    pub(crate) fn is_awaited(&self) -> bool {
        if self.life.over.load(Ordering::SeqCst) {
            return false;
        }
        let _ = self.stream.set_nonblocking(true);
        let gone = matches!(self.stream.peek(&mut [0]), Ok(0));
        let _ = self.stream.set_nonblocking(false);
        !gone
    }

    /// The server was stopped since this came in.
    pub(crate) fn is_orphan(&self) -> bool {
        self.life.over.load(Ordering::SeqCst)
    }

    /// Waits, but not longer than there is somebody to answer.
    pub(crate) fn pause(&self, length: Duration) {
        let _ = crate::wait::before(length, || (!self.is_awaited()).then_some(()));
    }
}

/// What comes back.
pub(crate) enum Reply {
    Whole {
        status: u16,
        headers: Vec<(String, String)>,
        body: Vec<u8>,
    },
    /// Nothing: the connection is closed.
    Cut,
    /// Nothing, as long as the client waits.
    Hang,
}

impl Reply {
    pub(crate) fn json(status: u16, body: &serde_json::Value) -> Self {
        Self::of(status, "application/json", body.to_string().into_bytes())
    }

    pub(crate) fn of(status: u16, kind: &str, body: Vec<u8>) -> Self {
        Self::Whole { status, headers: vec![("Content-Type".into(), kind.into())], body }
    }
}

type Handler = dyn Fn(&Request<'_>) -> Reply + Send + Sync;

/// From a start to a stop.
#[derive(Default)]
struct Life {
    over: AtomicBool,
    open: Mutex<HashMap<i32, TcpStream>>,
}

struct Running {
    socket: Arc<TcpListener>,
    accepts: JoinHandle<()>,
    life: Arc<Life>,
}

/// Dropping it stops it.
pub(crate) struct Server {
    network: Network,
    address: SocketAddr,
    handler: Arc<Handler>,
    running: Mutex<Option<Running>>,
}

impl Server {
    pub(crate) fn start(
        network: &Network,
        address: SocketAddr,
        handler: impl Fn(&Request<'_>) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let server =
            Self { network: network.clone(), address, handler: Arc::new(handler), running: Mutex::default() };
        server.resume();
        server
    }

    /// Nothing when it runs.
    pub(crate) fn resume(&self) {
        let mut running = lock(&self.running);
        if running.is_some() {
            return;
        }
        let socket = Arc::new(self.network.listen(self.address).expect("a port that is ours is free"));
        let life = Arc::new(Life::default());
        let (accepting, handler, its) = (Arc::clone(&socket), Arc::clone(&self.handler), Arc::clone(&life));
        let accepts = std::thread::spawn(move || accept(&accepting, &handler, &its));
        *running = Some(Running { socket, accepts, life });
    }

    /// At once: connections are cut, and who is being served gets no answer.
    pub(crate) fn stop(&self) {
        let Some(Running { socket, accepts, life }) = lock(&self.running).take() else { return };
        life.over.store(true, Ordering::SeqCst);
        // Wakes who waits in accept(2), with an error.
        let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        let _ = accepts.join();
        for stream in lock(&life.open).values() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn accept(listener: &TcpListener, handler: &Arc<Handler>, life: &Arc<Life>) {
    while let Ok((stream, _)) = listener.accept() {
        let (handler, life) = (Arc::clone(handler), Arc::clone(life));
        let number = stream.as_raw_fd();
        let Ok(second) = stream.try_clone() else { continue };
        lock(&life.open).insert(number, second);
        std::thread::spawn(move || {
            // Whatever went wrong, the connection's end tells the client.
            let _ = serve(&stream, &handler, &life);
            lock(&life.open).remove(&number);
        });
    }
}

fn serve(stream: &TcpStream, handler: &Arc<Handler>, life: &Life) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(head) = Head::read(&mut reader)? {
        if life.over.load(Ordering::SeqCst) {
            return Ok(());
        }
        if head.says("expect", "100-continue") {
            (&*stream).write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let body = head.request_body().content(&mut reader)?;
        let close = head.says("connection", "close");
        let request = Request { head, body, stream, life };
        match handler(&request) {
            Reply::Whole { status, headers, body } => {
                let mut text = format!("HTTP/1.1 {status} Said\r\nContent-Length: {}\r\n", body.len());
                if close {
                    text += "Connection: close\r\n";
                }
                for (name, value) in headers {
                    text.extend([&name, ": ", &value, "\r\n"]);
                }
                let mut bytes = (text + "\r\n").into_bytes();
                bytes.extend(body);
                (&*stream).write_all(&bytes)?;
            }
            Reply::Cut => return stream.shutdown(std::net::Shutdown::Both),
            Reply::Hang => {
                while request.is_awaited() {
                    std::thread::sleep(Duration::from_millis(20));
                }
                return Ok(());
            }
        }
        if close {
            return Ok(());
        }
    }
    Ok(())
}

/// What an HTTP server said.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

/// One connection that is kept, and made again when it was lost.
pub struct Client {
    network: Network,
    address: SocketAddr,
    timeout: Duration,
    connection: Option<BufReader<TcpStream>>,
    power: Arc<Power>,
}

/// A switch for a client that somebody else uses.
#[derive(Default)]
pub(crate) struct Power {
    off: AtomicBool,
    stream: Mutex<Option<TcpStream>>,
}

impl Power {
    /// At once: the connection is cut, and there is no other.
    pub(crate) fn cut(&self) {
        self.off.store(true, Ordering::SeqCst);
        if let Some(stream) = lock(&self.stream).take() {
            let _ = stream.shutdown(std::net::Shutdown::Both);
        }
    }

    pub(crate) fn on(&self) {
        self.off.store(false, Ordering::SeqCst);
    }
}

impl Client {
    pub fn new(network: &Network, address: SocketAddr, timeout: Duration) -> Self {
        Self { network: network.clone(), address, timeout, connection: None, power: Arc::default() }
    }

    pub(crate) fn power(&mut self, power: Arc<Power>) {
        self.power = power;
    }

    pub fn connect(&self) -> Result<TcpStream> {
        let stream = self.network.inside(|| TcpStream::connect_timeout(&self.address, self.timeout))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(self.timeout))?;
        stream.set_write_timeout(Some(self.timeout))?;
        *lock(&self.power.stream) = Some(stream.try_clone()?);
        if self.power.off.load(Ordering::SeqCst) {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        Ok(stream)
    }

    /// Sends all of it on a connection of its own, and is gone.
    pub fn throw(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<()> {
        let stream = self.connect()?;
        (&stream).write_all(&self.request(path, headers, body))?;
        stream.shutdown(std::net::Shutdown::Both)
    }

    fn request(&self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Vec<u8> {
        let mut text = format!(
            "POST {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n",
            self.address,
            body.len()
        );
        for (name, value) in headers {
            text.extend([name, ": ", value, "\r\n"]);
        }
        let mut bytes = (text + "\r\n").into_bytes();
        bytes.extend_from_slice(body);
        bytes
    }

    /// Once, on the connection that is there or a new one.
    pub fn post(&mut self, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Answer> {
        let bytes = self.request(path, headers, body);
        let kept = self.connection.take();
        let fresh = kept.is_none();
        let mut reader = match kept {
            Some(reader) => reader,
            None => BufReader::new(self.connect()?),
        };
        match exchange(&mut reader, &bytes) {
            Ok((answer, keep)) => {
                self.connection = keep.then_some(reader);
                Ok(answer)
            }
            // The other side may close a connection that nothing happens on.
            Err(error) if !fresh && error.kind() != ErrorKind::WouldBlock => {
                let mut reader = BufReader::new(self.connect()?);
                let (answer, keep) = exchange(&mut reader, &bytes)?;
                self.connection = keep.then_some(reader);
                Ok(answer)
            }
            Err(error) => Err(error),
        }
    }
}

fn exchange(reader: &mut BufReader<TcpStream>, bytes: &[u8]) -> Result<(Answer, bool)> {
    // Who refuses a large body may answer and close before it was sent.
    let sent = reader.get_mut().write_all(bytes);
    let head = match Head::read(reader) {
        Ok(Some(head)) => head,
        Ok(None) => return Err(sent.err().unwrap_or_else(|| ErrorKind::UnexpectedEof.into())),
        Err(error) => return Err(sent.err().unwrap_or(error)),
    };
    let status = head.status()?;
    if status == 100 {
        return Err(Error::other("100 without having been asked for"));
    }
    let body = head.response_body("POST")?.content(reader)?;
    let keep = sent.is_ok() && !head.says("connection", "close");
    let head = String::from_utf8_lossy(&head.raw).into_owned();
    Ok((Answer { status, head, body }, keep))
}
