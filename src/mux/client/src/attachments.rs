//! The attachments of a message: pictures for the agent to see, and a line about everything else.
//!
//! The gateway's endpoint takes 8 pictures of 10 MB each, and no other files. A file of the mux-server is
//! fetched with the runtime token, one from elsewhere over https without it. What is left out is named to
//! the agent.

use crate::address::FileAddress;
use crate::backoff::Backoff;
use crate::http_client::{HttpClient, Request, RequestError};
use crate::message::{Attachment, Source};
use crate::registration::Registration;
use base64::display::Base64Display;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use cvm_mux_contract::INSTANCE_HEADER;
use hyper::header::CONTENT_TYPE;
use std::borrow::Cow;
use std::fmt;
use std::time::Duration;
use tokio::time::Instant;

const PICTURE_TYPES: [&str; 6] =
    ["image/jpeg", "image/png", "image/gif", "image/webp", "image/heic", "image/heif"];
const PICTURES_MAX: usize = 8;
/// Of all pictures of one message, as base64: what this program has memory for.
const BYTES_MAX: usize = 10 * 1024 * 1024;
const REQUEST_TIME: Duration = Duration::from_secs(30);
/// For all pictures of one message: somebody waits for the answer.
const TIME_MAX: Duration = Duration::from_secs(60);
/// After so many tries the message goes without the picture.
const TRIES: u32 = 6;
const NAME_MAX: usize = 80;

/// A picture as the gateway takes it: a data URL, which is made while it is written.
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

/// The pictures, and a line for the agent about each attachment that is left out.
pub(crate) async fn gather<'a>(
    attachments: Vec<Attachment<'a>>,
    http: &HttpClient,
    registration: &Registration,
) -> (Vec<Picture<'a>>, Vec<String>) {
    let (mut pictures, mut lines) = (Vec::<Picture<'a>>::new(), Vec::new());
    let (end, mut tried) = (Instant::now() + TIME_MAX, 0);
    for attachment in attachments {
        let description = describe(&attachment);
        let is_picture = PICTURE_TYPES.contains(&attachment.mime.as_str());
        let outcome = if !is_picture {
            Err("this kind of file cannot be shown to you")
        } else if tried >= PICTURES_MAX {
            Err("too many pictures in one message")
        } else {
            tried += 1;
            let loading = tokio::time::timeout_at(end, load(attachment, http, registration));
            loading.await.unwrap_or(Err("it could not be fetched in time"))
        };
        let used: usize = pictures.iter().map(Picture::size).sum();
        match outcome {
            Ok(picture) if used + picture.size() <= BYTES_MAX => pictures.push(picture),
            Ok(_) => lines.push(left_out(&description, "too large")),
            Err(why) => lines.push(left_out(&description, why)),
        }
    }
    (pictures, lines)
}

/// Lines in the place of attachments that the gateway did not take.
pub(crate) fn not_taken(attachments: &[Attachment<'_>]) -> Vec<String> {
    attachments.iter().map(|one| left_out(&describe(one), "it was not taken")).collect()
}

fn left_out(description: &str, why: &str) -> String {
    format!("[attachment: {description}; left out: {why}]")
}

fn describe(attachment: &Attachment<'_>) -> String {
    let kind = if attachment.mime.is_empty() { "file" } else { &attachment.mime };
    match &attachment.name {
        Some(name) => {
            let name: String = name.chars().filter(|c| !c.is_control()).take(NAME_MAX).collect();
            format!("{kind} \"{name}\"")
        }
        None => kind.to_owned(),
    }
}

async fn load<'a>(
    attachment: Attachment<'a>,
    http: &HttpClient,
    registration: &Registration,
) -> Result<Picture<'a>, &'static str> {
    let Attachment { mime, source, .. } = attachment;
    match source {
        Source::Nothing => Err("it came without content"),
        Source::Content(content) => {
            let content = match content {
                Cow::Borrowed(text) => Cow::Borrowed(without_data_url(text)),
                Cow::Owned(text) => Cow::Owned(without_data_url(&text).to_owned()),
            };
            let is_base64 = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'+' | b'/' | b'=');
            if content.is_empty() || !content.bytes().all(is_base64) {
                return Err("its content is not base64");
            }
            Ok(Picture { mime, data: Data::Base64(content) })
        }
        Source::Url(url) => {
            let address = registration.identity().server.file(&url);
            let address = address.ok_or("its address cannot be read from here")?;
            let (bytes, served_as) = fetch(address, http, registration).await?;
            // The type of what was served counts for more than the type that the event names.
            let mime = served_as.filter(|kind| PICTURE_TYPES.contains(&kind.as_str())).unwrap_or(mime);
            Ok(Picture { mime, data: Data::Raw(bytes) })
        }
    }
}

/// Without the beginning of a data URL.
fn without_data_url(text: &str) -> &str {
    if text.starts_with("data:") { text.split_once(',').map_or("", |(_, data)| data) } else { text }
}

async fn fetch(
    address: FileAddress,
    http: &HttpClient,
    registration: &Registration,
) -> Result<(Bytes, Option<String>), &'static str> {
    let mut backoff = Backoff::of_contract();
    let mut token = if address.is_ours { Some(registration.token().await) } else { None };
    for _ in 0..TRIES {
        let mut request = Request::get(address.uri.clone(), REQUEST_TIME).answer_bytes_max(BYTES_MAX / 4 * 3);
        if let Some(token) = &token {
            let device_id = &registration.identity().device_id;
            request = request.bearer(token.expose()).header(INSTANCE_HEADER, device_id);
        }
        match http.send(request).await {
            Ok(answer) if answer.is_success() => {
                let kind = answer.headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
                let kind = kind.and_then(|k| k.split(';').next()).map(|k| k.trim().to_ascii_lowercase());
                return Ok((answer.body, kind));
            }
            Ok(answer) if answer.status == 401 && address.is_ours => {
                if let Some(refused) = &token
                    && let Some(new) = registration.renew(refused).await
                {
                    token = Some(new);
                    continue;
                }
            }
            Ok(answer) if matches!(answer.status, 300..=407 | 409..=424 | 426..=428 | 430..=499) => {
                return Err("it could not be fetched");
            }
            Err(RequestError::TooLarge(_)) => return Err("too large"),
            Ok(_) | Err(_) => {}
        }
        tokio::time::sleep(backoff.next()).await;
    }
    Err("it could not be fetched")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_is_written_as_a_data_url() {
        let raw = Picture { mime: "image/png".into(), data: Data::Raw(Bytes::from_static(b"abc")) };
        assert_eq!((raw.to_string().as_str(), raw.size()), ("data:image/png;base64,YWJj", 4));
        assert_eq!(without_data_url("data:image/png;base64,YWJj"), "YWJj");
        assert_eq!(without_data_url("YWJj"), "YWJj");
    }
}
