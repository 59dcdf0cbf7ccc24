//! The client and a mux-server behind https: whom it trusts is what a file of authorities says, and who is
//! not that gets neither key nor token.

#![allow(clippy::unwrap_used)]

use cvm_protocol::json_lines;
use cvm_protocol::mux::{MuxSpec, PairSpec};
use cvm_secrets::base64_bytes::PackedBytes;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde::Serialize;
use serde_json::Value;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tempfile::TempDir;

const KEY: &str = "register-canary-77";
const ADMIN: &str = "admin-canary-88";

/// An authority, and a certificate of it for `localhost`.
struct Authority {
    dir: TempDir,
}

impl Authority {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let authority = Self { dir };
        let new = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];
        authority.openssl(
            &[
                &[
                    "req",
                    "-x509",
                    "-subj",
                    "/CN=test authority",
                    "-days",
                    "2",
                    "-keyout",
                    "ca.key",
                    "-out",
                    "ca.pem",
                ],
                &new[..],
            ]
            .concat(),
        );
        authority.openssl(
            &[&["req", "-subj", "/CN=mux", "-keyout", "key.pem", "-out", "request.pem"], &new[..]].concat(),
        );
        std::fs::write(authority.path("names"), "subjectAltName=DNS:localhost\n").unwrap();
        authority.openssl(&[
            "x509",
            "-req",
            "-in",
            "request.pem",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-days",
            "2",
            "-extfile",
            "names",
            "-out",
            "cert.pem",
        ]);
        authority
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn openssl(&self, words: &[&str]) {
        let made = Command::new("openssl").args(words).current_dir(&self.dir).output().unwrap();
        assert!(made.status.success(), "{words:?}: {}", String::from_utf8_lossy(&made.stderr));
    }
}

/// A mux-server, as far as its first three answers; it notes all that it reads.
struct Server {
    port: u16,
    heard: Arc<Mutex<String>>,
}

impl Server {
    fn start(authority: &Authority) -> Self {
        let chain: Vec<_> =
            CertificateDer::pem_file_iter(authority.path("cert.pem")).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(authority.path("key.pem")).unwrap();
        let config = ServerConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        let config = Arc::new(config);
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let heard = Arc::new(Mutex::new(String::new()));
        let its = Arc::clone(&heard);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (config, heard) = (Arc::clone(&config), Arc::clone(&its));
                std::thread::spawn(move || answer(stream, config, &heard));
            }
        });
        Self { port, heard }
    }

    fn url(&self, host: &str) -> String {
        format!("https://{host}:{}", self.port)
    }

    fn heard(&self) -> String {
        self.heard.lock().unwrap().clone()
    }
}

/// One request of a connection. None where the other side does not go on.
fn answer(stream: TcpStream, config: Arc<ServerConfig>, notes: &Mutex<String>) -> Option<()> {
    let mut stream = BufReader::new(StreamOwned::new(ServerConnection::new(config).ok()?, stream));
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).ok()? == 0 {
            return None;
        }
    }
    let length =
        head.lines().find_map(|l| l.to_ascii_lowercase().strip_prefix("content-length: ")?.parse().ok());
    let mut body = vec![0; length.unwrap_or(0)];
    stream.read_exact(&mut body).ok()?;
    notes.lock().unwrap().push_str(&[&head, &*String::from_utf8_lossy(&body), "\n"].concat());
    let said = match head.split(' ').nth(1)? {
        "/v1/instances/register" => r#"{"ok":true,"runtimeToken":"r.u.n","expiresAtMs":4102444800000}"#,
        "/v1/admin/pairings/token" => r#"{"ok":true,"channel":"telegram","token":"mpt_1"}"#,
        _ => r#"{"keys":[]}"#,
    };
    let stream = stream.get_mut();
    let length = said.len();
    write!(stream, "HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{said}").ok()?;
    stream.flush().ok()
}

/// The client with a specification on its standard input, and nothing in its environment but these.
fn client<T: Serialize>(spec: &T, authorities: &Path) -> Command {
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(&json_lines::line(spec)).unwrap();
    input.rewind().unwrap();
    let mut command = Command::new("sh");
    command
        .env_clear()
        .env("SSL_CERT_FILE", authorities)
        .env("CLIENT", env!("CARGO_BIN_EXE_cvm-mux"))
        .stdin(input);
    command
}

fn pair(base_url: String, authorities: &Path) -> Output {
    let spec = PairSpec {
        base_url,
        admin_token: PackedBytes::pack(ADMIN.as_bytes()),
        device_id: "me".to_owned(),
        inbound_url: None,
        channel: "telegram".to_owned(),
        session_key: None,
        ttl_s: None,
    };
    client(&spec, authorities).args(["-c", "exec \"$CLIENT\" pair"]).output().unwrap()
}

#[test]
fn a_pairing_is_asked_for_over_https_and_only_of_a_server_that_proves_its_name() {
    let authority = Authority::new();
    let server = Server::start(&authority);
    // Somebody else's authority; and a name that the certificate does not have.
    let other = Authority::new();
    for (host, authorities) in [("localhost", other.path("ca.pem")), ("127.0.0.1", authority.path("ca.pem"))]
    {
        let refused = pair(server.url(host), &authorities);
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success() && said.contains("certificate"), "{said}");
        assert!(!said.contains(ADMIN), "{said}");
    }
    assert_eq!(server.heard(), "", "the token was shown to a server that is nobody");

    let done = pair(server.url("localhost"), &authority.path("ca.pem"));
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let answer: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!(answer["token"], "mpt_1");
    assert!(server.heard().contains(&format!("authorization: Bearer {ADMIN}")), "{}", server.heard());
}

#[test]
fn the_client_registers_over_https_and_looks_at_the_keys_there() {
    let authority = Authority::new();
    let server = Server::start(&authority);
    let dir = tempfile::tempdir().unwrap();
    let spec = MuxSpec {
        base_url: server.url("localhost"),
        register_key: PackedBytes::pack(KEY.as_bytes()),
        inbound_url: "https://me.example.org/v1/mux/inbound".to_owned(),
        device_id: "me".to_owned(),
        port: 0,
        gateway_port: 9,
        gateway_token: PackedBytes::pack(b"gateway"),
        directory: dir.path().join("queue").display().to_string(),
        replication: None,
        ack_wait_s: 0,
        drain_s: 10,
        uid: nix::unistd::geteuid().as_raw(),
    };
    let reports = dir.path().join("reports");
    let told = File::create(&reports).unwrap();
    let lifeline = dir.path().join("lifeline");
    nix::unistd::mkfifo(&lifeline, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut running = client(&spec, &authority.path("ca.pem"))
        .args(["-c", "exec \"$CLIENT\" 3>&1 4<\"$LIFELINE\""])
        .env("LIFELINE", &lifeline)
        .stdout(told)
        .spawn()
        .unwrap();
    let lifeline = File::options().write(true).open(&lifeline).unwrap();
    let began = Instant::now();
    let registered = || {
        std::fs::read_to_string(&reports)
            .unwrap()
            .contains(r#""registered","value":{"until":{"at_ms":4102444800000}"#)
    };
    while !registered() || !server.heard().contains("GET /.well-known/jwks.json") {
        assert!(began.elapsed() < Duration::from_secs(120), "{}", std::fs::read_to_string(&reports).unwrap());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(server.heard().contains(&format!("authorization: Bearer {KEY}")), "{}", server.heard());
    // A signal would not be heard: the end of the lifeline is the message.
    drop(lifeline);
    assert_eq!(running.wait().unwrap().code(), Some(0));
}
