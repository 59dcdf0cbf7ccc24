//! What the tests stand on: throw-away machines with a real PID 1, a real S3 server with a
//! network that fails on demand, and waiting for conditions.
//!
//! * [`sandbox`]: the namespaces and the root file system, as a library and as `cvm-sandbox`.
//! * [`machine`]: a machine with the product installed, to be started, watched and broken.
//! * [`network`]: addresses of one's own, and networks that machines share and come back to.
//! * [`garage`], [`s3`]: an S3 server, and what it stores as the store sees it.
//! * [`proxy`]: what networks and providers do to requests.
//! * [`cloud`]: a bucket behind such a network, and machines in S3 mode on it.
//! * [`engine`]: a machine with a container engine, and the image in it.
//! * [`dice`]: chance that can be had again.
//! * [`judge`]: the bucket as stock rclone sees it.
//! * [`evidence`]: where a secret may have been left.
//! * [`mux`], [`chat`]: a mux-server, and a model or what takes the gateway's place.
//! * [`digest`]: whether two trees are the same.
//! * [`disk`]: a disk whose power can be cut.
//! * [`sqlite`]: what a database holds that the test programs write to.
//! * [`ssh`]: keys of people, and how they come in.
//! * [`pins`]: the list of the least safe versions of what we ship.
//! * [`tools`]: programs that know nothing of the product and judge what it stores.
//! * [`versioned`]: files that say which version of themselves they are.
//! * [`wait`]: waiting for something to become true, with words for when it does not.

#[cfg(test)]
mod arrows;
pub mod chat;
pub mod cloud;
pub mod dice;
pub mod digest;
pub mod disk;
pub mod engine;
pub mod evidence;
pub mod garage;
mod http;
pub mod judge;
pub mod machine;
pub mod mux;
pub mod network;
pub mod pins;
pub mod proxy;
pub mod s3;
pub mod sandbox;
pub mod serve;
pub mod sqlite;
pub mod ssh;
#[cfg(test)]
mod tests;
pub mod tools;
pub mod versioned;
pub mod wait;

pub use chat::{Chat, Said};
pub use cloud::{Cloud, Mode, flush, independent, restore_by_hand, storage};
pub use dice::{Dice, rounds, soaks};
pub use digest::{difference, digest};
pub use disk::Disk;
pub use engine::Engine;
pub use garage::Garage;
pub use judge::Judge;
pub use machine::{Builder, Machine, Process};
pub use mux::Mux;
pub use network::Network;
pub use pins::least_safe;
pub use proxy::{Fault, Proxy, Rule};
pub use wait::{Turns, before, until};
