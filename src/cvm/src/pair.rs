//! `cvm pair`: a token with which a chat is paired with this instance, for an operator to hand out.
//!
//! The mux-server is asked by `cvm-mux`, which has what TLS needs; this program finds out who asks
//! for whom, and shows the answer.
//!
//! Refuses the admin token as an argument. May import: `args`, `beside`, `input`, `json`, `look`,
//! `out`, `prompt`, `socket`, `trouble`, `words`.

use crate::args::PairArgs;
use crate::beside;
use crate::input;
use crate::json;
use crate::look::Look;
use crate::out;
use crate::prompt;
use crate::socket;
use crate::trouble::{Exit, Trouble};
use crate::words::{self, clean, span};
use cvm_protocol::mux::{MuxStatus, PairSpec};
use cvm_secrets::base64_bytes::PackedBytes;
use cvm_secrets::keys::KeyRing;
use cvm_secrets::keys::MasterKey;
use cvm_system::config::HttpUrl;
use cvm_system::env::{Environment, Given};
use qrcodegen::{QrCode, QrCodeEcc};
use serde_json::Value;
use std::fmt::Write as _;
use std::io::IsTerminal as _;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use zeroize::Zeroizing;

const WHAT: &str = "pair";
const PROGRAM: &str = "cvm-mux";
const TOKEN: &str = "MUX_ADMIN_TOKEN";
const TOKEN_MAX: usize = 16 * 1024;
/// For the supervisor, which may be on another machine and then does not answer at all.
const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &PairArgs) -> Result<Exit, Trouble> {
    beside::place(WHAT, PROGRAM)?;
    let spec = specification(args)?;
    let (program, mut command) = beside::program(WHAT, PROGRAM, &spec)?;
    drop(spec);
    let asked = command.arg("pair").stdout(Stdio::piped()).stderr(Stdio::piped()).output();
    let asked = asked.map_err(|e| beside::failed(WHAT, &program, &e))?;
    if !asked.status.success() {
        let said = String::from_utf8_lossy(&asked.stderr);
        let cause = said.lines().next().unwrap_or("cvm-mux ended without a word");
        return Err(Trouble::new(Exit::Bad, WHAT, clean(cause)));
    }
    let text = String::from_utf8_lossy(&asked.stdout).trim().to_owned();
    let look = Look::of_stdout();
    out::print(&match (args.json, look.terminal) {
        (true, true) => json::indented(&text),
        (true, false) => text + "\n",
        (false, _) => {
            let answer: Value = serde_json::from_str(&text)
                .map_err(|_| Trouble::new(Exit::Bad, WHAT, "the answer of cvm-mux is not understood"))?;
            page(&answer, &args.channel, words::now_ms(), look)
        }
    })?;
    Ok(Exit::Good)
}

// === Who asks for whom ===

fn specification(args: &PairArgs) -> Result<PairSpec, Trouble> {
    let environment = input::environment();
    let given = |name: &str| match environment.given(name) {
        Given::As(value) => value.expose_str().map(str::to_owned),
        Given::Not | Given::Unusable => None,
    };
    let here = socket::status_within(PATIENCE).ok().and_then(|snapshot| snapshot.status.mux);
    let base_url = args
        .server
        .clone()
        .or_else(|| given("MUX_BASE_URL"))
        .or_else(|| here.as_ref().map(|mux| mux.base_url.clone()))
        .ok_or_else(|| {
            let hint = "name it with --server or MUX_BASE_URL, or ask inside of the VM";
            Trouble::new(Exit::Usage, WHAT, "the mux-server is not known").hint(hint)
        })?;
    let base_url = HttpUrl::parse(&base_url).map_err(|_| {
        let cause = "the address of the mux-server is not an http or https URL";
        Trouble::new(Exit::Usage, WHAT, cause).hint("give https://HOST, without a user name or a query")
    })?;
    // What the mux client here uses has passed the same rule.
    let known = here.as_ref().is_some_and(|mux| mux.base_url == base_url.as_str());
    let allowed = matches!(given("ALLOW_HTTP").as_deref(), Some("1" | "true"));
    check_encrypted(&base_url, known || allowed)?;
    let (device_id, inbound_url) = device(args, &environment, here)?;
    Ok(PairSpec {
        base_url: base_url.as_str().to_owned(),
        admin_token: admin_token()?,
        device_id,
        // Another device is not reached where this one is.
        inbound_url: inbound_url.or_else(|| given("MUX_INBOUND_URL").filter(|_| args.device.is_none())),
        channel: args.channel.clone(),
        session_key: args.session.clone(),
        ttl_s: args.ttl,
    })
}

/// Over http, whoever is on the way gets the admin token.
fn check_encrypted(base_url: &HttpUrl, http_allowed: bool) -> Result<(), Trouble> {
    if http_allowed || !base_url.is_exposed() {
        return Ok(());
    }
    let cause = "the address of the mux-server is http: everybody on the way reads the admin token";
    Err(Trouble::new(Exit::Usage, WHAT, cause).hint("give https://HOST, or set ALLOW_HTTP=1"))
}

/// The device, and where it is reached if it is this one.
fn device(
    args: &PairArgs,
    environment: &Environment,
    here: Option<MuxStatus>,
) -> Result<(String, Option<String>), Trouble> {
    let master = match environment.given("MASTER_KEY") {
        Given::As(value) => MasterKey::new(value.duplicate()),
        Given::Not | Given::Unusable => None,
    };
    let derived = || master.map(|master| KeyRing::derive(&master).device_seed.device_id());
    let wanted = args.device.clone().or_else(derived);
    match (wanted, here) {
        (Some(id), Some(here)) if id == here.device_id => Ok((id, Some(here.inbound_url))),
        (Some(id), _) if id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()) => Ok((id, None)),
        (Some(_), _) => Err(Trouble::new(Exit::Usage, WHAT, "a device id has 64 hex digits")
            .hint("`cvm derive device-id` prints it")),
        (None, Some(here)) => Ok((here.device_id, Some(here.inbound_url))),
        (None, None) => {
            let hint = "name it with --device, set MASTER_KEY, or ask inside of a VM whose mux client runs";
            Err(Trouble::new(Exit::Usage, WHAT, "the device is not known").hint(hint))
        }
    }
}

fn admin_token() -> Result<PackedBytes, Trouble> {
    let trouble = |cause: String| Trouble::new(Exit::Usage, TOKEN, cause);
    let value = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let bytes = if let Some(token) = value(TOKEN) {
        Zeroizing::new(token.into_encoded_bytes())
    } else if let Some(path) = value(&format!("{TOKEN}_FILE")) {
        Zeroizing::new(input::read_file(Path::new(&path), TOKEN_MAX).map_err(trouble)?)
    } else if std::io::stdin().is_terminal() {
        prompt::secret("MUX_ADMIN_TOKEN: ")?
    } else {
        let hint = format!("set {TOKEN} or {TOKEN}_FILE, or call it on a terminal");
        return Err(trouble("it is not given, and there is no terminal to ask on".to_owned()).hint(hint));
    };
    let token = bytes.trim_ascii();
    if token.is_empty() || !token.iter().all(u8::is_ascii_graphic) {
        return Err(trouble("it must be visible ASCII without white space".to_owned()));
    }
    Ok(PackedBytes::pack(token))
}

// === What comes of it ===

fn page(answer: &Value, channel: &str, now: u64, look: Look) -> String {
    let word = |name: &str| answer.get(name).and_then(Value::as_str).map(clean);
    let mut text = format!("Pairing token for {}\n", clean(channel));
    let mut line = |label: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = writeln!(text, "  {label:<8} {value}"); // a String takes all
        }
    };
    line("token", word("token"));
    line("command", word("startCommand"));
    line("link", word("deepLink"));
    let expires = answer.get("expiresAtMs").and_then(Value::as_u64);
    line("expires", expires.map(|at| format!("in {}", span(at.saturating_sub(now)))));
    if look.terminal
        && let Some(code) = word("deepLink").and_then(|link| qr(&link, look))
    {
        text.push('\n');
        text.push_str(&code);
    }
    text.push_str(match word("startCommand") {
        Some(_) => {
            "\nSend the command to the bot in the chat that is to be paired, or open the link there.\n"
        }
        None => "\nGive the token to the bot in the chat that is to be paired.\n",
    });
    text
}

/// Two rows of squares a line. With colours it is black on white whatever the terminal is; without,
/// it is made for a dark one.
fn qr(link: &str, look: Look) -> Option<String> {
    const QUIET: i32 = 2;
    let code = QrCode::encode_text(link, QrCodeEcc::Low).ok()?;
    let colour = crate::look::wants_colour();
    let range = || -QUIET..code.size() + QUIET;
    if usize::try_from(code.size() + 2 * QUIET).ok()? > look.width {
        return None;
    }
    let mut text = String::new();
    for y in range().step_by(2) {
        if colour {
            text.push_str("\x1b[30;107m");
        }
        for x in range() {
            // Beside the code everything is light.
            let dark = (code.get_module(x, y), code.get_module(x, y + 1));
            text.push(match if colour { dark } else { (!dark.0, !dark.1) } {
                (true, true) => '█',
                (true, false) => '▀',
                (false, true) => '▄',
                (false, false) => ' ',
            });
        }
        text.push_str(if colour { "\x1b[0m\n" } else { "\n" });
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_page_holds_what_a_person_needs() {
        let answer = json!({"ok": true, "channel": "telegram", "token": "mpt_1", "expiresAtMs": 61_000,
            "startCommand": "/start mpt_1", "deepLink": "https://t.me/bot?start=mpt_1\u{1b}[2J"});
        let text = page(&answer, "telegram", 1_000, Look::plain(80));
        for part in ["mpt_1\n", "/start mpt_1\n", "https://t.me/bot?start=mpt_1", "in 1 min"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains('\u{1b}') && !text.contains('█'));
    }

    #[test]
    fn the_admin_token_does_not_leave_unencrypted_unasked() {
        let url = |text| HttpUrl::parse(text).ok().unwrap();
        let refused = check_encrypted(&url("http://mux.example.org"), false).unwrap_err();
        assert!(refused.hint.is_some_and(|hint| hint.contains("ALLOW_HTTP=1")));
        assert!(check_encrypted(&url("http://mux.example.org"), true).is_ok());
        for text in ["https://mux.example.org", "http://127.0.0.1:9300"] {
            assert!(check_encrypted(&url(text), false).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_link_becomes_a_code_where_there_is_room() {
        let code = qr("https://t.me/bot?start=mpt_1", Look::plain(80)).unwrap();
        let widths: std::collections::BTreeSet<usize> =
            code.lines().map(|l| l.chars().filter(|c| "█▀▄ ".contains(*c)).count()).collect();
        assert_eq!(widths.len(), 1);
        assert!(qr("https://t.me/bot?start=mpt_1", Look::plain(20)).is_none());
    }
}
