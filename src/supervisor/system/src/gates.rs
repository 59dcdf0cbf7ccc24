//! The gates of a machine. Each is a line of the boot in `cvm status`.

use cvm_machine::gate::GateName;
use cvm_protocol::storage::STORAGE_GATE;

/// Host key and configuration of sshd are there.
pub const SSH: GateName = GateName("ssh");
/// The volume belongs to the key of this environment, and so the environment's keys open a shell.
pub const VOLUME: GateName = GateName("volume");
/// The tree at /data is the bucket's. Only with S3.
pub const STORAGE: GateName = GateName(STORAGE_GATE);
/// The gateway's user exists; its home and root's home lead to the volume.
pub const HOME: GateName = GateName("home");
/// Configuration, workspace files and device identity of the gateway are there.
pub const STATE: GateName = GateName("state");
