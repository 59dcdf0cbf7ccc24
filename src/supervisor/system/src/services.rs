//! Each file describes one service: how it is run, which gates it needs and provides, and its specification.
//!
//! A new service is a file here and a line in its role. `cvm_machine::service` holds the rules that are the same for
//! all services.

pub(crate) mod dockerd;
pub(crate) mod gateway;
pub(crate) mod mux;
pub(crate) mod sshd;
pub(crate) mod standin;
pub(crate) mod storage;
