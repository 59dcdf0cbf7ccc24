//! Checks lines of `authorized_keys`, the public keys that may log in.
//!
//! An error never shows the line (a private key may have been pasted by mistake). A key that sshd would
//! skip silently is an error, such as one that a terminal has cut off.
//!
//! Written by hand, because every fault has a remedy of its own, lines are kept as they were written, and PID 1
//! checks them. The crate `ssh-key` tells fewer faults apart, and fits our other crates as a release candidate only
//! (0.7).

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Why a line is refused: the rest of a sentence that begins with the line, and what to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadKey {
    pub rule: &'static str,
    pub hint: &'static str,
}

/// The key types that sshd accepts, and the number of fields of each.
const KEY_TYPES: &[(&str, usize)] = &[
    ("ssh-ed25519", 2),
    ("sk-ssh-ed25519@openssh.com", 3),
    ("ecdsa-sha2-nistp256", 3),
    ("ecdsa-sha2-nistp384", 3),
    ("ecdsa-sha2-nistp521", 3),
    ("sk-ecdsa-sha2-nistp256@openssh.com", 4),
    ("ssh-rsa", 3),
];

/// One checked line: optional options, the type, the key, and an optional comment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthorizedKey {
    line: String,
    /// Where the comment begins. Lines that are equal up to there are the same key with the same rights.
    identity_len: usize,
}

impl AuthorizedKey {
    /// Checks one line that is neither blank nor a comment.
    pub fn parse(line: &str) -> Result<Self, BadKey> {
        let line = line.trim();
        if line.contains("PRIVATE KEY") {
            return Err(bad("is a private key", "give the public key (.pub) and replace the pair"));
        }
        if line.chars().any(|c| c.is_control() && c != '\t') {
            return Err(bad("contains control characters", "copy the line again"));
        }
        let key_at = if starts_with_type(line) { 0 } else { options_len(line).unwrap_or(0) };
        let key = line[key_at..].trim_start();
        let (name, rest) = split_word(key);
        let (blob_text, comment) = split_word(rest);
        if name == "ssh-dss" {
            let rule = "is a DSA key, which no current sshd accepts";
            return Err(bad(rule, "make one with: ssh-keygen -t ed25519"));
        }
        let Some((_, fields)) = KEY_TYPES.iter().find(|(known, _)| *known == name) else {
            let hint = "a line looks like: ssh-ed25519 AAAA... comment";
            return Err(bad("is not of a known key type", hint));
        };
        let hint = "the line may have been cut; copy it again from the .pub file";
        let Ok(blob) = STANDARD.decode(blob_text) else {
            return Err(bad("holds no valid base64 after the key type", hint));
        };
        let Some(parts) = wire_strings(&blob).filter(|parts| !parts.is_empty()) else {
            return Err(bad("holds a damaged key", hint));
        };
        if parts.first() != Some(&name.as_bytes()) {
            return Err(bad("holds a key of another type than it says", hint));
        }
        if parts.len() != *fields || (name == "ssh-ed25519" && parts[1].len() != 32) {
            return Err(bad("holds a damaged key", hint));
        }
        Ok(Self { line: line.to_owned(), identity_len: line.len() - comment.len() })
    }

    /// The whole line, without a line break.
    pub fn line(&self) -> &str {
        &self.line
    }

    /// The line without its comment. Lines with the same identity are the same key with the same options. A key with
    /// other options is another identity, and sshd tries both.
    pub fn identity(&self) -> &str {
        &self.line[..self.identity_len]
    }
}

/// The lines of a text that are neither blank nor comments, with their numbers from 1.
pub fn key_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let numbered = text.lines().enumerate().map(|(index, line)| (index + 1, line.trim()));
    numbered.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'))
}

fn bad(rule: &'static str, hint: &'static str) -> BadKey {
    BadKey { rule, hint }
}

fn starts_with_type(line: &str) -> bool {
    let name = split_word(line).0;
    name == "ssh-dss" || KEY_TYPES.iter().any(|(known, _)| *known == name)
}

fn split_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    text.split_at(text.find([' ', '\t']).unwrap_or(text.len()))
}

/// Options end at the first blank outside of double quotes; `\"` does not end a quote.
fn options_len(line: &str) -> Option<usize> {
    let mut quoted = false;
    let mut escaped = false;
    for (at, character) in line.char_indices() {
        match character {
            '"' if !escaped => quoted = !quoted,
            ' ' | '\t' if !quoted => return Some(at),
            _ => {}
        }
        escaped = character == '\\' && !escaped;
    }
    None
}

/// Splits a key blob into its `string`s (RFC 4251), if they fill it exactly.
fn wire_strings(mut blob: &[u8]) -> Option<Vec<&[u8]>> {
    const FIELDS_MAX: usize = 4;
    let mut parts = Vec::new();
    while !blob.is_empty() && parts.len() < FIELDS_MAX {
        let (length, rest) = blob.split_first_chunk::<4>()?;
        let (part, rest) = rest.split_at_checked(usize::try_from(u32::from_be_bytes(*length)).ok()?)?;
        parts.push(part);
        blob = rest;
    }
    blob.is_empty().then_some(parts)
}
