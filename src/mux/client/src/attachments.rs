//! What came with a message: pictures for the agent to see, and a line about everything else.
//!
//! The gateway's endpoint takes pictures, 8 of them, 10 MB each; other files it cannot take, and the
//! agent is told of them. No more than 8 are tried, in a minute at most for all of them. Files are fetched from the mux-server with our token, from elsewhere over
//! https without it.
//!
//! Refuses more than its memory holds: what is left out is named to the agent.
//! May import: `backoff`, `event`, `http`, `register`.

use crate::backoff::Backoff;
use crate::event::{Attachment, Source};
use crate::http::{Ask, Http, Unanswered};
use crate::register::Registration;
use base64::display::Base64Display;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use hyper::header::CONTENT_TYPE;
use hyper::http::uri::Scheme;
use hyper::{Method, Uri};
use std::borrow::Cow;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

const PICTURES: [&str; 6] =
    ["image/jpeg", "image/png", "image/gif", "image/webp", "image/heic", "image/heif"];
const PICTURES_MAX: usize = 8;
/// Of all pictures of one message, as they are sent: what this program has memory for.
const BYTES_MAX: usize = 10 * 1024 * 1024;
const TIME: Duration = Duration::from_secs(30);
/// Of all pictures of one message: somebody waits for the answer.
const TIME_OF_ALL: Duration = Duration::from_secs(60);
/// Then the message goes without it.
const TRIES: u32 = 6;
const NAME_MAX: usize = 80;

/// A picture as the gateway takes it: a data URL, made while it is written.
pub(crate) struct Picture<'a> {
    mime: String,
    data: Data<'a>,
}

enum Data<'a> {
    Base64(Cow<'a, str>),
    Raw(Bytes),
}

impl fmt::Display for Picture<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "data:{};base64,", self.mime)?;
        match &self.data {
            Data::Base64(text) => f.write_str(text),
            Data::Raw(bytes) => Base64Display::new(bytes, &BASE64_STANDARD).fmt(f),
        }
    }
}

impl Picture<'_> {
    pub(crate) fn size(&self) -> usize {
        match &self.data {
            Data::Base64(text) => text.len(),
            Data::Raw(bytes) => bytes.len().div_ceil(3) * 4,
        }
    }
}

/// Pictures, and lines for the agent about what is none or could not be had.
pub(crate) async fn gather<'a>(
    given: Vec<Attachment<'a>>,
    http: &Http,
    registration: &Registration,
) -> (Vec<Picture<'a>>, Vec<String>) {
    let (mut pictures, mut lines) = (Vec::<Picture<'a>>::new(), Vec::new());
    let (end, mut tried) = (Instant::now() + TIME_OF_ALL, 0);
    for one in given {
        let about = about(&one);
        let is_picture = PICTURES.contains(&one.mime.as_str());
        let outcome = if !is_picture {
            Err("this kind of file cannot be shown to you")
        } else if tried >= PICTURES_MAX {
            Err("too many pictures in one message")
        } else {
            tried += 1;
            let trying = tokio::time::timeout_at(end, picture(one, http, registration));
            trying.await.unwrap_or(Err("it could not be had in time"))
        };
        let used: usize = pictures.iter().map(Picture::size).sum();
        match outcome {
            Ok(picture) if used + picture.size() <= BYTES_MAX => pictures.push(picture),
            Ok(_) => lines.push(format!("[attachment: {about}; left out: too large]")),
            Err(why) => lines.push(format!("[attachment: {about}; left out: {why}]")),
        }
    }
    (pictures, lines)
}

/// Lines in the place of what the gateway did not take.
pub(crate) fn leave_out(given: &[Attachment<'_>]) -> Vec<String> {
    given.iter().map(|one| format!("[attachment: {}; left out: it was not taken]", about(one))).collect()
}

fn about(one: &Attachment<'_>) -> String {
    let kind = if one.mime.is_empty() { "file" } else { &one.mime };
    match &one.name {
        Some(name) => {
            let name: String = name.chars().filter(|c| !c.is_control()).take(NAME_MAX).collect();
            format!("{kind} \"{name}\"")
        }
        None => kind.to_owned(),
    }
}

async fn picture<'a>(
    one: Attachment<'a>,
    http: &Http,
    registration: &Registration,
) -> Result<Picture<'a>, &'static str> {
    let Attachment { mime, source, .. } = one;
    match source {
        Source::Nothing => Err("it came without content"),
        Source::Content(content) => {
            let content = match content {
                Cow::Borrowed(text) => Cow::Borrowed(bare(text)),
                Cow::Owned(text) => Cow::Owned(bare(&text).to_owned()),
            };
            let base64 = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=');
            if content.is_empty() || !content.bytes().all(base64) {
                return Err("its content is not base64");
            }
            Ok(Picture { mime, data: Data::Base64(content) })
        }
        Source::Url(url) => {
            let (bytes, kind) = fetch(&url, http, registration).await?;
            // What the server says of the file counts for more than what was said of it before.
            let mime = kind.filter(|k| PICTURES.contains(&k.as_str())).unwrap_or(mime);
            Ok(Picture { mime, data: Data::Raw(bytes) })
        }
    }
}

/// Without the beginning of a data URL.
fn bare(text: &str) -> &str {
    if text.starts_with("data:") { text.split_once(',').map_or("", |(_, data)| data) } else { text }
}

/// Below it are the files that the mux-server keeps for us.
const FILES: &str = "/v1/mux/files/";

/// What is asked for a file. Whether our token goes along is decided on what is asked, and on nothing else.
#[derive(Debug)]
struct Place {
    uri: Uri,
    is_ours: bool,
}

/// Where a file is, seen from the mux-server.
fn place(url: &str, base: &str) -> Option<Place> {
    let is_path = url.starts_with('/') && !url.starts_with("//");
    let uri: Uri = if is_path { format!("{base}{url}").parse() } else { url.parse() }.ok()?;
    let base: Uri = base.parse().ok()?;
    let origin = origin(&uri)?;
    let below = uri.path().strip_prefix(base.path().trim_end_matches('/'));
    // What climbs or is written in another way may arrive elsewhere.
    let is_plain = |path: &str| !path.contains("..") && !path.contains(['%', '\\']) && !path.contains("//");
    let is_file = below.is_some_and(|rest| rest.starts_with(FILES) && is_plain(rest));
    let is_ours = is_file && self::origin(&base) == Some(origin);
    let is_https = uri.scheme() == Some(&Scheme::HTTPS);
    (is_ours || is_https).then_some(Place { uri, is_ours })
}

/// Scheme, host and port, in one form. None where a name stands before the host: nobody has one here.
fn origin(uri: &Uri) -> Option<(Scheme, String, u16)> {
    let scheme = uri.scheme()?.clone();
    let usual = if scheme == Scheme::HTTPS { 443 } else { 80 };
    let authority = uri.authority().filter(|authority| !authority.as_str().contains('@'))?;
    Some((scheme, authority.host().to_ascii_lowercase(), authority.port_u16().unwrap_or(usual)))
}

async fn fetch(
    url: &str,
    http: &Http,
    registration: &Registration,
) -> Result<(Bytes, Option<String>), &'static str> {
    let Some(Place { uri, is_ours }) = place(url, registration.base_url()) else {
        return Err("its address cannot be read from here");
    };
    let mut backoff = Backoff::of_contract();
    let mut pass = if is_ours { Some(registration.pass().await) } else { None };
    for _ in 0..TRIES {
        let id = registration.device_id();
        let headers = if is_ours { &[("x-openclaw-id", id)][..] } else { &[] };
        let ask = Ask {
            method: Method::GET,
            uri: uri.clone(),
            bearer: pass.as_ref().map(crate::register::Pass::expose),
            headers,
            body: None,
            room: None,
            answer_max: BYTES_MAX / 4 * 3,
            time: TIME,
        };
        match http.ask(ask).await {
            Ok(answer) if answer.is_good() => {
                let kind = answer.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
                let kind = kind.and_then(|k| k.split(';').next()).map(|k| k.trim().to_ascii_lowercase());
                return Ok((answer.body, kind));
            }
            Ok(answer) if answer.status == 401 && is_ours => {
                if let Some(old) = &pass
                    && let Some(new) = registration.renew(old).await
                {
                    pass = Some(new);
                    continue;
                }
            }
            Ok(answer) if matches!(answer.status, 300..=407 | 409..=424 | 426..=428 | 430..=499) => {
                return Err("it could not be had");
            }
            Err(Unanswered::TooLarge(_)) => return Err("too large"),
            Ok(_) | Err(_) => {}
        }
        tokio::time::sleep(backoff.next()).await;
    }
    Err("it could not be had")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn our_token_goes_to_the_mux_server_and_nowhere_else() {
        let base = "https://mux.example.org";
        let at = |url: &str| place(url, base);
        assert_eq!(
            at("/v1/mux/files/telegram?x=1").unwrap().uri,
            "https://mux.example.org/v1/mux/files/telegram?x=1"
        );
        for ours in [
            "/v1/mux/files/telegram?x=%2F..",
            "https://mux.example.org/v1/mux/files/whatsapp?a",
            "https://mux.example.org:443/v1/mux/files/telegram",
            "HTTPS://MUX.example.org/v1/mux/files/a",
        ] {
            assert!(at(ours).unwrap().is_ours, "{ours}");
        }
        assert!(
            place("https://mux.example.org/v1/mux/files/a", "https://mux.example.org:443").unwrap().is_ours
        );
        let below = |url: &str| place(url, "https://example.org/mux/").unwrap().is_ours;
        assert!(
            below("https://example.org/mux/v1/mux/files/a") && !below("https://example.org/v1/mux/files/a")
        );
        for other in [
            "/v1/x",
            "https://mux.example.org/v1/admin",
            "https://mux.example.org:444/v1/mux/files/telegram",
            "/v1/mux/files/../admin",
            "/v1/mux/files/%2e%2e/admin",
            "/v1/mux/files//a",
            "https://mux.example.org.evil.example/v1/mux/files/a",
            "https://evil.example/v1/mux/files/a?https://mux.example.org/v1/mux/files/a",
            "https://cdn.example.org/a.png",
        ] {
            assert!(!at(other).unwrap().is_ours, "{other}");
        }
        for nowhere in [
            "//evil.example/x",
            "http://127.0.0.1/x",
            "http://mux.example.org/v1/mux/files/a",
            "file:///x",
            "https://mux.example.org@evil.example/v1/mux/files/a",
            "https://mux.example.org:443@evil.example/v1/mux/files/a",
            "https://mux.example.org\\@evil.example/v1/mux/files/a",
            "https:///v1/mux/files/a",
            "",
        ] {
            assert!(at(nowhere).is_none(), "{nowhere}");
        }
    }

    proptest! {
        /// The token goes where the connection goes: to the host of the very thing that is asked.
        #[test]
        fn whatever_an_address_looks_like_the_token_stays_at_home(
            noise in "[@:/\\\\?#.%a-z0-9]{0,12}", tail in "[@:/\\\\?#.%a-z0-9]{0,12}",
        ) {
            for url in [
                format!("https://{noise}mux.example.org{tail}/v1/mux/files/a"),
                format!("https://mux.example.org{noise}evil.example{tail}/v1/mux/files/a"),
                format!("/v1/mux/files/{noise}{tail}"),
            ] {
                if let Some(place) = place(&url, "https://mux.example.org").filter(|place| place.is_ours) {
                    prop_assert_eq!(place.uri.host(), Some("mux.example.org"));
                    prop_assert!(place.uri.path().starts_with(FILES));
                }
            }
        }
    }

    #[test]
    fn a_picture_is_written_as_a_data_url() {
        let raw = Picture { mime: "image/png".into(), data: Data::Raw(Bytes::from_static(b"abc")) };
        assert_eq!((raw.to_string().as_str(), raw.size()), ("data:image/png;base64,YWJj", 4));
        assert_eq!(bare("data:image/png;base64,YWJj"), "YWJj");
        assert_eq!(bare("YWJj"), "YWJj");
    }
}
