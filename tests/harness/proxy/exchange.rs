//! One request on its way to the server, and the answer on its way back.

use super::{Fault, Shared};
use crate::http::{Body, Head};
use crate::s3::{S3, unescape};
use crate::wait::lock;
use nix::sys::socket::{setsockopt, sockopt};
use std::io::{BufRead, BufReader, Error, ErrorKind, Read as _, Result, Write};
use std::net::TcpStream;
use std::sync::PoisonError;
use std::time::Duration;

pub(super) fn serve(shared: &Shared, client: TcpStream) -> Result<()> {
    let _known = shared.know(&client)?;
    let mut from = BufReader::new(client.try_clone()?);
    let mut client = client;
    while let Some(head) = Head::read(&mut from)? {
        if !exchange(shared, &head, &mut from, &mut client)? {
            break;
        }
    }
    Ok(())
}

pub(super) fn session_token(head: &Head) -> Option<String> {
    let query = head.word(1).split(['?', '&']).find_map(|pair| pair.strip_prefix("X-Amz-Security-Token="));
    query.map(unescape).or_else(|| head.header("x-amz-security-token").map(str::to_owned))
}

/// One request. Yields whether another may follow on this connection.
pub(super) fn exchange(
    shared: &Shared,
    head: &Head,
    from: &mut BufReader<TcpStream>,
    client: &mut TcpStream,
) -> Result<bool> {
    let method = head.word(0);
    let (id, wait, fault) = shared.arrive(head);
    if !wait.is_zero() {
        shared.pause(wait);
    }
    match fault {
        Some(Fault::Hang) => {
            shared.hang(client);
            return Ok(false);
        }
        Some(Fault::Reset) => {
            reset(client);
            return Ok(false);
        }
        _ => {}
    }
    let may_follow = !head.says("connection", "close");
    let expects = head.says("expect", "100-continue");
    let refusal = match fault {
        Some(Fault::Status(status)) => Some(status),
        _ => None,
    };
    if let Some(status) = refusal {
        // Who waits for a word before sending its body gets the last one.
        if !expects {
            head.request_body().relay(from, &mut std::io::sink())?;
        }
        shared.note(id, |e| e.status = Some(status));
        return refuse(client, method, status, may_follow && !expects);
    }
    if expects {
        client.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
    }
    // Taken once the whole head is here, given back when the store has answered.
    let conditions = shared.conditions.read().unwrap_or_else(PoisonError::into_inner).clone();
    let condition = conditions.filter(|_| matches!(method, "PUT" | "POST" | "DELETE"));
    let (_alone, _among);
    if let Some(s3) = condition {
        if head.header("if-none-match").is_some() || head.header("if-match").is_some() {
            _alone = shared.writing.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(status) = unmet(&s3, head)? {
                head.request_body().relay(from, &mut std::io::sink())?;
                shared.note(id, |e| e.status = Some(status));
                return refuse(client, method, status, may_follow);
            }
        } else {
            _among = shared.writing.read().unwrap_or_else(PoisonError::into_inner);
        }
    }
    if fault == Some(Fault::Late) {
        return late(shared, id, head, from, client);
    }
    let Ok(upstream) = TcpStream::connect(shared.upstream) else {
        // The nearest thing to a refusal that is left.
        reset(client);
        return Ok(false);
    };
    let _known = shared.know(&upstream)?;
    let mut to = Deaf { inner: &upstream, broken: false };
    to.write_all(&head.raw)?;
    if fault == Some(Fault::HalfRequest) {
        let half = Body::Length(half_of(head.request_body(), from)?).relay(from, &mut to)?;
        shared.note(id, |e| e.up = half);
        return Ok(false);
    }
    let up = head.request_body().relay(from, &mut to)?;
    shared.note(id, |e| e.up = up);
    let kept = respond(shared, id, head, fault, &upstream, client)?;
    Ok(kept && may_follow)
}

/// Keeps a request whose sender is told that it is lost.
pub(super) fn late(
    shared: &Shared,
    id: u64,
    head: &Head,
    from: &mut BufReader<TcpStream>,
    client: &TcpStream,
) -> Result<bool> {
    let mut request = head.raw.clone();
    head.request_body().relay(from, &mut request)?;
    reset(client);
    client.shutdown(std::net::Shutdown::Both)?;
    let mut state = lock(&shared.state);
    let edition = state.edition;
    while state.edition == edition && !state.closing {
        state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
    }
    drop(state);
    let mut upstream = TcpStream::connect(shared.upstream)?;
    upstream.write_all(&request)?;
    let answer = Head::read(&mut BufReader::new(upstream))?.ok_or(ErrorKind::UnexpectedEof)?;
    shared.note(id, |e| e.status = answer.status().ok());
    Ok(false)
}

/// Passes the answer on. Yields whether the connection can be used again.
pub(super) fn respond(
    shared: &Shared,
    id: u64,
    request: &Head,
    fault: Option<Fault>,
    upstream: &TcpStream,
    client: &mut TcpStream,
) -> Result<bool> {
    let method = request.word(0);
    let mut from = BufReader::new(upstream);
    let mut answer = loop {
        let head = Head::read(&mut from)?.ok_or(ErrorKind::UnexpectedEof)?;
        // The proxy has said 100 itself.
        if head.status()? >= 200 {
            break head;
        }
    };
    let body = answer.response_body(method)?;
    if matches!(fault, Some(Fault::HalfResponse | Fault::NoResponse)) {
        let mut whole = Vec::new();
        body.relay(&mut from, &mut whole)?;
        shared.note(id, |e| e.status = Some(answer.status().unwrap_or(0)));
        if fault == Some(Fault::HalfResponse) && !whole.is_empty() {
            let half = &whole[..whole.len() / 2];
            client.write_all(&answer.raw)?;
            client.write_all(half)?;
            shared.note(id, |e| e.down = half.len() as u64);
        }
        return Ok(false);
    }
    let status = answer.status()?;
    // The parts of an upload keep theirs, which the store wants to see again.
    let foreign = lock(&shared.state).foreign_etags.filter(|_| !request.word(1).contains("partNumber="));
    let down = if let Some(says_so) = foreign {
        answer.raw = with_foreign_etag(&answer.raw, says_so);
        client.write_all(&answer.raw)?;
        // What completes an upload has it in the body too.
        let mut whole = Vec::new();
        let down = body.relay(&mut from, &mut whole)?;
        client.write_all(&if method == "POST" { with_foreign_etag(&whole, false) } else { whole })?;
        down
    } else {
        client.write_all(&answer.raw)?;
        body.relay(&mut from, client)?
    };
    shared.note(id, |e| (e.status, e.down) = (Some(status), down));
    Ok(body != Body::UntilClose && !answer.says("connection", "close"))
}

/// The same head, or XML, of the same length, with another `ETag` of the same form.
pub(super) fn with_foreign_etag(bytes: &[u8], says_so: bool) -> Vec<u8> {
    let text = String::from_utf8_lossy(bytes);
    let lower = text.to_ascii_lowercase();
    let Some(begins) = ["\netag:", "<etag>"].iter().find_map(|name| Some(lower.find(name)? + name.len()))
    else {
        return bytes.to_vec();
    };
    let mut changed = text.into_owned().into_bytes();
    let digits = changed.iter_mut().skip(begins).skip_while(|b| !b.is_ascii_hexdigit());
    for digit in digits.take_while(|b| b.is_ascii_hexdigit()) {
        let value = char::from(*digit).to_digit(16).unwrap_or(0);
        *digit = char::from_digit(15 - value, 16).map_or(b'0', |c| c as u8);
    }
    if says_so {
        let headers = b"x-amz-server-side-encryption: aws:kms\r\n\
            x-amz-server-side-encryption-aws-kms-key-id: arn:aws:kms:us-east-1:1:key/1\r\n";
        let end = changed.len().saturating_sub(2);
        changed.splice(end..end, headers.iter().copied());
    }
    changed
}

/// Half of what is to come. Of chunks nobody knows how many there are: half of the first.
pub(super) fn half_of(body: Body, from: &mut impl BufRead) -> Result<u64> {
    Ok(match body {
        Body::Length(length) => length / 2,
        Body::Chunked | Body::UntilClose => from.fill_buf()?.len() as u64 / 2,
    })
}

/// The status that a condition which does not hold is answered with.
pub(super) fn unmet(s3: &S3, head: &Head) -> Result<Option<u16>> {
    let path = head.word(1).split('?').next().unwrap_or_default();
    let found = s3.send("HEAD", &unescape(path), &[], &[], &[])?;
    let tag = found.head.header("etag").filter(|_| found.status == 200).map(bare);
    if !matches!(found.status, 200 | 404) {
        return Err(Error::other(format!("the store answered {} to HEAD {path}", found.status)));
    }
    let listed =
        |wanted: &str, tag: &str| wanted.split(',').any(|w| w.trim() == "*" || bare(w.trim()) == tag);
    if let (Some(wanted), Some(tag)) = (head.header("if-none-match"), tag)
        && listed(wanted, tag)
    {
        return Ok(Some(412));
    }
    Ok(match (head.header("if-match"), tag) {
        (Some(_), None) => Some(404),
        (Some(wanted), Some(tag)) if !listed(wanted, tag) => Some(412),
        _ => None,
    })
}

/// An entity tag without what is around it.
pub(super) fn bare(tag: &str) -> &str {
    tag.trim_start_matches("W/").trim_matches('"')
}

/// Answers as the store would. Yields whether the connection can be used again.
pub(super) fn refuse(client: &mut TcpStream, method: &str, status: u16, may_follow: bool) -> Result<bool> {
    let (reason, code) = match status {
        400 => ("Bad Request", "InvalidRequest"),
        403 => ("Forbidden", "AccessDenied"),
        404 => ("Not Found", "NoSuchKey"),
        409 => ("Conflict", "ConditionalRequestConflict"),
        412 => ("Precondition Failed", "PreconditionFailed"),
        429 => ("Too Many Requests", "TooManyRequests"),
        503 => ("Service Unavailable", "SlowDown"),
        507 => ("Insufficient Storage", "QuotaExceeded"),
        _ => ("Internal Server Error", "InternalError"),
    };
    let text = format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code><Message>{reason}</Message>\
         <RequestId>proxy</RequestId></Error>"
    );
    let length = text.len();
    let connection = if may_follow { "keep-alive" } else { "close" };
    let body = if method == "HEAD" { "" } else { text.as_str() };
    write!(
        client,
        "HTTP/1.1 {status} {reason}\r\nContent-Type: application/xml\r\nContent-Length: {length}\r\n\
         Connection: {connection}\r\n\r\n{body}"
    )?;
    if !may_follow {
        linger(client);
    }
    Ok(may_follow)
}

/// Closing with bytes unread resets the connection and takes the answer with it: says that
/// nothing follows, and waits a moment for the other side's end.
pub(super) fn linger(client: &mut TcpStream) {
    let _ = client.shutdown(std::net::Shutdown::Write);
    let _ = client.set_read_timeout(Some(Duration::from_millis(200)));
    let mut rest = [0; 4096];
    while matches!(client.read(&mut rest), Ok(1..)) {}
}

/// The connection is reset once its last descriptor is closed.
pub(super) fn reset(client: &TcpStream) {
    let at_once = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    let _ = setsockopt(client, sockopt::Linger, &at_once);
}

/// The server, which may answer before it has read everything: the answer counts, and the rest
/// of the request goes nowhere.
pub(super) struct Deaf<'a> {
    inner: &'a TcpStream,
    broken: bool,
}

impl Write for Deaf<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<usize> {
        if !self.broken && self.inner.write_all(bytes).is_err() {
            self.broken = true;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> Result<()> {
        Ok(())
    }
}
