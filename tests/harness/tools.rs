//! Programs that know nothing of the product and judge what it stores.

use crate::machine::repository;
use crate::s3::Bucket;
use crate::wait::lock;
use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Mutex;

fn installed(name: &str) -> Command {
    let program = repository().join("target/venv/bin").join(name);
    assert!(program.exists(), "{} is missing: run `tests/setup test` first", program.display());
    let mut command = Command::new(program);
    // With AWS_CA_BUNDLE in the environment rclone would not start.
    command.env_clear().env("PATH", "/usr/bin:/bin").stdin(Stdio::null());
    command
}

#[track_caller]
fn succeeded(output: &Output, what: &str) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what} ended with {}:\n{said}", output.status);
}

/// A password in clear, as rclone's configuration wants it. Each is asked for once: a start of rclone takes a
/// tenth of a second, and a test asks for the same ones again and again.
#[track_caller]
pub fn obscure(clear: &str) -> String {
    static KNOWN: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
    let mut known = lock(&KNOWN);
    if let Some(obscured) = known.get(clear) {
        return obscured.clone();
    }
    let output = installed("rclone").args(["obscure", clear]).output().expect("rclone runs");
    succeeded(&output, "rclone obscure");
    let obscured = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    known.insert(clear.to_owned(), obscured.clone());
    obscured
}

/// Stock rclone with the remotes `s3:`, below which are buckets, and `crypt:`, which is the
/// crypt root.
pub struct Rclone {
    scratch: tempfile::TempDir,
}

impl Rclone {
    /// `password` and `salt` are in clear. The bucket's client says where; see
    /// [`crate::s3::S3::at`] for going through a proxy.
    #[track_caller]
    pub fn new(bucket: &Bucket, prefix: &str, password: &str, salt: &str) -> Self {
        let scratch =
            tempfile::Builder::new().prefix("cvm-rclone-").tempdir().expect("a temporary directory");
        let s3 = &bucket.s3;
        let text = format!(
            "[s3]\ntype = s3\nprovider = Other\nendpoint = http://{}\nregion = {}\naccess_key_id = {}\n\
             secret_access_key = {}\n\n[crypt]\ntype = crypt\nremote = s3:{}/{prefix}\npassword = {}\n\
             password2 = {}\n",
            s3.address,
            s3.region,
            s3.access_key,
            s3.secret_key,
            bucket.name,
            obscure(password),
            obscure(salt),
        );
        fs::write(scratch.path().join("rclone.conf"), text).expect("the scratch directory is writable");
        Self { scratch }
    }

    pub fn configuration(&self) -> PathBuf {
        self.scratch.path().join("rclone.conf")
    }

    /// With few and quick retries: a judge has no patience.
    pub fn run(&self, words: &[&str]) -> Output {
        // The last of the same flags counts, so that a caller's own do.
        let words = [&["--retries", "1", "--low-level-retries", "3"], words].concat();
        let mut command = rclone(&words, &self.configuration());
        command.env("HOME", self.scratch.path()).output().expect("rclone runs")
    }

    /// Standard output of a command that has to succeed.
    #[track_caller]
    pub fn ok(&self, words: &[&str]) -> Vec<u8> {
        let output = self.run(words);
        succeeded(&output, &format!("rclone {words:?}"));
        output.stdout
    }
}

/// The rclone that everybody has, ready to run.
pub fn rclone(words: &[&str], configuration: &Path) -> Command {
    let mut command = installed("rclone");
    command.arg("--config").arg(configuration).args(words);
    command
}

/// What a Python program prints, with the packages of the judges.
#[track_caller]
pub fn python(program: &str, arguments: &[&str]) -> String {
    let output = installed("python").arg("-c").arg(program).args(arguments).output().expect("python runs");
    succeeded(&output, "python");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// Reads one object with a program that shares no code with rclone: its name below the crypt
/// root and its bytes as they are stored, to both in clear; or what the program said when it
/// cannot.
pub fn rclone_crypt_python(
    name: &str,
    bytes: &[u8],
    password: &str,
    salt: &str,
) -> Result<(String, Vec<u8>), String> {
    const PROGRAM: &str = "
import io, sys
from rclone_crypt import CryptFile, CryptSecrets, NameCipher
name, password, salt = sys.argv[1:]
secrets = CryptSecrets.from_passwords(password, salt)
names = NameCipher(secrets, filename_encryption='standard', directory_name_encryption=True, filename_encoding='base32')
name = names.decrypt_path(name).encode()
content = CryptFile.open_read(io.BytesIO(sys.stdin.buffer.read()), secrets=secrets).read()
sys.stdout.buffer.write(b'%d\\n' % len(name) + name + content)
";
    let mut child = installed("python")
        .args(["-c", PROGRAM, name, password, salt])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("python runs");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    let output = std::thread::scope(|scope| {
        // It may end without having read everything.
        scope.spawn(move || drop(stdin.write_all(bytes)));
        child.wait_with_output().expect("python is our child")
    });
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let split = output.stdout.iter().position(|b| *b == b'\n').expect("a length, then the name");
    let (length, rest) = output.stdout.split_at(split);
    let length = String::from_utf8_lossy(length).parse().expect("a number");
    let (name, content) = rest[1..].split_at(length);
    Ok((String::from_utf8_lossy(name).into_owned(), content.to_vec()))
}

/// The other way round: an object as that program writes it, its name below the crypt root and its bytes.
pub fn written_by_rclone_crypt_python(
    name: &str,
    content: &str,
    password: &str,
    salt: &str,
) -> (String, Vec<u8>) {
    const PROGRAM: &str = "
import io, sys
from rclone_crypt import CryptFile, CryptSecrets, NameCipher
class Kept(io.BytesIO):
    def close(self): pass
name, content, password, salt = sys.argv[1:]
secrets = CryptSecrets.from_passwords(password, salt)
names = NameCipher(secrets, filename_encryption='standard', directory_name_encryption=True, filename_encoding='base32')
kept = Kept()
with CryptFile.open_write(kept, secrets=secrets) as writer:
    writer.write(content.encode())
print(names.encrypt_path(name), kept.getvalue().hex())
";
    let said = python(PROGRAM, &[name, content, password, salt]);
    let (name, hex) = said.split_once(' ').expect("a name and bytes");
    let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
    (name.to_owned(), (0..hex.len()).step_by(2).map(byte).collect())
}
