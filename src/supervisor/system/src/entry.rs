//! A service, together with what it is told.

use cvm_machine::description::Service;
use cvm_protocol::json_lines::line;
use serde::Serialize;
use zeroize::Zeroizing;

/// A service of a role, and what it is told at each start.
pub struct Entry {
    pub service: Service,
    /// One line with secrets in it; wiped when dropped.
    pub specification: Option<Zeroizing<Vec<u8>>>,
}

impl Entry {
    /// A program that knows nothing of us.
    pub fn without_channel(service: Service) -> Self {
        Self { service, specification: None }
    }

    /// A program of ours.
    pub fn with_specification<T: Serialize>(service: Service, specification: Option<&T>) -> Self {
        Self { service, specification: specification.map(line) }
    }
}

/// A sealed line for each service that has one, by the service's name.
pub type Specifications = Vec<(&'static str, Zeroizing<Vec<u8>>)>;
