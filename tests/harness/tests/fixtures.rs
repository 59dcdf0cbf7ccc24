//! A store with a proxy before it.

use crate::s3::{Bucket, Response};
use crate::{Garage, Proxy};
use std::time::Duration;

pub(crate) const PASSWORD: &str = "correct horse";
pub(crate) const SALT: &str = "battery staple";

/// A store, a proxy in front of it, and the bucket as seen through the proxy.
pub(crate) fn proxied() -> (Garage, Proxy, Bucket) {
    let garage = Garage::start();
    let proxy = Proxy::start(garage.address());
    let bucket = garage.s3().at(proxy.address()).bucket(garage.bucket());
    (garage, proxy, bucket)
}

/// One that does not wait long for an answer that never comes.
pub(crate) fn impatient(bucket: &Bucket) -> Bucket {
    let mut bucket = bucket.clone();
    bucket.s3.timeout = Duration::from_millis(300);
    bucket
}

pub(crate) fn put(bucket: &Bucket, key: &str, bytes: &[u8], condition: &[(&str, &str)]) -> u16 {
    bucket.send("PUT", key, condition, bytes).expect("an answer").status
}

pub(crate) fn says(response: &Response, text: &str) -> bool {
    String::from_utf8_lossy(&response.body).contains(text)
}
