use super::*;
use crate::manifest::Digest;
use crate::scan;
use std::collections::BTreeMap;
use std::fs;

struct Tree {
    dir: tempfile::TempDir,
    volume: Volume,
    index: Index,
}

fn path(text: &str) -> Path {
    Path::new(text.as_bytes()).unwrap()
}

impl Tree {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let volume = Volume::plain(dir.path()).unwrap();
        let index = Index::open(&volume.own.join("index")).unwrap();
        Self { dir, volume, index }
    }

    fn at(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// As if it had been pushed.
    fn has(&self, name: &str) {
        if !self.at(name).exists() {
            fs::create_dir_all(self.at(name).parent().unwrap()).unwrap();
            fs::write(self.at(name), name).unwrap();
        }
        let stat = volume::look(&self.at(name)).unwrap().unwrap();
        let kind = Kind::File { size: 1, sha: Some(Digest([0; 32])), database: false };
        let line = Line { path: path(name), word: Word::Is(scan::dressed(kind, &stat)) };
        self.index.apply(&[line], None).unwrap();
        self.index.set_known(&[(path(name), scan::known_by(&self.at(name), &stat, false))]).unwrap();
    }

    /// As if something that is no file had been pushed.
    fn is(&self, name: &str, kind: Kind) {
        let stat = volume::look(self.dir.path()).unwrap().unwrap();
        let line = Line { path: path(name), word: Word::Is(scan::dressed(kind, &stat)) };
        self.index.apply(&[line], None).unwrap();
    }

    fn work(&self) -> Work {
        self.work_but(&[])
    }

    /// As if the scan had not met these.
    fn work_but(&self, unmet: &[&str]) -> Work {
        let fetched = scan::Fetched::default();
        let found = scan::Scanner::new(&self.volume, &self.index, "p", &fetched).full().unwrap();
        let mut changes = found.changes;
        changes.retain(|change| !unmet.iter().any(|name| *change.path() == path(name)));
        Work::of(changes, &self.volume, &self.index, "p").unwrap()
    }

    fn moves(&self, from: &str, to: &str) {
        fs::rename(self.at(from), self.at(to)).unwrap();
    }

    /// What a round that found nothing but these removals would remove, and look at again.
    fn removes(&self, gone: &[&str]) -> (Vec<String>, Vec<String>) {
        let living = Living { volume: &self.volume, index: &self.index, prefix: "p" };
        let mut rest = Rest::default();
        let gone: Vec<Path> = gone.iter().map(|name| path(name)).collect();
        let goes = living.left_out(&gone, &BTreeMap::new(), &HashSet::new(), &mut rest).unwrap();
        let mut goes: Vec<String> = goes.keys().map(ToString::to_string).collect();
        goes.sort();
        (goes, rest.elsewhere.iter().map(ToString::to_string).collect())
    }
}

fn nothing() -> (Vec<String>, Vec<String>) {
    (Vec::new(), Vec::new())
}

fn these(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

#[test]
fn a_file_that_no_scan_has_met_on_its_way_keeps_its_old_name_until_it_is_settled() {
    let tree = Tree::new();
    tree.has("d/old");
    tree.moves("d/old", "new");
    assert_eq!(tree.removes(&["d", "d/old"]), (these(&[]), these(&["new", "d/old"])));
    tree.has("new");
    assert_eq!(tree.removes(&["d", "d/old"]), (these(&["d", "d/old"]), Vec::new()));
}

#[test]
fn logs_that_are_rotated_go_up_before_others_take_their_names() {
    let tree = Tree::new();
    tree.has("log");
    tree.has("log.1");
    tree.moves("log.1", "log.2");
    tree.moves("log", "log.1");
    fs::write(tree.at("log"), "").unwrap();
    let work = tree.work();
    let files: Vec<String> = work.files().map(ToString::to_string).collect();
    assert_eq!(files, ["log.2", "log.1", "log"]);
    assert!(work.passed.is_empty());
    // The scan has not met the oldest: what takes its name waits for it.
    let work = tree.work_but(&["log.2"]);
    let passed: Vec<_> = work.passed.iter().map(|p| (p.path.to_string(), p.now_at.to_string())).collect();
    assert_eq!(passed, [("log.1".to_owned(), "log.2".to_owned())]);
}

#[test]
fn what_cannot_be_sent_holds_up_what_comes_after_it_and_nothing_else() {
    let tree = Tree::new();
    for name in ["log", "log.1", "other", "other.1"] {
        tree.has(name);
    }
    for name in ["log", "other"] {
        tree.moves(&format!("{name}.1"), &format!("{name}.2"));
        tree.moves(name, &format!("{name}.1"));
        fs::write(tree.at(name), "").unwrap();
    }
    let work = tree.work();
    let so_far = SoFar { unsent: [path("log.2")].into(), ..SoFar::default() };
    let waits = work.reads.iter().filter(|read| so_far.lets_wait(read.rank, read.after.as_ref()));
    assert_eq!(waits.map(|read| read.path.to_string()).collect::<Vec<_>>(), ["log.1"]);
    // Of what comes after nobody knows what, and of what moves, it may be any.
    assert!(so_far.lets_wait(1, None) && !so_far.lets_wait(0, None));
    assert!(SoFar { moving: true, ..SoFar::default() }.lets_wait(1, Some(&path("other.2"))));
}

#[test]
fn what_fails_again_and_again_keeps_only_what_it_may_be() {
    let tree = Tree::new();
    tree.has("known");
    tree.has("stranger");
    let unknown = Known {
        handle: None,
        ..scan::known_by(&tree.at("stranger"), &volume::look(&tree.at("stranger")).unwrap().unwrap(), false)
    };
    tree.index.set_known(&[(path("stranger"), unknown)]).unwrap();
    tree.is("d", Kind::Directory);
    for name in ["known", "stranger"] {
        fs::remove_file(tree.at(name)).unwrap();
    }
    let gone = ["d", "known", "stranger"].map(path).to_vec();
    assert_eq!(not_strange(gone, &tree.volume, &tree.index).unwrap(), ["d", "known"].map(path));
}

#[test]
fn a_file_whose_name_cannot_be_there_keeps_its_old_one_and_nothing_waits_for_it() {
    let tree = Tree::new();
    tree.has("d/old");
    tree.has("e/old");
    tree.has("e/moved");
    let long = ["n".repeat(250), "n".repeat(250), "n".repeat(250)].join("/");
    fs::create_dir_all(tree.at(&long)).unwrap();
    tree.moves("d/old", &format!("{long}/d"));
    tree.moves("e/old", &format!("{long}/e"));
    tree.moves("e/moved", "elsewhere");
    let living = Living { volume: &tree.volume, index: &tree.index, prefix: "p" };
    let mut rest = Rest::default();
    let gone = ["d", "d/old", "e", "e/moved", "e/old"].map(path);
    let goes = living.left_out(&gone, &BTreeMap::new(), &HashSet::new(), &mut rest).unwrap();
    assert_eq!((goes.len(), rest.stays.len()), (0, 3), "d, and both of old; what moved is on its way");
    assert_eq!(rest.elsewhere, ["elsewhere", "e/moved"].map(path));
}

#[test]
fn what_was_removed_goes_and_what_was_written_over_goes_with_it() {
    let tree = Tree::new();
    tree.has("a");
    tree.has("b");
    fs::remove_file(tree.at("a")).unwrap();
    fs::write(tree.at("a.new"), "2").unwrap();
    tree.moves("a.new", "b");
    assert_eq!(tree.removes(&["a", "b"]), (these(&["a", "b"]), Vec::new()));
    assert_eq!(tree.removes(&[]), nothing());
}

#[test]
fn what_has_no_room_yet_is_set_apart() {
    let tree = Tree::new();
    tree.has("d/x");
    tree.is("d", Kind::Directory);
    tree.has("e/x");
    tree.is("e", Kind::Directory);
    tree.has("f");
    tree.is("l", Kind::Symlink { target: b"d".to_vec() });
    for name in ["d", "e"] {
        fs::remove_dir_all(tree.at(name)).unwrap();
    }
    fs::remove_file(tree.at("f")).unwrap();
    fs::write(tree.at("d"), "a file now").unwrap();
    std::os::unix::fs::symlink("d", tree.at("e")).unwrap();
    for name in ["f", "l"] {
        fs::create_dir(tree.at(name)).unwrap();
        fs::write(tree.at(name).join("in"), "1").unwrap();
    }
    let work = tree.work();
    let reads = |late: bool| -> Vec<String> {
        let reads = work.reads.iter().filter(|read| read.late == late);
        let mut names: Vec<_> = reads.map(|read| read.path.to_string()).collect();
        names.sort();
        names
    };
    let names = |lines: &[Line]| lines.iter().map(|line| line.path.to_string()).collect::<Vec<_>>();
    assert_eq!((reads(true), reads(false)), (these(&["d", "f/in"]), these(&["l/in"])));
    assert_eq!((names(&work.instead), names(&work.opening)), (these(&["e", "f"]), these(&["l"])));
    assert_eq!(work.gone, [path("d/x"), path("e/x"), path("f")]);
    let mut work = work;
    let urgent = work.urgent(|_| true);
    assert_eq!(urgent.files().collect::<Vec<_>>(), [&path("l/in")]);
}

#[test]
fn a_file_that_takes_the_place_of_its_own_directory_goes_up_with_its_removal() {
    let tree = Tree::new();
    tree.has("d/x");
    tree.is("d", Kind::Directory);
    tree.moves("d/x", "t");
    fs::remove_dir(tree.at("d")).unwrap();
    tree.moves("t", "d");
    let work = tree.work();
    let late: HashSet<Path> = [path("d")].into();
    let living = Living { volume: &tree.volume, index: &tree.index, prefix: "p" };
    let mut rest = Rest::default();
    let going = living.left_out(&work.gone, &BTreeMap::new(), &late, &mut rest).unwrap();
    assert_eq!(going, [(path("d/x"), Some(path("d")))].into());
    let mut exchange = Exchange { going, ..Exchange::default() };
    let allowed = exchange.allowed(work.reads, &tree.index, &mut rest).unwrap();
    assert_eq!((allowed.len(), rest.blocked.len()), (1, 0));
    // One that has not arrived takes nothing with it.
    let (mut lines, mut known) = (Vec::new(), Vec::new());
    assert_eq!(exchange.with_what_goes(&mut lines, &mut known, &tree.index, &mut rest).unwrap(), 0);
    let stat = volume::look(&tree.at("d")).unwrap().unwrap();
    known.push((path("d"), scan::known_by(&tree.at("d"), &stat, false)));
    assert_eq!(exchange.with_what_goes(&mut lines, &mut known, &tree.index, &mut rest).unwrap(), 1);
    assert_eq!(lines, [Line { path: path("d/x"), word: Word::Gone }]);
}

#[test]
fn a_link_in_place_of_a_file_waits_while_the_file_lives_on_unseen() {
    let tree = Tree::new();
    tree.has("a");
    tree.moves("a", "b");
    std::os::unix::fs::symlink("b", tree.at("a")).unwrap();
    let entry = scan::dressed(
        Kind::Symlink { target: b"b".to_vec() },
        &volume::look(&tree.at("a")).unwrap().unwrap(),
    );
    let instead: BTreeMap<Path, Line> = [(path("a"), Line { path: path("a"), word: Word::Is(entry) })].into();
    let living = Living { volume: &tree.volume, index: &tree.index, prefix: "p" };
    let goes = || {
        let mut rest = Rest::default();
        living.left_out(&[path("a")], &instead, &HashSet::new(), &mut rest).unwrap().len()
    };
    assert_eq!(goes(), 0);
    tree.has("b");
    assert_eq!(goes(), 1);
}

#[test]
fn one_of_several_names_may_go() {
    let tree = Tree::new();
    tree.has("a");
    fs::hard_link(tree.at("a"), tree.at("b")).unwrap();
    tree.has("b");
    fs::remove_file(tree.at("a")).unwrap();
    assert_eq!(tree.removes(&["a"]).0, ["a"]);
    tree.moves("b", "c");
    assert_eq!(tree.removes(&["a", "b"]).0, these(&[]), "all that the bucket has of it is these two");
}

#[test]
fn what_moves_to_where_nothing_is_kept_is_given_up() {
    let tree = Tree::new();
    tree.has("openclaw/a");
    tree.has("openclaw/b");
    fs::create_dir_all(tree.at("openclaw/cache")).unwrap();
    tree.moves("openclaw/a", "openclaw/cache/a");
    tree.moves("openclaw/b", "openclaw/b-wal");
    assert_eq!(tree.removes(&["openclaw/a", "openclaw/b"]).0.len(), 2);
}
