//! An entry of a role is a service together with its specification.

use cvm_machine::description::Service;
use cvm_protocol::json_lines::line;
use serde::Serialize;
use zeroize::Zeroizing;

/// A service of a role, and the specification that it gets at each start.
pub struct Entry {
    pub service: Service,
    /// One JSON line, with secrets in it.
    pub specification: Option<Zeroizing<Vec<u8>>>,
}

impl Entry {
    /// A program that is not ours, such as sshd.
    pub fn without_channel(service: Service) -> Self {
        Self { service, specification: None }
    }

    /// A program of ours.
    pub fn with_specification<T: Serialize>(service: Service, specification: Option<&T>) -> Self {
        Self { service, specification: specification.map(line) }
    }
}

/// The specifications of the services that have one, by name of the service.
pub type Specifications = Vec<(&'static str, Zeroizing<Vec<u8>>)>;
