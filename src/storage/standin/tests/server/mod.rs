//! A FUSE server of a few files. It mounts itself and takes orders on standard input.

use nix::mount::{MsFlags, mount};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, IoSlice, Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

const YEAR: u64 = 365 * 24 * 3600;
const O_PATH: i32 = 0o1000_0000;

/// Everything there is. What ends with a slash is a directory.
fn tree() -> Vec<String> {
    let mut paths =
        vec!["/".to_owned(), "/deep/".to_owned(), "/deep/er/".to_owned(), "/deep/er/z".to_owned()];
    for round in ["round1", "round2", "round3", "used"] {
        for name in ["", "a", "b", "c", "sub/", "sub/x"] {
            paths.push(format!("/{round}/{name}"));
        }
    }
    paths
}

struct Server {
    device: File,
    paths: Vec<String>,
    /// By node number, from 2 on: like rclone's, a node forgotten comes back by another number.
    nodes: Vec<Option<usize>>,
}

static MUTE: AtomicBool = AtomicBool::new(false);
static UNANSWERED: AtomicU32 = AtomicU32::new(0);

pub(crate) fn work(place: &Path) {
    let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").unwrap();
    let orders = {
        let (device, place) = (device.try_clone().unwrap(), place.to_owned());
        move || take_orders(&device, &place)
    };
    std::thread::spawn(orders);
    let mut server = Server { device, paths: tree(), nodes: vec![None, Some(0)] };
    let mut buffer = vec![0; 1 << 20];
    loop {
        match server.device.read(&mut buffer) {
            Ok(length) => server.answer(&buffer[..length]),
            // Not mounted yet.
            Err(e) if e.raw_os_error() == Some(1) => std::thread::sleep(Duration::from_millis(5)),
            Err(e) if e.raw_os_error() == Some(2) => {}
            Err(_) => return,
        }
    }
}

fn take_orders(device: &File, place: &Path) {
    let mut standin = UnixStream::connect(place.join("socket")).unwrap();
    for line in std::io::stdin().lock().lines() {
        let reply = match line.unwrap().as_str() {
            "mount" => {
                let options = format!(
                    "fd={},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions",
                    device.as_raw_fd()
                );
                let flags = MsFlags::MS_RDONLY;
                mount(Some("test"), &place.join("lower"), Some("fuse.test"), flags, Some(options.as_str()))
                    .unwrap();
                "mounted".to_owned()
            }
            "F1" => pass(&mut standin, &[device.as_raw_fd()]),
            "F3" => {
                let open = |name: &str| {
                    OpenOptions::new().read(true).custom_flags(O_PATH).open(place.join(name)).unwrap()
                };
                let (lower, upper) = (open("lower"), open("disk/upper"));
                pass(&mut standin, &[device.as_raw_fd(), lower.as_raw_fd(), upper.as_raw_fd()])
            }
            "F-garbage" => pass(&mut standin, &[0, 1]),
            "H" => {
                standin.write_all(b"H").unwrap();
                heard(&mut standin)
            }
            "mute" => {
                MUTE.store(true, Ordering::Relaxed);
                "mute".to_owned()
            }
            "ask itself" => {
                let own = place.join("lower/own");
                std::thread::spawn(move || drop(std::fs::metadata(own)));
                "asking".to_owned()
            }
            "muted" => {
                while UNANSWERED.load(Ordering::Relaxed) == 0 {
                    std::thread::sleep(Duration::from_millis(5));
                }
                "has read one".to_owned()
            }
            other => panic!("{other}?"),
        };
        println!("\nreply {reply}");
    }
    std::process::abort();
}

fn pass(standin: &mut UnixStream, numbers: &[RawFd]) -> String {
    let parts = [ControlMessage::ScmRights(numbers)];
    sendmsg::<()>(standin.as_raw_fd(), &[IoSlice::new(b"F")], &parts, MsgFlags::empty(), None).unwrap();
    heard(standin)
}

fn heard(standin: &mut UnixStream) -> String {
    let mut reply = [0];
    standin.read_exact(&mut reply).unwrap();
    char::from(reply[0]).to_string()
}

impl Server {
    fn answer(&mut self, request: &[u8]) {
        let number = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_ne_bytes(request[at..at + 8].try_into().unwrap());
        let (opcode, unique, node) = (number(4), long(8), long(16));
        if matches!(opcode, 2 | 36 | 42) {
            if opcode == 2 && node != 1 {
                self.nodes[usize::try_from(node).unwrap()] = None;
            }
            return;
        }
        if MUTE.load(Ordering::Relaxed) {
            UNANSWERED.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let path = self.nodes[usize::try_from(node).unwrap().min(self.nodes.len() - 1)].unwrap_or(0);
        let body = &request[40..];
        let outcome = match opcode {
            26 => Ok(words(&[
                7,
                31,
                number(48),
                1 << 0 | 1 << 12 | 1 << 18,
                0,
                1 << 17,
                1,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ])),
            1 => Ok(self.look_up(path, std::str::from_utf8(&body[..body.len() - 1]).unwrap())),
            3 => Ok([longs(&[YEAR, 0]), self.attributes(path)].concat()),
            14 | 27 => Ok(words(&[0; 4])),
            15 => Ok(content(&self.paths[path]).split_off(usize::try_from(long(48)).unwrap().min(9))),
            28 => Ok(self.list(path, long(48))),
            17 => Ok(words(&[0; 20])),
            18 | 29 => Ok(Vec::new()),
            22 => Err(61),
            _ => Err(38),
        };
        let (error, content) = outcome.map_or_else(|e: i32| (-e, Vec::new()), |content| (0, content));
        let length = u32::try_from(16 + content.len()).unwrap();
        let answer = [words(&[length, error.cast_unsigned()]), longs(&[unique]), content].concat();
        let _ = self.device.write(&answer);
    }

    fn look_up(&mut self, parent: usize, name: &str) -> Vec<u8> {
        let path = format!("{}{name}", self.paths[parent]);
        let Some(found) = self.paths.iter().position(|p| p.trim_end_matches('/') == path) else {
            return [longs(&[0, 0, YEAR, YEAR, 0]), vec![0; 88]].concat();
        };
        let node = self.nodes.iter().position(|n| *n == Some(found)).unwrap_or(self.nodes.len());
        if node == self.nodes.len() {
            self.nodes.push(Some(found));
        }
        [longs(&[node as u64, 7, YEAR, YEAR, 0]), self.attributes(found)].concat()
    }

    fn attributes(&self, path: usize) -> Vec<u8> {
        let (mode, size) = if self.paths[path].ends_with('/') { (0o40755, 0) } else { (0o100_644, 9) };
        let numbers = longs(&[1000 + path as u64, size, 1, 1_700_000_000, 1_700_000_000, 1_700_000_000]);
        [numbers, words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0])].concat()
    }

    fn list(&self, path: usize, offset: u64) -> Vec<u8> {
        let directory = &self.paths[path];
        let below = self.paths.iter().enumerate().filter_map(|(index, p)| {
            let name = p.strip_prefix(directory.as_str())?.trim_end_matches('/');
            (!name.is_empty() && !name.contains('/')).then_some((index, name))
        });
        let mut out = Vec::new();
        for (at, (index, name)) in (1..).zip(below).skip(usize::try_from(offset).unwrap()) {
            out.extend(longs(&[1000 + index as u64, at]));
            let kind = if self.paths[index].ends_with('/') { 4 } else { 8 };
            out.extend(words(&[u32::try_from(name.len()).unwrap(), kind]));
            out.extend(name.as_bytes());
            out.resize(out.len().next_multiple_of(8), 0);
        }
        out
    }
}

fn content(path: &str) -> Vec<u8> {
    format!("content {}", &path[path.len() - 1..]).into_bytes()
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn longs(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}
