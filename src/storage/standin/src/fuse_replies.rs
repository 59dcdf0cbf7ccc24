//! The reply to each FUSE request. Pure: bytes in, bytes out.
//!
//! The layouts are those of `linux/fuse.h`, in the byte order of this machine.

use crate::kernel_dcache::Names;
use cvm_sys::fuse_dcache::Known;
use nix::errno::Errno;

/// Seconds: nothing changes any more.
const ENDLESS: u64 = 10 * 365 * 24 * 3600;

/// `struct fuse_in_header`.
const HEADER: usize = 40;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const GETXATTR: u32 = 22;
const LISTXATTR: u32 = 23;
const FLUSH: u32 = 25;
const READLINK: u32 = 5;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const RELEASEDIR: u32 = 29;
const ACCESS: u32 = 34;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const NOTIFY_REPLY: u32 = 41;
const BATCH_FORGET: u32 = 42;
const READDIRPLUS: u32 = 44;

/// The kernel keeps the pages that it has read: nobody can read them again.
const KEEP_CACHE: u32 = 1 << 1;

/// Since Linux 6.9: give the requests again that a server has read and not answered.
const NOTIFY_RESEND: u32 = 7;

/// The reply to one request; none for a request that wants no reply. Without names the reply is ENOTCONN, as the
/// kernel itself answers for a dead server.
pub(crate) fn to(request: &[u8], names: Option<&Names>) -> Option<Vec<u8>> {
    let opcode = number(request, 4)?;
    let unique = long(request, 8)?;
    let node = long(request, 16)?;
    if matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT | NOTIFY_REPLY) {
        return None;
    }
    let body = request.get(HEADER..).unwrap_or_default();
    let content = names.map_or(Err(Errno::ENOTCONN), |names| content(opcode, node, body, names));
    Some(match content {
        Ok(content) => message(0, unique, &content),
        Err(errno) => message(-(errno as i32), unique, &[]),
    })
}

pub(crate) fn resend() -> Vec<u8> {
    message(NOTIFY_RESEND.cast_signed(), 0, &[])
}

fn content(opcode: u32, node: u64, body: &[u8], names: &Names) -> Result<Vec<u8>, Errno> {
    match opcode {
        LOOKUP => {
            let name = body.split(|byte| *byte == 0).next().unwrap_or_default();
            Ok(entry(names.child(node, name).as_ref()))
        }
        GETATTR => names.node(node).as_ref().map(attributes).ok_or(Errno::ESTALE),
        OPEN if Names::is_made_up(node) => Err(Errno::EIO),
        OPEN | OPENDIR => Ok(words(&[0, 0, KEEP_CACHE, 0])),
        // An empty directory.
        READDIR | READDIRPLUS => Ok(Vec::new()),
        READ | READLINK => Err(Errno::EIO),
        RELEASE | RELEASEDIR | FLUSH | ACCESS | DESTROY => Ok(Vec::new()),
        GETXATTR => Err(Errno::ENODATA),
        // A caller without a buffer asks how much room is needed.
        LISTXATTR if number(body, 0).unwrap_or(0) == 0 => Ok(words(&[0, 0])),
        LISTXATTR => Ok(Vec::new()),
        STATFS => Ok(file_system()),
        _ => Err(Errno::ENOSYS),
    }
}

/// `struct fuse_entry_out`. A node of 0 is a name that does not exist and need not be asked for
/// again, which ENOENT cannot say.
fn entry(known: Option<&Known>) -> Vec<u8> {
    let (node, generation) = known.map_or((0, 0), |k| (k.nodeid, u64::from(k.generation)));
    let mut out = Vec::with_capacity(128);
    for value in [node, generation, ENDLESS, ENDLESS, 0] {
        out.extend(value.to_ne_bytes());
    }
    push_attributes(&mut out, known);
    out
}

/// `struct fuse_attr_out`.
fn attributes(known: &Known) -> Vec<u8> {
    let mut out = Vec::with_capacity(104);
    for value in [ENDLESS, 0] {
        out.extend(value.to_ne_bytes());
    }
    push_attributes(&mut out, Some(known));
    out
}

/// `struct fuse_attr`.
fn push_attributes(out: &mut Vec<u8>, known: Option<&Known>) {
    let Some(known) = known else {
        out.extend([0; 88]);
        return;
    };
    let (second, fraction) = known.modified;
    for value in [known.inode, known.size, known.blocks, second, second, second] {
        out.extend(value.to_ne_bytes());
    }
    let rest = [fraction, fraction, fraction, known.mode, known.links, known.uid, known.gid, 0, 4096, 0];
    out.extend(words(&rest));
}

/// `struct fuse_kstatfs`: nothing there, in blocks of a size one may divide by.
fn file_system() -> Vec<u8> {
    let mut out = vec![0; 40];
    out.extend(words(&[4096, 255, 4096, 0, 0, 0, 0, 0, 0, 0]));
    out
}

/// `struct fuse_out_header` and what follows it.
fn message(error: i32, unique: u64, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(16 + content.len()).unwrap_or(16);
    let mut out = Vec::with_capacity(16 + content.len());
    out.extend(length.to_ne_bytes());
    out.extend(error.to_ne_bytes());
    out.extend(unique.to_ne_bytes());
    out.extend(content);
    out
}

fn words(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at + 8)?.try_into().ok().map(u64::from_ne_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut out = words(&[u32::try_from(HEADER + body.len()).unwrap(), opcode]);
        out.extend(77u64.to_ne_bytes());
        out.extend(node.to_ne_bytes());
        out.extend([0; 16]);
        out.extend(body);
        out
    }

    #[test]
    fn every_answer_has_the_length_that_the_kernel_demands() {
        let names = Names::default();
        for (opcode, body, length) in [
            (LOOKUP, &b"name\0"[..], 16 + 128),
            (GETATTR, &[0; 16], 16 + 104),
            (OPENDIR, &[0; 8], 16 + 16),
            (READDIR, &[0; 40], 16),
            (STATFS, &[], 16 + 80),
            (LISTXATTR, &[0; 8], 16 + 8),
            (LISTXATTR, &[1; 8], 16),
            (26, &[0; 64], 16),
        ] {
            let answer = to(&request(opcode, 1, body), Some(&names)).unwrap();
            assert_eq!(answer.len(), length, "opcode {opcode}");
            assert_eq!(number(&answer, 0), u32::try_from(length).ok(), "opcode {opcode}");
            assert_eq!(long(&answer, 8), Some(77), "opcode {opcode}");
        }
    }

    #[test]
    fn what_wants_no_answer_gets_none() {
        for opcode in [FORGET, BATCH_FORGET, INTERRUPT] {
            assert_eq!(to(&request(opcode, 1, &[0; 16]), Some(&Names::default())), None);
        }
    }

    #[test]
    fn garbage_of_any_length_is_survived() {
        let whole = request(LOOKUP, u64::MAX, &[0xff; 300]);
        for end in 0..whole.len() {
            let _ = to(&whole[..end], Some(&Names::default()));
        }
        for opcode in 0..5000 {
            let _ = to(&request(opcode, 9, &[]), Some(&Names::default()));
        }
    }

    #[test]
    fn a_name_nobody_knows_is_absent_for_good() {
        let answer = to(&request(LOOKUP, 1, b"new\0"), Some(&Names::default())).unwrap();
        assert_eq!(number(&answer, 4), Some(0));
        assert_eq!(long(&answer, 16), Some(0));
        assert_eq!(long(&answer, 32), Some(ENDLESS));
    }
}
