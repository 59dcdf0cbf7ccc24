//! Where the root directory is: `/`, or a directory of a test's own.
//!
//! Every path of every task goes through here, so that a test runs against a tree of its own and
//! cannot touch the machine.

use std::path::{Path, PathBuf};

pub(crate) struct RootDir {
    root: PathBuf,
}

impl Default for RootDir {
    fn default() -> Self {
        Self { root: PathBuf::from("/") }
    }
}

impl RootDir {
    #[cfg(test)]
    pub(crate) fn below(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The absolute path `path`, below the root.
    pub(crate) fn at<P: AsRef<Path> + ?Sized>(&self, path: &P) -> PathBuf {
        let path = path.as_ref();
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }
}
