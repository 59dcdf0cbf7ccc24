use crate::config::S3;
use crate::entry::Entry;
use crate::gates;
use cvm_machine::description::{Environment, Service};
use cvm_machine::gate::Provides;
use cvm_protocol::storage::{CryptSpec, STORAGE_WORKER, StorageSpec};
use cvm_secrets::base64_bytes::PackedBytes;
use cvm_secrets::keys::KeyRing;
use std::time::Duration;

/// How much longer than `S3_DRAIN_TIMEOUT` a stop may take. At that timeout the worker itself reports what is
/// missing, and ends.
const DRAIN_MARGIN: Duration = Duration::from_secs(5);
const UNSAID: &str = "Perhaps not everything is in the bucket: the storage worker ended without saying what is \
                      missing; missing files, if any, are on the volume and are pushed at the next boot";
/// Limits for the Go runtime, whose collector would let the heap grow to twice its used size, and for malloc, which
/// would keep freed memory for each of the many threads.
const LIMITS_OF_MEMORY: &[(&str, &str)] =
    &[("GOGC", "50"), ("GOMEMLIMIT", "128MiB"), ("MALLOC_ARENA_MAX", "2")];

/// `user` owns the files of the tree; `owner_epoch` is the epoch of the proven owner.
pub(crate) fn entry(s3: &S3, keys: Option<&KeyRing>, user: &str, owner_epoch: u32) -> Entry {
    let service = Service {
        has_channel: true,
        // Without the user's variables: one such as AWS_CA_BUNDLE would change what rclone does.
        environment: Environment { variables: LIMITS_OF_MEMORY, ..Environment::default() },
        // Otherwise it could push the files of the volume to the bucket of somebody else.
        needs: &[gates::VOLUME],
        provides: vec![Provides {
            gate: gates::STORAGE,
            called: "the storage",
            by: "the storage worker",
            in_doubt: "Nothing is replicated",
            says: Some(format!(
                "S3 storage configured (bucket: {}), setting up rclone...",
                s3.bucket.as_str()
            )),
        }],
        must_drain: Some(UNSAID),
        // After all services that write into the tree.
        stop_order: 7,
        // The worker itself stops pushing at `S3_DRAIN_TIMEOUT`.
        grace: Duration::from_secs(u64::from(s3.drain_s.get())) + DRAIN_MARGIN,
        required: true,
        ..Service::new(STORAGE_WORKER, "the encrypted bucket", &["cvm-storage"])
    };
    Entry::with_specification(service, keys.map(|keys| specification(s3, keys, user, owner_epoch)).as_ref())
}

/// The specification of the storage worker.
pub fn specification(s3: &S3, keys: &KeyRing, user: &str, owner_epoch: u32) -> StorageSpec {
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
        owner_epoch,
        heartbeat_s: s3.heartbeat_s.get(),
        drain_s: s3.drain_s.get(),
        drill_s: s3.drill_s.get(),
    }
}
