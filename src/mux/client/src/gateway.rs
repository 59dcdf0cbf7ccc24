//! The gateway on loopback: a question to the agent, and its answer.
//!
//! An answer is not streamed: a stream may report an error after its beginning was sent to the chat, a
//! whole answer is final. A run may take long; the connection ends when the gateway dies.

use crate::attachments::Picture;
use crate::http_client::{HttpClient, Request, RequestError};
use bytes::Bytes;
use hyper::Uri;
use serde::{Serialize, Serializer};
use serde_json::Value;
use std::borrow::Cow;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use zeroize::Zeroizing;

/// Longer than any run that somebody still waits for.
const RUN_TIME: Duration = Duration::from_secs(2 * 3600);
/// An answer is text.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;
/// What stands around a text and around a picture, some escapes included.
const FRAME_BYTES: usize = 512;
const READY_TIME: Duration = Duration::from_secs(5);
/// The agent of a session whose key names none.
const DEFAULT_AGENT: &str = "main";
/// What an agent says that wants to say nothing, and what the gateway says for one that said nothing.
const SILENT: [&str; 2] = ["NO_REPLY", "No response from OpenClaw."];

pub(crate) struct Gateway {
    http: HttpClient,
    base: String,
    token: Zeroizing<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum AskOutcome {
    Answer(String),
    /// The agent has nothing to say.
    Silence,
    /// The gateway is away, starting, or busy.
    Later(String),
    /// The run failed; the next one may not.
    Failed(String),
    /// The gateway does not take this message: status and summary.
    Refused(u16, String),
}

#[derive(Serialize)]
struct Chat<'a> {
    model: String,
    stream: bool,
    messages: [Turn<'a>; 1],
}

#[derive(Serialize)]
struct Turn<'a> {
    role: &'static str,
    content: Content<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Content<'a> {
    Text(&'a str),
    Parts(Vec<Part<'a>>),
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Part<'a> {
    Text { text: &'a str },
    ImageUrl { image_url: ImageUrl<'a> },
}

#[derive(Serialize)]
struct ImageUrl<'a> {
    #[serde(serialize_with = "data_url")]
    url: &'a Picture<'a>,
}

fn data_url<S: Serializer>(picture: &Picture<'_>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(picture)
}

/// The agent that a session key names: `agent:ID:` at its beginning.
fn named_agent(session: &str) -> Option<&str> {
    let (id, _) = session.strip_prefix("agent:")?.split_once(':')?;
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    let is_id = (1..=64).contains(&id.len()) && id.bytes().all(fits) && !id.starts_with(['_', '-']);
    is_id.then_some(id)
}

/// Always one by name: a gateway with two agents refuses a question that leaves the choice to it.
fn agent(session: &str) -> &str {
    named_agent(session).unwrap_or(DEFAULT_AGENT)
}

/// A session key as the gateway stores it: a key without an agent belongs to the default agent.
fn stored_key(session: &str) -> Cow<'_, str> {
    // These two are the gateway's own.
    if named_agent(session).is_some() || matches!(session, "global" | "unknown") {
        Cow::Borrowed(session)
    } else {
        Cow::Owned(format!("agent:{DEFAULT_AGENT}:{session}"))
    }
}

/// The body of a question. It holds `memory` until it has been sent.
pub(crate) fn question(
    session: &str,
    text: &str,
    pictures: &[Picture<'_>],
    memory: Option<OwnedSemaphorePermit>,
) -> Bytes {
    let content = if pictures.is_empty() {
        Content::Text(text)
    } else {
        let said = (!text.is_empty()).then_some(Part::Text { text });
        let shown = pictures.iter().map(|url| Part::ImageUrl { image_url: ImageUrl { url } });
        Content::Parts(said.into_iter().chain(shown).collect())
    };
    let model = format!("openclaw/{}", agent(session));
    let chat = Chat { model, stream: false, messages: [Turn { role: "user", content }] };
    // A vector that grew would need twice the memory of what may be ten mebibytes.
    let size = text.len() + pictures.iter().map(|one| one.size() + FRAME_BYTES).sum::<usize>() + FRAME_BYTES;
    let mut bytes = Vec::with_capacity(size);
    // Only maps with names, strings and lists are written, which JSON has.
    let _ = serde_json::to_writer(&mut bytes, &chat);
    Bytes::from_owner(Body { bytes, _memory: memory })
}

struct Body {
    bytes: Vec<u8>,
    _memory: Option<OwnedSemaphorePermit>,
}

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Gateway {
    pub(crate) fn new(port: u16, token: Zeroizing<String>) -> Result<Self, String> {
        // Each question gets a connection of its own: a restart has made older ones stale.
        let http = HttpClient::new(false, false)?;
        Ok(Self { http, base: format!("http://127.0.0.1:{port}"), token })
    }

    /// A path of the gateway, which always makes an address.
    fn at(&self, path: &str) -> Uri {
        format!("{}{path}", self.base).parse().unwrap_or_default()
    }

    /// Whether a large question is worth its memory: the gateway answers, and not that it is not ready.
    pub(crate) async fn is_ready(&self) -> bool {
        let answer = self.http.send(Request::get(self.at("/readyz"), READY_TIME)).await;
        answer.is_ok_and(|answer| !matches!(answer.status, 502..=504))
    }

    pub(crate) async fn ask(&self, session: &str, channel: &str, question: Bytes) -> AskOutcome {
        let key = stored_key(session);
        let request = Request::post(self.at("/v1/chat/completions"), question, RUN_TIME)
            .bearer(&self.token)
            .header("x-openclaw-session-key", &key)
            .header("x-openclaw-message-channel", channel)
            .answer_bytes_max(ANSWER_BYTES_MAX);
        match self.http.send(request).await {
            Err(why @ RequestError::Unreachable(_)) => {
                AskOutcome::Later(format!("the gateway does not answer: {why}"))
            }
            Err(why) => AskOutcome::Failed(format!("the gateway gives no answer: {why}")),
            Ok(answer) => judge(answer.status, &answer.summary(), &answer.json()),
        }
    }
}

fn judge(status: u16, summary: &str, body: &Value) -> AskOutcome {
    let later = |hint: &str| AskOutcome::Later(format!("the gateway answers {summary}: {hint}"));
    match status {
        200 => match answer_text(body) {
            Some(text) if text.trim().is_empty() || SILENT.contains(&text.trim()) => AskOutcome::Silence,
            Some(text) => AskOutcome::Answer(text),
            None => AskOutcome::Failed(format!("the gateway answers {summary} without a message")),
        },
        401 => later("it does not take the derived token; `cvm doctor` says why"),
        404 => later("its HTTP API is off; set gateway.http.endpoints.chatCompletions.enabled to true"),
        408 | 425 | 429 => later("it is asked again"),
        400..=499 => AskOutcome::Refused(status, summary.to_owned()),
        500 => AskOutcome::Failed(format!("the gateway answers {summary}")),
        _ => later("it is asked again"),
    }
}

fn answer_text(body: &Value) -> Option<String> {
    match body.pointer("/choices/0/message/content")? {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts.iter().filter_map(|part| part.get("text")?.as_str()).collect();
            Some(texts.concat())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_message_without_pictures_is_plain_text() {
        let body: Value = serde_json::from_slice(&question("s", "hi \"you\"", &[], None)).unwrap();
        assert_eq!(body["messages"], json!([{"role": "user", "content": "hi \"you\""}]));
        assert_eq!((&body["model"], &body["stream"]), (&json!("openclaw/main"), &json!(false)));
    }

    #[test]
    fn the_agent_is_the_one_that_the_session_names_and_main_otherwise() {
        for (session, wanted, key) in [
            ("agent:main:telegram:direct:5", "main", "agent:main:telegram:direct:5"),
            ("agent:bob_2:main", "bob_2", "agent:bob_2:main"),
            ("telegram:5", "main", "agent:main:telegram:5"),
            ("global", "main", "global"),
            ("agent:bob", "main", "agent:main:agent:bob"),
            ("agent::x", "main", "agent:main:agent::x"),
            ("agent:_a:x", "main", "agent:main:agent:_a:x"),
            ("agent:a/b:x", "main", "agent:main:agent:a/b:x"),
        ] {
            assert_eq!((agent(session), &*stored_key(session)), (wanted, key));
        }
    }

    #[test]
    fn an_answer_is_text_and_silence_is_none() {
        let with = |content: Value| json!({"choices": [{"message": {"content": content}}]});
        assert_eq!(judge(200, "200", &with(json!("hello"))), AskOutcome::Answer("hello".into()));
        for silent in [json!(""), json!("NO_REPLY\n"), json!(null), json!("No response from OpenClaw.")] {
            assert_eq!(judge(200, "200", &with(silent)), AskOutcome::Silence);
        }
        assert!(matches!(judge(200, "200", &json!({})), AskOutcome::Failed(_)));
        for status in [401, 404, 429, 502, 503, 504] {
            assert!(matches!(judge(status, "", &json!({})), AskOutcome::Later(_)), "{status}");
        }
        for status in [400, 403, 413] {
            assert!(matches!(judge(status, "", &json!({})), AskOutcome::Refused(..)), "{status}");
        }
        assert!(matches!(judge(500, "", &json!({})), AskOutcome::Failed(_)));
    }
}
