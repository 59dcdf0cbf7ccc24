//! The files that a new instance begins with: a gateway configuration and workspace files.
//!
//! No message shows a content, no path can lead out of the workspace, and decoding has a limit. Contents are wiped
//! when they are dropped, except in the JSON reader's own buffer, which it frees before this module returns.

use std::collections::btree_map::{BTreeMap, Entry};
use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_PAD_INDIFFERENT;
use serde::Deserialize as _;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, Visitor};

use super::values::Fault;
use cvm_protocol::text::shown;
use cvm_secrets::secret::Secret;

/// Large for a configuration that people write, and small for PID 1.
const CONFIG_BYTES_MAX: usize = 1024 * 1024;
/// Larger than any environment can be, but not larger than a `_FILE` can be.
const WORKSPACE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The longest name on Linux file systems.
const SEGMENT_BYTES_MAX: usize = 255;
/// Far below `PATH_MAX`, because the workspace's own path comes before it.
const PATH_BYTES_MAX: usize = 1024;
/// The most mistakes that are reported, because a generated list of files may repeat one mistake many times.
const FAULTS_MAX: usize = 20;

/// The text of an `openclaw.json`. Only the gateway can check more of it than that it is a JSON object.
pub struct InitialConfig(Secret);

impl InitialConfig {
    pub fn parse(base64: &[u8]) -> Result<Self, Fault> {
        let json = decode(base64, CONFIG_BYTES_MAX)?;
        let text = object_text(&json)?;
        let mut reader = serde_json::Deserializer::from_str(text);
        IgnoredAny::deserialize(&mut reader).and_then(|_| reader.end()).map_err(|cause| not_json(&cause))?;
        Ok(Self(json))
    }

    /// The bytes for the file, as the user wrote them.
    pub fn expose(&self) -> &[u8] {
        self.0.expose()
    }
}

/// Files for the workspace: their texts, by relative paths that stay inside of it.
pub struct WorkspaceFiles(BTreeMap<String, Secret>);

impl WorkspaceFiles {
    pub fn parse(base64: &[u8]) -> Result<Self, Vec<Fault>> {
        let read = || {
            let json = decode(base64, WORKSPACE_BYTES_MAX)?;
            let mut reader = serde_json::Deserializer::from_str(object_text(&json)?);
            let files = FilesReader.deserialize(&mut reader);
            files.and_then(|files| reader.end().map(|()| files)).map_err(|cause| not_files(&cause))
        };
        let files = read().map_err(|fault| vec![fault])?;
        let mut faults: Vec<Fault> = files.0.keys().filter_map(|path| path_fault(path, &files.0)).collect();
        faults.extend(files.1.iter().map(|path| of_path("is given twice", path)));
        if faults.is_empty() {
            return Ok(Self(files.0));
        }
        if faults.len() > FAULTS_MAX {
            let more = faults.len() - FAULTS_MAX;
            faults.truncate(FAULTS_MAX);
            faults.push(Fault::new(
                format!("has {more} more paths with mistakes"),
                "correct those above first",
            ));
        }
        Err(faults)
    }

    /// Paths and contents, sorted by path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Secret)> {
        self.0.iter().map(|(path, content)| (path.as_str(), content))
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Decodes standard base64, with or without padding, and with line breaks such as `base64` makes.
fn decode(base64: &[u8], bytes_max: usize) -> Result<Secret, Fault> {
    let kept = || base64.iter().copied().filter(|byte| !byte.is_ascii_whitespace());
    let compact_len = kept().count();
    let compact = Secret::filled(compact_len, |room| {
        for (place, byte) in room.iter_mut().zip(kept()) {
            *place = byte;
        }
    });
    if compact_len / 4 * 3 > bytes_max + 3 {
        return Err(too_long(bytes_max));
    }
    let mut written = Ok(0);
    let room = Secret::filled(compact_len.div_ceil(4) * 3, |room| {
        written = STANDARD_PAD_INDIFFERENT.decode_slice(compact.expose(), room);
    });
    // The decoder's own message would show a byte of the value.
    let written = written.map_err(|_| {
        Fault::new("is not standard base64", "encode it with: base64 -w0 FILE (not base64url)")
    })?;
    if written > bytes_max {
        return Err(too_long(bytes_max));
    }
    Ok(Secret::copy_of(&room.expose()[..written]))
}

fn too_long(bytes_max: usize) -> Fault {
    let rule = format!("must hold at most {} KiB after decoding", bytes_max / 1024);
    Fault::new(rule, "put large files onto the instance over SSH")
}

fn object_text(json: &Secret) -> Result<&str, Fault> {
    let text =
        json.expose_str().ok_or_else(|| Fault::new("must be UTF-8 text after decoding", "check the file"))?;
    if text.trim_start().starts_with('{') {
        return Ok(text);
    }
    Err(Fault::new("must be the base64 of a JSON object", "the decoded text begins with { and ends with }"))
}

/// Tells the position of the mistake, but not the text there.
fn not_json(cause: &serde_json::Error) -> Fault {
    let rule = format!("is not JSON after decoding: line {}, column {}", cause.line(), cause.column());
    Fault::new(rule, "comments and trailing commas are not JSON; check it with: jq . FILE")
}

fn not_files(cause: &serde_json::Error) -> Fault {
    if !cause.is_data() {
        return not_json(cause);
    }
    let place = format!("line {}, column {}", cause.line(), cause.column());
    Fault::new(format!("must map paths to texts: {place}"), "every value is a string")
}

fn path_fault(path: &str, all: &BTreeMap<String, Secret>) -> Option<Fault> {
    let broken = |rule: &str| Some(of_path(rule, path));
    if path.starts_with('/') {
        return broken("must be relative");
    }
    if path.chars().any(|c| c.is_control() || c == '\\') {
        return broken("must not contain control characters or backslashes");
    }
    if path.split('/').any(|segment| matches!(segment, "" | "." | "..")) {
        return broken("must not contain empty, \".\" or \"..\" segments");
    }
    if path.len() > PATH_BYTES_MAX || path.split('/').any(|segment| segment.len() > SEGMENT_BYTES_MAX) {
        return broken("must have names of at most 255 bytes and 1024 bytes in all");
    }
    let is_also_a_file = |(at, _): (usize, _)| all.contains_key(&path[..at]);
    if path.match_indices('/').any(is_also_a_file) {
        return broken("lies below another path that is a file");
    }
    None
}

fn of_path(rule: &str, path: &str) -> Fault {
    Fault::new(
        format!("path \"{}\" {rule}", shown(path)),
        "paths are relative to the workspace, such as notes/TODO.md",
    )
}

/// Reads a map from paths to texts, without an intermediate tree whose texts would not be wiped. The second list
/// holds paths that occur more than once.
struct FilesReader;

type Files = (BTreeMap<String, Secret>, Vec<String>);

impl<'de> DeserializeSeed<'de> for FilesReader {
    type Value = Files;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Files, D::Error> {
        reader.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for FilesReader {
    type Value = Files;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Files, A::Error> {
        let mut files = BTreeMap::new();
        let mut twice = Vec::new();
        while let Some(path) = map.next_key::<String>()? {
            let content = map.next_value_seed(TextReader)?;
            match files.entry(path) {
                Entry::Vacant(entry) => {
                    entry.insert(content);
                }
                Entry::Occupied(entry) => twice.push(entry.key().clone()),
            }
        }
        Ok((files, twice))
    }
}

/// Copies a text straight from the reader's buffer into a secret.
struct TextReader;

impl<'de> DeserializeSeed<'de> for TextReader {
    type Value = Secret;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Secret, D::Error> {
        reader.deserialize_str(self)
    }
}

impl Visitor<'_> for TextReader {
    type Value = Secret;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a text")
    }

    fn visit_str<E>(self, text: &str) -> Result<Secret, E> {
        Ok(Secret::copy_of(text.as_bytes()))
    }
}
