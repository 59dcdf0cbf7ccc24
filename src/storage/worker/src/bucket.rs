//! The bucket: one crypt root, seen through two doors. The user's files go through rclone, our own
//! objects below `.cvm/` through a small client in the same format.
//!
//! Refuses to write anything unencrypted, and to call a prefix empty that is not.
//! May import: `crypt`, `fault`, `manifest`, `rclone`, `s3`.

use crate::crypt::Crypt;
use crate::fault::Fault;
use crate::manifest::ManifestKey;
use crate::rclone::{Passwords, Rclone};
use crate::s3::{S3, When};
use cvm_protocol::storage::StorageSpec;

const CONTROL: &str = ".cvm";
/// Below it, where the manifest's segments are.
pub(crate) const MANIFEST: &str = "manifest";
/// Enough names to know whose they are.
const SURVEY: usize = 100;

pub(crate) struct Bucket {
    pub(crate) rclone: Rclone,
    pub(crate) s3: S3,
    pub(crate) key: ManifestKey,
    pub(crate) prefix: String,
    crypt: Crypt,
}

/// The bytes of a control object, and by what a later write knows it again.
pub(crate) type Found = (Vec<u8>, Option<String>);

/// What lies at the crypt root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Survey {
    /// No manifest and no objects; perhaps the record of an owner that has not written yet.
    Empty,
    /// Objects of this key's, without a manifest: written by something older, or by stock rclone.
    Unmanaged,
    /// The same, and yet it has had an owner: an adoption that was cut short, or a manifest that
    /// somebody has deleted.
    Bereft,
    Managed,
}

impl Bucket {
    pub(crate) fn new(spec: &StorageSpec) -> Result<Self, Fault> {
        let passwords = Passwords::of(&spec.crypt)?;
        let key =
            spec.manifest_key.unpack().ok_or_else(|| Fault::config("the manifest key did not arrive"))?;
        // First: it derives its keys while we derive the same.
        let rclone = Rclone::new(spec, &passwords)?;
        Ok(Self {
            crypt: Crypt::new(&passwords.password, &passwords.salt),
            s3: S3::new(spec)?,
            rclone,
            key: ManifestKey::new(key),
            prefix: spec.prefix.trim_matches('/').to_owned(),
        })
    }

    /// Whose bucket this is, by one page of names.
    pub(crate) fn survey(&self) -> Result<Survey, Fault> {
        let root = format!("{}/", self.prefix);
        let page = self.s3.list(&root, true, SURVEY, None)?;
        let names = page.keys.iter().map(|(key, _)| key).chain(&page.folders);
        let names: Vec<&str> = names
            .filter_map(|n| n.strip_prefix(&root))
            .map(|n| n.trim_end_matches('/'))
            .filter(|n| !n.is_empty())
            .collect();
        let control = self.crypt.encrypt_path(CONTROL).unwrap_or_default();
        if names.is_empty() {
            return Ok(Survey::Empty);
        }
        let any_below = |directory: &str| self.s3.list(directory, true, 1, None).map(|page| !page.is_empty());
        if any_below(&format!("{}/", self.key_of(MANIFEST)?))? {
            return Ok(Survey::Managed);
        }
        // It need not be on this page of a root with very many names.
        let owned = names.contains(&control.as_str()) || any_below(&format!("{root}{control}/"))?;
        let names: Vec<&str> = names.into_iter().filter(|n| *n != control).collect();
        if names.is_empty() {
            return Ok(Survey::Empty);
        }
        let ours = names.iter().filter(|n| self.crypt.decrypt_segment(n).is_some()).count();
        if ours == 0 {
            return Err(Fault::WrongKey(format!(
                "the prefix {} holds objects, and none of their names decrypts: another key wrote them, or they are not ours",
                self.prefix
            )));
        }
        Ok(if owned { Survey::Bereft } else { Survey::Unmanaged })
    }

    fn key_of(&self, name: &str) -> Result<String, Fault> {
        let path = self.crypt.encrypt_path(&format!("{CONTROL}/{name}"));
        Ok(format!(
            "{}/{}",
            self.prefix,
            path.ok_or_else(|| Fault::other("a control object's name is too long"))?
        ))
    }

    /// One of our own objects, with its `ETag`.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Found>, Fault> {
        let Some(object) = self.s3.get(&self.key_of(name)?)? else { return Ok(None) };
        let plain = self.crypt.open(&object.bytes).map_err(|_| {
            Fault::Suspicious(format!(
                "the object .cvm/{name} does not decrypt: it was damaged or replaced in the bucket"
            ))
        })?;
        Ok(Some((plain, object.etag)))
    }

    pub(crate) fn write(&self, name: &str, bytes: &[u8], when: &When) -> Result<Option<String>, Fault> {
        let sealed =
            self.crypt.seal(bytes).map_err(|_| Fault::other("the kernel gives no random numbers"))?;
        self.s3.put(&self.key_of(name)?, &sealed, when)
    }

    pub(crate) fn delete(&self, name: &str) -> Result<(), Fault> {
        self.s3.delete(&self.key_of(name)?)
    }

    /// Names and sizes of our own objects directly below a directory.
    pub(crate) fn list(&self, directory: &str) -> Result<Vec<(String, u64)>, Fault> {
        let root = format!("{}/", self.key_of(directory)?);
        let mut names = Vec::new();
        let mut after = None;
        loop {
            let page = self.s3.list(&root, false, 1000, after.as_deref())?;
            for (key, size) in page.keys {
                let path: Option<Vec<String>> = key
                    .strip_prefix(&root)
                    .map(|n| n.split('/').map(|s| self.crypt.decrypt_segment(s)).collect())
                    .unwrap_or_default();
                names.extend(path.map(|p| (p.join("/"), size)));
            }
            after = page.more;
            if after.is_none() {
                return Ok(names);
            }
        }
    }

    /// Requests, bytes up and bytes down, rclone's own calls counted as one each.
    pub(crate) fn requests(&self) -> u64 {
        let [requests, ..] = self.s3.counts();
        requests + self.rclone.calls()
    }
}
