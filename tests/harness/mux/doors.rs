//! The server's own side: what it answers, and what it notes as a breach of the contract.

use super::tokens::kid;
use super::{
    ADMIN_TOKEN, Door, INBOUND_PATH, Ill, REGISTER_KEY, Sent, Shared, State, Visit, jwt, text, unix_now,
};
use crate::serve::{Reply, Request};
use base64::Engine as _;
use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64_URL;
use ed25519_dalek::SigningKey;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

pub(super) fn refused(code: &str) -> Value {
    json!({"ok": false, "code": code, "error": code.to_lowercase().replace('_', " ")})
}

pub(super) fn serve(request: &Request<'_>, shared: &Shared) -> Reply {
    let door = match (request.method(), request.path()) {
        ("GET", "/health") => return Reply::json(200, &json!({"ok": true})),
        ("POST", "/v1/admin/pairings/token") => return pairing(request, shared),
        ("POST", "/v1/instances/register") => Door::Register,
        ("GET", "/.well-known/jwks.json") => Door::Keys,
        ("POST", "/v1/mux/outbound/send") => Door::Send,
        ("POST", "/v1/mux/outbound/typing") => Door::Typing,
        ("GET", path) if path.starts_with("/v1/mux/files/") => Door::File,
        (method, path) => {
            shared.state().violation(format!("nothing is at {method} {path}"));
            return Reply::json(404, &refused("NOT_FOUND"));
        }
    };
    let mut state = shared.state();
    if request.is_orphan() {
        return Reply::Cut;
    }
    let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let header = |name: &str| request.head.header(name).map(str::to_owned);
    let number = state.visits.len();
    state.visits.push(Visit {
        at: Instant::now(),
        door,
        status: None,
        key: header("idempotency-key"),
        authorization: header("authorization"),
        body: body.clone(),
    });
    let ill = state.befalls(door);
    match ill {
        Some(Ill::Hangs) => return Reply::Hang,
        Some(Ill::Says(status)) => {
            state.visits[number].status = Some(status);
            return Reply::json(status, &refused("AS_THE_TEST_WANTS_IT"));
        }
        Some(Ill::Lost) | None => {}
    }
    let reply = match door {
        Door::Register => register(&mut state, request, &body),
        Door::Keys => keys(&state),
        Door::Send => send(&mut state, request, &body),
        Door::Typing => typing(&mut state, request, &body),
        Door::File => file(&mut state, request),
    };
    if let Reply::Whole { status, .. } = &reply
        && ill.is_none()
    {
        state.visits[number].status = Some(*status);
    }
    drop(state);
    shared.changed.notify_all();
    if ill == Some(Ill::Lost) { Reply::Cut } else { reply }
}

pub(super) fn register(state: &mut State, request: &Request<'_>, body: &Value) -> Reply {
    if !request.head.says("content-type", "application/json") {
        state.violation("a registration is not said to be JSON");
    }
    if request.head.header("authorization") != Some(&format!("Bearer {REGISTER_KEY}")) {
        state.violation("a registration has another key");
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    let url = body["inboundUrl"].as_str().unwrap_or_default();
    if body["openclawId"] != state.tenant.as_str()
        || !url.ends_with(INBOUND_PATH)
        || body["inboundTimeoutMs"] != 15_000
    {
        state.violation(format!("a registration says {body}"));
        return Reply::json(400, &refused("BAD_REQUEST"));
    }
    state.issued += 1;
    let expires = SystemTime::now() + state.token_life;
    let at = expires.duration_since(UNIX_EPOCH).unwrap_or_default();
    let claims = json!({"sub": state.tenant, "n": state.issued, "exp": at.as_secs()});
    // Nobody but the server has to be able to read it.
    let token = jwt(&json!({"alg": "HS256", "typ": "JWT"}), &claims, |input| {
        Sha256::digest([input, b"of the server"].concat()).to_vec()
    });
    state.tokens.insert(token.clone(), expires);
    state.registered = true;
    let millis = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
    Reply::json(
        200,
        &json!({
            "ok": true, "openclawId": state.tenant, "runtimeToken": token, "expiresAtMs": millis,
            "tokenType": "Bearer",
        }),
    )
}

pub(super) fn keys(state: &State) -> Reply {
    let key = |key: &SigningKey| {
        json!({
            "kty": "OKP", "crv": "Ed25519", "alg": "EdDSA", "use": "sig", "kid": kid(key),
            "x": BASE64_URL.encode(key.verifying_key().as_bytes()),
        })
    };
    Reply::json(200, &json!({"keys": state.published.iter().map(key).collect::<Vec<_>>()}))
}

/// Whether the runtime token is a good one; none at all is never allowed.
pub(super) fn admitted(state: &mut State, request: &Request<'_>, what: &str) -> bool {
    let token = request.head.header("authorization").and_then(|a| a.strip_prefix("Bearer "));
    if let Some(end) = token.and_then(|t| state.tokens.get(t)) {
        return *end > SystemTime::now();
    }
    state.violation(format!("{what} with a token that was never given out"));
    false
}

pub(super) fn send(state: &mut State, request: &Request<'_>, body: &Value) -> Reply {
    if !admitted(state, request, "a send") {
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    let key = request.head.header("idempotency-key").unwrap_or_default().to_owned();
    for fault in faults_of_send(state, request, body, &key) {
        state.violation(fault);
    }
    if let Some((payload, answer)) = state.stored.get(&key) {
        if payload == body {
            return Reply::json(200, answer);
        }
        let what = format!("the request {key} was sent with two payloads: {payload} and {body}");
        state.conflicts.push(what);
        return Reply::json(409, &refused("IDEMPOTENCY_CONFLICT"));
    }
    let word = |name: &str| body[name].as_str().unwrap_or_default().to_owned();
    let (channel, session) = (word("channel"), word("sessionKey"));
    if !state.routes.contains(&(channel.clone(), session.clone())) {
        return Reply::json(403, &refused("ROUTE_NOT_BOUND"));
    }
    let number = state.sent.len() + 1;
    let answer = json!({
        "ok": true, "messageId": format!("m{number}"), "chatId": word("to"), "providerMessageIds": [number],
    });
    state.stored.insert(key, (body.clone(), answer.clone()));
    state.sent.push(Sent { at: Instant::now(), channel, session, payload: body.clone() });
    Reply::json(200, &answer)
}

/// What of a send is not as the contract has it.
pub(super) fn faults_of_send(state: &State, request: &Request<'_>, body: &Value, key: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let mut check = |holds: bool, what: &str| {
        if !holds {
            faults.push(format!("a send whose {what}: {body}"));
        }
    };
    let header = |name: &str| request.head.header(name).unwrap_or_default();
    let word = |name: &str| body[name].as_str().unwrap_or_default();
    check(header("content-type").starts_with("application/json"), "type is not JSON");
    check(header("x-openclaw-id") == state.tenant, "X-OpenClaw-Id is not the tenant's");
    check(body["openclawId"] == state.tenant.as_str(), "openclawId is not the tenant's");
    check(!key.is_empty() && key.len() <= 256, "idempotency key is missing or too long");
    check(body["requestId"] == key, "requestId is not its idempotency key");
    check(body["op"] == "send", "op is not send");
    check(!word("sessionKey").is_empty(), "sessionKey is missing");
    check(body["accountId"].is_string(), "accountId is missing");
    check(!word("to").is_empty(), "recipient is missing");
    let has_media = body["mediaUrl"].is_string() || body["mediaUrls"].is_array();
    check(body["text"].is_string(), "text is missing");
    check(has_media || !word("text").trim().is_empty(), "text is empty");
    for name in ["replyToId", "threadId"] {
        let value = &body[name];
        check(value.is_null() || value.is_string() || value.is_number(), &format!("{name} is no id"));
    }
    let channel = word("channel");
    let raw = body["raw"].as_object();
    check(raw.is_some_and(|r| r.len() == 1 && r.contains_key(channel)), "raw envelope is not its channel's");
    let envelope = &body["raw"][channel];
    let limit = match channel {
        "telegram" => {
            let inner = &envelope["body"];
            check(envelope["method"] == "sendMessage", "method is not sendMessage");
            check(inner["chat_id"].is_string() || inner["chat_id"].is_number(), "chat_id is missing");
            let known =
                ["chat_id", "text", "parse_mode", "message_thread_id", "reply_to_message_id", "reply_markup"];
            let fields = inner.as_object();
            check(
                fields.is_some_and(|f| f.keys().all(|k| known.contains(&k.as_str()))),
                "envelope has fields that nobody knows",
            );
            4096
        }
        "discord" => 2000,
        "whatsapp" => 4096,
        _ => {
            check(false, "channel is unknown");
            usize::MAX
        }
    };
    check(!text(body).trim().is_empty(), "envelope has no text");
    // Telegram and Discord count what UTF-16 needs; to be safe is the same for all.
    check(text(body).encode_utf16().count() <= limit, "text is too long for its channel");
    faults
}

pub(super) fn typing(state: &mut State, request: &Request<'_>, body: &Value) -> Reply {
    if !admitted(state, request, "typing") {
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    if body["openclawId"] != state.tenant.as_str()
        || !body["channel"].is_string()
        || !body["sessionKey"].is_string()
    {
        state.violation(format!("typing says {body}"));
        return Reply::json(400, &refused("BAD_REQUEST"));
    }
    Reply::json(200, &json!({"ok": true}))
}

pub(super) fn file(state: &mut State, request: &Request<'_>) -> Reply {
    if !admitted(state, request, "a file") {
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    if let Some(to) = &state.redirect {
        let headers = vec![("Location".into(), to.clone())];
        return Reply::Whole { status: 302, headers, body: Vec::new() };
    }
    match state.files.get(request.head.word(1)) {
        Some((mime, bytes)) => Reply::of(200, mime, bytes.clone()),
        None => Reply::json(404, &refused("NOT_FOUND")),
    }
}

pub(super) fn pairing(request: &Request<'_>, shared: &Shared) -> Reply {
    if request.head.header("authorization") != Some(&format!("Bearer {ADMIN_TOKEN}")) {
        return Reply::json(401, &refused("UNAUTHORIZED"));
    }
    let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
    let mut state = shared.state();
    let channel = body["channel"].as_str().unwrap_or_default();
    let known = ["openclawId", "inboundUrl", "inboundTimeoutMs", "channel", "sessionKey", "ttlSec"];
    let fields = body.as_object().into_iter().flatten();
    if body["openclawId"] != state.tenant.as_str()
        || !["telegram", "discord", "whatsapp"].contains(&channel)
        || fields.filter(|(_, v)| !v.is_null()).any(|(name, _)| !known.contains(&name.as_str()))
    {
        state.violation(format!("a pairing says {body}"));
        return Reply::json(400, &refused("BAD_REQUEST"));
    }
    let life = body["ttlSec"].as_i64().unwrap_or(900);
    let mut answer = json!({
        "ok": true, "channel": channel, "token": "mpt_token-of-a-pairing", "expiresAtMs": (unix_now() + life) * 1000,
    });
    if channel == "telegram" {
        answer["startCommand"] = json!("/start mpt_token-of-a-pairing");
        answer["deepLink"] = json!("https://t.me/a_bot?start=mpt_token-of-a-pairing");
    }
    Reply::json(200, &answer)
}
