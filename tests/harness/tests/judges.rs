//! Programs that know nothing of the product agree with each other.

use super::fixtures::{PASSWORD, SALT, proxied};
use crate::tools::{Rclone, rclone_crypt_python};
use crate::{Fault, Rule};
use std::fs;

#[test]
fn what_stock_rclone_encrypts_an_independent_reader_decrypts() {
    let (garage, proxy, through) = proxied();
    let rclone = Rclone::new(&through, "openclaw-data", PASSWORD, SALT);
    let dir = tempfile::tempdir().expect("a temporary directory");
    fs::create_dir_all(dir.path().join("deep/er")).expect("a directory");
    let big: Vec<u8> = (0..6_000_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let files = [("deep/er/näme", &b"the plaintext"[..]), ("empty", b""), ("big", &big)];
    for (name, content) in files {
        fs::write(dir.path().join(name), content).expect("a file");
    }
    rclone.ok(&["copy", &dir.path().display().to_string(), "crypt:"]);
    // Connections are kept, and a body that waits for 100 gets through.
    assert!(
        proxy.connections() < proxy.log().len(),
        "{} connections: {:#?}",
        proxy.connections(),
        proxy.log()
    );
    let stored: Vec<_> = garage.all_bytes().collect();
    assert_eq!(stored.len(), 3);
    for (key, bytes) in &stored {
        let name = key.strip_prefix("openclaw-data/").expect("everything lies below the prefix");
        let (clear, content) = rclone_crypt_python(name, bytes, PASSWORD, SALT).expect("it can be read");
        let wanted = files.iter().find(|(name, _)| *name == clear);
        assert_eq!(wanted.map(|(_, content)| content.len()), Some(content.len()), "{clear}");
        assert!(wanted.is_some_and(|(_, wanted)| *wanted == content), "{clear}");
        assert!(!bytes.windows(13).any(|w| w == b"the plaintext"));
        assert!(rclone_crypt_python(name, bytes, PASSWORD, "another").is_err());
        if !content.is_empty() {
            let mut changed = bytes.clone();
            *changed.last_mut().expect("it is not empty") ^= 1;
            assert!(rclone_crypt_python(name, &changed, PASSWORD, SALT).is_err());
        }
    }
    assert_eq!(rclone.ok(&["cat", "crypt:deep/er/näme"]), b"the plaintext");
}

#[test]
fn stock_rclone_survives_a_provider_that_sometimes_says_no() {
    let (garage, proxy, through) = proxied();
    let rclone = Rclone::new(&through, "p", PASSWORD, SALT);
    let dir = tempfile::tempdir().expect("a temporary directory");
    for n in 0..30 {
        fs::write(dir.path().join(format!("file {n}")), format!("{n}")).expect("a file");
    }
    proxy.add(Rule::new(Fault::Status(503)).every(5));
    proxy.add(Rule::new(Fault::NoResponse).every(7));
    // More retries than one file can need while the other requests take their share of the faults.
    rclone.ok(&["--low-level-retries", "60", "copy", &dir.path().display().to_string(), "crypt:"]);
    assert_eq!(garage.objects("p/").len(), 30);
    assert!(proxy.log().iter().any(|e| e.status == Some(503)));
}
