//! `cvm pair`: mints a token with which a chat is paired with this instance.
//!
//! `cvm-mux` asks the mux-server, because TLS is linked into that program only. This one finds the
//! server, the device and the admin token, and shows the answer. The token is never an argument.

use crate::args::PairArgs;
use crate::control_socket;
use crate::failure::{Exit, Failure};
use crate::input;
use crate::json;
use crate::prompt;
use crate::sibling;
use crate::stdout;
use crate::style::Style;
use crate::text::{clean, width};
use crate::units::{now_ms, span};
use cvm_protocol::fact::text_of;
use cvm_protocol::mux::{DEVICE, INBOUND, MUX_CLIENT, PairSpec, SERVER};
use cvm_protocol::status::Status;
use cvm_secrets::base64_bytes::PackedBytes;
use cvm_secrets::keys::KeyRing;
use cvm_secrets::keys::MasterKey;
use cvm_system::config::HttpUrl;
use cvm_system::env::{Environment, Given};
use qrcode::render::unicode::Dense1x2;
use qrcode::{EcLevel, QrCode};
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
/// For the supervisor, which is not there on other machines than the VM.
const PATIENCE: Duration = Duration::from_secs(2);

pub(crate) fn run(args: &PairArgs) -> Result<Exit, Failure> {
    sibling::path(WHAT, PROGRAM)?;
    let spec = specification(args)?;
    let (program, mut command) = sibling::command(WHAT, PROGRAM, &spec)?;
    drop(spec);
    let output = command.arg("pair").stdout(Stdio::piped()).stderr(Stdio::piped()).output();
    let output = output.map_err(|e| sibling::failed(WHAT, &program, &e))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let cause = errors.lines().next().unwrap_or("cvm-mux ended without a message");
        return Err(Failure::new(Exit::Bad, WHAT, clean(cause)));
    }
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    let style = Style::of_stdout();
    stdout::print(&if args.json {
        json::shown(&text, style)
    } else {
        let answer: Value = serde_json::from_str(&text)
            .map_err(|_| Failure::new(Exit::Bad, WHAT, "the answer of cvm-mux is not JSON"))?;
        page(&answer, &args.channel, now_ms(), style)
    })?;
    Ok(Exit::Good)
}

// === The request ===

fn specification(args: &PairArgs) -> Result<PairSpec, Failure> {
    let environment = input::environment();
    let given = |name: &str| match environment.given(name) {
        Given::As(value) => value.expose_str().map(str::to_owned),
        Given::Not | Given::Unusable => None,
    };
    let here = control_socket::status_within(PATIENCE).ok().and_then(|snapshot| Here::of(&snapshot.status));
    let base_url = args
        .server
        .clone()
        .or_else(|| given("MUX_BASE_URL"))
        .or_else(|| here.as_ref().map(|mux| mux.base_url.clone()))
        .ok_or_else(|| {
            let hint = "name it with --server or MUX_BASE_URL, or ask inside of the VM";
            Failure::new(Exit::Usage, WHAT, "the mux-server is not known").hint(hint)
        })?;
    let base_url = HttpUrl::parse(&base_url).map_err(|_| {
        let cause = "the address of the mux-server is not an http or https URL";
        Failure::new(Exit::Usage, WHAT, cause).hint("give https://HOST, without a user name or a query")
    })?;
    // The mux client here uses this address, so the supervisor has accepted it.
    let known = here.as_ref().is_some_and(|mux| mux.base_url == base_url.as_str());
    let allowed = matches!(given("ALLOW_HTTP").as_deref(), Some("1" | "true"));
    check_encrypted(&base_url, known || allowed)?;
    let (device_id, inbound_url) = device(args, &environment, here)?;
    Ok(PairSpec {
        base_url: base_url.as_str().to_owned(),
        admin_token: admin_token()?,
        device_id,
        // The inbound URL here is not that of another device.
        inbound_url: inbound_url.or_else(|| given("MUX_INBOUND_URL").filter(|_| args.device.is_none())),
        channel: args.channel.clone(),
        session_key: args.session.clone(),
        ttl_s: args.ttl,
    })
}

/// What the mux client of this machine reports about itself.
struct Here {
    base_url: String,
    inbound_url: String,
    device_id: String,
}

impl Here {
    fn of(status: &Status) -> Option<Self> {
        let client = status.services.iter().find(|service| service.name == MUX_CLIENT)?;
        let text = |label| text_of(&client.facts, label).map(str::to_owned);
        Some(Self { base_url: text(SERVER)?, inbound_url: text(INBOUND)?, device_id: text(DEVICE)? })
    }
}

/// Over http, everybody on the way could read the admin token.
fn check_encrypted(base_url: &HttpUrl, http_allowed: bool) -> Result<(), Failure> {
    if http_allowed || !base_url.is_exposed() {
        return Ok(());
    }
    let cause = "the address of the mux-server is http: everybody on the way reads the admin token";
    Err(Failure::new(Exit::Usage, WHAT, cause).hint("give https://HOST, or set ALLOW_HTTP=1"))
}

/// The id of the device, and its inbound URL if it is this machine.
fn device(
    args: &PairArgs,
    environment: &Environment,
    here: Option<Here>,
) -> Result<(String, Option<String>), Failure> {
    let master = match environment.given("MASTER_KEY") {
        Given::As(value) => MasterKey::new(value.duplicate()),
        Given::Not | Given::Unusable => None,
    };
    let derived = || master.map(|master| KeyRing::derive(&master).device_seed.device_id());
    let wanted = args.device.clone().or_else(derived);
    match (wanted, here) {
        (Some(id), Some(here)) if id == here.device_id => Ok((id, Some(here.inbound_url))),
        (Some(id), _) if id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit()) => Ok((id, None)),
        (Some(_), _) => Err(Failure::new(Exit::Usage, WHAT, "a device id has 64 hex digits")
            .hint("`cvm derive device-id` prints it")),
        (None, Some(here)) => Ok((here.device_id, Some(here.inbound_url))),
        (None, None) => {
            let hint = "name it with --device, set MASTER_KEY, or ask inside of a VM whose mux client runs";
            Err(Failure::new(Exit::Usage, WHAT, "the device is not known").hint(hint))
        }
    }
}

fn admin_token() -> Result<PackedBytes, Failure> {
    let failure = |cause: String| Failure::new(Exit::Usage, TOKEN, cause);
    let value = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty());
    let bytes = if let Some(token) = value(TOKEN) {
        Zeroizing::new(token.into_encoded_bytes())
    } else if let Some(path) = value(&format!("{TOKEN}_FILE")) {
        Zeroizing::new(input::read_file(Path::new(&path), TOKEN_MAX).map_err(failure)?)
    } else if std::io::stdin().is_terminal() {
        prompt::secret("MUX_ADMIN_TOKEN: ")?
    } else {
        let hint = format!("set {TOKEN} or {TOKEN}_FILE, or call it on a terminal");
        return Err(failure("it is not given, and there is no terminal to ask on".to_owned()).hint(hint));
    };
    let token = bytes.trim_ascii();
    if token.is_empty() || !token.iter().all(u8::is_ascii_graphic) {
        return Err(failure("it must be visible ASCII without white space".to_owned()));
    }
    Ok(PackedBytes::pack(token))
}

// === The answer ===

fn page(answer: &Value, channel: &str, now: u64, style: Style) -> String {
    let field = |name: &str| answer.get(name).and_then(Value::as_str).map(clean);
    let mut text = format!("Pairing token for {}\n", clean(channel));
    let mut line = |label: &str, value: Option<String>| {
        if let Some(value) = value {
            let _ = writeln!(text, "  {label:<8} {value}"); // a String takes all
        }
    };
    line("token", field("token"));
    line("command", field("startCommand"));
    line("link", field("deepLink"));
    let expires = answer.get("expiresAtMs").and_then(Value::as_u64);
    line("expires", expires.map(|at| format!("in {}", span(at.saturating_sub(now)))));
    if style.is_terminal
        && let Some(code) = field("deepLink").and_then(|link| qr(&link, style))
    {
        text.push('\n');
        text.push_str(&code);
    }
    text.push_str(match field("startCommand") {
        Some(_) => {
            "\nSend the command to the bot in the chat that is to be paired, or open the link there.\n"
        }
        None => "\nGive the token to the bot in the chat that is to be paired.\n",
    });
    text
}

/// The link as a QR code, two rows of its squares in a line. With colours it is black on white on any
/// terminal; without, it fits a dark one.
fn qr(link: &str, style: Style) -> Option<String> {
    let code = QrCode::with_error_correction_level(link, EcLevel::L).ok()?;
    let (dark, light) =
        if style.colour { (Dense1x2::Dark, Dense1x2::Light) } else { (Dense1x2::Light, Dense1x2::Dark) };
    let squares = code.render::<Dense1x2>().dark_color(dark).light_color(light).build();
    if squares.lines().any(|line| width(line) > style.width) {
        return None;
    }
    let (on, off) = if style.colour { ("\x1b[30;107m", "\x1b[0m") } else { ("", "") };
    Some(squares.lines().flat_map(|line| [on, line, off, "\n"]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_page_holds_the_token_the_command_the_link_and_the_time() {
        let answer = json!({"ok": true, "channel": "telegram", "token": "mpt_1", "expiresAtMs": 61_000,
            "startCommand": "/start mpt_1", "deepLink": "https://t.me/bot?start=mpt_1\u{1b}[2J"});
        let text = page(&answer, "telegram", 1_000, Style::plain(80));
        for part in ["mpt_1\n", "/start mpt_1\n", "https://t.me/bot?start=mpt_1", "in 1 min"] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(!text.contains('\u{1b}') && !text.contains('█'));
    }

    #[test]
    fn the_admin_token_is_sent_unencrypted_only_on_request() {
        let url = |text| HttpUrl::parse(text).ok().unwrap();
        let refused = check_encrypted(&url("http://mux.example.org"), false).unwrap_err();
        assert!(refused.hint.is_some_and(|hint| hint.contains("ALLOW_HTTP=1")));
        assert!(check_encrypted(&url("http://mux.example.org"), true).is_ok());
        for text in ["https://mux.example.org", "http://127.0.0.1:9300"] {
            assert!(check_encrypted(&url(text), false).is_ok(), "{text}");
        }
    }

    #[test]
    fn a_link_becomes_a_code_if_the_terminal_is_wide_enough() {
        let code = qr("https://t.me/bot?start=mpt_1", Style::plain(80)).unwrap();
        let widths: std::collections::BTreeSet<usize> =
            code.lines().map(|l| l.chars().filter(|c| "█▀▄ ".contains(*c)).count()).collect();
        assert_eq!(widths.len(), 1);
        assert!(qr("https://t.me/bot?start=mpt_1", Style::plain(20)).is_none());
    }
}
