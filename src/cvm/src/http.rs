//! One HTTP request on loopback or on a unix socket.
//!
//! HTTP/1.0, so that the answer ends where the connection does and no server sends it in chunks.
//! Addresses are numbers, because a static C library cannot resolve names. Redirects are not followed.

use memchr::memmem;
use std::fmt::Write as _;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use zeroize::Zeroizing;

const ANSWER_MAX: u64 = 1024 * 1024;

pub(crate) struct Answer {
    pub code: u16,
    pub body: Vec<u8>,
}

/// A GET on 127.0.0.1. `bearer` is sent as the Authorization header.
pub(crate) fn get(port: u16, path: &str, bearer: Option<&str>, time: Duration) -> Result<Answer, String> {
    ask(port, &request("GET", path, bearer, ""), time)
}

/// A POST of a JSON text on 127.0.0.1.
pub(crate) fn post(
    port: u16,
    path: &str,
    bearer: Option<&str>,
    json: &str,
    time: Duration,
) -> Result<Answer, String> {
    ask(port, &request("POST", path, bearer, json), time)
}

fn ask(port: u16, request: &[u8], time: Duration) -> Result<Answer, String> {
    let until = Instant::now() + time;
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, time).map_err(|e| cause(&e))?;
    stream.set_write_timeout(Some(time)).map_err(|e| cause(&e))?;
    stream.write_all(request).map_err(|e| cause(&e))?;
    read(|left| stream.set_read_timeout(Some(left)), &stream, until)
}

pub(crate) fn get_unix(socket: &str, path: &str, time: Duration) -> Result<Answer, String> {
    let until = Instant::now() + time;
    let mut stream = UnixStream::connect(socket).map_err(|e| cause(&e))?;
    stream.set_write_timeout(Some(time)).map_err(|e| cause(&e))?;
    stream.write_all(&request("GET", path, None, "")).map_err(|e| cause(&e))?;
    read(|left| stream.set_read_timeout(Some(left)), &stream, until)
}

fn request(method: &str, path: &str, bearer: Option<&str>, json: &str) -> Zeroizing<Vec<u8>> {
    let mut text = format!("{method} {path} HTTP/1.0\r\nHost: localhost\r\nUser-Agent: cvm\r\n");
    if !json.is_empty() {
        let _ = write!(text, "Content-Type: application/json\r\nContent-Length: {}\r\n", json.len()); // a String takes all
    }
    if let Some(token) = bearer {
        text.push_str("Authorization: Bearer ");
        text.push_str(token);
        text.push_str("\r\n");
    }
    text.push_str("\r\n");
    text.push_str(json);
    Zeroizing::new(text.into_bytes())
}

fn read(
    set_timeout: impl Fn(Duration) -> std::io::Result<()>,
    mut stream: impl Read,
    until: Instant,
) -> Result<Answer, String> {
    let mut bytes = Vec::new();
    let mut piece = [0u8; 16 * 1024];
    while (bytes.len() as u64) < ANSWER_MAX {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err("it did not answer in time".to_owned());
        }
        set_timeout(left).map_err(|e| cause(&e))?;
        match stream.read(&mut piece) {
            Ok(0) => break,
            Ok(n) => bytes.extend_from_slice(&piece[..n]),
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(cause(&error)),
        }
        if let Some(answer) = parse(&bytes).filter(|(_, whole)| *whole) {
            return Ok(answer.0);
        }
    }
    parse(&bytes).map(|(answer, _)| answer).ok_or_else(|| "it does not speak HTTP".to_owned())
}

/// The answer so far, and whether all of its announced length has arrived.
fn parse(bytes: &[u8]) -> Option<(Answer, bool)> {
    const BLANK: &[u8] = b"\r\n\r\n";
    let end = memmem::find(bytes, BLANK)?;
    let head = std::str::from_utf8(&bytes[..end]).ok()?;
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?;
    let code = status.get(2..5)?.parse().ok()?;
    let length = lines.find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse::<usize>().ok())?
    });
    let body = bytes[end + BLANK.len()..].to_vec();
    let whole = length.is_some_and(|length| body.len() >= length);
    Some((Answer { code, body }, whole))
}

fn cause(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            "it did not answer in time".to_owned()
        }
        std::io::ErrorKind::ConnectionRefused => "nobody listens there".to_owned(),
        _ => crate::text::io_error(error),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::net::TcpListener;

    /// Serves one client with `answer`, and returns its request.
    pub(crate) fn serve(answer: &'static [u8]) -> (u16, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = [0; 1024];
            let n = stream.read(&mut asked).unwrap();
            let _ = stream.write_all(answer);
            String::from_utf8_lossy(&asked[..n]).into_owned()
        });
        (port, thread)
    }

    /// Sends `greeting` to one client before it sends anything, and hangs up.
    pub(crate) fn serve_at_once(greeting: &'static [u8]) -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        std::thread::spawn(move || listener.accept().unwrap().0.write_all(greeting));
        port
    }

    const TIME: Duration = Duration::from_secs(10);

    #[test]
    fn code_and_body_come_back_and_the_token_goes_out() {
        let (port, thread) = serve(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\nno");
        let answer = get(port, "/v1/models", Some("t0ken"), TIME).unwrap();
        assert_eq!((answer.code, answer.body), (401, b"no".to_vec()));
        let asked = thread.join().unwrap();
        assert!(
            asked.starts_with("GET /v1/models HTTP/1.0\r\n")
                && asked.contains("Authorization: Bearer t0ken\r\n")
        );
    }

    #[test]
    fn a_server_of_another_protocol_is_told_apart_from_no_server() {
        let (port, _) = serve(b"SSH-2.0-OpenSSH\r\n");
        assert_eq!(get(port, "/", None, TIME).err().unwrap(), "it does not speak HTTP");
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        assert_eq!(get(port, "/", None, TIME).err().unwrap(), "nobody listens there");
    }

    #[test]
    fn a_silent_server_is_late() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let error = get(port, "/", None, Duration::from_millis(50)).err().unwrap();
        assert_eq!(error, "it did not answer in time");
    }
}
