//! Finds out whether a TCP port is free, by binding it for a moment.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, Ipv6Addr, TcpListener};

/// Whether the port is free on every address of both families. Reading /proc instead would take 20 ms and more,
/// because the kernel walks through its whole table of sockets.
pub fn is_free(port: u16) -> bool {
    let both = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port));
    match both.map_err(|e| e.kind()) {
        Ok(_) => true,
        Err(ErrorKind::AddrInUse) => false,
        // A kernel without IPv6.
        Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok(),
    }
}
