//! The gates of a machine. Each is one line of the boot in `cvm status`.

use cvm_machine::gate::GateName;
use cvm_protocol::storage::STORAGE_GATE;

/// The host key and the configuration of sshd exist.
pub const SSH: GateName = GateName("ssh");
/// The volume belongs to the `MASTER_KEY` of this environment, so the environment's SSH keys open a shell.
pub const VOLUME: GateName = GateName("volume");
/// The tree at /data is the bucket's. This gate exists only in S3 mode.
pub const STORAGE: GateName = GateName(STORAGE_GATE);
/// The gateway's user exists, and its home and root's home link to the volume.
pub const HOME: GateName = GateName("home");
/// The configuration, workspace files and device identity of the gateway exist.
pub const STATE: GateName = GateName("state");
