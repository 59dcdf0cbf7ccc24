//! Answers for a dead FUSE server.
//!
//! /data is an overlay whose lower layer is the bucket, a FUSE mount that `cvm-storage` serves.
//! Once everything has been copied up, no content of the lower layer is needed any more, but the
//! overlay still asks it: for every new name, and whenever a directory that both layers have is
//! listed. When its server dies the kernel aborts the connection, and all of that fails with
//! ENOTCONN. The connection lives as long as one descriptor of it is open, so this process keeps
//! a duplicate; when the worker is gone it answers what the overlay must hear to go on.
//!
//! ```text
//! worker ── F (and /dev/fuse), H, D, ? ──> standin.sock
//!                                          │ the connection ends
//!                                          ├─ after H: answer in the worker's place
//!                                          └─ before:  close, so that the kernel aborts at once
//! ```
//!
//! Refuses to serve content (there is none here), to open anything below /data (that would be
//! asking itself), and to end on bad input. One thread, and no call in it waits but `poll`.

mod control_socket;
mod fuse_device;
mod fuse_replies;
mod kernel_dcache;

use std::process::ExitCode;

const USAGE: &str = "cvm-standin is started by cvm-init:\n    \
    cvm-standin [SOCKET]        hold the descriptor of the bucket's mount, and answer for its server";

fn main() -> ExitCode {
    let arguments: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    let outcome = match &arguments[..] {
        [] => control_socket::work(cvm_protocol::paths::STANDIN_SOCKET.as_ref()),
        [socket] if !socket.as_encoded_bytes().starts_with(b"-") => control_socket::work(socket.as_ref()),
        _ => Err(USAGE.to_owned()),
    };
    match outcome {
        Ok(never) => match never {},
        Err(why) => {
            eprintln!("cvm-standin: {why}");
            ExitCode::FAILURE
        }
    }
}
