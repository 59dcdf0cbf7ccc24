//! The specifications of our services.

use super::*;
use cvm_protocol::mux::MuxSpec;
use cvm_protocol::storage::{CryptSpec, StorageSpec};
use cvm_secrets::keys::KeyRing;
use serde::de::DeserializeOwned;

fn told<T: DeserializeOwned>(pairs: &[(&str, &str)], service: &str) -> T {
    let config = config(pairs);
    let keys = config.master_key.as_ref().map(KeyRing::derive);
    let given = Given { config: &config, keys: keys.as_ref(), owner_epoch: 5, has_preload: false };
    let (_, told) = roles::gateway(&given).unwrap();
    let (_, line) = told.iter().find(|(name, _)| *name == service).unwrap();
    serde_json::from_slice(line).unwrap()
}

#[test]
fn the_specification_carries_what_the_worker_needs_and_reads_back() {
    let read: StorageSpec = told(&[&S3[..], &[("S3_HEARTBEAT", "7")]].concat(), "storage");
    assert_eq!((read.bucket.as_str(), read.prefix.as_str()), ("claws", "openclaw-data"));
    assert_eq!(read.secret_access_key.unpack().unwrap().as_slice(), b"not-a-secret");
    assert_eq!((read.heartbeat_s, read.drain_s, read.drill_s, read.owner_epoch), (7, 20, 86_400, 5));
    assert_eq!(read.manifest_key.unpack().unwrap().len(), 32);
    let CryptSpec::Clear { password, .. } = &read.crypt else { panic!("nothing was overridden") };
    assert_eq!(password.unpack().unwrap().as_slice(), b"jrq/5kUcKRy6NqQbM7C5bnpMnrR6+7d/aALQruAzhwk=");
}

#[test]
fn the_specification_carries_what_the_client_needs_and_reads_back() {
    let given = [
        ("MASTER_KEY", "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M="),
        ("MUX_BASE_URL", "https://mux.example.org/"),
        ("MUX_REGISTER_KEY", "register"),
        ("MUX_INBOUND_URL", "https://me.example.org/v1/mux/inbound"),
        ("MUX_ACK_REPLICATION_WAIT", "3"),
    ];
    let read: MuxSpec = told(&given, "mux");
    assert_eq!((read.base_url.as_str(), read.ack_wait_s, read.port), ("https://mux.example.org", 3, 18790));
    assert_eq!(read.register_key.unpack().unwrap().as_slice(), b"register");
    assert_eq!((read.device_id.len(), read.replication), (64, None));
}
