//! The services, one file each: how it is run, what it needs, what it provides, and what it is told.
//!
//! A new service is a file here and a line in its role. What is the same for all of them is in
//! `cvm_machine::service`.

pub(crate) mod dockerd;
pub(crate) mod gateway;
pub(crate) mod mux;
pub(crate) mod sshd;
pub(crate) mod standin;
pub(crate) mod storage;
