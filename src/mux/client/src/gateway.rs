//! The gateway on loopback: one message in, the agent's answer out.
//!
//! Not streamed: a streamed answer may be corrected by an error after its beginning was sent, a whole
//! one is final. A run may take as long as it takes; a gateway that dies closes the connection.
//!
//! Refuses to judge what the agent says. May import: `attachments`, `event`, `http`.

use crate::attachments::Picture;
use crate::http::{Ask, Http, Unanswered};
use bytes::Bytes;
use hyper::{Method, Uri};
use serde::Serialize;
use serde_json::Value;
use std::borrow::Cow;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use zeroize::Zeroizing;

/// Longer than any run that somebody still waits for.
const TIME: Duration = Duration::from_secs(2 * 3600);
/// An answer is text.
const ANSWER_MAX: usize = 4 * 1024 * 1024;
/// What stands around a text and around a picture, some escapes included.
const AROUND: usize = 512;
const READY_TIME: Duration = Duration::from_secs(5);
const READY_MAX: usize = 64 * 1024;
/// The agent of a session whose key names none.
const AGENT: &str = "main";
/// What agents say when they want to say nothing, and what the gateway says when they said nothing.
const SILENT: [&str; 2] = ["NO_REPLY", "No response from OpenClaw."];

pub(crate) struct Gateway {
    http: Http,
    base: String,
    token: Zeroizing<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Answer(String),
    /// Nothing is to be said.
    Silence,
    /// Not now: it is away, starting, busy.
    Later(String),
    /// The run failed; the next one may not.
    Failed(String),
    /// It does not take this message: with its status.
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
    ImageUrl { image_url: Url<'a> },
}

#[derive(Serialize)]
struct Url<'a> {
    #[serde(serialize_with = "displayed")]
    url: &'a Picture<'a>,
}

fn displayed<S: serde::Serializer>(picture: &Picture<'_>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(picture)
}

/// The agent that a key of a session names: `agent:ID:` at its beginning.
fn named(session: &str) -> Option<&str> {
    let (id, _) = session.strip_prefix("agent:")?.split_once(':')?;
    let fits = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    let is_id = (1..=64).contains(&id.len()) && id.bytes().all(fits) && !id.starts_with(['_', '-']);
    is_id.then_some(id)
}

/// As soon as the gateway has a second agent it answers nobody who leaves the choice to it.
fn agent(session: &str) -> &str {
    named(session).unwrap_or(AGENT)
}

/// A key as the gateway keeps it: one that names no agent is the default agent's.
fn whole_key(session: &str) -> Cow<'_, str> {
    // These two are the gateway's own.
    if named(session).is_some() || matches!(session, "global" | "unknown") {
        Cow::Borrowed(session)
    } else {
        Cow::Owned(format!("agent:{AGENT}:{session}"))
    }
}

/// The body of a question.
pub(crate) fn question(session: &str, text: &str, pictures: &[Picture<'_>]) -> Bytes {
    let content = if pictures.is_empty() {
        Content::Text(text)
    } else {
        let said = (!text.is_empty()).then_some(Part::Text { text });
        let shown = pictures.iter().map(|url| Part::ImageUrl { image_url: Url { url } });
        Content::Parts(said.into_iter().chain(shown).collect())
    };
    let model = format!("openclaw/{}", agent(session));
    let chat = Chat { model, stream: false, messages: [Turn { role: "user", content }] };
    // In one go: growing would need twice the room of what may be ten mebibytes.
    let size = text.len() + pictures.iter().map(|one| one.size() + AROUND).sum::<usize>() + AROUND;
    let mut bytes = Vec::with_capacity(size);
    // Strings and lists only: there is nothing that it could refuse.
    let _ = serde_json::to_writer(&mut bytes, &chat);
    bytes.into()
}

impl Gateway {
    pub(crate) fn new(port: u16, token: Zeroizing<String>) -> Result<Self, String> {
        // A connection of its own for each question: none that a restart has made stale.
        let http = Http::new(false, false)?;
        Ok(Self { http, base: format!("http://127.0.0.1:{port}"), token })
    }

    fn at(&self, path: &str) -> Uri {
        // Of a number and letters: there is nothing that it could not be.
        format!("{}{path}", self.base).parse().unwrap_or_default()
    }

    /// Whether it is worth a large question: something is there, and does not say that it is not ready.
    pub(crate) async fn is_ready(&self) -> bool {
        let ask = Ask {
            method: Method::GET,
            uri: self.at("/readyz"),
            bearer: None,
            headers: &[],
            body: None,
            room: None,
            answer_max: READY_MAX,
            time: READY_TIME,
        };
        self.http.ask(ask).await.is_ok_and(|answer| !matches!(answer.status, 502..=504))
    }

    pub(crate) async fn ask(
        &self,
        session: &str,
        channel: &str,
        body: Bytes,
        room: Option<OwnedSemaphorePermit>,
    ) -> Outcome {
        let ask = Ask {
            method: Method::POST,
            uri: self.at("/v1/chat/completions"),
            bearer: Some(&self.token),
            headers: &[
                ("x-openclaw-session-key", &whole_key(session)),
                ("x-openclaw-message-channel", channel),
            ],
            body: Some(body),
            room,
            answer_max: ANSWER_MAX,
            time: TIME,
        };
        match self.http.ask(ask).await {
            Err(why @ Unanswered::Away(_)) => Outcome::Later(format!("the gateway does not answer: {why}")),
            Err(why) => Outcome::Failed(format!("the gateway gives no answer: {why}")),
            Ok(answer) => read(answer.status, &answer.words(), &answer.json()),
        }
    }
}

fn read(status: u16, words: &str, body: &Value) -> Outcome {
    let later = |hint: &str| Outcome::Later(format!("the gateway answers {words}: {hint}"));
    match status {
        200 => match said(body) {
            Some(text) if text.trim().is_empty() || SILENT.contains(&text.trim()) => Outcome::Silence,
            Some(text) => Outcome::Answer(text),
            None => Outcome::Failed(format!("the gateway answers {words} without a message")),
        },
        401 => later("it does not take the derived token; `cvm doctor` says why"),
        404 => later("its HTTP API is off; set gateway.http.endpoints.chatCompletions.enabled to true"),
        408 | 425 | 429 => later("it is asked again"),
        400..=499 => Outcome::Refused(status, words.to_owned()),
        500 => Outcome::Failed(format!("the gateway answers {words}")),
        _ => later("it is asked again"),
    }
}

fn said(body: &Value) -> Option<String> {
    let content = body.pointer("/choices/0/message/content")?;
    match content {
        Value::Null => Some(String::new()),
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts.iter().filter_map(|p| p.get("text")?.as_str()).collect();
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
        let body: Value = serde_json::from_slice(&question("s", "hi \"you\"", &[])).unwrap();
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
            assert_eq!((agent(session), &*whole_key(session)), (wanted, key));
        }
    }

    #[test]
    fn an_answer_is_text_and_silence_is_none() {
        let with = |content: Value| json!({"choices": [{"message": {"content": content}}]});
        assert_eq!(read(200, "200", &with(json!("hello"))), Outcome::Answer("hello".into()));
        for silent in [json!(""), json!("NO_REPLY\n"), json!(null), json!("No response from OpenClaw.")] {
            assert_eq!(read(200, "200", &with(silent)), Outcome::Silence);
        }
        assert!(matches!(read(200, "200", &json!({})), Outcome::Failed(_)));
        for status in [401, 404, 429, 502, 503, 504] {
            assert!(matches!(read(status, "", &json!({})), Outcome::Later(_)), "{status}");
        }
        for status in [400, 403, 413] {
            assert!(matches!(read(status, "", &json!({})), Outcome::Refused(..)), "{status}");
        }
        assert!(matches!(read(500, "", &json!({})), Outcome::Failed(_)));
    }
}
