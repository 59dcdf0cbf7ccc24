//! What the storage worker and the mux client are told: the only messages with which secrets leave PID 1 for them.

use crate::config::{Gateway, Mux, S3};
use cvm_protocol::accounts::MUX_UID;
use cvm_protocol::mux::{MUX_INBOUND_PORT, MuxSpec};
use cvm_protocol::paths;
use cvm_protocol::storage::{CryptSpec, StorageSpec};
use cvm_secrets::base64_bytes::PackedBytes;
use cvm_secrets::keys::KeyRing;

/// For the bucket of a configuration; the tree belongs to `user`.
pub fn storage_spec(s3: &S3, keys: &KeyRing, user: &str) -> StorageSpec {
    let crypt = match &s3.crypt_override {
        Some(given) => CryptSpec::Obscured {
            password: PackedBytes::pack(given.password.expose()),
            salt: PackedBytes::pack(given.salt.expose()),
        },
        None => CryptSpec::Clear {
            password: PackedBytes::pack(keys.crypt_password.expose().as_bytes()),
            salt: PackedBytes::pack(keys.crypt_salt.expose().as_bytes()),
        },
    };
    StorageSpec {
        bucket: s3.bucket.as_str().to_owned(),
        prefix: s3.prefix.as_str().to_owned(),
        region: s3.region.as_str().to_owned(),
        provider: s3.provider.as_str().to_owned(),
        endpoint: s3.endpoint.as_ref().map(|endpoint| endpoint.as_str().to_owned()),
        access_key_id: PackedBytes::pack(s3.access_key_id.expose()),
        secret_access_key: PackedBytes::pack(s3.secret_access_key.expose()),
        session_token: s3.session_token.as_ref().map(|token| PackedBytes::pack(token.expose())),
        crypt,
        manifest_key: PackedBytes::pack(keys.manifest_key.expose()),
        user: user.to_owned(),
        anchor: s3.anchor.as_ref().map(ToString::to_string),
        adopt: s3.adopt,
        owner_epoch: 0,
        heartbeat_s: s3.heartbeat_s.get(),
        drain_s: s3.drain_s.get(),
        drill_s: s3.drill_s.get(),
    }
}

pub fn mux_spec(mux: &Mux, gateway: &Gateway, keys: &KeyRing, has_bucket: bool) -> MuxSpec {
    MuxSpec {
        base_url: mux.base_url.as_str().to_owned(),
        register_key: PackedBytes::pack(mux.register_key.expose()),
        inbound_url: mux.inbound_url.as_str().to_owned(),
        device_id: keys.device_seed.device_id(),
        port: MUX_INBOUND_PORT,
        gateway_port: gateway.port.get(),
        gateway_token: PackedBytes::pack(keys.gateway_token.expose().as_bytes()),
        directory: paths::MUX_STATE.to_owned(),
        replication: has_bucket.then(|| paths::REPLICATION_SOCKET.to_owned()),
        ack_wait_s: mux.ack_wait_s.get(),
        drain_s: gateway.stop_timeout_s.get(),
        uid: MUX_UID,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, Storage};
    use crate::env::Environment;
    use cvm_protocol::json_lines;

    fn storage(more: &[(&str, &str)]) -> StorageSpec {
        let given = [
            ("MASTER_KEY", "0K9uLzQl7R8HwPAIEkdJI6NTMJt+D+GRInyU+Bbsl+M="),
            ("S3_BUCKET", "claws"),
            ("S3_ENDPOINT", "https://s3.example.org"),
            ("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE"),
            ("AWS_SECRET_ACCESS_KEY", "not-a-secret"),
        ];
        let pairs = given.iter().chain(more).map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
        let Ok((config, _)) = Config::parse(&Environment::new(pairs)) else { panic!("it is complete") };
        let (Storage::S3(s3), Some(master)) = (&config.storage, &config.master_key) else { panic!("local") };
        storage_spec(s3, &KeyRing::derive(master), "openclaw")
    }

    #[test]
    fn the_specification_carries_what_the_worker_needs_and_reads_back() {
        let line = json_lines::line(&storage(&[("S3_HEARTBEAT", "7")]));
        let read: StorageSpec = serde_json::from_slice(&line).unwrap();
        assert_eq!((read.bucket.as_str(), read.prefix.as_str()), ("claws", "openclaw-data"));
        assert_eq!(read.secret_access_key.unpack().unwrap().as_slice(), b"not-a-secret");
        assert_eq!((read.heartbeat_s, read.drain_s, read.drill_s), (7, 20, 86_400));
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
        let pairs = given.iter().map(|(n, v)| (n.as_bytes().to_vec(), v.as_bytes().to_vec()));
        let Ok((config, _)) = Config::parse(&Environment::new(pairs)) else { panic!("it is complete") };
        let (Some(mux), Some(master)) = (&config.mux, &config.master_key) else { panic!("both are given") };
        let spec = mux_spec(mux, &config.gateway, &KeyRing::derive(master), false);
        let read: MuxSpec = serde_json::from_slice(&json_lines::line(&spec)).unwrap();
        assert_eq!(
            (read.base_url.as_str(), read.ack_wait_s, read.port),
            ("https://mux.example.org", 3, 18790)
        );
        assert_eq!(read.register_key.unpack().unwrap().as_slice(), b"register");
        assert_eq!((read.device_id.len(), read.replication), (64, None));
    }
}
