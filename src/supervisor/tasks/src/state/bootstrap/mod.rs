//! The `openclaw.json` that a first boot writes, and what a later boot reads from the one that it finds.
//!
//! The generated configuration names variables and holds no secret. One that exists is only looked at, and one that is
//! not understood is no failure: the gateway decides whether it is right.

mod config_tree;

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{EncodePrivateKey as _, EncodePublicKey as _, KeypairBytes, PublicKeyBytes};
use serde_json::json;

use config_tree::Value;
use cvm_protocol::text::shown;
use cvm_secrets::keys::DeviceSeed;
use cvm_secrets::secret::Secret;

/// How the token stands in a configuration: as the gateway's own substitution of the variable
/// that the supervisor sets.
const TOKEN_REFERENCE: &str = "${OPENCLAW_GATEWAY_TOKEN}";
const TOKEN_VARIABLE: &str = "OPENCLAW_GATEWAY_TOKEN";

const REDPILL_BASE_URL: &str = "https://api.redpill.ai/v1";

/// A row to begin with. Others of the provider's models are added the same way.
const REDPILL_MODEL: (&str, &str) = ("phala/gpt-oss-120b", "GPT OSS 120B (RedPill)");

/// What the generated configuration depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct GatewaySettings {
    pub(crate) port: u16,
    /// `REDPILL_API_KEY` is in the gateway's environment.
    pub(crate) redpill: bool,
}

/// The `openclaw.json` of an instance that was given none.
pub(crate) fn generated_config(settings: GatewaySettings) -> String {
    let mut config = json!({
        "gateway": {
            "mode": "local",
            "bind": "lan",
            "port": settings.port,
            // By reference: the file has no secret to leak, and cannot differ from the variable.
            "auth": { "mode": "token", "token": TOKEN_REFERENCE },
            // How the mux client talks to the gateway.
            "http": { "endpoints": { "chatCompletions": { "enabled": true } } },
        },
        // Updates come with the image.
        "update": { "checkOnStart": false },
    });
    if settings.redpill {
        config["models"] = json!({
            "mode": "merge",
            "providers": {
                "redpill": {
                    "baseUrl": REDPILL_BASE_URL,
                    "apiKey": "${REDPILL_API_KEY}",
                    "api": "openai-completions",
                    "models": [{ "id": REDPILL_MODEL.0, "name": REDPILL_MODEL.1 }],
                },
            },
        });
    }
    let mut text = serde_json::to_string_pretty(&config).expect("a JSON value with text keys can be written");
    text.push('\n');
    text
}

/// The legacy `identity/device.json`, which the gateway imports into its database at start.
pub(crate) fn device_identity_json(seed: &DeviceSeed, created_at_ms: u64) -> Secret {
    // Without the public key inside of it, as Node writes it. Wiped on drop.
    let private = KeypairBytes { secret_key: *seed.expose(), public_key: None };
    let private_pem = private.to_pkcs8_pem(LineEnding::LF).expect("an Ed25519 seed has a PKCS#8 form");
    let public = PublicKeyBytes(seed.public_key());
    let public_pem = public.to_public_key_pem(LineEnding::LF).expect("an Ed25519 key has an SPKI form");
    let device_id = seed.device_id();
    let created = created_at_ms.to_string();
    // By hand, because serde_json would build a copy of the private key that nobody wipes. All
    // texts are hex, digits or PEM, so a line break is the only thing to escape.
    let mut parts: Vec<&[u8]> = vec![b"{\n  \"version\": 1,\n  \"deviceId\": \"", device_id.as_bytes()];
    parts.push(b"\",\n  \"publicKeyPem\": \"");
    push_json_lines(&mut parts, public_pem.as_bytes());
    parts.push(b"\",\n  \"privateKeyPem\": \"");
    push_json_lines(&mut parts, private_pem.as_bytes());
    parts.extend([&b"\",\n  \"createdAtMs\": "[..], created.as_bytes(), b"\n}\n"]);

    Secret::filled(parts.iter().map(|part| part.len()).sum(), |mut room| {
        for part in parts {
            let (place, rest) = room.split_at_mut(part.len());
            place.copy_from_slice(part);
            room = rest;
        }
    })
}

fn push_json_lines<'t>(parts: &mut Vec<&'t [u8]>, text: &'t [u8]) {
    for line in text.split_inclusive(|byte| *byte == b'\n') {
        match line.strip_suffix(b"\n") {
            Some(line) => parts.extend([line, b"\\n"]),
            None => parts.push(line),
        }
    }
}

/// What an existing configuration says about things that the supervisor relies on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConfigFindings {
    pub(crate) token: TokenState,
    /// `gateway.port`, where it is a number that a port can be.
    pub(crate) port: Option<u16>,
    /// `gateway.http.endpoints.chatCompletions.enabled`, without which the mux client is mute.
    pub(crate) chat_completions: Option<bool>,
}

/// How the configured token relates to the one that this instance has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum TokenState {
    /// By reference to the variable that the supervisor sets: always right.
    Reference,
    /// No token in the file. The gateway takes the variable then, so this is right too.
    Absent,
    /// The value itself, the same as ours. Right, but it stands in clear in a file.
    SameValue,
    /// Another value: clients with the derived token will be turned away.
    Differs,
    /// In another variable, a secret store or an included file, so this text cannot tell.
    Elsewhere,
    /// Authentication is not by token but by this mode (shortened and escaped).
    NotToken(String),
    /// Not JSON5, or too large or deeply nested to look at. The gateway is going to say more.
    Unreadable,
}

/// Looks at an `openclaw.json`, which the gateway reads as JSON5.
pub(crate) fn inspect_config(text: &str, token: &str) -> ConfigFindings {
    let Some(config) = Value::parse(text) else {
        return ConfigFindings { token: TokenState::Unreadable, port: None, chat_completions: None };
    };
    let port = match config.at("gateway.port") {
        Some(Value::Number(number)) => port_of(*number),
        _ => None,
    };
    let chat_completions = match config.at("gateway.http.endpoints.chatCompletions.enabled") {
        Some(Value::Bool(enabled)) => Some(*enabled),
        _ => None,
    };
    ConfigFindings { token: token_state(&config, token), port, chat_completions }
}

fn token_state(config: &Value, own: &str) -> TokenState {
    let included = ["$include", "gateway.$include", "gateway.auth.$include"]
        .iter()
        .any(|path| config.at(path).is_some());
    match config.at("gateway.auth.mode") {
        // An included file may set the mode; what stands here wins over it.
        Some(Value::Text(mode)) if mode.matches(b"token") => {}
        Some(Value::Text(mode)) if mode.expose().contains(&b'$') => return TokenState::Elsewhere,
        Some(Value::Text(mode)) => {
            return TokenState::NotToken(shown(&String::from_utf8_lossy(mode.expose())));
        }
        Some(_) => return TokenState::Unreadable,
        None if included => return TokenState::Elsewhere,
        // Without a mode a password wins over a token.
        None if config.at("gateway.auth.password").is_some() => {
            return TokenState::NotToken(String::from("password"));
        }
        None => {}
    }
    match config.at("gateway.auth.token") {
        Some(Value::Text(token)) => compare(token, own),
        Some(reference @ (Value::Object(_) | Value::Array)) => secret_ref(reference),
        Some(_) => TokenState::Unreadable,
        None if included => TokenState::Elsewhere,
        None => TokenState::Absent,
    }
}

fn compare(token: &Secret, own: &str) -> TokenState {
    let text = token.expose();
    if text.trim_ascii().is_empty() {
        return TokenState::Absent;
    }
    if token.matches(TOKEN_REFERENCE.as_bytes()) {
        return TokenState::Reference;
    }
    if token.matches(own.as_bytes()) {
        return TokenState::SameValue;
    }
    // `$${X}` is the literal text `${X}`; any other `${X}` is a value from somewhere else.
    let refers =
        text.windows(2).enumerate().any(|(at, pair)| pair == b"${" && (at == 0 || text[at - 1] != b'$'));
    if refers { TokenState::Elsewhere } else { TokenState::Differs }
}

/// `{ source: "env", id: "OPENCLAW_GATEWAY_TOKEN" }`, or another place.
fn secret_ref(reference: &Value) -> TokenState {
    let is = |key, wanted: &str| matches!(reference.at(key), Some(Value::Text(text)) if text.matches(wanted.as_bytes()));
    if is("source", "env") && is("id", TOKEN_VARIABLE) {
        TokenState::Reference
    } else {
        TokenState::Elsewhere
    }
}

/// JSON has one kind of number: 18789, 18789.0 and 1.8789e4 are the same port.
fn port_of(number: f64) -> Option<u16> {
    number.to_string().parse().ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests;
