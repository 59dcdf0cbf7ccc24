//! Throw-away machines with the product installed: put together by a [`Builder`], watched and broken as a
//! [`Machine`].

mod builder;
mod running;

pub use builder::Builder;
pub use running::{Machine, Process};

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// `CVM_OWNER` for whoever has this key, in this epoch.
pub fn owner_word(master_key: &str, epoch: &str) -> String {
    use cvm_secrets::keys;
    use cvm_secrets::owner::Epoch;
    use cvm_secrets::secret::Secret;
    let master = keys::MasterKey::new(Secret::copy_of(master_key.as_bytes())).expect("it is not empty");
    keys::owner_word(&master, Epoch::new(epoch.parse().expect("a number")).expect("a small one")).to_string()
}

/// Everything here has happened long before on any machine that is not broken, however busy it is
/// with others.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// The one of every machine in S3 mode. Like what a random generator prints: a weaker one is refused.
pub const MASTER_KEY: &str = "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M=";
/// Of that key: see tests/vectors/keys.json.
pub const DEVICE_ID: &str = "b82578d246fd5ff53bb0eb91da774cb27faa3612290a5966f36e4c2b61af1ea3";
pub const GATEWAY_TOKEN: &str = "zAFTUuSdbC5aQssqJbETwS5oEdhBGc5O";
pub const CRYPT_PASSWORD: &str = "jrq/5kUcKRy6NqQbM7C5bnpMnrR6+7d/aALQruAzhwk=";
pub const CRYPT_SALT: &str = "2kBa0tfg6UdY4fDnCeiDgqjrmnPuS/z8j0BDoG0BGvA=";

/// For [`Builder::fake_gateway`]: answers on the gateway's port until it is told to stop.
pub const HEALTHY: &str = "#!/bin/sh\nexec cvm-victim http 18789\n";
/// The same for what [`crate::Chat`] answers at [`STUB_PORT`] of the machine's network. The death of
/// the gateway cuts whatever it was asked.
pub const RELAY: &str = "#!/bin/sh\nexec cvm-victim relay 18789 9300\n";
pub const STUB_PORT: u16 = 9300;

/// As a variable that ends with `_B64` has it.
pub fn base64(bytes: impl AsRef<[u8]>) -> String {
    base64::Engine::encode(&base64::prelude::BASE64_STANDARD, bytes)
}

/// Before a command: runs it as the gateway's user, who is also the agent.
pub const AS_AGENT: [&str; 4] = ["setpriv", "--reuid=990", "--regid=990", "--clear-groups"];

/// Where the binaries under test lie: beside the test that runs.
pub fn binaries() -> PathBuf {
    if let Some(given) = std::env::var_os("CVM_BIN_DIR") {
        return given.into();
    }
    let exe = std::env::current_exe().expect("a running program has a path");
    let mut dir = exe.parent().expect("a program lies in a directory");
    if dir.ends_with("deps") {
        dir = dir.parent().expect("deps lies in the profile's directory");
    }
    dir.to_owned()
}

/// The root of the repository.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the repository").to_owned()
}

thread_local! {
    /// Where [`product_from`] has it.
    static PRODUCT: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// Puts machines together of the product in `dir`, as long as `work` runs on this thread.
pub fn product_from<T>(dir: &Path, work: impl FnOnce() -> T) -> T {
    PRODUCT.set(Some(dir.to_owned()));
    let done = work();
    PRODUCT.set(None);
    done
}

/// One of the product's binaries.
pub fn product(name: &str) -> PathBuf {
    PRODUCT.with_borrow(Clone::clone).map_or_else(|| binary(name), |dir| dir.join(name))
}

pub fn binary(name: &str) -> PathBuf {
    let path = binaries().join(name);
    assert!(path.exists(), "{} is missing: run `make build` first", path.display());
    path
}
