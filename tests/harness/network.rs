//! Addresses that no other test has: on this machine's loopback, and in a network apart.

use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// A network with nothing but a loopback. It outlives the machines in it: a server at
/// 127.0.0.1 is there before the first one starts, and for the next ones.
#[derive(Debug, Clone)]
pub struct Network(Arc<File>);

impl Default for Network {
    fn default() -> Self {
        Self::new()
    }
}

impl Network {
    pub fn new() -> Self {
        let make = || -> std::io::Result<File> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            crate::sandbox::loopback_up()?;
            File::open("/proc/thread-self/ns/net")
        };
        Self(Arc::new(aside(make).expect("a network namespace, which needs root")))
    }

    /// A file that stands for it, as long as this process and this value last.
    pub(crate) fn file(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd()))
    }

    /// Does something inside: sockets stay in the network that they are made in.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        aside(|| {
            setns(&*self.0, CloneFlags::CLONE_NEWNET)
                .expect("entering a network namespace, which needs root");
            work()
        })
    }

    pub fn listen(&self, address: SocketAddr) -> std::io::Result<TcpListener> {
        self.inside(|| TcpListener::bind(address))
    }
}

/// On a thread of its own: namespaces belong to threads, and this one's end with it.
fn aside<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| scope.spawn(work).join()).expect("nothing in there panics")
}

/// An address on the loopback that is this caller's alone, with `count` free ports from the
/// one that it names. No port has to be found free and then lost to somebody else.
pub(crate) fn own_loopback(count: u16) -> SocketAddr {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    loop {
        let n = std::process::id().wrapping_mul(256).wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed));
        let [_, a, b, c] = n.to_be_bytes();
        // Neither network nor broadcast addresses, nor what others take for granted.
        if a == 0 || a == 255 || c == 0 || c == 255 {
            continue;
        }
        let base = 20_000 + u16::try_from(n % 10_000).unwrap_or(0);
        let host = Ipv4Addr::new(127, a, b, c);
        if (base..base + count).all(|port| TcpListener::bind((host, port)).is_ok()) {
            return (host, base).into();
        }
    }
}
