//! What stands in the way of an entry: rows that no tree can have beside it.
//!
//! ```text
//! a file or a link          where the bucket has a directory: all that it has below
//! a directory or a link     where it has a file: that, whose object goes with its removal
//! anything                  below something that is no directory: that
//! ```
//!
//! Refuses to know whether it may go: that is `push`. May import: `entry`, `fault`, `index`.

use crate::entry::{Kind, Path};
use crate::fault::Fault;
use crate::index::{Index, Row};
use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

pub(crate) struct Way<'a> {
    index: &'a Index,
    /// Links that become directories first.
    opened: HashSet<Path>,
    /// Of a directory: what is none, of it and of those above.
    above: RefCell<HashMap<Path, Vec<Path>>>,
}

impl<'a> Way<'a> {
    pub(crate) fn new(index: &'a Index) -> Self {
        Self { index, opened: HashSet::new(), above: RefCell::default() }
    }

    pub(crate) fn open(&mut self, link: Path) {
        self.opened.insert(link);
        self.above.borrow_mut().clear();
    }

    /// `row` is what the bucket has there.
    pub(crate) fn of_file(&self, path: &Path, row: Option<&Row>) -> Result<Vec<Path>, Fault> {
        let mut rows = self.above(path.parent().as_ref())?;
        rows.extend(self.below(path, row)?);
        Ok(rows)
    }

    pub(crate) fn of(&self, path: &Path, row: Option<&Row>, kind: &Kind) -> Result<Vec<Path>, Fault> {
        let mut rows = self.above(path.parent().as_ref())?;
        let is_file = matches!(kind, Kind::File { .. });
        if !is_file && row.is_some_and(|row| row.entry.is_file()) {
            rows.push(path.clone());
        }
        if *kind != Kind::Directory {
            rows.extend(self.below(path, row)?);
        }
        Ok(rows)
    }

    fn below(&self, path: &Path, row: Option<&Row>) -> Result<Vec<Path>, Fault> {
        let may_have = row.is_none_or(|row| row.entry.kind == Kind::Directory);
        if !may_have || !self.index.has_below(path)? {
            return Ok(Vec::new());
        }
        Ok(self.index.below(path)?.into_iter().map(|(path, _)| path).collect())
    }

    fn above(&self, dir: Option<&Path>) -> Result<Vec<Path>, Fault> {
        let Some(dir) = dir else { return Ok(Vec::new()) };
        if let Some(known) = self.above.borrow().get(dir) {
            return Ok(known.clone());
        }
        let mut rows = self.above(dir.parent().as_ref())?;
        let row = self.index.get(dir)?.filter(|row| row.entry.kind != Kind::Directory);
        rows.extend(row.filter(|_| !self.opened.contains(dir)).map(|_| dir.clone()));
        self.above.borrow_mut().insert(dir.clone(), rows.clone());
        Ok(rows)
    }
}
