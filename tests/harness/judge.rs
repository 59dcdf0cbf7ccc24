//! The bucket as stock rclone sees it with the keys of [`MASTER_KEY`](crate::machine::MASTER_KEY):
//! objects by their names in clear, to be read, changed and taken away behind everybody's back.

use crate::machine::{CRYPT_PASSWORD, CRYPT_SALT};
use crate::tools::Rclone;
use crate::wait::lock;
use crate::{Cloud, Garage};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

/// Where the machines of the tests keep their objects in the bucket.
pub const PREFIX: &str = "openclaw-data";

/// A bucket, and the keys to it.
pub struct Judge<'a> {
    garage: &'a Garage,
    rclone: Rclone,
}

impl Cloud {
    /// Who looks past the product, and past the network.
    #[track_caller]
    pub fn judge(&self) -> Judge<'_> {
        let rclone = Rclone::new(&self.garage, PREFIX, CRYPT_PASSWORD, CRYPT_SALT);
        Judge { garage: &self.garage, rclone }
    }
}

/// Its remotes are `s3:` and `crypt:`.
impl std::ops::Deref for Judge<'_> {
    type Target = Rclone;

    fn deref(&self) -> &Rclone {
        &self.rclone
    }
}

impl Judge<'_> {
    /// The keys of these objects in the bucket. Each name is asked for once: all judges have the same password, and a
    /// start of rclone takes a tenth of a second of a processor.
    #[track_caller]
    pub fn keys<const N: usize>(&self, names: [&str; N]) -> [String; N] {
        static KNOWN: Mutex<BTreeMap<String, String>> = Mutex::new(BTreeMap::new());
        let mut known = lock(&KNOWN);
        let unknown: Vec<&str> = names.into_iter().filter(|name| !known.contains_key(*name)).collect();
        if !unknown.is_empty() {
            let said = self.ok(&[&["cryptdecode", "--reverse", "crypt:"], &unknown[..]].concat());
            let said = String::from_utf8_lossy(&said).into_owned();
            assert_eq!(said.lines().count(), unknown.len(), "{said}");
            for (name, line) in unknown.into_iter().zip(said.lines()) {
                let encrypted = line.rsplit('\t').next().expect("a name and what it becomes").trim();
                known.insert(name.to_owned(), format!("{PREFIX}/{encrypted}"));
            }
        }
        names.map(|name| known[name].clone())
    }

    /// The key of one object.
    #[track_caller]
    pub fn key(&self, name: &str) -> String {
        let [key] = self.keys([name]);
        key
    }

    /// An object as it is stored.
    #[track_caller]
    pub fn get(&self, name: &str) -> Vec<u8> {
        self.garage.get_raw(&self.key(name)).unwrap_or_else(|| panic!("{name} is not in the bucket"))
    }

    pub fn put(&self, name: &str, bytes: &[u8]) {
        self.garage.put_raw(&self.key(name), bytes);
    }

    pub fn delete(&self, name: &str) {
        self.garage.delete_raw(&self.key(name));
    }

    /// The content of an object in clear. rclone tells no empty file from none.
    #[track_caller]
    pub fn text(&self, name: &str) -> Option<String> {
        let text = self.ok(&["cat", &format!("crypt:{name}")]);
        (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
    }

    /// The names of all objects below a directory; of all there are below `""`.
    #[track_caller]
    pub fn names(&self, directory: &str) -> BTreeSet<String> {
        let said = self.ok(&["lsf", "-R", "--files-only", &format!("crypt:{directory}")]);
        String::from_utf8_lossy(&said).lines().map(str::to_owned).collect()
    }

    /// The segments of the manifest, in order.
    #[track_caller]
    pub fn segments(&self) -> Vec<String> {
        self.names(".cvm/manifest").into_iter().map(|name| format!(".cvm/manifest/{name}")).collect()
    }
}
